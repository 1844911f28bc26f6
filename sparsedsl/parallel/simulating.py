"""What a step would cost on more devices than are here: a plan's own numbers beside a ring, an all-gather and Ulysses, by world size.

Nothing is sent and nothing computed: pairs and keys are those of the plan, and two rates make seconds of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.errors import ArgumentError
from sparsedsl.lang.advice import shown
from sparsedsl.parallel.assigning import Rates
from sparsedsl.parallel.planning import TokenPlan, check_size, plan, static_patterns
from sparsedsl.plain_values import Reported
from sparsedsl.quantities import bytes_text, factor_text, flops_text, number_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SimulatedStep", "Simulation", "simulate"]

HEADS, KV_HEADS = 32, 8


@dataclass(frozen=True)
class SimulatedStep(Reported):
    """The attention of one forward pass on ``world`` ranks, sent in one way.

    way: ``"plan"``, ``"ring"``, ``"all-gather"`` or ``"ulysses"``. placed: which tokens a rank has. imbalance: most / mean pairs of a rank.
    bytes: that the rank which gets the most is sent. compute_seconds, transfer_seconds: of the rank with the most of each. seconds: of the
    slowest rank. refused: why this way cannot be had; the numbers are then None.
    """

    world: int
    way: str
    placed: str
    imbalance: float | None = None
    bytes: int | None = None
    compute_seconds: float | None = None
    transfer_seconds: float | None = None
    seconds: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Simulation(Reported):
    """What :func:`simulate` expects, ``steps`` by world size and way; ``str()`` is a table.

    flops: operations a rank does in a second. bandwidth: bytes it receives in a second.
    """

    q_len: int
    names: tuple[str, ...]
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int
    flops: float
    bandwidth: float
    steps: tuple[SimulatedStep, ...]

    def __str__(self) -> str:
        layers = f"{len(self.names)} layer{'s' * (len(self.names) > 1)}"
        sizes = f"{self.heads} heads, {self.kv_heads} key heads of {self.head_dim}, {self.itemsize} bytes a number"
        rates = f"{flops_text(self.flops)}/s and {number_text(self.bandwidth / 1e9)} GB/s a rank"
        lines = [
            f"{self.q_len:,} tokens, {layers}, forward; {sizes}; {rates}",
            "",
            f"{'ranks':>6}  {'way':<11}{'imbalance':>10}{'received':>12}{'compute':>11}{'transfer':>11}{'step':>11}  placed",
        ]
        for one in self.steps:
            start = f"{one.world:>6}  {one.way:<11}"
            if one.refused is not None:
                lines.append(f"{start}{'':>55}  {one.refused}")
                continue
            times = [seconds_text(x or 0.0) for x in (one.compute_seconds, one.transfer_seconds, one.seconds)]
            cells = [
                f"{factor_text(one.imbalance or 1.0):>10}{bytes_text(one.bytes or 0):>12}",
                *(f"{time:>11}" for time in times),
            ]
            lines.append(f"{start}{''.join(cells)}  {one.placed}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        worlds = sorted({one.world for one in self.steps})
        return f"<Simulation of {self.q_len} tokens on {', '.join(map(str, worlds))} ranks>"

    def plot(self, *, theme: str = "light") -> Figure:
        """Time and bytes by world size, a line for each way, on logarithmic axes: a matplotlib figure, which ``savefig`` writes.

        Raises:
            MissingPackageError: matplotlib is not there.
        """
        from sparsedsl.parallel.simulation_picture import draw

        return draw(self, theme)


def simulate(
    patterns: Any,
    q_len: int,
    worlds: int | Sequence[int],
    *,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int = 128,
    itemsize: int = 2,
    flops: float = 300e12,
    bandwidth: float = 50e9,
    chunk: int | None = None,
    granule: int = 128,
    **tables: Any,
) -> Simulation:
    """The attention of one forward pass by world size: as :func:`plan` places it, and as a ring, an all-gather and Ulysses would.

    The others are shown at their best. A ring and an all-gather hold tokens as a zigzag does, compute only pairs that the mask allows, and
    send every key to every rank; a ring hides that behind its computing, an all-gather does not, nor does the plan. Ulysses gives every
    rank all tokens of some heads: it ends where there are fewer heads than ranks, repeats key heads where there are fewer of these, and is
    even if all heads see equally much, which is assumed. Latency of messages is left out.

    Args:
        patterns: a pattern, or a mapping of names to patterns: a layer of each, one placement for all.
        q_len: tokens. worlds: number of ranks, or several.
        heads: query heads; default those that the patterns are written for, else 32.
        kv_heads: key heads; default 8 where that divides ``heads``, else as many as ``heads``. head_dim: width of keys and of values.
        itemsize: bytes of a number. flops: operations that a rank does in a second, of a product of matrices 2 for each pair of
            numbers. bandwidth: bytes that a rank receives in a second.
        chunk, granule, tables: as of :func:`plan`.

    Raises:
        What :func:`plan` raises; ArgumentError: numbers that do not fit.

    >>> import sparsedsl as sd
    >>> found = sd.parallel.simulate(sd.patterns.sliding_window(1024), 1 << 16, [8, 64], chunk=1024)
    >>> [(one.way, one.bytes) for one in found.steps if one.world == 8][:2]
    [('plan', 4194304), ('ring', 234881024)]
    >>> print(found.steps[-1].refused)
    64 ranks for 32 heads
    """
    several = (worlds,) if isinstance(worlds, int) else tuple(worlds) if isinstance(worlds, Sequence) else ()
    if not several or isinstance(worlds, str):
        raise ArgumentError(f"simulate(): worlds must be a number of ranks, or several; got {shown(worlds)}")
    parts = static_patterns(patterns)
    if heads is None:
        bound = {
            name: value for part in parts.values() for name, value in (part.bound | tables).items() if name in part.mask.tables
        }
        written = count_heads(tuple(parts.values()), bound, None)
        heads = written if written > 1 else HEADS
    check_size("simulate(): heads", heads)
    kv_heads = (KV_HEADS if heads % KV_HEADS == 0 else heads) if kv_heads is None else kv_heads
    for word, value in (("kv_heads", kv_heads), ("head_dim", head_dim), ("itemsize", itemsize)):
        check_size(f"simulate(): {word}", value)
    if heads % kv_heads:
        raise ArgumentError(f"simulate(): kv_heads must divide heads, {heads}; got {kv_heads}")
    for word, rate in (("flops", flops), ("bandwidth", bandwidth)):
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
            raise ArgumentError(f"simulate(): {word} must be a positive number, a second; got {shown(rate)}")
    key_bytes = 2 * kv_heads * head_dim * itemsize
    rates = Rates(pairs=flops / (4 * heads * head_dim), keys=bandwidth / key_bytes)
    setting = Simulation(q_len, tuple(parts), heads, kv_heads, head_dim, itemsize, float(flops), float(bandwidth), ())
    steps: list[SimulatedStep] = []
    for world in several:
        # Only the patterns that tell heads apart need their number.
        found = plan(patterns, q_len, world, heads=heads, chunk=chunk, granule=granule, rates=rates, **tables)
        steps += [_planned(found, rates, key_bytes), *_sent_whole(found, rates, key_bytes), _ulysses(setting, found, rates)]
    return Simulation(**{**vars(setting), "steps": tuple(steps)})


def _planned(found: TokenPlan, rates: Rates, key_bytes: int) -> SimulatedStep:
    """The plan's own way: what it counts for each rank."""
    received = torch.stack([found.traffic(name).sum(0) for name in found.names]).sum(0).tolist()
    compute, transfer = [pairs / rates.pairs for pairs in found.work], [keys / rates.keys for keys in received]
    slowest = max(a + b for a, b in zip(compute, transfer, strict=True))
    most = max(received) * key_bytes
    return SimulatedStep(found.world, "plan", found.method, found.imbalance, most, max(compute), max(transfer), slowest)


def _sent_whole(found: TokenPlan, rates: Rates, key_bytes: int) -> list[SimulatedStep]:
    """A ring and an all-gather: every key to every rank, which hold zigzags."""
    uneven, _ = found.tried["zigzag"]
    compute = uneven * sum(found.work) / found.world / rates.pairs
    keys = (found.q_len - found.q_len // found.world) * len(found.names)
    transfer = keys / rates.keys
    totals: Mapping[str, float] = {"ring": max(compute, transfer), "all-gather": compute + transfer}
    return [
        SimulatedStep(found.world, way, "zigzag", uneven, keys * key_bytes, compute, transfer, seconds)
        for way, seconds in totals.items()
    ]


def _ulysses(setting: Simulation, found: TokenPlan, rates: Rates) -> SimulatedStep:
    """All tokens of some heads: queries, keys and values there, results back."""
    world, heads = found.world, setting.heads
    if world > heads:
        return SimulatedStep(world, "ulysses", "heads", refused=f"{world} ranks for {heads} heads")
    most = -(-heads // world)
    uneven = most * world / heads
    away = found.q_len - found.q_len // world
    numbers = away * 2 * (most + max(-(-setting.kv_heads // world), 1)) * len(found.names)
    sent = numbers * setting.head_dim * setting.itemsize
    compute, transfer = uneven * sum(found.work) / world / rates.pairs, sent / setting.bandwidth
    return SimulatedStep(world, "ulysses", "heads", uneven, sent, compute, transfer, compute + transfer)
