"""Images and video: tokens on a grid, which see the keys near them in space. Tokens may be in raster, tiled or Morton order."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable
from typing import Any

from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import Index, Mask, as_index, as_mask, kv_idx, q_idx
from sparsedsl.lang.numeric import maximum, minimum
from sparsedsl.patterns.checked_arguments import check_choice, check_counts, check_whole

__all__ = ["grid_position", "neighbourhood_2d", "neighbourhood_3d", "sliding_tile"]

_ORDERS = ("raster", "tiled", "morton")
_EDGES = ("shift", "clip")


def neighbourhood_2d(
    height: int,
    width: int,
    kernel: int | tuple[int, ...],
    *,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    edge: str = "shift",
    order: str = "raster",
    tile: tuple[int, ...] | None = None,
) -> Mask:
    """Keys in a ``kernel`` of rows x columns around the query on a ``height`` x ``width`` grid of tokens.

    On each axis with query position ``i``, key position ``j``, ``n`` positions and kernel ``k``::

        edge="shift"    start <= j < start + k,   start = min(max(i - k // 2, 0), n - k)    always k keys, as NATTEN
        edge="clip"     -(k // 2) <= j - i <= (k - 1) // 2                                  fewer keys at the edges
        causal          0 <= i - j < k                                                      the last k keys of that axis

    Args:
        height, width: rows and columns of the grid; the sequence holds exactly ``height * width`` tokens.
        kernel: keys on each axis, the query's own position included: a whole number or ``(rows, columns)``. A radius ``r`` is the
            kernel ``2*r + 1``; of an even kernel the larger half lies before the query.
        dilation: distance between neighbouring keys on each axis, in positions; only keys of the query's residue class are seen.
        causal: ``True``, or one for each axis: no key at a later position of that axis.
        edge: what happens where the kernel reaches beyond the grid: it is shifted inside, or clipped.
        order: how tokens lie in the sequence, see :func:`grid_position`.
        tile: rows and columns of a tile, for ``order="tiled"``.

    Raises:
        PatternError: a length below 1, a kernel with its dilation larger than the grid, an order that does not fit the grid.

    Source: Hassani et al. 2022, "Neighborhood Attention Transformer" (arXiv 2204.07143), and its dilated form (arXiv 2209.15001).

    >>> import sparsedsl as sd
    >>> for part in str(sd.patterns.neighbourhood_2d(32, 32, 5, edge="clip")).split(" & "):
    ...     print(part)
    (q_idx % 32 - kv_idx % 32 >= -2)
    (q_idx // 32 - kv_idx // 32 >= -2)
    (q_idx % 32 - kv_idx % 32 <= 2)
    (q_idx // 32 - kv_idx // 32 <= 2)
    """
    return _neighbourhood("neighbourhood_2d", (height, width), ("height", "width"), kernel, dilation, causal, edge, order, tile)


def neighbourhood_3d(
    frames: int,
    height: int,
    width: int,
    kernel: int | tuple[int, ...],
    *,
    dilation: int | tuple[int, ...] = 1,
    causal: bool | tuple[bool, ...] = False,
    edge: str = "shift",
    order: str = "raster",
    tile: tuple[int, ...] | None = None,
) -> Mask:
    """Keys in a ``kernel`` of frames x rows x columns around the query, in a video: :func:`neighbourhood_2d` with a third axis.

    Args:
        frames, height, width: the grid; the sequence holds exactly ``frames * height * width`` tokens.
        kernel: keys on each axis, the query's own position included: a whole number or ``(frames, rows, columns)``.
        dilation: distance between neighbouring keys on each axis, in positions.
        causal: ``True``, or one for each axis; ``(True, False, False)`` is causal in time.
        edge: ``"shift"`` or ``"clip"``.
        order: ``"raster"``, ``"tiled"`` or ``"morton"``.
        tile: frames, rows and columns of a tile, for ``order="tiled"``.

    Raises:
        PatternError: as :func:`neighbourhood_2d`.

    Source: Hassani et al. 2022-2025, NATTEN (arXiv 2204.07143, 2504.16922).

    >>> import sparsedsl as sd
    >>> mask = sd.patterns.neighbourhood_3d(8, 16, 16, kernel=(4, 5, 5), causal=(True, False, False))
    """
    shape, names = (frames, height, width), ("frames", "height", "width")
    return _neighbourhood("neighbourhood_3d", shape, names, kernel, dilation, causal, edge, order, tile)


def sliding_tile(shape: tuple[int, ...], kernel: int | tuple[int, ...], tile: int | tuple[int, ...]) -> Mask:
    """Whole tiles of keys around the query's tile: neighbourhood attention whose positions are tiles. No tile is cut.

    Tokens lie tile by tile in the sequence (``order="tiled"``); with ``math.prod(tile)`` as block size every block is full or
    empty.

    Args:
        shape: the grid in tokens, ``(height, width)`` or ``(frames, height, width)``.
        kernel: keys on each axis in tokens, a multiple of the tile.
        tile: tokens of a tile on each axis; divides the shape.

    Raises:
        PatternError: shape, kernel and tile do not fit each other.

    Source: Zhang et al. 2025, "Fast Video Generation with Sliding Tile Attention" (arXiv 2502.04507).

    >>> import sparsedsl as sd
    >>> mask = sd.patterns.sliding_tile((32, 32), kernel=(24, 24), tile=(8, 8))     # blocks of 64: none is partial
    """
    if not isinstance(shape, (tuple, list)) or len(shape) not in (2, 3):
        raise PatternError(f"sliding_tile(): shape must be (height, width) or (frames, height, width); got {shape!r}")
    axes = len(shape)
    sizes = check_counts("sliding_tile", "shape", shape, axes, 1)
    tiles = _tile("sliding_tile", sizes, tile)
    kernels = check_counts("sliding_tile", "kernel", kernel, axes, 1)
    if any(k % t for k, t in zip(kernels, tiles, strict=True)):
        raise PatternError(f"sliding_tile(): kernel must be a multiple of the tile on each axis; got {kernels}, tile {tiles}")
    volume = math.prod(tiles)
    counts = tuple(n // t for n, t in zip(sizes, tiles, strict=True))
    _check_fits("sliding_tile", "kernel", kernels, sizes)
    kernels = tuple(k // t for k, t in zip(kernels, tiles, strict=True))
    places = zip(_raster(q_idx // volume, counts), _raster(kv_idx // volume, counts), counts, kernels, strict=True)
    return _all(_shifted(i, j, n, k) for i, j, n, k in places)


def grid_position(
    index: Index, shape: tuple[int, ...], *, order: str = "raster", tile: tuple[int, ...] | None = None
) -> tuple[Index, ...]:
    """Where on a grid a token of the sequence lies: ``(row, column)`` or ``(frame, row, column)``.

    Args:
        index: position in the sequence: ``sd.q_idx``, ``sd.kv_idx`` or an expression.
        shape: the grid, slowest axis first.
        order: ``"raster"``, last axis fastest; ``"tiled"``, tile after tile, each in raster order; ``"morton"``, the bits of the
            coordinates interleaved (Z-order), the last axis in the lowest bit.
        tile: tokens of a tile on each axis, for ``order="tiled"``; divides the shape.

    Raises:
        PatternError: an unknown order, a tile that does not divide the grid, a Morton grid whose sides are not one power of two.

    >>> import sparsedsl as sd
    >>> sd.patterns.grid_position(sd.q_idx, (32, 64))
    (Index(q_idx // 64), Index(q_idx % 64))
    """
    if not isinstance(shape, (tuple, list)) or not shape:
        raise PatternError(f"grid_position(): shape must be a tuple of whole numbers; got {shape!r}")
    sizes = check_counts("grid_position", "shape", shape, len(shape), 1)
    return _position("grid_position", as_index(index, where="index of grid_position()"), sizes, order, tile)


def _neighbourhood(
    function: str,
    shape: Any,
    names: Any,
    kernel: Any,
    dilation: Any,
    causal: Any,
    edge: str,
    order: str,
    tile: Any,
) -> Mask:
    sizes = tuple(check_whole(function, name, size, 1) for name, size in zip(names, shape, strict=True))
    axes = len(sizes)
    kernels = check_counts(function, "kernel", kernel, axes, 1, "it counts the query's own position")
    steps = check_counts(function, "dilation", dilation, axes, 1)
    flags = tuple(causal) if isinstance(causal, (tuple, list)) else (causal,) * axes
    if len(flags) != axes or not all(isinstance(flag, bool) for flag in flags):
        raise PatternError(f"{function}(): causal must be True or False, or {axes} of them, one for each axis; got {causal!r}")
    edge = check_choice(function, "edge", edge, _EDGES)
    if edge == "shift":
        _check_fits(
            function,
            "kernel * dilation",
            tuple(k * d for k, d in zip(kernels, steps, strict=True)),
            sizes,
            '. edge="clip" has no limit',
        )
    queries, keys = (_position(function, index, sizes, order, tile) for index in (q_idx, kv_idx))
    return _all(map(functools.partial(_axis, edge=edge), queries, keys, sizes, kernels, steps, flags))


def _axis(i: Index, j: Index, size: Index | int, kernel: int, step: int, causal: bool, *, edge: str) -> Mask:
    """The condition on one axis, between query position ``i`` and key position ``j``."""
    if step > 1:
        # neighbours are those of the same residue class; inside it the axis is an ordinary one, shorter for late residues
        inside = _axis(i // step, j // step, (size - 1 - i % step) // step + 1, kernel, 1, causal, edge=edge)
        return inside & (i % step == j % step)
    if causal:
        return (i - j >= 0) & (i - j < kernel)
    if edge == "clip":
        return (i - j <= kernel // 2) & (j - i <= (kernel - 1) // 2)
    return _shifted(i, j, size, kernel)


def _shifted(i: Index, j: Index, size: Index | int, kernel: int) -> Mask:
    """``kernel`` keys around ``i``, moved inside ``0 .. size - 1``; ``size >= kernel``."""
    start = minimum(maximum(i - kernel // 2, 0), size - kernel)
    return (start <= j) & (j < start + kernel)


def _all(masks: Iterable[Mask]) -> Mask:
    return functools.reduce(operator.and_, masks, as_mask(True))


def _position(function: str, index: Index, sizes: tuple[int, ...], order: str, tile: Any) -> tuple[Index, ...]:
    order = check_choice(function, "order", order, _ORDERS)
    if (tile is not None) != (order == "tiled"):
        raise PatternError(f'{function}(): order="tiled" and tile=(..) go together; got order={order!r}, tile={tile!r}')
    if order == "raster":
        return _raster(index, sizes)
    if order == "morton":
        return _morton(function, index, sizes)
    tiles = _tile(function, sizes, tile)
    volume = math.prod(tiles)
    outer = _raster(index // volume, tuple(n // t for n, t in zip(sizes, tiles, strict=True)))
    inner = _raster(index % volume, tiles)
    return tuple(o * t + i for o, t, i in zip(outer, tiles, inner, strict=True))


def _raster(index: Index, sizes: tuple[int, ...]) -> tuple[Index, ...]:
    """Coordinates of ``index`` with the last axis fastest. The first is not wrapped: an index beyond the grid lies beyond it."""
    places = []
    for size in reversed(sizes[1:]):
        places.append(index % size)
        index = index // size
    return (index, *reversed(places))


def _morton(function: str, index: Index, sizes: tuple[int, ...]) -> tuple[Index, ...]:
    """Every ``axes``-th bit of ``index``, gathered."""
    side, axes = sizes[0], len(sizes)
    if set(sizes) != {side} or side & (side - 1):
        grid = " x ".join(map(str, sizes))
        raise PatternError(f'{function}(): order="morton" wants sides that are one power of two; got {grid}')
    bits = side.bit_length() - 1

    def gather(first: int) -> Index:
        parts = [(index // 2 ** (bit * axes + first) % 2) * 2**bit for bit in range(bits)]
        return functools.reduce(operator.add, parts, as_index(0))

    return tuple(gather(axes - 1 - axis) for axis in range(axes))


def _tile(function: str, sizes: tuple[int, ...], tile: Any) -> tuple[int, ...]:
    tiles = check_counts(function, "tile", tile, len(sizes), 1)
    if any(n % t for n, t in zip(sizes, tiles, strict=True)):
        raise PatternError(f"{function}(): the tile must divide the grid on each axis; got {tiles} in {sizes}")
    return tiles


def _check_fits(function: str, what: str, kernels: tuple[int, ...], sizes: tuple[int, ...], way_out: str = "") -> None:
    if any(k > n for k, n in zip(kernels, sizes, strict=True)):
        raise PatternError(f"{function}(): {what} must fit the grid on each axis; got {kernels} in {sizes}{way_out}")
