"""Imports point one way (CONTRIBUTING.md, "The map"): read with ast, nothing is imported. A cycle or a step back is a failure."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

from source_tree import PACKAGES, ROOT, modules

# A module imports from its own layer and from those above it in this list, never from those beside or below it.
ARROW = [
    ["_layout", "errors"],
    ["adjustable", "html_card", "plain_values", "quantities", "settings", "torch_private"],
    ["check_defaults"],
    ["lang"],
    ["program"],
    ["tracing"],
    ["analysis"],
    ["tuning"],
    ["tiling"],
    ["codegen"],
    ["gpu"],
    ["runtime"],
    ["selection"],
    # Each backend is a room of its own. Those after `tiled` ask it one thing: who sees whom, where keys hold NaN.
    ["backends", "backends.protocol"],
    ["backends.reference", "backends.tiled"],
    ["backends.cpp", "backends.flex", "backends.triton"],
    ["backends.registry"],
    ["execute"],
    ["working"],
    ["tune_command"],
    ["figures", "picture_style", "pattern_place"],
    ["strip_picture", "program_picture", "score_picture", "grid_picture"],
    ["plotting", "testing", "models", "nn", "export", "parallel", "serve", "specs", "versions"],
    ["type_strategies"],
    ["__init__"],
    ["backend_option", "build_command", "completion", "explain_command", "kernel_command", "pytest_plugin", "view"],
    ["plan_command", "view_command"],
    ["cli"],
    ["__main__"],
]
RANK = {layer: rank for rank, layers in enumerate(ARROW) for layer in layers}
PATTERNS_MAY_IMPORT = {"patterns", "errors", "lang", "program"}
MAY_IMPORT_PATTERNS = {"patterns", "models", "testing", "completion", "cli", "__init__"}


def layer(module: str) -> str:
    """``sparsedsl.lang.tables`` -> ``lang``, ``sparsedsl.backends.tiled.decode`` -> ``backends.tiled``; ``sparsedsl`` -> ``__init__``."""
    parts = module.split(".")
    return ".".join(parts[1 : 3 if parts[1:2] == ["backends"] else 2]) or "__init__"


def imported(path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and full name of everything of ours that a file imports, wherever in the file; bad spellings as ``!...``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(level=0, module=str(base)):
                names = [name if (name := f"{base}.{alias.name}") in known else base for alias in node.names]
            case ast.ImportFrom():
                names = ["!relative import"]
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
                names = [name]
            case _:
                continue
        for name in dict.fromkeys(names):
            if name.split(".")[0] in ("patterns", "codegen"):
                yield node.lineno, f"!import of {name}: write sparsedsl.{name}"
            elif name.startswith("!") or name.split(".")[0] == "sparsedsl":
                yield node.lineno, name


def complaint(importer: str, target: str) -> str | None:
    """Why this import is against the arrow, or None."""
    mine, other = layer(importer), layer(target)
    if other == mine:
        return None
    if mine == "patterns":
        return None if other in PATTERNS_MAY_IMPORT else f"patterns imports {sorted(PATTERNS_MAY_IMPORT)} only"
    if other == "patterns":
        return None if mine in MAY_IMPORT_PATTERNS else f"patterns is imported by {sorted(MAY_IMPORT_PATTERNS)} only"
    unknown = [name for name in (mine, other) if name not in RANK]
    if unknown:
        return f"{unknown[0]} has no place in the arrow: give it one in tests/test_layers.py and CONTRIBUTING.md"
    return None if RANK[other] < RANK[mine] else f"{mine} lies before or beside {other} in the arrow"


def violations(root: Path) -> list[str]:
    """Every import against the arrow, every relative or bare import, every cycle."""
    known, found, graph = modules(root), [], nx.DiGraph()
    for module, path in known.items():
        for line, target in imported(path, known):
            where = f"{path.relative_to(root)}:{line}"
            if target.startswith("!"):
                found.append(f"{where}: {target[1:]}")
            elif target not in known:
                found.append(f"{where}: there is no module {target}")
            else:
                graph.add_edge(module, target)
                if problem := complaint(module, target):
                    found.append(f"{where}: imports {target}, but {problem}")
    cycles = [sorted(part) for part in nx.strongly_connected_components(graph) if len(part) > 1]
    return found + [f"cycle: {' <-> '.join(cycle)}" for cycle in sorted(cycles)]


def test_imports_follow_the_arrow():
    assert violations(ROOT) == []


def test_every_module_is_read():
    names = modules(ROOT)
    on_disk = [path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")]
    assert sorted(names.values()) == sorted(on_disk)
    assert {layer(name) for name in names} <= {*RANK, "patterns"}


GOOD = {
    "sparsedsl/__init__.py": "from sparsedsl import _layout\nfrom sparsedsl.errors import E\n",
    "sparsedsl/_layout.py": "import sys\n",
    "sparsedsl/errors.py": "E = 1\n",
    "sparsedsl/lang/__init__.py": "",
    "sparsedsl/lang/tables.py": "from sparsedsl.errors import E\nimport sympy\n",
    "sparsedsl/lang/text.py": "def f():\n    from sparsedsl.lang import tables\n",
    "sparsedsl/tiling.py": "from sparsedsl.lang.tables import T\n",
    "codegen/__init__.py": "import sparsedsl.tiling\n",
    "patterns/__init__.py": "from sparsedsl.lang.tables import T\n",
}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        (
            {"sparsedsl/errors.py": "from sparsedsl.lang.tables import T"},
            ["errors.py:1: imports sparsedsl.lang.tables", "cycle:"],
        ),
        (
            {"sparsedsl/lang/tables.py": "import sparsedsl.lang.text"},
            ["cycle: sparsedsl.lang.tables <-> sparsedsl.lang.text"],
        ),
        (
            {"sparsedsl/lang/x.py": "def f():\n    import sparsedsl.tiling"},
            ["x.py:2: imports sparsedsl.tiling, but lang lies before"],
        ),
        (
            {"sparsedsl/lang/x.py": "import importlib\nimportlib.import_module('sparsedsl.tiling')"},
            ["x.py:2: imports sparsedsl.tiling"],
        ),
        (
            {"sparsedsl/tiling.py": "import sparsedsl as sd"},
            ["tiling.py:1: imports sparsedsl, but tiling lies before"],
        ),
        ({"sparsedsl/tiling.py": "from .lang import tables"}, ["tiling.py:1: relative import"]),
        (
            {"sparsedsl/tiling.py": "import codegen.source"},
            ["tiling.py:1: import of codegen.source: write sparsedsl.codegen"],
        ),
        (
            {"sparsedsl/tiling.py": "from sparsedsl.nowhere import x"},
            ["tiling.py:1: there is no module sparsedsl.nowhere"],
        ),
        (
            {"sparsedsl/tiling.py": "import sparsedsl.patterns"},
            ["tiling.py:1: imports sparsedsl.patterns, but patterns is imported by"],
        ),
        (
            {"patterns/x.py": "import sparsedsl.tiling"},
            ["x.py:1: imports sparsedsl.tiling, but patterns imports"],
        ),
        (
            {
                "sparsedsl/backends/tiled/x.py": "",
                "sparsedsl/backends/flex/y.py": "import sparsedsl.backends.triton.z",
                "sparsedsl/backends/triton/z.py": "import sparsedsl.backends.tiled.x",
            },
            ["y.py:1: imports sparsedsl.backends.triton.z, but backends.flex lies before or beside backends.triton"],
        ),
        (
            {"sparsedsl/drawer.py": "import sparsedsl.errors"},
            ["drawer.py:1: imports sparsedsl.errors, but drawer has no place"],
        ),
    ],
    ids=lambda value: next(iter(value), "clean") if isinstance(value, dict) else "",
)
def test_the_check_finds_what_it_should(tmp_path, change, found):
    for name, text in (GOOD | change).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    got = violations(tmp_path)
    assert len(got) == len(found), got
    assert all(part in line for part, line in zip(found, got, strict=True)), got
