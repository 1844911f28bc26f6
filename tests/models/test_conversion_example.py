"""The conversion example, on a model with random weights: it runs as a whole, and leaves the model as it was."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def example(example_modules: Any, tiny_gemma: Any) -> SimpleNamespace:
    kept = tiny_gemma()
    found: SimpleNamespace = example_modules("parts.gemma", "gemma_finetune", "gemma_conversion", load=lambda: kept)
    found.model = kept[0]
    return found


def test_it_runs_as_a_whole(example: SimpleNamespace, tmp_path: Path) -> None:
    before = {name: weight.clone() for name, weight in example.model.state_dict().items()}
    assert example.gemma_conversion.main(["--quick", "--parts", "nha", "caches", "--out", str(tmp_path / "found.json")]) == 0
    after = example.model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[name], weight) for name, weight in before.items())
    found = json.loads((tmp_path / "found.json").read_text())
    (donor, *others) = found["outcomes"]
    assert donor["kl"] == pytest.approx(0, abs=1e-5)
    stages = {(one["name"], one["stage"]) for one in others}
    assert {("NHA", "untrained"), ("NHA", "stage 1"), ("NHA", "stage 2"), ("NHA, trained at window 256", "window 64")} <= stages
    whole, converted = found["caches"]
    assert whole["full_layers_bytes"] == 2 * (640 + 16) * 2 * 16 * 4  # two rows, keys and values of 16 numbers
    assert converted["other_layers_bytes"] == whole["other_layers_bytes"] != converted["full_layers_bytes"]
