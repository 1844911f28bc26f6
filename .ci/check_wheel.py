"""Build sdist and wheel, look into the wheel, install it in an environment of its own and use it from another folder.

torch and the other dependencies are not installed again: the new environment sees this one's packages, but not this one's
sparsedsl (a path added by a ``.pth`` file does not have its own ``.pth`` files read, and an editable install is one of those).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

from source_tree import PACKAGES, ROOT

INSIDE = """
import importlib, pathlib, pkgutil, sys
import sparsedsl, sparsedsl.patterns, sparsedsl.codegen

home = pathlib.Path(sys.prefix).resolve()
for module in (sparsedsl, sparsedsl.patterns, sparsedsl.codegen):
    assert home in pathlib.Path(module.__file__).resolve().parents, f"{module.__file__} is not from the wheel"
for name in ("patterns", "codegen"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"the wheel leaks a top-level name: import {name} works")
names = [m.name for m in pkgutil.walk_packages(sparsedsl.__path__, "sparsedsl.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(f"wheel: {len(names)} modules import from {pathlib.Path(sparsedsl.__file__).parent}")
"""

USE = """
import patterns                      # the user's own file, in the current folder
import torch
import sparsedsl as sd
from sparsedsl import kv_idx, q_idx

assert patterns.MINE == "the user's"
window = sd.patterns.sliding_window(128)
assert sd.equivalent(window, (kv_idx <= q_idx) & (q_idx - kv_idx < 128)) == sd.PROVED
print(sd.analyse(sd.attend(window), 4096, 4096))
q, k, v = torch.randn(3, 1, 2, 64, 16)
out = sd.compile(window, backend="reference")(q, k, v)
assert out.shape == q.shape and torch.isfinite(out).all()
"""


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command, show it, stop everything if it fails."""
    print("$", " ".join("..." if "\n" in str(part) else str(part) for part in command), flush=True)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if status := subprocess.run([str(part) for part in command], cwd=cwd, env=env).returncode:
        sys.exit(f"wheel: FAILED, the command above ended with {status}")


def build(folder: Path) -> Path:
    """sdist from the checkout, wheel from the sdist: a file that one of them forgets is missing in the end."""
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would take removed files from it
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def look_into(wheel: Path) -> None:
    """One top-level name, and under it every file of the source folders and no other."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    tops = {name.split("/")[0] for name in names} - {"-".join(wheel.name.split("-")[:2]) + ".dist-info"}
    if tops != {"sparsedsl"}:
        sys.exit(f"the wheel must hold the one top-level name sparsedsl, it holds {sorted(tops)}")
    wanted = {
        str(Path(*package.split(".")) / path.relative_to(ROOT / folder))
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in names if name.startswith("sparsedsl/")}
    if wanted != held:
        sys.exit(f"missing from the wheel: {sorted(wanted - held)}; in it without a source: {sorted(held - wanted)}")
    print(f"wheel: {wheel.name} holds {len(held)} files under the one top-level name sparsedsl")


def try_out(wheel: Path, folder: Path) -> None:
    """Install without dependencies and use the package from a folder that holds a user's own ``patterns.py``."""
    home = folder / "environment"
    venv.create(home, with_pip=False)
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        home / "bin" / "python",
        "install",
        "--quiet",
        "--no-deps",
        wheel,
        cwd=folder,
    )
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere, users = folder / "elsewhere", folder / "users"
    elsewhere.mkdir()
    users.mkdir()
    (users / "patterns.py").write_text('MINE = "the user\'s"\n')
    python = home / "bin" / "python"
    run(python, "-c", INSIDE, cwd=elsewhere)
    run(home / "bin" / "sparsedsl", "--help", cwd=elsewhere)
    run(python, "-m", "sparsedsl", "--help", cwd=elsewhere)
    run(python, "-c", USE, cwd=users)


def main() -> None:
    """Everything in a temporary folder; the checkout stays as it is but for ``build/`` and the egg-info."""
    with tempfile.TemporaryDirectory(prefix="sparsedsl-wheel-") as name:
        folder = Path(name)
        dist = folder / "dist"
        dist.mkdir()
        wheel = build(dist)
        look_into(wheel)
        try_out(wheel, folder)
    print("wheel: passed")


if __name__ == "__main__":
    main()
