"""What FlexAttention is given: tile lists as compact index tensors, patterns as functions; also for use without the rest of the project."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.lists import BlockLists, TileRows, check_room
from sparsedsl.codegen.to_flex import flex_functions, needs_lengths
from sparsedsl.errors import PatternError
from sparsedsl.lang.pattern import Pattern

__all__ = ["block_mask", "mask_mod", "pack", "score_mod", "tall_enough", "widened"]


def widened(table: torch.Tensor) -> torch.Tensor:
    """A table in the type that generated code computes in: int64, bool or float32."""
    if table.is_floating_point():
        return table.to(torch.float32)
    return table if table.dtype == torch.bool else table.to(torch.int64)


def mask_mod(
    pattern: Pattern,
    tables: Mapping[str, torch.Tensor],
    *,
    q_offset: int = 0,
    q_len: int | None = None,
    kv_len: int | None = None,
) -> Callable[..., torch.Tensor]:
    """``mask_mod(b, h, q_idx, kv_idx)`` for plain ``flex_attention`` and ``create_block_mask``; ``q_idx`` counts from the first query.

    ``q_len`` (the position after the last query) and ``kv_len`` are wanted only if the pattern reads them, else PatternError.

    >>> import torch, sparsedsl as sd
    >>> mod = mask_mod(sd.attend(sd.kv_idx <= sd.q_idx), {}, q_offset=2)
    >>> mod(None, None, torch.tensor(0), torch.arange(4))
    tensor([ True,  True,  True, False])
    """
    return _MaskMod(pattern, tables, q_offset, q_len, kv_len)


def score_mod(
    pattern: Pattern,
    tables: Mapping[str, torch.Tensor],
    *,
    q_offset: int = 0,
    q_len: int | None = None,
    kv_len: int | None = None,
) -> Callable[..., torch.Tensor] | None:
    """``score_mod(score, b, h, q_idx, kv_idx)`` for plain ``flex_attention``; None if the pattern leaves scores as they are.

    >>> import torch, sparsedsl as sd
    >>> score_mod(sd.attend(True, score=sd.score * 2), {})(torch.tensor(1.5), None, None, None, None)
    tensor(3.)
    """
    return _ScoreMod(pattern, tables, q_offset, q_len, kv_len) if pattern.has_score else None


class _MaskMod:
    """A generated ``mask_mod``. An object, since the function it calls was made by ``exec``, and no other process could find it."""

    def __init__(self, *made_of: Any) -> None:
        self.made_of = made_of
        self.function = _mods(*made_of)[0]

    def __call__(self, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
        return self.function(b, h, q_idx, kv_idx)

    def __reduce__(self) -> Any:
        return type(self), self.made_of


class _ScoreMod(_MaskMod):
    """A generated ``score_mod``, picklable too."""

    def __init__(self, *made_of: Any) -> None:
        self.made_of = made_of
        self.function = _mods(*made_of)[1]

    def __call__(self, score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:  # type: ignore[override]
        return self.function(score, b, h, q_idx, kv_idx)


def _mods(
    pattern: Pattern, tables: Mapping[str, torch.Tensor], q_offset: int, q_len: int | None, kv_len: int | None
) -> tuple[Any, Any]:
    for name, needed, given in zip(("q_len", "kv_len"), needs_lengths(pattern), (q_len, kv_len), strict=True):
        if needed and given is None:
            raise PatternError(f"the pattern reads {name}: pass {name}=... (in tokens) to get its functions")
    source = flex_functions(pattern)
    namespace: dict[str, Any] = {}
    exec(compile(source.text, "<sparsedsl flex functions>", "exec"), namespace)
    numbers = (q_offset, q_len, kv_len)
    return namespace["mods"](*numbers, *(widened(tables[name]) for name in source.values[len(numbers) :]))


def block_mask(
    pattern: Pattern, lists: BlockLists, domain: Domain, device: torch.device | None = None, *, backward: bool = True
) -> BlockMask:
    """A BlockMask over ``lists`` whose index tensors are strided views of compact storage; its ``mask_mod`` takes local indices.

    ``backward``: it also holds the tiles by key, as gradients need them.
    """
    device = domain.device if device is None else device
    rows, columns = lists.shape[2:]
    tensors: list[Any] = []
    for part, width in ((lists.partial, columns), (lists.full, columns)):
        tensors += _wide(part, width, device)
    for part in (lists.partial, lists.full):
        tensors += _wide(part.transposed(columns), rows, device, by_key=True) if backward else (None, None)
    tables = {name: table.to(device) for name, table in domain.tables.items()}
    mod = mask_mod(pattern, tables, q_offset=domain.q_offset, **domain.lengths)
    partial_counts, partial, full_counts, full, *by_key = tensors
    return BlockMask(
        (domain.rows, domain.kv_len), partial_counts, partial, full_counts, full, by_key[0], by_key[1], by_key[2], by_key[3],
        BLOCK_SIZE=lists.block, mask_mod=mod,
    )  # fmt: skip


def _wide(rows: TileRows, width: int, device: torch.device, *, by_key: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts, and columns as (batch, heads, rows, width) over storage of the compact width, with room for the last row to look wide."""
    if by_key:
        way = "Pass backward=False for a mask without them, for calls that need no gradients"
    else:
        way = "Larger tiles (block_size=) make fewer and shorter rows"
    check_room(_flat_bytes(rows), device, _what(rows, by_key=by_key), f"{way}; backend='tiled' and 'triton' need no such lists")
    counts, columns = _flat(rows)
    batch, heads, lines = counts.shape
    step = columns.numel() // max(1, counts.numel())
    storage = F.pad(columns, (0, max(0, width - step))).to(device)
    view = storage.as_strided((batch, heads, lines, width), (heads * lines * step, lines * step, step, 1))
    return counts.to(device), view


def pack(lists: BlockLists, *, sink: bool = False, backward: bool = False) -> list[torch.Tensor]:
    """Counts and flat columns of the partial tiles and of the full ones.

    ``backward``: then the same by key. ``sink``: every row has one more full tile, one column past the keys.
    """
    parts = [lists.partial, lists.full]
    if backward:
        parts += [part.transposed(lists.shape[3]) for part in parts]
    for i, part in enumerate(parts):
        way = "Use backend='tiled' or 'triton', which need no such lists"
        check_room(_flat_bytes(part), part.counts.device, _what(part, by_key=i > 1), way)
    packed: list[torch.Tensor] = []
    for i, part in enumerate(parts):
        packed += _flat(part, append=lists.shape[3] if sink and i == 1 else None)
    return packed


def _flat_bytes(rows: TileRows) -> int:
    return 4 * rows.counts.numel() * max(rows.width, 1)


def _what(rows: TileRows, *, by_key: bool) -> str:
    """What FlexAttention's lists are that take so much."""
    lines, tile = rows.counts.numel(), "keys" if by_key else "queries"
    whose = "lists by key, for gradients" if by_key else "lists"
    return f"FlexAttention's {whose}, {lines:,} tiles of {tile}, each as wide as the longest of {rows.width:,},"


def _flat(rows: TileRows, append: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts (batch, heads, rows), and the columns, flat, every row as long as the longest; ``append`` ends each row with that column."""
    counts = rows.counts
    if append is None:
        return counts.contiguous(), rows.padded().reshape(-1)
    columns = rows.padded(rows.width + 1)
    columns.scatter_(-1, counts.long().unsqueeze(-1), append)
    return counts + 1, columns.reshape(-1)


def tall_enough(packed: tuple[torch.Tensor, ...], rows: int, block: int) -> tuple[torch.Tensor, ...]:
    """Packed lists with an empty row of tiles for the second of two query rows, where tiles are one row high."""
    missing = -(-rows // block) - packed[0].shape[2]
    if missing <= 0:
        return packed
    tall = []
    for counts, columns in (packed[:2], packed[2:4]):
        tall += [F.pad(counts, (0, missing)), F.pad(columns.view(*counts.shape, -1), (0, 0, 0, missing)).reshape(-1)]
    return (*tall, *packed[4:])
