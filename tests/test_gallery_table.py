"""The table of docs/gallery.md says what the declarations say, and every row is of a test that there is."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys

import pytest

import sparsedsl as sd
from source_tree import ROOT


@pytest.fixture(scope="module")
def made():
    spec = importlib.util.spec_from_file_location("make_gallery", ROOT / "docs" / "make_gallery.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_gallery"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_gallery"]


def test_the_page_is_what_the_library_says(made):
    page = made.PAGE.read_text(encoding="utf-8")
    written = page.partition(made.FROM)[2].partition(made.TO)[0].splitlines()
    found = made.table().splitlines()
    wrong = [f"written: {one}\nfound:   {other}" for one, other in zip(written, found, strict=False) if one != other]
    assert not wrong and len(written) == len(found), "\n".join(["python docs/make_gallery.py", *wrong])
    systems = [line.split(" | ") for line in written[2:]]
    assert len(systems) >= 40
    assert all(row[3] for row in systems), "a system runs on reference alone"


def test_tests_name_what_they_compare(made):
    for row in made.ROWS:
        text = (ROOT / row.test).read_text(encoding="utf-8")
        assert re.search(rf"(P|patterns)\.{row.name}\b|\"{row.name}\"", text), f"{row.test} does not name {row.name}"


def test_every_program_of_the_library_has_a_row(made):
    kinds = {name: inspect.signature(getattr(sd.patterns, name)).return_annotation for name in sd.patterns.__all__}
    programs = {name for name, kind in kinds.items() if kind not in ("Mask", "Pattern", "Score", "Index", "tuple[Index, ...]")}
    assert programs - {row.name for row in made.ROWS} == set()


def test_a_page_that_lies_is_seen(made, monkeypatch):
    (row,) = (row for row in made.ROWS if row.name == "ring_linear")
    honest = made.cells(row)
    assert honest[3:7] == ("tiled, cpp, triton", "yes", "state", "PROVED")
    monkeypatch.setattr(made, "LATER_QUERIES", "keeps state")
    assert made.cells(row)[4] == "if meant"
