"""What the documentation shows runs: the examples in docstrings, and the Python blocks of README.md and CONTRIBUTING.md.

A block that cannot run here (a GPU, a large model) has ``<!-- not run: the reason -->`` on the line above its fence.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import sys
from dataclasses import dataclass

import pytest

from source_tree import ROOT, modules

# By the names users import; ``pytest --doctest-modules`` would load a second copy of some.
MODULES = [name for name in modules() if not name.endswith("__main__")]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
FENCE = re.compile(r"(?P<above>[^\n]*)\n```python\n(?P<source>.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Examples may write files, and draw without a screen."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, scratch, capsys):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert not failed, capsys.readouterr().out


@pytest.mark.parametrize("package", ["sparsedsl", "sparsedsl.patterns", "sparsedsl.testing", "sparsedsl.models", "sparsedsl.export"])
def test_public_functions_and_classes_are_explained_by_example(package):
    module = importlib.import_module(package)
    assert module.__all__
    things = {name: getattr(module, name) for name in module.__all__}
    lacking = [name for name, thing in things.items() if not _is_explained(thing)]
    assert lacking == [], "public, but the docstring is missing or shows no runnable example"


def _is_explained(thing: object) -> bool:
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return bool(thing.__doc__)
    if not (inspect.isroutine(thing) or inspect.isclass(thing)):
        return True
    return bool(thing.__doc__) and ">>>" in _whole_docstring(thing)


def _whole_docstring(thing: object) -> str:
    """A class may show its example at a method or at its constructor."""
    members = vars(thing).values() if inspect.isclass(thing) else ()
    return "\n".join(inspect.getdoc(part) or "" for part in (thing, *(m for m in members if inspect.isroutine(m))))


@dataclass(frozen=True)
class Block:
    """One fenced Python block of a document."""

    document: str
    line: int
    source: str
    not_run: str | None


def blocks(document: str, text: str) -> list[Block]:
    """The Python blocks of a document, in order."""
    found = []
    for match in FENCE.finditer("\n" + text):
        reason = re.search(r"<!-- not run: (.+?) -->", match["above"])
        line = text[: max(match.start("source") - 1, 0)].count("\n") + 1
        found.append(Block(document, line, match["source"], reason[1] if reason else None))
    return found


def run(document: list[Block]) -> int:
    """Run the blocks in one namespace, as a reader would who pastes them one after the other; how many were run."""
    namespace = {"__name__": "__main__"}
    ran = [block for block in document if block.not_run is None]
    for block in ran:
        exec(compile("\n" * (block.line - 1) + block.source, block.document, "exec"), namespace)
    return len(ran)


DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{name}.md" for name in ("conversion", "export", "kernels", "models", "programs", "search", "testing", "tuning")),
]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_run(document, scratch):
    found = blocks(document, (ROOT / document).read_text(encoding="utf-8"))
    ran = run(found)
    assert ran > 0 or document != "README.md", "README.md shows no Python that runs"


def test_an_error_in_a_block_is_found_and_named_by_its_line():
    fence = "```"
    text = f"""# Title

{fence}python
x = 1
{fence}

<!-- not run: needs a GPU -->
{fence}python
raise ValueError
{fence}

{fence}python
y = x
z = y / 0
{fence}
"""
    first, second, third = found = blocks("D.md", text)
    assert (first.line, second.line, third.line) == (4, 9, 13)
    assert second.not_run == "needs a GPU" and first.not_run is None
    with pytest.raises(ZeroDivisionError) as caught:
        run(found)
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == ("D.md", 14)
