"""From a failing case to a small one that fails in the same property and the same way.

In this order: what is special (layout, dtype, values, scale), batch and heads, offset, rows, keys, widths, and last the numbers themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.findings import Failure
from sparsedsl.testing.kernels.kernel_case import KernelCase
from sparsedsl.testing.kernels.limits import fits

__all__ = ["shrunk"]

_HEADS = ((1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (4, 1), (6, 2))
_PASSES = 5
_SEEDS = (0, 1, 2, 3)
Axis = Callable[[Kernel, KernelCase], Iterator[KernelCase]]


def shrunk(
    kernel: Kernel,
    case: KernelCase,
    failed: Failure,
    run: Callable[[KernelCase], Failure | None],
    *,
    tries: int = 400,
    seconds: float = 20.0,
) -> tuple[KernelCase, Failure]:
    """The smallest case found, and how it fails. ``run`` answers None for cases that hold, or that say nothing."""
    until = time.monotonic() + seconds
    known: dict[KernelCase, Failure | None] = {}

    def fails(other: KernelCase) -> Failure | None:
        if other not in known:
            if len(known) >= tries or time.monotonic() > until:
                return None
            found = run(other) if fits(kernel, other) else None
            known[other] = found if found is not None and found.kind == failed.kind else None
        return known[other]

    for number in range(_PASSES):
        before = case
        axes: tuple[Axis, ...] = (_together, *_AXES) if number == 0 else _AXES
        for axis in axes:
            case, failed = _smallest(axis(kernel, case), case, failed, fails)
        if case == before:
            # smaller sizes by other seeds: where one draw holds another may fail
            for axis in _SIZES:
                reseeded = (
                    replace(other, seed=seed) for other in axis(kernel, case) for seed in _SEEDS if other.size < case.size
                )
                case, failed = _smallest(reseeded, case, failed, fails)
        if case == before:
            break
    for values in ("integers", "zero q"):
        found = None if case.values in ("integers", "zero q") else fails(replace(case, values=values))
        if found is not None:
            case, failed = replace(case, values=values), found
    return case, failed


def _smallest(
    others: Iterator[KernelCase], case: KernelCase, failed: Failure, fails: Callable[[KernelCase], Failure | None]
) -> tuple[KernelCase, Failure]:
    """The first of some cases that fails, else the case that is known."""
    for other in others:
        if other == case:
            break
        found = fails(other)
        if found is not None:
            return other, found
    return case, failed


def _together(kernel: Kernel, case: KernelCase) -> Iterator[KernelCase]:
    """All that is small at once: often the first try is the last."""
    for q_len, kv_len in ((1, 1), (1, 2), (2, 2), (1, 3), (2, 4)):
        if q_len > case.q_len or kv_len > case.kv_len:
            continue
        for offset in (kv_len - q_len, case.q_offset):
            small: dict[str, Any] = {"batch": 1, "heads": 1, "kv_heads": 1, "head_dim": 1, "head_dim_v": 1}
            yield replace(case, q_len=q_len, kv_len=kv_len, q_offset=offset, **small)


def _plain(name: str, *values: Any) -> Axis:
    def axis(kernel: Kernel, case: KernelCase) -> Iterator[KernelCase]:
        for value in values:
            if getattr(case, name) == value:
                return
            yield replace(case, **{name: value})

    return axis


def _batch(kernel: Kernel, case: KernelCase) -> Iterator[KernelCase]:
    """Few entries; two of them by other seeds too, as the two may be alike where three were not."""
    for batch in (1, 2):
        if batch >= case.batch:
            return
        for seed in dict.fromkeys((case.seed, 1, 2, 3, 4) if batch > 1 else (case.seed,)):
            yield replace(case, batch=batch, seed=seed)


def _heads(kernel: Kernel, case: KernelCase) -> Iterator[KernelCase]:
    for heads, kv_heads in _HEADS:
        if heads >= case.heads and kv_heads >= case.kv_heads:
            return
        if heads * kv_heads < case.heads * case.kv_heads:
            yield replace(case, heads=heads, kv_heads=kv_heads)


def _offset(kernel: Kernel, case: KernelCase) -> Iterator[KernelCase]:
    for offset in (0, case.kv_len - case.q_len, 1, 2, 3):
        if offset == case.q_offset:
            return
        yield replace(case, q_offset=offset)


def _rows(kernel: Kernel, case: KernelCase) -> Iterator[KernelCase]:
    for q_len in _smaller(case.q_len, kernel):
        fewer = case.q_len - q_len
        for offset in dict.fromkeys((case.q_offset + fewer, case.q_offset, 0)):
            yield replace(case, q_len=q_len, q_offset=offset, kv_len=q_len if kernel.lengths == "square" else case.kv_len)


def _keys(kernel: Kernel, case: KernelCase) -> Iterator[KernelCase]:
    for kv_len in _smaller(case.kv_len, kernel):
        fewer = case.kv_len - kv_len
        for offset in dict.fromkeys((case.q_offset - fewer, case.q_offset, 0)):
            yield replace(case, kv_len=kv_len, q_offset=offset)


def _both(kernel: Kernel, case: KernelCase) -> Iterator[KernelCase]:
    """As many rows and keys less."""
    for fewer in range(min(case.q_len, case.kv_len) - 1, 0, -1):
        yield replace(case, q_len=case.q_len - fewer, kv_len=case.kv_len - fewer)


def _width(name: str) -> Axis:
    def axis(kernel: Kernel, case: KernelCase) -> Iterator[KernelCase]:
        for size in (1, 2, 3, 4, 5, 8, 16, 32, 64):
            if size >= getattr(case, name):
                return
            words: dict[str, Any] = {name: size}
            yield replace(case, **words)

    return axis


def _widths(kernel: Kernel, case: KernelCase) -> Iterator[KernelCase]:
    """Declared pairs of widths."""
    pairs = kernel.head_dims if kernel.head_dims and isinstance(kernel.head_dims[0], tuple) else ()
    for head_dim, head_dim_v in pairs:
        if head_dim + head_dim_v < case.head_dim + case.head_dim_v:
            yield replace(case, head_dim=head_dim, head_dim_v=head_dim_v)


def _narrower(kernel: Kernel, case: KernelCase) -> Iterator[KernelCase]:
    """One channel, for a few more keys."""
    for more in (1, 2, 3):
        yield replace(case, head_dim=1, head_dim_v=1, kv_len=case.kv_len + more)


def _smaller(length: int, kernel: Kernel) -> list[int]:
    tiles = {n for t in kernel.tiles or (16, 32, 64, 128) for n in (t, t + 1, 2 * t, 2 * t + 1)}
    few = {n for n in (*range(1, 13), length // 2, length * 3 // 4, length - 1, *tiles) if 0 < n < length}
    return sorted(few)


_AXES: tuple[Axis, ...] = (
    _plain("memory", "packed"),
    _plain("dtype", "float32"),
    _plain("values", "normal", "three"),
    _plain("scale", None),
    _plain("seed", 0),
    _batch,
    _heads,
    _offset,
    _rows,
    _keys,
    _both,
    _width("head_dim_v"),
    _width("head_dim"),
    _widths,
)
_SIZES: tuple[Axis, ...] = (_batch, _heads, _rows, _keys, _width("head_dim_v"), _width("head_dim"), _narrower)
