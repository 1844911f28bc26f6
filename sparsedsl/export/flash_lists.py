"""FlashAttention 4: lists of partial and of full blocks, and for the pairs of partial ones the endpoints of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsedsl.analysis.lists import BlockLists, TileRows
from sparsedsl.analysis.tiles import block_pair
from sparsedsl.errors import ShapeError
from sparsedsl.export.cudnn_rows import decode_endpoints, encode_endpoints
from sparsedsl.export.export_case import Case
from sparsedsl.export.exported import Exported, check_dense
from sparsedsl.export.tiles import listed_tiles

__all__ = ["FlashLists", "export_lists"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class FlashLists(Exported):
    """``mask_block_*`` list partial blocks, ``full_block_*`` full ones: counts ``(batch | 1, heads | 1, rows)``, indices an axis more.

    ``endpoints`` int32 ``(batch | 1, heads | 1, nfunc, queries)`` goes into ``aux_tensors``. The engine wants a ``mask_mod`` of the
    caller's, in its own language, for partial blocks: ``kv < e[0]``, or ``e[n] <= kv < e[n + 1]`` for an odd ``n``, with
    ``e = endpoints[b, h, :, q]``.

    >>> import sparsedsl as sd
    >>> e = sd.export.flash_attention(sd.patterns.causal(), 8, version=4, blocks=True, block=(4, 4))
    >>> e.mask_block_idx.flatten().tolist(), e.full_block_cnt.flatten().tolist()
    ([0, 1], [0, 1])
    """

    engine: ClassVar[str] = "flash_attention"
    read_at: ClassVar[str] = "flash-attention 0251105"

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    endpoints: torch.Tensor | None
    block_size: tuple[int, int]

    def to_mask(self) -> torch.Tensor:
        """As :meth:`Exported.to_mask`: full blocks, and what endpoints say inside of partial ones."""
        q_len, kv_len = self.q_lens[0], self.kv_lens[0]
        shape = self.mask_block_cnt.shape[:2]
        check_dense(shape[0] * shape[1] * q_len * kv_len)
        full, partial = (
            _in_blocks(counts, indices, self.block_size, q_len, kv_len)
            for counts, indices in ((self.full_block_cnt, self.full_block_idx), (self.mask_block_cnt, self.mask_block_idx))
        )
        if bool((full & partial).any()):
            raise ShapeError("flash_attention: a block stands in both lists and would count twice")
        if self.endpoints is None:
            return full
        seen = decode_endpoints(self.endpoints.flatten(0, 1), kv_len).view(*self.endpoints.shape[:2], q_len, kv_len)
        return full | (partial & seen)


def _in_blocks(counts: torch.Tensor, indices: torch.Tensor, block: tuple[int, int], q_len: int, kv_len: int) -> torch.Tensor:
    """Which pairs lie in listed blocks; entries behind the counts are not read."""
    columns = -(-kv_len // block[1])
    live = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    tiles = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=counts.device)
    tiles.scatter_(-1, torch.where(live, indices, columns).to(torch.int64), True)
    tiles = tiles[..., :columns]
    return tiles.repeat_interleave(block[0], dim=-2)[..., :q_len, :].repeat_interleave(block[1], dim=-1)[..., :kv_len]


def export_lists(case: Case, block: Any, args: dict[str, Any]) -> FlashLists:
    """The lists of a case that is not packed."""
    if case.packed:
        case.refuse(f"block lists of packed sequences are not exported; {case.holder()}")
    part, pair = case.part, block_pair(block)
    lists = _ragged_as_partial(listed_tiles(part, pair))
    batch, heads, lines, _ = lists.shape
    widths = [max(tiles.width, 1) for tiles in (lists.partial, lists.full)]
    size = 4 * batch * heads * lines * (2 + sum(widths))
    endpoints = None
    if lists.partial.total:
        nfunc = 1 + 2 * part.rows.most_away
        size += 4 * batch * heads * nfunc * part.q_len
    case.check_bytes(size, "block lists")
    if lists.partial.total:
        endpoints = encode_endpoints(part.rows, nfunc).view(nfunc, batch, heads, part.q_len).permute(1, 2, 0, 3)
        endpoints = case.place(endpoints)
    tensors: dict[str, Any] = {
        "mask_block_cnt": case.place(lists.partial.counts), "mask_block_idx": case.place(lists.partial.padded()),
        "full_block_cnt": case.place(lists.full.counts), "full_block_idx": case.place(lists.full.padded()),
    }  # fmt: skip
    words = {"block_size": pair} | ({} if endpoints is None else {"aux_tensors": [endpoints]})
    return FlashLists(**tensors, endpoints=endpoints, block_size=pair, args=args | tensors | words, **case.lens)


def _ragged_as_partial(lists: BlockLists) -> BlockLists:
    """Blocks that reach beyond the lengths are partial: only then does the engine look at their pairs."""
    _, _, rows, columns = lists.shape
    owner, column = lists.full.owners(), lists.full.columns.to(torch.int64)
    tail = torch.zeros_like(owner, dtype=torch.bool)
    if lists.q_rows % lists.block[0]:
        tail |= owner % rows == rows - 1
    if lists.kv_len % lists.block[1]:
        tail |= column == columns - 1
    if not bool(tail.any()):
        return lists
    owners = torch.cat([lists.partial.owners(), owner[tail]])
    every = torch.cat([lists.partial.columns.to(torch.int64), column[tail]])
    order = (owners * columns + every).argsort()
    shape = lists.full.counts.shape
    return BlockLists(
        _tile_rows(owner[~tail], column[~tail], shape),
        _tile_rows(owners[order], every[order], shape),
        lists.block,
        lists.q_rows,
        lists.kv_len,
    )


def _tile_rows(owner: torch.Tensor, column: torch.Tensor, shape: torch.Size) -> TileRows:
    counts = torch.bincount(owner, minlength=shape.numel()).to(torch.int32)
    return TileRows(counts.view(shape), column.to(torch.int32))
