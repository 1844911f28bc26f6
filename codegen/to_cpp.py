"""A pattern -> the C++ that is compiled for it: which keys a query sees, what its logits become, derivatives of that, its sink.

Input: a pattern and a :class:`CppVariant`. Output: a :class:`CppSource`. Products, softmax and strips are the same for all patterns
and lie in ``codegen/cpp``: they call these functions once for a block of keys. Lengths, offsets and tables are arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sympy

from sparsedsl.analysis.key_intervals import KeyInterval, intervals
from sparsedsl.analysis.residue_classes import RESIDUE, residues
from sparsedsl.codegen.cpp_expression import CppNames, CppPrinter, TableNames
from sparsedsl.codegen.cpp_loops import PairLoop, braces
from sparsedsl.codegen.derivatives import derivative
from sparsedsl.codegen.gradient_axes import LearnedRead, learned_reads
from sparsedsl.codegen.hoisting import HoistedTable, hoist
from sparsedsl.codegen.source import Source
from sparsedsl.codegen.to_triton_selected import member_symbols
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang import functions as fn
from sparsedsl.lang.normalisers import POINTWISE
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import BATCH, HEAD, KV_IDX, KV_LEN, Q_IDX, Q_LEN, SCORE
from sparsedsl.lang.tables import TableRead, table_reads

__all__ = ["CppSource", "CppVariant", "Slot", "cpp_source", "fixed_part"]

FOLDER = Path(__file__).parent / "cpp"
# Functions whose last digit is the library's own: what a mask decides by them, only torch decides as torch does.
_ROUNDED = (sympy.exp, sympy.log, sympy.sin, sympy.cos, sympy.tanh, fn.Erf, fn.Sigmoid, fn.Softplus)


@dataclass(frozen=True)
class CppVariant:
    """What may differ for one pattern. ``double``: the computation is in float64. ``doubles``: float tables that hold float64;
    ``whole``: positions are not taken apart by residues. ``choices``: how many choices the mask asks about the block of a pair, as
    :func:`~sparsedsl.codegen.to_triton_selected.member_symbols`."""

    double: bool = False
    doubles: frozenset[str] = frozenset()
    whole: bool = False
    choices: int = 0


@dataclass(frozen=True)
class Slot:
    """Something that the generated code reads out of the call: fields of 8 bytes, from ``place`` on.

    ``kind``: "table" (pointer, sizes), "interval" (pointers to first and last keys, steps of batch entry and head in lines of rows), "sums"
    (where the entries of a learned table begin among the sums of gradients). ``name``: of the table; ``number``: of the interval.
    """

    kind: str
    name: str
    number: int
    place: int
    size: int


@dataclass(frozen=True)
class CppSource:
    """Generated text.

    ``pattern``: what is written, with reads of ``prepared`` tables; ``intervals``: those of its keys, None where it reads lists of blocks;
    ``functions``: those it defines; ``step``: residues; ``learned``: reads with gradients in ``gains``; ``more``: fields of all slots.
    """

    pattern: Pattern
    text: str
    intervals: tuple[KeyInterval, ...] | None
    step: int
    functions: tuple[str, ...]
    slots: tuple[Slot, ...]
    prepared: tuple[HoistedTable, ...]
    learned: tuple[LearnedRead, ...]
    more: int

    @property
    def reads_lengths(self) -> bool:
        """Whether something is made for the lengths of a call: lists, ends of intervals, prepared tables."""
        return self.intervals is None or bool(self.prepared) or any(interval.searched for interval in self.intervals)


_WORK = ("call.h", "vectors.h", "products.h", "rows.h", "share.h")
_PARTS = {
    "pattern": ("call.h", "functions.h"),
    "forward": (*_WORK, "strips.h", "sticks.h", "forward.cpp"),
    "backward": (*_WORK, "strips.h", "sticks.h", "forward.cpp", "backward.cpp"),
    "selected": (*_WORK, "strips.h", "selected.h", "gathered.h", "selected.cpp"),
    "selected_backward": (*_WORK, "strips.h", "selected.h", "gathered.h", "selected.cpp", "selected_backward.cpp"),
    "choosing": (*_WORK, "choosing.cpp", "pooling.cpp", "weighing.cpp", "probing.cpp"),
    "scan_gated": (*_WORK, "scan_gated.h", "scan_gated.cpp"),
    "scan_linear": (*_WORK, "scan_linear.cpp"),
    "scan_slots": (*_WORK, "scan_slots.cpp"),
}


@functools.cache
def fixed_part(name: str) -> str:
    """The text of a part that is the same for all patterns: "pattern" is what generated code begins with; the others are libraries."""
    return "\n".join((FOLDER / part).read_text() for part in _PARTS[name])


@functools.lru_cache(maxsize=512)
def cpp_source(pattern: Pattern, variant: CppVariant = CppVariant()) -> CppSource:
    """The C++ of ``pattern``.

    Raises:
        UnsupportedError: the pattern decides by operations that only torch rounds as torch does.

    >>> import sparsedsl as sd
    >>> print(cpp_source(sd.attend((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 512))).text.strip().split("\\n")[-2])
        }
    """
    hoisted = hoist(pattern)
    _check_mask(hoisted.pattern.mask.expr)
    within = None if variant.whole else residues(pattern)
    written = hoisted.pattern if within is None else within.pattern
    return _Writer(pattern, written, hoisted.prepared, 1 if within is None else within.step, variant).result()


def _check_mask(mask: sympy.Basic) -> None:
    for node in mask.atoms(*_ROUNDED, sympy.Pow):
        if isinstance(node, sympy.Pow) and (node.exp.is_Integer or node.exp == sympy.Rational(1, 2)):
            continue
        if node.free_symbols or table_reads(node):
            raise UnsupportedError(
                f"the mask compares {node}, whose last digit differs between generated C++ and torch. "
                "Use backend='tiled', or write the mask with integers"
            )


class _Writer:
    """The text of one pattern."""

    def __init__(
        self, given: Pattern, pattern: Pattern, prepared: tuple[HoistedTable, ...], step: int, variant: CppVariant
    ) -> None:
        self.given, self.pattern, self.prepared, self.step, self.variant = given, pattern, prepared, step, variant
        self.pointwise = given.normaliser == POINTWISE
        self._unit = "" if self.pointwise else " * (real)LOG2E"
        self.members = member_symbols(variant.choices)
        found = None if pattern.mask.expr.free_symbols & set(self.members) else intervals(pattern.mask.expr)
        self.intervals = found
        # Lists that heads do not share are those of strips of one head: see `Preparer`.
        self.one_head = found is None and not variant.whole and HEAD in pattern.mask.expr.free_symbols
        self.learned = learned_reads(pattern)
        self.slots: list[Slot] = []
        self.tables: dict[str, TableNames] = {}
        place = 0
        for number, name in enumerate(pattern.tables):
            rank = pattern.table_ranks[name]
            self.slots.append(Slot("table", name, number, place, 1 + rank))
            stem = name if name.isascii() else f"table{number}"
            self.tables[name] = TableNames(f"{stem}_table", tuple(f"{stem}_size{dim}" for dim in range(rank)))
            place += 1 + rank
        for number, interval in enumerate(found or ()):
            if interval.searched:
                self.slots.append(Slot("interval", "", number, place, 4))
                place += 4
        for name in dict.fromkeys(one.read.spec.name for one in self.learned):
            self.slots.append(Slot("sums", name, 0, place, 1))
            place += 1
        self.more = place

    def result(self) -> CppSource:
        head = Source()
        head.line("// Attention, generated by sparsedsl from")
        for line in self.given.text.split("\n"):
            head.line(f"//     {line}")
        if self.step > 1:
            head.line(f"// Positions of one residue modulo {self.step} at a time: q_idx and kv_idx count within it.")
        head.line("// What calls these functions, and what a Call holds: codegen/cpp in sparsedsl.")
        body = Source()
        functions = []
        for name, write in (("ends", self._ends), ("mask", self._mask), ("score", self._score), ("slope", self._slope),
                            ("gains", self._gains), ("sink", self._sink)):  # fmt: skip
            if write(body):
                functions.append(name)
        return CppSource(
            self.pattern, head.text + body.text, self.intervals, self.step, tuple(functions), tuple(self.slots), self.prepared,
            self.learned, self.more,
        )  # fmt: skip

    # ---- the functions ------------------------------------------------------------------------------------------

    def _ends(self, source: Source) -> bool:
        """First and last key of each interval of each lane."""
        if self.intervals is None:
            return False
        source.line()
        source.line("// The keys each query sees: first <= kv_idx <= last, in any of the intervals.")
        with self._function(source, "void ends(const Call *call, const Lanes *lanes, i64 *first, i64 *last)"):
            exprs = [e for s in self.intervals if not s.searched for e in (*s.ends, *s.conditions)]
            lines = [sympy.Tuple(*(s.exprs.free_symbols & {BATCH})) for s in self.intervals if s.searched]
            names = self._begin(source, *exprs, *lines)
            with braces(source, "for (i64 i = 0; i < lanes->count; i++)"):
                free = set().union(*(interval.exprs.free_symbols for interval in self.intervals))
                searched = any(interval.searched for interval in self.intervals)
                if Q_IDX in free or searched:
                    source.line("const i64 q_idx = lanes->q_idx[i];")
                if HEAD in free:
                    source.line("const i64 h = lanes->h[i];")
                for number, interval in enumerate(self.intervals):
                    self._interval(source, names, number, interval)
        return True

    def _interval(self, source: Source, names: CppNames, number: int, interval: KeyInterval) -> None:
        at = f"[{number} * MOST_LANES + i]" if number else "[i]"
        if interval.searched:
            place = next(slot.place for slot in self.slots if slot.kind == "interval" and slot.number == number)
            line = source.fresh("line")
            steps = [f"{name} * call->more[{place + 2 + n}]" for n, name in enumerate("bh") if _reads(interval.exprs, name)]
            source.line(f"const i64 {line} = ({' + '.join(steps) or '0'}) * call->rows + q_idx - call->q_offset;")
            for n, end in enumerate(("first", "last")):
                source.line(f"{end}{at} = ((const i64 *)call->more[{place + n}])[{line}];")
            return
        texts = CppPrinter(names, "double").write(source, [*interval.ends, sympy.And(*interval.conditions)])
        source.line(f"first{at} = {texts[0]};")
        source.line(f"last{at} = {texts[1]};" if not interval.conditions else f"last{at} = {texts[2]} ? {texts[1]} : -1;")

    def _mask(self, source: Source) -> bool:
        if self.intervals is not None:
            return False
        source.line()
        source.line(f"// Which pairs of a block attend: the others become {'0' if self.pointwise else '-inf'}.")
        with self._function(source, f"void mask({_BLOCK}, real *tile)"):
            names = self._begin(source, self.pattern.mask.expr)
            loop = PairLoop(source, names, "double", self.members, one_head=self.one_head)
            with loop.over(self.pattern.mask.expr) as (text,):
                source.line("real &pair = tile[j * lanes->count + i];")
                source.line(f"pair = ({text}) ? pair : {'0' if self.pointwise else 'LOWEST'};")
        return True

    def _score(self, source: Source) -> bool:
        expr = self.pattern.score.expr
        if expr == SCORE and not self.pointwise:
            return False
        source.line()
        what = "weights of a block" if self.pointwise else "logits of a block, in units of log2,"
        source.line(f"// The {what} from its products.")
        with self._function(source, f"void score({_BLOCK}, real *tile)"):
            names = self._begin(source, expr)
            loop = PairLoop(source, names, "real", one_head=self.one_head)
            with loop.over(expr) as (text,):
                source.line(f"tile[j * lanes->count + i] = ({text}){self._unit};")
        return True

    def _slope(self, source: Source) -> bool:
        expr = self.pattern.score.expr
        if expr == SCORE and not self.pointwise:
            return False
        source.line()
        source.line("// The same, and by how much each changes with its score.")
        with self._function(source, f"void slope({_BLOCK}, real *tile, real *slope)"):
            change = derivative(expr)
            names = self._begin(source, expr, change)
            loop = PairLoop(source, names, "real", one_head=self.one_head)
            with loop.over(expr, change) as (text, slope):
                source.line(f"tile[j * lanes->count + i] = ({text}){self._unit};")
                source.line(f"slope[j * lanes->count + i] = {slope};")
        return True

    def _gains(self, source: Source) -> bool:
        if not self.learned:
            return False
        source.line()
        source.line("// Adds the gradients of learned tables, from the changes of the logits of a block.")
        with self._function(source, f"void gains({_BLOCK}, const real *tile, const real *change, double *sums)"):
            slopes = [derivative(self.pattern.score.expr, one.read) for one in self.learned]
            names = self._begin(source, *slopes, *(sympy.Tuple(*one.read.args) for one in self.learned))
            loop = PairLoop(source, names, "real", lanes="lanes->used", one_head=self.one_head)
            with loop.over(*slopes) as texts:
                source.line("const real here = change[j * lanes->count + i];")
                source.line("if (here == 0) continue;")
                for one, text in zip(self.learned, texts, strict=True):
                    place = next(slot.place for slot in self.slots if slot.kind == "sums" and slot.name == one.read.spec.name)
                    index = CppPrinter(loop.plain, "real").flat_index(one.read)
                    source.line(f"sums[call->more[{place}] + {index}] += (double)here * (double)({text});")
        return True

    def _sink(self, source: Source) -> bool:
        if self.pattern.sink is None:
            return False
        source.line()
        source.line("// One more logit of each row, whose value is zero.")
        with self._function(source, "real sink(const Call *call, i64 b, i64 h)"):
            names = self._begin(source, self.pattern.sink.expr, own=("b", "h"))
            source.line(f"return {CppPrinter(names, 'real').write(source, [self.pattern.sink.expr])[0]};")
        return True

    # ---- what they begin with -----------------------------------------------------------------------------------

    @staticmethod
    def _function(source: Source, header: str) -> Any:
        return braces(source, f'extern "C" {header}')

    def _begin(self, source: Source, *exprs: sympy.Basic, own: tuple[str, ...] = ()) -> CppNames:
        """Write what is the same for the whole block: batch entry, lengths, tables. The names of all that expressions read."""
        free = set().union(*(expr.free_symbols for expr in exprs))
        texts = {BATCH: "lanes->b", Q_LEN: "lanes->q_len", KV_LEN: "lanes->kv_len", RESIDUE: "lanes->residue"}
        if own:
            texts |= {Q_LEN: "call->q_offset + call->rows", KV_LEN: "call->keys"}
        for symbol, text in texts.items():
            if symbol in free and symbol.name not in own:
                source.line(f"const i64 {symbol.name} = {text};")
        if self.one_head and HEAD in free and not own:
            source.line("const i64 h = lanes->h[0];")
        read = dict.fromkeys(r.spec.name for expr in exprs for r in table_reads(expr))
        for name in [name for name in self.pattern.tables if name in read or name in {r.spec.name for r in self._gained(exprs)}]:
            slot = next(slot for slot in self.slots if slot.kind == "table" and slot.name == name)
            names = self.tables[name]
            kind = self._element(name)
            source.line(f"const {kind} *const {names.pointer} = (const {kind} *)call->more[{slot.place}];")
            for dim, size in enumerate(names.sizes):
                source.line(f"const i64 {size} = call->more[{slot.place + 1 + dim}];")
        symbols = {s.name: s.name for s in (BATCH, HEAD, Q_IDX, KV_IDX, Q_LEN, KV_LEN, RESIDUE, SCORE, *self.members)}
        return CppNames(symbols, self.tables)

    def _gained(self, exprs: tuple[sympy.Basic, ...]) -> list[TableRead]:
        """Learned reads whose indices are among the expressions: their sizes are needed, though the table is not read."""
        return [one.read for one in self.learned if sympy.Tuple(*one.read.args) in exprs]

    def _element(self, name: str) -> str:
        kind = self.pattern.tables[name].dtype
        if kind == "float":
            return "double" if name in self._double_names else "float"
        return {"int": "i64", "bool": "unsigned char"}[kind]

    @functools.cached_property
    def _double_names(self) -> Mapping[str, None]:
        """Float tables that hold doubles."""
        own = [one.name for one in self.prepared if one.dtype == "float" and (one.double or self.variant.double)]
        return MappingProxyType(dict.fromkeys([*sorted(self.variant.doubles), *own]))


_BLOCK = "const Call *call, const Lanes *lanes, i64 key, i64 keys"


def _reads(expr: sympy.Basic, name: str) -> bool:
    return {"b": BATCH, "h": HEAD}[name] in expr.free_symbols
