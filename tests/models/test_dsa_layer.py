"""DeepSeek sparse attention as a layer: the donor inside, what its indexer learns from, and who gets a gradient. In float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl.models.donor import project
from sparsedsl.models.index_learning import divergence, paid
from tests.models.families import build, left_padded, tokens
from tests.models.hybrid_models import DONORS, DSA, NHA, convert, donor, spread

EACH = pytest.mark.parametrize("name", DONORS)
ALL = functools.partial(sd.models.DSA, top_k=64, index_heads=2)


def logits(model: Any, *ids: torch.Tensor, **words: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(*ids, **words).logits
    return found


def wave(shift: float, *sizes: int) -> torch.Tensor:
    """``sin(shift + 2.1 i + 0.7 j + 1.3 l)``."""
    steps = [torch.arange(n, dtype=torch.float64) * step for n, step in zip(sizes, (2.1, 0.7, 1.3), strict=False)]
    return torch.sin(shift + functools.reduce(lambda a, b: a[..., None] + b, steps))


def test_divergence_of_known_numbers() -> None:
    """The published loss written out: mean over heads of the attention, one score for all heads; and its gradient."""
    q, k = wave(0.1, 3, 8, 4), wave(0.5, 1, 8, 4)
    index_q, index_k, weights = wave(0.2, 2, 8, 3), wave(0.6, 8, 3), wave(1.1, 2, 8)
    seen = torch.ones(8, 8).tril().bool()
    p = (q @ k.mT / 2).masked_fill(~seen, float("-inf")).softmax(-1).mean(0)
    scores = (weights[..., None] * (index_q @ index_k.T).relu()).sum(0).requires_grad_()
    loss = divergence(p, scores, seen).mean()
    loss.backward()
    assert abs(float(loss) - 0.150870) < 1e-6
    wanted = (scores.detach().masked_fill(~seen, float("-inf")).softmax(-1) - p) / 8
    torch.testing.assert_close(scores.grad, wanted, atol=1e-12, rtol=0)
    some = seen & (torch.arange(8) % 3 == 0)
    shares = p.masked_fill(~some, 0.0) / p.masked_fill(~some, 0.0).sum(-1, keepdim=True)
    logs = scores.detach().masked_fill(~some, float("-inf")).log_softmax(-1)
    wanted = torch.where(some, torch.xlogy(shares, shares) - shares * logs, 0.0).sum(-1)
    torch.testing.assert_close(divergence(p, scores.detach(), some), wanted, atol=1e-12, rtol=0)


@EACH
def test_with_all_keys_it_is_the_donor(name: str) -> None:
    model, padded = donor(name), left_padded()
    before = [logits(model, tokens()), logits(model, **padded)]
    handle = convert(model, {1: ALL})
    spread(handle)
    for found, wanted in zip([logits(model, tokens()), logits(model, **padded)], before, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-11, rtol=0)
    handle.restore()
    handle = convert(model, {1: DSA})
    spread(handle)
    assert (logits(model, tokens()) - before[0]).abs().max() > 1e-4


@pytest.mark.parametrize("name", [*DONORS, "gemma2"])
@pytest.mark.parametrize("index", [0, 1])
def test_what_a_donor_pays_is_its_own_attention(name: str, index: int) -> None:
    """Windows, sinks, soft caps and scales included; some queries at a time. (transformers' softmax is in float32.)"""
    model = build(name).double() if name == "gemma2" else donor(name)
    model.set_attn_implementation("eager")
    wanted = model(tokens(), output_attentions=True).attentions[index].mean(1)
    handle = convert(model, {index: ALL})
    lesson, module = handle.teacher(index)(tokens()), model.model.layers[index].self_attn
    _, rope = project(module, lesson.inputs, lesson._words["position_embeddings"])
    facts, sinks = module._sparsedsl_converted.donor, getattr(module, "sinks", None)
    parts = [paid(facts, rope.q[:, :, rows], rope.k, rows.start, sinks) for rows in (slice(0, 9), slice(9, 21))]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-6, rtol=0)


def test_the_index_alone_learns_and_gets_nearer() -> None:
    model, ids = donor("llama"), tokens()
    handle = convert(model, {0: DSA, 1: DSA})
    spread(handle)
    for chosen in (False, True):
        lessons = handle.lessons(ids, student=chosen)
        loss = sum(lesson.loss(chosen=chosen) for lesson in lessons.values())
        loss.backward()
        mine = {id(parameter) for parameter in handle.new_parameters()}
        assert all((parameter.grad is not None) == (id(parameter) in mine) for parameter in model.parameters())
        assert all(parameter.grad.abs().sum() > 0 for parameter in handle.new_parameters())
        model.zero_grad()
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is None for parameter in handle.new_parameters())
    model.zero_grad()
    handle.freeze()
    optimizer, losses = torch.optim.Adam(handle.new_parameters(), lr=0.02), []
    for _ in range(12):
        losses.append(sum(lesson.loss() for lesson in handle.lessons(ids).values()))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


def test_losses_are_means_over_real_tokens() -> None:
    model, padded = donor("llama"), left_padded()
    handle = convert(model, {1: DSA})
    spread(handle)
    real = padded["attention_mask"].bool()
    padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    alone = [handle.teacher(1)(row[kept][None]) for row, kept in zip(padded["input_ids"], real, strict=True)]
    for chosen in (False, True):
        wanted = sum(one.loss(chosen=chosen) * one.inputs.shape[1] for one in alone) / real.sum()
        torch.testing.assert_close(handle.teacher(1)(**padded).loss(chosen=chosen), wanted, atol=1e-10, rtol=0)
    sd.models.conversion(model).restore()
    handle = convert(model, {1: ALL})
    lesson = handle.teacher(1)(tokens())
    torch.testing.assert_close(lesson.loss(chosen=True), lesson.loss(), atol=1e-12, rtol=0)


def test_lessons_of_the_student_have_its_inputs() -> None:
    model, ids = donor("llama"), tokens()
    handle = convert(model, {0: NHA, 1: DSA})
    spread(handle)
    seen: dict[str, Any] = {}
    hook = model.model.layers[1].self_attn.register_forward_hook(
        lambda m, a, w, out: seen.update(x=w["hidden_states"], out=out[0]), with_kwargs=True
    )
    logits(model, ids)
    hook.remove()
    lesson = handle.lessons(ids, student=True)[1]
    assert torch.equal(lesson.inputs, seen["x"]) and torch.equal(lesson.output, seen["out"])
    assert not torch.allclose(handle.lessons(ids)[1].inputs, seen["x"])
    with pytest.raises(
        sd.PatternError, match=r"loss\(chosen=True\) is of layers with an index, such as sd.models.DSA; this is NHA"
    ):
        handle.lessons(ids)[0].loss(chosen=True)


def test_initialisation() -> None:
    model = donor("llama")
    module = model.model.layers[1].self_attn
    calibrated = convert(model, {1: DSA}).layers[1]
    heads, keys = module.q_proj.weight.unflatten(0, (4, 8)), module.k_proj.weight.unflatten(0, (2, 8))
    torch.testing.assert_close(
        calibrated.sd_query.weight.unflatten(0, (2, 8)), torch.stack([heads[:2].mean(0), heads[2:].mean(0)])
    )
    torch.testing.assert_close(calibrated.sd_key.weight, keys.mean(0))
    assert calibrated.sd_weight.weight.abs().sum() == 0 and calibrated.sd_weight.bias.tolist() == [1.0, 1.0]
    sd.models.conversion(model).restore()
    wide = functools.partial(sd.models.DSA, top_k=5, index_heads=3, index_dim=12)
    handle = convert(model, {1: wide}, init="published")
    published = handle.layers[1]
    assert published.sd_key.weight.shape == (12, 32) and 0.01 < float(published.sd_query.weight.std()) < 0.03
    assert published.sd_weight.bias.abs().sum() == 0
    spread(handle)
    ids, cache = tokens(), handle.cache()
    parts = [logits(model, part, past_key_values=cache) for part in ids.split([9, 1, 11], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), logits(model, ids, use_cache=False), atol=1e-10, rtol=0)
    with pytest.raises(sd.PatternError, match=r"DSA\(\): index_heads must be at least 1; got 0"):
        convert(donor("llama"), {1: functools.partial(sd.models.DSA, index_heads=0)})


def test_half_precision_learns_in_float32() -> None:
    model = donor("llama", torch.bfloat16)
    handle = convert(model, {1: DSA})
    assert {parameter.dtype for parameter in handle.new_parameters()} == {torch.float32}
    loss = handle.teacher(1)(tokens()).loss()
    assert loss.dtype is torch.float32
    loss.backward()
    assert logits(model, tokens()).dtype is torch.bfloat16
