"""Pools of pages of keys and values, as they are given: checked, read where they lie, or turned into numbers page by page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.lang.advice import shown
from sparsedsl.runtime.call import FLOATS
from sparsedsl.runtime.dtypes import accumulated

__all__ = ["QUANTISED", "Pools", "as_numbers", "check_block_table", "check_pools", "computed_in", "pools_of"]

Tensor = torch.Tensor
QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
# Rows of a pool are numbered by int32.
MOST_ROWS = torch.iinfo(torch.int32).max


@dataclass(frozen=True, eq=False)
class Pools:
    """``k`` and ``v (pages, page, Hkv, D)``. ``k_scale``, ``v_scale``: of quantised ones factors ``(pages, 1 or Hkv)``, or None: 1."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def pages(self) -> int:
        """How many there are."""
        return self.k.shape[0]

    @property
    def page(self) -> int:
        """Keys of one."""
        return self.k.shape[1]

    @property
    def quantised(self) -> bool:
        """Whether its elements are no numbers to compute with."""
        return self.k.dtype not in FLOATS or self.v.dtype not in FLOATS

    def in_place(self) -> tuple[Tensor, Tensor, int]:
        """Keys and values as rows ``(1, Hkv, rows, D)`` of the same memory, and rows from one page to the next.

        Raises:
            UnsupportedError: pages do not lie so that one number says where a row of both is.
        """
        k, k_step = _rows(self.k, "k_pool")
        v, v_step = _rows(self.v, "v_pool")
        if k_step != v_step and self.pages > 1:
            raise UnsupportedError(
                f"pages of k_pool lie {k_step} rows apart and those of v_pool {v_step}: one table of rows serves both. Give them the same "
                "strides, as two pools of one kind or two halves of one tensor have them"
            )
        return k, v, k_step

    def numbers(self, pages: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of some pages ``(P,)``, ``(P, page, Hkv, D)``, in a dtype that is computed with."""
        return as_numbers(self.k, self.k_scale, pages, dtype), as_numbers(self.v, self.v_scale, pages, dtype)


def _rows(pool: Tensor, name: str) -> tuple[Tensor, int]:
    pages, page, heads, width = pool.shape
    of_page, of_row, of_head, of_one = pool.stride()
    if page == 1 or pages <= 1:
        of_row = of_page if page == 1 else of_row
        step = 1 if page == 1 else page
    else:
        step = of_page // of_row if of_row > 0 else 0
    if of_row <= 0 or (width > 1 and of_one != 1) or (pages > 1 and step * of_row != of_page):
        raise UnsupportedError(
            f"{name} has strides {tuple(pool.stride())}: its elements must lie side by side, and its pages a whole number of rows apart. "
            f"Pass {name}.contiguous() once, and keep that"
        )
    rows = (pages - 1) * step + page if pages else 0
    if rows > MOST_ROWS:
        raise UnsupportedError(f"{name} spans {rows:,} rows, and rows are numbered up to 2**31. Use several pools")
    return pool.as_strided((1, heads, rows, width), (0, of_head, of_row, of_one)), step


def as_numbers(pool: Tensor, scale: Tensor | None, pages: Tensor, dtype: torch.dtype) -> Tensor:
    """Some pages ``(P,)`` of a pool, ``(P, page, Hkv, D)``, in a dtype that is computed with."""
    # Bytes are taken by their number: not every device indexes the short types.
    found = pool.view(torch.int8)[pages].view(pool.dtype) if pool.dtype.itemsize == 1 else pool[pages]
    found = found.to(dtype)
    return found if scale is None else found.mul_(scale[pages].to(dtype)[:, None, :, None])


def check_pools(k_pool: Any, v_pool: Any, layout: str) -> str:
    """The axes of a pool, of two that are a pair.

    Raises:
        ShapeError: they are not.
    """
    heads = "(pages, page, Hkv, D)" if layout == "nhd" else "(pages, Hkv, page, D)"
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        if not isinstance(pool, Tensor) or pool.ndim != 4:
            raise ShapeError(f"{name} must be a tensor {heads}; got {shown(pool)}")
        if 0 in pool.shape[1:]:
            raise ShapeError(f"{name} {tuple(pool.shape)} has a size of 0: pages hold at least one key, of one head")
    if k_pool.shape[:3] != v_pool.shape[:3] or k_pool.dtype != v_pool.dtype:
        raise ShapeError(
            f"k_pool and v_pool must have the same pages, heads and dtype; got {tuple(k_pool.shape)} {k_pool.dtype} and "
            f"{tuple(v_pool.shape)} {v_pool.dtype}; wanted {heads}"
        )
    return heads


def pools_of(q: Tensor, k_pool: Any, v_pool: Any, k_scale: Any, v_scale: Any, layout: str) -> Pools:
    """The pools of a call with queries ``(T, Hq, D)``, checked. ``layout``: of a page, ``"nhd"`` (page, Hkv, D) or ``"hnd"``.

    Raises:
        ShapeError: they do not fit each other or q, or scales do not fit them.
    """
    heads = check_pools(k_pool, v_pool, layout)
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        if pool.device != q.device:
            raise ShapeError(f"{name} is on {pool.device}, and q on {q.device}")
        if pool.dtype != q.dtype and pool.dtype not in QUANTISED:
            raise ShapeError(
                f"{name} must be {q.dtype} as q is, or quantised (float8_e4m3fn, float8_e5m2, int8); got {pool.dtype}. Under "
                "torch.autocast q is cast, and pools are not: keep them in the dtype of autocast"
            )
    k, v = (pool.detach() if layout == "nhd" else pool.detach().transpose(1, 2) for pool in (k_pool, v_pool))
    if q.shape[1] % k.shape[2] or q.shape[2] != k.shape[3]:
        raise ShapeError(
            f"q {tuple(q.shape)} and k_pool {tuple(k_pool.shape)} must have one head_dim, and query heads a multiple of the key/value "
            f"heads; wanted (T, Hq, D) and {heads}"
        )
    scales = [_scale(name, scale, pool) for name, scale, pool in (("k_scale", k_scale, k), ("v_scale", v_scale, v))]
    return Pools(k, v, *scales)


def _scale(name: str, scale: Any, pool: Tensor) -> Tensor | None:
    if scale is None:
        return None
    pages, heads = pool.shape[0], pool.shape[2]
    if pool.dtype not in QUANTISED:
        raise ShapeError(f"{name} is for quantised pools, and this one holds {pool.dtype}: leave it out")
    if isinstance(scale, (int, float)) and not isinstance(scale, bool):
        scale = torch.full((pages,), float(scale), device=pool.device)
    if not isinstance(scale, Tensor) or not scale.is_floating_point() or scale.shape not in ((pages,), (pages, heads)):
        raise ShapeError(
            f"{name} must be floats ({pages},), a factor for each page, or ({pages}, {heads}), for each of its heads; got {shown(scale)}"
        )
    if scale.device != pool.device:
        raise ShapeError(f"{name} is on {scale.device}, and its pool on {pool.device}")
    return scale.detach().view(pages, -1)


def check_block_table(block_table: Any, count: int, device: torch.device, kv_lens: Tensor, page: int) -> Tensor:
    """Pages of each request, int64 ``(R, width)``, on its own device; wide enough for all keys, where one may look.

    Raises:
        ShapeError: it is something else, or too narrow.
    """
    if not isinstance(block_table, Tensor) or block_table.ndim != 2 or block_table.dtype not in (torch.int32, torch.int64):
        raise ShapeError(f"block_table must be int32 or int64 (requests, pages); got {shown(block_table)}")
    if block_table.shape[0] != count:
        raise ShapeError(f"block_table {tuple(block_table.shape)} is of {block_table.shape[0]} requests, and kv_lens of {count}")
    if block_table.device not in (device, torch.device("cpu")):
        raise ShapeError(f"block_table is on {block_table.device}, and the call runs on {device}: move it there")
    if kv_lens.is_cpu and count:
        most = int(kv_lens.max())
        if most > block_table.shape[1] * page:
            raise ShapeError(
                f"a request has {most} keys, in {-(-most // page)} pages of {page}, and block_table has room for {block_table.shape[1]}"
            )
    return block_table.detach().to(device=device, dtype=torch.int64)


def computed_in(q: Tensor, pools: Pools) -> torch.dtype:
    """The dtype of the call: of quantised pools that of sums, in which a scaled number is what it is."""
    return accumulated(q.dtype) if pools.quantised else q.dtype
