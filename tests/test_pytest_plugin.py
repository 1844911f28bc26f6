"""The pytest plugin: light at the start, and it has the last word on how many cases are drawn; types that Hypothesis knows."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from source_tree import ROOT

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


@pytest.mark.parametrize("word", ["--sparsedsl-examples=0", "--sparsedsl-examples=many", "--sparsedsl-seed=-1"])
def test_words_that_are_no_numbers(tmp_path, word):
    done = run_pytest(tmp_path, word)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "is not a whole number" in done.stdout + done.stderr


DRAWS = "from hypothesis import strategies as st; print(type(st.from_type({type}).example()).__name__)"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "first", ["import hypothesis; import sparsedsl as sd", "import sparsedsl as sd; sd.Mask; import hypothesis; register()"]
)
def test_hypothesis_draws_our_types_whichever_is_loaded_first(first):
    """The second way is the entry point's, which Hypothesis calls when it is imported."""
    code = "import warnings; warnings.simplefilter('ignore')\nfrom sparsedsl.type_strategies import register\n"
    code += f"{first}\nimport sys\nassert 'torch' not in sys.modules\n"
    code += "\n".join(DRAWS.format(type=f"sd.{name}") for name in ("Mask", "Pattern", "Program"))
    assert python(code).split() == ["Mask", "Pattern", "Program"]
