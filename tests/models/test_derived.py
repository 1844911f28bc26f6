"""What runs in a padded, packed or cropped call says of every pair of real tokens what the pattern says of it in the row alone."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import b, kv_idx, q_idx
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.pattern import Pattern, as_pattern
from sparsedsl.models.derived import DerivedForm, derive
from sparsedsl.models.mask_arguments import MaskRequest, Packing
from sparsedsl.models.native import left_padding
from sparsedsl.testing import AttentionCase, patterns, tables_for

ROWS, HEADS, SLOTS = 2, 2, 9
CASE = AttentionCase(batch=ROWS, heads=HEADS, kv_heads=1, q_len=SLOTS, kv_len=SLOTS)
causal = kv_idx <= q_idx


def said(pattern: Pattern, row: int, queries: range, keys: int, tables: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask and score of a row, (heads, queries, keys): positions of the queries, so many keys."""
    env = {"b": row, "h": torch.arange(HEADS).view(-1, 1, 1), "q_idx": torch.arange(queries.start, queries.stop).view(-1, 1)}
    env |= {"kv_idx": torch.arange(keys), "q_len": queries.stop, "kv_len": keys, "score": torch.tensor(0.7, dtype=torch.float64)}
    shape = (HEADS, len(queries), keys)
    return evaluate(pattern.mask.expr, env | tables).expand(shape).bool(), evaluate(pattern.score.expr, env | tables).expand(
        shape
    )


def assert_says_the_same(pattern: Pattern, request: MaskRequest, start: int, tables: dict[str, Any]) -> None:
    """The derived pattern over the slots from ``start`` on, against the pattern over the real tokens of each sequence alone."""
    form = DerivedForm(
        padded=request.padding is not None, holes=request.has_holes, packed=request.packing is not None, cropped=start > 0
    )
    given_tables = tables | request.tables(start, SLOTS, ROWS, torch.device("cpu"))
    queries, derived = range(request.q_offset - start, SLOTS - start), derive(pattern, form)
    for row in range(ROWS):
        allowed, logit = said(derived, row, queries, SLOTS - start, given_tables)
        kept = torch.zeros_like(allowed)
        for slots in sequences(request, row):
            keys, asked = slots[slots >= start], slots[slots >= request.q_offset]
            own, own_logit = said(
                pattern, row, range(len(slots)), len(slots), {**tables, "left_padding": torch.zeros(ROWS).long()}
            )
            own, own_logit = (x[:, len(slots) - len(asked) :, len(slots) - len(keys) :] for x in (own, own_logit))
            at = (slice(None), (asked - request.q_offset)[:, None], keys - start)
            assert torch.equal(allowed[at], own)
            torch.testing.assert_close(logit[at][own], own_logit[own], equal_nan=True)
            kept[at] = own
        real = torch.cat([*sequences(request, row), torch.tensor([], dtype=torch.long)])
        real = real[real >= request.q_offset] - request.q_offset
        assert torch.equal(allowed[:, real], kept[:, real]), "nothing but tokens of the same sequence"


def sequences(request: MaskRequest, row: int) -> list[torch.Tensor]:
    """The slots of the real tokens of each sequence of a row."""
    if request.packing is None:
        return [torch.arange(SLOTS) if request.padding is None else request.padding[row].nonzero()[:, 0]]
    numbers = request.packing.sequence[row]
    return [(numbers == number).nonzero()[:, 0] for number in numbers.unique()]


@st.composite
def requests(draw: st.DrawFn) -> MaskRequest:
    """Padding at the edges, anywhere or nowhere, or packed rows."""
    kind = draw(st.sampled_from(["edges", "anywhere", "nowhere", "packed"]))
    padding = packing = None
    q_length = draw(st.integers(1, SLOTS))
    if kind == "edges":
        ends = [sorted(draw(st.tuples(st.integers(0, SLOTS), st.integers(0, SLOTS)))) for _ in range(ROWS)]
        padding = torch.stack([(torch.arange(SLOTS) >= low) & (torch.arange(SLOTS) < high) for low, high in ends])
    elif kind == "anywhere":
        padding = torch.tensor(
            draw(st.lists(st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS), min_size=ROWS, max_size=ROWS))
        )
    elif kind == "packed":
        starts = torch.tensor(
            draw(st.lists(st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS), min_size=ROWS, max_size=ROWS))
        )
        starts[:, 0] = False
        packing, q_length = Packing(starts.long().cumsum(-1), torch.full((ROWS, SLOTS), 5)), SLOTS
    offset = SLOTS - q_length
    return MaskRequest(q_length, SLOTS, offset, 0, padding, packing, None, (), lambda: None)


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_random_patterns(data: st.DataObject) -> None:
    pattern = data.draw(patterns(depth=2))
    tables = data.draw(tables_for(pattern, CASE))
    request = data.draw(requests())
    start = 0 if request.packing is not None else data.draw(st.integers(0, request.q_offset))
    assert_says_the_same(pattern, request, start, tables)


@settings(max_examples=30, deadline=None)
@given(requests())
def test_patterns_from_the_first_token_on(request: MaskRequest) -> None:
    shifted = [index - left_padding[b] for index in (q_idx, kv_idx)]
    for mask in (causal & (kv_idx < 2), causal & (q_idx - kv_idx < 3), causal & (shifted[0] // 3 == shifted[1] // 3)):
        assert_says_the_same(as_pattern(mask), request, 0, {})
        assert_says_the_same(as_pattern(mask), request, 0 if request.packing is not None else request.q_offset, {})


def tables_of(mask: Any, **form: bool) -> set[str]:
    return set(derive(as_pattern(mask), DerivedForm(padded=True, **form)).tables)


def test_only_padding_between_tokens_asks_for_a_table_of_places() -> None:
    near, anchored = causal & (q_idx - kv_idx < 4), causal & ((q_idx - kv_idx < 4) | (kv_idx < 2))
    blocks = causal & (q_idx // 5 == kv_idx // 5)
    for mask in (near, anchored, blocks, causal):
        assert tables_of(mask) == tables_of(mask, cropped=True) == {"hf_first", "hf_end"}
    assert tables_of(anchored, holes=True) == {"hf_place", "hf_valid"}
    assert tables_of(causal, holes=True) == tables_of(causal, holes=True, slots=True) == {"hf_valid"}
    assert tables_of(near, holes=True, slots=True) == {"hf_valid"}
    assert not derive(as_pattern(anchored), DerivedForm()).tables


def test_an_order_of_tokens_is_an_order_of_slots() -> None:
    """So that a causal pattern keeps its tiles in closed form."""
    derived = derive(as_pattern(causal & (q_idx - kv_idx < 4)), DerivedForm(padded=True, holes=True))
    assert "(q_idx >= kv_idx)" in derived.text and "hf_place[b, q_idx]" in derived.text
    assert tables_of((q_idx > kv_idx) | (kv_idx == q_idx), holes=True) == {"hf_valid"}
    assert "hf_place" in tables_of(q_idx - kv_idx != 1, holes=True)


def test_queries_of_padding_look_nothing_up() -> None:
    bias = sd.table("bias", dtype=float)
    by_distance = sd.attend(causal, score=sd.score + bias[q_idx - kv_idx])
    text = derive(by_distance, DerivedForm(padded=True)).text
    assert "(q_idx >= hf_first[b]) " in text and "(q_idx < hf_end[b])" in text and "bias[q_idx - kv_idx]" in text
    assert "q_idx >= hf_first" not in derive(as_pattern(causal), DerivedForm(padded=True)).text
