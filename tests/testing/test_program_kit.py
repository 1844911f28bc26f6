"""The assertions about programs: right ones pass, and each kind of fault is noticed and can be seen again."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.execute.compiled import Attention
from sparsedsl.program.effect_rules import LATER_QUERIES
from sparsedsl.program.program_text import TEXT_RULES
from sparsedsl.testing.program_inputs import program_of

CASE = kit.AttentionCase(batch=2, heads=4, kv_heads=2, q_len=20, kv_len=20)
HSA, NHA = sd.patterns.hsa(4, 2), sd.patterns.nha(3, 4)


class Spoiled(Attention):
    """A program run by ``tiled``, with ``spoil(results, q, k, v, words)`` applied to the list of its results."""

    def __init__(self, pattern: Any, spoil: Callable[..., None]):
        super().__init__(sd.Program(pattern), "tiled")
        self.spoil = spoil

    def __call__(self, q: Any, k: Any, v: Any, **words: Any) -> Any:
        made = super().__call__(q, k, v, **words)
        results = list(made) if isinstance(made, tuple) else [made]
        self.spoil(results, q, k, v, words)
        return results[0] if len(results) == 1 else tuple(results)


class OtherChoices(Attention):
    """A program whose last choice is reported for the row before."""

    def choices(self, *tensors: Any, **words: Any) -> Any:
        return {
            label: dataclasses.replace(p, indices=p.indices.roll(1, 2)) for label, p in super().choices(*tensors, **words).items()
        }


def add(value: Any) -> Callable[..., None]:
    """Adds what ``value(q, k, v, words)`` gives to the output."""

    def spoil(results: list[Any], q: Any, k: Any, v: Any, words: Any) -> None:
        results[0] = results[0] + value(q, k, v, words)

    return spoil


def slope_alone(x: torch.Tensor) -> torch.Tensor:
    """0, with the gradient of the sum."""
    return x.sum() - x.sum().detach()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (add(lambda q, k, v, words: 1e-3 * v[:, :, -1:].mean()), r"^out.* up to position \d+ change"),
        (add(lambda q, k, v, words: slope_alone(k)), r"gradients of results up to position \d+ reach k after it"),
        (add(lambda q, k, v, words: slope_alone(words["landmarks"])), "reach landmarks after it"),
        (add(lambda q, k, v, words: slope_alone(q * v.mean())), "gradient of q"),
        (
            lambda results, *_: results.__setitem__(-1, results[-1] + results[-1][:, :, -1:].exp()),
            r"^lse.* up to position \d+ change",
        ),
    ],
)
def test_leaks_of_the_future_are_named(spoil: Any, message: str) -> None:
    kit.assert_causal(sd.compile(HSA, backend="tiled"), CASE)
    with pytest.raises(kit.Counterexample, match=message):
        kit.assert_causal(Spoiled(HSA, spoil), CASE)


def test_states_that_move_are_noticed() -> None:
    def in_place(results: list[Any], q: Any, k: Any, v: Any, words: Any) -> None:
        if words.get("state") is not None:
            next(iter(words["state"].recurrent.values())).keys.add_(1)

    def by_queries(results: list[Any], q: Any, k: Any, v: Any, words: Any) -> None:
        if words.get("return_state"):
            next(iter(results[-1].recurrent.values())).keys.add_(q.sum())

    with pytest.raises(kit.Counterexample, match="state after 10 tokens changes when a call goes on from it"):
        kit.assert_causal(Spoiled(NHA, in_place), CASE)
    with pytest.raises(kit.Counterexample, match="state after 10 tokens changes with the queries"):
        kit.assert_causal(Spoiled(NHA, by_queries), CASE)


def test_calls_that_do_not_fit_are_noticed() -> None:
    with pytest.raises(kit.Counterexample, match="chunks of 7: rows 7 to 13"):
        kit.assert_prefill_equals_decode(Spoiled(HSA, add(lambda q, k, v, words: words["q_offset"])), CASE)
    with pytest.raises(kit.Counterexample, match="growing cache"):
        kit.assert_prefill_equals_decode(Spoiled(HSA, add(lambda q, k, v, words: float(k.shape[2] < 20))), CASE)
    with pytest.raises(kit.Counterexample, match="state, chunks of 7: rows 7 to 13"):
        kit.assert_prefill_equals_decode(Spoiled(NHA, add(lambda q, k, v, words: float(words.get("state") is not None))), CASE)


def test_wrong_results_are_noticed() -> None:
    t = {
        name: kit.tensor(*shape, seed=1, dtype=torch.float64)
        for name, shape in zip("qkv", (CASE.q_shape, CASE.k_shape, CASE.v_shape), strict=True)
    }
    t |= {"retrieval_q": t["q"][:, :2], "landmarks": t["k"][:, :, :5]}
    done = kit.assert_matches_reference(sd.compile(HSA, backend="tiled"), **t)
    assert done == ("choices", "out", "lse", "dq", "dk", "dv", "dretrieval_q", "dlandmarks")
    faults = {
        "out": add(lambda q, k, v, words: 1e-12),
        "lse": lambda results, *_: results.__setitem__(-1, results[-1] + 1e-12 * (len(results) > 1)),
        "dk": add(lambda q, k, v, words: 1e-10 * slope_alone(k)),
        "dlandmarks": add(lambda q, k, v, words: 1e-10 * slope_alone(words["landmarks"])),
    }
    for name, spoil in faults.items():
        with pytest.raises(kit.Counterexample, match=rf"dense meaning: {name}\["):
            kit.assert_matches_reference(Spoiled(HSA, spoil), **t)
    with pytest.raises(kit.Counterexample, match=r"chooses otherwise: top_k\["):
        kit.assert_matches_reference(OtherChoices(sd.Program(HSA), "tiled"), **t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_compared_with_its_own_choices(dtype: torch.dtype) -> None:
    """Nearly equal scores: what is chosen in this precision is not what float64 chooses, and that is no fault; what is computed then is."""
    sizes = zip("qkv", (CASE.q_shape, CASE.k_shape, CASE.v_shape), strict=True)
    t = {name: kit.tensor(*shape, seed=n, dtype=dtype) for n, (name, shape) in enumerate(sizes)}
    t |= {
        "retrieval_q": torch.ones(2, 1, 20, 8),
        "landmarks": 1 + 1e-9 * kit.tensor(2, 1, 5, 8, seed=9, dtype=torch.float64).to(dtype),
    }
    t = {name: x.to(dtype) for name, x in t.items()}
    kit.assert_matches_reference(sd.compile(HSA, backend="tiled"), **t)
    step = torch.finfo(dtype).eps * (16 if dtype == torch.bfloat16 else 100)
    with pytest.raises(kit.Counterexample, match="dense meaning: out"):
        kit.assert_matches_reference(Spoiled(HSA, add(lambda q, k, v, words: step)), **t)


def test_order_weights_and_learning() -> None:
    attn = sd.compile(HSA, backend="tiled")
    kit.assert_permutation_invariant(attn, CASE, chunk=4)
    kit.assert_weights_sum(attn, CASE)
    assert kit.assert_unselected_gradients_zero(attn, CASE) == ("k", "v", "landmarks")
    by_place = add(lambda q, k, v, words: v[:, :, 5, :1].mean())
    with pytest.raises(kit.Counterexample, match="order of past chunks"):
        kit.assert_permutation_invariant(Spoiled(HSA, by_place), CASE, chunk=4)
    with pytest.raises(kit.Counterexample, match="order of tokens within"):
        kit.assert_permutation_invariant(Spoiled(HSA, by_place), CASE, chunk=4, of=("tokens",))
    with pytest.raises(kit.Counterexample, match=r"add up to 1\.001; wanted between"):
        kit.assert_weights_sum(Spoiled(HSA, lambda results, *_: results.__setitem__(0, results[0] * 1.001)), CASE)
    with pytest.raises(kit.Counterexample, match="wanted 0 where nothing is seen"):
        kit.assert_weights_sum(Spoiled(HSA, add(lambda q, k, v, words: (torch.arange(20) < 4).double()[:, None])), CASE)
    for name in ("k", "v", "landmarks"):
        spoil = add(lambda q, k, v, words, name=name: slope_alone({"k": k, "v": v, **words}[name]))
        with pytest.raises(kit.Counterexample, match=rf"row \[.*\] of {name} was neither picked nor attended to"):
            kit.assert_unselected_gradients_zero(Spoiled(HSA, spoil), CASE)


def test_what_does_not_apply_is_said() -> None:
    with pytest.raises(sd.PatternError, match="no query after"):
        kit.assert_permutation_invariant(HSA, kit.AttentionCase(q_len=4, kv_len=4), chunk=4)
    with pytest.raises(sd.PatternError, match="no softmax"):
        kit.assert_weights_sum(sd.linear([0.5] * 4))
    with pytest.raises(sd.PatternError, match="which rows are unused"):
        kit.assert_unselected_gradients_zero(NHA)
    with pytest.raises(sd.PatternError, match="selection reads later queries"):
        kit.assert_prefill_equals_decode(sd.patterns.pbs(4, 8))
    with pytest.raises(sd.PatternError, match="float64 inputs"):
        inside = sd.patterns.token_sparse(0.3, 4, 3, 4, inside=sd.patterns.pbs(4, 8))
        q = torch.ones(1, 1, 16, 8)
        kit.assert_matches_reference(sd.compile(inside, backend="tiled", allow=[LATER_QUERIES]), q, q, q)
    with pytest.raises(sd.PatternError, match="a program is wanted"):
        program_of(sd.kv_idx <= sd.q_idx)


def test_batch_entries_in_another_order() -> None:
    assert kit.assert_equivariant(sd.compile(HSA, backend="tiled"), CASE) == ("batch",)
    own = (sd.kv_idx // 4 + 1) * 4 <= sd.q_idx - sd.b
    assert kit.assert_equivariant(sd.attend(own & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 1, among=own)), CASE) == ()
    with pytest.raises(kit.Counterexample, match="permutation of the batch"):
        kit.assert_equivariant(Spoiled(HSA, add(lambda q, k, v, words: torch.arange(2.0)[:, None, None, None])), CASE, seed=1)


def test_a_snippet_shows_the_failure_again() -> None:
    leaky = sd.attend((sd.kv_idx <= sd.q_idx) & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 4)), 1))
    for assertion in (kit.assert_causal, kit.assert_prefill_equals_decode):
        with pytest.raises(kit.Counterexample) as failure:
            assertion(sd.compile(leaky, backend="tiled"), CASE, seed=3)
        with pytest.raises(kit.Counterexample) as again:
            exec(failure.value.snippet, {})
        assert again.value.what == failure.value.what
    with pytest.raises(kit.Counterexample) as failure:
        kit.assert_permutation_invariant(sd.patterns.hsa(4, 2, "stick_breaking"), CASE, chunk=4, of=("chunks",))
    with pytest.raises(kit.Counterexample) as again:
        exec(failure.value.snippet, {})
    assert again.value.what == failure.value.what


def test_the_battery() -> None:
    report = kit.check(sd.patterns.hsa(4, 2), examples=2, backend="tiled", seed=0)
    assert report.ok and [p.status for p in report.properties] == ["holds"] * 6
    later = kit.check(sd.patterns.pbs(4, 8, 0.5), examples=2, backend="tiled", seed=0)
    assert later.ok and [p.name for p in later.properties if p.status == "not applicable"] == ["causality", "calls", "learning"]
    strict = kit.check(sd.patterns.token_sparse(0.5, 2, 1, 1), examples=9, backend="tiled", seed=0, causal=True)
    assert not strict.ok and "choice keep_tokens" in str(strict) and "assert_causal" in strict.snippet
    with pytest.raises(sd.SparseDSLError, match="are drawn"):
        kit.check(sd.patterns.hsa(4, 2), landmarks=torch.ones(1))


@given(data=st.data())
@settings(max_examples=40)
def test_inputs_fit_their_program(data: st.DataObject) -> None:
    case = data.draw(kit.shapes(max_len=30, max_heads=4))
    program = data.draw(kit.programs(heads=case.heads))
    named = data.draw(kit.program_inputs(program, case))
    assert set(named) - set(program.inputs) == set(program.tables) - set(program.bound)
    assert all(name in named for name, node in program.inputs.items() if node.default is None)
    for name, node in program.inputs.items():
        whole, flags = name in ("ids", "seed") or name.startswith("lists"), name.startswith("bits")
        if name in named:
            assert named[name].dtype == (torch.int64 if whole else torch.bool if flags else torch.float64)
            assert named[name].ndim == len(node.axes)


def test_programs_hold_every_kind_of_node_and_all_that_it_takes() -> None:
    """What the strategy draws reaches each function of the language, and the words that change what it means, often enough to be met."""
    seen: collections.Counter[str] = collections.Counter()

    @given(program=kit.programs())
    @settings(
        max_examples=400, database=None, derandomize=True, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow]
    )
    def collect(program: sd.Program) -> None:
        text = program.text
        seen.update({node.function for node in program.everything})
        seen.update({word for word, sign in SIGNS.items() if re.search(sign, text)})

    collect()
    wanted = {kind.function for kind in TEXT_RULES} | set(SIGNS)
    assert not {word: seen[word] for word in wanted if not seen[word]}, seen


# What programs may say -> how their text shows it.
SIGNS = {
    "pointwise weights": "'pointwise'", "softpick": "'softpick'", "sticks of keys": r"normaliser='stick_breaking'",
    "weights of chunks": "per_chunk", "blocks of the map": "over='map'", "a strategy a head": r"divergence\w*\[b, h\]",
    "decays of keys": r"linear\(log_decay=[a-z]", "decays as factors": r"linear\(decay=[a-z]", "decays of channels": "keys head_dim'",
    "the delta rule": r"linear\(.*beta=", "two keys": r"linear\(.*erase=.*along=",
    "sums of weights": "normalised='sum'", "mLSTM": "normalised='max1'", "taylor": "'taylor'",
    "reads before": "reads='before'", "scores in logits": r"score=.*(dot|plus|scaled|weighted|rectified|grouped)\w*\[b, h",
    "given scores of keys": "given_key_scores", "mass of given scores": r"softmax\(scores=given_scores",
    "choices among chosen": r"top_k\(.*among=.*top_k\w*\[b, h", "windows that overlap": r"keys/\d+\+\d+|stride=",
    "blocks of windows": "overlap",
    "learned rows": r"input\('(learned|windows|keys)_\w+', .*default=", "lists": "'lists_", "bitmaps": "'bits_",
    "short vectors": "PLACE|LISTED",
    "distances": "diagonals", "documents": "documents=",
}  # fmt: skip


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ("gated", "about must be a list of kinds, as in about=\\['gated'\\]; got 'gated'"),
        ([], "about must be a list of kinds"),
        (["gatd"], "about must be one of 'static', .*'gatd'"),
        (["keys"], "'keys' looks at later tokens, and causal=True asks for none that does"),
    ],
)
def test_kinds_that_programs_cannot_be_about(about: Any, words: str) -> None:
    with pytest.raises(sd.PatternError, match=words):
        kit.programs(about=about, causal=True)
