"""Private names of torch stand in one file of the package, which says what happens where they are missing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from source_tree import ROOT, modules
from sparsedsl import torch_private
from sparsedsl.errors import UnsupportedError

HOME = "sparsedsl.torch_private"


def dotted(node: ast.expr) -> str | None:
    """``torch._C.x`` of the expression that says so."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return None if base is None else f"{base}.{node.attr}"
    return None


def private(name: str) -> bool:
    """Whether a dotted name is one of torch's that begins with one underscore somewhere."""
    parts = name.split(".")
    return parts[0] == "torch" and any(p.startswith("_") and not p.startswith("__") for p in parts)


def uses(text: str) -> Iterator[tuple[int, str]]:
    """Line and name of every private name of torch in a module."""
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(module=str(base), level=0):
                names = [f"{base}.{alias.name}" for alias in node.names]
            case ast.Attribute():
                names = [dotted(node) or ""]
            case _:
                continue
        yield from ((node.lineno, name) for name in names if private(name))


def test_private_names_stand_in_one_file():
    files = {name: path for name, path in modules(ROOT).items() if name != HOME}
    found = [f"{path.relative_to(ROOT)}:{line}: {name}" for path in files.values() for line, name in uses(path.read_text())]
    assert found == [], "give it a name in sparsedsl/torch_private.py, with what it is for and what happens without it"
    assert len(list(uses(Path(torch_private.__file__).read_text()))) > 10


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import torch\ntorch._C._functorch.is_batchedtensor(x)", True),
        ("from torch._subclasses.fake_tensor import FakeTensor", True),
        ("from torch.autograd.function import _SingleLevelFunction", True),
        ("import torch._dynamo", True),
        ("def f():\n    return torch.ops.mkldnn._linear_pointwise", True),
        ("torch.Tensor.__getitem__, torch.__version__, sparsedsl._layout, 'torch._C.'", False),
    ],
)
def test_the_check_finds_what_it_should(text, found):
    assert bool(list(uses(text))) is found


def test_a_missing_name_is_refused_where_it_is_needed_and_not_before():
    for path in ("torch._C._no_such_name", "torch._no_such_module.name", "torch.Tensor._no_such_method"):
        refuse = torch_private._private(path, "tracing")
        with pytest.raises(UnsupportedError) as caught:
            refuse(1, a=2)
        assert str(caught.value) == (
            f"torch {torch.__version__} has no {path}, which tracing needs; use a torch from 2.11 to 2.13, which have it"
        )


def test_every_name_is_there_in_the_torch_we_develop_with():
    if not torch.__version__.startswith("2.13."):
        pytest.skip("another torch")
    refusing = [name for name, value in vars(torch_private).items() if getattr(value, "__qualname__", "").startswith("_private.")]
    assert refusing == []
    assert len(torch_private._GRAPH_MODES) == 3 and len(torch_private._NO_VALUES) == 2
