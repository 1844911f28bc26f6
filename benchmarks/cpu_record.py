"""What a part of ``cpu.py`` is, what a record of it holds, and the one table that is made of records."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import measure
import torch
from measure import bytes_text, length_text, median, time_text

from sparsedsl.adjustable import Adjustable

__all__ = ["LIMITS", "Job", "Part", "judge", "measured", "new_record", "table"]

Record = dict[str, Any]
PRODUCT = 1536  # rows of the square matrices whose product says what the machine can do
PEERS = {"tiled": "tiled", "flex": "flex", "sdpa": "SDPA", "kept": "kept summaries"}


@dataclass(frozen=True)
class Limits:
    """Of a measurement, in seconds and tokens.

    - ``slow_s``: dense attention that takes longer is measured once. ``rounds_s``: of the rounds, after three.
    - ``dense_to``, ``tiled_to``, ``density_to``: tokens up to which dense attention and `tiled` are run, and choices counted.
    """

    slow_s: float = 4.0
    rounds_s: float = 12.0
    dense_to: int = 32768
    tiled_to: int = 8192
    density_to: int = 32768


LIMITS = Adjustable(Limits())


@dataclass(frozen=True)
class Job:
    """What is measured at a time."""

    part: str
    work: str
    length: int
    dim: int
    dtype: str
    rounds: int
    train: bool = False
    activations: bool = False


@dataclass(frozen=True)
class Part:
    """``works``: what can be measured, in words; ``measure(job)`` gives records; ``targets`` judges them together.

    ``quick``: works of a run that only shows that it works. ``skips(work, length, train)``: what is measured only where somebody asks for
    its name.
    """

    works: Mapping[str, str]
    measure: Callable[[Job], Iterator[Record]]
    lengths: Sequence[int]
    quick_lengths: Sequence[int]
    quick: Sequence[str]
    dims: Sequence[int] = (64,)
    dtypes: Sequence[str] = ("float32",)
    rounds: int = 5
    targets: Callable[[list[Record]], list[dict[str, Any]]] = lambda records: []
    skips: Callable[[str, int, bool], bool] = lambda work, length, train: False


def new_record(job: Job, title: str, unit: str = "s") -> Record:
    """A record without numbers."""
    return {
        "part": job.part, "work": job.work, "title": title, "length": job.length, "head_dim": job.dim, "dtype": job.dtype,
        "train": job.train, "threads": torch.get_num_threads(), "unit": unit, "median": {}, "goals": [], "load_average": measure.load(),
    }  # fmt: skip


def measured(
    record: Record, actions: Mapping[str, Callable[[], Any]], rounds: int, *, operations: float | None = None,
    scale: Mapping[str, float] | None = None,
) -> Record:  # fmt: skip
    """The record with the times of ``actions``, which take turns; ``ours`` is one of them.

    ``operations``: floating-point operations of the work; with them a product of torch takes its turn too. ``scale``: what times are
    multiplied with, where the action is a part of the work or many of it. Each runs once before, as calls compile and remember.
    """
    scale = scale or {}
    if operations is not None:
        matrix = torch.randn(PRODUCT, PRODUCT)
        actions = {**actions, "product": functools.partial(torch.mm, matrix, matrix)}
    first = {name: measure.seconds(action) for name, action in actions.items()}
    once = [name for name, took in first.items() if name == "sdpa" and took > LIMITS.now.slow_s]
    found = measure.alternate(
        {name: action for name, action in actions.items() if name not in once}, rounds, limit_s=LIMITS.now.rounds_s
    )
    found |= {name: [first[name]] for name in once}
    times = {name: [scale.get(name, 1.0) * s for s in values] for name, values in found.items()}
    record["median"] = {name: median(values) for name, values in times.items()}
    record["best"] = {name: min(values) for name, values in times.items()}
    record |= {"first": first, "rounds": {name: len(values) for name, values in times.items()}}
    rivals = [name for name in times if name not in ("ours", "product")]
    record["over_ours"] = {name: _ratio(times[name], times["ours"]) for name in rivals}
    if operations is not None:
        useful, product = operations / record["median"]["ours"], 2 * PRODUCT**3 / record["median"]["product"]
        record |= {"useful_gflops": useful / 1e9, "product_gflops": product / 1e9}
        record["rate_ratio"] = operations / (2 * PRODUCT**3) * _ratio(times["product"], times["ours"])
    return record


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Of times: the median of the ratios of a round, where both ran in every round."""
    if len(theirs) != len(ours):
        return median(theirs) / median(ours)
    return median(b / a for a, b in zip(ours, theirs, strict=True))


def judge(record: Record, what: str, got: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
    """Add a goal to the record, met or not."""
    record["goals"].append(measure.target(what, got, at_least=at_least, at_most=at_most))


# ---- the table -----------------------------------------------------------------------------------------------


HEADER = (
    "work", "tokens", "D", "dtype", "ours", *PEERS.values(), *(f"{name} / ours" for name in PEERS.values()), "ideal", "useful GFLOP/s",
    "product GFLOP/s", "useful / product", "goal", "met",
)  # fmt: skip


def table(records: Iterable[Record]) -> str:
    """Markdown; a number after ``~`` is an estimate, and what was not measured is left empty."""
    return measure.markdown(HEADER, map(_row, records))


def _row(record: Record) -> list[str]:
    took, ratios, estimated = record["median"], record.get("over_ours", {}), record.get("estimated", {})
    in_words = time_text if record["unit"] == "s" else bytes_text

    def value(name: str) -> str:
        return f"{'~' * (name in estimated)}{in_words(took[name])}" if name in took else ""

    def number(key: str, digits: int) -> str:
        return f"{record[key]:.{digits}f}" if key in record else ""

    goals = "; ".join(f"{goal['what']} {goal['got']:.3g}, {goal['wanted']} {goal['limit']:.3g}" for goal in record["goals"])
    met = ("pass" if all(goal["pass"] for goal in record["goals"]) else "MISS") if record["goals"] else ""
    row = [record["title"] + ", forward and backward" * record["train"], length_text(record["length"]), str(record["head_dim"])]
    row += [record["dtype"], value("ours"), *map(value, PEERS)]
    row += [f"{ratios[name]:.2f}" if name in ratios else "" for name in PEERS]
    row += [number("ideal", 1), number("useful_gflops", 0), number("product_gflops", 0), number("rate_ratio", 2)]
    return [*row, goals, met]
