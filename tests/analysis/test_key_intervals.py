"""Spans against brute force: the keys each query sees, and the queries that see each key, as unions of intervals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, kv_len, q_idx
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.key_intervals import KeyInterval, exchanged, interval_rows, intervals, never_empty
from sparsedsl.analysis.residue_classes import RESIDUE, residues
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.testing import AttentionCase, masks, shapes, tables_for

P = sd.patterns
causal = kv_idx <= q_idx


def domain_of(case: AttentionCase, tables: dict[str, torch.Tensor]) -> Domain:
    return Domain(case.q_len, case.kv_len, case.q_offset, case.batch, case.heads, tables)


def pairs_of(mask, case: AttentionCase, tables: dict[str, torch.Tensor]) -> torch.Tensor:
    """(batch, heads, queries, keys), by evaluating the mask at every pair."""
    allowed = torch.as_tensor(evaluate(mask.expr, {**case.env, **tables}))
    return allowed.expand(case.batch, case.heads, case.q_len, case.kv_len)


def between(first: torch.Tensor, last: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return (positions >= first[..., None]) & (positions <= last[..., None])


def by_search(interval: KeyInterval, of: str, case: AttentionCase, tables: dict[str, torch.Tensor]) -> torch.Tensor:
    """The pairs of one interval out of :func:`interval_rows`."""
    first, last = interval_rows(interval, domain_of(case, tables), of=of)
    assert first.dtype == last.dtype == torch.int32
    if of == "keys":
        return between(first, last, torch.arange(case.kv_len))
    return between(first, last, torch.arange(case.q_len) + case.q_offset).transpose(2, 3)


def by_ends(interval: KeyInterval, of: str, case: AttentionCase, tables: dict[str, torch.Tensor]) -> torch.Tensor:
    """The pairs of one interval out of its closed ends and conditions."""
    queries, keys = torch.arange(case.q_len) + case.q_offset, torch.arange(case.kv_len)
    end_of_queries = case.q_len + case.q_offset
    lengths = (end_of_queries, case.kv_len) if of == "keys" else (case.kv_len, end_of_queries)
    here, there = (queries, keys) if of == "keys" else (keys, queries)
    env = {"b": torch.arange(case.batch)[:, None, None], "h": torch.arange(case.heads)[:, None], "q_idx": here}
    env |= {"q_len": lengths[0], "kv_len": lengths[1], **tables}
    size = (case.batch, case.heads, len(here))
    first, last = (torch.as_tensor(evaluate(end, env)).expand(size) for end in interval.ends)
    for condition in interval.conditions:
        last = torch.where(torch.as_tensor(evaluate(condition, env)).expand(size), last, -1)
    found = between(first, last, there)
    return found if of == "keys" else found.transpose(2, 3)


def assert_spans_are_the_mask(mask, of: str, case: AttentionCase, tables: dict[str, torch.Tensor]) -> bool:
    """Whether there are intervals; if there are, they are the mask, however their ends are found."""
    found = intervals(mask.expr, of=of)
    if found is None:
        return False
    wanted = pairs_of(mask, case, tables)
    searched = torch.zeros_like(wanted)
    closed = torch.zeros_like(wanted)
    for interval in found:
        mine = by_search(interval, of, case, tables)
        searched |= mine
        closed |= mine if interval.searched else by_ends(interval, of, case, tables)
    assert torch.equal(searched, wanted), f"{of} by search: {mask} at {case}"
    assert torch.equal(closed, wanted), f"{of} by closed ends: {mask} at {case}"
    return True


@given(mask=masks(depth=2), case=shapes(max_len=40, max_heads=3), of=st.sampled_from(["keys", "queries"]), data=st.data())
@settings(max_examples=200)
def test_spans_of_random_masks(mask, case, of, data):
    assert_spans_are_the_mask(mask, of, case, data.draw(tables_for(mask, case)))


SIMPLE = st.sampled_from(
    ["kv_idx <= q_idx", "q_idx - kv_idx < {0}", "kv_idx < {0}", "q_idx >= {0}", "q_idx // {1} == kv_idx // {1}",
     "doc[q_idx] == doc[kv_idx]", "kv_idx >= start[q_idx]", "q_idx - kv_idx < width[h]", "kv_idx < used[b]",
     "{1} * kv_idx - q_idx <= {0}", "kv_idx // {1} >= q_idx - {0}",
     "kv_len - kv_idx > {0}", "q_len - q_idx > {0}", "keep[q_idx]", "-3 * kv_idx >= {0} - 2 * q_idx", "start[doc[q_idx]] <= kv_idx",
     "q_idx - kv_idx > h * {1} - b", "group[q_idx] != 2", "kv_idx >= rank[h, q_idx]", "doc[kv_idx] <= {1}"]
)  # fmt: skip
DECLARED = {
    "doc": "monotone=True", "start": "monotone=True, values_in=(0, 60)", "width": "values_in=(1, 9)", "used": "values_in=(0, 40)",
    "keep": "dtype=bool", "group": "values_in=(0, 4)", "rank": "values_in=(-3, 20)",
}  # fmt: skip


@st.composite
def unions(draw):
    """Unions of intersections of bounds: mostly intervals."""
    clauses = []
    for _ in range(draw(st.integers(1, 3))):
        terms = [draw(SIMPLE).format(draw(st.integers(-5, 30)), draw(st.integers(1, 9))) for _ in range(draw(st.integers(1, 3)))]
        clauses.append(" & ".join(f"({term})" for term in terms))
    text = " | ".join(f"({clause})" for clause in clauses)
    lines = [f"{name} = table({name!r}, {words})" for name, words in DECLARED.items() if f"{name}[" in text]
    return sd.parse("\n".join([*lines, text]))


@given(mask=unions(), case=shapes(max_len=40, max_heads=3), data=st.data())
@settings(max_examples=200)
def test_spans_of_unions_of_bounds(mask, case, data):
    tables = data.draw(tables_for(mask, case))
    for of in ("keys", "queries"):
        assert_spans_are_the_mask(mask, of, case, tables)


@given(mask=masks(depth=3))
@settings(max_examples=100)
def test_exchanging_twice_changes_nothing(mask):
    assert exchanged(exchanged(mask.expr)) == mask.expr
    case = AttentionCase(heads=2, batch=2, q_len=7, kv_len=7)
    if not mask.tables:
        env = dict(case.env)
        swapped = env | {"q_idx": env["kv_idx"], "kv_idx": env["q_idx"]}
        assert torch.equal(
            torch.as_tensor(evaluate(exchanged(mask.expr), env)).expand(2, 2, 7, 7),
            torch.as_tensor(evaluate(mask.expr, swapped)).expand(2, 2, 7, 7),
        )


doc, width, used, start = sd.table("doc", monotone=True), sd.table("width"), sd.table("used"), sd.table("start")

SPANS = {
    "full": P.full(),
    "causal": P.causal(),
    "window": P.sliding_window(64),
    "window, two-sided": abs(q_idx - kv_idx) <= 64,
    "window and sinks": P.causal() & (P.sliding_window(64) | P.sinks(4)),
    "prefix": P.prefix(128),
    "prefix of a batch entry": causal | (kv_idx < used[b]),
    "documents": P.documents(),
    "packed": P.packed(128),
    "starts": causal & (kv_idx >= start[q_idx]),
    "chunks": P.chunked(48),
    "windows by head": P.sliding_window(width[h]),
    "mistral": P.mistral(),
    "streaming": P.streaming_llm(),
    "gap": abs(q_idx - kv_idx) > 9,
    "every other query": causal & (q_idx % 2 == 0),
    "last keys": kv_len - kv_idx <= 7,
}
NOT_SPANS = {
    "dilated": P.dilated(64, 4),
    "strided": P.strided(8, local=20),
    "block table": P.blocks(),
    "every other key": causal & (kv_idx % 2 == 0),
    "scattered": (q_idx * kv_idx) % 3 == 0,
    "kept keys": causal & sd.table("keep", dtype=bool)[kv_idx],
    "any order": sd.table("order")[kv_idx] <= sd.table("order")[q_idx],
    "picture": P.neighbourhood_2d(32, 48, (7, 5)),
    "five pieces": causal & ((kv_idx < 2) | ((kv_idx > 9) & (kv_idx < 12)) | ((kv_idx > 19) & (kv_idx < 22))
                             | ((kv_idx > 29) & (kv_idx < 32)) | (q_idx - kv_idx < 5)),
}  # fmt: skip
# Tables of starts count from either side; random tables would not tell.
GIVEN = {"start": torch.arange(200) // 16 * 16, "width": torch.tensor([5, 40]), "used": torch.tensor([9, 70])}


def as_mask(pattern):
    return getattr(pattern, "mask", pattern)


@pytest.mark.parametrize("of", ["keys", "queries"])
@pytest.mark.parametrize("name", SPANS)
def test_what_people_write_has_spans(name, of):
    if (name, of) in {("starts", "queries"), ("every other query", "queries")}:
        assert intervals(as_mask(SPANS[name]).expr, of=of) is None
        return
    mask, case = as_mask(SPANS[name]), AttentionCase(2, 2, 1, 83, 90, q_offset=11)
    tables = {table: GIVEN.get(table, torch.arange(200) // 17) for table in mask.tables}
    assert assert_spans_are_the_mask(mask, of, case, tables)


@pytest.mark.parametrize("name", NOT_SPANS)
def test_what_has_no_spans(name):
    mask = as_mask(NOT_SPANS[name])
    assert intervals(mask.expr) is None


@pytest.mark.parametrize("name", SPANS)
def test_spans_that_begin_at_key_0_come_first(name):
    firsts = [not interval.searched and interval.ends[0] == 0 for interval in intervals(as_mask(SPANS[name]).expr)]
    assert firsts == sorted(firsts, reverse=True)


def test_what_is_searched():
    assert [interval.searched for interval in intervals(as_mask(SPANS["documents"]).expr)] == [True]
    assert [interval.searched for interval in intervals(as_mask(SPANS["window and sinks"]).expr)] == [False, False]


@given(mask=masks(depth=2), case=shapes(max_len=30, max_heads=3), data=st.data())
@settings(max_examples=150)
def test_rows_that_are_never_empty(mask, case, data):
    why = never_empty(mask.expr)
    allowed = pairs_of(mask, case, data.draw(tables_for(mask, case)))
    if why == "first":
        assert bool(allowed[..., 0].all())
    elif why == "diagonal":
        queries = torch.arange(case.q_len) + case.q_offset
        has_key = queries < case.kv_len
        assert bool(allowed[:, :, has_key, queries[has_key]].all())
    else:
        assert why is None


def test_why_rows_are_never_empty():
    reasons = {"full": "first", "causal": "first", "window": "diagonal", "window and sinks": "first", "documents": "diagonal",
               "chunks": "diagonal", "windows by head": None, "gap": None, "prefix": "first", "every other query": None}  # fmt: skip
    assert {name: never_empty(as_mask(SPANS[name]).expr) for name in reasons} == reasons


# ---- residues ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "step"),
    [
        (causal & ((q_idx - kv_idx) % 4 == 0) & (q_idx - kv_idx < 30), 4),
        ((abs(q_idx - kv_idx) < 20) & ((kv_idx - q_idx) % 3 == 0), 3),
    ],
    ids=str,
)
def test_within_a_residue_the_mask_is_that_of_the_whole(mask, step):
    found = residues(sd.attend(mask))
    assert found is not None and found.step == step
    places = torch.arange(50)
    whole = evaluate(mask.expr, {"q_idx": places[:, None], "kv_idx": places[None, :]}).expand(50, 50)
    seen = torch.zeros(50, 50, dtype=torch.bool)
    for lane in range(step):
        mine = places[lane::step]
        n = torch.arange(len(mine))
        env = {"q_idx": n[:, None], "kv_idx": n[None, :], str(RESIDUE): lane}
        seen[mine[:, None], mine[None, :]] = torch.as_tensor(evaluate(found.pattern.mask.expr, env)).expand(len(n), len(n))
    assert torch.equal(seen, whole)


@pytest.mark.parametrize("mask", [causal, P.strided(8, local=20), P.blocks(), causal & ((q_idx + kv_idx) % 4 == 0)], ids=str)
def test_no_residues(mask):
    assert residues(sd.attend(as_mask(mask))) is None
