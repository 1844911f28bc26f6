"""Systems of the library composed: any two under one softmax or added by gates, and token sparse attention with any inside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.program.branches import as_branch
from sparsedsl.program.effect_rules import LATER_QUERIES
from sparsedsl.program.program_text import read_program
from sparsedsl.testing.program_inputs import named_inputs
from tests.programs.choices_recipe import value_of
from tests.programs.plain_programs import PlainCall, plain

P = sd.patterns
CASE = kit.AttentionCase(batch=1, heads=4, kv_heads=4, q_len=21, kv_len=21, head_dim=4, head_dim_v=4)
WHOLE = replace(CASE, q_len=20, kv_len=20)  # where an input has a row for each block of queries


def csa_of_means(block: int = 4, top_k: int = 2, window: int = 4) -> Any:
    """Compressed sparse attention whose entries and index are means, unless a call gives others."""
    entries, values, index = (
        sd.input(name, f"batch kv_heads keys/{block} {dim}", default=sd.summary(x, block))
        for name, dim, x in (("entries", "head_dim", sd.k), ("values", "value_dim", sd.v), ("index", "head_dim", sd.k))
    )
    picked = sd.top_k(sd.dot(sd.q, index).relu().over_group("sum"), top_k)
    done = (sd.kv_idx + 1) * block <= sd.q_idx + 1
    return sd.joint(P.sliding_window(window), sd.attend(done & picked, k=entries, v=values))


# Of q, k and v alone, so that all of them can run inside of compact().
ALONE = {
    "window": lambda: P.sliding_window(5), "sinks": lambda: P.streaming_llm(3, 2), "dilated": lambda: P.dilated(3, 2),
    "alibi": lambda: P.alibi_window(4, 9), "moba": lambda: P.moba(4, 2), "quest": lambda: P.quest(4, 2),
    "infllm_v2": lambda: P.infllm_v2(4, 2, 4, 3, 1), "csa of means": lambda: csa_of_means(),
    "csa of these means": lambda: P.csa(4, 2, 4, compressed="mean"),
    "pbs": lambda: P.pbs(4, 8, 0.6), "xattention": lambda: P.xattention(2, 4, 0.6),
    "minference": lambda: P.minference(4, 5, 4, columns=1, diagonals=2), "flexprefill": lambda: P.flexprefill(4, 0.6, 0.2),
    "snapkv": lambda: P.snapkv(8, 4, 3), "h2o": lambda: P.h2o(4, 4), "retnet": lambda: P.retnet(4), "based": lambda: P.based(),
}  # fmt: skip
GIVEN = {
    "hsa": lambda: P.hsa(4, 2), "landmark": lambda: P.landmark(4, 2), "hils": lambda: P.hils(4, 2, 8), "nha": lambda: P.nha(3, 4),
    "nsa": lambda: P.nsa(2, 4, 3, 5), "nsa_published": lambda: P.nsa_published(4, 2, 4, 3, 5), "dsa": lambda: P.dsa(5),
    "csa": lambda: P.csa(4, 2, 4), "differential": lambda: P.differential(), "gla": lambda: P.gla(), "kda": lambda: P.kda(),
    "seer_attention": lambda: P.seer_attention(4, 0.2), "vsa": lambda: P.vsa(4, 2),
}  # fmt: skip
ALL = ALONE | GIVEN


def renamed(program: Any, prefix: str) -> Any:
    """The same with inputs of its own: those of two systems may have one name and be of different axes."""
    text, names = sd.Program(program).text, sd.Program(program).inputs
    for name in names:
        text = text.replace(f"input('{name}'", f"input('{prefix}{name}'")
    return read_program(text).root


def composed(name: str, other: str, how: str) -> Any:
    """Two systems, or one inside of token sparse attention."""
    if how == "inside":
        return P.token_sparse(0.3, 4, 3, 6, inside=ALONE[other]())
    parts = [as_branch("the test", ALL[name]()), as_branch("the test", ALL[other]())]
    parts = [renamed(part, prefix) if sd.Program(part).inputs else part for part, prefix in zip(parts, ("a_", "b_"), strict=True)]
    if how == "joint" and all(part.weighable for part in parts):
        return sd.joint(*parts)
    return sd.mix(*parts, weights=sd.input("shares", "batch heads queries 2"))


@given(
    st.sampled_from(sorted(ALL)), st.sampled_from(sorted(ALONE)), st.sampled_from(("joint", "mix", "inside")), st.integers(0, 99)
)
@settings(max_examples=8)
def test_composed_systems_are_what_the_reference_says(name: str, other: str, how: str, seed: int) -> None:
    program = sd.Program(composed(name, other, how))
    assert read_program(program.text) == program
    attn = sd.compile(program.root, backend="tiled", allow=[LATER_QUERIES])
    case = WHOLE if name == "seer_attention" else CASE
    sizes = zip("qkv", (case.q_shape, case.k_shape, case.v_shape), strict=True)
    given = {x: kit.tensor(*shape, seed=seed + n, dtype=torch.float64) for n, (x, shape) in enumerate(sizes)}
    kit.assert_matches_reference(attn, **given, **named_inputs(program, case, seed=seed))
    # What is proved of both parts is proved of the whole, and nothing is proved of a whole with a part that is refuted.
    parts: list[Any] = [ALL[other]()] if how == "inside" else [ALL[name](), ALL[other]()]
    known = {sd.cache_bound(part).causal.status for part in parts}
    said = sd.analyse(program.root, 21, heads=4).causal.status
    if how != "inside":
        assert said == ("PROVED" if known == {"PROVED"} else said) and ("REFUTED" not in known or said == "REFUTED")
    else:
        assert said == "REFUTED"  # tokens are dropped by the last queries


@pytest.mark.parametrize("name", ["infllm_v2", "csa of means"])
def test_inputs_with_defaults_are_made_of_the_tokens_that_are_kept(name: str, backend: str, draw: Any, assert_close: Any) -> None:
    """Inside of token sparse attention, head by head; a call gives them only where they stand outside as well."""
    inside = ALONE[name]()
    attn = sd.compile(P.token_sparse(0.3, 4, 3, 6, inside=inside), backend=backend, allow=[LATER_QUERIES])
    assert not attn.program.inputs
    tokens = {x: draw(1, 4, 30, 4, seed=n) for n, x in enumerate("qkv")}
    out, kept = attn(**tokens), attn.choices(**tokens)["keep_tokens"][0]
    assert kept.shape[1] < 30
    for head, rows in enumerate(kept):
        few = {x: t[:, head : head + 1, rows] for x, t in tokens.items()}
        assert_close(out[:, head : head + 1, rows], sd.compile(inside, backend="reference")(**few))
    with pytest.raises(sd.TableError, match="unexpected arguments compressed_k, entries"):
        attn(**tokens, entries=tokens["k"][:, :, ::4], compressed_k=tokens["k"][:, :, ::4])
    both = sd.mix(P.token_sparse(0.3, 4, 3, 6, inside=inside), inside, weights=sd.input("shares", "batch heads queries 2"))
    given = {x: draw(*made.shape, seed=9) for x, made in made_of(inside, tokens).items()}
    shares = torch.ones(1, 4, 30, 2, dtype=torch.float64)
    wanted = out + sd.compile(inside, backend="reference")(**tokens, **given)
    assert_close(sd.compile(both, backend=backend, allow=[LATER_QUERIES])(**tokens, **given, shares=shares), wanted)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_csa_inside_of_token_sparse_is_what_loops_over_its_text_say(share: float, backend: str, draw: Any) -> None:
    program = sd.Program(P.token_sparse(share, 4, 3, 6, inside=P.csa(4, 2, 5, sink=0.3, compressed="mean")))
    tokens = {x: draw(2, heads, 26, 4, seed=n) for n, (x, heads) in enumerate((("q", 4), ("k", 2), ("v", 2)))}

    def slopes(run: Any) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in tokens.values()]
        out = run(*leaves)
        return [out, *torch.autograd.grad((out * torch.cos(torch.arange(out.numel())).view_as(out)).sum(), leaves)]

    attn = sd.compile(program, backend=backend, allow=[LATER_QUERIES])
    wanted = slopes(lambda q, k, v: plain(program.text, PlainCall(q, k, v, {}, 0))[0])
    for got, want in zip(slopes(attn), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def made_of(program: Any, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What stands for the inputs of a program where a call gives none."""
    attn = sd.compile(program, backend="reference")
    return {name: value_of(attn, node.default, **tokens) for name, node in attn.program.inputs.items()}


def test_inputs_without_a_default_have_no_rows_for_the_tokens_that_are_kept() -> None:
    with pytest.raises(sd.PatternError, match=r"'entries', whose rows are not taken. Make it of these: .* default=sd.summary"):
        P.token_sparse(inside=P.csa(4, 2, 4))
