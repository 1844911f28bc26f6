"""A mask that reads choices, as two parts that share no pair: what attends where nothing is chosen, and what choices add.

The first part is attention over a mask like any other. The second lies in the blocks that choices picked, and is followed along their
lists, in which a symbol stands for each choice: whether it picked the block of the pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy

from sparsedsl.analysis.block_masks import constant_in_blocks
from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.proofs import satisfiable
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.expressions import Mask, kv_idx
from sparsedsl.lang.symbols import HEAD
from sparsedsl.lang.tables import TableSpec, read_class
from sparsedsl.program.branches import Attend, blocks_of_keys
from sparsedsl.program.decided import simplified
from sparsedsl.program.select import Choice

__all__ = ["EITHER", "MaskSplit", "split_mask", "split_node", "symbol_of"]

# The table that a symbol is in :attr:`MaskSplit.reach`.
EITHER = (False, True)
# Bits of an int32, but for its sign.
MOST_CHOICES = 31
# Of so many choices all cases are looked at; of more it is taken that each may matter.
MOST_CASES = 6


@dataclass(frozen=True)
class MaskSplit:
    """``static | selected`` is the mask, and no pair is in both.

    static: what attends where nothing is chosen, as far as no choice takes it away: an expression over indices and tables, among them
        the choices that do.
    labels, choices: of the choices that are followed along lists, in the order of their bits, and these.
    symbols: those that stand in ``selected`` for "choice i picked the block of this pair", for all choices or for none. With one choice
        there is none: all that is listed was picked by it.
    selected: what choices add, of the pairs of listed blocks: ``sympy.true``: all; ``sympy.false`` where they only take away.
    reach: ``selected`` for a check of the tables it reads: where a symbol stands in it, a table of the symbol's name is read, whose
        values are :data:`EITHER`.
    wanted: of each value of the bits whether a block with it may hold a pair of ``selected``; empty where there are too many to say.
    """

    static: Any
    labels: tuple[str, ...] = ()
    symbols: tuple[sympy.Symbol, ...] = ()
    selected: Any = sympy.false
    reach: Any = sympy.false
    wanted: tuple[bool, ...] = ()
    choices: tuple[Choice, ...] = ()


_SPLITS: Cache[MaskSplit] = Cache()


def split_node(node: Attend) -> MaskSplit:
    """The split of the mask of an attention; with a softmax for each chunk of a choice, by that choice alone.

    Choices for blocks of queries, and those read at another place than the pair's own, stay reads of boolean tables.
    """
    # What is remembered holds no nodes, and so no tensors that are bound in them.
    found = _SPLITS.get(node.key, [], lambda: _split_node(node))
    bound = node.pattern.mask.bound
    return replace(found, choices=tuple(bound[label] for label in found.labels)) if found.labels else found


def _split_node(node: Attend) -> MaskSplit:
    mask, rule = node.pattern.mask, node.normaliser
    if rule is not None:  # every pair lies in a picked chunk: that is checked where the node is declared
        own = rule.selected.as_expression().expr
        inside = simplified(mask.expr.xreplace({own: sympy.true, sympy.Not(own): sympy.false}))
        parts = MaskSplit(sympy.false, (rule.selected.label,), (), inside, inside, (False, True))
        return _without_what_is_known(parts, {rule.selected.label: rule.selected})
    return split_mask(mask, node.selections, blocks_of_keys(node))


def split_mask(mask: Mask, choices: tuple[Choice, ...], tokens: int = 1) -> MaskSplit:
    """The split of a mask by some of the choices it reads. ``tokens``: those that ``kv_idx`` counts by.

    >>> import sparsedsl as sd
    >>> selected = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 64)), 4, name="selected")
    >>> node = sd.attend((sd.kv_idx <= sd.q_idx) & ((sd.q_idx - sd.kv_idx < 8) | selected))
    >>> found = split_node(node)
    >>> print(Mask(found.static), Mask(found.selected), sep="; ")
    (kv_idx <= q_idx) & (q_idx - kv_idx < 8); (kv_idx <= q_idx) & (q_idx - kv_idx >= 8)
    """
    known = {choice.label: choice for choice in choices if choice.blocks[0] == 1 and choice.blocks[1] % tokens == 0}
    own = {label: known[label].of_row(tokens).expr for label in sorted(known)}
    listed = [(label, read) for label, read in own.items() if mask.expr.has(read, sympy.Not(read))]
    if len(listed) > MOST_CHOICES:
        raise UnsupportedError(
            f"a mask that reads {len(listed)} choices for single queries; lists join up to {MOST_CHOICES}. Use backend='reference' or "
            "'flex', which read choices as tables, or choose once, by the sum of the scores"
        )
    if not listed:
        return MaskSplit(mask.expr)
    parts = _split(mask.expr, listed)
    return parts if tokens > 1 else _without_what_is_known(parts, known)  # candidates are said of tokens


def _split(expr: Any, listed: list[tuple[str, Any]]) -> MaskSplit:
    """By choices, of each of which the label and the read are given."""
    symbols = tuple(map(symbol_of, range(len(listed))))
    reads = {read: symbol for (_, read), symbol in zip(listed, symbols, strict=True)}
    reads |= {sympy.Not(read): sympy.Not(symbol) for read, symbol in reads.items()}
    full = expr.xreplace(reads)
    always = full.xreplace(dict.fromkeys(symbols, sympy.false))
    selected = simplified(sympy.And(full, sympy.Not(always)))
    static = always
    if _may_lose(always, full, symbols):
        static = simplified(sympy.And(always, full)).xreplace(
            {symbol: read for (_, read), symbol in zip(listed, symbols, strict=True)}
        )
    kept = [number for number, symbol in enumerate(symbols) if symbol in selected.free_symbols]
    chosen = tuple(listed[number][0] for number in kept)
    names = tuple(map(symbol_of, range(len(kept))))
    selected = selected.xreplace(dict(zip((symbols[number] for number in kept), names, strict=True)))
    if len(names) == 1:
        selected = simplified(selected.xreplace({names[0]: sympy.true}))
        return MaskSplit(static, chosen, (), selected, selected, (False, True))
    wanted = (False, *(True for _ in range(2 ** len(names) - 1))) if len(names) <= MOST_CASES else ()
    cases = {bits: selected.xreplace(_case(names, bits)) for bits in range(1, len(wanted))}
    wanted = tuple(cases.get(bits, sympy.false) != sympy.false for bits in range(len(wanted)))
    if cases and all(case in (sympy.true, sympy.false) for case in cases.values()):
        selected = sympy.true if any(wanted) else sympy.false
    return MaskSplit(static, chosen, names, selected, selected.xreplace({name: _unknown(name) for name in names}), wanted)


def _without_what_is_known(parts: MaskSplit, choices: Mapping[str, Choice]) -> MaskSplit:
    """Nothing is asked of pairs of which all in a listed block attend.

    They do where the mask is what made the blocks candidates of the choices that picked them, says the same of all keys of a block, and
    of all query heads that share a choice: a block is a candidate already if one of its pairs is allowed for one of these heads.
    """
    listed = [choices[label] for label in parts.labels]
    cases = [bits for bits, wanted in enumerate(parts.wanted) if wanted]
    rest = {bits: _conditions(parts.selected.xreplace(_case(parts.symbols, bits))) for bits in cases}
    if parts.selected == sympy.true or (cases and all(rest[bits] <= _known(listed, bits) for bits in cases)):
        # The tables that stand for symbols in the check of tables go with the symbols.
        return replace(parts, selected=sympy.true, symbols=(), reach=sympy.true if parts.symbols else parts.reach)
    return parts


def _conditions(mask: Any) -> set[Any]:
    return set() if mask == sympy.true else set(sympy.And.make_args(mask))


def _known(choices: Sequence[Choice], bits: int) -> set[Any]:
    """Conditions that hold for all pairs of a block that these choices picked."""
    found: set[Any] = set()
    for number, choice in enumerate(choices):
        if not bits >> number & 1 or choice.candidates is None:
            continue
        mask = choice.candidates.expr
        by_head = HEAD in mask.free_symbols and choice.axes[1] != "heads"
        if constant_in_blocks(mask, 1, choice.blocks[1]) and not by_head:
            found |= _conditions(mask)
    return found


def _case(symbols: tuple[sympy.Symbol, ...], bits: int) -> dict[sympy.Symbol, Any]:
    return {symbol: sympy.true if bits >> number & 1 else sympy.false for number, symbol in enumerate(symbols)}


def _may_lose(always: Any, full: Any, symbols: tuple[sympy.Symbol, ...]) -> bool:
    """Whether some pair of ``always`` may not attend once something is chosen."""
    if always == sympy.false or _rises(full, frozenset(symbols)):
        return False
    if len(symbols) > MOST_CASES:
        return True
    for values in itertools.product((sympy.true, sympy.false), repeat=len(symbols)):
        lost = simplified(sympy.And(always, sympy.Not(full.xreplace(dict(zip(symbols, values, strict=True))))))
        if lost != sympy.false and satisfiable(lost).status != "REFUTED":
            return True
    return False


def _rises(expr: Any, symbols: frozenset[sympy.Symbol], sign: bool = True) -> bool:
    """Whether ``expr`` can only become true where a symbol does; with ``sign`` False only false."""
    if not expr.free_symbols & symbols:
        return True
    if isinstance(expr, sympy.Not):
        return _rises(expr.args[0], symbols, not sign)
    if isinstance(expr, (sympy.And, sympy.Or)):
        return all(_rises(arg, symbols, sign) for arg in expr.args)
    return sign and expr in symbols


def symbol_of(number: int) -> sympy.Symbol:
    """What stands for the choice of this bit; no name of a table or an index has a blank."""
    return sympy.Symbol(f"chosen {number}")


def _unknown(symbol: sympy.Symbol) -> Any:
    """What stands for a symbol where only tables may: a read of the table :data:`EITHER`, of which nothing is known but its shape."""
    read = read_class(TableSpec(symbol.name, "bool"))
    return sympy.Ne(read((kv_idx % 2).expr), 0)
