"""What a server would get wrong is refused: as it is registered, as a layer is made or first runs, or as a step is built."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sparsedsl as sd
from tests.serve import stand_in
from tests.serve.stand_in import Engine, LayerOptions

CAUSAL = sd.kv_idx <= sd.q_idx
NAME = "model.layers.0.self_attn.attn"
LOCAL = sd.patterns.sliding_window(8)
SLOPES = [0.5, 0.25, 0.125, 0.0625]


@pytest.fixture
def vllm() -> Iterator[None]:
    with stand_in.installed():
        yield


def test_without_vllm_it_says_so() -> None:
    says = r"vLLM is not installed here: pip install vllm where the model is served\. Without it attn\.ragged and attn\.paged"
    with pytest.raises(sd.UnsupportedError, match=says):
        sd.serve.vllm.register(LOCAL)
    with pytest.raises(sd.UnsupportedError, match=says):
        sd.serve.vllm.Backend  # type: ignore[attr-defined]


def test_another_version_of_vllm_is_named(vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", None)
    monkeypatch.delattr(sys.modules["vllm.v1.attention.backends"], "registry")
    monkeypatch.setattr(sys.modules["vllm"], "__version__", "0.9", raising=False)
    with pytest.raises(sd.UnsupportedError, match=r"vLLM 0\.9 has no vllm\.v1\.attention\.backend"):
        sd.serve.vllm.register(LOCAL)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({NAME: sd.patterns.pbs(block=8, segment=16)}, f"layer {NAME}: the program chooses by later queries"),
        (sd.q_idx - sd.kv_idx < 4, "every layer: what it runs lets queries see later keys"),
        (
            {0: CAUSAL & (sd.kv_idx < sd.kv_len - 1)},
            "layer 0: what it runs depends on q_len or kv_len, which for vLLM's scheduler",
        ),
        (CAUSAL & (sd.q_idx - sd.kv_idx < 4 + sd.b), "depends on b, and requests of vLLM's scheduler have another place"),
        (CAUSAL & sd.table("keep", dtype=bool)[sd.kv_idx], "nothing binds the table keep, and vLLM hands none in"),
        ({0: 3}, "layer 0 was given 3 \\(int\\); wanted a mask, a pattern, a program or None"),
        ({1.5: LOCAL}, "by its number, 0; got 1.5"),
    ],
)
def test_what_is_refused_as_it_is_registered(vllm: None, given: Any, says: str) -> None:
    with pytest.raises(sd.SparseDSLError, match=says):
        sd.serve.vllm.register(given)


def test_an_unknown_slot_is_refused_and_leaves_what_was_registered(vllm: None) -> None:
    with pytest.raises(
        sd.PatternError, match=r"slot must be the name of a back end in vLLM; got 'COSTUM' \(str\). Did you mean 'CUSTOM'\?"
    ):
        sd.serve.vllm.register(LOCAL, slot="COSTUM")


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        ({7: LOCAL}, {}, r"no layer is called 7; the model's attention layers are model\.layers\.0\.self_attn\.attn"),
        ({NAME + "x": LOCAL}, {}, rf"no layer is called '{NAME}x'.*Did you mean '{NAME}'\?"),
        (LOCAL, {"window": 5}, r"the model has sliding_window=5 here, .* Register & \(sd.q_idx - sd.kv_idx < 5\)"),
        (sd.patterns.quest(page=4, pages=1), {"window": 5}, "the model has sliding_window=5 here"),
        (sd.attend(LOCAL), {"logits_soft_cap": 3.0}, "the model has logits_soft_cap, and the pattern .* says nothing of it"),
        (sd.attend(LOCAL), {"alibi_slopes": SLOPES, "sinks": torch.zeros(4)}, "alibi_slopes and sinks, and the pattern .* nothing of them"),
        (sd.attend(LOCAL, score=sd.patterns.alibi()), {}, "reads the table 'slopes', and vLLM hands no alibi_slopes to this layer"),
        (sd.attend(LOCAL, score=sd.patterns.alibi(8)), {}, "is for 8 query heads, and the layer has 4"),
        (LOCAL, {"attn_type": "encoder_only"}, "back end CUSTOM cannot: attention type"),
        (LOCAL, {"chunk_lookback": 2}, "the model hands chunk_lookback=2 to its attention, which would be lost here"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_is_served(vllm: None, given: Any, options: dict[str, Any], says: str) -> None:
    window = options.pop("window", None) if "window" in options else None
    sd.serve.vllm.register(given, backend="tiled")
    with pytest.raises((sd.SparseDSLError, ValueError), match=says):
        Engine({NAME: LayerOptions(window, options)})


def make(**words: Any) -> Any:
    given = {"num_heads": 4, "head_size": 8, "scale": 0.3, "num_kv_heads": 2, **words}
    return sd.serve.vllm.Backend.get_impl_cls()(**given)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"attn_type": stand_in.AttentionType.ENCODER_ONLY}, "attn_type='encoder_only': patterns run in decoders"),
        ({"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype='nvfp4' is not known here; use one of auto, float16"),
    ],
)
def test_what_a_layer_refuses_as_it_is_made(vllm: None, words: dict[str, Any], says: str) -> None:
    sd.serve.vllm.register(LOCAL)
    with pytest.raises(sd.UnsupportedError, match=says):
        make(**words)


def test_keys_spread_over_ranks_are_refused(vllm: None) -> None:
    sd.serve.vllm.register(LOCAL)
    kind = sd.serve.vllm.Backend.get_impl_cls()
    layer = kind.__new__(kind)
    layer.dcp_world_size = 2
    with pytest.raises(sd.UnsupportedError, match="decode_context_parallel_size=2 spreads the keys"):
        layer.__init__(4, 8, 0.3)


def test_mla_and_other_dtypes_of_caches_are_answered_as_vllm_asks(vllm: None) -> None:
    sd.serve.vllm.register(LOCAL)
    ask = sd.serve.vllm.Backend.validate_configuration
    assert ask(torch.bfloat16, "auto", 16, True, False, "decoder") == []
    assert ask(torch.bfloat16, "auto", 16, False, True, "decoder") == ["MLA"]
    assert ask(torch.bfloat16, "fp8_ds_mla", 16, False, False, "decoder") == ["kv_cache_dtype"]
    assert ask(torch.bfloat16, "float16", 16, False, False, "decoder") == [
        "kv_cache_dtype=float16 with a model in torch.bfloat16: keys are stored as they are, or as fp8"
    ]


def test_a_layer_whose_keys_another_one_lets_go_of_is_refused(vllm: None) -> None:
    sd.serve.vllm.register(LOCAL, backend="tiled")
    layer, rows, step = SimpleNamespace(layer_name=NAME), torch.zeros(1, 4, 8), SimpleNamespace(window=4, rows=1)
    with pytest.raises(sd.UnsupportedError, match=rf"layer {NAME}: the model has sliding_window=4"):
        make().forward(layer, rows, rows[:, :2], rows[:, :2], torch.zeros(2, 2, 4, 2, 8), step, rows)


BUILT = {
    "num_reqs": 1,
    "query_start_loc": torch.tensor([0, 3]),
    "seq_lens": torch.tensor([3]),
    "block_table_tensor": torch.zeros(1, 2),
}


@pytest.mark.parametrize(
    ("prefix", "changed", "says"),
    [
        (16, {}, "cascade attention .* is not part of this back end"),
        (0, {"causal": False}, r"attention that is not causal \(causal=False\)"),
        (0, {"mm_req_doc_ranges": {0: [(1, 2)]}}, "both directions among the tokens of images"),
        (0, {"dcp_local_seq_lens": torch.zeros(1)}, "Set decode_context_parallel_size=1"),
    ],
)
def test_steps_of_another_attention_are_refused(vllm: None, prefix: int, changed: dict[str, Any], says: str) -> None:
    sd.serve.vllm.register(LOCAL)
    (builder,) = Engine({NAME: LayerOptions()}).builders.values()
    assert builder.use_cascade_attention(16) is False
    with pytest.raises(sd.UnsupportedError, match=says):
        builder.build(prefix, SimpleNamespace(**{**BUILT, **changed}))


def test_layers_in_chunks_keep_what_vllm_makes_of_them(vllm: None) -> None:
    spec = SimpleNamespace(sliding_window=None, attention_chunk_size=64)
    context = SimpleNamespace(static_forward_context={"layers.0": None, "layers.1": None})
    config = SimpleNamespace(parallel_config=SimpleNamespace(), compilation_config=context)
    sd.serve.vllm.register({1: LOCAL})
    builder = sd.serve.vllm.Backend.get_builder_cls()
    builder(spec, ["layers.0"], config, torch.device("cpu"))
    with pytest.raises(sd.UnsupportedError, match=r"layer layers\.1: vLLM runs this layer in chunks of 64 tokens"):
        builder(spec, ["layers.0", "layers.1"], config, torch.device("cpu"))


def test_outputs_that_are_to_be_quantised_and_values_of_another_width_are_refused(vllm: None) -> None:
    sd.serve.vllm.register(LOCAL)
    rows, layer = torch.zeros(3, 4, 8), SimpleNamespace(layer_name=NAME)
    impl = make()
    with pytest.raises(sd.UnsupportedError, match="the output is to be quantised inside of attention"):
        impl.forward(layer, rows, rows[:, :2], rows[:, :2], rows, None, rows, output_scale=torch.ones(()))
    with pytest.raises(sd.UnsupportedError, match="values are 6 wide and keys 8"):
        impl.forward(layer, rows, rows[:, :2], rows[:, :2, :6], rows, None, rows)
    with pytest.raises(sd.ShapeError, match=r"the cache is \(2, 9, 4, 2, 8\); wanted \(pages, 2, page, 2, 8\)"):
        impl.do_kv_cache_update(layer, rows[:, :2], rows[:, :2], torch.zeros(2, 9, 4, 2, 8), torch.tensor([0, 1, 2]))


def test_the_number_in_a_name() -> None:
    assert sd.serve.vllm.layer_index(NAME) == 0
    for name, count in (("model.attn", "no numbers"), ("a.1.b.2", "2 numbers")):
        with pytest.raises(sd.PatternError, match=f"has {count} in its name"):
            sd.serve.vllm.layer_index(name)
