"""FlashInfer, keys in pages: pages of every request, and a causal window or the bits of every pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsedsl.analysis.domain import check_size
from sparsedsl.errors import ShapeError
from sparsedsl.export.bands import Band, band_mask, find_band, lines_of
from sparsedsl.export.export_case import MAX_BYTES, Case, Part, prepare
from sparsedsl.export.exported import Exported, packed_mask
from sparsedsl.export.logits import logit_args

__all__ = ["PagedRequests", "flashinfer_paged"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class PagedRequests(Exported):
    """int32 ``qo_indptr``, ``kv_indptr (R + 1,)``, ``kv_indices``, ``last_page_len (R,)``, and ``custom_mask`` bool, flat, or None.

    ``requests``: which of those that were given are listed; one without keys is left out, as its length would count as negative. The
    mask of a request is ``(queries, keys)``, row-major, one behind the other. Keys of :meth:`to_mask` are in the order of their pages.

    >>> import sparsedsl as sd
    >>> e = sd.export.flashinfer_paged(sd.patterns.causal(), block_table=torch.tensor([[3, 0], [1, 2]]), kv_lens=[5, 20])
    >>> e.lengths(), e.kv_indices.tolist()
    (([1, 1], [5, 20]), [3, 1, 2])
    """

    engine: ClassVar[str] = "flashinfer"
    read_at: ClassVar[str] = "flashinfer fb28d72"

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    last_page_len: torch.Tensor
    custom_mask: torch.Tensor | None
    page_size: int
    causal: bool
    window_left: int
    requests: tuple[int, ...]

    def lengths(self) -> tuple[list[int], list[int]]:
        """Queries and keys of every listed request, decoded."""
        pages = self.kv_indptr.diff()
        return self.qo_indptr.diff().tolist(), ((pages - 1) * self.page_size + self.last_page_len).tolist()

    def to_mask(self) -> torch.Tensor:
        """As :meth:`Exported.to_mask`, of the listed requests."""
        blocks, begin = [], 0
        for q, kv in zip(*self.lengths(), strict=True):
            if self.custom_mask is not None:
                blocks.append(self.custom_mask[begin : begin + q * kv].view(1, q, kv))
                begin += q * kv
                continue
            left = self.window_left if self.window_left >= 0 else None
            blocks.append(band_mask(q, kv, Band(left, 0 if self.causal else None))[None])
        return packed_mask(self, blocks)


def flashinfer_paged(
    pattern: Any, q_lens: Sequence[int] | None = None, *, block_table: torch.Tensor, kv_lens: Sequence[int], page_size: int = 16,
    heads: int | None = None, kv_heads: int | None = None, head: int | None = None, device: Any = None, max_bytes: int = MAX_BYTES,
    **tables: Any,
) -> PagedRequests:  # fmt: skip
    """The page lists that FlashInfer takes: ``BatchPrefillWithPagedKVCacheWrapper(buffer).plan(**e.args, ..)``.

    The queries of a request are its last keys. A causal window, or all keys, are words of the call; any other mask is one bool a pair.

    Args:
        pattern, heads, kv_heads, head, device, max_bytes, tables: as :func:`cudnn`; the n-th request has ``b = n``.
        q_lens: queries of each request, none of them 0; None is one each, a decode step.
        block_table: int ``(requests, pages)``: the pages of each request; what stands behind those that it needs is not read.
        kv_lens: keys of each request, those of its queries included; a request without keys is left out.
        page_size: keys of a page.

    Returns:
        :class:`PagedRequests`.

    Raises:
        UnsupportedError: heads that differ, another score than a soft cap, a sink, more than ``max_bytes``.
        ShapeError: a table that lacks pages, more queries than keys.
        TableError: as :func:`sparsedsl.analyse`.

    No kernel of FlashInfer was run.

    >>> import sparsedsl as sd
    >>> table = torch.tensor([[7, 2, 0], [5, 9, 4]])
    >>> e = sd.export.flashinfer_paged(sd.patterns.sliding_window(8), block_table=table, kv_lens=[17, 48])
    >>> e.kv_indices.tolist(), e.last_page_len.tolist(), e.args["window_left"]
    ([7, 2, 5, 9, 4], [1, 16], 7)
    """
    check_size("page_size", page_size, 1)
    keys = [check_size(f"kv_lens[{n}]", int(value), 0) for n, value in enumerate(kv_lens)]
    queries = [1] * len(keys) if q_lens is None else [check_size(f"q_lens[{n}]", int(value), 1) for n, value in enumerate(q_lens)]
    if len(queries) != len(keys):
        raise ShapeError(f"flashinfer: q_lens and kv_lens must name as many requests; got {len(queries)} and {len(keys)}")
    pages = _pages(block_table, keys, page_size)
    kept = [n for n, value in enumerate(keys) if value]
    for n in kept:
        if queries[n] > keys[n]:
            raise ShapeError(
                f"flashinfer: request {n} has {queries[n]} queries and {keys[n]} keys; the queries of a request are its last keys"
            )
    if not kept:
        raise ShapeError("flashinfer: no request has a key")
    case = prepare(
        "flashinfer", "page lists", pattern, None, None, heads=heads, kv_heads=kv_heads, q_lens=[queries[n] for n in kept],
        kv_lens=[keys[n] for n in kept], numbers=kept, head=head, device=device, max_bytes=max_bytes, tables=tables,
    )  # fmt: skip
    args = logit_args(case, scale="sm_scale", cap="logits_soft_cap")
    parts = [part.alone() for part in case.parts]
    band = _band(parts)
    mask = None if band is not None else _bits(case, parts)
    counts = torch.tensor([pages[n].numel() for n in kept])
    tensors: dict[str, Any] = {
        "qo_indptr": case.place(_ends([queries[n] for n in kept])), "kv_indptr": case.place(_ends(counts.tolist())),
        "kv_indices": case.place(torch.cat([pages[n] for n in kept])),
        "last_page_len": case.place(torch.tensor([(keys[n] - 1) % page_size + 1 for n in kept])),
    }  # fmt: skip
    words: dict[str, Any] = {"causal": False, "window_left": -1}
    if band is not None:
        words = {"causal": band.causal, "window_left": -1 if band.left is None else band.left}
    names = {
        "qo_indptr": "qo_indptr",
        "kv_indptr": "paged_kv_indptr",
        "kv_indices": "paged_kv_indices",
        "last_page_len": "paged_kv_last_page_len",
    }
    args |= {names[name]: value for name, value in tensors.items()} | {"page_size": page_size, "custom_mask": mask} | words
    return PagedRequests(**tensors, custom_mask=mask, page_size=page_size, **words, requests=tuple(kept), args=args, **case.lens)


def _pages(block_table: torch.Tensor, keys: list[int], page_size: int) -> list[torch.Tensor]:
    if block_table.ndim != 2 or block_table.shape[0] != len(keys) or block_table.is_floating_point():
        raise ShapeError(
            f"flashinfer: block_table must be whole numbers ({len(keys)} requests, pages); got {block_table.dtype} "
            f"{tuple(block_table.shape)}"
        )
    found = []
    for n, count in enumerate(keys):
        needed = -(-count // page_size)
        if needed > block_table.shape[1]:
            raise ShapeError(
                f"flashinfer: request {n} has {count} keys in {needed} pages of {page_size}; block_table has room for "
                f"{block_table.shape[1]}"
            )
        found.append(block_table[n, :needed])
        if needed and int(found[-1].min()) < 0:
            raise ShapeError(f"flashinfer: page {int(found[-1].min())} of request {n}: pages count from 0")
    return found


def _ends(lens: list[int]) -> torch.Tensor:
    return torch.nn.functional.pad(torch.tensor(lens).cumsum(0), (1, 0))


def _band(parts: list[Part]) -> Band | None:
    """The band that is said in words of the call; None: bits of every pair."""
    lines = []
    for part in parts:
        found = lines_of(part.rows, part.off)
        if isinstance(found, int):
            return None
        lines.append(found)
    band = find_band(lines)
    held = isinstance(band, Band) and band.right in (0, None) and band.holds_own_key
    return band if held else None  # type: ignore[return-value]


def _bits(case: Case, parts: list[Part]) -> torch.Tensor:
    case.check_bytes(sum(part.q_len * part.kv_len for part in parts), "custom_mask, one for every pair,")
    return case.place(torch.cat([part.rows.dense().flatten() for part in parts]), torch.bool)
