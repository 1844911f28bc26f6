"""MagiAttention: a mask as disjoint slices, each a rectangle that is full or cut along one or two diagonals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsedsl.errors import ShapeError
from sparsedsl.export.export_case import MAX_BYTES, prepare
from sparsedsl.export.exported import Exported, check_dense, ends_of
from sparsedsl.export.logits import logit_args
from sparsedsl.export.spans import Spans

__all__ = ["BICAUSAL", "CAUSAL", "FULL", "INVCAUSAL", "MagiSlices", "decode_slices", "encode_slices", "magi"]

FULL, CAUSAL, INVCAUSAL, BICAUSAL = 0, 1, 2, 3


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class MagiSlices(Exported):
    """``q_ranges``, ``k_ranges`` int32 ``(N, 2)`` half-open over packed tokens, ``attn_type_map`` int32 ``(N,)``.

    >>> import sparsedsl as sd
    >>> sd.export.magi(sd.patterns.causal(), 4).attn_type_map.tolist()
    [1]
    """

    engine: ClassVar[str] = "magi"
    read_at: ClassVar[str] = "MagiAttention 2c64135"

    q_ranges: torch.Tensor
    k_ranges: torch.Tensor
    attn_type_map: torch.Tensor

    def to_mask(self) -> torch.Tensor:
        """As :meth:`Exported.to_mask`. Raises ShapeError where a pair lies in two slices: it would count twice."""
        q, kv = ends_of(self.q_lens), ends_of(self.kv_lens)
        whole = decode_slices(self.q_ranges, self.k_ranges, self.attn_type_map, q[-1], kv[-1])
        if self.packed:
            return whole[None, None]
        blocks = [whole[q[n] : q[n + 1], kv[n] : kv[n + 1]] for n in range(len(self.q_lens))]
        if sum(int(block.sum()) for block in blocks) != int(whole.sum()):
            raise ShapeError("magi: a slice reaches from one batch entry into another")
        return torch.stack(blocks)[:, None]


def decode_slices(q_ranges: torch.Tensor, k_ranges: torch.Tensor, kinds: torch.Tensor, q_len: int, kv_len: int) -> torch.Tensor:
    """bool ``(q_len, kv_len)``; ShapeError where slices overlap as sets of pairs.

    >>> decode_slices(torch.tensor([[0, 2]]), torch.tensor([[0, 5]]), torch.tensor([BICAUSAL]), 2, 5).int().tolist()
    [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    """
    check_dense(q_len * kv_len)
    out = torch.zeros(q_len, kv_len, dtype=torch.bool)
    for (q0, q1), (k0, k1), kind in zip(q_ranges.tolist(), k_ranges.tolist(), kinds.tolist(), strict=True):
        row, column = torch.arange(q1 - q0)[:, None], torch.arange(k1 - k0)
        part = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        if kind in (CAUSAL, BICAUSAL):
            part &= column <= row + (k1 - k0) - (q1 - q0)
        if kind in (INVCAUSAL, BICAUSAL):
            part &= column >= row
        twice = out[q0:q1, k0:k1] & part
        if bool(twice.any()):
            i, j = twice.nonzero()[0].tolist()
            raise ShapeError(f"magi: query {q0 + i} and key {k0 + j} lie in two slices and would count twice")
        out[q0:q1, k0:k1] |= part
    return out


def encode_slices(rows: Spans) -> torch.Tensor:
    """int64 ``(N, 5)``: first and last + 1 row, first and last + 1 key, kind. Greedy: a run is followed while its ends move by one step.

    A run has one successor at most: runs of a row lie two places apart, so that only one can begin where it did, or one later.
    """
    count = rows.starts.numel()
    if not count:
        return torch.zeros(0, 5, dtype=torch.int64, device=rows.counts.device)
    place = rows.owners * (rows.length + 2) + rows.starts
    following = torch.full((count,), -1, dtype=torch.int64, device=place.device)
    kind = torch.full_like(following, -1)
    for moved in (0, 1):
        wanted = place + rows.length + 2 + moved
        at = torch.searchsorted(place, wanted).clamp(max=count - 1)
        step = rows.stops[at] - rows.stops
        linked = (place[at] == wanted) & ((step == 0) | (step == 1))
        following = torch.where(linked, at, following)
        kind = torch.where(linked, step + 2 * moved, kind)
    order = _chains(following)
    begins, steps = _cuts(kind[order])
    start = torch.tensor(begins, device=place.device)
    stop = torch.cat([start[1:], start.new_full((1,), count)]) - 1
    one, last = order[start], order[stop]
    ends = [rows.owners[one], rows.owners[last] + 1, rows.starts[one], rows.stops[last]]
    return torch.stack([*ends, start.new_tensor(steps)], dim=-1)


def _chains(following: torch.Tensor) -> torch.Tensor:
    """The runs chain by chain: those that follow each other side by side, rows ascending."""
    own = torch.arange(following.numel(), device=following.device)
    head = own.clone()
    linked = (following >= 0).nonzero()[:, 0]
    head[following[linked]] = linked
    while not torch.equal(further := head[head], head):
        head = further
    return head.argsort(stable=True)


def _cuts(kinds: torch.Tensor) -> tuple[list[int], list[int]]:
    """Where slices begin and their kinds. ``kinds`` are of the links from each run to the next one of its chain, -1 at its end.

    A slice ends where the step changes, and that link belongs to no slice: the run behind it begins one that has no step yet.
    """
    change = torch.ones_like(kinds, dtype=torch.bool)
    change[1:] = kinds[1:] != kinds[:-1]
    first = change.nonzero()[:, 0]
    sizes = torch.cat([first, first.new_full((1,), kinds.numel())]).diff().tolist()
    begins: list[int] = []
    steps: list[int | None] = []
    open_ = False
    for place, size, kind in zip(first.tolist(), sizes, kinds[first].tolist(), strict=True):
        if kind < 0:
            alone = range(place + 1 if open_ else place, place + size)
            begins += alone
            steps += [FULL] * len(alone)
            open_ = False
        elif not open_:
            begins.append(place)
            steps.append(kind)
            open_ = True
        elif steps[-1] is None:
            steps[-1] = kind
        else:
            begins.append(place + 1)
            steps.append(kind if size > 1 else None)
    return begins, [FULL if step is None else step for step in steps]


def magi(
    pattern: Any, q_len: int | None = None, kv_len: int | None = None, *, q_offset: int | None = None, batch: int = 1,
    heads: int | None = None, kv_heads: int | None = None, q_lens: Sequence[int] | None = None, kv_lens: Sequence[int] | None = None,
    head: int | None = None, device: Any = None, max_bytes: int = MAX_BYTES, **tables: Any,
) -> MagiSlices:  # fmt: skip
    """The slices that MagiAttention takes: ``flex_flash_attn_func(q, k, v, **e.args)``, tokens packed, batch entries one behind the other.

    Holds every mask of one head, in slices of one row at worst. Slices are disjoint as sets of pairs (a pair in two would count twice);
    ranges of queries overlap where a row has several runs, so leave ``disable_fwd_atomic_reduction`` False. Scale, soft cap and sinks
    are held.

    Args:
        pattern, q_len, kv_len, q_offset, batch, heads, kv_heads, q_lens, kv_lens, device, max_bytes, tables: as :func:`cudnn`.
        head: export the mask of this head alone; needed where heads differ, since slices have none.

    Returns:
        :class:`MagiSlices`.

    Raises:
        UnsupportedError: heads that differ, another score than a soft cap, more than ``max_bytes``.
        ShapeError, TableError: as :func:`sparsedsl.analyse`.

    No kernel of MagiAttention was run.

    >>> import sparsedsl as sd
    >>> e = sd.export.magi(sd.patterns.sliding_window(3), 8)
    >>> e.q_ranges.tolist(), e.k_ranges.tolist(), e.attn_type_map.tolist()
    ([[0, 3], [3, 8]], [[0, 3], [1, 8]], [1, 3])
    """
    case = prepare(
        "magi", "slices", pattern, q_len, kv_len, q_offset=q_offset, batch=batch, heads=heads, kv_heads=kv_heads, q_lens=q_lens,
        kv_lens=kv_lens, head=head, device=device, max_bytes=max_bytes, tables=tables,
    )  # fmt: skip
    args = logit_args(case, scale="softmax_scale", cap="softcap", sink="sink")
    if "sink" in args:
        args["sink"] = args["sink"][None]  # (sinks, heads)
    found = []
    q, kv = ends_of(case.q_lens), ends_of(case.kv_lens)
    for number in range(len(case.q_lens)):
        part = (case.parts[number] if case.packed else case.part).alone()
        slices = encode_slices(part.rows.group(0 if case.packed else number, 0))
        found.append(slices + slices.new_tensor([q[number], q[number], kv[number], kv[number], 0]))
    slices = torch.cat(found)
    case.check_bytes(20 * slices.shape[0], f"{slices.shape[0]:,} slices")
    tensors: dict[str, Any] = {
        name: case.place(part) for name, part in zip(("q_ranges", "k_ranges"), (slices[:, :2], slices[:, 2:4]), strict=True)
    }
    tensors["attn_type_map"] = case.place(slices[:, 4])
    return MagiSlices(**tensors, args=args | tensors, **case.lens)
