"""Models whose linear layers run on ours: the core of each layer exchanged, logits, gradients and cached generation stay what they were."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl.execute.state import ProgramState
from tests.models.families import tokens
from tests.models.hybrid_models import convert, donor, spread

Tensor = torch.Tensor
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}  # fmt: skip


def qwen3_next() -> tuple[Any, Any, tuple[str, str], Any]:
    """The module, a model, the names of its two core functions, and what we say in their place."""
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    config = module.Qwen3NextConfig(
        **SMALL, head_dim=16, linear_key_head_dim=8, linear_value_head_dim=12, linear_num_key_heads=2, linear_num_value_heads=4,
        num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=16,
    )  # fmt: skip
    names = "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"
    return module, module.Qwen3NextForCausalLM(config), names, sd.patterns.gated_delta()


def kimi_linear() -> tuple[Any, Any, tuple[str, str], Any]:
    """The same."""
    from transformers.models.kimi_linear import modeling_kimi_linear as module

    config = module.KimiLinearConfig(
        **SMALL, linear_head_dim=8, linear_num_heads=4, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8,
        num_local_experts=4, num_experts_per_tok=2, mlp_layer_types=["dense"] * 3,
    )  # fmt: skip
    names = "chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"
    return module, module.KimiLinearForCausalLM(config), names, sd.patterns.kda()


def core(program: Any, calls: list[int]) -> Callable[..., Any]:
    """A function as the models call theirs: rows before heads, a state handed in and out. ``calls``: the tokens of every call."""
    attn = sd.compile(program)

    def run(
        query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, initial_state: Tensor | None = None,
        output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, **_: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        assert use_qk_l2norm_in_kernel
        calls.append(query.shape[1])
        given = {"q": query, "k": key, "v": value, "g": g, "beta": beta}
        given = {name: x.transpose(1, 2) for name, x in given.items()}
        state = None
        if initial_state is not None:
            recent = {name: x[:, :, :0] for name, x in given.items() if name != "q"}
            state = ProgramState(attn.program.key, 0, recent, {"linear": initial_state})
        out, after = attn(**given, state=state, return_state=True)
        return out.transpose(1, 2), after.recurrent["linear"] if output_final_state else None

    return run


@pytest.mark.parametrize("make", [qwen3_next, kimi_linear], ids=lambda make: make.__name__)
def test_a_model_on_our_core_is_the_model(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, model, names, program = make()
    model = model.eval()
    ids = torch.randint(1, 64, (2, 70), generator=torch.Generator().manual_seed(1))

    def measured() -> tuple[Tensor, list[Tensor | None], Tensor]:
        model.zero_grad()
        logits = model(ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        with torch.no_grad():
            made = model.generate(ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
        return logits.detach(), grads, torch.stack(made.logits, 1)

    wanted = measured()
    calls: list[int] = []
    for name in names:
        monkeypatch.setattr(module, name, core(program, calls))
    got = measured()
    assert calls.count(70) == 4 and calls.count(1) == 14  # two layers: forward, prefill, and seven steps
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[2], wanted[2], rtol=1e-4, atol=1e-5)
    for one, other in zip(got[1], wanted[1], strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * (1 + float(other.abs().max())))


@pytest.mark.parametrize("channels", [False, True])
def test_the_shipped_layer_is_the_rule_of_these_models(channels: bool) -> None:
    """A converted layer against transformers' own recurrence, gradients included, and calibrated half-lives."""
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    model = donor("llama")
    handle = convert(model, {1: functools.partial(sd.models.GatedDelta, channels=channels)})
    layer, module, ids = handle.layers[1], model.model.layers[1].self_attn, tokens(2, 17)
    lives = torch.log(torch.tensor(0.5)) / -torch.nn.functional.softplus(layer.step).view(4, -1)[:, 0]
    torch.testing.assert_close(lives[[0, -1]].detach(), torch.tensor([8.0, 2048.0]).to(lives), rtol=1e-5, atol=0)
    spread(handle)
    lesson = handle.teacher(1)(ids)
    x = lesson.inputs
    heads = {word: getattr(module, f"{word}_proj")(x).unflatten(-1, (-1, module.head_dim)) for word in "qkv"}
    heads |= {word: heads[word].repeat_interleave(2, 2) for word in "kv"}
    steps = torch.nn.functional.softplus(x @ layer.sd_decay.weight.T + layer.step)
    g = -layer.log_rate.exp()[:, None] * steps.unflatten(-1, (4, -1))
    beta = torch.sigmoid(x @ layer.sd_beta.weight.T)
    rule = kimi.recurrent_kimi_delta_attention if channels else qwen.torch_recurrent_gated_delta_rule
    words = {"g": g if channels else g[..., 0], "beta": beta, "initial_state": None, "output_final_state": False}
    out = rule(heads["q"], heads["k"], heads["v"], **words, use_qk_l2norm_in_kernel=True)[0].to(x)
    normed = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + layer.eps)
    expected = module.o_proj(normed.flatten(2) * layer.norm * torch.sigmoid(x @ layer.sd_gate.weight.T))
    got = lesson.student()
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)  # theirs is in float32
    grads = [torch.autograd.grad(one.sum(), handle.new_parameters()) for one in (got, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * (1 + float(other.abs().max())))


def test_mamba_2_on_our_core() -> None:
    """Its scan lies in the middle of its forward: what goes in and out there is taken from the inputs of the gated norm."""
    from transformers import Mamba2Config
    from transformers.models.mamba2 import modeling_mamba2 as module

    torch.manual_seed(0)
    config = Mamba2Config(
        num_heads=4,
        head_dim=8,
        vocab_size=64,
        hidden_size=16,
        state_size=6,
        num_hidden_layers=1,
        expand=2,
        n_groups=2,
        chunk_size=16,
        time_step_limit=(0.0, float("inf")),
    )
    mixer = module.Mamba2Mixer(config, layer_idx=0).eval()
    mixer.A_log.data.uniform_(-1, 1), mixer.dt_bias.data.uniform_(-1, 1), mixer.D.data.uniform_(-1, 1)
    seen: list[Tensor] = []
    mixer.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 37, 16)
    with torch.no_grad():
        mixer(x)
        _, _, _, _, projected, dt = mixer.in_proj(x).split([0, 0, 0, 32, 32 + 2 * 2 * 6, 4], dim=-1)
        mixed = mixer.act(mixer.conv1d(projected.mT)[..., :37].mT)
        u, b, c = mixed.split([32, 12, 12], dim=-1)
        dt = torch.nn.functional.softplus(dt + mixer.dt_bias).mT
        u = u.unflatten(2, (4, 8)).transpose(1, 2)
        b, c = (t.unflatten(2, (2, 6)).transpose(1, 2) for t in (b, c))
        out = sd.compile(sd.patterns.ssd())(c, b, u * dt[..., None], g=-mixer.A_log.exp()[:, None] * dt)
        out = (out + mixer.D[:, None, None] * u).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, seen[0].view_as(out), rtol=1e-4, atol=1e-5)
