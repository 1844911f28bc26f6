"""Causality, calls and order: right patterns pass, and each kind of leak or dependence is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.execute.compiled import Attention

CAUSAL = sd.kv_idx <= sd.q_idx
WINDOW = CAUSAL & (sd.q_idx - sd.kv_idx < 5)
SMALL = kit.AttentionCase(heads=2, kv_heads=1, q_len=9, kv_len=9)


class Spoiled(Attention):
    """The reference, with ``spoil(out, lse, q, k, v, q_offset)`` applied to its results."""

    def __init__(self, spoil: Any, pattern: Any = CAUSAL):
        super().__init__(sd.attend(pattern), "reference")
        self.spoil = spoil

    def __call__(self, q: Any, k: Any, v: Any, *, return_lse: bool = False, q_offset: int = 0, **words: Any) -> Any:
        out, lse = super().__call__(q, k, v, return_lse=True, q_offset=q_offset, **words)
        out, lse = self.spoil(out, lse, q, k, v, q_offset)
        return (out, lse) if return_lse else out


@given(data=st.data())
@settings(max_examples=40)
def test_random_causal_patterns(data: st.DataObject) -> None:
    pattern = data.draw(kit.patterns(causal=True))
    case = data.draw(kit.shapes(max_len=20))
    kit.assert_causal(pattern, case, seed=data.draw(st.integers(0, 99)), **data.draw(kit.tables_for(pattern, case)))


@given(data=st.data())
@settings(max_examples=25)
def test_random_patterns_cut_into_calls(data: st.DataObject) -> None:
    pattern = data.draw(kit.patterns().filter(lambda p: "q_len" not in p.text))
    case = data.draw(kit.shapes(max_len=16, max_heads=2))
    tables = data.draw(kit.tables_for(pattern, case))
    done = kit.assert_prefill_equals_decode(pattern, case, chunks=(3, 5), seed=data.draw(st.integers(0, 99)), **tables)
    assert done[:4] == ("one call", "chunks of 3", "chunks of 5", "token by token")


@given(data=st.data())
@settings(max_examples=40)
def test_random_patterns_reordered(data: st.DataObject) -> None:
    pattern = data.draw(kit.patterns())
    case = data.draw(kit.shapes(max_len=20))
    done = kit.assert_equivariant(pattern, case, seed=data.draw(st.integers(0, 99)), **data.draw(kit.tables_for(pattern, case)))
    symbols = {str(s) for expr in pattern.exprs for s in expr.free_symbols}
    assert done == tuple(name for name, symbol in (("batch", "b"), ("heads", "h")) if symbol not in symbols)


LEAKS = {
    "mask": (sd.attend(sd.kv_idx <= sd.q_idx + 1), "The mask allows b=0, h=0, q_idx=0, kv_idx=1"),
    "one head": (sd.attend((sd.kv_idx <= sd.q_idx) | (sd.h == 1)), "The mask allows b=0, h=1, q_idx=0, kv_idx=1"),
    "far away": (
        sd.attend((sd.kv_idx <= sd.q_idx) | (sd.kv_idx == sd.kv_len - 1)),
        "The mask allows b=0, h=0, q_idx=0, kv_idx=8",
    ),
    "value": (Spoiled(lambda o, lse, q, k, v, n: (o + 1e-6 * v.mean(), lse)), "comes in otherwise"),
    "query": (Spoiled(lambda o, lse, q, k, v, n: (o + 1e-6 * q.mean(), lse)), "comes in otherwise"),
    "LSE": (Spoiled(lambda o, lse, q, k, v, n: (o, lse + 1e-4 * k.mean())), "lse up to position"),
    "gradient": (Spoiled(lambda o, lse, q, k, v, n: (o + (v.sum() - v.sum().detach()), lse)), "gradients of the results"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_leaks_are_noticed(name: str) -> None:
    attn, message = LEAKS[name]
    with pytest.raises(kit.Counterexample, match=message):
        kit.assert_causal(attn, SMALL)


def test_a_leak_through_gradients_of_what_came_before() -> None:
    def spoil(out: Any, lse: Any, q: Any, k: Any, v: Any, n: int) -> Any:
        factor = v[:, :, -1:].mean().detach()
        return out + factor * (v[:, :, :1].sum() - v[:, :, :1].sum().detach()), lse

    with pytest.raises(kit.Counterexample, match="gradients of v up to position 0 change when q, k and v after it change"):
        kit.assert_causal(Spoiled(spoil), SMALL)


def test_a_snippet_shows_the_leak_again() -> None:
    doc = sd.table("doc")
    with pytest.raises(kit.Counterexample) as failure:
        kit.assert_causal(doc[sd.q_idx] == doc[sd.kv_idx], SMALL, seed=3, doc=torch.tensor([0] * 4 + [1] * 5))
    with pytest.raises(kit.Counterexample) as again:
        exec(failure.value.snippet, {})
    assert str(again.value) == str(failure.value)


def test_a_decode_row_may_see_everything() -> None:
    kit.assert_causal(WINDOW, kit.AttentionCase(heads=2, q_len=1, kv_len=33, q_offset=32))


@pytest.mark.parametrize("pattern", [CAUSAL, WINDOW, sd.attend(CAUSAL, score=sd.score - 0.5 * (sd.q_idx - sd.kv_idx), sink=0.0)])
def test_cutting_a_causal_pattern(pattern: Any) -> None:
    assert kit.assert_prefill_equals_decode(pattern, chunks=(4,))[-1] == "growing cache"


def test_a_pattern_that_looks_ahead_needs_all_keys_in_each_call() -> None:
    assert kit.assert_prefill_equals_decode(abs(sd.q_idx - sd.kv_idx) < 3)[-1] == "token by token"
    assert kit.assert_prefill_equals_decode(CAUSAL & (sd.kv_idx < sd.kv_len - 2))[-1] == "token by token"


def test_a_dropped_offset_is_noticed() -> None:
    class NoOffset(Attention):
        def __call__(self, *qkv: Any, q_offset: int = 0, **words: Any) -> Any:
            return super().__call__(*qkv, **words)

    attn = NoOffset(sd.attend(WINDOW), "reference")
    with pytest.raises(kit.Counterexample, match="chunks of 7: rows 7 to 13 with 24 keys: out"):
        kit.assert_prefill_equals_decode(attn)


def test_an_error_that_only_a_growing_cache_shows() -> None:
    spoiled = Spoiled(lambda o, lse, q, k, v, n: (o + (k.shape[2] < 24), lse))
    with pytest.raises(kit.Counterexample, match="growing cache: rows 0 to 0 with 1 keys"):
        kit.assert_prefill_equals_decode(spoiled)


def test_patterns_of_the_end_of_a_call_are_refused() -> None:
    with pytest.raises(sd.PatternError, match=r"reads q_len, the position after the last query of a call.*Use kv_len"):
        kit.assert_prefill_equals_decode(sd.kv_idx < sd.q_len)


ORDERS = {
    "batch": lambda o, lse, q, k, v, n: (o + torch.arange(o.shape[0])[:, None, None, None], lse),
    "heads": lambda o, lse, q, k, v, n: (o + torch.arange(o.shape[1])[:, None, None], lse),
}


@pytest.mark.parametrize("name", ORDERS)
def test_dependence_on_the_order_is_noticed(name: str) -> None:
    with pytest.raises(kit.Counterexample, match=f"do not follow a permutation of the {name}"):
        kit.assert_equivariant(Spoiled(ORDERS[name]), kit.AttentionCase(batch=3, heads=6, kv_heads=3, q_len=4, kv_len=4))
