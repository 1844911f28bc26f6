"""Tests that run Triton kernels in its interpreter: ``tests/test_interpreted.py`` starts processes for the files here.

Triton decides when it is imported whether it interprets. Without ``TRITON_INTERPRET=1`` nothing here is collected.
"""

from __future__ import annotations

import mmap
import os

import pytest
import torch

# Linux's MAP_NORESERVE, which Python has a name for since 3.13: memory that is never touched may be more than there is.
NO_RESERVE = 0x4000

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def sparse():
    """``sparse(size, dtype)``: a flat tensor of zeros, of which only the pages that are written take memory."""

    def make(size, dtype):
        room = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        room.madvise(mmap.MADV_NOHUGEPAGE)
        return torch.frombuffer(room, dtype=dtype)

    return make


@pytest.fixture
def apart(sparse):
    """``apart(t, distance)``: a copy of ``t (B, H, S, D)`` in which neighbouring rows of a head lie so many numbers apart."""

    def make(t, distance=1 << 26):
        _, heads, rows, width = t.shape
        room = sparse(rows * distance, t.dtype)
        return room.as_strided(t.shape, (heads * width, width, distance, 1)).copy_(t)

    return make
