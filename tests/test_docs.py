"""What the documentation shows runs: the examples in docstrings, and the Python blocks of every page.

A block that cannot run here (a GPU, a large model) has ``<!-- not run: the reason -->`` on the line above its fence; ``.ci/pages.py`` has
the rules. The site itself is built by ``make docs``.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
import sys

import pytest

from pages import PRINTED, blocks, run
from source_tree import ROOT, modules

# By the names users import; ``pytest --doctest-modules`` would load a second copy of some.
MODULES = [name for name in modules() if not name.endswith("__main__")]
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
# Whole names of the public modules, and the folder of pages that describe them one by one.
PUBLIC = [
    "sparsedsl",
    "sparsedsl.patterns",
    "sparsedsl.testing",
    "sparsedsl.models",
    "sparsedsl.nn",
    "sparsedsl.export",
    "sparsedsl.serve",
    "sparsedsl.serve.vllm",
]
REFERENCE = ROOT / "docs" / "api"


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


@pytest.mark.parametrize("package", PUBLIC)
def test_public_functions_and_classes_are_explained_by_example(package):
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    assert [name for name in dir(module) if name.startswith("_") or name in ("annotations", "answer_for")] == []
    things = {name: getattr(module, name) for name in dir(module)}
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


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_function_and_class_stands_in_the_reference_once(package):
    module, found = importlib.import_module(package), []
    for page in REFERENCE.glob("*.md"):
        current = ""
        for line in page.read_text(encoding="utf-8").splitlines():
            if line.startswith(".. currentmodule:: "):
                current = line.split()[-1]
            elif match := re.match(r"\.\. auto\w+:: (\w+)", line):
                found += [match[1]] if current == package else []
    wanted = [name for name in dir(module) if inspect.isroutine(getattr(module, name)) or inspect.isclass(getattr(module, name))]
    assert sorted(found) == sorted(wanted)


def test_every_other_public_name_is_told_of_in_the_reference():
    text = "\n".join(page.read_text(encoding="utf-8") for page in REFERENCE.glob("*.md"))
    for package in PUBLIC:
        module = importlib.import_module(package)
        for name in dir(module):
            assert re.search(rf"\b{name}\b", text), f"{package}.{name}"


@pytest.mark.parametrize("document", PAGES)
def test_python_blocks_run(document, scratch):
    text = (ROOT / document).read_text(encoding="utf-8")
    found = blocks(document, text)
    assert text.splitlines().count(PRINTED) == sum(block.printed is not None for block in found), (
        "something printed follows no Python block"
    )
    names = run(found)
    if document == "README.md":
        assert_readme_tells_its_report(text, names["report"])


def assert_readme_tells_its_report(text, report):
    """The numbers in the comment beside ``print(report)`` are those of the report."""
    tiles = (65536 // 128) ** 2
    pairs = f"{100 * report.density:.2f} % of all pairs, {report.lists.listed:,} of {tiles:,} tiles"
    assert f"print(report)  # {pairs}, {report.flops_dense / report.flops:.0f} x fewer operations than dense" in text


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900, (
        "at most 900 words: the rest has pages of its own"
    )


def test_signatures_alone_are_fenced_as_py():
    """Where a fence says ``py`` nothing is run: the gallery has lines such as ``causal() -> Mask`` there."""
    fenced = {page for page in PAGES if "\n```py\n" in (ROOT / page).read_text(encoding="utf-8")}
    assert fenced <= {"docs/patterns.md"}


PAGE = """# Title

```python
x = 1
```

<!-- not run: needs a GPU -->
```python
raise ValueError
```

```python
print(x, x + 1)
```

<!-- printed -->
```text
1 ...
```

```python
y = x
z = y / 0
```
"""


def test_an_error_in_a_block_is_found_and_named_by_its_line():
    first, second, third, fourth = found = blocks("D.md", PAGE)
    assert (first.line, second.line, third.line, fourth.line) == (4, 9, 13, 22)
    assert second.not_run == "needs a GPU" and first.not_run is None
    assert third.printed == "1 ...\n" and fourth.printed is None
    with pytest.raises(ZeroDivisionError) as caught:
        run(found)
    assert (str(caught.traceback[-1].path), caught.traceback[-1].lineno + 1) == ("D.md", 23)


def test_what_a_block_does_not_print_is_found():
    found = blocks("D.md", PAGE.replace("1 ...", "1 3"))
    with pytest.raises(AssertionError, match=r"D\.md, line 13: the page shows\n1 3\n\nand the block prints\n1 2"):
        run(found)
