"""Writes docs/tutorial.ipynb from docs/tutorial.md: blocks of Python become cells, what they print is left for the reader to see.

python docs/make_notebook.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".ci"))

from pages import BLOCK  # noqa: E402

PAGE, NOTEBOOK = ROOT / "docs" / "tutorial.md", ROOT / "docs" / "tutorial.ipynb"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def notebook(text: str) -> nbformat.NotebookNode:
    """The page as a notebook without results, the same every time."""
    cells, end = [], 0
    for match in BLOCK.finditer(text):
        cells += _prose(text[end : match.start()] + match["above"]) + [("code", match["source"].rstrip("\n"))]
        end = match.end()
    cells += _prose(text[end:])
    make = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    made = [make[kind](source, id=f"cell-{number}") for number, (kind, source) in enumerate(cells, 1)]
    return nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": KERNEL})


def _prose(text: str) -> list[tuple[str, str]]:
    return [("markdown", text.strip("\n"))] if text.strip() else []


def written(book: nbformat.NotebookNode) -> str:
    """A notebook as the text of its file."""
    return nbformat.writes(book) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(written(notebook(PAGE.read_text(encoding="utf-8"))), encoding="utf-8")
    print(NOTEBOOK)
