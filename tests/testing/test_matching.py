"""The reference against plain attention on random patterns; and the comparison notices wrong attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.execute.compiled import Attention

CAUSAL = sd.kv_idx <= sd.q_idx


@given(data=st.data())
@settings(max_examples=80)
def test_the_reference_on_random_patterns(data: st.DataObject) -> None:
    pattern = data.draw(kit.patterns())
    case = data.draw(kit.shapes(max_len=40))
    tables = data.draw(kit.tables_for(pattern, case))
    q, k, v = data.draw(kit.inputs(case))
    compared = kit.assert_matches_reference(sd.compile(pattern, backend="reference"), q, k, v, q_offset=case.q_offset, **tables)
    learned = {f"d{name}" for name, spec in pattern.tables.items() if spec.learned}
    assert set(compared) == {"out", "lse", "dq", "dk", "dv"} | learned


class Wrong(Attention):
    """The reference with its results changed."""

    def __init__(self, change: Callable[..., Any], pattern: Any = CAUSAL):
        super().__init__(sd.attend(pattern), "reference")
        self.change = change

    def __call__(self, q: Any, k: Any, v: Any, *, return_lse: bool = False, **words: Any) -> Any:
        out, lse = self.change(super().__call__, q, k, v, **words)
        return (out, lse) if return_lse else out


def call(attend: Any, q: Any, k: Any, v: Any, **words: Any) -> Any:
    return attend(q, k, v, return_lse=True, **words)


def nan_in_one_place(attend: Any, *qkv: Any, **words: Any) -> Any:
    out, lse = call(attend, *qkv, **words)
    return torch.where(torch.arange(out.shape[3]) == 3, float("nan"), out), lse


def wrong_gradient(attend: Any, q: Any, k: Any, v: Any, **words: Any) -> Any:
    return call(attend, q, k.detach() + 0.5 * (k - k.detach()), v, **words)


WRONG = {
    "scale": (lambda f, q, *kv, **w: call(f, q * 1.01, *kv, **w), "out"),
    "offset": (lambda f, *qkv, q_offset=0, **w: call(f, *qkv, q_offset=q_offset + 1, **w), "out"),
    "NaN": (nan_in_one_place, r"out\[0, 0, 0, 3\] is nan"),
    "shape": (lambda f, *qkv, **w: tuple(x[:, :, :-1] for x in call(f, *qkv, **w)), "out has shape"),
    "base-2 LSE": (lambda f, *qkv, **w: (call(f, *qkv, **w)[0], call(f, *qkv, **w)[1] / 0.6931), "lse"),
    "gradient": (wrong_gradient, "dk"),
    "bf16 inside": (lambda f, *qkv, **w: tuple(x.float() for x in call(f, *(x.bfloat16() for x in qkv), **w)), "out"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_attention_is_noticed(name: str) -> None:
    change, message = WRONG[name]
    q, k, v = (kit.tensor(1, 2, 9, 16, seed=i) for i in range(3))
    kit.assert_matches_reference(Wrong(call), q, k, v)
    with pytest.raises(kit.Counterexample, match=f"backend 'reference' differs from plain attention: {message}"):
        kit.assert_matches_reference(Wrong(change), q, k, v)


def one_in_the_first_row(attend: Any, *qkv: Any, **words: Any) -> Any:
    out, lse = call(attend, *qkv, **words)
    return out.index_fill(2, torch.tensor([0]), 1.0), lse


def test_an_empty_row_must_be_zero() -> None:
    q, k, v = (kit.tensor(1, 1, 4, 16, seed=i) for i in range(3))
    strict = sd.kv_idx < sd.q_idx
    assert "dv" in kit.assert_matches_reference(strict, q, k, v)
    with pytest.raises(kit.Counterexample, match=r"out\[0, 0, 0, 0\] is 1, wanted 0"):
        kit.assert_matches_reference(Wrong(one_in_the_first_row, strict), q, k, v)


def test_the_snippet_of_a_failure_is_a_program_that_makes_the_same_call() -> None:
    doc = sd.table("doc", monotone=True)
    attn = Wrong(WRONG["scale"][0], CAUSAL & (doc[sd.q_idx] == doc[sd.kv_idx]))
    q, k = (kit.tensor(2, 2, 5, 16, seed=i, layout="transposed") for i in range(2))
    v = torch.randn(2, 2, 5, 64)  # of unknown origin, and too large to be written out
    with pytest.raises(kit.Counterexample) as failure:
        kit.assert_matches_reference(attn, q, k, v, doc=torch.tensor([0, 0, 1, 1, 2]))
    names: dict[str, Any] = {}
    exec(failure.value.snippet, names)  # the pattern itself is innocent, so the program passes
    assert names["attn"].pattern == attn.pattern
    assert torch.equal(names["q"], q)
    assert torch.equal(names["v"], v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tolerances_are_near_the_precision(dtype: torch.dtype) -> None:
    from sparsedsl.testing.numerics import expect

    q, k, v = (kit.tensor(1, 2, 64, 32, seed=i, dtype=dtype) for i in range(3))
    found = expect(sd.attend(CAUSAL), q, k, v, {}, cotangents=(torch.ones(1, 2, 64, 32), torch.ones(1, 2, 64)))
    for name, value in found.values.items():
        size = float(value.abs().max())
        assert float(found.tolerance(name).max()) < 200 * torch.finfo(dtype).eps * (1 + size), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_that_happen_to_be_zero_are_allowed_a_few_units(dtype: torch.dtype) -> None:
    """One key, and none: nothing is rounded on the plain way, and a merge of branches goes another."""
    both = sd.joint(sd.attend(False), sd.attend(sd.q_idx <= sd.b, scale=0.1))
    for seed in range(4):
        q, k, v = (kit.tensor(1, 2, 5, 16, seed=3 * seed + i, dtype=dtype) for i in range(3))
        for backend in ("reference", "tiled"):
            kit.assert_matches_reference(sd.compile(both, backend=backend), q, k, v)


def test_numbers_too_small_for_their_digits_are_no_fault() -> None:
    q, k, v = (kit.tensor(1, 1, 28, 1, seed=i) for i in range(3))
    steep = sd.attend(CAUSAL, score=sd.score + 0.5 * sd.kv_idx**2)
    kit.assert_matches_reference(sd.compile(steep, backend="tiled"), q, k, v, q_offset=27)


@pytest.mark.parametrize("sizes", [(0, 5, 5), (1, 0, 5), (1, 5, 0)])
def test_nothing_is_right_too(sizes: tuple[int, int, int]) -> None:
    batch, rows, keys = sizes
    q, k, v = (torch.ones(batch, 2, n, 8) for n in (rows, keys, keys))
    assert kit.assert_matches_reference(CAUSAL, q, k, v) == ("out", "lse", "dq", "dk", "dv")


def test_weights_that_are_nearly_0_are_allowed_their_roundings() -> None:
    """Gradients of 1e-159: the squares of what they may be off by are no numbers."""
    pattern = sd.attend(sd.q_idx >= sd.kv_idx, score=sd.score + 0.5 * sd.kv_idx**2)
    q, k, v = (kit.tensor(1, 1, 28, 1, seed=seed).double() for seed in range(3))
    kit.assert_matches_reference(sd.compile(pattern, backend="tiled"), q, k, v, q_offset=27)
