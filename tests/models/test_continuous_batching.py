"""transformers' continuous batching of models with patterns: every request gets the tokens that it gets alone."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import sparsedsl as sd
from sparsedsl.models.attention_function import attend
from tests.models import families

PAGE, NEW = 4, 9
# More than a step of 32 tokens holds: prompts are cut, and stand beside others that decode already.
PROMPTS = [torch.randint(2, 64, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 40, 23, 9)]
GREEDY = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
CAUSAL = sd.kv_idx <= sd.q_idx
# Absolute positions within a window: keys of a ring must be known by where they stand.
THIRDS = sd.patterns.sliding_window(5) & ((sd.kv_idx % 3 == 0) | (sd.q_idx - sd.kv_idx < 2))
STREAM = sd.patterns.streaming_llm(6, sink_count=2)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def batched(model: Any, **changes: Any) -> list[list[int]]:
    words = {"num_blocks": 64, "max_batch_tokens": 32, "page_size": PAGE, "auto_switch_to_flash": False, **changes}
    found = model.generate_batch(
        PROMPTS, generation_config=GREEDY, continuous_batching_config=ContinuousBatchingConfig(**words), progress_bar=False
    )
    assert [one.error for one in found.values()] == [None] * len(PROMPTS)
    return [one.generated_tokens for one in found.values()]


def alone(model: Any) -> list[list[int]]:
    return [model.generate(torch.tensor([prompt]), generation_config=GREEDY)[0, len(prompt) :].tolist() for prompt in PROMPTS]


def build(name: str) -> Any:
    torch.manual_seed(0)
    return families.build(name).eval()


GIVEN = {
    "llama": lambda model: STREAM,
    "qwen3": lambda model: sd.patterns.quest(page=4, pages=3),
    "gemma3": lambda model: {0: THIRDS, 1: sd.patterns.moba(chunk=8, top_k=2)},
    "mistral": sd.models.native_patterns,
    "gpt_oss": lambda model: {0: THIRDS, 1: STREAM},
    "gemma2": lambda model: {1: STREAM},
}


@pytest.mark.parametrize("name", GIVEN)
def test_requests_get_the_tokens_that_they_get_alone(name: str) -> None:
    model = build(name)
    backend = "tiled" if name in ("qwen3", "gemma3") else "auto"  # (programs, whose C++ takes long to compile)
    with sd.models.apply(model, GIVEN[name](model), backend=backend):
        assert batched(model) == alone(model)


def test_pages_that_no_query_sees_are_not_read() -> None:
    model, window, spoilt, copied = build("llama"), 6, [], []

    def spoil(module: Any, args: Any, words: dict[str, Any]) -> None:
        cache = words["cache"]
        allocator = cache.layer_to_allocator[0]
        if "update" not in vars(allocator):
            store = allocator.update

            def stores(*args: Any) -> Any:
                copied.append(args[3].numel())  # keys that the cache itself is to read
                return store(*args)

            allocator.update = stores
        read, first = words["read_index"][0], words["cu_seq_lens_k"]["full_attention"].tolist()
        for begin, start in zip(first, words["cu_seq_lens_q"].tolist(), strict=True):
            if read.numel() and start < words["position_ids"].shape[1]:
                dead = (int(words["position_ids"][0, start]) - window + 1) // PAGE * PAGE
                for page in (read[begin : begin + max(dead, 0) : PAGE] // PAGE).tolist():
                    spoilt.append(page)
                    for layer in (0, 1):
                        for pool in allocator.get_cache_for_block_table(layer):
                            pool[page] = float("nan")

    with sd.models.apply(model, sd.patterns.sliding_window(window)):
        wanted = alone(model)
        hook = model.model.register_forward_pre_hook(spoil, with_kwargs=True)
        found = batched(model, allow_block_sharing=False)
        hook.remove()
    assert found == wanted
    assert len(spoilt) > 20
    assert set(copied) == {0}


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("llama", sd.patterns.pbs(block=8, segment=16), "chooses by later queries"),
        ("llama", sd.q_idx - sd.kv_idx < 4, "lets queries see later keys, so that a prompt cut in two"),
        ("llama", CAUSAL & (sd.kv_idx < sd.kv_len - 1), "depends on q_len or kv_len"),
        ("llama", CAUSAL & (sd.q_idx - sd.kv_idx < 4 + sd.b), "depends on b, and requests"),
        ("gemma3", {0: STREAM}, r"keeps the last 8 keys \(a sliding layer\)"),
    ],
)
def test_what_a_scheduler_would_change_is_refused_before_it_begins(name: str, given: Any, says: str) -> None:
    model = build(name)
    with sd.models.apply(model, given), pytest.raises(sd.UnsupportedError, match=says):
        batched(model)


def test_block_tables_and_calls_of_a_layer_alone_are_refused() -> None:
    model = build("llama")
    layer = model.model.layers[0].self_attn
    with sd.models.apply(model, STREAM), pytest.raises(sd.UnsupportedError, match="the forward around it did not"):
        attend(layer, *(torch.zeros(1, 4, 2, 8) for _ in range(3)), None, cache=object())


def test_a_converted_layer_refuses_paged_caches() -> None:
    model = build("llama")
    sd.models.convert(model, {1: functools.partial(sd.models.MoBA, chunk=8, top_k=2)})
    x, rotation = torch.zeros(1, 3, 32), model.model.rotary_emb(torch.zeros(1, 3, 32), torch.arange(3)[None])
    with pytest.raises(sd.UnsupportedError, match="no states or summaries of a converted layer"):
        model.model.layers[1].self_attn(x, position_embeddings=rotation, attention_mask=None, cache=object())


def test_eager_models_keep_their_patterns_when_continuous_batching_renames_eager() -> None:
    model = build("gpt_oss")
    assert model.config._attn_implementation == "eager"
    with sd.models.apply(model, STREAM, backend="reference"):
        inputs = torch.tensor([PROMPTS[0]])
        wanted = model(inputs).logits
        for renamed in ("paged|eager", "eager"):
            model.set_attn_implementation(renamed)
        assert torch.equal(model(inputs).logits, wanted)
    assert model.config._attn_implementation == "eager"
