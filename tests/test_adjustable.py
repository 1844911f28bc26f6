"""Options that are changed for a while: what counts when, and that tests change options in no other way."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparsedsl.adjustable import Adjustable

TESTS = Path(__file__).resolve().parent
# A constant of a module that is replaced: `patch.setattr(module, "NAME", ...)`, `mock.patch.object(module, "NAME", ...)`.
PATCHED = re.compile(r"\.(?:setattr|object)\((\w+), \"(_?[A-Z][A-Z0-9_]*)\"")
# What is patched that is no option: lists of properties to try and of packages to tell of, what was said already, where files lie, scripts
# of the benchmarks, the table of backends.
NO_OPTIONS = {
    ("battery", "PROGRAM_PROPERTIES"),
    ("module", "PACKAGES"),
    ("arguments", "_TOLD"),
    ("gallery", "PICTURES"),
    ("module", "WORKER"),
    ("module", "LAYER"),
    ("module", "FLUSH_BYTES"),
    ("registry", "BACKENDS"),
}


@dataclass(frozen=True)
class Sizes:
    rows: int = 4096
    keys: int = 64


def test_changes_count_inside_and_end_with_the_block():
    sizes = Adjustable(Sizes())
    with sizes.using(rows=1) as inside:
        assert sizes.now is inside and inside == Sizes(1, 64)
        with sizes.using(keys=2):
            assert sizes.now == Sizes(1, 2)
        assert sizes.now == Sizes(1, 64)
    assert sizes.now == Sizes()


def test_an_error_ends_them_too():
    sizes = Adjustable(Sizes())
    with pytest.raises(KeyError), sizes.using(rows=1):
        raise KeyError
    assert sizes.now == Sizes()


def test_other_threads_see_them():
    sizes, seen = Adjustable(Sizes()), []
    with sizes.using(rows=1):
        thread = threading.Thread(target=lambda: seen.append(sizes.now.rows))
        thread.start()
        thread.join()
    assert seen == [1]


def test_a_field_that_there_is_not():
    sizes = Adjustable(Sizes())
    with pytest.raises(TypeError, match="lines"), sizes.using(lines=1):
        pass
    assert sizes.now == Sizes()


def patched(text: str) -> list[tuple[str, str]]:
    """Module and name of the constants that a test file replaces."""
    return [found for found in PATCHED.findall(text) if found not in NO_OPTIONS]


def test_no_test_replaces_a_constant():
    files = [path for path in TESTS.rglob("test_*.py") if path.name != "test_adjustable.py"]
    found = {path.name: names for path in files if (names := patched(path.read_text(encoding="utf-8")))}
    assert not found, f"make them fields of an Adjustable, as in `with LIMITS.using(scan_chunk=1)`: {found}"


def test_the_check_notices_one():
    text = 'monkeypatch.setattr(scan_chunked, "CHUNK", 1)\nmock.patch.object(blocks, "_FEW", 0)\npatch.setattr(registry, "BACKENDS", {})'
    text = text + '\nmonkeypatch.setattr(module, "launch", 1)'
    assert patched(text) == [("scan_chunked", "CHUNK"), ("blocks", "_FEW")]
