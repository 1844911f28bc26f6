"""What ranks do together backward, all of them do, whatever way results of one of them came: else the others wait for ever.

A rank may hold no tokens, or the first ones alone, of which a state takes up none; and any input may be the only one that learns.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import sparsedsl as sd
from tests.parallel.ranked_programs import HEADS, PROGRAMS, SCANS, assert_one_process, by_owner, drawn, on_one
from tests.parallel.ranks import run_on_ranks

LENGTH = 75
# What hung once, and what takes another way through the stages.
SAMPLE = [("nsa", "k"), ("nsa", "v"), ("hsa", "landmarks"), ("dsa", "v"), ("behind a window", "k"), ("slots, first", "v")]


def run(rank: int, world: int, cases: Iterable[tuple[str, str | None]]) -> None:
    for name, learns in cases:
        program = {**SCANS, **PROGRAMS}[name]
        words = {"heads": HEADS, "granule": 8, "chunk": 16, "method": "contiguous"}
        plan = sd.parallel.plan(program, LENGTH, world, **words)
        first_alone = by_owner(plan, (0, *[world - 1] * (len(plan.owner) - 1)))
        for made in (plan, on_one(plan), first_alone):
            assert_one_process(made, program, name, LENGTH, learn=None if learns is None else (learns,))


def test_two_ranks_wait_for_no_one(tmp_path: Path) -> None:
    cases = [*SAMPLE, ("nsa", None), ("behind a window", None), ("slots, first", None)]
    run_on_ranks(2, functools.partial(run, world=2, cases=cases), tmp_path, seconds=120)


@pytest.mark.campaign
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", [*SCANS, *PROGRAMS])
def test_whichever_input_learns(tmp_path: Path, name: str, world: int) -> None:
    qkv, more = drawn(name, LENGTH)
    inputs = [key for key, x in (*zip("qkv", qkv, strict=True), *more.items()) if torch.is_floating_point(x)]
    inputs = [key for key in inputs if not key.startswith("index_")]  # an indexer's choice has no gradient
    run_on_ranks(world, functools.partial(run, world=world, cases=[(name, key) for key in (*inputs, None)]), tmp_path)
