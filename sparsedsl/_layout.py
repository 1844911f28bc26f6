"""Lets a checkout work without being installed: finds ``patterns/`` and ``codegen/``, which lie beside this package.

``sparsedsl/__init__.py`` imports this module first. In an installed wheel both folders lie inside
the package and nothing is done.
"""

from __future__ import annotations

import sys
from pathlib import Path

_package = Path(__file__).resolve().parent
_root = _package.parent

if not (_package / "patterns").is_dir() and (_root / "patterns").is_dir() and (_root / "pyproject.toml").is_file():
    sys.modules["sparsedsl"].__path__.append(str(_root))
