"""Random programs over each addition to the language: every backend against the dense meaning and against plain loops over the text form,
with gradients; prefill is decoding, and nothing later reaches a query.

A few cases a run; ``SPARSEDSL_TEST_EXAMPLES=2000 pytest tests/programs/test_additions.py -k 'gated and campaign'`` is a campaign over one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.program.effect_rules import LATER_QUERIES, reasons
from sparsedsl.program.program_text import TEXT_RULES
from tests.programs.plain_programs import WORDS, PlainCall, plain

Tensor = torch.Tensor
ADDITIONS = ("gated", "given", "sums", "keys", "nested", "normalisers", "vectors")
# What the loops do not say: noise, which is a hash of its own, and what no addition is made of.
UNSAID = ("gumbel", "antidiagonal")


def said(program: sd.Program) -> bool:
    """Whether the loops have a word for every node."""
    return not any(node.function in UNSAID for node in program.everything)


def small(**words: Any) -> st.SearchStrategy[kit.AttentionCase]:
    """Queries that stand among the keys."""
    drawn = kit.shapes(max_len=14, max_heads=4, head_dims=(4, 8), **words)
    return drawn.filter(lambda case: case.q_offset + case.q_len <= case.kv_len)


def slopes(run: Any, tensors: Mapping[str, Tensor], lse: bool) -> dict[str, Tensor]:
    """Out, LSE, and the gradients of a function of both to every float of the call."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items() if x.dtype == torch.float64}
    out, total = run({**tensors, **leaves})
    found = {"out": out.detach()} | ({"lse": total.detach()} if lse else {})
    sums = (out * torch.cos(torch.arange(out.numel()).double()).view_as(out)).sum()
    sums = sums + torch.where(total.isfinite(), total, 0.0).sum() if lse else sums
    if sums.requires_grad:
        given = torch.autograd.grad(sums, list(leaves.values()), allow_unused=True, materialize_grads=True)
        found |= {f"d{name}": slope for name, slope in zip(leaves, given, strict=True)}
    return found


def assert_alike(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """As close as some hundred roundings of float64 allow."""
    for name, want in wanted.items():
        one = got[name]
        assert torch.equal(one.isfinite(), want.isfinite()), f"{what}: {name}"
        one, want = (torch.where(x.isfinite(), x, 0.0) for x in (one, want))
        off = float((one - want).abs().amax()) if one.numel() else 0.0
        assert off <= 1e-10 * (1 + float(want.abs().amax() if want.numel() else 0.0)), f"{what}: {name} is {off:.3g} off"


def assert_means_what_its_text_says(
    program: sd.Program, case: kit.AttentionCase, given: Mapping[str, Tensor], backends: Any
) -> int:
    """Every backend that takes a call gives what the loops give; how many do."""
    lse, done = program.root.weighable, 0
    named = {**program.bound, **given}

    def by_loops(tensors: Mapping[str, Tensor]) -> Any:
        return plain(program.text, PlainCall(tensors["q"], tensors["k"], tensors["v"], tensors, case.q_offset))

    wanted = None
    for backend in backends:
        attn = sd.compile(program, backend=backend, allow=[LATER_QUERIES])

        def run(tensors: Mapping[str, Tensor], attn: Any = attn) -> Any:
            made = attn(**tensors, q_offset=case.q_offset, return_lse=lse)
            return made if lse else (made, None)

        try:
            got = slopes(run, given, lse)
        except sd.UnsupportedError as refusal:
            assert "Use" in str(refusal) or "must be a multiple" in str(refusal), refusal
            continue
        wanted = slopes(by_loops, named, lse) if wanted is None else wanted
        assert_alike(got, wanted, f"{backend} at {case!r}\n{program.text}\n")
        done += 1
    return done


def drawn_call(data: st.DataObject, kind: str) -> tuple[sd.Program, kit.AttentionCase, dict[str, Tensor]]:
    """A program about an addition, a case and its tensors."""
    case = data.draw(small(square=data.draw(st.booleans())))
    program = data.draw(kit.programs(heads=case.heads, about=[kind]).filter(said))
    q, k, v = data.draw(kit.inputs(case, dtype=torch.float64))
    return program, case, {"q": q, "k": k, "v": v, **data.draw(kit.program_inputs(program, case))}


@pytest.mark.parametrize("kind", ADDITIONS)
@given(data=st.data())
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_as_loops_over_the_text_say(kind: str, data: st.DataObject) -> None:
    program, case, given = drawn_call(data, kind)
    assert_means_what_its_text_says(program, case, given, ("reference", "tiled"))


def tables_of(data: st.DataObject, program: sd.Program, case: kit.AttentionCase) -> dict[str, Tensor]:
    """The tables that calls of it bring."""
    return {name: x for name, x in data.draw(kit.program_inputs(program, case)).items() if name in program.tables}


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ADDITIONS)
@given(data=st.data())
@settings(max_examples=2, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_the_same_in_cpp(kind: str, data: st.DataObject) -> None:
    """Fewer: each mask and score is compiled."""
    assert_means_what_its_text_says(*drawn_call(data, kind), ("cpp",))


@pytest.mark.parametrize("kind", [kind for kind in ADDITIONS if kind != "keys"])
@given(data=st.data())
@settings(max_examples=2, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_nothing_later_reaches_a_query(kind: str, data: st.DataObject) -> None:
    case = data.draw(kit.shapes(max_len=12, max_heads=2, square=True, head_dims=(4, 8)))
    program = data.draw(kit.programs(heads=case.heads, causal=True, about=[kind]))
    assert LATER_QUERIES not in reasons(program)
    attn, seed = sd.compile(program, backend="tiled"), data.draw(st.integers(0, 99))
    kit.assert_causal(attn, case, seed=seed, **tables_of(data, program, case))


@pytest.mark.parametrize("kind", [kind for kind in ADDITIONS if kind != "keys"])
@given(data=st.data())
@settings(max_examples=2, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_prefill_is_decoding(kind: str, data: st.DataObject) -> None:
    case = data.draw(kit.shapes(max_len=12, max_heads=2, square=True, head_dims=(4, 8)))
    program = data.draw(
        kit.programs(heads=case.heads, causal=True, about=[kind]).filter(lambda program: "ids" not in program.inputs)
    )
    attn, seed = sd.compile(program, backend="tiled"), data.draw(st.integers(0, 99))
    done = kit.assert_prefill_equals_decode(attn, case, chunks=(5,), seed=seed, **tables_of(data, program, case))
    assert done[:3] == ("one call", "chunks of 5", "token by token")


@given(data=st.data())
@settings(max_examples=3, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_keys_chosen_for_all_queries_say_that_they_read_later_ones(data: st.DataObject) -> None:
    """So that nobody takes their prompts for what their pieces give."""
    program = data.draw(kit.programs(about=["keys"]))
    assert LATER_QUERIES in reasons(program)
    with pytest.raises(sd.PatternError, match=LATER_QUERIES):
        kit.assert_prefill_equals_decode(sd.compile(program), kit.AttentionCase(heads=4, q_len=9, kv_len=9))


def test_the_loops_have_a_word_for_every_node_but_those_named() -> None:
    assert {kind.function for kind in TEXT_RULES} - WORDS.keys() == set(UNSAID)
