"""Random text of the language: every operator, function and kind of table read that a pattern may hold, as Python source.

Text rather than expressions, since one text has several readings that must agree: :func:`sparsedsl.parse`, Python's own
operators on symbols, and Python's own operators on numbers, which know nothing of this project (see
:mod:`sparsedsl.testing.plain`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from hypothesis import strategies as st

__all__ = ["DECLARATIONS", "declarations_of", "index_texts", "mask_texts", "score_texts"]

# The tables that random text reads. What each may hold follows from its words; how it is read follows from `_reads`.
DECLARATIONS = {
    "doc": "table('doc', monotone=True)",
    "start": "table('start', monotone=True, values_in=(0, 60))",
    "packed": "table('packed', monotone=True)",
    "group": "table('group', values_in=(0, 4))",
    "width": "table('width', values_in=(1, 9))",
    "used": "table('used', values_in=(0, 40))",
    "rank": "table('rank', values_in=(-3, 20))",
    "order": "table('order', bijective=True)",
    "keep": "table('keep', dtype=bool)",
    "listed": "table('listed', dtype=bool)",
    "chosen": "table('chosen', dtype=bool)",
    "slope": "table('slope', learned=True)",
    "bias": "table('bias', dtype=float)",
}
_POSITIONS = ("q_idx", "kv_idx")
_BLOCKS = ("1", "2", "3", "4", "8")

small = st.integers(-6, 6).map(str)
positive = st.integers(1, 7).map(str)


def declarations_of(text: str) -> str:
    """The declaration lines of the tables that ``text`` reads, each with its line end."""
    return "".join(f"{name} = {words}\n" for name, words in DECLARATIONS.items() if re.search(rf"\b{name}\[", text))


def _one_of(*branches: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    # As st.one_of; that one would print all it consists of, over and over, while Hypothesis shrinks a failure.
    return st.integers(0, len(branches) - 1).flatmap(branches.__getitem__)


def _fill(template: str, *parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*parts).map(lambda words: template.format(*words))


def _reads(position: st.SearchStrategy[str], tables: bool) -> list[st.SearchStrategy[str]]:
    """Reads of integer tables."""
    if not tables:
        return []
    return [
        _fill("doc[{}]", position),
        _fill("start[{}]", position),
        _fill("start[doc[{}]]", position),
        _fill("packed[b, {}]", position),
        _fill("group[{}]", position),
        st.just("width[h]"),
        st.just("used[b]"),
        _fill("rank[h, {}]", position),
        _fill("order[{}]", position),
    ]


@functools.cache
def _index(depth: int, *, tables: bool) -> st.SearchStrategy[str]:
    symbols = st.sampled_from((*_POSITIONS, *_POSITIONS, "b", "h", "q_len", "kv_len"))
    position = _positions(depth, tables)
    leaf = _one_of(symbols, *_reads(position, tables)) if tables else symbols
    if depth <= 0:
        return leaf
    inner = st.deferred(lambda: _index(depth - 1, tables=tables))
    operand = inner | small
    divisors = [positive, positive.map("-{}".format), st.sampled_from(("kv_len", "q_len", "(q_idx + 1)", "(2 * h + 3)"))]
    divisor = _one_of(*divisors, *([st.just("width[h]")] if tables else []))
    mask = st.deferred(lambda: _mask(depth - 1, tables=tables))
    return _one_of(
        leaf,
        _fill("({} + {})", inner, operand),
        _fill("({} - {})", inner, operand),
        _fill("({} - {})", operand, inner),
        _fill("({} * {})", small, inner),
        _fill("({} * {})", symbols, symbols),
        _fill("({}**2)", symbols),
        _fill("(-{})", inner),
        _fill("({} // {})", inner, divisor),
        _fill("({} % {})", inner, divisor),
        _fill("({} {} {})", small, st.sampled_from(("//", "%")), st.sampled_from(("kv_len", "(kv_idx + 1)", "(h + 2)"))),
        _fill("({} {} {})", inner, st.sampled_from("&|^"), operand),
        _fill("(~{})", inner),
        _fill("({} {} {})", inner, st.sampled_from(("<<", ">>")), st.integers(0, 3).map(str)),
        _fill("{}({}, {})", st.sampled_from(("minimum", "maximum")), inner, operand),
        _fill("abs({})", inner),
        _fill("clamp({}, {}, {})", inner, small, operand),
        _fill("where({}, {}, {})", mask, inner, operand),
        _fill("({} + {})", inner, mask),
    )


@functools.cache
def _positions(depth: int, tables: bool) -> st.SearchStrategy[str]:
    """Indices of a table along a token axis: never negative, never far outside the sequence."""
    kinds = [
        st.sampled_from(_POSITIONS),
        _fill("({} // {})", st.sampled_from(_POSITIONS), st.sampled_from(_BLOCKS)),
        _fill("({} % {})", st.sampled_from(_POSITIONS), positive),
        st.just("abs(q_idx - kv_idx)"),
        st.just("minimum(q_idx, kv_idx)"),
        _fill("maximum({} - {}, 0)", st.sampled_from(_POSITIONS), positive),
        _fill("({} + {})", st.sampled_from(_POSITIONS), positive),
    ]
    if depth > 0:
        kinds.append(_fill("clamp({}, 0, {})", st.deferred(lambda: _index(depth - 1, tables=tables)), positive))
    return _one_of(*kinds)


@functools.cache
def _mask(depth: int, *, tables: bool) -> st.SearchStrategy[str]:
    named = _named_masks(tables)
    if depth <= 0:
        return named
    index = st.deferred(lambda: _index(depth - 1, tables=tables))
    inner = st.deferred(lambda: _mask(depth - 1, tables=tables))
    comparison = st.sampled_from(("<", "<=", ">", ">=", "==", "!="))
    return _one_of(
        named,
        _fill("({} {} {})", index, comparison, index | small),
        _fill("({} * q_idx + {} * kv_idx {} {})", small, small, comparison, st.integers(-20, 20).map(str)),
        _fill("({} {} {})", inner, st.sampled_from("&|^"), inner),
        _fill("({} & {})", inner, inner),
        _fill("(~{})", inner),
        _fill("({} {} {})", inner, st.sampled_from(("==", "!=")), inner),
    )


@functools.cache
def _named_masks(tables: bool) -> st.SearchStrategy[str]:
    block = st.sampled_from(_BLOCKS)
    masks = [
        st.just("(kv_idx <= q_idx)"),
        _fill("(q_idx - kv_idx < {})", positive),
        _fill("(abs(q_idx - kv_idx) <= {})", positive),
        _fill("(kv_idx < {})", positive),
        _fill("((q_idx - kv_idx) % {} == 0)", positive),
        block.map("(q_idx // {0} == kv_idx // {0})".format),
        _fill("(q_idx // {} == kv_idx // {})", block, block),
        _fill("((q_idx - kv_idx) * {} >= h - {})", positive, positive),
        _fill("((kv_idx ^ {}) & {} == 0)", positive, positive),
    ]
    if tables:
        masks += [
            st.just("(doc[q_idx] == doc[kv_idx])"),
            st.just("(packed[b, q_idx] == packed[b, kv_idx])"),
            st.just("(kv_idx >= start[doc[q_idx]])"),
            st.just("(group[q_idx] != group[kv_idx])"),
            st.just("(q_idx - kv_idx < width[h])"),
            st.just("(kv_idx < used[b])"),
            st.just("(order[q_idx] >= order[kv_idx])"),
            _fill("keep[{}]", st.sampled_from(_POSITIONS)),
            _fill("listed[q_idx // {}, kv_idx // {}]", block, block),
            _fill("chosen[h, q_idx // {}, kv_idx // {}]", block, block),
        ]
    return _one_of(*masks)


@functools.cache
def _score(depth: int, *, tables: bool) -> st.SearchStrategy[str]:
    scores = _finite_scores(depth, tables)
    dropped = _fill("where({}, {}, -inf)", _mask(1, tables=tables), scores)
    return _one_of(scores, scores, scores, dropped)


@functools.cache
def _finite_scores(depth: int, tables: bool) -> st.SearchStrategy[str]:
    index = _index(1, tables=tables)
    leaves: list[st.SearchStrategy[str]] = [
        st.just("score"),
        st.just("score"),
        _fill("(score + {} * {})", _decimal(), index),
        _fill("(score - {} * abs(q_idx - kv_idx))", _decimal()),
    ]
    if tables:
        leaves += [st.just("(score + slope[h] * (kv_idx - q_idx))"), _fill("(score + bias[h, {}])", _positions(1, tables))]
    if depth <= 0:
        return _one_of(*leaves)
    inner = st.deferred(lambda: _finite_scores(depth - 1, tables))
    mask = _mask(1, tables=tables)
    bounded = st.sampled_from(("tanh({})", "sigmoid({})", "sin({})", "cos({})", "erf({})", "exp(-abs({}))", "log(1 + abs({}))"))
    growing = st.sampled_from(("softplus({})", "relu({})", "sqrt(1 + abs({}))", "abs({})", "(-{})"))

    def apply(pair: tuple[str, str]) -> str:
        return pair[0].format(pair[1])

    return _one_of(
        *leaves,
        st.tuples(bounded | growing, inner).map(apply),
        _fill("({} * tanh({} / {}))", st.integers(1, 50).map(str), inner, st.integers(1, 50).map(str)),
        _fill("({} + {})", inner, inner),
        _fill("({} - {})", inner, inner),
        _fill("({} * {})", _decimal(), inner),
        _fill("({} / {})", inner, st.sampled_from(("2", "3.0", "(1 + abs(q_idx - kv_idx))", "(1 + kv_idx)"))),
        _fill("{}({}, {})", st.sampled_from(("minimum", "maximum")), inner, inner),
        _fill("where({}, {}, {})", mask, inner, inner),
    )


def _decimal() -> st.SearchStrategy[str]:
    return st.sampled_from(("0.5", "0.125", "0.1", "-0.3", "1.5", "2", "-1"))


# The strategies above are built once and are large; these stand before them because Hypothesis prints a strategy it draws from.


@st.composite
def index_texts(draw: st.DrawFn, depth: int = 3, *, tables: bool = True) -> str:
    """Integer expressions nested up to ``depth`` deep; each reads at least one symbol or table."""
    return draw(_index(depth, tables=tables))


@st.composite
def mask_texts(draw: st.DrawFn, depth: int = 3, *, tables: bool = True) -> str:
    """Boolean expressions nested up to ``depth`` deep, biased towards what people write: windows, documents, strides, blocks."""
    return draw(_mask(depth, tables=tables))


@st.composite
def score_texts(draw: st.DrawFn, depth: int = 2, *, tables: bool = True) -> str:
    """Float expressions of moderate size: no poles, no overflow, never NaN; ``-inf`` only as a whole arm of a ``where``."""
    return draw(_score(depth, tables=tables))


# The kinds of text by name, for tests that go through all of them.
TEXTS: dict[str, Callable[..., st.SearchStrategy[str]]] = {"index": index_texts, "mask": mask_texts, "score": score_texts}
