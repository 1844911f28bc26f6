"""``pytest --sparsedsl-examples=N --sparsedsl-seed=N``: how long the test kit looks in this run, and at which cases.

pytest finds this by itself where sparsedsl is installed (``-p sparsedsl.pytest_plugin`` elsewhere) and loads it at every start: so it
imports neither torch nor sympy nor Hypothesis.
"""

from __future__ import annotations

from typing import Any

import pytest

from sparsedsl.check_defaults import ASKED

__all__ = ["pytest_addoption", "pytest_configure", "pytest_report_header", "pytest_unconfigure"]


def pytest_addoption(parser: Any) -> None:
    """Two options."""
    group = parser.getgroup("sparsedsl")
    group.addoption(
        "--sparsedsl-examples", metavar="N", type=_whole(1),
        help="random cases a property in sd.testing.check and kernel_test, whatever number the tests name",
    )  # fmt: skip
    group.addoption(
        "--sparsedsl-seed", metavar="N", type=_whole(0), help="draw the cases of this seed, whatever seed the tests name"
    )


def _whole(least: int) -> Any:
    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text) >= least):
            raise pytest.UsageError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return number


def pytest_configure(config: Any) -> None:
    """What was asked for counts until the run is over."""
    given = {name: config.getoption(f"--sparsedsl-{name}") for name in ("examples", "seed")}
    config._sparsedsl_asked = ASKED.using(**given)
    config._sparsedsl_asked.__enter__()


def pytest_unconfigure(config: Any) -> None:
    """Runs within a process do not see each other's numbers."""
    asked = getattr(config, "_sparsedsl_asked", None)
    if asked is not None:
        asked.__exit__(None, None, None)
        del config._sparsedsl_asked


def pytest_report_header(config: Any) -> str | None:
    """What was asked for; nothing where nothing was."""
    words = {name: getattr(ASKED.now, name) for name in ("examples", "seed")}
    said = [f"{name} {value}" for name, value in words.items() if value is not None]
    return f"sparsedsl: {', '.join(said)} in every check of the test kit" if said else None
