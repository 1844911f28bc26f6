"""Four processes, each with its rows and the keys that they see: out, LSE and all gradients are those of one process."""

from __future__ import annotations

import dataclasses
import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx

LENGTH, WORLD, HEADS = 203, 4, 4
NEAR = sd.patterns.sliding_window(40)
CAUSAL, DOC, BIAS = kv_idx <= q_idx, sd.table("doc", monotone=True), sd.table("bias", learned=True)
PATTERNS: dict[str, Any] = {
    "alibi": sd.attend(CAUSAL, score=sd.patterns.alibi(HEADS), sink=0.3),
    "sinks": CAUSAL & ((q_idx - kv_idx < 17) | (kv_idx < 4)),
    "documents": CAUSAL & (DOC[q_idx] == DOC[kv_idx]),
    "dilated": sd.patterns.dilated(8, 4),
    "heads": CAUSAL & (q_idx - kv_idx < sd.table("win")[sd.h]),
    "learned": sd.attend(NEAR, score=sd.tanh(sd.score * kv_idx / sd.kv_len + BIAS[q_idx - kv_idx]) * 5),
    "late": CAUSAL & (q_idx >= 60) & (kv_idx >= 30),
}


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TABLES = {"doc": torch.arange(LENGTH) // 37, "win": torch.tensor([3, 9, 20, 70]), "bias": numbers(40, seed=9)}


def loss(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    return (out**2).sum() + lse[lse != float("-inf")].sum()


def compared(plan: sd.parallel.TokenPlan, pattern: Any, qkv: list[torch.Tensor], tables: dict[str, torch.Tensor]) -> float:
    """The largest difference of all ranks' results and gradients from those of one process."""
    group = dist.group.WORLD
    qkv = [x.requires_grad_() for x in qkv]
    learned = [t.requires_grad_() for t in tables.values() if t.is_floating_point()]
    whole = sd.attention(*qkv, pattern, return_lse=True, backend="reference", **tables)
    want = [*whole, *torch.autograd.grad(loss(*whole), [*qkv, *learned])]
    mine = [plan.shard(x.detach(), 2, group).requires_grad_() for x in qkv]
    found = sd.attention(*mine, pattern, cp=plan.on(group), return_lse=True, backend="tiled", **tables)
    grads = torch.autograd.grad(loss(*found), [*mine, *learned])
    got = [plan.unshard(x.detach(), 2, group) for x in (*found, *grads[:3])]
    for part in grads[3:]:
        dist.all_reduce(part)
        got.append(part)
    # -inf of rows without keys is equal to itself.
    return max(float(torch.where(a == b, 0.0, (a - b).abs()).max()) for a, b in zip(got, want, strict=True))


def run(rank: int) -> None:
    qkv = [numbers(2, heads, LENGTH, 8, seed=seed) for seed, heads in enumerate((HEADS, 2, 2))]
    granules = [(1, 16), (8, 16), (16, 48), (8, 8)]
    for number, (name, pattern) in enumerate(PATTERNS.items()):
        tables = {key: table.clone() for key, table in TABLES.items() if key in pattern.tables}
        granule, chunk = granules[number % 4]
        method = ("zigzag", "contiguous", "longest_first", "auto", "cuts")[number % 5]
        masked = {key: table for key, table in tables.items() if key != "bias"}
        made = sd.parallel.plan(
            {"": pattern}, LENGTH, WORLD, heads=HEADS, granule=granule, chunk=chunk, method=method, equal=method != "cuts", **masked
        )  # fmt: skip
        error = compared(made, pattern, qkv, tables)
        assert error < 1e-12, (name, method, error)
    # A granule that is not sent is missed: the comparison would see it.
    made = sd.parallel.plan(NEAR, LENGTH, WORLD, granule=8, chunk=16, method="contiguous")
    seen = made._needs[""].clone()
    seen[1, 5] = False  # keys before those of rank 1
    assert compared(dataclasses.replace(made, _needs={"": seen}), NEAR, qkv, {}) > 1e-3
    refusals(made, qkv)


def refusals(made: sd.parallel.TokenPlan, qkv: list[torch.Tensor]) -> None:
    group = dist.group.WORLD
    rank = dist.get_rank()
    cp, mine = made.on(group), [made.shard(x.detach(), 2, group) for x in qkv]
    refused(sd.UnsupportedError, "plan is for another mask", lambda: sd.attention(*mine, CAUSAL, cp=cp))
    refused(sd.UnsupportedError, "takes no q_offset", lambda: sd.attention(*mine, NEAR, cp=cp, q_offset=0))
    refused(sd.ArgumentError, "mesh must be a DeviceMesh with one dimension or a process group", lambda: made.on(None))
    refused(sd.ShapeError, "q must hold the", lambda: sd.attention(*qkv, NEAR, cp=cp))
    refused(sd.UnsupportedError, "gives no gradients", lambda: made.unshard(mine[0].clone().requires_grad_(), 2, group))
    refused(sd.ShapeError, "dimension 2 has 203 rows", lambda: made.unshard(qkv[0], 2, group))
    documents = sd.parallel.plan(PATTERNS["documents"], LENGTH, WORLD, granule=8, chunk=16, doc=TABLES["doc"])
    of_documents, rows = documents.on(group), [documents.shard(x.detach(), 2, group) for x in qkv]
    other = torch.arange(LENGTH) // 50
    refused(
        sd.UnsupportedError,
        "of another table 'doc'",
        lambda: sd.attention(*rows, PATTERNS["documents"], cp=of_documents, doc=other),
    )
    uneven = made if rank else documents
    refused(sd.UnsupportedError, "ranks have different plans", lambda: uneven.on(group))


def refused(kind: type[Exception], words: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"nothing refused: {words}")


def process(rank: int, folder: str, failures: Any) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
        run(rank)
        dist.destroy_process_group()
    except BaseException:
        failures.put(f"rank {rank}: {traceback.format_exc()}")
        raise SystemExit(1) from None


def test_four_processes_are_one(tmp_path: Path) -> None:
    # Forked: a process that imports everything anew takes longer than all that is tested.
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    ranks = [context.Process(target=process, args=(rank, str(tmp_path), failures)) for rank in range(WORLD)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(240)
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
    told = [] if failures.empty() else [failures.get()]
    assert [rank.exitcode for rank in ranks] == [0] * WORLD, told
