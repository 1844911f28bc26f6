"""Linear attention as a declaration: what is refused and how, its text, what is said of it, and random programs against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.program.program_text import read_program
from sparsedsl.testing.program_inputs import draw_inputs

Tensor = torch.Tensor
G, VECTOR, BETA = (sd.input(n, f"batch heads keys{more}") for n, more in (("g", ""), ("g", " head_dim"), ("beta", "")))
WRITE = sd.input("i", "batch heads keys")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no decay": (
        lambda: sd.linear(),
        "give one of decay and log_decay; got neither. A state that fades not at all has decay=1.0",
    ),
    "both": (lambda: sd.linear(0.5, log_decay=G), "give one of decay and log_decay; got both"),
    "a mask": (
        lambda: sd.linear(sd.kv_idx <= sd.q_idx),
        "a mask has no place in it. Attend to a window beside it: sd.mix(window",
    ),
    "words": (lambda: sd.linear("half"), "decay must be a number, one number for each query head, or an input with the axes"),
    "above 1": (lambda: sd.linear(1.5), "decay must be one factor in (0, 1]"),
    "a positive logarithm": (lambda: sd.linear(log_decay=0.5), "log_decay must be at most 0"),
    "by queries": (lambda: sd.linear(log_decay=sd.input("g", "batch heads queries")), "Gates are counted by keys"),
    "in blocks": (lambda: sd.linear(log_decay=sd.input("g", "batch heads keys/64")), "repeat them for the keys of a block"),
    "own heads": (
        lambda: sd.linear(log_decay=sd.input("g", "batch gates keys")),
        "H one of one, kv_heads, heads, value_heads; got",
    ),
    "another width": (
        lambda: sd.linear(log_decay=sd.input("g", "batch heads keys 4")),
        "has the last axis of the keys, 'head_dim'",
    ),
    "a vector beta": (lambda: sd.linear(1.0, beta=VECTOR), "beta must be an input with the axes 'batch H keys'"),
    "beta and a sum": (
        lambda: sd.linear(1.0, beta=BETA, normalised="sum"),
        "leave out normalised, and normalise the output by itself",
    ),
    "beta and taylor": (lambda: sd.linear(1.0, beta=BETA, features="taylor"), "use features='l2' with beta"),
    "taylor and channels": (
        lambda: sd.linear(log_decay=VECTOR, features="taylor"),
        "use one with the axes 'batch heads keys'",
    ),
    "before and beta": (lambda: sd.linear(1.0, beta=BETA, reads="before"), "leave one of them out"),
    "erase and beta": (lambda: sd.linear(1.0, beta=BETA, erase=VECTOR), "multiply erase by it"),
    "along alone": (lambda: sd.linear(1.0, along=VECTOR), "give erase too"),
    "erase, normalised": (
        lambda: sd.linear(1.0, erase=VECTOR, features="elu1", normalised="sum"),
        "leave out normalised, or erase",
    ),
    "erase, taylor": (lambda: sd.linear(1.0, erase=VECTOR, features="taylor"), "makes keys wider than erase"),
    "erase, before": (lambda: sd.linear(1.0, erase=VECTOR, reads="before"), "reads='before' and erase are of different rules"),
    "erase a key": (lambda: sd.linear(1.0, erase=BETA), "erase must be an input with the axes 'batch H keys head_dim'"),
    "bonus after": (lambda: sd.linear(1.0, bonus=sd.input("u", "heads head_dim")), "add reads='before'"),
    "another bonus": (
        lambda: sd.linear(1.0, reads="before", bonus=BETA),
        "bonus must be an input with the axes 'heads head_dim'",
    ),
    "write alone": (lambda: sd.linear(1.0, write=WRITE), "add normalised='max1'"),
    "reads": (lambda: sd.linear(1.0, reads="during"), "reads must be one of 'after', 'before'"),
    "features": (lambda: sd.linear(1.0, features="elu"), "features must be one of 'l2', 'elu1', 'relu', 'taylor'"),
    "eps": (lambda: sd.linear(1.0, eps=-1.0), "eps must be a number of at least 0"),
    "joint": (
        lambda: sd.joint(sd.linear(log_decay=G), sd.kv_idx <= sd.q_idx),
        "has no softmax and so no weight in one; add it with mix()",
    ),
    "joint relu": (
        lambda: sd.joint(sd.linear(1.0, features="relu", normalised="sum"), sd.kv_idx <= sd.q_idx),
        "add it with mix()",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_meaning_is_refused_by_name(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(sd.PatternError) as error:
        make()
    assert words in str(error.value)


def qkv(heads: int = 2, kv_heads: int = 2, value_heads: int = 2, length: int = 6) -> dict[str, Tensor]:
    return {
        "q": random(1, heads, length, 4),
        "k": random(1, kv_heads, length, 4, seed=1),
        "v": random(1, value_heads, length, 4, seed=2),
    }


CALLS: dict[str, tuple[Any, dict[str, Tensor], str]] = {
    "positive": (sd.linear(log_decay=G), {**qkv(), "g": torch.ones(1, 2, 6)}, "log_decay must be at most 0"),
    "NaN": (sd.linear(log_decay=G), {**qkv(), "g": torch.full((1, 2, 6), torch.nan)}, "log_decay must be at most 0"),
    "a factor above 1": (sd.linear(decay=G), {**qkv(), "g": torch.full((1, 2, 6), 1.5)}, "factors from 0 to 1; got values from 1.5"),
    "strength": (
        sd.linear(1.0, normalised="max1", write=WRITE), {**qkv(), "i": torch.full((1, 2, 6), 700.0)}, "a logarithm, of at most 600",
    ),
    "decays": (sd.linear([0.5] * 3), qkv(), "declared with 3 decays; q has 2 heads"),
    "one decay in a list": (sd.linear([0.5]), qkv(), "declared with 1 decays; q has 2 heads"),
    "heads": (sd.linear(log_decay=sd.input("g", "batch value_heads keys")), {**qkv(2, 2, 3), "g": -torch.ones(1, 3, 6)}, "k has 2 heads"),
    "more values elsewhere": (
        sd.mix(sd.linear(1.0), sd.kv_idx <= sd.q_idx, weights=sd.input("w", "batch heads queries 2")),
        {**qkv(2, 2, 4), "w": random(1, 2, 6, 2)}, "only a program that is one linear() may have more values than keys",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_calls_that_do_not_fit(case: str, backend: str) -> None:
    program, given, words = CALLS[case]
    with pytest.raises(sd.ShapeError) as error:
        sd.compile(program, backend=backend)(**given)
    assert words in str(error.value)


FORMS: dict[str, Any] = {
    "scalar": sd.linear(log_decay=G),
    "factors": sd.linear(decay=G),
    "vector": sd.linear(log_decay=VECTOR, scale=0.5),
    "delta": sd.linear(log_decay=G, beta=BETA, features="l2"),
    "kda": sd.linear(log_decay=VECTOR, beta=BETA, features="l2"),
    "delta net": sd.linear([0.5, 0.7, 0.9, 1.0], beta=BETA, features="l2"),
    "documents": sd.linear(log_decay=G, beta=BETA, features="l2", documents=sd.input("ids", "batch keys")),
    "before": sd.linear(log_decay=VECTOR, reads="before", bonus=sd.input("u", "heads head_dim")),
    "erase": sd.linear(log_decay=VECTOR, erase=sd.input("erase", "batch kv_heads keys head_dim"), features="l2"),
    "rwkv7": sd.linear(
        log_decay=VECTOR,
        erase=sd.input("erase", "batch heads keys head_dim"),
        along=sd.input("along", "batch heads keys head_dim"),
        scale=1.0,
    ),
    "erase, documents": sd.linear(
        0.9,
        erase=sd.input("erase", "batch one keys head_dim"),
        along=sd.input("along", "batch heads keys head_dim"),
        documents=sd.input("ids", "batch keys"),
    ),
    "before, a bonus a key head": sd.linear(log_decay=G, reads="before", bonus=sd.input("u", "kv_heads head_dim")),
    "before, documents": sd.linear(
        log_decay=sd.input("g", "batch kv_heads keys"), reads="before", documents=sd.input("ids", "batch keys")
    ),
    "before, shared": sd.linear(
        log_decay=sd.input("g", "batch kv_heads keys head_dim"), reads="before", bonus=sd.input("u", "heads head_dim")
    ),
    "before, constants": sd.linear(0.9, reads="before"),
    "elu1": sd.linear(0.9, features="elu1", normalised="sum"),
    "relu": sd.linear(log_decay=G, features="relu", normalised="sum"),
    "taylor": sd.linear(1.0, features="taylor", normalised="sum", eps=1e-3),
    "mLSTM": sd.linear(log_decay=G, normalised="max1", write=WRITE),
    "joint": sd.joint(sd.linear(log_decay=G, features="elu1", normalised="sum"), sd.patterns.sliding_window(4)),
    "mix": sd.mix(sd.linear(log_decay=G), sd.patterns.sliding_window(4), weights=sd.input("w", "batch heads queries 2")),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_text_reads_back(form: str) -> None:
    program = sd.Program(FORMS[form])
    assert read_program(program.text) == program


@pytest.mark.parametrize("form", FORMS)
def test_it_is_proved_causal(form: str) -> None:
    assert sd.analyse(sd.Program(FORMS[form]), 32, heads=4).causal.status == "PROVED"


CASE = kit.AttentionCase(batch=2, heads=4, kv_heads=2, q_len=11, kv_len=11)


def assert_same_everywhere(program: Any, case: kit.AttentionCase, seed: int) -> None:
    """Output and all gradients, on what runs it in torch and on what ``auto`` takes, are those of the reference."""
    given = draw_inputs(sd.Program(program), case, seed, {})
    results = []
    for backend in ("reference", "tiled", "auto"):
        leaves = {name: x.clone().requires_grad_() for name, x in given.items() if x.is_floating_point()}
        out = sd.compile(program, backend=backend)(**{**given, **leaves}, q_offset=case.q_offset)
        weights = torch.cos(torch.arange(out.numel()).double()).view_as(out)
        grads = torch.autograd.grad((out * weights).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        results.append([out.detach(), *grads])
    for name, wanted, *found in zip(["out", *leaves], *results, strict=True):
        for one in found:
            assert float((one - wanted).abs().max()) <= 1e-10 * (1 + float(wanted.abs().max())), name


@pytest.mark.parametrize("form", FORMS)
def test_the_fast_paths_give_what_the_reference_gives(form: str) -> None:
    assert_same_everywhere(FORMS[form], CASE, 3)


@pytest.mark.parametrize("form", ["kda", "before", "rwkv7", "mix"])
def test_prefill_is_decoding(form: str) -> None:
    attn = sd.compile(FORMS[form], backend="tiled")
    done = kit.assert_prefill_equals_decode(attn, CASE, chunks=(5,))
    assert {"growing cache", "state, chunks of 5", "state, token by token"} <= set(done)


def test_T28_nothing_later_reaches_a_query() -> None:
    for form in ("kda", "before", "rwkv7"):
        kit.assert_causal(sd.compile(FORMS[form], backend="tiled"), CASE)


@st.composite
def programs(draw: Any) -> Any:
    """Linear attentions of every kind that goes together."""
    gate = draw(st.sampled_from([0.8, [0.5, 0.7, 0.9, 1.0], G, VECTOR, sd.input("g", "batch one keys")]))
    words: dict[str, Any] = {"decay" if draw(st.booleans()) or not hasattr(gate, "axes") else "log_decay": gate}
    words["documents"] = draw(st.none() | st.just(sd.input("ids", "batch keys")))
    words["scale"] = draw(st.none() | st.just(0.7))
    rule = draw(st.sampled_from(["plain", "delta", "before", "sum", "max1"]))
    words["features"] = draw(st.sampled_from([None, "l2", "elu1", "relu"]))
    if rule == "delta":
        words |= {"beta": draw(st.sampled_from([BETA, sd.input("beta", "batch kv_heads keys")])), "features": "l2"}
    elif rule == "before":
        bonuses = [None, *(sd.input("u", f"{heads} head_dim") for heads in ("kv_heads", "heads"))]
        words |= {"reads": "before", "bonus": draw(st.sampled_from(bonuses))}
    elif rule == "sum":
        words |= {"normalised": "sum", "eps": 0.5, "features": draw(st.sampled_from(["elu1", "relu"]))}
    elif rule == "max1":
        words |= {"normalised": "max1", "write": draw(st.none() | st.just(WRITE))}
    return sd.linear(**words)


@hypothesis.given(programs(), st.sampled_from([(1, 1), (5, 5), (17, 17), (6, 17)]), st.integers(0, 99))
@hypothesis.settings(max_examples=30)
def test_random_programs(program: Any, lengths: tuple[int, int], seed: int) -> None:
    case = kit.AttentionCase(batch=2, heads=4, kv_heads=2, q_len=lengths[0], kv_len=lengths[1], q_offset=lengths[1] - lengths[0])
    assert_same_everywhere(program, case, seed)


def test_auto_takes_C_where_it_can_and_says_so() -> None:
    assert "linear" in str(sd.compile(FORMS["kda"]).explain(4096, heads=4, head_dim=128))
    assert sd.compile(FORMS["kda"]).explain(4096, heads=4, head_dim=128).plan.backend == "cpp"
    assert sd.compile(FORMS["before"]).explain(4096, heads=4, head_dim=128).plan.backend == "cpp"


def test_backends_that_cannot_say_who_can() -> None:
    attn = sd.compile(FORMS["kda"], backend="flex")
    given = draw_inputs(attn.program, CASE, 3, {}, dtype=torch.float32)
    with pytest.raises(sd.UnsupportedError, match="FlexAttention has no state"):
        attn(**given)


def test_second_derivatives_are_refused() -> None:
    """Also where features could be differentiated again by themselves, and would give a part of them."""
    for backend in ("tiled", "cpp"):
        attn = sd.compile(FORMS["kda"], backend=backend)
        given = {name: x.requires_grad_() for name, x in draw_inputs(attn.program, CASE, 3, {}).items()}
        (slope,) = torch.autograd.grad(attn(**given).sum(), given["q"], create_graph=True)
        with pytest.raises(sd.UnsupportedError, match="no second derivatives"):
            slope.sum().backward()


def test_cost_and_state() -> None:
    report = sd.analyse(sd.Program(FORMS["delta"]), 1024, heads=4, head_dim=32)
    plain = sd.analyse(sd.Program(FORMS["scalar"]), 1024, heads=4, head_dim=32)
    assert report.flops > plain.flops > 0
    bound = sd.cache_bound(sd.patterns.gated_delta())
    assert bound.kind == "state" and bound.recent == 0
    # 32 heads with a state of 128 x 128 in float32: 2 MiB, whatever the length.
    assert bound.bytes(10**6, kv_heads=16, head_dim=128, sizes={"value_heads": 32}) == 2 << 20
