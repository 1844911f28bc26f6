"""FlashInfer, BlockSparseAttentionWrapper: blocks of rows and columns, with a bit for every pair of a listed block if some are partial."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsedsl.analysis.tiles import block_pair
from sparsedsl.export.export_case import MAX_BYTES, prepare
from sparsedsl.export.exported import Exported, check_dense
from sparsedsl.export.logits import logit_args
from sparsedsl.export.tiles import listed_tiles, partial_pairs

__all__ = ["FlashInferBlocks", "flashinfer", "gathered_causal", "packed_bits", "unpacked_bits"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class FlashInferBlocks(Exported):
    """``indptr`` int32 ``(rows + 1,)``, ``indices`` int32: the block columns of each block row; ``mask`` bool ``(listed, R, C)`` or None.

    One list for all heads of one sequence. A block row is treated as a request whose keys are its blocks in the order of the list.

    >>> import sparsedsl as sd
    >>> e = sd.export.flashinfer(sd.patterns.causal(), 4, block=2)
    >>> e.indices.tolist(), [bits.tolist() for bits in e.segments()]
    ([0, 0, 1], [[13], [247]])
    """

    engine: ClassVar[str] = "flashinfer"
    read_at: ClassVar[str] = "flashinfer fb28d72"

    indptr: torch.Tensor
    indices: torch.Tensor
    mask: torch.Tensor | None
    M: int
    N: int
    R: int
    C: int

    def to_mask(self) -> torch.Tensor:
        """As :meth:`Exported.to_mask`, from the bits as the engine packs them."""
        check_dense(self.M * self.N)
        out = torch.zeros(self.M, self.N, dtype=torch.bool)
        segments = None if self.mask is None else self.segments()
        for row, (begin, end) in enumerate(zip(self.indptr.tolist(), self.indptr.tolist()[1:], strict=False)):
            if begin == end:
                continue
            width = (end - begin) * self.C
            pairs = torch.ones(self.R, width, dtype=torch.bool)
            if segments is not None:
                pairs = unpacked_bits(segments[row], self.R * width).view(self.R, width)
            queries = slice(row * self.R, min((row + 1) * self.R, self.M))
            for n, column in enumerate(self.indices[begin:end].tolist()):
                part = pairs[: queries.stop - queries.start, n * self.C : (n + 1) * self.C]
                out[queries, column * self.C : (column + 1) * self.C] = part
        return out[None, None]

    def segments(self) -> list[torch.Tensor]:
        """The bits of every block row, uint8: its rows x gathered keys, row-major, the lowest bit first; each on a byte of its own.

        The engine packs ``mask`` like this itself. Give it the bool tensor: packed ones are read at wrong offsets from the second on.
        """
        if self.mask is None:
            return []
        ends = self.indptr.tolist()
        rows = [self.mask[a:z].transpose(0, 1).reshape(-1) for a, z in itertools.pairwise(ends)]
        return [packed_bits(row) for row in rows]


def packed_bits(bits: torch.Tensor) -> torch.Tensor:
    """Flat bool -> uint8, bit ``o`` in ``byte[o // 8] >> (o % 8)``.

    >>> packed_bits(torch.tensor([1, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)).tolist()
    [205]
    """
    whole = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).view(-1, 8)
    weights = torch.tensor([1 << n for n in range(8)], dtype=torch.uint8, device=bits.device)
    return (whole * weights).sum(dim=1).to(torch.uint8)


def unpacked_bits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The first ``count`` bits of :func:`packed_bits`, bool."""
    place = torch.arange(count, device=packed.device)
    return ((packed[place // 8].to(torch.int64) >> (place % 8)) & 1).bool()


def gathered_causal(indptr: list[int], indices: list[int], rows: int, keys: int, block: tuple[int, int]) -> torch.Tensor:
    """What ``causal=True`` shows of listed blocks: it counts gathered keys, ``g <= kv_len - qo_len + r``, whatever keys these are.

    Exports never set it; this says why.

    >>> gathered_causal([0, 1, 2], [0, 0], 4, 4, (2, 2)).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]
    """
    out = torch.zeros(rows, keys, dtype=torch.bool)
    for row, (begin, end) in enumerate(itertools.pairwise(indptr)):
        queries = range(row * block[0], min((row + 1) * block[0], rows))
        key = [column * block[1] + n for column in indices[begin:end] for n in range(block[1])]
        for r, query in enumerate(queries):
            out[query, key[: max(0, len(key) - len(queries) + r + 1)]] = True
    return out


def flashinfer(
    pattern: Any, q_len: int | None = None, kv_len: int | None = None, *, block: int | tuple[int, int] = (128, 128),
    q_offset: int | None = None, heads: int | None = None, kv_heads: int | None = None, head: int | None = None, device: Any = None,
    max_bytes: int = MAX_BYTES, **tables: Any,
) -> FlashInferBlocks:  # fmt: skip
    """The block lists that FlashInfer takes: ``BlockSparseAttentionWrapper(buffer).plan(**e.args, ..)``.

    Holds every mask that heads share, of one sequence. Where a listed block is partial, every listed block carries its bits, one byte a
    pair here and one bit in the engine. ``causal=True`` is never set: it counts gathered keys.

    Args:
        pattern, q_len, kv_len, q_offset, heads, kv_heads, device, max_bytes, tables: as :func:`cudnn`.
        block: ``(R, C)``, queries and keys of a block; C divides the number of keys.
        head: export the mask of this head alone.

    Returns:
        :class:`FlashInferBlocks`.

    Raises:
        UnsupportedError: keys that are no multiple of C, heads that differ, no pair at all, another score than a soft cap, a sink.
        ShapeError, TableError: as :func:`sparsedsl.analyse`.

    No kernel of FlashInfer was run.

    >>> import sparsedsl as sd
    >>> e = sd.export.flashinfer(sd.patterns.block_causal(2), 4, block=2)
    >>> e.indptr.tolist(), e.indices.tolist(), e.mask
    ([0, 1, 3], [0, 0, 1], None)
    """
    case = prepare(
        "flashinfer", "block lists", pattern, q_len, kv_len, q_offset=q_offset, heads=heads, kv_heads=kv_heads, head=head, device=device,
        max_bytes=max_bytes, tables=tables,
    )  # fmt: skip
    args = logit_args(case, scale="sm_scale", cap="logits_soft_cap")
    rows, columns = block_pair(block)
    part = case.part
    if part.kv_len % columns:
        fits = max(n for n in range(1, columns) if part.kv_len % n == 0)
        case.refuse(f"{part.kv_len} keys are no multiple of C={columns}; C={fits} fits")
    part = part.alone()
    lists = listed_tiles(part, (rows, columns))
    if not lists.listed:
        case.refuse(f"no query sees a key, and it takes no empty list (query 0 sees no key); {case.holder()}")
    if lists.partial.total:
        case.check_bytes(
            lists.listed * rows * columns, f"mask ({lists.listed}, {rows}, {columns}), one for every pair of a listed block,"
        )
    size = -(-part.kv_len // columns)
    place = torch.cat([tiles.owners() * size + tiles.columns for tiles in (lists.full, lists.partial)])
    order = place.argsort()
    listed = place[order]
    mask = None
    if lists.partial.total:
        mask = torch.ones(lists.listed, rows, columns, dtype=torch.bool, device=listed.device)
        mask[order.argsort()[lists.full.total :]] = partial_pairs(part, lists)
        last = listed // size == lists.shape[2] - 1
        if short := part.q_len % rows:
            mask[last.nonzero()[:, 0], short:] = False
        mask = case.place(mask, torch.bool)
    counts = (lists.full.counts + lists.partial.counts).flatten().to(torch.int64)
    tensors: dict[str, Any] = {
        "indptr": case.place(torch.nn.functional.pad(counts.cumsum(0), (1, 0))),
        "indices": case.place(listed % size),
    }
    words: dict[str, Any] = {"M": part.q_len, "N": part.kv_len, "R": rows, "C": columns}
    return FlashInferBlocks(
        **tensors, mask=mask, **words, args=args | tensors | words | {"mask": mask, "causal": False}, **case.lens
    )
