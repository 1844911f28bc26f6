"""Hypothesis strategies for the language: expressions, patterns, and tables that honour what was declared about them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from hypothesis import strategies as st

from sparsedsl.analysis.bounds import index_ranges, value_ranges
from sparsedsl.analysis.domain import Domain
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.expressions import Index, Mask, Score
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.lang.tables import TableRead, TableSpec, table_reads
from sparsedsl.lang.text import parse
from sparsedsl.lang.wrapped import Expression
from sparsedsl.testing import grammar
from sparsedsl.testing.call_shapes import AttentionCase, tensor

__all__ = ["indices", "masks", "patterns", "scores", "seeded_tables", "table_tensors", "tables_for"]


def _read(text: str) -> Any:
    return parse(grammar.declarations_of(text) + text)


def indices(*, depth: int = 3, tables: bool = True) -> st.SearchStrategy[Index]:
    """Integer expressions: affine, ``//``, ``%``, min, max, abs, where, bit operations, and reads of nested tables.

    ``depth``: how deep they nest. ``tables``: whether they read tables; values for these come from :func:`tables_for`.

    >>> from hypothesis import given
    >>> @given(indices())
    ... def test(index):
    ...     assert (index - index).expr == 0
    >>> test()
    """
    return grammar.index_texts(depth, tables=tables).map(_read)


def masks(*, depth: int = 3, tables: bool = True) -> st.SearchStrategy[Mask]:
    """Boolean expressions: windows, documents, strides, blocks, block tables, random comparisons, joined by ``& | ~ ^``.

    >>> from hypothesis import given
    >>> @given(masks(tables=False))
    ... def test(mask):
    ...     assert (mask ^ mask).text == "False"
    >>> test()
    """
    return grammar.mask_texts(depth, tables=tables).map(_read)


def scores(*, depth: int = 2, tables: bool = True) -> st.SearchStrategy[Score]:
    """Modified logits: biases, soft caps, float functions, learned tables; never NaN on finite logits.

    >>> from hypothesis import given
    >>> @given(scores())
    ... def test(score):
    ...     assert score.text
    >>> test()
    """
    return grammar.score_texts(depth, tables=tables).map(_read)


@st.composite
def patterns(draw: st.DrawFn, *, depth: int = 3, tables: bool = True, scores: bool = True, causal: bool | None = None) -> Pattern:
    """Attention patterns: a mask, and sometimes a modified logit, a sink and a scale.

    Args:
        depth: how deep the mask nests.
        tables: whether tables are read.
        scores: whether logits are modified and sinks added.
        causal: ``True`` for patterns that never see a later position; ``None`` for any.

    >>> from hypothesis import given
    >>> @given(patterns(causal=True))
    ... def test(pattern):
    ...     assert len(pattern.key) == 32
    >>> test()
    """
    text = draw(grammar.mask_texts(depth, tables=tables))
    if causal:
        text = f"((kv_idx <= q_idx) & {text})"
    words = [text]
    if scores and draw(st.booleans()):
        words.append(draw(grammar.score_texts(1, tables=tables)))
    mask, *score = (_read(word) for word in words)
    sink = draw(st.none() | st.sampled_from((0.0, 1.5))) if scores else None
    scale = draw(st.none() | st.sampled_from((0.1, 1.0))) if scores else None
    return attend(mask, score[0] if score else None, sink=sink, scale=scale)


def tables_for(pattern: Any, case: AttentionCase) -> st.SearchStrategy[dict[str, torch.Tensor]]:
    """Tensors for every unbound table of a pattern or expression, as long as the case reads them and as its words promise.

    Monotone tables never fall along their last axis, bijective ones are permutations along it, values stay inside ``values_in``.
    A read outside every table is not forced on you: each axis is as long as the largest index that is read.

    >>> import sparsedsl as sd
    >>> from hypothesis import given
    >>> doc = sd.table("doc", monotone=True)
    >>> case = AttentionCase(q_len=5, kv_len=9)
    >>> @given(tables_for(doc[sd.q_idx] == doc[sd.kv_idx], case))
    ... def test(tables):
    ...     assert len(tables["doc"]) == 9
    >>> test()
    """
    bound = pattern.bound if isinstance(pattern, (Pattern, Expression)) else {}
    return table_tensors(pattern.exprs, case, bound)


@st.composite
def table_tensors(
    draw: st.DrawFn, exprs: tuple[sympy.Basic, ...], case: AttentionCase, bound: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """:func:`tables_for`, for sympy expressions."""
    # One number decides all values of a table, so that a failing case can shrink in length; small numbers give plain tables.
    return _filled(exprs, case, bound, lambda: draw(st.integers(0, 99)), lambda kinds: draw(st.sampled_from(kinds)))


def seeded_tables(
    exprs: tuple[sympy.Basic, ...], case: AttentionCase, bound: Mapping[str, Any], seed: int
) -> dict[str, torch.Tensor]:
    """:func:`table_tensors`, by a number in place of a draw; seldom plain ones."""
    drawn = random.Random(seed)
    return _filled(exprs, case, bound, lambda: drawn.randint(1, 99), drawn.choice)


def _filled(
    exprs: tuple[sympy.Basic, ...],
    case: AttentionCase,
    bound: Mapping[str, Any],
    seed: Callable[[], int],
    choose: Callable[[tuple[torch.dtype, ...]], torch.dtype],
) -> dict[str, torch.Tensor]:
    reads = {read for expr in exprs for read in table_reads(expr)}
    values: dict[str, Any] = dict(bound)
    drawn: dict[str, torch.Tensor] = {}
    for spec in _inner_first(reads):
        if spec.name not in values:
            sizes = _sizes([read for read in reads if read.spec == spec], case, values)
            values[spec.name] = drawn[spec.name] = _table(spec, sizes, seed(), choose)
    return drawn


def _inner_first(reads: set[TableRead]) -> list[TableSpec]:
    """The tables in an order in which the indices of each read only earlier ones."""
    needs: dict[TableSpec, set[TableSpec]] = {}
    for read in reads:
        inner = {r.spec for argument in read.args for r in table_reads(argument)}
        needs[read.spec] = needs.get(read.spec, set()) | inner - {read.spec}
    order: list[TableSpec] = []
    while needs:
        ready = [spec for spec, inner in needs.items() if inner <= set(order)]
        # Tables that index each other in a circle (t[s[i]] and s[t[i]]) are taken as they come: reads outside are clamped.
        order += sorted(ready or needs, key=lambda spec: spec.name)
        needs = {spec: inner for spec, inner in needs.items() if spec not in order}
    return order


def _sizes(reads: list[TableRead], case: AttentionCase, tables: Mapping[str, Any]) -> tuple[int, ...]:
    """How long each axis must be for the indices read in this case, as far as interval arithmetic knows: so a call checks it."""
    sizes = [1] * len(reads[0].args)
    domain = Domain(case.q_len, case.kv_len, case.q_offset, case.batch, case.heads, tables)
    intervals = index_ranges(domain, value_ranges(domain))
    for read in reads:
        known = all(inner.spec.name in tables for argument in read.args for inner in table_reads(argument))
        for axis, argument in enumerate(read.args if known else ()):
            _, largest = intervals.range(argument)
            if largest == math.inf:
                largest = int(evaluate(argument, {**case.env, **tables}).max())
            sizes[axis] = max(sizes[axis], int(largest) + 1)
    return tuple(sizes)


def _table(
    spec: TableSpec, sizes: tuple[int, ...], seed: int, choose: Callable[[tuple[torch.dtype, ...]], torch.dtype]
) -> torch.Tensor:
    if spec.dtype == "float":
        return tensor(*sizes, seed=seed)
    if spec.bijective:
        values = _ranks(sizes, seed)
    else:
        low, high = (0, 1) if spec.dtype == "bool" else spec.values_in or (0, 7)
        values = low + _ranks(sizes, seed, high - low + 1)
        if spec.monotone:
            values = values.sort(dim=-1).values
    if spec.dtype == "bool":
        return values.bool()
    wide = int(values.abs().max()) > torch.iinfo(torch.int32).max
    return values if wide else values.to(choose((torch.int64, torch.int32)))


def _ranks(sizes: tuple[int, ...], seed: int, count: int | None = None) -> torch.Tensor:
    """Whole numbers below ``count``; without it, permutations along the last axis. Seeds 0 to 2 give plain ones."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(sizes[-1]).expand(sizes).clone()
    if count is None:
        regular = (steps, steps.flip(-1), steps.roll(1, dims=-1))
        return regular[seed] if seed < 3 else torch.rand(sizes, generator=generator).argsort(dim=-1)
    regular = (torch.zeros_like(steps), steps // 4 % count, (steps + 1) % count)
    return regular[seed] if seed < 3 else torch.randint(count, sizes, generator=generator)
