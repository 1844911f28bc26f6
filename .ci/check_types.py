"""Run mypy over every file of the package, the examples and the benchmarks, and prove that it saw every one.

``patterns/`` and ``codegen/`` are ``sparsedsl.patterns`` and ``sparsedsl.codegen``, which mypy cannot know: it is started in a
folder of links, ``.typing/``, where every file lies under its real name.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from source_tree import PACKAGES, ROOT

FARM = ROOT / ".typing"
SCRIPTS = ("examples", "benchmarks")
USERS = "user_types.py"  # what users' type checkers should see, as assertions


def plant() -> list[Path]:
    """Make the folder of links anew; the Python files in it, in order."""
    shutil.rmtree(FARM, ignore_errors=True)
    package = FARM / "sparsedsl"
    package.mkdir(parents=True)
    for source in [*(ROOT / "sparsedsl").iterdir(), ROOT / "patterns", ROOT / "codegen"]:
        if source.exists() and source.name != "__pycache__":
            (package / source.name).symlink_to(source, target_is_directory=source.is_dir())
    for folder in SCRIPTS:
        if (ROOT / folder).is_dir():
            (FARM / folder).symlink_to(ROOT / folder, target_is_directory=True)
    (FARM / USERS).symlink_to(ROOT / ".ci" / USERS)
    return sorted([FARM / USERS, *python_files([package, *(FARM / folder for folder in SCRIPTS)])])


def python_files(folders: list[Path]) -> list[Path]:
    """Every ``*.py`` under the folders, following links (``Path.rglob`` does not)."""
    found: list[Path] = []
    for folder in folders:
        if folder.is_dir():
            inside = list(folder.iterdir())
            found += [path for path in inside if path.suffix == ".py"]
            found += python_files([path for path in inside if path.is_dir() and path.name != "__pycache__"])
    return found


def main() -> int:
    """Exit status: mypy's, or 1 if the number of files it checked is not the number on disk."""
    files = plant()
    on_disk = 1 + sum(len(list((ROOT / folder).rglob("*.py"))) for folder in (*PACKAGES, *SCRIPTS))
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--cache-dir",
        str(ROOT / ".mypy_cache"),
    ]
    done = subprocess.run([*command, *(str(path.relative_to(FARM)) for path in files)], cwd=FARM, capture_output=True, text=True)
    print(done.stdout + done.stderr, end="")
    counted = re.search(r"(?:checked|in) (\d+) source files?\)?$", done.stdout.strip())
    checked = int(counted.group(1)) if counted else 0
    print(f"types: {on_disk} Python files on disk, {checked} checked")
    return done.returncode or int(checked != on_disk)


if __name__ == "__main__":
    sys.exit(main())
