"""Interval arithmetic holds every value: random expressions over random boxes, against all points of the box."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.analysis.intervals import Intervals, TableRanges
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.testing import AttentionCase, indices, masks, tables_for

LENGTH = 24


def boxes(draw):
    def span():
        low = draw(st.integers(0, LENGTH - 1))
        return low, draw(st.integers(low, LENGTH - 1))

    return span(), span()


def setup(data, expression):
    case = AttentionCase(batch=2, heads=3, kv_heads=3, q_len=LENGTH, kv_len=LENGTH)
    tables = data.draw(tables_for(expression, case))
    (q_low, q_high), (kv_low, kv_high) = boxes(data.draw)
    b, h = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 2))
    ranges = {
        "b": (torch.tensor([b]),) * 2, "h": (torch.tensor([h]),) * 2, "q_len": (LENGTH, LENGTH), "kv_len": (LENGTH, LENGTH),
        "q_idx": (torch.tensor([q_low]), torch.tensor([q_high])), "kv_idx": (torch.tensor([kv_low]), torch.tensor([kv_high])),
    }  # fmt: skip
    env = {"b": b, "h": h, "q_len": LENGTH, "kv_len": LENGTH, **tables}
    env |= {"q_idx": torch.arange(q_low, q_high + 1)[:, None], "kv_idx": torch.arange(kv_low, kv_high + 1)}
    return Intervals(ranges, TableRanges(tables)), env, ranges


@given(data=st.data())
@settings(max_examples=200)
def test_index_ranges_hold_every_value(data):
    index = data.draw(indices())
    intervals, env, ranges = setup(data, index)
    low, high = intervals.range(index.expr)
    values = evaluate(index.expr, env)
    assert bool((values >= low).all()) and bool((values <= high).all()), (index, ranges)


@given(data=st.data())
@settings(max_examples=200)
def test_masks_are_always_and_ever_what_they_say(data):
    mask = data.draw(masks())
    intervals, env, ranges = setup(data, mask)
    always, ever = (bool(torch.as_tensor(v).all()) for v in intervals.range(mask.expr))
    values = evaluate(mask.expr, env)
    assert not always or bool(values.all()), (mask, ranges)
    assert ever or not bool(values.any()), (mask, ranges)


@given(data=st.data())
@settings(max_examples=100)
def test_python_integers_never_wrap(data):
    index = data.draw(indices(tables=False))
    huge = 1 << 70
    symbols = {
        "b": (0, 0),
        "h": (0, 0),
        "q_len": (huge, huge),
        "kv_len": (huge, huge),
        "q_idx": (huge - 3, huge),
        "kv_idx": (0, 2),
    }
    low, high = Intervals(symbols, TableRanges({})).range(index.expr)
    values = {"b": 0, "h": 0, "q_len": huge, "kv_len": huge, "q_idx": huge - 1, "kv_idx": 1}
    exact = index.expr.subs({sd.lang.symbols.INDEX_SYMBOLS[name]: value for name, value in values.items()})
    if exact.is_Integer:
        assert low <= int(exact) <= high, (index, low, int(exact), high)


def test_table_pyramids_hold_the_extremes():
    generator = torch.Generator().manual_seed(0)
    for shape in ((1,), (37,), (5, 64), (33, 70)):
        table = torch.randint(-50, 50, shape, generator=generator)
        t = sd.table("t")
        indices_ = (sd.q_idx,) if len(shape) == 1 else (sd.q_idx, sd.kv_idx)
        read = t[indices_].expr
        for _ in range(200):
            spans = []
            for size in shape:
                low = int(torch.randint(0, size, (), generator=generator))
                spans.append((low, int(torch.randint(low, size, (), generator=generator))))
            ranges = [(torch.tensor([a]), torch.tensor([c])) for a, c in spans]
            low, high = TableRanges({"t": table}).range(read, ranges)
            part = table[tuple(slice(a, c + 1) for a, c in spans)]
            assert int(low) <= int(part.min()) and int(high) >= int(part.max())
