"""``sd.show_versions()`` and the data behind it."""

from __future__ import annotations

import json

import torch

import sparsedsl as sd
from sparsedsl import versions as module
from sparsedsl.versions import as_text, versions


def test_the_data_is_json_and_says_what_matters():
    found = versions()
    assert json.loads(json.dumps(found)) == found
    assert found["sparsedsl"] == sd.__version__
    assert found["packages"]["torch"] == torch.__version__
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["cpu"]["torch_uses"] == torch.backends.cpu.get_cpu_capability()


def test_it_prints_a_line_a_fact_and_returns_nothing(capsys):
    assert sd.show_versions() is None
    lines = capsys.readouterr().out.splitlines()
    names = [line[:13].strip() for line in lines]
    assert {
        "sparsedsl",
        "python",
        "torch",
        "triton",
        "sympy",
        "transformers",
        "CPU",
        "instructions",
        "threads",
        "compiler",
        "GPU",
    } <= set(names)
    assert all(line[14:].strip() for line in lines)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("SPARSEDSL_TUNE", "off")
    text = as_text(versions())
    assert "no-such-package not installed" in text and "compiler      none" in text and "SPARSEDSL_TUNE off" in text
