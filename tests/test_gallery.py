"""The gallery is whole and up to date: every public pattern has its picture and its entry, and no other lies about."""

from __future__ import annotations

import importlib.util
import sys

import pytest

import sparsedsl as sd
from source_tree import ROOT

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def gallery():
    spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs" / "make_pictures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_pictures"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["make_pictures"]


def test_every_public_pattern_has_an_entry(gallery):
    assert set(gallery.GALLERY) == set(sd.patterns.__all__)


def test_every_entry_has_its_picture_and_no_other_picture_exists(gallery):
    pictures = {path.name: path.stat().st_size for path in gallery.PICTURES.iterdir()}
    views = {name for name in pictures if name.startswith("view_")}
    assert set(pictures) - views == {f"{name}.png" for name in gallery.GALLERY}
    shown = (ROOT / "docs" / "playground.md").read_text(encoding="utf-8")
    assert views == {line.partition("](pictures/")[2].rstrip(")") for line in shown.splitlines() if line.startswith("![")}
    assert all(1_000 < size < (150_000 if name in views else 60_000) for name, size in pictures.items()), pictures


def test_the_page_is_what_the_docstrings_say(gallery):
    page = gallery.PAGE.read_text(encoding="utf-8")
    assert page == gallery.page(), "python docs/make_pictures.py --page"
    for name in sd.patterns.__all__:
        assert f"### {name}\n" in page and f"(pictures/{name}.png)" in page


@pytest.mark.parametrize("name", sd.patterns.__all__)
def test_every_picture_can_be_drawn(gallery, name):
    figure = gallery.GALLERY[name].picture()
    assert all(axes.images or axes.lines or axes.patches for axes in figure.axes)


def test_a_picture_is_written(gallery, monkeypatch, tmp_path):
    monkeypatch.setattr(gallery, "PICTURES", tmp_path)
    assert gallery.write("causal").read_bytes().startswith(b"\x89PNG")
