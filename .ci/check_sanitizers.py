"""Run the small cases of the generated C++ with AddressSanitizer and UndefinedBehaviorSanitizer built in.

A read or write beside memory, or arithmetic that C++ leaves undefined, ends the tests. Libraries go into a folder of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = [
    "tests/backends/cpp/test_scans.py", "tests/backends/cpp/test_choosing.py", "tests/backends/cpp/test_pooling.py",
    "tests/backends/cpp/test_selected.py",
    "tests/backends/cpp/test_attention.py::test_parts_of_a_head_add_up", "tests/backends/cpp/test_attention.py::test_exact_operations",
    "tests/backends/cpp/test_attention.py::test_after_a_fork_with_one_thread",
]  # fmt: skip


def main(arguments: list[str]) -> int:
    """The exit status of pytest."""
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        surroundings = {
            **os.environ, "CXX": str(ROOT / ".ci" / "sanitized-cxx"), "SPARSEDSL_CACHE": folder, "LD_PRELOAD": found,
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1",
        }  # fmt: skip
        # -s: what a sanitizer says goes to the terminal, also from two processes.
        command = [
            sys.executable, "-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal",
            *(arguments or TESTS), "-m", "not slow",
        ]  # fmt: skip
        return subprocess.run(command, cwd=ROOT, env=surroundings, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
