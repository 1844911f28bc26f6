"""Systems of the library composed: any two under one softmax or added by gates, and token sparse attention with any inside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.program.branches import as_branch
from sparsedsl.program.effect_rules import LATER_QUERIES
from sparsedsl.program.program_text import read_program
from sparsedsl.testing.program_inputs import named_inputs

P = sd.patterns
CASE = kit.AttentionCase(batch=1, heads=4, kv_heads=4, q_len=21, kv_len=21, head_dim=4, head_dim_v=4)
WHOLE = replace(CASE, q_len=20, kv_len=20)  # where an input has a row for each block of queries

# Of q, k and v alone, so that all of them can run inside of compact().
ALONE = {
    "window": lambda: P.sliding_window(5), "sinks": lambda: P.streaming_llm(3, 2), "dilated": lambda: P.dilated(3, 2),
    "alibi": lambda: P.alibi_window(4, 9), "moba": lambda: P.moba(4, 2), "quest": lambda: P.quest(4, 2),
"pbs": lambda: P.pbs(4, 8, 0.6), "xattention": lambda: P.xattention(2, 4, 0.6),
    "minference": lambda: P.minference(4, 5, 4, columns=1, diagonals=2), "flexprefill": lambda: P.flexprefill(4, 0.6, 0.2),
    "snapkv": lambda: P.snapkv(8, 4, 3), "h2o": lambda: P.h2o(4, 4), "retnet": lambda: P.retnet(4), "based": lambda: P.based(),
}  # fmt: skip
GIVEN = {
    "infllm_v2": lambda: P.infllm_v2(4, 2, 4, 3, 1),
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
