"""The conversion example, on a model with random weights: it runs as a whole, and leaves the model as it was."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODULES = ("gemma", "gemma_finetune", "gemma_conversion")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tiny_gemma: Any) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in MODULES:
        sys.modules.pop(name, None)
    modules = {name: importlib.import_module(name) for name in MODULES}
    kept = tiny_gemma()
    monkeypatch.setattr(modules["gemma"], "load", lambda: kept)
    yield SimpleNamespace(**modules, model=kept[0])
    for name in MODULES:
        del sys.modules[name]


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
