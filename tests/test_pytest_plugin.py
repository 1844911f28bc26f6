"""The pytest plugin: light at the start, and it has the last word on how many cases are drawn; types that Hypothesis knows."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from source_tree import ROOT
from sparsedsl.pytest_plugin import _whole

HEAVY = ("torch", "sympy", "hypothesis", "triton", "z3", "numpy")
PLUGIN = ("-p", "sparsedsl.pytest_plugin", "-p", "no:cacheprovider")
TESTS = """
import sparsedsl as sd

def test_a_check():
    report = sd.testing.check(sd.kv_idx <= sd.q_idx, examples=3, seed=4)
    print("drawn", report.seed, [p.examples for p in report.properties])

@sd.testing.kernel_test(implements=sd.kv_idx >= 0, group=1, dtypes="float32", examples=4, only="NUM")
def test_a_kernel(q, k, v):
    import torch
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
"""


def python(code: str, folder: Path = ROOT) -> str:
    found = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=found, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_nothing_heavy_is_loaded_when_pytest_starts(tmp_path):
    run = f"import sys, pytest; pytest.main(['-q', '-p', 'no:hypothesispytest', *{PLUGIN!r}, '{tmp_path}'])"
    told = f"{run}; assert 'sparsedsl.pytest_plugin' in sys.modules; print('loaded', *[n for n in {HEAVY!r} if n in sys.modules])"
    assert python(told, tmp_path).splitlines()[-1].split() == ["loaded"]


def test_the_entry_points_name_what_there_is():
    import importlib

    points = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert points["pytest11"] == {"sparsedsl.pytest_plugin": "sparsedsl.pytest_plugin"}
    module, _, name = points["hypothesis"]["sparsedsl"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def run_pytest(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_mine.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-rP", "--rootdir", str(folder), *PLUGIN, *words, "test_mine.py"]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )


def test_the_options_have_the_last_word(tmp_path):
    done = run_pytest(tmp_path, "--sparsedsl-examples=2", "--sparsedsl-seed=7")
    assert done.returncode == 0, done.stdout
    assert "sparsedsl: examples 2, seed 7 in every check of the test kit" in done.stdout
    assert "drawn 7 [1, 2, 2, 2, 2, 2, 2]" in done.stdout


def test_words_that_are_no_numbers(tmp_path):
    done = run_pytest(tmp_path, "--sparsedsl-examples=0")
    assert (
        done.returncode == pytest.ExitCode.USAGE_ERROR and "'0' is not a whole number of at least 1" in done.stdout + done.stderr
    )
    assert (_whole(0)("0"), _whole(1)("12")) == (0, 12)
    for text in ("many", "-1", "1.5", ""):
        with pytest.raises(pytest.UsageError, match="is not a whole number of at least 0"):
            _whole(0)(text)


def test_hypothesis_draws_our_types():
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import sys, hypothesis, sparsedsl as sd\n"
        "kinds = [sd.Mask, sd.Pattern, sd.Program]\n"
        "assert 'torch' not in sys.modules\n"
        "print(*[type(hypothesis.strategies.from_type(kind).example()).__name__ for kind in kinds])"
    )
    assert python(code).split() == ["Mask", "Pattern", "Program"]


def test_hypothesis_that_is_loaded_later_asks_by_its_entry_point():
    code = (
        "import sys, sparsedsl as sd; sd.Mask; import hypothesis\n"
        "from sparsedsl import type_strategies\n"
        "type_strategies.register(); type_strategies.register()\n"
        "assert 'torch' not in sys.modules; print(*sorted(type_strategies._registered))"
    )
    assert python(code).split() == ["Index", "Mask", "Score"]
