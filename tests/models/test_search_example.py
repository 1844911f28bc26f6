"""The search example, on a model with random weights: it runs as a whole, and its texts are what it says."""

from __future__ import annotations

import argparse
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def example(example_modules: Any, tiny_gemma: Any) -> SimpleNamespace:
    model, tokenizer = tiny_gemma()

    def with_begin(text: str, return_tensors: str) -> Any:
        return tokenizer(text, return_tensors)

    with_begin.bos_token_id = 2  # type: ignore[attr-defined]
    found: SimpleNamespace = example_modules("parts.gemma", "gemma_search", load=lambda: (model, with_begin))
    found.model, found.tokenizer = model, with_begin
    return found


def test_rows_are_prose_and_code_in_turn_and_do_not_overlap(example: SimpleNamespace) -> None:
    rows = example.gemma_search.real_rows(example.tokenizer, 4, 500)
    more = example.gemma_search.real_rows(example.tokenizer, 2, 500, skip=4)
    assert rows.shape == (4, 500) and (rows[:, 0] == 2).all()
    words = [bytes(row[1:].tolist()).decode() for row in (*rows, *more)]
    assert all(text in example.gemma.real_text() for text in words[::2]) and words[1] in inspect.getsource(argparse)
    assert len(set(words)) == 6 and not any(word[:50] in other for word in words for other in words if other is not word)
    with pytest.raises(SystemExit, match="too short"):
        example.gemma_search.real_rows(example.tokenizer, 9, 4000)


def test_it_runs_as_a_whole(example: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, out = tmp_path / "a" / "pareto.png", tmp_path / "b" / "numbers.json"
    arguments = ["--tokens=120", "--rows=2", "--positions=40", "--held-out=1", f"--resume={tmp_path}/resume.json"]
    assert example.gemma_search.main([*arguments, "--picture", str(picture), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "Layers [5] of 6" in shown and "held-out text: perplexity" in shown and "retrieval" in shown
    found = json.loads(out.read_text())
    assert found["assignment"]["5"] in ["native", *example.gemma_search.CANDIDATES]
    assert found["cost"]["flops"] < found["cost"]["native"]
    assert found["perplexity"]["chosen"] <= 1.01 * found["perplexity"]["native"]
    assert picture.stat().st_size > 5_000
    with torch.no_grad():
        assert example.model(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all(), "the model is as it was"
