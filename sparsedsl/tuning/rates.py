"""The speed of this machine: measured in half a second, once, and remembered in the cache folder (``SPARSEDSL_TUNE``)."""

from __future__ import annotations

import functools
import logging
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from sparsedsl.adjustable import Adjustable
from sparsedsl.settings import settings, stage, tune_mode
from sparsedsl.torch_private import flash_for_cpu, linear, no_modes
from sparsedsl.tuning.machine import BUILT_IN, HEAD_DIM, KEYS, ROWS, Machine
from sparsedsl.tuning.store import Store

__all__ = ["MEASURING", "Disturbed", "Measuring", "has_linear", "machine", "machine_key", "measure"]

# Raised when what is measured changes: numbers that mean something else are then measured anew.
_METHOD = 3
_ROUNDS = 7
_TINY_CALLS = 100
_SOFTMAX = (256, 1024)
_BATCH, _BATCH_KEYS = 16, 256
_GATHERED, _GATHERED_FROM = 4096, 65536

logger = logging.getLogger("sparsedsl")

_machines: dict[tuple[str, int], Machine] = {}
_lock = threading.Lock()  # two threads that measure at once would measure each other


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


# The thread that held the lock does not exist in a forked child.
os.register_at_fork(after_in_child=_renew_lock)


@dataclass(frozen=True)
class Measuring:
    """``seconds`` for the rounds; making the tensors and warming up comes before. ``calm``: median over least time, for the probe in the
    middle, of a machine that does nothing else; ``turns``: whether products that all take as long as a turn of the scheduler spoil it."""

    seconds: float = 0.35
    calm: float = 1.6
    turns: bool = True


MEASURING = Adjustable(Measuring())


class Disturbed(Exception):
    """The machine was too busy to be measured."""


def machine() -> Machine:
    """The rates of this machine with the present ``torch.get_num_threads()``; a dictionary lookup from the second call on.

    Which numbers these are is up to ``SPARSEDSL_TUNE``. A record that is damaged, a folder that cannot be written and a measurement that
    fails are logged as warnings of the logger "sparsedsl"; the call goes on. :class:`~sparsedsl.errors.SettingsError` if a switch has
    a value it cannot have.

    >>> import os
    >>> os.environ["SPARSEDSL_TUNE"] = "off"
    >>> machine().source
    'built in'
    >>> del os.environ["SPARSEDSL_TUNE"]
    >>> machine().source.split()[0] in ("measured", "built")  # built in, if the machine is too busy to be measured
    True
    >>> machine() is machine()
    True
    """
    wanted = (tune_mode(), torch.get_num_threads())
    known = _machines.get(wanted)
    if known is not None:
        return known
    with _lock:
        if wanted not in _machines:
            _machines[wanted] = _find(wanted[0])
        return _machines[wanted]


def _find(mode: str) -> Machine:
    if mode == "off":
        return _built_in()
    store, key = Store(settings().cache / "tuning"), machine_key()
    remembered = store.get(key) if mode == "cached" else None
    if remembered is not None:
        try:
            return Machine.from_json(remembered)
        except ValueError as error:
            logger.warning("%s does not hold the speed of a machine (%s): measured anew", store.path(key), error)
    try:
        with stage("measure the machine"):
            measured = measure()
    except Disturbed as error:
        logger.info("the machine is not measured now, %s: built-in numbers are used, the next process tries again", error)
        return _built_in()
    except Exception as error:  # whatever it is: nobody's attention may fail because a stopwatch did
        logger.warning("measuring the machine failed (%s: %s): built-in numbers are used", type(error).__name__, error)
        return _built_in()
    store.put(key, measured.to_json())
    return measured


def _built_in() -> Machine:
    return BUILT_IN if has_linear() else BUILT_IN.without_linear()


def machine_key() -> dict[str, Any]:
    """What the rates depend on, as a key for a :class:`~sparsedsl.tuning.store.Store`: another value means another record.

    >>> machine_key()["threads"] == torch.get_num_threads()
    True
    """
    return {
        "kind": "machine",
        "method": _METHOD,
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "linear": has_linear(),
    }


@functools.cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == "model name" and value.strip():
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def has_linear() -> bool:
    """Whether ``torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")`` is there and computes ``x @ w.T`` of fp32 matrices.

    The operator is twice as fast as ``torch.mm``, and private to torch: it is tried before it is trusted, once a process.

    >>> has_linear() in (True, False)
    True
    """
    try:
        with _plain_surroundings():
            # Whole numbers, so that both sides are exact; rows that lie apart; one row.
            numbers = (torch.arange(40 * 24, dtype=torch.float32, device="cpu") * 7 % 17 - 8).view(40, 24)
            w = (torch.arange(33 * 16, dtype=torch.float32, device="cpu") * 5 % 13 - 6).view(33, 16)
            trials = [(numbers[:, :16], w), (numbers[:1, 8:], w), (numbers[3:36:2, 4:20], w[1:])]
            return all(torch.equal(linear(x, w), torch.mm(x, w.T)) for x, w in trials)
    except Exception:  # no such operator, other arguments, no oneDNN in this build, no kernel for this processor, ...
        return False


@contextmanager
def _plain_surroundings() -> Iterator[None]:
    """Neither gradients nor autocast nor fake tensors, whatever the caller is in the middle of."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), no_modes():
        yield


def measure() -> Machine:
    """Measure this machine: the rates of :class:`~sparsedsl.tuning.machine.Machine`, nothing remembered. Half a second.

    Raises :class:`Disturbed` if other programs kept the processor so busy that the times mean nothing. Random numbers, gradients,
    autocast and the number of threads are left as they are.

    >>> try:
    ...     measured = measure()
    ... except Disturbed:
    ...     measured = BUILT_IN
    >>> measured.call_us > 0 and len(measured.matmul_gflops) == len(ROWS)
    True
    """
    with _plain_surroundings():
        seconds, disturbed = _best_seconds(_probes())
    if disturbed:
        raise Disturbed("other programs were using the processor")
    product = {m: 2e-9 * m * KEYS * HEAD_DIM for m in ROWS}
    batch = {m: 2e-9 * m * _BATCH * _BATCH_KEYS * HEAD_DIM for m in ROWS}
    elements = _SOFTMAX[0] * _SOFTMAX[1]
    return Machine(
        name=f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        source=f"measured {datetime.now(UTC):%Y-%m-%d}",
        linear_gflops=tuple(product[m] / seconds["linear", m] if has_linear() else 0.0 for m in ROWS),
        matmul_gflops=tuple(product[m] / seconds["matmul", m] for m in ROWS),
        batched_gflops=tuple(batch[m] / seconds["batched", m] for m in ROWS),
        flash_gflops=4e-9 * 2 * 1024 * 1024 * HEAD_DIM / seconds["flash", 0],
        softmax_ns=1e9 * seconds["softmax", 0] / elements,
        pass_ns=1e9 * seconds["pass", 0] / elements,
        call_us=1e6 * seconds["call", 0] / _TINY_CALLS,
        gather_gbs=2 * 4e-9 * _GATHERED * HEAD_DIM / seconds["gather", 0],
    )


def _probes() -> dict[tuple[str, int], Callable[[], object]]:
    """What is timed, each with its tensors at hand."""
    matrix, other, tiny = _numbers(*_SOFTMAX), torch.zeros(_SOFTMAX, dtype=torch.float32, device="cpu"), _numbers(8)
    heads, source = _numbers(1, 2, 1024, HEAD_DIM), _numbers(_GATHERED_FROM, HEAD_DIM)
    scattered = torch.arange(_GATHERED, device="cpu") * 2654435761 % _GATHERED_FROM
    keys, batched_keys = _numbers(KEYS, HEAD_DIM), _numbers(_BATCH, _BATCH_KEYS, HEAD_DIM)
    flash = flash_for_cpu()

    def softmax() -> None:
        matrix.sub_(matrix.amax(1, keepdim=True)).exp2_().sum(1)

    def tiny_calls() -> None:
        for _ in range(_TINY_CALLS):
            tiny.add_(0.0)

    probes: dict[tuple[str, int], Callable[[], object]] = {
        ("flash", 0): lambda: flash(heads, heads, heads),
        ("softmax", 0): softmax,
        ("pass", 0): lambda: matrix.add_(other),
        ("call", 0): tiny_calls,
        ("gather", 0): lambda: source.index_select(0, scattered),
    }
    for m in ROWS:
        queries, batched = _numbers(m, HEAD_DIM), _numbers(_BATCH, m, HEAD_DIM)
        probes["matmul", m] = functools.partial(torch.mm, queries, keys.T)
        probes["batched", m] = functools.partial(torch.bmm, batched, batched_keys.mT)
        if has_linear():
            probes["linear", m] = functools.partial(linear, queries, keys)
    return probes


def _numbers(*shape: int) -> torch.Tensor:
    """Ordinary numbers, and not random: the user's random numbers must not depend on what is remembered."""
    return torch.linspace(-1, 1, functools.reduce(int.__mul__, shape), dtype=torch.float32, device="cpu").view(shape)


def _best_seconds(probes: dict[tuple[str, int], Callable[[], object]]) -> tuple[dict[tuple[str, int], float], bool]:
    """The least time of each probe, and whether others were at work: then the samples of most probes lie far apart, or all are alike.

    In rounds, so that a neighbour's burst of work spoils one sample of all and not all of one.
    """
    for probe in probes.values():
        probe()
    samples: dict[tuple[str, int], list[float]] = {name: [] for name in probes}
    deadline = time.perf_counter() + MEASURING.now.seconds
    for done in range(_ROUNDS):
        if done > 1 and time.perf_counter() > deadline:
            break
        for name, probe in probes.items():
            probe()  # brings its tensors back into the processor's cache
            start = time.perf_counter()
            probe()
            samples[name].append(max(time.perf_counter() - start, 1e-9))
    apart = statistics.median(statistics.median(times) / min(times) for times in samples.values())
    best = {name: min(times) for name, times in samples.items()}
    return best, apart > MEASURING.now.calm or (MEASURING.now.turns and _waits(best))


def _waits(best: dict[tuple[str, int], float]) -> bool:
    """Whether products take a turn of the scheduler each, whatever their size: one of our threads waits for a core that another holds."""
    small, large = best["matmul", ROWS[0]], best["matmul", ROWS[-1]]
    return small > 1e-3 and large < 4 * small
