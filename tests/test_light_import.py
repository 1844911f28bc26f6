"""``import sparsedsl`` is cheap: a process that did only this has loaded none of the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

import sparsedsl
from source_tree import ROOT

HEAVY = ("torch", "triton", "transformers", "matplotlib", "hypothesis", "z3")


def loaded_by(statement: str) -> set[str]:
    """Which heavy libraries a fresh Python has loaded after the statement."""
    code = f"import sys\n{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    return set(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import sparsedsl",
        "from sparsedsl import SparseDSLError",
        "import sparsedsl.settings; sparsedsl.settings.settings()",
        "import sparsedsl; dir(sparsedsl)",
    ],
)
def test_heavy_libraries_stay_out(statement):
    assert loaded_by(statement) == set()


def test_type_checkers_see_the_names_that_load_on_first_use():
    """Without it everything that is read from ``sparsedsl`` would be Any to them."""
    tree = ast.parse((ROOT / "sparsedsl" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    assert all(isinstance(part, ast.ImportFrom) for part in block.body)
    told = {alias.name: part.module for part in block.body for alias in part.names if alias.name == alias.asname}
    assert told == {name: module or "sparsedsl" for name, module in sparsedsl._PUBLIC.items()}


def test_the_check_can_fail():
    assert "torch" in loaded_by("import sparsedsl, torch")
    assert loaded_by("import matplotlib") == {"matplotlib"}
