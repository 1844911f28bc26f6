"""Completion in shells, by argcomplete (extra ``completion``): options and commands from the parser, and names that a SPEC may have.

Nothing of it is loaded unless a shell asks, which it does by an environment variable.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["complete", "complete_spec", "names_in"]

LIBRARY = "sparsedsl.patterns"


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end the process; without argcomplete, or where no shell asks, nothing happens."""
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(parser, always_complete_options="long")


def complete_spec(prefix: str = "", **_: Any) -> list[str]:
    """What a SPEC may go on as: the library's patterns, files, and the names that a file defines. Nothing is imported or run.

    >>> complete_spec("sparsedsl.patterns:moba")
    ['sparsedsl.patterns:moba']
    """
    place, colon, _name = prefix.rpartition(":")
    if not colon:
        folder = Path(prefix).parent
        places = [
            LIBRARY,
            *(str(path) + "/" * path.is_dir() for path in _visible(folder) if path.is_dir() or path.suffix == ".py"),
        ]
        return [f"{place}:" if place.endswith((".py", LIBRARY)) else place for place in places if place.startswith(prefix)]
    if place == LIBRARY:
        from sparsedsl import patterns

        names = list(patterns.__all__)
    else:
        names = names_in(Path(place)) if place.endswith(".py") else []
    return [f"{place}:{name}" for name in names if f"{place}:{name}".startswith(prefix)]


def _visible(folder: Path) -> Iterator[Path]:
    try:
        yield from (path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "_")))
    except OSError:
        return


def names_in(path: Path) -> list[str]:
    """The public names that a file binds at its top, read and not run; none where it cannot be read.

    >>> path = Path("mine.py")
    >>> _ = path.write_text("import os\\nlocal = 1\\ndef factory():\\n    hidden = 2\\n")
    >>> names_in(path), names_in(Path("none.py"))
    (['factory', 'local'], [])
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    found: set[str] = set()
    for statement in tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            found.add(statement.name)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found.update(node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
    return sorted(name for name in found if not name.startswith("_"))
