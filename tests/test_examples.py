"""Every example runs on CPU, from another folder, and ends well."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from source_tree import ROOT

EXAMPLES = ROOT / "examples"
# What cannot run here, and what tests it instead.
ELSEWHERE = {
    "gemma_hybrid.py": "needs 240 MB of weights: make demo runs it",
    "gemma.py": "the parts of gemma_hybrid.py",
}
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in ELSEWHERE)


def test_examples_are_found():
    assert "declare_and_inspect.py" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_example_runs(name, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), f"{name} says nothing"


@pytest.mark.parametrize("name", NAMES)
def test_example_asks_one_question_and_says_how_to_run_it(name):
    first, *_ = source = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    assert first.startswith('"""') and first.endswith("?")
    assert any(line.strip().startswith(f"python examples/{name}") for line in source)
