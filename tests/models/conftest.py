"""What the tests of examples share: the modules of an example, imported anew and around a tiny model."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SimpleNamespace]]:
    """``example_modules("parts.gemma", "gemma_search", load=...)``: modules by their last names, ``gemma.load()`` gives ``load()``."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    made: list[str] = []

    def load_modules(*names: str, load: Callable[[], Any]) -> SimpleNamespace:
        for name in names:
            sys.modules.pop(name, None)
        made.extend(names)
        modules = {name.rpartition(".")[2]: importlib.import_module(name) for name in names}
        monkeypatch.setattr(modules["gemma"], "load", load)
        return SimpleNamespace(**modules)

    yield load_modules
    for name in made:
        del sys.modules[name]
