"""Choosing takes memory for its pieces, and not for queries x chunks: measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 2**20


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self")
def test_selection_memory(tmp_path):
    """Top-16 of 16,384 chunks for 64K queries, and the gradients of the scores at the selected blocks: all scores would be 4 GiB."""
    out = tmp_path / "memory.json"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "selection_memory.py"), "--every", "--out", str(out)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = json.loads(out.read_text())["records"]
    assert record["dense_bytes"] == 4096 * MIB
    over = {name: step["over_bytes"] / MIB for name, step in record["steps"].items()}
    assert over.keys() == {"top_k", "selected_scores", "backward"}
    assert max(over.values()) <= 256, over
    assert "pass: " in done.stdout
