"""Compositions and layer patterns against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsedsl as sd

lengths = st.integers(1, 24)
small = st.integers(0, 6)


@given(lengths, lengths, small, small, st.integers(1, 4))
def test_longformer(assert_pairs, q_len, kv_len, half, anchors, dilation):
    near = [dilation * i for i in range(half + 1)]

    def allowed(q, kv):
        return abs(q - kv) in near or q < anchors or kv < anchors

    assert_pairs(sd.patterns.longformer(2 * half, anchors, dilation=dilation), allowed, q_len, kv_len)


@pytest.mark.parametrize("causal", [False, True])
@given(
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(0, 2),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 99),
)
def test_bigbird(assert_pairs, values, causal, block, length, reach, anchors, drawn, seed):
    random = values(sd.patterns.random_blocks(block, drawn, seed=seed, causal=causal), length, length)

    def allowed(q, kv):
        row, column = q // block, kv // block
        seen = abs(row - column) <= reach or row < anchors or column < anchors or bool(random[q, kv])
        return seen and (kv <= q or not causal)

    options = {
        "window_blocks": 2 * reach + 1,
        "global_blocks": anchors,
        "random_count": drawn,
        "seed": seed,
        "causal": causal,
    }
    assert_pairs(sd.patterns.bigbird(block, **options), allowed, length)


@given(lengths, lengths, st.integers(1, 8), small)
def test_streaming_llm(assert_pairs, q_len, kv_len, window, sinks):
    allowed = lambda q, kv: kv <= q and (kv < sinks or kv > q - window)  # noqa: E731
    assert_pairs(sd.patterns.streaming_llm(window, sinks), allowed, q_len, kv_len)


def test_alibi_window(assert_pairs, values):
    pattern = sd.patterns.alibi_window(4, 3)
    assert_pairs(pattern.mask, lambda q, kv: q - 3 < kv <= q, 10)
    x = torch.zeros(10, 10, dtype=torch.float64)
    assert values(pattern.score, 10, 10, score=x, h=1)[9, 7] == -2 * 2.0**-4
    assert pattern.scale is None and pattern.sink is None


def test_t5(assert_pairs):
    encoder, decoder = sd.patterns.t5(), sd.patterns.t5(decoder=True)
    assert_pairs(encoder.mask, lambda q, kv: True, 6)
    assert_pairs(decoder.mask, lambda q, kv: kv <= q, 6)
    assert encoder.scale == decoder.scale == 1.0
    assert encoder.score.same_as(sd.patterns.t5_bias()) and decoder.score.same_as(sd.patterns.t5_bias(bidirectional=False))
    assert encoder.tables["t5_bias"].learned


CAUSAL = "causal"
LAYERS = {
    # what the configuration of the published model says, layer by layer: a window, a chunk, or all keys up to the query
    "mistral": (lambda layer: sd.patterns.mistral(layer, window=4), ["window"] * 4),
    "gemma2": (lambda layer: sd.patterns.gemma2(layer, window=4), ["window", CAUSAL] * 3),
    "gemma3": (lambda layer: sd.patterns.gemma3(layer, window=4), (["window"] * 5 + [CAUSAL]) * 3),
    "gpt_oss": (lambda layer: sd.patterns.gpt_oss(layer, window=4), ["window", CAUSAL] * 3),
    "llama4": (lambda layer: sd.patterns.llama4(layer, chunk=4), (["chunk"] * 3 + [CAUSAL]) * 2),
}


@pytest.mark.parametrize("model", LAYERS)
def test_layers(assert_pairs, model):
    build, kinds = LAYERS[model]
    allowed = {
        "window": lambda q, kv: q - 4 < kv <= q,
        "chunk": lambda q, kv: kv <= q and q // 4 == kv // 4,
        CAUSAL: lambda q, kv: kv <= q,
    }
    for layer, kind in enumerate(kinds):
        assert_pairs(build(layer).mask, allowed[kind], 11)


def test_defaults_are_those_of_the_published_configurations():
    transformers = pytest.importorskip("transformers")
    gemma2 = transformers.Gemma2Config()
    assert sd.patterns.gemma2(0) == sd.patterns.gemma2(
        0,
        window=gemma2.sliding_window,
        cap=gemma2.attn_logit_softcapping,
        query_scalar=gemma2.query_pre_attn_scalar,
    )
    for name, config in {"gemma2": gemma2, "gpt_oss": transformers.GptOssConfig()}.items():
        for layer, kind in enumerate(config.layer_types):
            pattern = getattr(sd.patterns, name)(layer, window=config.sliding_window)
            assert pattern == getattr(sd.patterns, name)(layer)
            assert (kind == "full_attention") == pattern.mask.same_as(sd.patterns.causal())
    gemma3 = transformers.Gemma3TextConfig()
    for layer, kind in enumerate(gemma3.layer_types):
        assert (kind == "full_attention") == sd.patterns.gemma3(layer).mask.same_as(sd.patterns.causal())
    llama4 = transformers.Llama4TextConfig()
    assert sd.patterns.llama4(0) == sd.patterns.llama4(0, chunk=llama4.attention_chunk_size)
    for layer, kind in enumerate(llama4.layer_types):
        assert (kind == "full_attention") == sd.patterns.llama4(layer).mask.same_as(sd.patterns.causal())
    assert sd.patterns.mistral(0) == sd.patterns.mistral(0, window=transformers.MistralConfig().sliding_window)


def test_what_the_layers_have_besides_the_mask():
    gemma2, gemma3, gpt_oss = sd.patterns.gemma2(0), sd.patterns.gemma3(0), sd.patterns.gpt_oss(1)
    assert gemma2.score.same_as(sd.patterns.softcap(50)) and gemma2.scale == gemma3.scale == 256**-0.5
    assert sd.patterns.gemma2(0, query_scalar=144).scale == 144**-0.5
    assert not gemma3.has_score and gpt_oss.scale is None
    assert gpt_oss.tables["sinks"].learned and str(gpt_oss.sink) == "sinks[h]"


@pytest.mark.parametrize("h", [0, 1])
def test_duo_attention(assert_pairs, h):
    def allowed(q, kv):
        return kv <= q and (h == 0 or q - kv < 5 or kv < 3)

    assert_pairs(sd.patterns.duo_attention(5, 3), allowed, 20, h=h, retrieval=torch.tensor([True, False]))


def test_retained(assert_pairs):
    stays = torch.tensor([[[n % 3 == 0 for n in range(12)]]])
    assert_pairs(sd.patterns.retained(12, 2), lambda q, kv: kv <= q and (kv >= 10 or kv % 3 == 0), 20, stays=stays)
    by_entry = sd.patterns.retained(sd.table("prompt")[sd.b])
    assert_pairs(by_entry, lambda q, kv: kv <= q and (kv >= 9 or kv % 3 == 0), 20, stays=stays, prompt=torch.tensor([9]))
