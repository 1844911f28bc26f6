"""Tests that run Triton kernels in its interpreter: ``tests/test_interpreted.py`` starts a process for each file here.

Triton decides when it is imported whether it interprets. Without ``TRITON_INTERPRET=1`` nothing here is collected.
"""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
