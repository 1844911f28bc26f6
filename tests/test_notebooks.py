"""What notebooks show: well-formed, escaped, quick, in the colours of the page, without matplotlib."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

import sparsedsl as sd
from source_tree import ROOT
from sparsedsl.html_card import card, grid, tile_map
from sparsedsl.lang.thumbnail import thumbnail

CAUSAL = sd.patterns.causal()
DOC = torch.arange(256) // 50
EMPTY_ELEMENTS = {"path", "rect"}


class Nesting(HTMLParser):
    """Reads HTML and notes elements that are not closed, or closed out of turn; gathers text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.seen.append(tag)
        self.attributes += attrs

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in EMPTY_ELEMENTS
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Nesting:
    """The HTML, which must be well-formed."""
    parser = Nesting()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


SHOWN: dict[str, Callable[[], Any]] = {
    "pattern": lambda: sd.attend(CAUSAL & sd.patterns.sliding_window(64), score=sd.patterns.alibi(8)),
    "pattern that needs a table": lambda: sd.attend(sd.patterns.documents() & CAUSAL),
    "attention": lambda: sd.compile(CAUSAL),
    "attention of a program": lambda: sd.compile(sd.patterns.moba(chunk=16, top_k=2)),
    "program": lambda: sd.Program(sd.patterns.hsa(chunk=16, top_k=2)),
    "program without a mask": lambda: sd.Program(sd.patterns.ring_linear([0.9, 0.99])),
    "analysis": lambda: sd.analyse(sd.patterns.documents() & CAUSAL, 256, doc=DOC),
    "analysis of a program": lambda: sd.analyse(sd.patterns.moba(chunk=16, top_k=2), 256),
    "explanation": lambda: sd.compile(CAUSAL, backend="tiled").explain(256),
    "explanation of a program": lambda: sd.compile(sd.patterns.moba(chunk=16, top_k=2), backend="tiled").explain(256),
}
WITHOUT_PICTURE = {"pattern that needs a table", "program without a mask"}


@pytest.mark.parametrize("name", SHOWN)
def test_html_is_well_formed_and_has_a_table_and_a_picture(name: str) -> None:
    found = SHOWN[name]()
    html = found._repr_html_()
    parser = read(html)
    assert "table" in parser.seen and "pre" in parser.seen
    assert ("svg" in parser.seen) == (name not in WITHOUT_PICTURE)
    assert ("path" in parser.seen) == (name not in WITHOUT_PICTURE)


@pytest.mark.parametrize("name", SHOWN)
def test_no_colour_is_its_own(name: str) -> None:
    """A page is light or dark: text and picture take its colours, and no background is set."""
    html = SHOWN[name]()._repr_html_()
    colours = re.findall(r"(?:color|background|fill|stroke|background-color)(?:=\"|:)\s*([^;\"]+)", html)
    assert set(colours) <= {"inherit", "none", "currentColor"}
    assert not re.search(r"#[0-9a-fA-F]{3,6}\b|rgb\(|<style|<script", html)


def test_a_picture_shows_the_mask() -> None:
    words = [words for words in read(SHOWN["pattern"]()._repr_html_()).text if "downwards" in words]
    assert words == ["256 queries (downwards) x 256 keys; dark: all pairs, light: some"]
    svg = tile_map([[2, 0], [1, 2]], "two")
    assert 'd="M0 0h1v1h-1zM1 1h1v1h-1z"' in svg and 'd="M0 1h1v1h-1z"' in svg
    assert thumbnail((sd.kv_idx > sd.q_idx + 10**6).expr, {}, q_len=64).count("<path") == 0


def test_a_picture_of_a_program_tells_what_is_certain() -> None:
    cells = thumbnail((sd.kv_idx // 16 == sd.q_idx // 16).expr, {}, possible=(sd.kv_idx <= sd.q_idx).expr, q_len=48)
    assert cells.count("<path") == 2
    assert "M16 16h16v1h-16z" in cells, "its own chunk is dark"


def test_a_picture_ends_where_tables_do() -> None:
    bound = (sd.patterns.documents() & CAUSAL).bind(doc=DOC[:100])
    assert "100 queries" in thumbnail(bound.expr, bound.bound)


def test_names_and_words_are_escaped() -> None:
    evil = "<img src=x onerror=alert(1)>&\"'"
    html = card(evil, evil, [(evil, evil)], tile_map([[2]], evil), [evil], grid([evil], [[evil]]))
    assert "<img" not in html
    text = "".join(read(html).text)
    assert text.count(evil) == 8
    mask = read(sd.attend(sd.kv_idx < sd.q_idx)._repr_html_())
    assert "attend(kv_idx < q_idx)" in mask.text


def test_a_mask_is_shown_as_it_is_written_and_not_as_latex() -> None:
    assert repr(CAUSAL) == "Mask(kv_idx <= q_idx)"
    assert not hasattr(CAUSAL, "_repr_latex_")


@pytest.mark.parametrize("name", ["pattern", "attention", "program", "attention of a program"])
def test_it_is_quick(name: str) -> None:
    """Under 100 ms; processor time, the least of a few, as a test machine does other things too."""
    found = SHOWN[name]()
    found._repr_html_()
    took = []
    for _ in range(5):
        start = time.process_time()
        found._repr_html_()
        took.append(time.process_time() - start)
    assert min(took) < 0.1


def test_matplotlib_is_not_loaded() -> None:
    code = (
        "import sys, sparsedsl as sd\n"
        "for found in (sd.attend(sd.kv_idx <= sd.q_idx), sd.Program(sd.patterns.moba()), sd.analyse(sd.kv_idx <= sd.q_idx, 64)):\n"
        "    found._repr_html_()\n"
        "print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
