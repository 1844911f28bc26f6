"""Loops over the pairs of a block in generated C++: what depends on the lane alone, or on the key alone, is worked out once.

A block holds some keys and the lanes of a strip (``codegen/cpp/call.h``). The loop over lanes is the inner one, so that the compiler can
make vectors of it; what reads tables or divides, and no key, becomes an array over the lanes before the loops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import sympy

from sparsedsl.codegen.cpp_expression import CppNames, CppPrinter
from sparsedsl.codegen.sharing import is_constant
from sparsedsl.codegen.source import Source
from sparsedsl.lang.symbols import HEAD, KV_IDX, Q_IDX, SCORE
from sparsedsl.lang.tables import TableRead

__all__ = ["PairLoop", "braces"]

# What is worth a place of its own; sums and products of indices are not.
_WORK = (TableRead, sympy.floor, sympy.Mod, sympy.Function, sympy.Pow)


@contextmanager
def braces(source: Source, header: str) -> Iterator[None]:
    """A block of C++ in braces, with names of its own."""
    with source.scope(), source.block(f"{header} {{"):
        yield
    source.line("}")


class PairLoop:
    """Writes the loops over keys ``j`` and lanes ``i`` of a block.

    ``lanes``: how many of them, as text. ``one_head``: whether all lanes are of one head, ``h``. ``members``: symbols that say of each lane
    which choices selected the block. ``plain``: the names within the loops without what was worked out before.
    """

    def __init__(
        self, source: Source, names: CppNames, real: str, members: tuple[sympy.Symbol, ...] = (), *, lanes: str = "lanes->count",
        one_head: bool = False,
    ) -> None:  # fmt: skip
        self.source, self.plain, self.real, self.lanes, self.members = source, names, real, lanes, members
        self.of_lane = {Q_IDX: "q_idx"} if one_head else {Q_IDX: "q_idx", HEAD: "h"}

    @contextmanager
    def over(self, *exprs: sympy.Basic) -> Iterator[list[str]]:
        """Within it lines stand inside both loops; gives the texts of ``exprs`` there."""
        source = self.source
        with_score = any(SCORE in expr.free_symbols for expr in exprs)
        if with_score:
            source.line("const real scale = call->scale;")
        known = dict(self.plain.replaced)
        parts = list(dict.fromkeys(part for expr in exprs for part in self._parts(expr)))
        known |= self._named([p for p in parts if self._kind(p) == "block"], known, "of_block")
        known |= self._of_lanes([p for p in parts if self._kind(p) == "lane"], known)
        with braces(source, "for (i64 j = 0; j < keys; j++)"):
            source.line("const i64 kv_idx = key + j;")
            known |= self._named([p for p in parts if self._kind(p) == "key"], known, "of_key")
            with braces(source, f"for (i64 i = 0; i < {self.lanes}; i++)"):
                self._lane()
                if with_score:
                    source.line("const real score = tile[j * lanes->count + i] * scale;")
                yield CppPrinter(replace(self.plain, replaced=known), self.real).write(source, list(exprs))

    def _lane(self) -> None:
        own = ", ".join(f"{name} = lanes->{name}[i]" for name in self.of_lane.values())
        self.source.line(f"[[maybe_unused]] const i64 {own};")
        for number, symbol in enumerate(self.members):
            self.source.line(f"[[maybe_unused]] const bool {symbol.name} = lanes->bits[i] >> {number} & 1;")

    def _named(self, parts: list[sympy.Basic], known: Mapping[sympy.Basic, str], stem: str) -> dict[sympy.Basic, str]:
        found = {}
        for part in parts:
            text = CppPrinter(replace(self.plain, replaced=known), self.real).write(self.source, [part])[0]
            found[part] = self.source.fresh(stem)
            self.source.line(f"const {_type(part, self.real)} {found[part]} = {text};")
        return found

    def _of_lanes(self, parts: list[sympy.Basic], known: Mapping[sympy.Basic, str]) -> dict[sympy.Basic, str]:
        if not parts:
            return {}
        source, found = self.source, {}
        for part in parts:
            name = source.fresh("of_lane")
            found[part] = f"{name}[i]"
            source.line(f"{_type(part, self.real)} {name}[MOST_LANES];")
        with braces(source, "for (i64 i = 0; i < lanes->count; i++)"):
            self._lane()
            texts = CppPrinter(replace(self.plain, replaced=known), self.real).write(source, parts)
            for part, text in zip(parts, texts, strict=True):
                source.line(f"{found[part]} = {text};")
        return found

    def _kind(self, expr: sympy.Basic) -> str:
        free = expr.free_symbols
        by_lane = not free.isdisjoint(self.of_lane) or not free.isdisjoint(self.members)
        if SCORE in free or (KV_IDX in free and by_lane):
            return "pair"
        return "key" if KV_IDX in free else "lane" if by_lane else "block"

    def _parts(self, expr: sympy.Basic) -> Iterator[sympy.Basic]:
        """The largest subexpressions that do not depend on the pair, and are work."""
        if is_constant(expr) or expr.is_Symbol or expr in (sympy.true, sympy.false):
            return
        if self._kind(expr) != "pair":
            expr = -expr if isinstance(expr, sympy.Mul) and expr.could_extract_minus_sign() else expr
            if expr.has(*_WORK):
                yield expr
            return
        whole = isinstance(expr, sympy.floor) and expr.args[0].is_rational
        for argument in expr.args[0].as_numer_denom() if whole else expr.args:
            yield from self._parts(argument)


def _type(part: sympy.Basic, real: str) -> str:
    if not isinstance(part, sympy.Expr):
        return "bool"
    return "i64" if part.is_integer else real
