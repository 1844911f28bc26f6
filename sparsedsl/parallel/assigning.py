"""Chunks of tokens -> ranks: several ways, of which the cheapest is taken. Everything here is deterministic.

No way wins everywhere: under a causal mask neighbours weigh differently, under a window they see the same keys, and packed documents do
both.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from sparsedsl.errors import ArgumentError
from sparsedsl.lang.advice import shown
from sparsedsl.parallel.gathering import Sight, gathered, refined
from sparsedsl.parallel.seen import united

__all__ = ["METHODS", "Costs", "Rates", "assigned", "costs_of"]

Tensor = torch.Tensor
Owner = tuple[int, ...]
METHODS = ("contiguous", "zigzag", "longest_first", "gathered", "cuts")
# Exchanges of two chunks that are tried once the best way is found; and runs of granules that chunks see above which none is.
SWAPS, MOST_RUNS = 24, 1 << 20
# Units of neighbouring chunks that are gathered: at most so many in all, or for a rank where there are many ranks.
MOST_UNITS, UNITS_A_RANK = 512, 4


@dataclass(frozen=True)
class Rates:
    """What a rank does in a second: ``pairs`` of query and key that it computes, for all its heads, and ``keys`` that it receives, with
    their values, for all heads. Only their ratio matters for the choice.

    The defaults are those of 32 heads of width 128, with 8 key heads, at 300 TFLOP/s and 50 GB/s.
    """

    pairs: float = 1.8e10
    keys: float = 1.2e7

    def __post_init__(self) -> None:
        for word, rate in (("pairs", self.pairs), ("keys", self.keys)):
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
                raise ArgumentError(f"Rates: {word} must be a positive number, a second; got {shown(rate)}")


@dataclass(frozen=True, eq=False)
class Costs:
    """``work (ranks,)``: pairs a rank computes. ``received (ranks,)``: keys it gets. ``seconds``: of the rank that takes the longest."""

    work: Tensor
    received: Tensor
    seconds: float


@dataclass(frozen=True, eq=False)
class Task:
    """What is to be assigned: ``work`` of each chunk; for each pattern the runs of granules that chunks see: chunk, first, and the one
    after the last; tokens of each granule."""

    work: Tensor
    runs: Sequence[tuple[Tensor, Tensor, Tensor]]
    granule_tokens: Tensor
    granules_a_chunk: int
    world: int
    equal: bool
    rates: Rates


def needed(task: Task, owner: Owner, pattern: int) -> Tensor:
    """Which granules each rank sees, ``(ranks, granules)``."""
    rank, first, stop = _seen(task, torch.tensor(owner), pattern)
    steps = torch.zeros((task.world, task.granule_tokens.numel() + 1), dtype=torch.int8)
    steps[rank, first] = 1
    steps[rank, stop] = -1
    return steps.cumsum(1, dtype=torch.int8)[:, :-1] > 0


def _seen(task: Task, ranks: Tensor, pattern: int) -> tuple[Tensor, Tensor, Tensor]:
    """As the runs of a pattern, of ranks in place of chunks."""
    chunk, first, stop = task.runs[pattern]
    return united(ranks[chunk], first, stop, task.granule_tokens.numel())


def costs_of(task: Task, owner: Owner) -> Costs:
    """What an assignment costs."""
    ranks, length = torch.tensor(owner), task.granule_tokens.numel()
    work = torch.zeros(task.world, dtype=torch.float64).index_add_(0, ranks, task.work)
    upto = torch.cat([torch.zeros(1, dtype=torch.int64), task.granule_tokens.cumsum(0)])
    own = torch.arange(ranks.numel()) * task.granules_a_chunk
    ends = (own, (own + task.granules_a_chunk).clamp(max=length))
    received = torch.zeros(task.world, dtype=torch.int64)
    for number in range(len(task.runs)):
        rank, first, stop = _seen(task, ranks, number)
        if not rank.numel():
            continue
        tokens = upto[stop] - upto[first]
        received.index_add_(0, rank, tokens)
        # What a rank sees of its own chunks: the tokens seen up to their ends.
        begin, before = rank * (length + 1) + first, torch.cat([torch.zeros(1, dtype=torch.int64), tokens.cumsum(0)])
        seen = []
        for end in ends:
            place = torch.searchsorted(begin, ranks * (length + 1) + end, right=True) - 1
            run = place.clamp(min=0)
            inside = upto[torch.minimum(end, stop[run])] - upto[first[run]]
            seen.append(torch.where(place < 0, 0, before[run] + torch.where(rank[run] == ranks, inside, tokens[run])))
        received.index_add_(0, ranks, seen[0] - seen[1])
    seconds = work / task.rates.pairs + received.double() / task.rates.keys
    return Costs(work, received, float(seconds.max()))


def assigned(task: Task, method: str) -> tuple[str, Owner, dict[str, Costs]]:
    """The way that was taken, the rank of each chunk, and what every way would cost."""
    tried: dict[str, tuple[Owner, Costs]] = {}
    unit = _unit(task)
    units = -(-task.work.numel() // unit)
    sight = _sight(task, unit) if method == "gathered" or (method == "auto" and units <= MOST_UNITS) else None
    for name, owner in _ways(task, method):
        tried[name] = owner, costs_of(task, owner)
    name = _cheapest(tried) if tried else "gathered"
    if sight is not None:
        owner = _spread(task, gathered(sight), unit)
        tried["gathered"] = owner, costs_of(task, owner)
        # Gathered chunks are less even: that is worth it only where the rank that receives the most receives less.
        if tried["gathered"][1].received.max() < tried[name][1].received.max():
            name = _cheapest(tried)
    if method == "auto" and sight is not None:
        start = _cheapest({way: one for way, one in tried.items() if _spread(task, one[0][::unit], unit) == one[0]})
        owner = _spread(task, refined(sight, tried[start][0][::unit]), unit)
        cost = costs_of(task, owner)
        if cost.seconds < tried[name][1].seconds:
            name = f"{start}, exchanged"
            tried[name] = owner, cost
    owner, best = tried[name]
    # What was exchanged is even already: a swap would look at work alone.
    if method == "auto" and "exchanged" not in name and sum(chunk.numel() for chunk, _, _ in task.runs) <= MOST_RUNS:
        swapped, better = _swapped(task, owner, best)
        if better.seconds < best.seconds:
            name, owner = f"{name}, swapped", swapped
            tried[name] = owner, better
    return name, owner, {way: cost for way, (_, cost) in tried.items()}


def _cheapest(tried: Mapping[str, tuple[Owner, Costs]]) -> str:
    return min(tried, key=lambda way: (round(tried[way][1].seconds, 12), list(tried).index(way)))


def _ways(task: Task, method: str) -> Iterator[tuple[str, Owner]]:
    """The ways that look at the work of chunks, and not at what they see."""
    count, world = task.work.numel(), task.world
    if method in ("auto", "contiguous"):
        yield "contiguous", tuple(chunk * world // count for chunk in range(count))
    if method in ("auto", "zigzag"):
        halves = [part * 2 * world // count for part in range(count)]
        yield "zigzag", tuple(min(part, 2 * world - 1 - part) for part in halves)
    run = 1
    while method in ("auto", "longest_first") and run * world <= count:
        yield f"longest_first runs of {run}", _longest_first(task, run)
        run *= 2
    if method in ("auto", "cuts") and not task.equal:
        yield "cuts", _cuts(task)


def _unit(task: Task) -> int:
    """Neighbouring chunks that are gathered as one, where there are many."""
    unit = 1
    while -(-task.work.numel() // unit) > max(MOST_UNITS, UNITS_A_RANK * task.world):
        unit *= 2
    return unit


def _sight(task: Task, unit: int) -> Sight:
    """What units of so many chunks need of each other."""
    count, granules = -(-task.work.numel() // unit), task.granules_a_chunk * unit
    needs = torch.zeros((len(task.runs), count, count + 1), dtype=torch.float32)
    for need, (chunk, first, stop) in zip(needs, task.runs, strict=True):
        one = torch.ones(chunk.numel(), dtype=torch.float32)
        need.index_put_((chunk // unit, first // granules), one, accumulate=True)
        need.index_put_((chunk // unit, (stop - 1) // granules + 1), -one, accumulate=True)
    seen = (needs.cumsum(2)[:, :, :-1] > 0).float()
    work = torch.zeros(count, dtype=torch.float64).index_add_(0, torch.arange(task.work.numel()) // unit, task.work)
    return Sight(seen, work, task.world, task.equal)


def _spread(task: Task, owner: Owner, unit: int) -> Owner:
    """The ranks of chunks from those of units of chunks."""
    return tuple(rank for rank in owner for _ in range(unit))[: task.work.numel()]


def _longest_first(task: Task, run: int) -> Owner:
    """Runs of chunks, the heaviest first, each to the rank that has the least so far, and room where all are to hold equally many."""
    count = task.work.numel()
    runs = [range(first, min(first + run, count)) for first in range(0, count, run)]
    weights = [float(task.work[part.start : part.stop].sum()) for part in runs]
    room = -(-len(runs) // task.world) if task.equal else len(runs)
    owner, free = [0] * count, [(0.0, rank, room) for rank in range(task.world)]
    for number in sorted(range(len(runs)), key=lambda i: (-weights[i], i)):
        load, rank, left = heapq.heappop(free)
        for chunk in runs[number]:
            owner[chunk] = rank
        if left > 1:
            heapq.heappush(free, (load + weights[number], rank, left - 1))
    return tuple(owner)


def _cuts(task: Task) -> Owner:
    """Neighbouring chunks, cut where each rank has its share of the work."""
    middle = task.work.cumsum(0) - task.work / 2
    share = max(float(task.work.sum()), 1.0) / task.world
    return tuple((middle / share).long().clamp(0, task.world - 1).tolist())


def _swapped(task: Task, owner: Owner, best: Costs) -> tuple[Owner, Costs]:
    """The assignment with chunks of the slowest rank exchanged for lighter ones of the fastest, as long as that helps."""
    ranks = list(owner)
    for _ in range(SWAPS):
        seconds = best.work / task.rates.pairs + best.received.double() / task.rates.keys
        slow, fast = int(seconds.argmax()), int(seconds.argmin())
        gap = float(best.work[slow] - best.work[fast]) / 2
        mine, others = ([i for i, rank in enumerate(ranks) if rank == end] for end in (slow, fast))
        if gap <= 0 or not mine or not others:
            break
        # The exchange that comes nearest to half of the difference.
        wanted = task.work[mine][:, None] - task.work[others] - gap
        i, j = divmod(int(wanted.abs().argmin()), len(others))
        changed = list(ranks)
        changed[mine[i]], changed[others[j]] = fast, slow
        found = costs_of(task, tuple(changed))
        if found.seconds >= best.seconds:
            break
        ranks, best = changed, found
    return tuple(ranks), best
