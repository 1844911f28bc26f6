"""The demo's editable part, and its helpers on a tiny model: what can be checked without 240 MB of weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import sparsedsl as sd
from tests.models.families import build, tokens

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{Path(name).name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_hybrid_as_shipped_is_causal_and_sparse() -> None:
    example = load("gemma_hybrid")
    report = sd.analyse(example.HYBRID, example.TOKENS)
    assert report.causal == sd.PROVED
    assert report.empty_rows == 0
    assert report.density < 0.3


def test_what_the_demo_measures_with() -> None:
    gemma = load("parts/gemma")
    model, ids = build("gemma3"), tokens(1, 21)
    hidden, seconds = gemma.prefill(model, ids, "prefill")
    with torch.no_grad():
        logits = model(ids).logits
    wanted = torch.nn.functional.cross_entropy(logits[0, 10:-1], ids[0, 11:]).exp().item()
    assert gemma.perplexity(model, hidden, ids, 10, "perplexity") == pytest.approx(wanted, rel=1e-4)
    assert gemma.largest_difference(model, hidden, hidden, 0, "compare") == 0
    assert gemma.largest_difference(model, hidden, hidden + 1, 3, "compare") > 0
    made, _ = gemma.greedy(model, ids, 5, "generate")
    assert made == model.generate(ids, max_new_tokens=5, do_sample=False)[0, 21:].tolist()
    assert seconds > 0
    assert len(gemma.real_text()) > 400_000
