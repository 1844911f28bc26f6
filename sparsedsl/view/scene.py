"""One pattern at one setting: cells of any window, why a pair is allowed, and the whole as levels for a page without a server.

A window is answered from the tile analysis (:mod:`sparsedsl.analysis.windows`): at most ``MOST x MOST`` cells, whatever the lengths.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import And, Not, Or

from sparsedsl.analysis.lists import EMPTY, FULL, PARTIAL
from sparsedsl.analysis.windows import Cells, Window, window_cells
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.printing import reading_text
from sparsedsl.lang.tables import table_reads
from sparsedsl.pattern_place import PatternPlace
from sparsedsl.picture_style import CLASS_NAMES
from sparsedsl.view.setting import Setting

__all__ = ["MOST", "Scene", "layer"]

# Cells along a side of a window at most; conditions told about a pair at most.
MOST, CONDITIONS = 512, 64
# Cells within tiles along a side, where the classes of tiles follow from them.
POOLED = MOST + 128
# Added to the class of a cell that a sample told.
GUESSED = 4
# A page without a server holds cells down to FINEST along a side, and for which cells which condition holds down to TOLD.
FINEST, TOLD = 2048, 256


class Scene:
    """A static pattern at a setting. Raises :class:`~sparsedsl.ShapeError` and :class:`~sparsedsl.TableError` where they do not fit.

    >>> import sparsedsl as sd
    >>> scene = Scene(sd.attend(sd.patterns.sliding_window(512)), Setting(q_len=1 << 20), {})
    >>> view = scene.view(range(0, 1 << 20), range(0, 1 << 20), most=64)
    >>> view["tiles"]["cell"], view["tiles"]["rows"], view["fine"]
    ([16384, 16384], 64, None)
    >>> scene.pair(700, 100)["allowed"], scene.pair(700, 400)["allowed"]
    (False, True)
    """

    def __init__(self, pattern: Pattern, setting: Setting, tables: Mapping[str, Any]):
        self.pattern, self.setting = pattern, setting
        self.place = PatternPlace(
            pattern, setting.q_len, setting.kv_len, tables, block_size=(setting.q_block, setting.kv_block), head=setting.head,
            batch=setting.batch, q_offset=setting.q_offset, where="the view",
        )  # fmt: skip
        self.mask = self.place.mask

    def view(self, queries: range, keys: range, most: int = MOST) -> dict[str, Any]:
        """The classes of the cells that cover a part: ``tiles`` of one tile or several; ``fine`` cells within tiles, or pairs, when close.

        ``most``: cells along a side, at most :data:`MOST`. Cells begin where tiles do, so that a move of the window moves no cell.
        """
        most = max(8, min(most, MOST))
        queries = range(max(queries.start, self.place.queries.start), min(queries.stop, self.place.queries.stop))
        keys = range(max(keys.start, 0), min(keys.stop, self.place.kv_len))
        if not len(queries) or not len(keys):
            return {"tiles": None, "fine": None}
        spans, block = (len(queries), len(keys)), self.place.block
        times = max(1 << max(0, -(-span // (size * most)) - 1).bit_length() for span, size in zip(spans, block, strict=True))
        fine = 1 << max(0, -(-max(spans) // most) - 1).bit_length()
        tile = (block[0] * times, block[1] * times)
        if fine >= min(block):
            return {"tiles": layer(self._cells(queries, keys, tile)), "fine": None}
        whole = self._window(queries, keys, tile)
        if all(size % fine == 0 for size in tile) and max(len(whole.queries), len(whole.keys)) <= POOLED * fine:
            close = self.place.cells(Window(whole.queries, whole.keys, (fine, fine)))
            return {"tiles": layer(pooled(close, whole)), "fine": layer(close)}
        return {"tiles": layer(self._cells(queries, keys, tile)), "fine": layer(self._cells(queries, keys, (fine, fine)))}

    def _cells(self, queries: range, keys: range, cell: tuple[int, int]) -> Cells:
        return self.place.cells(self._window(queries, keys, cell))

    def _window(self, queries: range, keys: range, cell: tuple[int, int]) -> Window:
        """Whole cells that cover a part, counted from the first query and key."""
        first = self.place.q_offset
        top = first + (queries.start - first) // cell[0] * cell[0]
        bottom = min(first - (first - queries.stop) // cell[0] * cell[0], self.place.queries.stop)
        left, right = keys.start // cell[1] * cell[1], min(-(-keys.stop // cell[1]) * cell[1], self.place.kv_len)
        return Window(range(top, bottom), range(left, right), cell)

    # ---- one pair ------------------------------------------------------------------------------------------------------------

    def pair(self, q_idx: int, kv_idx: int) -> dict[str, Any]:
        """Whether a pair is allowed, which conditions of the mask hold for it, what it reads of tables, and the class of its tile."""
        self.setting.inside(q_idx, kv_idx)
        env = self.place.domain.lengths | dict(self.place.domain.tables)
        env |= {"q_idx": torch.tensor(q_idx), "kv_idx": torch.tensor(kv_idx), "b": self.setting.batch, "h": self.setting.head}
        reason = _reason(self.mask, env, [CONDITIONS])
        q_block, kv_block = self.place.block
        row, column = (q_idx - self.place.q_offset) // q_block, kv_idx // kv_block
        top = self.place.q_offset + row * q_block
        tile = Window(
            range(top, min(top + q_block, self.place.queries.stop)),
            range(column * kv_block, min((column + 1) * kv_block, self.place.kv_len)),
            (q_block, kv_block),
        )
        cells = self.place.cells(tile)
        return {
            "q_idx": q_idx,
            "kv_idx": kv_idx,
            "allowed": reason["holds"],
            "reason": reason,
            "reads": [f"{_text(read)} = {evaluate(read, env).item()}" for read in sorted(table_reads(self.mask), key=str)],
            "tile": {
                "row": row,
                "column": column,
                "class": CLASS_NAMES[int(cells.classes[0, 0])],
                "certain": bool(cells.certain[0, 0]),
            },
        }

    # ---- a page without a server ---------------------------------------------------------------------------------------------

    def levels(self) -> list[dict[str, Any]]:
        """Layers of the whole, from coarse to fine: down to pairs, or to :data:`FINEST` cells along a side."""
        longest, found = max(self.place.q_len, self.place.kv_len), []
        cell = 1 << max(0, -(-longest // 256) - 1).bit_length()
        while cell >= 1 and -(-longest // cell) <= FINEST:
            found.append(layer(self.place.cells(self.place.window((cell, cell))), packed=True))
            cell //= 2
        return found

    def tiles(self) -> dict[str, Any] | None:
        """The layer of the tiles themselves; None where there are more than :data:`FINEST` along a side, as no level is finer then."""
        window = self.place.window(self.place.block)
        return None if max(window.rows, window.columns) > FINEST else layer(self.place.cells(window), packed=True)

    def conditions(self) -> dict[str, Any]:
        """The conditions of the mask, and for each whether it holds in all, some or no pairs of cells of the whole."""
        longest = max(self.place.q_len, self.place.kv_len)
        cell = 1 << max(0, -(-longest // TOLD) - 1).bit_length()
        window = self.place.window((cell, cell))
        leaves = dict.fromkeys(_leaves(self.mask))
        told = list(leaves)[:16]
        layers = [layer(window_cells(leaf, self.place.domain, window), packed=True) for leaf in told]
        number = {leaf: i for i, leaf in enumerate(told)}
        return {"tree": _tree(self.mask, number), "layers": layers}


def pooled(cells: Cells, window: Window) -> Cells:
    """The larger cells of ``window``, over the same positions, from the classes of those they are made of.

    A sample that found all pairs allowed (masked) has seen one, so that a cell of both kinds is partial for certain.
    """
    times = [large // small for large, small in zip(window.cell, cells.window.cell, strict=True)]
    beyond = (0, window.columns * times[1] - cells.window.columns, 0, window.rows * times[0] - cells.window.rows)
    shape = (window.rows, times[0], window.columns, times[1])

    def any_of(part: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(part, beyond).view(shape).any(dim=3).any(dim=1)

    some, holes = any_of(cells.classes != EMPTY), any_of(cells.classes != FULL)
    classes = torch.where(some, torch.where(holes, PARTIAL, FULL), EMPTY)
    return Cells(window, classes, (classes == PARTIAL) | ~any_of(~cells.certain))


def layer(cells: Cells, *, packed: bool = False) -> dict[str, Any]:
    """Cells as the page reads them: a byte a cell, row by row; ``packed`` for what is kept in a file."""
    window = cells.window
    codes = (cells.classes + GUESSED * ~cells.certain).to(torch.uint8).numpy().tobytes()
    return {
        "q": window.queries.start,
        "kv": window.keys.start,
        "queries": len(window.queries),
        "keys": len(window.keys),
        "cell": list(window.cell),
        "rows": window.rows,
        "columns": window.columns,
        "packed": packed,
        "data": base64.b64encode(zlib.compress(codes, 9) if packed else codes).decode("ascii"),
        "guessed": int((~cells.certain).sum()),
        "counts": {
            name: int((cells.classes == kind).sum()) for kind, name in ((EMPTY, "empty"), (PARTIAL, "partial"), (FULL, "full"))
        },
    }


def _text(expr: sympy.Basic) -> str:
    return reading_text(expr)


def _words(expr: sympy.Basic) -> tuple[str, tuple[sympy.Basic, ...]]:
    """How a condition is made of others: the word for it, and these; none of a condition that stands alone."""
    match expr:
        case And():
            return "all of", expr.args
        case Or():
            return "one of", expr.args
        case Not():
            return "not", expr.args
    return "", ()


def _reason(expr: sympy.Basic, env: Mapping[str, Any], room: list[int]) -> dict[str, Any]:
    """Whether a condition holds, and what it is made of."""
    word, parts = _words(expr)
    room[0] -= 1
    if not parts or room[0] < len(parts):
        return {"text": _text(expr), "holds": bool(evaluate(expr, env)), "word": "", "parts": []}
    told = [_reason(part, env, room) for part in parts]
    holds = [part["holds"] for part in told]
    return {"text": "", "word": word, "parts": told, "holds": {"all of": all, "one of": any}.get(word, lambda x: not x[0])(holds)}


def _leaves(expr: sympy.Basic) -> Iterator[sympy.Basic]:
    _, parts = _words(expr)
    if not parts:
        yield expr
    for part in parts:
        yield from _leaves(part)


def _tree(expr: sympy.Basic, number: Mapping[sympy.Basic, int]) -> dict[str, Any]:
    word, parts = _words(expr)
    if not parts:
        return {"text": _text(expr), "word": "", "parts": [], "layer": number.get(expr)}
    return {"text": "", "word": word, "parts": [_tree(part, number) for part in parts]}
