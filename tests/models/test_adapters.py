"""Adapters of PEFT on a converted model: LoRA on the donor's weights and the new module trained whole, saved, loaded and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import sparsedsl as sd
from tests.models.families import tokens
from tests.models.hybrid_models import LAYERS, convert, donor, spread

# MoBA has no parameters; what an indexer picks has no gradient.
UNTOUCHED = ("moba", "dsa")


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_a_converted_model_takes_adapters(layer: str, tmp_path: Path) -> None:
    model, ids = donor("llama", torch.float32), tokens(2, 12)
    spread(convert(model, {1: LAYERS[layer]}))
    plain = logits(model, ids)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["sd_layer"]))
    assert torch.equal(logits(adapted, ids), plain)  # LoRA begins at nothing, and the copy of the new module is one

    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    learn: set[str] = set()
    for _ in range(2):
        adapted(input_ids=ids, labels=ids).loss.backward()
        learn |= {name for name, parameter in adapted.named_parameters() if parameter.grad is not None}
        optimiser.step()
        optimiser.zero_grad()
    moved = {name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved <= learn  # a gradient may be too small to move what it is of
    assert all("lora_" in name or ".sd_layer.modules_to_save." in name for name in moved)
    assert any(".sd_layer." in name for name in moved) == (layer not in UNTOUCHED)
    assert any("lora_" in name for name in moved)

    trained = logits(adapted, ids)
    assert not torch.equal(trained, plain)
    adapted.save_pretrained(tmp_path / "adapter")
    again = donor("llama", torch.float32)
    convert(again, {1: LAYERS[layer]})
    loaded = PeftModel.from_pretrained(again, str(tmp_path / "adapter")).eval()
    assert torch.equal(logits(loaded, ids), trained)
    words = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(ids, **words), adapted.generate(ids, **words))

    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), trained, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    whole = sd.models.from_pretrained(tmp_path / "merged", backend="tiled")
    assert torch.equal(logits(whole, ids), logits(merged, ids))
