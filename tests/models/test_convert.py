"""Converting layers of every family: the donor inside, what trains, lessons, errors. Tiny models in float64."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, repeat_kv

import sparsedsl as sd
from sparsedsl.models.converted import CONVERTED
from sparsedsl.program.in_layers import fitted
from tests.models.families import build, left_padded, tokens
from tests.models.hybrid_models import DONORS, HSA, LAYERS, MOBA, NHA, NSA, RING, convert, donor, spread

EACH = pytest.mark.parametrize("name", DONORS)
PAIRS = (
    [("llama", kind) for kind in LAYERS]
    + [(name, "nha") for name in DONORS[1:]]
    + [("gpt_oss", "moba"), ("gpt_oss", "hsa"), ("gpt_oss", "dsa")]
)


def logits(model: Any, *args: Any, **words: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(*args, **words).logits
    return found


@EACH
def test_the_switch_gives_the_donor(name: str) -> None:
    """Padded, in a row, and with a cache; and so does restore()."""
    model, ids, padded = donor(name), tokens(), left_padded()
    names = set(model.state_dict())
    packed = {"position_ids": torch.tensor([[*range(9), *range(12)]] * 2)}
    calls: list[dict[str, Any]] = [{"input_ids": ids}, padded, {"input_ids": ids, **packed, "use_cache": False}]
    before = [logits(model, **call) for call in calls]
    handle = convert(model, {0: NHA, 1: NHA})
    assert names < set(model.state_dict())
    assert not torch.allclose(logits(model, ids), before[0])
    with handle.identity():
        for call, expected in zip(calls, before, strict=True):
            assert torch.equal(logits(model, **call), expected)
        first = model(ids[:, :13])
        rest = logits(model, ids[:, 13:], past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat([first.logits, rest], 1), before[0], atol=1e-11, rtol=0)
    handle.restore()
    handle.restore()
    assert torch.equal(logits(model, ids), before[0])
    assert set(model.state_dict()) == names
    assert repr(handle) == repr(handle) and "restored" in repr(handle)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_layer_is_its_program_on_the_donors_heads(name: str, kind: str) -> None:
    """The reference on heads that a hook on the donor's attention sees, raw ones from its projections, scale and sinks said by hand."""
    model, ids = donor(name), tokens(1, 19)
    handle = convert(model, {1: LAYERS[kind]}, backend="reference")
    spread(handle)
    layer, module = handle.layers[1], model.model.layers[1].self_attn
    lesson = handle.teacher(1)(ids)
    x, words = lesson.inputs, lesson._words
    heads: dict[str, Any] = {}
    for word in "qkv":
        rows = getattr(module, f"{word}_proj")(x).unflatten(-1, (-1, module.head_dim))
        norm = getattr(module, f"{word}_norm", None)
        heads[word] = (rows if norm is None else norm(rows)).transpose(1, 2)
    rotate = __import__(type(module).donor_class.__module__, fromlist=["x"]).apply_rotary_pos_emb
    q, k = rotate(heads["q"], heads["k"], *words["position_embeddings"])
    turn = functools.partial(_turned, rotate, words["position_embeddings"])
    raw, rope = sd.models.donor.Heads(**heads, rotate=turn), sd.models.donor.Heads(q, k, heads["v"], turn)
    named = {"q": rope.q, "k": rope.k, "v": rope.v} | layer.inputs(x, raw, rope)
    said: dict[str, torch.Tensor] = {"q": rope.q, "k": rope.k, "v": rope.v}
    if "nha" in kind:
        said |= {"q": raw.q, "k": raw.k, "q_rope": rope.q, "k_rope": rope.k}
    if kind == "delta":
        said |= {"q": raw.q, "k": raw.k}
    if kind in ("ring", "delta"):  # heads, not rows of heads
        said |= {word: repeat_kv(said[word], 2) for word in "kv"}
    for word, expected in said.items():
        assert torch.equal(named[word], expected)
    chunk = getattr(layer, "chunk", None)
    if chunk:
        named |= layer.landmarks(x[:, : 19 // chunk * chunk].unflatten(1, (-1, chunk)))
    program, sinks = layer.program, getattr(module, "sinks", None)
    if sinks is not None and kind != "ring":
        if "sinks" not in program.tables:
            program = fitted(program, 1, sd.models.native_patterns(build("gpt_oss"))[1], None, module.head_dim)
        named["sinks"] = sinks
    # A factor on queries is a factor on every product of theirs; retrieval queries have a scale of their own.
    factor = module.scaling * module.head_dim**0.5
    named |= {word: named[word] * factor for word in ("q", "q_rope") if word in named}
    out = sd.compile(program, backend="reference")(**named)
    expected = module.o_proj(layer.output(out.transpose(1, 2).flatten(2), x))
    torch.testing.assert_close(lesson.student(), expected, atol=1e-11, rtol=1e-11)


def _turned(rotate: Any, places: Any, rows: torch.Tensor) -> torch.Tensor:
    return rotate(rows, rows, *places)[1]


@EACH
def test_gradients_reach_the_new_parameters_alone(name: str) -> None:
    model, ids = donor(name), tokens()
    kinds = {0: NHA, 1: HSA if name == "gpt_oss" else NSA}
    handle = convert(model, kinds)
    spread(handle)
    handle.freeze()
    model(ids, labels=ids).loss.backward()
    new = handle.new_parameters()
    assert new
    for parameter in model.parameters():
        mine = any(parameter is one for one in new)
        assert (parameter.grad is not None) == mine
        assert not mine or parameter.grad.abs().sum() > 0
    handle.freeze(also=("q_proj", "o_proj"))
    trained = [word for word, parameter in model.named_parameters() if parameter.requires_grad and ".sd_layer." not in word]
    assert {word.split(".self_attn.")[1].split(".")[0] for word in trained} == {"q_proj", "o_proj"}
    with pytest.raises(sd.PatternError, match="has no module 'gate_proj'; it has"):
        handle.freeze(also=("gate_proj",))


def test_groups_of_an_optimizer() -> None:
    model = donor("llama")
    handle = convert(model, {0: NHA, 1: RING})
    handle.freeze(also=("q_proj",))
    groups = {(group["lr"], group["weight_decay"]): group["params"] for group in handle.parameter_groups(1e-2, donor_lr=1e-4)}
    assert set(groups) == {(1e-2, 0.0), (1e-4, 0.1)}  # gates, biases, norms: none decays
    assert {id(p) for p in groups[1e-2, 0.0]} == {id(p) for p in handle.new_parameters()}
    handle = convert(donor("llama"), {1: HSA})
    assert {group["weight_decay"] for group in handle.parameter_groups()} == {0.0, 0.1}
    assert sum(len(group["params"]) for group in handle.parameter_groups()) == len(list(handle.model.parameters()))


@EACH
def test_lessons_are_what_the_donor_does(name: str) -> None:
    model, padded = donor(name), left_padded()
    seen: dict[str, Any] = {}
    hook = model.model.layers[1].self_attn.register_forward_hook(
        lambda m, a, w, out: seen.update(x=w["hidden_states"], out=out[0]), with_kwargs=True
    )
    logits(model, **padded)
    hook.remove()
    handle = convert(model.train(), {0: NHA, 1: NHA})
    lesson = handle.teacher(1)(**padded)
    assert model.training and model.model.layers[1].self_attn.training
    torch.testing.assert_close(lesson.inputs, seen["x"], atol=0, rtol=0)
    torch.testing.assert_close(lesson.output, seen["out"], atol=0, rtol=0)
    with handle.identity():
        assert lesson.loss() == 0
    handle.freeze()
    loss = lesson.loss()
    assert loss > 0
    loss.backward()
    layers = [layer.sd_gate.weight.grad is not None for layer in handle.layers.values()]
    assert layers == [False, True]
    assert set(handle.lessons(**padded)) == {0, 1}
    with pytest.raises(sd.PatternError, match="layer 5 is not a converted one; these are: 0, 1"):
        handle.teacher(5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    ids, grads = tokens(), []
    for checkpointed in (False, True):
        model = donor("qwen3").train()
        handle = convert(model, {0: NHA, 1: NSA})
        spread(handle)
        handle.freeze(also=("q_proj",))
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == len(grads[1])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-13, rtol=1e-10)


def test_initialisation_comes_after_the_weights() -> None:
    model = donor("llama")
    module = model.model.layers[1].self_attn
    published = convert(model, {1: functools.partial(NHA, slot_bias=None)}, init="published").layers[1]
    rows = module.k_proj.weight.unflatten(0, (2, -1))
    assert published.slot_bias is None
    torch.testing.assert_close(published.sd_gate.weight[0], rows[0, :3].mean(0))  # 8 rows in 3 parts
    assert published.sd_gate.bias.abs().sum() == 0
    sd.models.conversion(model).restore()
    calibrated = convert(model, {1: NHA}).layers[1]
    assert calibrated.sd_gate.weight.abs().sum() == 0
    assert calibrated.slot_bias.tolist() == [-6.0] * 4
    lives = torch.sigmoid(calibrated.sd_gate.bias).log2().div(-8).reciprocal()
    torch.testing.assert_close(lives, torch.tensor([8, 8 * 512**0.5, 4096] * 2).double(), rtol=1e-6, atol=0)


def test_half_precision_keeps_gates_in_float32() -> None:
    model, ids = donor("llama", torch.bfloat16), tokens()
    handle = convert(model, {1: NHA})
    assert {p.dtype for p in handle.new_parameters()} == {torch.float32}
    cache = handle.cache()
    assert logits(model, ids, past_key_values=cache).dtype is torch.bfloat16
    state = cache.layers[1].held[0].state
    assert state.recent["gate"].dtype is torch.float32
    assert {x.dtype for value in state.recurrent.values() for x in value[:2]} == {torch.float32}


def test_patterns_and_layers_in_one_call() -> None:
    model, ids = donor("gemma3"), tokens()
    local = sd.patterns.sliding_window(4)
    with sd.models.apply(model, {0: local}):
        with_pattern = logits(model, ids)
    handle = convert(model, {0: local, 1: NHA})
    words = "layer 1 NHA(slots=3, window=4, first=1, slot_bias=-6.0, temperature=8.0)"
    assert repr(handle) == f"<Conversion of Gemma3ForCausalLM: {words}; layer 0 attend((kv_idx <= q_idx) & (q_idx - kv_idx < 4))>"
    changed = logits(model, ids)
    with handle.identity():
        torch.testing.assert_close(logits(model, ids), with_pattern, atol=1e-12, rtol=0)
    parts, cache = [], handle.cache()
    for a, b in ((0, 9), (9, 10), (10, 21)):
        parts.append(logits(model, ids[:, a:b], past_key_values=cache))
    torch.testing.assert_close(torch.cat(parts, 1), changed, atol=1e-11, rtol=0)
    handle.restore()
    assert not sd.models.conversion(model)
    applied = sd.models.apply(model, {0: local})
    handle = convert(model, {1: NHA})
    assert repr(handle).endswith("; given patterns by an apply: layer 0>")
    torch.testing.assert_close(logits(model, ids), changed, atol=1e-12, rtol=0)
    applied.restore()
    assert not torch.allclose(logits(model, ids), changed)
    handle.restore()
    everywhere = convert(model, lambda index: MOBA if index else None)
    assert list(everywhere.layers) == [1]


def test_programs_become_layers_with_a_state() -> None:
    model, ids = donor("llama"), tokens()
    ring = sd.patterns.ring_linear([0.5, 0.7, 0.9, 1.0])
    with sd.models.apply(model, {1: ring}, backend="reference"):
        expected = logits(model, ids)
    handle = convert(model, {1: ring}, backend="reference")
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-12, rtol=0)
    assert handle.new_parameters() == []
    sizes = []
    for length in (4, 21):
        cache = handle.cache()
        logits(model, ids[:, :length], past_key_values=cache)
        sizes.append(cache.layers[1].nbytes)
    assert sizes[0] == sizes[1]


def test_copies_have_layers_of_their_own() -> None:
    model, ids = donor("llama"), tokens()
    handle = convert(model, {1: NHA})
    expected = logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, ids), expected)
        own = sd.models.conversion(twin)
        assert own is not None and own.layers[1] is not handle.layers[1]
        own.layers[1].slot_bias.data.fill_(3.0)
        assert not torch.allclose(logits(twin, ids), expected)
        assert torch.equal(logits(model, ids), expected)
        own.restore()
    assert hasattr(model.model.layers[1].self_attn, CONVERTED)


class Own(sd.models.Layer):
    """A layer with every mistake to choose from."""

    def __init__(self, donor: Any, mistake: str = "") -> None:
        super().__init__(donor, sd.patterns.nha(2, 3))
        self.gate, self.mistake = nn.Linear(donor.hidden_size, donor.kv_heads * 2), mistake

    def inputs(self, x: torch.Tensor, raw: Any, rope: Any) -> Any:
        gate = self.heads(self.gate(x))
        wrong = {"none": None, "surplus": {"gate": gate, "gates": gate}, "missing": {}, "shape": {"gate": gate[..., :1]}}
        return wrong.get(self.mistake, {"gate": gate})


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("none", "Own.inputs must return a dict of tensors"),
        ("surplus", "Own.inputs: .*gates"),
        ("missing", "layer 1 .Own.: missing input 'gate'"),
        ("shape", "layer 1 .Own.: input 'gate'"),
    ],
)
def test_mistakes_in_a_layer(mistake: str, message: str) -> None:
    model = donor("llama")
    convert(model, {1: functools.partial(Own, mistake=mistake)})
    with pytest.raises(sd.SparseDSLError, match=message):
        model(tokens())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({7: NHA}, r"no attention layer has the index \[7\]"),
        (3, "layers must be a mapping"),
        ({1: 3}, "layer 1 was given 3"),
        ({1: nn.Linear(1, 1)}, "layer 1 was given Linear.*wanted a Layer class"),
        (nn.Linear(1, 1), "layers must be a mapping from layer index.*got Linear"),
        ({1: lambda donor: 3}, "gave 3"),
        ({1: functools.partial(NHA, slotz=3)}, "slotz"),
        ({1: functools.partial(RING, groups=3)}, "groups must divide the 4 query heads; got 3"),
        ({1: sd.patterns.hsa(4, 2)}, "the program reads the inputs 'landmarks', 'retrieval_q'"),
    ],
)
def test_what_convert_refuses(layers: Any, message: str) -> None:
    model = donor("llama")
    with pytest.raises(sd.SparseDSLError, match=message):
        convert(model, layers)
    assert sd.models.conversion(model) is None
    assert logits(model, tokens()).isfinite().all()


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("gpt_oss", NSA, "layer 1 has sink logits, and NSA three softmaxes"),
        ("gemma2", NHA, "layer 1 caps its logits at 2.0"),
        ("phi3", NHA, "layer 1 .Phi3Attention. cannot become a hybrid layer: it has no q_proj, k_proj, v_proj"),
        ("gpt2", MOBA, "layer 1 .GPT2Attention. cannot become a hybrid layer: it has no q_proj"),
        ("deepseek_v3", MOBA, "layer 1 .DeepseekV3Attention. cannot become a hybrid layer: it has no q_proj"),
        ("opt", MOBA, "layer 1 .OPTAttention. cannot become a hybrid layer"),
        ("bert", MOBA, "layer 1 .BertSelfAttention. cannot become a hybrid layer"),
    ],
)
def test_donors_that_are_refused(name: str, kind: Any, message: str) -> None:
    with pytest.raises(sd.UnsupportedError, match=message):
        convert(build(name), {1: kind})


class OtherQueries(LlamaAttention):
    """With the parts of a Llama's, and other queries, keys and values."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **words: Any) -> Any:
        return super().forward(hidden_states * 1.01, *args, **words)


class OtherOutput(LlamaAttention):
    """The same with another output."""

    def forward(self, *args: Any, **words: Any) -> Any:
        out, weights = super().forward(*args, **words)
        return out * 1.01, weights


@pytest.mark.parametrize(("kind", "message"), [(OtherQueries, "makes other queries"), (OtherOutput, "makes other output")])
def test_a_forward_that_does_more_is_noticed(kind: Any, message: str) -> None:
    model = donor("llama")
    model.model.layers[1].self_attn.__class__ = kind
    convert(model, {1: MOBA})
    with pytest.raises(sd.UnsupportedError, match=f"layer 1 .* cannot become a hybrid layer: its own forward {message}"):
        model(tokens())


@pytest.mark.parametrize("name", ["phi", "llama4"])
def test_donors_that_are_refused_by_their_forward(name: str) -> None:
    """Their modules have the right parts, and do other things with them."""
    model = build(name)
    try:
        convert(model, {0: MOBA})
    except sd.UnsupportedError as error:
        assert "cannot become a hybrid layer" in str(error)
        return
    with pytest.raises(sd.UnsupportedError, match=r"layer 0 .* cannot become a hybrid layer"):
        model(tokens())


@pytest.mark.parametrize(
    "name", ["mistral", "qwen2", "olmo2", "granite", "starcoder2", "exaone4", "cohere2", "mixtral", "llama_mqa", "smollm3"]
)
def test_other_families_run_or_are_refused(name: str) -> None:
    """A layer that is the donor with all chunks picked: where it runs it is the donor."""
    model, ids = build(name), tokens()
    expected = logits(model, ids)
    handle = convert(model, {0: functools.partial(sd.models.MoBA, chunk=2, top_k=11)})
    full = sd.models.native_patterns(build(name))[0] == sd.attend(sd.kv_idx <= sd.q_idx)
    found = logits(model, ids)
    assert handle.layers
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=0) if full else None


def test_calls_that_would_lose_something() -> None:
    model, ids = donor("llama"), tokens()
    with (
        sd.models.apply(model, {1: sd.kv_idx <= sd.q_idx}),
        pytest.raises(sd.PatternError, match=r"layer 1 runs a pattern.*applied"),
    ):
        convert(model, {1: NHA})
    with pytest.raises(
        sd.PatternError, match=r"NHA\(donor, slots=32.* missing .*the class NHA, or functools.partial\(NHA, \.\.\.\)"
    ):
        NHA(slots=8)
    convert(model, {1: NHA})
    with pytest.raises(sd.UnsupportedError, match="a finished mask"):
        model(ids, attention_mask=torch.ones(2, 1, 21, 21).tril().bool())
    with pytest.raises(sd.PatternError, match=r"converted already; call sd.models.conversion\(model\).restore\(\)"):
        convert(model, {0: NHA})
    with pytest.raises(sd.UnsupportedError, match=r"layer 1 .ConvertedLlamaAttention.: the module"):
        sd.models.apply(model, {1: sd.kv_idx <= sd.q_idx})
    model.set_attn_implementation("eager")
    with pytest.raises(sd.UnsupportedError, match="since set to 'eager'"):
        model(ids)


@pytest.mark.parametrize(("call", "error", "message"), [
    *((functools.partial(kind, value), sd.PatternError, f"{kind.__name__}: the first argument is the donor that sd.models.convert gives")
      for kind in (sd.models.NHA, sd.models.NSA, sd.models.MoBA, sd.models.HSA, sd.models.GatedDelta, sd.models.RingLinear)
      for value in (None, "x")),
    (lambda: sd.models.ProgramCacheLayer(0, None), sd.ArgumentError, "program must be a sd.Program; got None"),
    (lambda: sd.models.applied(None), sd.PatternError, "wants a transformers model"),
    (lambda: sd.models.apply(transformers.LlamaForCausalLM, True), sd.PatternError, "got the class LlamaForCausalLM"),
    (lambda: sd.models.conversion(None), sd.PatternError, "wants a transformers model"),
    (lambda: sd.models.from_pretrained(None), sd.ArgumentError, "folder must be a path or the name of a repository; got None"),
    (lambda: sd.models.from_pretrained("x", 3), sd.ArgumentError, "model_class must be a class of transformers, .*; got 3"),
    (lambda: sd.models.save_pretrained(None, "x"), sd.PatternError, "wants a transformers model"),
    (lambda: sd.models.save_pretrained(donor("llama"), None), sd.ArgumentError, "save_directory must be the path of a folder; got None"),
])  # fmt: skip
def test_what_is_given_for_something_else_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
