"""The kernels along lists for a mask and a score: the text of ``codegen/kernels/selected_*.py`` with lines for both in it.

The kernels of those files know blocks that each query owns, and an interval of keys. Their text has *places*, lines that end in
``# <- name``; what stands at a place is kept where there is nothing to say, so that a plain call runs the file as it is. Expressions
are printed by the printer that serves the kernels of static patterns, derivatives included.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import sympy

from sparsedsl.codegen.derivatives import derivative
from sparsedsl.codegen.gradient_axes import LearnedRead, axis_of
from sparsedsl.codegen.hoisting import HoistedTable, hoist
from sparsedsl.codegen.source import Source
from sparsedsl.codegen.triton_expression import TritonNames, needs_exact, write_expression, write_expressions
from sparsedsl.codegen.triton_functions import functions_for
from sparsedsl.codegen.triton_parts import Argument
from sparsedsl.codegen.triton_writer import table_names
from sparsedsl.lang.expressions import Mask, Score
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import Q_LEN, SCORE
from sparsedsl.lang.tables import table_reads, table_specs

__all__ = ["KERNELS", "SelectedSource", "member_symbols", "selected_source"]

# Kernel -> the file of codegen/kernels that it stands in.
KERNELS = {
    "selected_forward": "selected_attention", "selected_merge": "selected_attention", "selected_grad_q": "selected_gradients",
    "selected_grad_kv": "selected_gradients",
}  # fmt: skip
_PLACE = re.compile(r"^( *)(.*?) *# <- (\w+)$")
# What the files say of places, which no longer holds of a module.
_NOTE = r"\n\nLines that end in ``# <- name``[^\"]*"
_INFINITY = '\n\ninf: tl.constexpr = tl.constexpr(float("inf"))\n'


@dataclass(frozen=True)
class SelectedSource:
    """Modules with the kernels for one mask and score.

    ``pattern``: what is written, with reads of ``prepared`` tables in it (see :mod:`sparsedsl.codegen.hoisting`). ``texts``: kernel ->
    the whole module that defines it. ``arguments``: kernel -> its parameters beyond those of the file, in order. ``learned``: reads of
    learned tables whose gradients the backward kernels write, each along its ``axis`` ("rows", "columns" or "pairs").
    ``fp_fusion``: whether the compiler may join a product and a sum.
    """

    pattern: Pattern
    texts: Mapping[str, str] = field(hash=False)
    arguments: Mapping[str, tuple[Argument, ...]] = field(hash=False)
    prepared: tuple[HoistedTable, ...] = ()
    learned: tuple[LearnedRead, ...] = ()
    fp_fusion: bool = True


def member_symbols(count: int) -> tuple[sympy.Symbol, ...]:
    """The symbols for "choice i picked the block" that :func:`selected_source` knows: bit i of the entry of ``members``."""
    return tuple(sympy.Symbol(f"chosen_{i}") for i in range(count))


@functools.lru_cache(maxsize=256)
def selected_source(
    mask: sympy.Basic = sympy.true,
    score: sympy.Expr = SCORE,
    *,
    wide: bool = False,
    wide_tables: frozenset[str] = frozenset(),
    learned: frozenset[str] = frozenset(),
) -> SelectedSource:
    """The kernels for pairs of listed blocks that ``mask`` allows, with logits ``score``.

    ``mask`` may read :func:`member_symbols`. ``wide``: positions need 64 bits. ``wide_tables``: tables of 2**31 entries and more.
    ``learned``: tables that want gradients.

    Raises:
        UnsupportedError: the expressions hold an operation that Triton cannot be made to round as torch does.

    >>> import sparsedsl as sd
    >>> source = selected_source((sd.kv_idx % 3 != 0).expr, (sd.tanh(sd.score / 30) * 30).expr)
    >>> found = source.texts["selected_forward"].splitlines()
    >>> start = next(n for n, line in enumerate(found) if line.endswith("kv_idx = key"))
    >>> print("\\n".join(line.strip() for line in found[start : start + 5]))
    kv_idx = key
    pairs = own[:, None] & exists[None, :] & (kv_idx[None, :] % 3 != 0)
    score = tl.dot(q, k.T, input_precision=PRECISION) * scale
    s = (30*_tanh(0.03333333333333333*score)) * LOG2E
    s = tl.where(pairs, s, float("-inf"))
    """
    hoisted = hoist(Pattern(Mask(mask), Score(score)))
    members = [s for s in mask.free_symbols if s.name.startswith("chosen_")]
    written = _Written(hoisted.pattern, max((int(s.name[7:]) + 1 for s in members), default=0), wide, wide_tables)
    reads = _learned_reads(hoisted.pattern, learned)
    texts: dict[str, str] = {}
    arguments: dict[str, tuple[Argument, ...]] = {}
    for name in dict.fromkeys(KERNELS.values()):
        text, found = _module(name, written, reads)
        texts |= {kernel: text for kernel, file in KERNELS.items() if file == name}
        arguments |= found
    exact = any(needs_exact(expr) for expr in hoisted.pattern.exprs)
    return SelectedSource(hoisted.pattern, texts, arguments, hoisted.prepared, reads, not exact)


def _learned_reads(pattern: Pattern, learned: frozenset[str]) -> tuple[LearnedRead, ...]:
    """The reads of these tables in the score, each once. Along lists there are no diagonals to sum along."""
    reads = dict.fromkeys(read for read in table_reads(pattern.score.expr) if read.spec.name in learned)
    axes = {read: axis_of(read) for read in reads}
    return tuple(LearnedRead(n, read, "pairs" if axes[read] == "difference" else axes[read]) for n, read in enumerate(reads))


def _module(name: str, written: _Written, reads: tuple[LearnedRead, ...]) -> tuple[str, dict[str, tuple[Argument, ...]]]:
    """The text of one file with its places filled, and the arguments that its kernels have more."""
    file = Path(__file__).with_name("kernels") / f"{name}.py"
    blocks = re.sub(_NOTE, "\n", file.read_text(encoding="utf-8"), count=1).split("\n\n\n")
    arguments: dict[str, tuple[Argument, ...]] = {}
    for number, block in enumerate(blocks):
        kernel = next((kernel for kernel in KERNELS if f"\ndef {kernel}(" in block), None)
        if kernel is not None:
            places = _Places(kernel, written, reads, block)
            blocks[number], arguments[kernel] = places.filled, tuple(places.arguments)
    text = "\n\n\n".join(blocks)
    if written.plain:
        return text, arguments
    head, first, rest = text.partition("\n\n\n@triton.jit")
    made = written.pattern.text.replace("\\", "\\\\")
    head = head.replace(
        '"""', f'"""Generated by sparsedsl for the pairs of\n\n{made}\n\nthat lie in blocks which were chosen. ', 1
    )
    return head + _INFINITY + functions_for(text) + first + rest, arguments


@dataclass(frozen=True)
class _Written:
    """What is printed into every kernel: a pattern, bits of how many choices it reads, and the width of its integers."""

    pattern: Pattern
    choices: int
    wide: bool
    wide_tables: frozenset[str]

    @property
    def plain(self) -> bool:
        """Whether there is nothing to print."""
        return self.pattern.mask.expr == sympy.true and not self.pattern.has_score


class _Places:
    """One kernel of a file: what is put at its places. ``turned``: its tiles have keys as rows and queries as columns."""

    def __init__(self, kernel: str, written: _Written, reads: tuple[LearnedRead, ...], block: str) -> None:
        self.kernel, self.written, self.block = kernel, written, block
        self.pattern, self.turned = written.pattern, kernel == "selected_grad_kv"
        axes = {"selected_grad_q": ("rows", "pairs"), "selected_grad_kv": ("columns",)}.get(kernel, ())
        # Slopes by the reads that this kernel writes the gradients of.
        self.reads = [one for one in reads if one.axis in axes]
        self.slopes: list[str] = []
        self.arguments = [] if written.plain or kernel == "selected_merge" else self._arguments()

    @property
    def filled(self) -> str:
        """The kernel, each place replaced by its lines or, where there are none, without its mark."""
        taken = set(re.findall(r"[A-Za-z_]\w*", self.block)) | {"q_idx", "kv_idx", "q_len", "score", "bits", "dx"}
        names = taken | {argument.name for argument in self.arguments}
        lines: list[str] = []
        for line in self.block.split("\n"):
            found = _PLACE.match(line)
            if found is None:
                lines.append(line)
                continue
            indent, kept, place = found.groups()
            source = Source(names)
            if self.arguments:
                put: Callable[[Source], None] = getattr(self, f"_{place}")
                put(source)
            made = source.text.rstrip("\n").split("\n") if source.text.strip() else [kept] if kept else []
            names |= set(re.findall(r"[A-Za-z_]\w*", source.text))
            lines += [indent + one for one in made]
        return "\n".join(lines)

    # ---- arguments and names ----

    def _arguments(self) -> list[Argument]:
        found = [Argument("q_offset", "i32")]
        if self.written.choices:
            found.append(Argument("members_ptr", "*i32"))
        for name in table_specs(self.pattern.mask.expr, self.pattern.score.expr):
            found.append(Argument(f"{name}_table", f"*table:{name}"))
            found += [Argument(f"{name}_size_{i}", "i32") for i in range(self.pattern.table_ranks[name])]
        found += [Argument(f"{one.name}_ptr", "*fp32") for one in self.reads]
        if self._by_pairs:
            found += [Argument(name, "i32") for name in ("first_tile", "tiles_here")]
        return found

    @property
    def _by_pairs(self) -> bool:
        return any(one.axis == "pairs" for one in self.reads)

    @property
    def names(self) -> TritonNames:
        """What the symbols are called in a tile."""
        by_query, by_key = ("[None, :]", "[:, None]") if self.turned else ("[:, None]", "[None, :]")
        symbols = {name: name for name in ("b", "q_len", "kv_len", "score")}
        symbols |= {"h": f"h{by_query}", "q_idx": f"q_idx{by_query}", "kv_idx": f"kv_idx{by_key}"}
        symbols |= {f"chosen_{i}": f"chosen_{i}{by_query}" for i in range(self.written.choices)}
        return TritonNames(symbols, table_names(self.pattern), self.written.wide_tables)

    @property
    def _shape(self) -> str:
        return "[BLOCK_N, ROWS]" if self.turned else "[ROWS, BLOCK_N]"

    def _as_long(self, text: str) -> str:
        return f"{text}.to(tl.int64)" if self.written.wide else text

    # ---- places, each by its name ----

    def _numbers(self, source: Source) -> None:
        for argument in self.arguments:
            if argument.type == "i32":
                source.line(f'"{argument.name}",')

    def _called(self, source: Source) -> None:
        source.line(", ".join(argument.name for argument in self.arguments) + ",")

    def _tile(self, source: Source) -> None:
        if self._by_pairs:
            source.line("tile = first_tile + tl.program_id(0) % tiles_here")

    def _bundle(self, source: Source) -> None:
        if self._by_pairs:
            source.line("bundle = tl.program_id(0) // tiles_here")

    def _positions(self, source: Source) -> None:
        """Before the loop."""
        offset = "tl.cast(q_offset, tl.int64)" if self.written.wide else "q_offset"
        source.line(f"kv_idx = {self._as_long('key')}" if self.turned else f"q_idx = {offset} + query")
        if any(Q_LEN in expr.free_symbols for expr in self.pattern.exprs):
            source.line(f"q_len = {offset} + rows")
        if self.written.choices:
            line = "list_place" if self.turned else "list_line(b, head, list_batch, heads, list_group).to(tl.int64)"
            source.line(
                f"members_ptr_here = members_ptr + {line} * rows * width"
                + ("" if self.turned else " + query.to(tl.int64) * width")
            )
        for one in self.reads:
            if one.axis != "pairs":
                source.line(f"{one.name} = tl.zeros([{'BLOCK_N' if self.turned else 'ROWS'}], tl.float32)")
        if self._by_pairs:
            source.line("# Of each row the number among those of this launch, for gradients pair by pair.")
            source.line("row_here = (b.to(tl.int64) * heads + h) * tiles_here * queries + query - first_tile * queries")

    def _indices(self, source: Source) -> None:
        """In the loop: the position that changes, and which choices picked the block."""
        offset = "tl.cast(q_offset, tl.int64)" if self.written.wide else "q_offset"
        source.line(f"q_idx = {offset} + query" if self.turned else f"kv_idx = {self._as_long('key')}")
        if self.written.choices:
            source.line(f"bits = tl.load(members_ptr_here + {'place' if self.turned else 'slot'}, mask=own, other=0)")
            for i in range(self.written.choices):
                source.line(f"chosen_{i} = (bits & {1 << i}) != 0")

    def _mask(self, source: Source) -> None:
        mask = self.pattern.mask.expr
        own = "own[None, :]" if self.turned else "own[:, None] & exists[None, :]"
        if mask != sympy.true:
            text = (
                "(own[None, :] & (rows < 0))"
                if mask == sympy.false
                else write_expression(source, mask, self.names, real="tl.float64")
            )
            own = f"{own} & ({text})"
        source.line(f"pairs = {own}")
        if self.turned:
            source.line('s = tl.where(pairs, s, float("-inf"))')

    def _logits(self, source: Source) -> None:
        if not self.pattern.has_score:
            return
        expr = self.pattern.score.expr
        slopes = [derivative(expr, by) for by in (SCORE, *(one.read for one in self.reads))]
        if self.kernel == "selected_forward":
            slopes = []
        if SCORE in sympy.Tuple(expr, *slopes).free_symbols:
            product = "tl.dot(k, q.T" if self.turned else "tl.dot(q, k.T"
            source.line(f"score = {product}, input_precision=PRECISION) * scale")
        text, *self.slopes = write_expressions(source, (expr, *slopes), self.names, real="tl.float32")
        if SCORE not in expr.free_symbols:  # one number a row or a key, or an integer
            text = f"tl.zeros({self._shape}, tl.float32) + ({text})"
        source.line(f"s = ({text}) * LOG2E")

    def _slopes(self, source: Source) -> None:
        """Gradients of the scaled products, and of learned reads; 0 where a pair is masked, whatever the slope is there."""
        if not self.slopes:
            return
        delta = "delta[None, :]" if self.turned else "delta[:, None]"
        source.line(f"dx = p * (grad_p - {delta})")
        for name, slope in zip(["grad_s", *(f"d_{one.name}" for one in self.reads)], self.slopes, strict=True):
            source.line(f"{name} = " + ("dx" if slope == "1" else f"tl.where(pairs, dx * ({slope}), 0.0)"))

    def _weighed(self, source: Source) -> None:
        for one in self.reads:
            source.line(f"d_{one.name} *= {'weight[None, :]' if self.turned else 'weight[:, None]'}")

    def _sums(self, source: Source) -> None:
        for one in self.reads:
            if one.axis == "pairs":
                at = f"{one.name}_ptr + ((row_here * width + slot) * CHUNK)[:, None] + key_0[None, :]"
                source.line(f"tl.store({at}, d_{one.name}, mask=own[:, None] & (key_0 < CHUNK)[None, :])")
            else:
                source.line(f"{one.name} += tl.sum(d_{one.name}, 1)")

    def _results(self, source: Source) -> None:
        for one in self.reads:
            if one.axis == "rows":
                source.line(f"tl.store({one.name}_ptr + line, {one.name}, mask=inside)")
            elif one.axis == "columns":
                source.line("at_key = (b.to(tl.int64) * heads + head) * kv_len + key")
                source.line(f"tl.store({one.name}_ptr + at_key, {one.name}, mask=exists)")
