"""Bounds of programs: the union of windows, the bytes of a state as a call makes it, and what choosing reads."""

from __future__ import annotations

import pytest
import torch

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx

causal = kv_idx <= q_idx


def test_a_program_of_windows_needs_what_they_need_together() -> None:
    near, anchored = causal & (q_idx - kv_idx < 8), causal & (kv_idx < 3)
    program = sd.joint(sd.attend(near), sd.attend(anchored))
    assert sd.cache_bound(program).kind == "first + ring"
    assert sd.cache_bound(program).keep(20).tolist() == [0, 1, 2, *range(13, 20)]


def test_a_pattern_in_a_program_is_that_pattern() -> None:
    mask = causal & (q_idx - kv_idx < 8)
    assert str(sd.cache_bound(sd.Program(sd.attend(mask)))) == str(sd.cache_bound(mask))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bytes_of_a_state_are_those_that_calls_return(dtype: str) -> None:
    q, k, gate = torch.randn(2, 4, 50, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 8)
    v = torch.randn(2, 2, 50, 12)
    q, k, v, gate = (x.to(getattr(torch, dtype)) for x in (q, k, v, gate))
    for program, more in (
        (sd.patterns.ring_linear([0.9, 0.8, 0.7, 0.6]), {}),
        (sd.patterns.nha(slots=8, window=16), {"gate": gate}),
        (sd.patterns.nha(slots=8, window=16, first=3), {"gate": gate}),
        (sd.patterns.nha(slots=8, window=16, first=3), {"gate": gate, "k_rope": k, "q_rope": q}),
    ):
        found = sd.cache_bound(program)
        assert found.kind == "state"
        for tokens in (7, 50):
            given = {name: x[:, :, :tokens] for name, x in more.items()}
            _, state = sd.compile(program)(q[:, :, :tokens], k[:, :, :tokens], v[:, :, :tokens], return_state=True, **given)
            wanted = found.bytes(tokens, 2, 16, dtype, head_dim_v=12, batch=2, heads=4, given=tuple(more))
            assert state.nbytes == wanted, (found, tokens)


def test_programs_that_choose_grow_and_say_what_a_step_reads() -> None:
    window = causal & (q_idx - kv_idx < 96)
    chosen = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 64)), 4)
    found = sd.cache_bound(causal & (window | chosen))
    assert found.kind == "grows" and "chooses or sums up among all tokens" in found.verdict.reason
    assert found.step == "one row for each 64 keys, 4 blocks of 64 keys, ring of 95 keys"
    assert str(found).endswith(f"a step reads {found.step}")


def test_programs_for_whole_prompts_grow() -> None:
    assert sd.cache_bound(sd.patterns.token_sparse()).kind == "grows"


def test_explain_says_what_must_be_kept() -> None:
    window = sd.compile(causal & (q_idx - kv_idx < 512)).explain(
        1, 32768, q_offset=32767, heads=8, kv_heads=2, head_dim=64, dtype="float32"
    )
    wanted = "ring: a ring of 512 keys; PROVED (for all indices, lengths and tables); 511 KiB for 32,768 tokens, 1 KiB a token"
    assert window.cache.startswith(wanted) and f"  cache            {wanted}" in str(window)
    by_head = sd.compile(causal & (q_idx - kv_idx < sd.table("win")[sd.h])).explain(64, heads=2, win=torch.tensor([4, 8]))
    assert "a ring of win[h] keys" in by_head.cache
    state = sd.compile(sd.patterns.nha(slots=8, window=16)).explain(64, heads=4, kv_heads=2, head_dim=16)
    assert state.cache.startswith("state: of constant size, with the last 16 tokens; ")
    assert "a step reads" in sd.compile(sd.patterns.moba(16, 3)).explain(64, heads=4).cache


def test_what_is_no_pattern_is_refused() -> None:
    with pytest.raises(sd.PatternError, match="pattern must be a Mask or a Pattern"):
        sd.cache_bound(3)
