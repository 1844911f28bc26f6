"""Which files make up the package, and the name each is imported by. The checks in ``.ci/`` and in ``tests/`` start from here."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# folder of the checkout -> package it is installed as
PACKAGES = {"sparsedsl": "sparsedsl", "patterns": "sparsedsl.patterns", "codegen": "sparsedsl.codegen"}


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the package by its real name, in order; a package's ``__init__.py`` under the package's name."""
    found = {}
    for folder, package in PACKAGES.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found
