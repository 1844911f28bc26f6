"""What a kernel may be called with: whether a case lies inside its declared limits, and the case inside them that is nearest to a wish."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparsedsl.analysis.bounds import check_reads
from sparsedsl.analysis.domain import Domain
from sparsedsl.errors import TableError
from sparsedsl.lang.symbols import BATCH, HEAD, KV_IDX, Q_IDX
from sparsedsl.lang.tables import table_reads
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.kernel_case import KernelCase

__all__ = ["fits", "near", "outside_positions"]

# A case is no larger than this: pairs of queries and keys, over batch and heads.
_PAIRS = 60_000


def fits(kernel: Kernel, case: KernelCase) -> bool:
    """Whether a case lies inside the limits of a kernel, and of what it implements."""
    return (
        case.heads % case.kv_heads == 0
        and (kernel.group is None or case.heads // case.kv_heads in kernel.group)
        and _allowed_lengths(kernel, case)
        and _allowed_widths(kernel, case)
        and case.dtype in kernel.dtypes
        and case.device in kernel.devices
        and (case.scale is None or bool(kernel.scale))
        and case.q_offset == _offset(kernel, case)
        and case.batch * case.heads * case.q_len * case.kv_len <= _PAIRS
        and _fits_pattern(kernel, case)
    )


def outside_positions(case: KernelCase) -> bool:
    """Whether rows stand before the first key: a kernel may refuse that."""
    return case.q_offset < 0


def _allowed_lengths(kernel: Kernel, case: KernelCase) -> bool:
    lengths = kernel.lengths
    if lengths is None:
        return True
    if lengths == "square":
        return case.q_len == case.kv_len
    if isinstance(lengths[0], tuple):
        return (case.q_len, case.kv_len) in lengths
    return case.q_len in lengths and case.kv_len in lengths


def _allowed_widths(kernel: Kernel, case: KernelCase) -> bool:
    widths = kernel.head_dims
    if widths is None:
        return True
    if isinstance(widths[0], tuple):
        return (case.head_dim, case.head_dim_v) in widths
    return case.head_dim in widths and case.head_dim_v in widths


def _offset(kernel: Kernel, case: KernelCase) -> int:
    """Where the first row stands in a case, as far as the kernel lets it choose."""
    if kernel.offset is True:
        return case.q_offset if case.q_offset >= 0 or not kernel.tables else 0
    return case.kv_len - case.q_len if kernel.offset == "last" else 0


def _fits_pattern(kernel: Kernel, case: KernelCase) -> bool:
    """Whether tables that are bound are long enough, and heads as many as declared."""
    implements = kernel.implements
    heads = getattr(implements, "heads", None)
    if heads is not None and case.heads != heads:
        return False
    if kernel.is_program or not implements.bound:
        return not (case.q_offset < 0 and kernel.tables)
    sizes = {BATCH: case.batch, HEAD: case.heads}
    for read in {read for expr in implements.exprs for read in table_reads(expr) if read.spec.name in implements.bound}:
        for argument, size in zip(read.args, implements.bound[read.spec.name].shape, strict=False):
            if argument in sizes and sizes[argument] > size:
                return False
            if argument in (Q_IDX, KV_IDX) and max(case.q_offset + case.q_len, case.kv_len) > size:
                return False
    if set(implements.tables) - set(implements.bound):
        return True
    try:
        check_reads(implements, Domain(case.q_len, case.kv_len, case.q_offset, case.batch, case.heads, implements.bound))
    except TableError:
        return False
    return True


def near(kernel: Kernel, wish: dict[str, Any]) -> KernelCase | None:
    """The case that a wish stands for, each size moved to the nearest that is allowed; None if there is none."""
    wish = dict(wish)
    at_end = wish.pop("offset_at_end", False)
    relative = wish.pop("offset_from_end", 0) if at_end else wish.pop("offset_from_end", None)
    offset = wish.pop("q_offset", 0)
    case = KernelCase(**wish)
    case = replace(case, dtype=case.dtype if case.dtype in kernel.dtypes else kernel.dtypes[0], device=kernel.devices[0])
    if case.scale is not None and not kernel.scale:
        case = replace(case, scale=None)
    case = _heads(kernel, _widths(kernel, _lengths(kernel, case)))
    offset = 2 * case.kv_len if offset == "2N" else offset
    if relative is not None:
        offset = case.kv_len - case.q_len + relative
        offset = offset if offset >= -1 else 0
    case = replace(case, q_offset=offset)
    case = replace(case, q_offset=_offset(kernel, case))
    pairs = case.heads * case.q_len * case.kv_len
    if case.batch * pairs > _PAIRS:
        case = replace(case, batch=max(1, _PAIRS // pairs))
    return case if fits(kernel, case) else None


def _lengths(kernel: Kernel, case: KernelCase) -> KernelCase:
    lengths = kernel.lengths
    if lengths is None:
        return case
    if lengths == "square":
        return replace(case, q_len=case.kv_len)
    if isinstance(lengths[0], tuple):
        q_len, kv_len = min(lengths, key=lambda pair: (abs(pair[0] - case.q_len) + abs(pair[1] - case.kv_len), pair))
        return replace(case, q_len=q_len, kv_len=kv_len)
    return replace(case, q_len=_nearest(lengths, case.q_len), kv_len=_nearest(lengths, case.kv_len))


def _widths(kernel: Kernel, case: KernelCase) -> KernelCase:
    widths = kernel.head_dims
    if widths is None:
        return case
    if isinstance(widths[0], tuple):
        pair = min(widths, key=lambda pair: (abs(pair[0] - case.head_dim) + abs(pair[1] - case.head_dim_v), pair))
        return replace(case, head_dim=pair[0], head_dim_v=pair[1])
    return replace(case, head_dim=_nearest(widths, case.head_dim), head_dim_v=_nearest(widths, case.head_dim_v))


def _heads(kernel: Kernel, case: KernelCase) -> KernelCase:
    heads = getattr(kernel.implements, "heads", None)
    group = case.heads // case.kv_heads
    if kernel.group is not None and group not in kernel.group:
        group = _nearest(kernel.group, group)
    kv_heads = case.kv_heads
    if heads is not None:
        group = group if heads % group == 0 else next((n for n in kernel.group or (1,) if heads % n == 0), 1)
        kv_heads = heads // group
    else:
        most = [
            size
            for name, dim in getattr(kernel.implements, "head_reads", ())
            if name in kernel.implements.bound
            for size in (kernel.implements.bound[name].shape[dim],)
        ]
        if most:
            kv_heads = max(1, min(most) // group)
    return replace(case, heads=kv_heads * group, kv_heads=kv_heads)


def _nearest(known: tuple[int, ...], value: int) -> int:
    return min(known, key=lambda n: (abs(n - value), n))
