"""``sd.testing.check`` of what ``sd.models.apply`` returned: decoders are held to causality, encoders and declared prompts are not."""

from __future__ import annotations

import pytest

import sparsedsl as sd

TINY = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
CAUSAL, LEAKY = sd.kv_idx <= sd.q_idx, sd.kv_idx <= sd.q_idx + 1


@pytest.fixture
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TINY)).eval()


def test_layers_of_a_decoder_must_be_causal(llama):
    with sd.models.apply(llama, {0: CAUSAL, 1: LEAKY, 2: CAUSAL}) as applied:
        found = sd.testing.check(applied, examples=1, seed=0)
    assert list(found.reports) == [(0, 2), (1,)]
    assert not found.ok and found.exit_code == 1 and found.reports[0, 2].ok
    (failed,) = (p for p in found.reports[1,].properties if p.status == "FAILS")
    assert failed.name == "causality" and "kv_idx=1" in failed.detail
    assert found.snippet == failed.snippet and "layers 0, 2" in str(found) and found.to_dict()["layers"][1]["layers"] == [1]


def test_a_program_for_prompts_may_read_later_queries(llama):
    with sd.models.apply(llama, {1: sd.patterns.token_sparse(coverage=0.1, probe=8, min_tokens=16)}) as applied:
        ((layers, _, decodes),) = applied.by_layers()
    assert layers == (1,) and not decodes
