"""The Python of a Markdown page: its blocks in order, why some are not run, and what they say they print.

A block that cannot run has ``<!-- not run: the reason -->`` on the line above its fence. A block of text after a block of Python shows
what that prints if ``<!-- printed -->`` stands above it; ``...`` stands for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass

PRINTED = "<!-- printed -->"
BLOCK = re.compile(
    r"(?P<above>[^\n]*)\n```python\n(?P<source>.*?)^```\n" + rf"(?:\n{PRINTED}\n```text\n(?P<printed>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
ALIKE = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@dataclass(frozen=True)
class Block:
    """One fenced Python block of a page; ``printed`` is what the page says that it prints."""

    document: str
    line: int
    source: str
    not_run: str | None
    printed: str | None


def blocks(document: str, text: str) -> list[Block]:
    """The Python blocks of a page, in order."""
    found = []
    for match in BLOCK.finditer("\n" + text):
        reason = re.search(r"<!-- not run: (.+?) -->", match["above"])
        line = text[: max(match.start("source") - 1, 0)].count("\n") + 1
        found.append(Block(document, line, match["source"], reason[1] if reason else None, match["printed"]))
    return found


def run(page: Sequence[Block]) -> dict[str, object]:
    """Run the blocks in one namespace, as a reader would who pastes them one after the other, and compare what they print.

    Returns:
        The names that the page has defined.
    """
    module = types.ModuleType("page")  # a real one: what looks a function's globals up, as torch.compile does, finds them
    sys.modules["page"] = module
    try:
        for block in page:
            if block.not_run is None:
                _run(block, vars(module))
    finally:
        del sys.modules["page"]
    return vars(module)


def _run(block: Block, namespace: dict[str, object]) -> None:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile("\n" * (block.line - 1) + block.source, block.document, "exec"), namespace)
    if block.printed is not None and not doctest.OutputChecker().check_output(block.printed, shown.getvalue(), ALIKE):
        raise AssertionError(
            f"{block.document}, line {block.line}: the page shows\n{block.printed}\nand the block prints\n{shown.getvalue()}"
        )
