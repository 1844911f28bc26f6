"""How much is worked on at a time: everything that streams cuts its rows and blocks into pieces of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparsedsl.adjustable import Adjustable

__all__ = ["PIECES", "Pieces", "cut", "few_widths", "is_small", "rows_at_once", "tile_shape"]


@dataclass(frozen=True)
class Pieces:
    """What is worked on at once.

    - ``bytes``: scratch memory of one piece.
    - ``blocks``: wide enough for the products to be quick, narrow enough to leave rows for them.
    - ``align``: tiles of a row are as wide as each other, in whole groups of so many.
    - ``group``: in groups of so many a row is first looked at (`stable_topk`); torch's `amax` is slow below, the second look dear above.
    - ``table_bytes``: what choices that are read as tables, with a row for each query, may take.
    """

    bytes: int = 32 << 20
    blocks: int = 8192
    align: int = 32
    group: int = 32
    table_bytes: int = 64 << 20


PIECES = Adjustable(Pieces())
SMALL_CELL = 1024  # more bytes than a score takes, its share of what it is made of included


def cut(start: int, stop: int, step: int) -> Iterator[slice]:
    """``start..stop`` in slices of ``step``, the last one shorter.

    >>> list(cut(0, 5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    for begin in range(start, stop, step):
        yield slice(begin, min(begin + step, stop))


def rows_at_once(row_bytes: int) -> int:
    """Rows (or anything) of ``row_bytes`` of scratch each that fit a piece; one at least."""
    return max(1, PIECES.now.bytes // max(1, row_bytes))


def is_small(rows: int, blocks: int, lists: int) -> bool:
    """Whether scores of ``lists`` batch entries and heads are a single piece, however wide the tensors are that they are made of.

    >>> is_small(1, 256, lists=8), is_small(4096, 256, lists=8)
    (True, False)
    """
    return rows * blocks * lists * SMALL_CELL <= PIECES.now.bytes


def tile_shape(cell_bytes: int, rows: int, blocks: int, row_bytes: int = 0, block_bytes: int = 0) -> tuple[int, int]:
    """Rows and blocks of a tile, one at least: within a piece if each of its cells takes ``cell_bytes``, and so for rows and blocks.

    >>> tile_shape(4, rows=65536, blocks=16384)
    (1024, 8192)
    >>> tile_shape(4, rows=1, blocks=262144)
    (1, 262144)
    """
    cells = rows_at_once(cell_bytes)
    most = min(cells, rows_at_once(block_bytes), max(PIECES.now.blocks, cells // max(1, rows)))
    width = -(-blocks // max(1, -(-blocks // most)))
    width = max(1, min(most, -(-width // PIECES.now.align) * PIECES.now.align))
    return max(1, min(rows, cells // width, rows_at_once(row_bytes))), width


def few_widths(width: int) -> int:
    """``width`` or up to an eighth more, so that few widths occur: libraries keep code and memory for each shape of a product.

    >>> few_widths(7), few_widths(30), few_widths(1000), few_widths(1001), few_widths(8192)
    (7, 30, 1024, 1024, 8192)
    """
    step = max(1, 1 << (width.bit_length() - 4)) if width > 7 else 1
    return -(-width // step) * step
