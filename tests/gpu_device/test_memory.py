"""On a CUDA device: nothing is written or believed that lies beside a tensor; the device's own memory checker and race checker."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsedsl as sd
from sparsedsl.testing import assert_matches_reference

pytestmark = pytest.mark.gpu

SCRIPT = Path(__file__).resolve().parent / "sanitized.py"
SANITIZER_S = 150
GUARD = 256  # elements on each side, a whole number of 16-byte words
NAMES = ("window and sinks", "documents", "blocks", "learned bias", "empty rows")


class Guards:
    """New float tensors of the library hold NaN at first, and lie between elements that must keep it."""

    def __init__(self, monkeypatch):
        self.buffers = []
        self.plain = torch.empty
        monkeypatch.setattr(torch, "empty", self.empty)
        monkeypatch.setattr(torch, "empty_like", self.like)
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda other, *size, **words: self.like(other, size, **words))

    def empty(self, *size, dtype=None, device=None, **words):
        size = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if words or not dtype.is_floating_point:
            return self.plain(size, dtype=dtype, device=device, **words)
        count = math.prod(size)
        buffer = self.plain(GUARD + count + GUARD, dtype=dtype, device=device).fill_(float("nan"))
        self.buffers.append((buffer, count))
        return buffer[GUARD : GUARD + count].view(size)

    def like(self, other, size=None, *, dtype=None, device=None, **words):
        return self.empty(*(other.shape if size is None else size), dtype=dtype or other.dtype, device=device or other.device)

    def assert_untouched(self):
        assert self.buffers, "the library allocates nothing that is guarded: this test sees nothing"
        for buffer, count in self.buffers:
            beside = torch.cat([buffer[:GUARD], buffer[GUARD + count :]])
            assert beside.isnan().all(), f"written beside a tensor of {count} elements"


@pytest.mark.parametrize("rows", [None, 1], ids=["training", "decode"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_beside_results(kit, triton_backend, monkeypatch, name, rows):
    """Results are NaN before kernels run: what they leave out is seen too."""
    pattern, length = kit.patterns[name], kit.length(333)
    q, k, v = kit.inputs(length=rows or length, kv_length=length)
    tables, attn = kit.tables(pattern, length), sd.compile(pattern, backend=triton_backend)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    d_out = torch.randn_like(q)
    guards = Guards(monkeypatch)
    out, lse = attn(q, k, v, q_offset=length - q.shape[2], return_lse=True, **tables)
    grads = torch.autograd.grad(out, leaves, d_out)
    monkeypatch.undo()
    guards.assert_untouched()
    assert not any(x.isnan().any() for x in (out, lse, *grads)), "not every element was written"


def test_guards_see_what_is_written_beside(kit, monkeypatch):
    guards = Guards(monkeypatch)
    made = torch.empty(3, 5, device=kit.device)
    monkeypatch.undo()
    guards.assert_untouched()
    assert made.isnan().all()
    torch.as_strided(made, (1,), (1,), made.storage_offset() + 15).fill_(0.0)
    with pytest.raises(AssertionError, match="written beside a tensor of 15 elements"):
        guards.assert_untouched()


@pytest.mark.parametrize("name", NAMES)
def test_what_lies_beside_inputs_is_neither_believed_nor_written(kit, backend, name):
    pattern, length = kit.patterns[name], kit.length(333)
    inputs, around = [], []
    for x in kit.inputs(length=length):
        batch, heads, rows, dim = x.shape
        buffer = torch.full((batch, heads, rows + 64, dim + 16), float("nan"), dtype=x.dtype, device=x.device)
        inner = buffer[:, :, 32 : 32 + rows, 8 : 8 + dim]
        inner.copy_(x)
        inputs.append(inner)
        around.append(buffer)
    tables = kit.tables(pattern, length)
    finite = [int(buffer.isfinite().sum()) for buffer in around]
    assert_matches_reference(sd.compile(pattern, backend=backend), *inputs, **tables)
    assert [int(buffer.isfinite().sum()) for buffer in around] == finite


def test_keys_that_no_query_may_see_change_nothing(kit, triton_backend):
    """Whole tiles of keys hold NaN; tiles that the mask leaves out may not be read, let alone multiplied by zero."""
    length = kit.length(900)
    hidden = length // 2
    pattern = sd.attend((sd.kv_idx <= sd.q_idx) & (sd.kv_idx >= hidden) & (sd.q_idx >= hidden))
    q, k, v = kit.inputs(length=length)
    attn = sd.compile(pattern, backend=triton_backend)
    clean = attn(q, k, v)
    edge = hidden // 128 * 128 if not kit.rehearsing else hidden // 16 * 16
    k[:, :, :edge] = float("nan")
    v[:, :, :edge] = float("nan")
    assert torch.equal(attn(q, k, v), clean)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(kit, triton_backend, tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if kit.rehearsing:
        done = subprocess.run([sys.executable, str(SCRIPT), kit.device], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "ran"
        return
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on this machine")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", sys.executable, str(SCRIPT), kit.device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer {tool} was not done after {SANITIZER_S} s: nothing is known")
    shown = done.stdout[-4000:] + done.stderr[-2000:]
    if "not supported" in shown and "ran" not in done.stdout.splitlines():
        pytest.skip(f"compute-sanitizer does not work here: {shown.strip().splitlines()[-1]}")
    assert done.returncode == 0, shown
    assert "ran" in done.stdout.splitlines(), shown
