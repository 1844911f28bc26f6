"""Writes what the generated kernels share: arguments, the head of a kernel, which tile a program has, tiles of q, k and v."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import sympy

from sparsedsl.analysis.block_wise import block_sides
from sparsedsl.analysis.key_intervals import intervals
from sparsedsl.codegen.score_ramp import Ramp, ramp_of
from sparsedsl.codegen.source import Source
from sparsedsl.codegen.triton_expression import TableNames, TritonNames
from sparsedsl.codegen.triton_loops import IntervalLoop, ListLoop, Loop
from sparsedsl.codegen.triton_parts import Argument, KernelSource, Part, Variant, parts_of, suffixed
from sparsedsl.lang.normalisers import POINTWISE, SOFTMAX, SOFTPICK, STICK_BREAKING
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import HEAD, KV_IDX, Q_IDX, Q_LEN
from sparsedsl.lang.tables import table_specs

# Variables of the kernels: expressions must not use these names for what they share.
_LOCAL = {
    "acc", "across", "allowed", "at", "b", "band", "base", "batch", "begin", "bh", "bundle", "column", "column_0", "d",
    "delta", "dp", "ds", "dx", "e", "end", "exists", "factor", "first", "first_row", "full", "full_begin", "full_end",
    "full_tiles", "grad", "grad_k", "grad_q", "grad_v", "h", "head", "i", "inside", "j", "k", "key", "kv_head", "kv_idx",
    "residue", "larger", "last", "line", "listed", "lower", "lse", "m", "member", "most", "n", "out", "p", "packed_rows",
    "partial", "partial_begin", "partial_tiles", "place", "q", "q_idx", "q_len", "reached", "right", "row", "row_0", "s",
    "score", "seen", "share", "shrink", "sink", "start", "swap", "t", "tall", "tile", "tiles", "tl", "to", "total", "turned",
    "upper", "v", "weight", "x", "cut", "ramp", "ref", "level", "after", "ahead", "alive", "before", "below", "earlier", "every",
    "every_tiles", "given", "kv_row", "units", "large", "later", "left", "lowest", "more", "passed", "power", "small", "stop", "z",
}  # fmt: skip

# In scores that are surely far from the largest float, also times a position or two.
LARGEST_NUMBER = 10**6

__all__ = ["Writer", "table_names"]


@dataclass
class Writer:
    """Writes one kernel. ``packed``: a program holds the queries of several heads, so ``h`` is a vector."""

    source: Source
    pattern: Pattern
    variant: Variant
    name: str
    purpose: str
    packed: bool = False
    arguments: list[Argument] = field(default_factory=list)

    # ---- arguments ----

    def tensor(self, name: str, type_: str = "*data", dims: str = "bh") -> None:
        """A pointer ``name_ptr`` with strides for the batch, the head (``dims``) and the row; its last dimension is contiguous."""
        self.add((f"{name}_ptr", type_))
        for dim in dims:
            self.add((f"{name}_stride_{dim}", "i32"))
        self.add((f"{name}_stride_row", "i32"))

    def columns_of(self, name: str) -> None:
        """K or V of a loop over keys: a pointer with strides, or one tensor descriptor a part."""
        if not self.variant.descriptors:
            self.tensor(name)
            return
        for part in self.parts(name):
            self.add((suffixed(f"{name}_desc", part), f"*desc:{part.width}"))

    def parts(self, name: str) -> tuple[Part, ...]:
        """The parts of a row of ``k`` or ``v``."""
        return self.d_parts if name == "k" else self.v_parts

    def add(self, *arguments: tuple[str, str]) -> None:
        """Parameters, in order."""
        self.arguments += [Argument(*argument) for argument in arguments]

    def add_tables(self, *exprs: sympy.Basic) -> None:
        """Pointers and sizes of the tables that these expressions read."""
        known = {argument.name for argument in self.arguments}
        for name in table_specs(*exprs):
            if f"{name}_table" not in known:
                self.add((f"{name}_table", f"*table:{name}"))
                self.add(*((f"{name}_size_{i}", "i32") for i in range(self.pattern.table_ranks[name])))

    def constants(self, *names: str) -> None:
        """Parameters fixed at compile time."""
        self.add(*((name, "constexpr") for name in names))

    @contextmanager
    def define(self) -> Iterator[None]:
        """The header of the function, and its body one step deeper. Numbers are not specialised: no length compiles anything anew."""
        plain = [a.name for a in self.arguments if a.type in ("i32", "fp32")]
        self.source.line()
        self.source.line()
        self.source.line("@triton.jit(")
        for line in _wrapped([repr(name).replace("'", '"') for name in plain], "do_not_specialize=[", "],"):
            self.source.line("    " + line)
        self.source.line(")")
        self.source.line(f"def {self.name}(")
        for argument_line in _wrapped(
            [f"{a.name}: tl.constexpr" if a.type == "constexpr" else a.name for a in self.arguments], "", ","
        ):
            self.source.line("    " + argument_line)
        with self.source.scope({a.name for a in self.arguments} | _LOCAL), self.source.block("):"):
            self.source.line(f'"""{self.purpose}"""')
            yield

    @property
    def result(self) -> KernelSource:
        """The kernel that was written."""
        return KernelSource(self.name, tuple(self.arguments), self.purpose, block_sides(self.pattern.mask.expr))

    # ---- names ----

    def names(self, place: str) -> TritonNames:
        """What symbols are called: "queries" and "keys" as vectors of one axis, "tile" with queries as rows, "turned" with keys as rows."""
        q, kv = {
            "queries": ("q_idx", "kv_idx"),
            "keys": ("q_idx", "kv_idx"),
            "tile": ("q_idx[:, None]", "kv_idx[None, :]"),
            "turned": ("q_idx[None, :]", "kv_idx[:, None]"),
        }[place]
        h = "h[:, None]" if self.packed and place == "tile" else "h"
        symbols = {"h": h, "q_idx": q, "kv_idx": kv} | {name: name for name in ("b", "q_len", "kv_len", "score", "residue")}
        return TritonNames(symbols, table_names(self.pattern), self.variant.wide_tables)

    def programs(self, length: str, block: str, first: str = "") -> None:
        """Which tile, of which residue and head, a program has: ``tile``, ``residue`` if there are residues, and the rest in ``bh``.

        ``first``: what is added to its number of heads.
        """
        step = self.variant.step
        source = self.source
        source.line(f"tiles = tl.cdiv({length if step == 1 else f'tl.cdiv({length}, {step})'}, {block})")
        source.line("tile = tl.program_id(0) % tiles")
        if step > 1:
            source.line(f"residue = tl.program_id(0) // tiles % {step}")
        source.line(f"bh = {first}tl.program_id(0) // tiles{'' if step == 1 else f' // {step}'}")
        with source.block("if HEAVY_FIRST:"):
            source.line("tile = tiles - 1 - tile")

    def residue(self, by_query: tuple[str, ...], by_key: tuple[str, ...]) -> None:
        """Enter one residue: from here on positions, lengths and rows of these tensors count within it."""
        step = self.variant.step
        if step == 1:
            return
        source = self.source
        source.line(
            f"# Queries and keys of one residue modulo {step} see each other only; from here on all is counted within it."
        )
        source.line(f"first_row = (residue - q_offset % {step} + {step}) % {step}")
        for name in by_query:
            source.line(f"{name}_ptr += first_row * {name}_stride_row")
            source.line(f"{name}_stride_row *= {step}")
        for name in by_key:
            source.line(f"{name}_ptr += residue * {name}_stride_row")
            source.line(f"{name}_stride_row *= {step}")
        source.line(f"rows = (rows - first_row + {step - 1}) // {step}")
        source.line(f"q_offset = ({self.first} + first_row) // {step}")
        source.line(f"kv_len = (kv_len - residue + {step - 1}) // {step}")

    def place(self, row: str = "row") -> str:
        """The row of the call that a row of the residue is."""
        return row if self.variant.step == 1 else f"first_row + {row} * {self.variant.step}"

    def positions(self, *exprs: sympy.Basic, ends: bool = False) -> None:
        """The length of the query axis, if anything reads it; ``ends``: the ends of intervals of queries do."""
        if any(Q_LEN in expr.free_symbols for expr in exprs) or ends:
            self.source.line(f"q_len = {self.first} + rows")

    @property
    def first(self) -> str:
        """The position of the first query, which comes as an int32 where it is one, though later positions are not."""
        return "tl.cast(q_offset, tl.int64)" if self.variant.wide else "q_offset"

    # ---- heads and tiles ----

    def head(self, name: str, head: str) -> None:
        """Move the pointer of a tensor to the present batch entry and head."""
        self.source.line(
            f"{name}_ptr += tl.multiple_of(b.to(tl.int64) * {name}_stride_b + {head}.to(tl.int64) * {name}_stride_h, ALIGN)"
        )
        self.aligned(name)

    def aligned(self, name: str) -> None:
        """Say what is known of the distance between rows: without it no load would be wider than one number.

        A hint on a parameter is not kept by the compiler, a product is seen to be a multiple.
        """
        stride = f"{name}_stride_row"
        # Every offset of a row is a product with this number, so that its width is theirs.
        self.source.line(f"{stride} = {f'tl.cast({stride}, tl.int64)' if self.variant.wide else stride} // ALIGN * ALIGN")

    def dims(self, *, of_k: bool = True, of_v: bool = True) -> None:
        """The dimensions of heads, as vectors: ``of_k``, of q and k; ``of_v``, of v and the output."""
        parts = (self.d_parts if of_k else ()) + (self.v_parts if of_v else ())
        for part in dict.fromkeys(parts):
            first = f"{part.first} + " if part.first else ""
            self.source.line(f"{part.name} = {first}tl.arange(0, {part.width})")

    @property
    def d_parts(self) -> tuple[Part, ...]:
        """Blocks of the dimensions of q and k."""
        return parts_of(self.variant.head_dim, "d")

    @property
    def v_parts(self) -> tuple[Part, ...]:
        """Blocks of the dimensions of v and the output; they have their own names where the widths differ."""
        return parts_of(self.variant.head_dim_v, "d" if self.variant.head_dim == self.variant.head_dim_v else "e")

    def number(self, block: str, tile: str) -> str:
        """The first row of a tile."""
        return f"tl.cast({tile}, tl.int64) * {block}" if self.variant.wide else f"{tile} * {block}"

    def load(self, name: str, target: str, parts: tuple[Part, ...], rows: str, inside: str = "") -> None:
        """Load a tile of a tensor, part by part; what lies outside is 0."""
        for part in parts:
            where = f"{name}_ptr + {rows}[:, None] * {name}_stride_row + {part.name}[None, :]"
            self.source.line(f"{suffixed(target, part)} = tl.load({where}{self.mask(part, inside)})")

    def mask(self, part: Part, inside: str, *, other: bool = True) -> str:
        """The mask of a load or store of one part."""
        terms = [f"{inside}[:, None]"] if inside else []
        terms += [f"({part.name}[None, :] < {part.first + part.used})"] if part.padded else []
        if not terms:
            return ""
        return f", mask={' & '.join(terms)}{', other=0.0' if other else ''}"

    def store(self, name: str, value: str, parts: tuple[Part, ...], rows: str, inside: str) -> None:
        """Store a tile, part by part, in the type of the tensor."""
        for part in parts:
            where = f"{name}_ptr + {rows}[:, None] * {name}_stride_row + {part.name}[None, :]"
            kept = f"{suffixed(value, part)}.to({name}_ptr.dtype.element_ty)"
            self.source.line(f"tl.store({where}, {kept}{self.mask(part, inside, other=False)})")

    def dot(self, target: str, left: str, right: str, parts: tuple[Part, ...]) -> None:
        """``target``: the sum over all parts of ``left @ right.T``."""
        for n, part in enumerate(parts):
            onto = f", {target}" if n else ""
            self.source.line(
                f"{target} = tl.dot({suffixed(left, part)}, {suffixed(right, part)}.T{onto}, input_precision=PRECISION)"
            )

    def column_heads(self, head: str, names: str = "kv") -> None:
        """Enter the key head ``head``, of the keys and the values."""
        self.source.line(f"kv_head = {head} // group")
        if not self.variant.descriptors:
            for name in names:
                self.head(name, "kv_head")

    def column_tiles(self, names: str = "kv") -> None:
        """Pointers to the first tile of k and of v; the others lie a number of rows further, but for rows that are read by number."""
        self.source.line("column_0 = tl.arange(0, BLOCK_N)")
        if self.variant.descriptors or self.variant.placed:
            return
        for name in names:
            for part in self.parts(name):
                where = f"{name}_ptr + column_0[:, None] * {name}_stride_row + {part.name}[None, :]"
                self.source.line(f"{suffixed(name + '_tile', part)} = {where}")

    def begin_columns(self, kind: str) -> None:
        """The keys of tile ``column``; those of a partial tile may lie beyond the last."""
        self.source.line(f"start = {self.number('BLOCK_N', 'column')}")
        self.source.line("kv_idx = start + column_0")
        if kind == "partial" and not self.variant.descriptors:
            self.source.line("exists = kv_idx < kv_len")
        if self.variant.placed:
            # Pools of pages are large: what lies before a row is counted in 64 bits.
            mask = ", mask=exists, other=0" if kind == "partial" else ""
            self.source.line(f"kv_row = tl.load(kv_rows_ptr + kv_idx{mask}).to(tl.int64)")

    def load_column_tile(self, name: str, kind: str) -> None:
        """The tile of ``k`` or ``v`` at ``start``; keys beyond the last are 0."""
        for part in self.parts(name):
            if self.variant.descriptors:
                tile = f"{suffixed(name + '_desc', part)}.load([b, kv_head, start, {part.first}])"
                self.source.line(f"{suffixed(name, part)} = {tile}.reshape(BLOCK_N, {part.width})")
                continue
            mask = self.mask(part, "exists" if kind == "partial" else "")
            if self.variant.placed:
                where = f"{name}_ptr + (kv_row * {name}_stride_row)[:, None] + {part.name}[None, :]"
            else:
                where = f"{suffixed(name + '_tile', part)} + start * {name}_stride_row"
            self.source.line(f"{suffixed(name, part)} = tl.load({where}{mask})")

    # ---- what logits are ----

    @property
    def plain(self) -> bool:
        """Whether logits are the scaled products themselves: then scale and base of the exponential are one factor."""
        return not self.pattern.has_score and self.pattern.normaliser == SOFTMAX

    @property
    def pointwise(self) -> bool:
        """Whether what the score gives are weights: nothing is exponentiated, summed or divided by."""
        return self.pattern.normaliser == POINTWISE

    @property
    def row_sums(self) -> tuple[str, ...]:
        """What the backward pass reads of each row: weights that are taken as they are need nothing of the others."""
        return () if self.pointwise or self.breaks else ("delta", "base")

    @property
    def breaks(self) -> bool:
        """Whether a stick is broken: keys take shares of what later ones leave, so that all kernels need their tiles in order."""
        return self.pattern.normaliser == STICK_BREAKING

    @property
    def picks(self) -> bool:
        """Whether weights are exponentials less 1, of which those below 0 count in the sum alone."""
        return self.pattern.normaliser == SOFTPICK

    @functools.cached_property
    def ramp(self) -> Ramp | None:
        """Scores that rise evenly along keys; not where rows are of several heads, each with a ramp of its own."""
        return None if self.packed or self.pattern.normaliser != SOFTMAX else ramp_of(self.pattern)

    @property
    def in_log2(self) -> bool:
        """Whether logits are taken to units of log2 before their maximum is subtracted: one multiplication and sum.

        A table, or a number, may be the lowest there is, in place of -inf: times LOG2E it would be -inf.
        """
        if self.ramp is not None:
            return True
        expr = self.pattern.score.expr
        large = any(abs(number) > LARGEST_NUMBER for number in expr.atoms(sympy.Number))
        return not large and not any(spec.dtype == "float" for spec in table_specs(expr).values())

    # ---- loops ----

    def key_loop(self) -> Loop:
        """The loop over tiles of keys for the queries of a program."""
        if (self.variant.decode_keys if self.packed else self.variant.keys) == "lists":
            head, line = ("head", "") if self.packed else ("h", "listed * tiles + tile")
            return ListLoop(self.pattern.mask.expr, "keys", head, line, square=not self.packed, one_loop=self.breaks)
        found = intervals(self.pattern.mask.expr)
        assert found is not None
        vectors = frozenset({Q_IDX, HEAD} if self.packed else {Q_IDX})
        return IntervalLoop(found, "keys", "BLOCK_N", vectors, self.variant.wide, self.breaks)

    def query_loop(self) -> Loop:
        """The loop over tiles of queries for the keys of a program."""
        if self.variant.queries == "lists":
            return ListLoop(self.pattern.mask.expr, "queries", "h", "listed * tiles + tile", one_loop=self.breaks)
        found = intervals(self.pattern.mask.expr, of="queries")
        assert found is not None
        return IntervalLoop(found, "queries", "BLOCK_M", frozenset({KV_IDX}), self.variant.wide, self.breaks)


def table_names(pattern: Pattern) -> dict[str, TableNames]:
    """What the tables of a pattern and their sizes are called among a kernel's arguments."""
    return {
        name: TableNames(f"{name}_table", tuple(f"{name}_size_{i}" for i in range(rank)))
        for name, rank in pattern.table_ranks.items()
    }


def _wrapped(words: list[str], opening: str, closing: str, width: int = 120) -> list[str]:
    """Words with commas between, in lines that are not too long."""
    lines, line = [], opening
    for n, word in enumerate(words):
        piece = word + (", " if n + 1 < len(words) else closing)
        if len(line) + len(piece) > width:
            lines.append(line.rstrip())
            line = "    " + piece if opening else piece
        else:
            line += piece
    return [*lines, line if words else opening + closing]
