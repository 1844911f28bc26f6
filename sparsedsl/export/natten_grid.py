"""NATTEN: neighbourhoods on a grid of one to three axes. The words of the call are guessed from a few queries, then proved on all."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsedsl.analysis.lists import expand_runs
from sparsedsl.errors import ShapeError
from sparsedsl.export.export_case import MAX_BYTES, Case, prepare
from sparsedsl.export.exported import Exported, check_dense
from sparsedsl.export.logits import logit_args
from sparsedsl.export.spans import Spans, first_difference, merged

__all__ = ["Axis", "NattenGrid", "natten"]


@dataclass(frozen=True)
class Axis:
    """One axis: its length, and kernel size, stride, dilation and causality of the neighbourhood along it."""

    length: int
    kernel_size: int
    stride: int
    dilation: int
    is_causal: bool

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and last key of every place, ``dilation`` apart.

        >>> first, last = Axis(6, 3, 1, 1, False).ends()
        >>> first.tolist(), last.tolist()
        ([0, 0, 1, 2, 3, 3], [2, 2, 3, 4, 5, 5])
        """
        x = torch.arange(self.length)
        k, s, d = self.kernel_size, self.stride, self.dilation
        group, place = x % d, x // d
        top = self.length // d + (group < self.length % d).to(torch.int64) - 1  # the last place of the group
        lead = torch.minimum(place // s * s + (s - 1 if self.is_causal else s // 2), top)
        if self.is_causal:
            first, last = (lead - k + 1).clamp(min=0), place
        else:
            right = k // 2 + k % 2 - 1
            middle = torch.minimum(lead.clamp(min=k // 2), top - right)
            first, last = middle - k // 2, middle + right
        return first * d + group, last * d + group

    def mask(self) -> torch.Tensor:
        """bool ``(length, length)``."""
        (first, last), key = (end[:, None] for end in self.ends()), torch.arange(self.length)
        return (first <= key) & (key <= last) & ((key - first) % self.dilation == 0)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class NattenGrid(Exported):
    """``axes`` say all; there are no tensors. ``args``: ``kernel_size``, ``stride``, ``dilation``, ``is_causal``, one an axis.

    >>> import sparsedsl as sd
    >>> sd.export.natten(sd.patterns.dilated(4, 3), shape=(64,)).axes
    (Axis(length=64, kernel_size=4, stride=1, dilation=3, is_causal=True),)
    """

    engine: ClassVar[str] = "natten"
    read_at: ClassVar[str] = "NATTEN 8c8729f"

    axes: tuple[Axis, ...]

    def to_mask(self) -> torch.Tensor:
        """As :meth:`Exported.to_mask`: the product of the masks of the axes."""
        check_dense(self.q_lens[0] * self.kv_lens[0])
        out = torch.ones(1, 1, dtype=torch.bool)
        for axis in self.axes:
            out = torch.kron(out.to(torch.uint8), axis.mask().to(torch.uint8)).bool()
        return out[None, None]


def natten(
    pattern: Any, q_len: int | None = None, kv_len: int | None = None, *, shape: tuple[int, ...], q_offset: int | None = None,
    batch: int = 1, heads: int | None = None, kv_heads: int | None = None, head: int | None = None, device: Any = None,
    max_bytes: int = MAX_BYTES, **tables: Any,
) -> NattenGrid:  # fmt: skip
    """The words of a call of NATTEN: ``na1d``, ``na2d`` or ``na3d(q, k, v, **e.args)``, where the mask is one of its neighbourhoods.

    At an edge NATTEN moves the neighbourhood inwards, it does not clip it; along a causal axis it ends at the query.

    Args:
        pattern, q_offset, batch, heads, kv_heads, max_bytes, tables: as :func:`cudnn`.
        q_len, kv_len: default the tokens of the grid, which is all they may be.
        shape: the grid of the tokens, row-major, one to three lengths.
        head: export the mask of this head alone. device: not used, there are no tensors.

    Returns:
        :class:`NattenGrid`.

    Raises:
        UnsupportedError: a mask that is no such neighbourhood, heads or batch entries that differ, any score, a sink.
        ShapeError: lengths that are not those of the grid; TableError as :func:`sparsedsl.analyse`.

    No kernel of NATTEN was run.

    >>> import sparsedsl as sd
    >>> e = sd.export.natten(sd.patterns.neighbourhood_2d(16, 16, 5), shape=(16, 16))
    >>> e.args["kernel_size"], e.args["is_causal"]
    ((5, 5), (False, False))
    """
    grid = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if not 1 <= len(grid) <= 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in grid):
        raise ShapeError(f"natten: shape must be one to three positive lengths; got {shape!r}")
    tokens = math.prod(grid)
    case = prepare(
        "natten", "neighbourhoods", pattern, tokens if q_len is None else q_len, kv_len, q_offset=q_offset, batch=batch, heads=heads,
        kv_heads=kv_heads, head=head, device=device, max_bytes=max_bytes, tables=tables,
    )  # fmt: skip
    if (case.part.q_len, case.part.kv_len) != (tokens, tokens):
        raise ShapeError(
            f"natten: {case.part.q_len} queries and {case.part.kv_len} keys; the grid {grid} has {tokens} tokens, and no decode"
        )
    args = logit_args(case, scale="scale")
    part = case.part.alone()
    rows = part.rows.group(0, 0)
    for entry in range(1, part.rows.shape[0]):
        if found := first_difference(rows, part.rows.group(entry, 0)):
            case.refuse(f"batch entries 0 and {entry} differ (first at query {found[0]}, key {found[1]}); export one at a time")
    axes = tuple(_guess(case, rows, grid, number) for number in range(len(grid)))
    if found := first_difference(_predicted(case, axes), rows):
        query, key, shown = found
        size = " x ".join(str(axis.kernel_size) for axis in axes)
        does, holds = ("does not see", "holds") if shown else ("sees", "does not hold")
        case.refuse(
            f"query {query} {does} key {key}, which a neighbourhood of {size} {holds} "
            f"(NATTEN moves it inwards at the edges); {case.holder()}"
        )
    words = {name: tuple(getattr(axis, name) for axis in axes) for name in ("kernel_size", "stride", "dilation", "is_causal")}
    lens = {**case.lens, "q_lens": case.q_lens[:1], "kv_lens": case.kv_lens[:1]}
    return NattenGrid(axes=axes, args=args | words, **lens)


def _guess(case: Case, rows: Spans, grid: tuple[int, ...], number: int) -> Axis:
    """The axis that agrees with the queries along it through the middle of the grid, or the nearest to it."""
    length, step = grid[number], math.prod(grid[number + 1 :])
    middle = [n // 2 for n in grid]
    middle[number] = 0
    begin = sum(place * math.prod(grid[n + 1 :]) for n, place in enumerate(middle))
    line = begin + step * torch.arange(length, device=rows.counts.device)
    empty = (rows.counts[line] == 0).nonzero()[:, 0]
    if empty.numel():
        case.refuse(f"query {int(line[empty[0]])} sees no key, a neighbourhood holds the query's own; {case.holder()}")
    along = _along(rows, line, length, step)
    first, last = along.starts[along.begins], along.stops[along.begins + along.counts - 1] - 1
    sizes = torch.zeros_like(first).index_add_(0, along.owners, along.stops - along.starts)
    kernel = int(sizes.max())
    apart = (along.starts[1:] - along.starts[:-1])[along.owners[1:] == along.owners[:-1]]
    dilation = 1 if bool((along.stops - along.starts > 1).any()) or not apart.numel() else int(apart.min())
    if kernel < 2 or kernel * dilation > length:
        case.refuse(
            f"along axis {number} query {int(line[sizes.argmax()])} sees {kernel} of {length} places, {dilation} apart; NATTEN "
            f"takes a kernel of 2 or more whose dilation times it fits; {case.holder()}"
        )
    for causal, stride in itertools.product((False, True), range(1, kernel + 1)):
        axis = Axis(length, kernel, stride, dilation, causal)
        if all(torch.equal(mine, end.cpu()) for mine, end in zip(axis.ends(), (first, last), strict=True)):
            return axis
    return Axis(length, kernel, 1, dilation, int(last[length // 2]) == length // 2)


def _along(rows: Spans, line: torch.Tensor, length: int, step: int) -> Spans:
    """The places along an axis of what some queries see: ``length`` places, ``step`` tokens apart."""
    owner, run = expand_runs(rows.begins[line], rows.counts[line])
    low, high = rows.starts[run] // step, (rows.stops[run] - 1) // step + 1
    first = torch.where(high - low >= length, 0, low % length)
    stop = torch.where(high - low >= length, length, first + high - low)
    # A run that goes on in the next line of the grid begins at its first place again.
    starts, stops = torch.cat([first, torch.zeros_like(first)]), torch.cat([stop.clamp(max=length), stop - length])
    return merged((1, 1, length), length, torch.cat([owner, owner]), starts, stops)


def _predicted(case: Case, axes: tuple[Axis, ...]) -> Spans:
    """The runs of all queries of a grid under these axes."""
    tokens = math.prod(axis.length for axis in axes)
    pieces = tokens * math.prod(axis.kernel_size for axis in axes[:-1]) * (1 if axes[-1].dilation == 1 else axes[-1].kernel_size)
    case.check_bytes(24 * pieces, "the runs of the neighbourhoods")
    starts = torch.zeros(1, 1, dtype=torch.int64)
    widths = torch.ones(1, 1, dtype=torch.int64)
    for number, axis in enumerate(axes):
        begin, width = _of_axis(axis, whole=number == len(axes) - 1 and axis.dilation == 1)
        starts = (starts[:, None, :, None] * axis.length + begin[None, :, None, :]).reshape(len(starts) * axis.length, -1)
        widths = (widths[:, None, :, None] * width[None, :, None, :]).reshape(starts.shape)
    line = torch.arange(tokens)[:, None].expand(starts.shape)
    return merged((1, 1, tokens), tokens, line.reshape(-1), starts.reshape(-1), (starts + widths).reshape(-1))


@functools.lru_cache(maxsize=8)
def _of_axis(axis: Axis, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of every place and the run that begins at each, 0 where there is none: one run if ``whole``, else single keys."""
    first, last = axis.ends()
    if whole:
        return first[:, None], (last - first + 1)[:, None]
    keys = first[:, None] + torch.arange(axis.kernel_size) * axis.dilation
    return keys, (keys <= last[:, None]).to(torch.int64)
