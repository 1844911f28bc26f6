"""What ``auto`` takes on a GPU: what was measured, else the first that can; and no pattern that kernels cannot be written for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.backends.registry import choose
from sparsedsl.backends.triton import backend as triton_backend
from sparsedsl.execute import measured_backend
from sparsedsl.execute.measured_backend import fastest_backend
from sparsedsl.runtime.call import check_call
from sparsedsl.runtime.request import CallFacts, Request

causal = sd.attend(kv_idx <= q_idx)


USUAL = CallFacts("cuda", "bfloat16", batch=1, heads=8, kv_heads=8, q_len=4096, kv_len=4096, head_dim=64, head_dim_v=64)


def plan(fastest=None, lacking=None, **words):
    """What ``auto`` takes on a machine that lacks what is said there for kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_backend, "missing", lambda device: lacking)
        return choose(Request("attention", replace(USUAL, **words), causal), fastest=fastest)


def test_without_a_measurement_the_first_that_can():
    assert plan().backend == "triton"
    assert plan(head_dim=320).backend == "flex"
    assert plan(lacking="no compiler").backend == "flex"
    assert plan(dtype="float64").backend == "tiled"


def test_what_was_measured_decides_among_those_that_can():
    asked = []
    assert plan(lambda backends: asked.append(backends) or ("tiled", "measured")).backend == "tiled"
    assert asked == [("triton", "flex", "tiled")]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEDSL_CACHE", str(tmp_path))
    monkeypatch.setattr(measured_backend, "_known", {})
    monkeypatch.setattr(measured_backend.torch.cuda, "is_current_stream_capturing", lambda: False)
    return tmp_path


def found(monkeypatch, mode, took, backends=("triton", "flex", "tiled")):
    monkeypatch.setenv("SPARSEDSL_TUNE", mode)
    monkeypatch.setattr(measured_backend, "_known", {})
    monkeypatch.setattr(measured_backend, "median_seconds", lambda call, device: call())

    def run(backend):
        def once():
            if took[backend] is None:
                raise RuntimeError("it does not compile")
            return took[backend]

        return once

    q = torch.zeros(1, 2, 32, 16)
    return fastest_backend(causal.key, "any", check_call(causal, q, q, q, {}), backends, run)


def test_measured_once_and_remembered(store, monkeypatch):
    assert found(monkeypatch, "cached", {}) is None
    assert found(monkeypatch, "full", {"triton": None, "flex": 2e-3, "tiled": 3e-3})[0] == "flex"
    # Another process: nothing is measured, and nothing that cannot run the call is taken.
    assert found(monkeypatch, "cached", {})[0] == "flex"
    assert found(monkeypatch, "off", {}) is None
    assert found(monkeypatch, "cached", {}, ("triton", "tiled")) is None


def test_a_damaged_record_counts_as_none(store, monkeypatch):
    found(monkeypatch, "full", {"triton": 1e-3, "flex": 2e-3, "tiled": 3e-3})
    for file in store.rglob("*.json"):
        file.write_text(file.read_text().replace("triton", "magic"))
    assert found(monkeypatch, "cached", {}) is None


def test_auto_leaves_a_pattern_that_has_no_kernels_to_others():
    # A logarithm of a product, rounded as torch does it: it depends on both positions in a way of its own.
    mask = sd.parse("f32_to_int64(f32_log(q_idx * kv_idx + 1)) < 5")
    attn = sd.compile(mask)
    found = attn.explain(4096, device="cuda", dtype="bfloat16", heads=8)
    assert found.plan.backend == "flex" and "f32_log" in found.plan.reason
