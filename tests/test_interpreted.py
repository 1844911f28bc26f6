"""Runs the files of ``tests/interpreted/`` in processes of their own, in which Triton interprets kernels on the CPU.

``TRITON_INTERPRET=1 pytest tests/interpreted/test_names.py`` runs one of them by itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
SECONDS = 1500
# A process imports for seconds what a small file needs for one; the largest files begin different ones.
LARGEST_FIRST = sorted(FOLDER.glob("test_*.py"), key=lambda file: (-file.stat().st_size, file.name))
TOGETHER = [LARGEST_FIRST[first::8] for first in range(8)]


def run(files: Sequence[Path], *options: str) -> subprocess.CompletedProcess[str]:
    """pytest on files, with its output; the random budget is passed on with the environment."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options, *map(str, files)]
    return subprocess.run(command, env=env, cwd=FOLDER.parent.parent, capture_output=True, text=True, timeout=SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("files", TOGETHER, ids=lambda files: "-".join(file.stem for file in files))
def test_interpreted(files, request):
    pytest.importorskip("triton", reason="generated Triton kernels are interpreted; pip install '.[triton]'")
    seed = request.config.getoption("--hypothesis-seed", None)
    done = run(files, *([] if seed is None else [f"--hypothesis-seed={seed}"]))
    assert done.returncode == 0, (
        f"{', '.join(file.name for file in files)} in a process of their own:\n{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}"
    )


def test_a_failure_in_the_child_fails_here_and_is_shown(tmp_path):
    file = tmp_path / "test_it.py"
    file.write_text("import os\n\ndef test_it():\n    assert os.environ['TRITON_INTERPRET'] == 'no'\n", encoding="utf-8")
    done = run([file])
    assert done.returncode == 1
    assert "assert '1' == 'no'" in done.stdout
