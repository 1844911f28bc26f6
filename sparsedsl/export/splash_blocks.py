"""JAX splash attention: a mask that is computed from positions, or states of blocks and each partial block once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsedsl.analysis.tiles import block_pair
from sparsedsl.errors import ShapeError
from sparsedsl.export.bands import Band, find_band, find_chunk, lines_of
from sparsedsl.export.export_case import MAX_BYTES, Case, prepare
from sparsedsl.export.exported import Exported, check_dense
from sparsedsl.export.logits import logit_args
from sparsedsl.export.tiles import listed_tiles, partial_pairs

__all__ = ["SplashMask", "computed_mask", "splash"]

# Lanes of a register on TPU: blocks of keys are multiples.
LANES = 128


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SplashMask(Exported):
    """``mask_class`` and ``mask_args``, a mask that is computed, the same for all heads; or, where these are None, blocks.

    ``block_mask`` int8 ``(heads | 1, rows, columns)``: 0 empty, 1 partial, 2 full. ``mask_next`` int32, the same shape: which of
    ``partial_mask_blocks`` bool ``(unique, block_q, block_kv)`` a partial block is. ``q_scale``: what q is multiplied by before the call,
    which has no scale; None is ``head_dim ** -0.5``.

    >>> import sparsedsl as sd
    >>> e = sd.export.splash(sd.patterns.block_causal(128), 256)
    >>> e.mask_class, e.block_mask[0].tolist()
    (None, [[2, 0], [2, 2]])
    """

    engine: ClassVar[str] = "splash"
    read_at: ClassVar[str] = "jax splash mask 1e37005, mask_info 02338e2, kernel 047c691"

    mask_class: str | None
    mask_args: Mapping[str, Any]
    block_mask: torch.Tensor | None
    mask_next: torch.Tensor | None
    partial_mask_blocks: torch.Tensor | None
    q_scale: float | None

    def to_mask(self) -> torch.Tensor:
        """As :meth:`Exported.to_mask`."""
        q_len, kv_len = self.q_lens[0], self.kv_lens[0]
        if self.mask_class is not None:
            check_dense(q_len * kv_len)
            return computed_mask(self.mask_class, self.mask_args, q_len, kv_len)[None, None]
        assert self.block_mask is not None and self.mask_next is not None and self.partial_mask_blocks is not None
        check_dense(self.block_mask.shape[0] * q_len * kv_len)
        states = self.block_mask[..., None, None]
        blocks = (states == 2).expand(*states.shape[:3], *self.partial_mask_blocks.shape[1:]).clone()
        partial = self.block_mask == 1
        blocks[partial] = self.partial_mask_blocks[self.mask_next[partial].to(torch.int64)]
        return blocks.permute(0, 1, 3, 2, 4).reshape(1, -1, q_len, kv_len)


def computed_mask(name: str, args: Mapping[str, Any], q_len: int, kv_len: int) -> torch.Tensor:
    """What a mask class of splash shows, bool ``(q_len, kv_len)``.

    >>> computed_mask("LocalMask", {"window_size": (1, None), "offset": 2}, 2, 5).int().tolist()
    [[0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    """
    q, key = torch.arange(q_len)[:, None], torch.arange(kv_len)
    out = torch.ones(q_len, kv_len, dtype=torch.bool)
    match name:
        case "FullMask":
            return out
        case "CausalMask":
            return q + args["offset"] >= key
        case "LocalMask":
            left, right = args["window_size"]
            out = out if left is None else out & (q + args["offset"] - left <= key)
            return out if right is None else out & (key <= q + args["offset"] + right)
        case "ChunkedCausalMask":
            return (q // args["chunk_size"] == key // args["chunk_size"]) & (q >= key)
        case _:
            raise ShapeError(f"splash: there is no mask class {name!r}")


def splash(
    pattern: Any, q_len: int | None = None, kv_len: int | None = None, *, block: int | tuple[int, int] = (128, 128),
    q_offset: int | None = None, batch: int = 1, heads: int | None = None, kv_heads: int | None = None, head: int | None = None,
    device: Any = None, max_bytes: int = MAX_BYTES, **tables: Any,
) -> SplashMask:  # fmt: skip
    """The mask that JAX's splash attention takes: ``mask_class(shape, **mask_args)`` for every head, or the blocks of its ``MaskInfo``.

    A full, causal, local or chunked mask that all heads share is computed in the kernel and takes no bytes. Others are stored: states of
    blocks, and each different partial block once. Tensors are torch's.

    Args:
        pattern, q_len, kv_len, q_offset, batch, heads, kv_heads, device, max_bytes, tables: as :func:`cudnn`.
        block: tokens of a block, of queries and of keys; both divide their length, that of keys is a multiple of 128.
        head: export the mask of this head alone.

    Returns:
        :class:`SplashMask`.

    Raises:
        UnsupportedError: a query that sees no key (its result would not be defined), batch entries that differ, blocks that do not
            divide the lengths, another score than a soft cap.
        ShapeError, TableError: as :func:`sparsedsl.analyse`.

    No kernel of splash attention was run.

    >>> import sparsedsl as sd
    >>> e = sd.export.splash(sd.patterns.sliding_window(64), 128, 256)
    >>> e.mask_class, e.mask_args
    ('LocalMask', {'window_size': (63, 0), 'offset': 128})
    """
    case = prepare(
        "splash", "masks", pattern, q_len, kv_len, q_offset=q_offset, batch=batch, heads=heads, kv_heads=kv_heads, head=head,
        device=device, max_bytes=max_bytes, tables=tables,
    )  # fmt: skip
    args = logit_args(case, scale=None, cap="attn_logits_soft_cap", sink="sinks")
    pair = block_pair(block)
    _check_blocks(case, pair)
    _check_rows(case)
    words = {"block_q": pair[0], "block_kv": pair[1], "block_kv_compute": pair[1]}
    lens = {**case.lens, "q_lens": case.q_lens[:1], "kv_lens": case.kv_lens[:1]}
    scale = case.pattern.scale
    if computed := _computed(case):
        name, mask_args = computed
        return SplashMask(
            mask_class=name, mask_args=mask_args, block_mask=None, mask_next=None, partial_mask_blocks=None, q_scale=scale,
            args=args | {"block_sizes": words}, **lens,
        )  # fmt: skip
    return SplashMask(
        mask_class=None, mask_args={}, q_scale=scale, args=args | {"block_sizes": words}, **_blocks(case, pair), **lens
    )


def _check_blocks(case: Case, pair: tuple[int, int]) -> None:
    if pair[1] % LANES:
        case.refuse(f"blocks of {pair[1]} keys are no multiple of {LANES}; {case.holder()}")
    for length, block, what in ((case.part.q_len, pair[0], "queries"), (case.part.kv_len, pair[1], "keys")):
        if length % block:
            case.refuse(f"{length} {what} are no multiple of a block of {block}; pad them, or {case.holder()}")


def _check_rows(case: Case) -> None:
    rows = case.part.rows
    if rows.shape[0] > 1:
        case.refuse(f"the mask differs by batch entry, one mask serves all; export one entry at a time, or {case.holder()}")
    empty = (rows.counts == 0).nonzero()[:, 0]
    if empty.numel():
        head, row = divmod(int(empty[0]), rows.shape[2])
        case.refuse(f"query {row}{f' of head {head}' if rows.shape[1] > 1 else ''} sees no key; {case.holder()}")


def _computed(case: Case) -> tuple[str, dict[str, Any]] | None:
    """The class and arguments of a mask that the kernel computes, which must be the same for all heads."""
    rows, offset = case.part.rows, case.part.domain.q_offset
    if rows.shape[1] > 1:
        return None
    lines = lines_of(rows, offset)
    if isinstance(lines, int):
        return None
    band = find_band([lines])
    if isinstance(band, Band) and band.holds_own_key:
        if band == Band(None, None):
            return "FullMask", {}
        if band == Band(None, 0):
            return "CausalMask", {"offset": offset}
        return "LocalMask", {"window_size": (band.left, band.right), "offset": offset}
    if offset == 0 and (found := find_chunk(lines)) and found[1] == Band(None, 0):
        return "ChunkedCausalMask", {"chunk_size": found[0]}
    return None


def _blocks(case: Case, pair: tuple[int, int]) -> dict[str, Any]:
    part = case.part
    groups = case.part.rows.shape[1]
    size = 5 * groups * (part.q_len // pair[0]) * (part.kv_len // pair[1])
    case.check_bytes(size, "states of all blocks")
    lists = listed_tiles(part, pair)
    case.check_bytes(
        size + lists.partial.total * pair[0] * pair[1], f"{lists.partial.total} partial blocks of {pair[0]} x {pair[1]}"
    )
    states = lists.classes()[0]
    blocks, which = partial_pairs(part, lists).unique(dim=0, return_inverse=True) if lists.partial.total else (
        torch.zeros(0, *pair, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    )  # fmt: skip
    following = torch.zeros(states.shape, dtype=torch.int32, device=states.device)
    following.view(-1, states.shape[-1])[lists.partial.owners(), lists.partial.columns.to(torch.int64)] = which.to(torch.int32)
    return {
        "block_mask": case.place(states, torch.int8), "mask_next": case.place(following),
        "partial_mask_blocks": case.place(blocks, torch.bool),
    }  # fmt: skip
