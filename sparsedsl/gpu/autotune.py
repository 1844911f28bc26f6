"""Which config a kernel is launched with: remembered, measured, or expected to be the fastest, as ``SPARSEDSL_TUNE`` says.

Input: a kernel, its shape, the target, a key, and (from whoever can run kernels) a stopwatch. Stages: look in memory; look in the store;
measure, if asked to; else ask the cost model. No candidate that fails ends a call: it is recorded with its reason.
"""

from __future__ import annotations

import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from sparsedsl.gpu.configs import Config, Shape, Work, default_config, refusal, space
from sparsedsl.gpu.costs import TileCounts, banded_tiles, estimated_held, ranked, seconds
from sparsedsl.gpu.estimates import registers
from sparsedsl.gpu.targets import Target
from sparsedsl.gpu.tuning_records import Record, TuningKey, recall, remember
from sparsedsl.plain_values import Reported
from sparsedsl.settings import tune_mode

__all__ = ["Chosen", "Session", "Trial", "Tuned", "Unusable", "choose", "session", "tune"]

BUDGET_S = 60.0
# How many candidates are compiled at most, the ones that the cost model likes best.
MOST_CANDIDATES = 24
# What is left when this few are left is decided by FINAL_ROUNDS samples of each.
FINALISTS, FINAL_ROUNDS = 3, 7
# A winner must be this much faster than the default: measured, or only expected. Less is noise, and no reason to compile anything else.
MEASURED_GAIN, EXPECTED_GAIN = 1.01, 1.20
# What is launched without a look at its binary may take this share of a thread's registers by the estimate, which often is half the truth.
TRUSTED_SHARE = 0.47

logger = logging.getLogger("sparsedsl")


@dataclass(frozen=True)
class Unusable:
    """Returned by a stopwatch instead of seconds: a candidate that does not compile, does not fit or spills, and why."""

    reason: str


Measure = Callable[[Config], "float | Unusable"]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Trial(Reported):
    """One candidate: the median of its ``samples``, or the reason why it has none."""

    config: Config
    seconds: float | None
    samples: int
    reason: str = ""


@dataclass(frozen=True)
class Tuned(Reported):
    """``config``: the fastest, None if no candidate could be used; ``trials`` in the order of the candidates."""

    config: Config | None
    trials: tuple[Trial, ...]
    took_s: float


@dataclass(frozen=True)
class Chosen(Reported):
    """``source``: "measured <date>", "cost model", or "default"; ``seconds`` a launch, if measured."""

    config: Config
    source: str
    seconds: float | None = None


@dataclass(frozen=True)
class Session:
    """How choices are made while :func:`session` is active: measured, even if something is remembered (``again``), watched.

    ``kernels``: the names of those that are measured, None: all; the others take what is remembered, or the cost model's choice."""

    budget_s: float = BUDGET_S
    again: bool = False
    progress: Progress | None = None
    chosen: Callable[[str, Chosen, Tuned | None], None] | None = None
    kernels: frozenset[str] | None = None

    def measures(self, kernel: str) -> bool:
        """Whether a kernel is among those that are measured."""
        return self.kernels is None or kernel in self.kernels


_chosen: dict[tuple[str, TuningKey], Chosen] = {}
_session: Session | None = None
_lock = threading.RLock()  # two threads that measure at once would measure each other


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


# The thread that held the lock does not exist in a forked child.
os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def session(settings: Session) -> Iterator[None]:
    """Make the choices of the body, in all threads, as ``settings`` say and as under ``SPARSEDSL_TUNE=full``."""
    # Not a context variable: the backward pass runs on threads of autograd's own.
    global _session
    before, _session = _session, settings
    _chosen.clear()
    try:
        yield
    finally:
        _session = before


def choose(
    kernel: str,
    shape: Shape,
    target: Target,
    key: TuningKey,
    measure: Measure | None = None,
    *,
    work: Work | None = None,
    tiles_at: Callable[[tuple[int, int]], TileCounts] | None = None,
) -> Chosen:
    """The config for a launch; a dictionary lookup from the second call on. Never fails, whatever the disk or a candidate does.

    ``measure``: seconds of a launch on the structure of this call, or :class:`Unusable`; None where nothing may be run now (a CUDA graph
    is recorded) or can be. ``tiles_at``: what is scheduled at a tile size (queries, keys). Without it and without the row width in
    ``work`` the cost model has nothing to go by, and the default is taken.

    Under ``SPARSEDSL_TUNE=off`` the default, and nothing is read or written. ``cached``: what is remembered, else the cost model's choice.
    ``full``: what is remembered, else it is measured and remembered. :class:`~sparsedsl.errors.SettingsError` if the switch is wrong.
    """
    mode = "full" if _session is not None else tune_mode()
    known = _chosen.get((mode, key))
    if known is not None:
        return known
    with _lock:
        if (mode, key) not in _chosen:
            found, final = _find(mode, kernel, shape, target, key, measure, work or Work(), tiles_at)
            if not final:
                return found
            _chosen[mode, key] = found
        return _chosen[mode, key]


def _find(
    mode: str,
    kernel: str,
    shape: Shape,
    target: Target,
    key: TuningKey,
    measure: Measure | None,
    work: Work,
    tiles_at: Callable[[tuple[int, int]], TileCounts] | None,
) -> tuple[Chosen, bool]:
    """The choice, and whether it holds for the rest of the process."""
    default = default_config(kernel, shape, target)
    if mode == "off":
        return Chosen(default, "default"), True
    now = _session or Session()
    measure = measure if now.measures(kernel) else None
    record = None if now.again and measure is not None else recall(key, lambda one: refusal(kernel, shape, target, work, one))
    tuned = None
    if record is None and mode == "full" and measure is not None:
        order = _by_expectation(kernel, shape, target, work, tiles_at)
        tuned = tune(order[:MOST_CANDIDATES], measure, key, budget_s=now.budget_s, progress=now.progress)
        record = _record(tuned)
        if record is None:
            logger.warning("no config of %s could be measured (%s): the default is used", kernel, _reasons(tuned))
    if record is not None:
        found = Chosen(record.config, f"measured {record.measured[:10]}", record.seconds)
    elif tuned is None and (tiles_at is not None or work.row_width is not None):
        found = Chosen(_expected(kernel, shape, target, work, tiles_at), "cost model")
    else:
        found = Chosen(default, "default")
    if now.chosen is not None:
        now.chosen(kernel, found, tuned)
    return found, mode != "full" or measure is not None or record is not None or not now.measures(kernel)


def _expected(kernel: str, shape: Shape, target: Target, work: Work, tiles_at: Callable[..., TileCounts] | None) -> Config:
    """The cost model's favourite, or the default where that is expected to be nearly as good: it is known to compile well."""
    default, *others = _by_expectation(kernel, shape, target, work, tiles_at)
    limit = TRUSTED_SHARE * target.registers_per_thread
    best = next((one for one in others if registers(kernel, shape, target, one) <= limit), default)
    counts = tiles_at or _banded(kernel, work)

    def expected(config: Config) -> float:
        tiles = counts((config.block_m, config.block_n))
        return seconds(kernel, shape, target, config, tiles, estimated_held(kernel, shape, target, config))

    return best if expected(best) * EXPECTED_GAIN < expected(default) else default


def _by_expectation(
    kernel: str, shape: Shape, target: Target, work: Work, tiles_at: Callable[..., TileCounts] | None
) -> tuple[Config, ...]:
    """The default, then every other candidate, the one that the cost model likes best first."""
    default, candidates = default_config(kernel, shape, target), space(kernel, shape, target, work)
    others = [config for config in candidates if config != default]
    if kernel in ("delta", "merge"):
        return (default, *others)
    return (default, *ranked(kernel, shape, target, others, tiles_at or _banded(kernel, work)))


def _banded(kernel: str, work: Work) -> Callable[[tuple[int, int]], TileCounts]:
    """Counts of a call of a usual size, where nobody has counted."""
    width = work.row_width if work.row_width is not None else 4096.0
    return lambda block: banded_tiles(16384, 16384, width, block, copies=16, by_key=kernel == "grad_kv")


def tune(
    candidates: Sequence[Config],
    measure: Measure,
    key: TuningKey | None = None,
    *,
    budget_s: float = BUDGET_S,
    progress: Progress | None = None,
) -> Tuned:
    """The fastest of ``candidates``; remembered under ``key``, if there is one.

    The first candidate is the default. Each is measured once, those in the slower half fall, the rest is measured again, and so on:
    round by round, so that a neighbour's burst of work spoils one sample of all and not all of one. The median decides, and the
    default wins unless another is clearly faster. What the budget does not reach is recorded as not tried; one candidate is.

    ``progress``: called with what is done, what there is to do, and words.

    >>> took = {Config(64, 64, 4, 2): 3e-3, Config(128, 64, 8, 3): 1e-3}
    >>> tune([*took, Config(16, 16, 4, 1)], lambda config: took.get(config, Unusable("too small"))).config
    Config(block_m=128, block_n=64, warps=8, stages=3, descriptors=False, heavy_first=False)
    """
    start = time.perf_counter()
    candidates = tuple(dict.fromkeys(candidates))
    samples: dict[Config, list[float]] = {config: [] for config in candidates}
    reasons: dict[Config, str] = {}
    left, finals, done, late = list(candidates), 0, 0, False
    while left and finals < FINAL_ROUNDS and not late:
        for config in left:
            _sample(config, measure, samples[config], reasons)
            done += 1
            if progress is not None:
                progress(done, max(done, _measurements(len(candidates))), reasons.get(config) or str(config))
            late = time.perf_counter() - start > budget_s
            if late:
                break
        left = [config for config in left if samples[config] and config not in reasons]
        if len(left) == 1:
            break
        if len(left) > FINALISTS + 1:
            left = _faster_half(left, samples, candidates[0])
        else:
            finals += 1
    trials = tuple(_trial(config, samples[config], reasons) for config in candidates)
    tuned = Tuned(_winner(left, trials), trials, time.perf_counter() - start)
    if key is not None and (record := _record(tuned)) is not None:
        remember(key, record)
    return tuned


def _sample(config: Config, measure: Measure, samples: list[float], reasons: dict[Config, str]) -> None:
    try:
        took = measure(config)
    except Exception as error:  # a compiler, a driver, memory: a candidate may fail in any way, the call goes on
        reasons[config] = f"{type(error).__name__}: {error}".strip()
        return
    if isinstance(took, Unusable):
        reasons[config] = took.reason
    elif not 0 < took < float("inf"):
        reasons[config] = f"measured {took} seconds"
    else:
        samples.append(float(took))


def _faster_half(left: list[Config], samples: dict[Config, list[float]], default: Config) -> list[Config]:
    """The half with the lesser medians, and the default: it is what the winner is compared with."""
    order = sorted(left, key=lambda config: statistics.median(samples[config]))[: max(FINALISTS, len(left) // 2)]
    return order + [default] * (default in left and default not in order)


def _measurements(candidates: int) -> int:
    """How many measurements a tuning takes at most."""
    total = candidates
    while candidates > FINALISTS + 1:
        candidates = max(FINALISTS, candidates // 2) + 1
        total += candidates
    return total + (FINAL_ROUNDS - 1) * candidates


def _trial(config: Config, samples: list[float], reasons: dict[Config, str]) -> Trial:
    if config in reasons or not samples:
        return Trial(config, None, len(samples), reasons.get(config, "not tried: the time was up"))
    return Trial(config, statistics.median(samples), len(samples))


def _winner(left: Sequence[Config], trials: Sequence[Trial]) -> Config | None:
    """The least median of those that were left; the default unless another is clearly faster."""
    took = {trial.config: trial.seconds for trial in trials if trial.seconds is not None and trial.config in left}
    if not took:
        return None
    best, default = min(took, key=took.__getitem__), trials[0].config
    return default if took.get(default, float("inf")) < took[best] * MEASURED_GAIN else best


def _record(tuned: Tuned) -> Record | None:
    if tuned.config is None:
        return None
    took = {trial.config: trial.seconds for trial in tuned.trials}
    tried = sum(not trial.reason.startswith("not tried") for trial in tuned.trials)
    unusable = sum(trial.seconds is None for trial in tuned.trials) - (len(tuned.trials) - tried)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Record(tuned.config, took[tuned.config] or 0.0, tuned.trials[0].seconds, date, tried, unusable)


def _reasons(tuned: Tuned) -> str:
    return "; ".join(dict.fromkeys(trial.reason for trial in tuned.trials[:3])) or "no candidate"
