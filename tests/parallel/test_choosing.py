"""Programs that choose, on ranks: results and gradients of one process, no block of keys sent for nobody, and refusals that say why."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.parallel.stages import whole_blocks
from tests.parallel.ranked_programs import HEADS, PROGRAMS, assert_one_process, drawn, only_wanted_keys, part_of, score
from tests.parallel.ranks import assert_refused, run_on_ranks

CAUSAL = kv_idx <= q_idx
LENGTH = 187
METHODS = ("zigzag", "contiguous", "longest_first", "auto", "cuts")


def placed(program: Any, length: int, world: int, method: str, granule: int = 16, chunk: int = 16) -> sd.parallel.TokenPlan:
    words: dict[str, Any] = {"granule": granule, "chunk": chunk, "method": method, "equal": method != "cuts"}
    return sd.parallel.plan(program, length, world, heads=HEADS, **words)


def sample(rank: int, world: int) -> None:
    for number, (name, program) in enumerate(PROGRAMS.items()):
        plan = placed(program, LENGTH, world, METHODS[number % 5])
        _, cp = assert_one_process(plan, program, name, LENGTH)
        if name in ("hsa", "moba", "quest", "dsa"):
            assert_no_key_for_nobody(plan, program, name, cp, rank)
    # The reference has keys of all; half precision is summed in float32.
    assert_one_process(placed(PROGRAMS["nsa"], LENGTH, world, "zigzag"), PROGRAMS["nsa"], "nsa", LENGTH, backend="reference")
    half(rank, world)
    # A granule that a plan forgets is missed: the comparison sees it.
    plan = placed(PROGRAMS["window"], LENGTH, world, "contiguous")
    seen = plan._needs[""].clone()
    seen[1, int(plan.rows(1)[0]) // 16 - 1] = False
    with_less = dataclasses.replace(plan, _needs={"": seen})
    worst, _ = assert_one_process(with_less, PROGRAMS["window"], "window", LENGTH, bar=1e9)
    assert worst > 1e-3 or rank != 1
    refusals(rank, world)


def assert_no_key_for_nobody(plan: sd.parallel.TokenPlan, program: Any, name: str, cp: Any, rank: int) -> None:
    """Of the blocks that came, each has a key that a query of the rank sees, and none that has one is missing."""
    unit = whole_blocks(sd.compile(program).program)[1]
    wanted = only_wanted_keys(plan, program, name, LENGTH, rank, unit)
    had = torch.zeros_like(wanted)
    had[cp.last_keys // unit] = True
    assert not (wanted & ~had).any(), name
    # Certain keys come by granules of the plan: a block beside a seen one may come with it.
    certain = torch.zeros_like(wanted)
    certain[cp.key_positions // unit] = True
    sent = had & ~certain
    sent[plan.rows(rank) // unit] = False
    assert not (sent & ~wanted).any(), name


def half(rank: int, world: int) -> None:
    program, plan = PROGRAMS["hsa"], placed(PROGRAMS["hsa"], LENGTH, world, "zigzag")
    qkv, more = drawn("hsa", LENGTH, torch.bfloat16)
    leaves = [x.requires_grad_() for x in (*qkv, *more.values())]
    whole = torch.autograd.grad(score(sd.attention(*qkv, program, backend="tiled", **more)), leaves)
    named = zip(("q", "k", "v", *more), leaves, strict=True)
    mine = {key: part_of(plan, program, key, x, rank).requires_grad_() for key, x in named}
    q, k, v, *_ = mine.values()
    found = sd.attention(q, k, v, program, backend="tiled", cp=plan.on(dist.group.WORLD), **{key: mine[key] for key in more})
    got = torch.autograd.grad(score(found), list(mine.values()))
    for key, a, b in zip(mine, got, whole, strict=True):
        want = part_of(plan, program, key, b, rank)
        # Each rank rounds its part once more, and their sum.
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), want.float(), atol=2**-6 * float(b.abs().max()), rtol=2**-6)


def refusals(rank: int, world: int) -> None:
    group = dist.group.WORLD
    program = PROGRAMS["hsa"]
    plan = placed(program, LENGTH, world, "zigzag")
    cp = plan.on(group)
    qkv, more = drawn("hsa", LENGTH)
    mine = [part_of(plan, program, key, x, rank) for key, x in zip("qkv", qkv, strict=True)]
    parts = {key: part_of(plan, program, key, x, rank) for key, x in more.items()}
    call = functools.partial(sd.attention, *mine, program, cp=cp)
    assert_refused(sd.ShapeError, "'landmarks' with the axes", lambda: call(**{**parts, "landmarks": more["landmarks"]}))
    assert_refused(sd.TableError, "missing input 'landmarks'", lambda: call(retrieval_q=parts["retrieval_q"]))
    assert_refused(sd.ShapeError, "'landmarks' must be a tensor", lambda: call(**{**parts, "landmarks": 3}))
    assert_refused(sd.UnsupportedError, "no softmax and has no LSE", lambda: sd.attention(
        *mine, PROGRAMS["nsa"], cp=placed(PROGRAMS["nsa"], LENGTH, world, "zigzag").on(group), return_lse=True, gate=mine[0][..., :3]
    ))  # fmt: skip
    other = sd.patterns.hsa(chunk=8, top_k=2)
    assert_refused(sd.UnsupportedError, "another mask or program", lambda: sd.attention(*mine, other, cp=cp, **parts))


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    run_on_ranks(2, functools.partial(sample, world=2), tmp_path)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (sd.patterns.pbs(block=8, segment=16), "looks at all keys from some queries"),
        (sd.attend(CAUSAL & sd.top_k(sd.given_key_scores(sd.input("weight", "batch one keys")), 4)), "goes by all keys"),
        (sd.patterns.token_sparse(probe=8, min_tokens=8), "looks at all keys from some queries"),
        (sd.linear(0.9, k=sd.summary(sd.k, 1)), "is made of keys one by one"),
        (sd.patterns.minference(4, 8, 4, columns=1, diagonals=1), "looks at all keys from some queries"),
        (sd.attend(CAUSAL & sd.top_k(sd.dot(sd.q, sd.k), 4)), "compares queries with every row of 'k'"),
        (sd.attend(CAUSAL & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8, stride=4)).softmax().overlap(8), 2)), "windows of keys"),
        (
            sd.attend(CAUSAL & sd.top_p(sd.dot(sd.summary(sd.q, 8), sd.summary(sd.k, 8)), 0.5, over="map")),
            "the mass of the rows of all queries together",
        ),
        (sd.attend(CAUSAL & sd.given(sd.input("blocks", "batch one queries width"), 4)), "whose rows are queries"),
        (sd.attend(CAUSAL, score=sd.score + sd.dot(sd.q, sd.summary(sd.k, 8))), "for each pair of query and key"),
    ],
)
def test_what_cannot_run_on_ranks_is_refused_where_it_is_planned(program: Any, words: str) -> None:
    with pytest.raises(sd.UnsupportedError, match=words):
        sd.parallel.plan(program, 256, 2)


def test_plans_of_programs_keep_blocks_together_and_say_what_is_sent_in_any_case() -> None:
    plan = sd.parallel.plan({"far": sd.patterns.hsa(chunk=64), "near": sd.patterns.nsa()}, 1 << 14, 8)
    assert plan.chunk % 64 == 0 and plan.received == int(plan.traffic("near").sum(0).max())
    assert int(plan.traffic("far").sum()) == 0  # a query of HSA sees what it chose, and nothing else
    assert max(plan.work) > 0 and plan.imbalance < 1.1
    with pytest.raises(sd.ArgumentError, match="chunk must be a multiple of 64 tokens"):
        sd.parallel.plan(sd.patterns.hsa(chunk=64), 4096, 2, granule=16, chunk=80)
    with pytest.raises(sd.UnsupportedError, match="what it sends is not known before"):
        sd.parallel.simulate(sd.patterns.moba(), 4096, 2)
    by_entry = sd.attend(CAUSAL & ((sd.b == kv_idx) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8)), 2)))
    with pytest.raises(sd.UnsupportedError, match="reads b"):
        sd.parallel.plan(by_entry, 4096, 2)


def campaign(rank: int, world: int) -> None:
    worst, sent, asked = 0.0, 0, 0
    for name, program in PROGRAMS.items():
        short = itertools.product(("zigzag", "contiguous", "auto"), ((187, 1, 16), (403, 16, 48)))
        longer = [("auto", (1031, 128, 128)), ("contiguous", (2048 * world + 4, 2048, 2048))]
        for method, (length, granule, chunk) in [*short, *longer]:
            plan = placed(program, length, world, method, granule, chunk)
            error, cp = assert_one_process(plan, program, name, length)
            worst = max(worst, error)
            if length == LENGTH:
                assert_no_key_for_nobody(plan, program, name, cp, rank)
            sent += int((~torch.isin(cp.last_keys, plan.rows(rank))).sum())
            asked += length - plan.rows(rank).numel()
    if not rank:
        share = sent / asked
        print(f"{world} ranks, {len(PROGRAMS)} programs: at most {worst:.1e} apart; {share:.2f} of a ring's keys came to rank 0")


@pytest.mark.campaign
@pytest.mark.parametrize("world", [2, 4])
def test_programs_by_placement_length_and_granule(tmp_path: Path, world: int) -> None:
    run_on_ranks(world, functools.partial(campaign, world=world), tmp_path, seconds=3000)
