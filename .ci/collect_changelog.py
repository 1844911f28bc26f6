"""Move the lines of ``changelog.d/`` into ``CHANGELOG.md``, under the version of the package, and remove their files.

A section of that version that is there already is added to, so that it can be run again before a release.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path

from source_tree import ROOT

KINDS = ("added", "changed", "fixed", "removed")
FRAGMENT = re.compile(rf"(?P<issue>\d+)(?:-[a-z-]+)?\.(?P<kind>{'|'.join(KINDS)})\.md")
VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)


def fragments(folder: Path) -> list[Path]:
    """The files of changes, in the order in which their lines stand in a section."""
    found = [path for path in folder.iterdir() if FRAGMENT.fullmatch(path.name)]
    return sorted(found, key=lambda path: (int(path.name.split("-")[0].split(".")[0]), path.name))


def collected(changelog: str, version: str, date: str, lines: list[tuple[str, str]]) -> str:
    """The text of the changelog with ``(kind, line)`` added to the section of a version, which comes first if it is new.

    >>> print(collected("# Changelog\\n", "1.0", "2026-01-02", [("added", "A thing.")]))
    # Changelog
    <BLANKLINE>
    ## 1.0 (2026-01-02)
    <BLANKLINE>
    ### Added
    <BLANKLINE>
    - A thing.
    <BLANKLINE>
    """
    head, *sections = re.split(r"^(?=## )", changelog.rstrip("\n") + "\n", flags=re.MULTILINE)
    if not any(section.startswith(f"## {version} ") for section in sections):
        sections.insert(0, f"## {version} ({date})\n")
    done = [_added_to(section, lines) if section.startswith(f"## {version} ") else section for section in sections]
    return "\n\n".join(part.rstrip("\n") for part in (head, *done)) + "\n"


def _added_to(section: str, lines: list[tuple[str, str]]) -> str:
    head, *parts = re.split(r"^(?=### )", section, flags=re.MULTILINE)
    known = {part.split("\n", 1)[0].removeprefix("### ").lower(): part.split("\n", 1)[1].strip("\n") for part in parts}
    for kind, line in lines:
        known[kind] = f"{known[kind]}\n- {line}" if known.get(kind) else f"- {line}"
    shown = [f"### {kind.capitalize()}\n\n{known[kind]}" for kind in KINDS if kind in known]
    return "\n\n".join([head.rstrip("\n"), *shown])


def main(root: Path = ROOT) -> None:
    """Rewrite the changelog, then remove the files."""
    paths = fragments(root / "changelog.d")
    if not paths:
        print("changelog: nothing to collect")
        return
    found = VERSION.search((root / "sparsedsl" / "__init__.py").read_text(encoding="utf-8"))
    assert found, "sparsedsl/__init__.py has no __version__"
    lines = [(path.name.split(".")[-2], path.read_text(encoding="utf-8").strip()) for path in paths]
    changelog = root / "CHANGELOG.md"
    text = collected(changelog.read_text(encoding="utf-8"), found[1], datetime.date.today().isoformat(), lines)
    changelog.write_text(text, encoding="utf-8")
    for path in paths:
        path.unlink()
    print(f"changelog: {len(paths)} lines moved to {found[1]}")


if __name__ == "__main__":
    main()
