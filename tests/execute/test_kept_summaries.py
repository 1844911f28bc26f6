"""Summaries that are kept between calls: the same results as without, no key read but those that count, and every mix-up noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx

causal = kv_idx <= q_idx
PROGRAMS = {
    "moba": sd.patterns.moba(16, 3),
    "quest": sd.attend(causal & sd.top_k(sd.bound(sd.q, sd.k, 8), 4)),
    "window and choice": causal & ((q_idx - kv_idx < 12) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16)), 2)),
    "zeros at the end": causal & ((q_idx - kv_idx < 12) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16, pad="zero")), 2)),
    "first tokens": causal & ((q_idx - kv_idx < 12) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 16, "first")), 2)),
    "windows": sd.patterns.infllm_v2(length=8, stride=4, select=8, top_k=3, local=1),
    "summaries of summaries": causal
    & ((q_idx - kv_idx < 12) | sd.top_k(sd.dot(sd.q, sd.summary(sd.summary(sd.k, 4, "max"), 4)), 2)),
}


def qkv(tokens: int = 150, batch: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, heads, tokens, 8, generator=generator) for heads in (4, 2, 2))


def step(attn: Any, q: Any, k: Any, v: Any, start: int, end: int, **words: Any) -> torch.Tensor:
    return attn(q[:, :, start:end], k[:, :, :end], v[:, :, :end], q_offset=start, **words)


@pytest.mark.parametrize("backend", ["auto", "tiled", "cpp", "reference"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_steps_with_kept_summaries_are_those_without(name: str, backend: str) -> None:
    attn, (q, k, v) = sd.compile(PROGRAMS[name], backend=backend), qkv()
    kept = attn.keep_summaries()
    ends = [5, 40, 64, 65, 80, *range(81, 115), 150]
    with torch.no_grad():
        for start, end in zip([0, *ends], ends, strict=False):
            found = step(attn, q, k, v, start, end, summaries=kept)
            torch.testing.assert_close(found, step(attn, q, k, v, start, end), atol=1e-5, rtol=0)
            assert kept.tokens == end
    if backend != "reference":
        assert 0 < kept.nbytes


@pytest.mark.parametrize("backend", ["tiled", "cpp"])
@pytest.mark.parametrize("name", ["moba", "quest"])
def test_a_step_reads_no_key_that_it_does_not_attend_to(name: str, backend: str) -> None:
    """Keys of blocks that are over and not chosen may be gone: there is NaN in their place."""
    attn, (q, k, v) = sd.compile(PROGRAMS[name], backend=backend), qkv()
    block = {"moba": 16, "quest": 8}[name]
    with torch.no_grad():
        kept = attn.keep_summaries()
        step(attn, q, k, v, 0, 149, summaries=kept)
        wanted = step(attn, q, k, v, 149, 150)
        (chosen,) = attn.choices(q[:, :, 149:], k, v, q_offset=149).values()
        read = chosen.table().unflatten(1, (2, 2)).any(2)[:, :, 0].repeat_interleave(block, 2)[:, :, :150]
        read[:, :, 144:] = True  # the block of the query
        read[:, :, 143] = True  # by which the sequence is known again
        gone = [x.masked_fill(~read[..., None], float("nan")) for x in (k, v)]
        assert bool(gone[0].isnan().any())
        torch.testing.assert_close(step(attn, q, *gone, 149, 150, summaries=kept), wanted, atol=1e-5, rtol=0)


def test_sequences_are_told_apart_and_batches_followed() -> None:
    attn, (q, k, v) = sd.compile(PROGRAMS["moba"]), qkv()
    with torch.no_grad():
        kept = attn.keep_summaries()
        step(attn, q, k, v, 0, 100, summaries=kept)
        with pytest.raises(sd.ShapeError, match="filled by other keys: token 95 of 'k' is not what it was"):
            step(attn, q, k.flip(0), v, 100, 101, summaries=kept)
        kept.reorder(torch.tensor([1, 0]))
        flipped = [x.flip(0) for x in (q, k, v)]
        torch.testing.assert_close(
            step(attn, *flipped, 100, 101, summaries=kept), step(attn, *flipped, 100, 101), atol=1e-5, rtol=0
        )
        with pytest.raises(sd.ShapeError, match=r"holds 6 blocks of 16 tokens, and 'k' has 90 tokens.*crop\(90\)"):
            step(attn, *flipped, 89, 90, summaries=kept)
        kept.crop(89)
        assert kept.tokens == 89
        torch.testing.assert_close(step(attn, *flipped, 89, 90, summaries=kept), step(attn, *flipped, 89, 90), atol=1e-5, rtol=0)
        with pytest.raises(sd.ShapeError, match=r"had \(batch, heads, dim\) \(2, 2, 8\)"):
            step(attn, q[:1], k[:1], v[:1], 100, 101, summaries=kept)
        kept.reset()
        step(attn, q[:1], k[:1], v[:1], 100, 101, summaries=kept)


def test_what_cannot_be_kept_is_refused() -> None:
    attn, (q, k, v) = sd.compile(PROGRAMS["moba"]), qkv(64)
    kept = attn.keep_summaries()
    with pytest.raises(sd.UnsupportedError, match="no gradient"):
        attn(q, k.requires_grad_(), v, summaries=kept)
    k = k.detach()
    with pytest.raises(sd.ShapeError, match=r"what keep_summaries\(\) of this program made"):
        sd.compile(PROGRAMS["quest"])(q, k, v, summaries=kept)
    with pytest.raises(sd.ShapeError, match=r"what keep_summaries\(\) of this program made"):
        attn(q, k, v, summaries=3)
    for program in (sd.patterns.hsa(), sd.patterns.sliding_window(4)):
        with pytest.raises(sd.UnsupportedError, match="makes no summaries"):
            sd.compile(program).keep_summaries()
    with pytest.raises(sd.UnsupportedError, match="summaries= is not part of a graph"):
        torch.func.vmap(lambda q: attn(q, k[:1], v[:1], summaries=attn.keep_summaries()))(q[:, None])
    with pytest.raises(sd.PatternError, match="that is not taken"):
        sd.input("summaries", "batch")
