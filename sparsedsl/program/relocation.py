"""A program told where its rows, heads and batch entries stand in a whole: every index replaced by the one that it stands for.

One mechanism for all backends: what comes of it is an ordinary program, whose masks and scores read positions from tables, or, where a
few runs say them, count them in closed form.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import sympy

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.lang import functions as fn
from sparsedsl.lang.expressions import Index, Mask
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.relations import one_form
from sparsedsl.lang.symbols import BATCH, HEAD, KV_IDX, KV_LEN, Q_IDX, Q_LEN
from sparsedsl.lang.tables import TableRead, TableSpec, read_class, table_reads
from sparsedsl.lang.wrapped import Carried, Expression
from sparsedsl.program import given_blocks, key_choices, orders, scores, select, sources, tensors
from sparsedsl.program.axes import base_of, block_of, windows_of
from sparsedsl.program.branches import Attend, Compact, Joint, Mix, Recall
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.rebuilding import rebuilt
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.rules import Rules

__all__ = [
    "RELOCATION_RULES",
    "Relocation",
    "Rows",
    "blocks_kept_whole",
    "position_tables",
    "reads_rows",
    "relocated",
    "relocated_nodes",
]

# Positions of a call end here.
LAST = 2**60


@dataclass(frozen=True)
class Rows:
    """How the positions of rows are written.

    runs: each ``(first row, its position, distance of two rows)``, in order; else ``rank``: of the table that holds them, 1 or 2 (by
    batch entry); 0: a row's number is its position.
    """

    runs: tuple[tuple[int, int, int], ...] = ()
    rank: int = 0

    @property
    def stay(self) -> bool:
        """Whether a row's number is its position."""
        return not (self.runs or self.rank)


@dataclass(frozen=True)
class Relocation:
    """Where a call stands. ``heads``: the first one and how many; ``entry``: the first batch entry; ``lengths``: ``q_len`` and ``kv_len``
    of the whole, where masks and scores are to read them. ``scanned``: what recurrences give is known already: they need not be told where
    rows stand."""

    queries: Rows = Rows()
    keys: Rows = Rows()
    heads: tuple[int, int] | None = None
    entry: int = 0
    lengths: tuple[int, int] | None = None
    scanned: bool = False

    @property
    def moves_rows(self) -> bool:
        """Whether rows have positions that are not their numbers."""
        return not (self.queries.stay and self.keys.stay)


def position_tables(program: Program) -> tuple[str, str]:
    """Names for tables of the positions of queries and keys, which nothing in the program has."""
    taken = {*program.tables, *program.inputs, *(node.label for node in program.everything)}
    found = []
    for name in ("q_at", "kv_at"):
        while name in taken:
            name += "_"
        found.append(name)
    return found[0], found[1]


def relocated(program: Program, where: Relocation) -> Program:
    """The program of a call that stands there; positions without runs are its tables :func:`position_tables`.

    Raises:
        UnsupportedError: a node means nothing for some rows, heads or entries of a whole.
        ShapeError: the whole has fewer heads than the call says, or positions leave open how long it is.

    >>> import sparsedsl as sd
    >>> local = sd.Program(sd.patterns.sliding_window(8))
    >>> print(relocated(local, Relocation(Rows(rank=1), Rows(rank=1))).static.mask)
    (q_at[q_idx] >= kv_at[kv_idx]) & (q_at[q_idx] - kv_at[kv_idx] < 8)
    >>> print(relocated(local, Relocation(Rows(((0, 100, 1),)))).static.mask)
    (kv_idx <= q_idx + 100) & (q_idx - kv_idx <= -93)
    """
    return Program(relocated_nodes(program, where)[program.root])


def relocated_nodes(program: Program, where: Relocation) -> dict[Node, Any]:
    """Each node of a program -> that of :func:`relocated`."""
    names, known = position_tables(program), dict[Node, Any]()
    rebuilt(program, lambda node: RELOCATION_RULES[type(node)](node, _Told(where, *names)), known=known)
    return known


def blocks_kept_whole(program: Program) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of the blocks of queries, and of those of keys, that the program works on: rows of one block must stay together."""
    found: dict[str, set[int]] = {"queries": set(), "keys": set()}
    for node in program.everything:
        for axis in node.axes if node.gives != "memory" else ():
            if "/" in axis and windows_of(axis) is None:
                found[base_of(axis)].add(block_of(axis))
    return tuple(sorted(found["queries"])), tuple(sorted(found["keys"]))


# ---- expressions -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Told:
    """A relocation with the names of its tables."""

    where: Relocation
    q_name: str
    kv_name: str

    def pattern(self, pattern: Pattern, axis: str) -> Pattern:
        sink = None if pattern.sink is None else self.expression(pattern.sink, axis)
        mask, score = self.expression(pattern.mask, axis), self.expression(pattern.score, axis)
        return dataclasses.replace(pattern, mask=mask, score=score, sink=sink, causal=False)

    def expression(self, part: Any, axis: str) -> Any:
        """A mask or score whose ``kv_idx`` counts rows of ``axis``."""
        where, expr = self.where, part.expr
        free = expr.free_symbols
        for symbol, rows, word in ((Q_LEN, where.queries, "q_len"), (KV_LEN, where.keys, "kv_len")):
            if symbol in free and not rows.stay and where.lengths is None:
                raise ShapeError(
                    f"{part} reads {word}, and positions do not say how long the whole is: pass whole=(q_len, kv_len), the numbers of "
                    "queries and keys that there are in all"
                )
        kept = {read: read for read in self._own_reads(part)}
        meant = {HEAD: _head(where), BATCH: BATCH + where.entry, **kept}
        tokens = 1 if windows_of(axis) else block_of(axis)
        if where.lengths is not None:
            meant |= {Q_LEN: sympy.Integer(where.lengths[0]), KV_LEN: sympy.Integer(-(-where.lengths[1] // tokens))}
        bound = Carried(dict(part.bound), None if where.heads else part.heads)
        if isinstance(part, Mask) and tokens == 1 and not where.queries.rank and not where.keys.rank:
            return Mask(sympy.Or(*self._by_runs(expr, meant)), bound)
        at = _position(where.keys, self.kv_name, KV_IDX * tokens)
        meant |= {Q_IDX: _position(where.queries, self.q_name, Q_IDX), KV_IDX: fn.floor_div(at, sympy.Integer(tokens))}
        return type(part)(one_form(expr.xreplace(meant)) if isinstance(part, Mask) else expr.xreplace(meant), bound)

    def _by_runs(self, expr: Any, meant: dict[Any, Any]) -> Iterator[Any]:
        """The mask for each run of queries and each of keys: in each, positions are linear, and distances stay differences."""
        for q_at, q_inside in _runs(self.where.queries, Q_IDX):
            for kv_at, kv_inside in _runs(self.where.keys, KV_IDX):
                yield sympy.And(q_inside, kv_inside, one_form(expr.xreplace({**meant, Q_IDX: q_at, KV_IDX: kv_at})))

    def _own_reads(self, part: Any) -> Iterator[TableRead]:
        """Reads of what other nodes give: they count the rows of this call, as the nodes do."""
        where, bound = self.where, part.bound
        for read in table_reads(part.expr):
            node = bound.get(read.spec.name)
            if not isinstance(node, Node):
                continue
            entry, head, *rows = read.args
            plain = (entry == BATCH or not where.entry) and (head == HEAD or where.heads is None)
            if where.moves_rows:
                plain = plain and all(_counts(index, axis) for index, axis in zip(rows, node.axes[2:], strict=True))
            if not plain:
                raise UnsupportedError(
                    f"{part} reads {node!r} at {', '.join(map(str, read.args))}, and the call says where its rows or heads stand: they "
                    "can be told only where a choice is read at the pair itself, without indices"
                )
            yield read


def _head(where: Relocation) -> Any:
    """The number of a head in the whole. From the first head on it is still not ``h`` itself: a table that is read by ``h`` has as many
    entries as the call has heads, and one of the whole has more."""
    if where.heads is None:
        return HEAD
    first, count = where.heads
    return HEAD + first if first else fn.Min(HEAD, sympy.Integer(count - 1))


def _counts(index: Any, axis: str) -> bool:
    """Whether an index counts the rows of an axis, or blocks of them, from the first one on."""
    symbol = Q_IDX if base_of(axis) == "queries" else KV_IDX
    return any(index == fn.floor_div(symbol, sympy.Integer(rows)) for rows in sympy.divisors(block_of(axis)))


def _position(rows: Rows, name: str, row: Any) -> Any:
    if rows.rank:
        spec = TableSpec.declare(name, monotone=True, values_in=(0, LAST))
        return read_class(spec)(*((BATCH, row) if rows.rank == 2 else (row,)))
    if rows.stay:
        return row
    *others, (first, position, step) = rows.runs
    found, end = position + step * (row - first), first
    for first, position, step in reversed(others):
        found, end = fn.Where((Index(row) < end).expr, position + step * (row - first), found), first
    return found


def _runs(rows: Rows, row: Any) -> Iterator[tuple[Any, Any]]:
    """Of each run the positions, and the condition that a row lies in it."""
    if rows.stay:
        yield row, sympy.true
    ends = [first for first, _, _ in rows.runs[1:]] + [None]
    for (first, position, step), end in zip(rows.runs, ends, strict=True) if rows.runs else ():
        inside = (Index(row) >= first).expr if first else sympy.true
        yield position + step * (row - first), inside if end is None else sympy.And(inside, (Index(row) < end).expr)


# ---- rules: a node of a call that stands elsewhere -----------------------------------------------------------------------------------


def _by_rows(node: Node, told: _Told) -> Node:
    """What it says of rows it says of each by its position: masks and scores are all that has to be told."""
    axis = node.y.axes[2] if isinstance(node, Attend) else _counted(node)
    if windows_of(axis) and told.where.moves_rows:
        raise UnsupportedError(f"{node!r} counts windows of keys, {axis!r}, which overlap: {_WHOLE}")
    changed = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if isinstance(value, Pattern):
            changed[field.name] = told.pattern(value, axis)
        elif isinstance(value, Expression):
            changed[field.name] = told.expression(value, axis)
    return dataclasses.replace(node, **changed) if changed else node


def _counted(node: Node) -> str:
    """The axis that ``kv_idx`` counts in the masks of a node: keys, but for scores of windows."""
    return node.axes[3] if node.expressions and len(node.axes) > 3 and windows_of(node.axes[3]) else "keys"


_WHOLE = "it can be told no positions. Give the call all rows, or rows from one position on with q_offset="


def _of_sequence(node: Node, told: _Told) -> Node:
    """It runs along a sequence, or counts from its ends."""
    if told.where.moves_rows:
        raise UnsupportedError(f"{node.function}() goes by the order of all rows of a call, {_WHOLE}")
    return _by_rows(node, told)


def _of_keys(node: key_choices.ChosenKeys, told: _Told) -> Node:
    return _of_sequence(node, told) if node.of_distances else _by_rows(node, told)


def _numbered(node: Node, told: _Told) -> Node:
    """Its numbers depend on which head and row of a call they are for."""
    if told.where.heads or told.where.entry:
        _refuse_part(node)
    return _of_sequence(node, told)


def _refuse_part(node: Node) -> NoReturn:
    raise UnsupportedError(
        f"{node.function}() draws numbers by the place of a head in the call, so that a part of the heads, or of the batch, would get "
        "others: call it on all of them"
    )


def _recurrent(node: Node, told: _Told) -> Node:
    """It runs along the keys, unless that is done."""
    return _by_rows(node, told) if told.where.scanned else _of_sequence(node, told)


def _linear(node: Linear, told: _Told) -> Node:
    """Constant decays are those of the heads that are there."""
    _recurrent(node, told)
    if told.where.heads is None or not isinstance(node.decay, tuple) or len(node.decay) == 1:
        return node
    first, count = told.where.heads
    if first + count > len(node.decay):
        raise ShapeError(
            f"{node!r} has decays of {len(node.decay)} heads; the call says that it has those from {first} to {first + count - 1}"
        )
    return dataclasses.replace(node, decay=node.decay[first : first + count])


RELOCATION_RULES: Rules[Callable[[Any, Any], Node]] = Rules(
    "where a call stands",
    {
        **dict.fromkeys((tensors.Input, tensors.Summary, Attend, Joint, Mix), _by_rows),
        **dict.fromkeys((scores.Dot, scores.Bound, scores.Softmax, scores.Regroup, scores.Plus, scores.Relu), _by_rows),
        **dict.fromkeys((scores.Scaled, scores.Weighted, scores.Grouped, scores.GroupedKeys), _by_rows),
        **dict.fromkeys((scores.GivenScores, scores.GivenKeyScores), _by_rows),
        **dict.fromkeys((select.TopK, select.TopP, select.Threshold), _by_rows),
        key_choices.ChosenKeys: _of_keys,
        **dict.fromkeys((scores.Antidiagonal, scores.Probe, scores.Smooth, scores.Overlap), _of_sequence),
        **dict.fromkeys((key_choices.Diagonals, key_choices.Divergence), _of_sequence),
        **dict.fromkeys((orders.Order, orders.Inverse, orders.Take, orders.Tokens, Compact), _of_sequence),
        given_blocks.Given: _of_sequence,
        **dict.fromkeys((sources.Slots, Recall), _recurrent),
        scores.Gumbel: _numbered,
        Linear: _linear,
    },
)


@functools.lru_cache(maxsize=256)
def reads_rows(program: Program) -> bool:
    """Whether a mask or score says something about ``b`` itself, beside looking up what the program has chosen."""
    return any(_reads_entry(part.expr, part.bound) for node in program.everything for part in _expressions(node))


def _expressions(node: Node) -> Iterator[Any]:
    for part in node.expressions:
        yield from (part.mask, part.score, *([] if part.sink is None else [part.sink])) if isinstance(part, Pattern) else (part,)


def _reads_entry(expr: Any, bound: Any) -> bool:
    if expr == BATCH or BATCH not in expr.free_symbols:
        return bool(expr == BATCH)
    # What the same call has made is read by the entry of the call.
    chosen = isinstance(expr, TableRead) and isinstance(bound.get(expr.spec.name), Node)
    return any(_reads_entry(part, bound) for part in (expr.args[1:] if chosen else expr.args))
