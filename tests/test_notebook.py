"""The tutorial as a notebook is the page of the same name, and runs from its first cell to its last in a kernel of its own."""

from __future__ import annotations

import importlib.util

import pytest

from source_tree import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_notebook", ROOT / "docs" / "make_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_notebook_is_the_page(maker):
    book = maker.notebook(maker.PAGE.read_text(encoding="utf-8"))
    assert maker.NOTEBOOK.read_text(encoding="utf-8") == maker.written(book), "python docs/make_notebook.py"
    kinds = [cell.cell_type for cell in book.cells]
    assert kinds.count("code") > 10 and kinds[0] == "markdown"
    assert not any("printed" in cell.source or "```" in cell.source for cell in book.cells)


def test_the_notebook_runs(maker, tmp_path, monkeypatch):
    # What starts a kernel reads these; nothing of the user's own configuration plays a part.
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "configuration"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.read(maker.NOTEBOOK, as_version=4)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = ["".join(output.get("text", "") for output in cell.outputs) for cell in book.cells if cell.cell_type == "code"]
    assert shown[0] == "(kv_idx <= q_idx) & ((kv_idx < 2) | (q_idx - kv_idx < 16))\n"
    assert (tmp_path / "window_and_sinks.png").is_file()
