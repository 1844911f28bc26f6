"""Quantities are written in one place: no report makes its own bytes, FLOPs, times or percent."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from source_tree import ROOT
from sparsedsl.quantities import bytes_text, factor_text, flops_text, number_text, seconds_text, share_text

UNIT = re.compile(r"\s?(?:[kKMGTPE]i?B|[kMGTPE]?FLOPs?|ns|us|ms|x less|%)\b|\s?%")
# What is drawn is not a report: labels of axes have little room.
DRAWN = {"plotting.py", "strip_picture.py", "program_picture.py", "pareto_picture.py", "quantities.py"}


def by_hand(source: str) -> Iterator[int]:
    """Lines of f-strings that write a share or a unit by themselves."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        for part, after in zip(node.values, [*node.values[1:], None], strict=True):
            if not isinstance(part, ast.FormattedValue) or part.format_spec is None:
                continue
            written = part.format_spec.values if isinstance(part.format_spec, ast.JoinedStr) else []
            spec = "".join(str(one.value) for one in written if isinstance(one, ast.Constant))
            unit = isinstance(after, ast.Constant) and UNIT.match(str(after.value))
            if spec.endswith("%") or (unit and re.search(r"\.\d*[fge]$", spec)):
                yield part.lineno


def reports() -> list[Path]:
    folders = ("sparsedsl", "codegen", "patterns")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if path.name not in DRAWN]


# Signed changes of a loss, told to a hundredth of a percent beside their standard errors.
ALLOWED = {"sparsedsl/models/layer_search/search_report.py": 2}


def test_no_report_writes_units_of_its_own() -> None:
    found = {str(path.relative_to(ROOT)): [*by_hand(path.read_text(encoding="utf-8"))] for path in reports()}
    assert {name: lines for name, lines in found.items() if len(lines) > ALLOWED.get(name, 0)} == {}


@pytest.mark.parametrize("text", ['f"{x:.1%}"', 'f"{x / 2**20:.3g} MiB"', 'f"takes {s * 1e3:.1f} ms"', 'f"{f / 1e9:,.2f} GFLOP"'])
def test_the_check_finds_what_it_should(text: str) -> None:
    assert [*by_hand(text)] == [1]
    assert [*by_hand('f"{n:,} tokens, {name:16} and {x:.3g}"')] == []


SIZES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50, "EiB": 2**60}


@given(st.integers(0, 2**62))
@settings(max_examples=200)
def test_bytes_read_back(count: int) -> None:
    number, unit = bytes_text(count).split()
    assert len(number.replace(".", "")) <= 5
    assert abs(float(number.replace(",", "")) * SIZES[unit] - count) <= 0.006 * count


@given(st.floats(1e-9, 1e7))
@settings(max_examples=200)
def test_times_read_back(seconds: float) -> None:
    units = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
    words = seconds_text(seconds).split()
    back = sum(float(number.replace(",", "")) * units[unit] for number, unit in zip(words[::2], words[1::2], strict=True))
    assert abs(back - seconds) <= 0.02 * seconds


@given(st.floats(0, 1))
@settings(max_examples=200)
def test_a_share_looks_whole_only_where_it_is(share: float) -> None:
    text = share_text(share)
    assert (text == "100 %") == (share == 1) or 1 - share < 1e-12
    assert (text == "0 %") == (share == 0)


def test_figures_at_the_ends() -> None:
    assert bytes_text(1023) == "0.999 KiB" and flops_text(999_600) == "1 MFLOP" and seconds_text(9.996e-4) == "1 ms"
    assert factor_text(float("inf")) == "infx" and number_text(-1234.5) == "-1,234" and number_text(1e-20) == "1.00e-20"
