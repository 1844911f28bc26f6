"""Run ruff (rules, then format) and prove that it saw every Python file of the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from source_tree import PACKAGES, ROOT

RUFF = [sys.executable, "-m", "ruff"]
FOLDERS = (".ci", *PACKAGES, "tests", "examples", "benchmarks", "docs")


def main() -> int:
    """Exit status: 0 only if both checks pass and no file was left out."""
    shown = subprocess.run([*RUFF, "check", "--show-files", "."], cwd=ROOT, capture_output=True, text=True, check=True)
    seen = {Path(line) for line in shown.stdout.splitlines() if line.endswith(".py")}
    on_disk = set(ROOT.glob("*.py")).union(*((ROOT / folder).rglob("*.py") for folder in FOLDERS))
    if missed := sorted(str(path.relative_to(ROOT)) for path in on_disk - seen):
        print(f"ruff does not look at {len(missed)} of {len(on_disk)} Python files: {', '.join(missed)}")
        return 1
    failed = [
        action for action in (["check"], ["format", "--check"]) if subprocess.run([*RUFF, *action, "."], cwd=ROOT).returncode
    ]
    print(f"lint: {len(on_disk)} Python files on disk, {len(seen)} checked")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
