"""Recurrences on ranks: results and gradients of one process, wherever the runs of a rank lie, and ranks that hold no tokens."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import sparsedsl as sd
from tests.parallel.ranked_programs import HEADS, PROGRAMS, SCANS, assert_one_process, drawn, on_one, part_of
from tests.parallel.ranks import assert_refused, run_on_ranks

LENGTH = 75
METHODS = ("zigzag", "contiguous", "longest_first", "cuts")
SAMPLE = (
    "constant",
    "read before",
    "erased along another",
    "erased, documents",
    "corrected, documents",
    "behind a window",
    "beside a choice",
    "slots, masked, documents",
)


def placed(program: Any, length: int, world: int, method: str, granule: int = 8, chunk: int = 16) -> sd.parallel.TokenPlan:
    words: dict[str, Any] = {"granule": granule, "chunk": chunk, "method": method, "equal": method != "cuts"}
    return sd.parallel.plan(program, length, world, heads=HEADS, **words)


def sample(rank: int, world: int) -> None:
    for number, name in enumerate(SAMPLE):
        assert_one_process(placed(SCANS[name], LENGTH, world, METHODS[number % 4]), SCANS[name], name, LENGTH)
    assert_one_process(placed(SCANS["slots"], LENGTH, world, "zigzag"), SCANS["slots"], "slots", LENGTH, backend="reference")
    alone: dict[str, Any] = {name: SCANS[name] for name in ("beside a choice", "read before")}
    for name, program in {**alone, "hsa": PROGRAMS["hsa"]}.items():
        for backend in ("tiled", "reference"):
            assert_one_process(on_one(placed(program, LENGTH, world, "zigzag")), program, name, LENGTH, backend=backend)
    assert_half_precision_is_that_of_one_process(rank, world)
    assert_a_state_that_is_missing_is_seen(rank, world)


def assert_half_precision_is_that_of_one_process(rank: int, world: int) -> None:
    """States are float32 there and here: what differs is the last rounding, and that of a gradient's parts."""
    name = "gated, corrected"
    plan, (qkv, more) = placed(SCANS[name], LENGTH, world, "zigzag"), drawn(name, LENGTH)
    leaves = {key: x.bfloat16().requires_grad_() for key, x in (*zip("qkv", qkv, strict=True), *more.items())}
    mine = {key: part_of(plan, SCANS[name], key, x, rank).requires_grad_() for key, x in leaves.items()}
    found = []
    for words, cp in ((leaves, None), (mine, plan.on(dist.group.WORLD))):
        (q, k, v), rest = (words[key] for key in "qkv"), {key: words[key] for key in more}
        out = sd.attention(q, k, v, SCANS[name], backend="tiled", cp=cp, **rest)
        found.append((out, *torch.autograd.grad((out.double() ** 2).sum(), list(words.values()))))
    for key, a, b in zip(("q", *leaves), *reversed(found), strict=True):
        want = part_of(plan, SCANS[name], key, b, rank)
        torch.testing.assert_close(a.float(), want.float(), atol=2**-6 * float(b.detach().abs().max()), rtol=2**-6)


def assert_a_state_that_is_missing_is_seen(rank: int, world: int) -> None:
    """What ranks give by themselves, each of its own tokens, is something else."""
    program, plan = SCANS["constant"], placed(SCANS["constant"], LENGTH, world, "contiguous")
    mine = [part_of(plan, program, key, x, rank) for key, x in zip("qkv", drawn("constant", LENGTH)[0], strict=True)]
    told, alone = (sd.attention(*mine, program, backend="tiled", cp=cp) for cp in (plan.on(dist.group.WORLD), None))
    assert (float((told - alone).abs().max()) > 1e-3) == (rank > 0)
    cp = plan.on(dist.group.WORLD)
    assert_refused(sd.UnsupportedError, "has no LSE", lambda: sd.attention(*mine, program, cp=cp, return_lse=True))


def test_two_ranks_scan_as_one_process(tmp_path: Path) -> None:
    run_on_ranks(2, functools.partial(sample, world=2), tmp_path)


def test_tokens_of_recurrences_are_work_and_send_no_keys() -> None:
    plan = placed(SCANS["constant"], 4096, 4, "cuts", granule=128, chunk=128)
    assert plan.imbalance == 1.0 and plan.received == 0 and len(set(plan.owner)) == 4
    assert len(set(sd.parallel.plan(SCANS["slots"], 4096, 4, equal=False).owner)) == 4


def campaign(rank: int, world: int) -> None:
    worst = 0.0
    for name, program in SCANS.items():
        short = [(method, (91, 1, 16)) for method in METHODS]
        longer = [("zigzag", (203, 16, 48)), ("auto", (1031, 128, 128)), ("contiguous", (2048 * world + 4, 2048, 2048))]
        for method, (length, granule, chunk) in [*short, *longer]:
            plan = placed(program, length, world, method, granule, chunk)
            worst = max(worst, assert_one_process(plan, program, name, length, dense=300)[0])
        worst = max(worst, assert_one_process(on_one(placed(program, 91, world, "zigzag")), program, name, 91)[0])
        if not rank:
            print(f"{world} ranks, {name}: so far at most {worst:.1e} apart", flush=True)


@pytest.mark.campaign
@pytest.mark.parametrize("world", [2, 4])
def test_recurrences_by_placement_length_and_granule(tmp_path: Path, world: int) -> None:
    run_on_ranks(world, functools.partial(campaign, world=world), tmp_path, seconds=3000)
