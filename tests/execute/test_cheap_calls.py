"""What depends on the program alone is worked out once: Python calls of warm calls, torch's own included, are counted."""

from __future__ import annotations

import functools
import gc
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch.profiler import ProfilerActivity, profile

import sparsedsl as sd

CAUSAL = sd.kv_idx <= sd.q_idx


def window() -> Any:
    return (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 256)


def choice() -> Any:
    near = sd.q_idx - sd.kv_idx < 64
    return (sd.kv_idx <= sd.q_idx) & (near | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 64)), 4))


WINDOW, CHOICE = window(), choice()


def assert_few_python_calls(call: Callable[[], Any], most: int) -> None:
    """How many Python functions are entered, torch's own included.

    sympy compares equal expressions part by part unless they are one object, which depends on what other tests have made: not counted.
    """
    calls: Counter[str] = Counter()

    def profile(frame: Any, event: str, argument: Any) -> None:
        where = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}"
        if event == "call" and where not in ("basic.py:__eq__", "basic.py:_hashable_content"):
            calls[where] += 1

    before = sys.getprofile()
    gc.collect()
    gc.disable()  # what it finds of other tests may call functions as it goes
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
        gc.enable()
    assert calls.total() <= most, f"{calls.total()} calls: {calls.most_common(20)}"


# `tiled` computes strip by strip in Python: a narrow window has many. `cpp` makes the same calls whatever the length.
@pytest.mark.parametrize(
    ("backend", "pattern", "rows", "most"),
    [
        ("tiled", WINDOW, 1024, 850), ("tiled", WINDOW, 1, 120), ("tiled", CHOICE, 1024, 2600), ("tiled", CHOICE, 1, 400),
        ("cpp", WINDOW, 1024, 15), ("cpp", WINDOW, 1, 15), ("cpp", CHOICE, 1024, 60), ("cpp", CHOICE, 1, 68),
    ],
)  # fmt: skip
def test_a_warm_call_makes_few_python_calls(
    backend: str, pattern: Any, rows: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEDSL_TUNE", "off")  # rates measured on a busy machine cut the rows otherwise, and into more strips
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        q, k = torch.randn(1, 4, rows, 64), torch.randn(1, 2, 1024, 64)
        attn = sd.compile(pattern, backend=backend)
        for _ in range(3):
            attn(q, k, k, q_offset="end")
        assert_few_python_calls(lambda: attn(q, k, k, q_offset=1024 - rows), most)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("backend", "declare", "most"), [("tiled", window, 850), ("tiled", choice, 2600), ("cpp", window, 15), ("cpp", choice, 60)]
)
def test_equal_patterns_that_share_no_object_do_not_make_it_dear(
    backend: str, declare: Callable[[], Any], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As each layer of a model may declare one."""
    monkeypatch.setenv("SPARSEDSL_TUNE", "off")
    q, k = torch.randn(1, 4, 1024, 64), torch.randn(1, 2, 1024, 64)
    for _ in range(2):
        sympy.core.cache.clear_cache()
        attn = sd.compile(declare(), backend=backend)
        for _ in range(3):
            attn(q, k, k)
    assert_few_python_calls(lambda: attn(q, k, k), most)


@pytest.mark.parametrize(("backend", "most"), [("tiled", 420), ("cpp", 82)])
def test_a_decode_step_of_another_length_is_as_cheap(backend: str, most: int) -> None:
    q, k = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 1100, 64)
    attn = sd.compile(CHOICE, backend=backend)
    for length in range(1024, 1028):
        attn(q, k[:, :, :length], k[:, :, :length], q_offset="end")
    for n in (1028, 1029, 1030):
        assert_few_python_calls(lambda n=n: attn(q, k[:, :, :n], k[:, :, :n], q_offset=n - 1), most)


QUEST = sd.attend(CAUSAL & sd.top_k(sd.bound(sd.q, sd.k, 16), 4))


# Operations of torch that are left are allocations, and what mixes branches.
@pytest.mark.parametrize("rows", [256, 1])
@pytest.mark.parametrize(
    ("program", "inputs", "most", "operations"),
    [
        (sd.patterns.moba(32, 3), {}, 68, 10), (QUEST, {}, 72, 12),
        (sd.patterns.hsa(32, 4), {"retrieval_q": (1, 2, None, 8), "landmarks": (1, 2, 8, 8)}, 78, 12),
        (sd.patterns.nsa(8, 16, 6, 32), {"gate": (1, 4, None, 3)}, 160, 30),
    ],
    ids=["moba", "quest", "hsa", "nsa"],
)  # fmt: skip
def test_systems_of_one_choice_make_few_calls(
    program: Any, inputs: dict[str, Any], most: int, operations: int, rows: int
) -> None:
    q, k = torch.randn(1, 4, rows, 16), torch.randn(1, 2, 256, 16)
    named = {name: torch.randn([rows if size is None else size for size in shape]) for name, shape in inputs.items()}
    attn = sd.compile(program, backend="cpp")
    call = functools.partial(attn, q, k, k, q_offset=256 - rows, **named)
    for _ in range(3):
        call()
    assert_few_python_calls(call, most)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    assert sum(event.name.startswith("aten::") for event in seen.events()) <= operations


def test_a_step_of_native_hybrid_attention_scans_its_slots_once() -> None:
    attn = sd.compile(sd.patterns.nha(slots=4, window=64), backend="cpp")
    gate = torch.randn(1, 1, 257, 4)
    x = torch.randn(1, 1, 257, 16)

    def step(tokens: slice, state: Any = None) -> Any:
        q = x[:, :, tokens]
        return attn(q, q, q, gate=gate[:, :, tokens], state=state, return_state=True)[1]

    state = step(slice(255, 256), step(slice(0, 255)))
    assert_few_python_calls(lambda: step(slice(256, 257), state), 400)  # 634 with a second scan, which made the state
