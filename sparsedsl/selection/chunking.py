"""How much is worked on at a time: everything that streams cuts its rows and units into pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["PIECE_BYTES", "cut", "few_widths", "rows_at_once", "tile_shape"]

PIECE_BYTES = 32 * 2**20  # scratch memory of one piece
UNITS_AT_ONCE = 8192  # wide enough for the products to be quick, narrow enough to leave rows for them
ALIGN = 32  # tiles of a row are as wide as each other, in whole groups of `ranking.GROUP`


def cut(start: int, stop: int, step: int) -> Iterator[slice]:
    """``start..stop`` in slices of ``step``, the last one shorter.

    >>> list(cut(0, 5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))


def rows_at_once(row_bytes: int) -> int:
    """Rows (or anything) of ``row_bytes`` of scratch each that fit a piece; one at least."""
    return max(1, PIECE_BYTES // max(1, row_bytes))


def tile_shape(cell_bytes: int, rows: int, units: int, row_bytes: int = 0, unit_bytes: int = 0) -> tuple[int, int]:
    """Rows and units of a tile, one at least: within a piece if each of its cells takes ``cell_bytes``, and so for rows and units.

    >>> tile_shape(4, rows=65536, units=16384)
    (1024, 8192)
    >>> tile_shape(4, rows=1, units=262144)
    (1, 262144)
    """
    cells = rows_at_once(cell_bytes)
    most = min(cells, rows_at_once(unit_bytes), max(UNITS_AT_ONCE, cells // max(1, rows)))
    width = -(-units // max(1, -(-units // most)))
    width = max(1, min(most, -(-width // ALIGN) * ALIGN))
    return max(1, min(rows, cells // width, rows_at_once(row_bytes))), width


def few_widths(width: int) -> int:
    """``width`` or up to an eighth more, so that few widths occur: libraries keep code and memory for each shape of a product.

    >>> few_widths(7), few_widths(30), few_widths(1000), few_widths(1001), few_widths(8192)
    (7, 30, 1024, 1024, 8192)
    """
    step = max(1, 1 << (width.bit_length() - 4)) if width > 7 else 1
    return -(-width // step) * step
