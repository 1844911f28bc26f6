"""Choosing blocks on one kernel, interpreted, against the same choice by torch, which keeps every score.

Rows and landmarks are small whole numbers, so that sums are exact and many scores equal: lists must be the same to the last place. Shares
of a softmax are rounded; what is picked must be as good as the best up to these roundings.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.backends.triton import choosing
from sparsedsl.selection.candidates import Candidates, IntervalRule, Within
from sparsedsl.selection.composed_scores import BoundScores, GroupedScores, SumScores
from sparsedsl.selection.derived_scores import RegroupedScores, SoftmaxScores
from sparsedsl.selection.ranking import top_k
from sparsedsl.selection.scores import DotScores, TensorScores
from sparsedsl.testing import tensor

INF = float("inf")
# One tile of rows, and two of blocks.
ROWS, BLOCKS = 20, 100


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dot(heads: int = 1, rows: int = ROWS, blocks: int = BLOCKS, width: int = 16, dtype: torch.dtype = torch.float32) -> DotScores:
    return DotScores(numbers(1, heads, rows, width, seed=0, dtype=dtype), numbers(1, 1, blocks, width, seed=1, dtype=dtype), 0.5)


def bound() -> BoundScores:
    low, high = numbers(1, 1, BLOCKS, 16, seed=2), numbers(1, 1, BLOCKS, 16, seed=3)
    return BoundScores(numbers(1, 1, ROWS, 16, seed=0), low, torch.maximum(low, high))


def spoiled(value: float) -> DotScores:
    """Some landmarks give no number, or the largest of all."""
    source = dot()
    source.b[0, 0, 5::40, 0] = value
    return source


def apart() -> DotScores:
    """Rows that lie in another order in memory, and begin at no multiple of 16 bytes."""
    room = numbers(1, ROWS, 2, 25, seed=0)
    return DotScores(room[..., 1:].transpose(1, 2), numbers(1, BLOCKS, 1, 25, seed=1)[..., 1:].transpose(1, 2), 0.5)


ROW = torch.arange(ROWS).view(1, 1, ROWS, 1)
END = torch.arange(ROWS) * 4 - 3
CAUSAL = Candidates(end=END)
LATE = Candidates(begin=END - 40, end=END)
BY_HEAD = Candidates(end=torch.stack([END, END + 9])[None].to(torch.int32))
RANGES = Candidates(end=END + 40, allowed=IntervalRule(((ROW * 0, ROW + 3), (ROW * 3, ROW * 3 + 30)), 1, 1))
OWN = IntervalRule(((ROW * 4, ROW * 4 + 3),), 1, 1)
TWO = IntervalRule(((ROW * 0, ROW * 0 + 1), (ROW * 3, ROW * 3 + 1)), 1, 1)
FAR = IntervalRule(((ROW[:, :, :3] * 300, ROW[:, :, :3] * 300 + 1),), 1, 1)
WIDE = Candidates(end=END + 9)

# Scores, k, candidates, and what is forced.
CASES: dict[str, tuple[Any, int, Candidates | None, dict[str, Any]]] = {
    "all blocks, several tiles of rows": (dot(1, 70), 5, None, {}),
    "causal, rows without blocks": (dot(), 5, CAUSAL, {}),
    "from a block on": (dot(), 3, LATE, {}),
    "heads apart": (dot(2), 5, BY_HEAD, {}),
    "ranges": (dot(), 5, RANGES, {}),
    "all scores alike": (DotScores(torch.zeros(1, 1, ROWS, 16), torch.ones(1, 1, BLOCKS, 16)), 7, CAUSAL, {}),
    "one block": (dot(), 1, CAUSAL, {}),
    "more than a tile has columns": (dot(1, 9), 70, None, {}),
    "as many as there are": (dot(1, 9, 12), 12, None, {}),
    "NaN": (spoiled(float("nan")), 5, CAUSAL, {}),
    "infinity": (spoiled(INF), 5, CAUSAL, {}),
    "bfloat16": (dot(dtype=torch.bfloat16), 5, CAUSAL, {}),
    "odd rows": (apart(), 5, CAUSAL, {}),
    "sum of heads": (GroupedScores(dot(4), 2, "sum"), 5, CAUSAL, {}),
    "mean of heads": (GroupedScores(dot(2), 1, "mean"), 5, CAUSAL, {}),
    "greatest of heads": (GroupedScores(dot(2), 1, "max"), 5, CAUSAL, {}),
    "neighbours": (RegroupedScores(GroupedScores(dot(2), 1, "sum"), 4), 5, Candidates(end=END // 4), {}),
    "mean of neighbours, the last ones fewer": (RegroupedScores(dot(), 4, "mean"), 5, None, {}),
    "greatest of neighbours": (RegroupedScores(dot(), 4, "max"), 5, None, {}),
    "bounds": (bound(), 5, CAUSAL, {}),
    "forced": (dot(), 5, WIDE, {"forced": TWO}),
    "more forced than k": (dot(), 3, WIDE, {"forced": OWN}),
    "forced beside NaN and infinity": (spoiled(INF), 5, WIDE, {"forced": TWO}),
    "forced within ranges": (dot(), 5, RANGES, {"forced": Within(TWO, RANGES.allowed)}),
    "forced on top": (dot(), 5, WIDE, {"forced": OWN, "forced_extra": BLOCKS}),
    "shared by programs": (dot(1, 1, 1100), 5, Candidates(end=torch.tensor([1090])), {}),
    "shared by programs, forced": (dot(1, 3, 1100), 4, None, {"forced": FAR}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_chooses_what_torch_does(name):
    source, k, candidates, words = CASES[name]
    asked = []

    def own(*arguments, **more):
        asked.append(choosing.choose_blocks(*arguments, **more))
        return asked[-1]

    got, want = top_k(source, k, candidates, choose=own, **words), top_k(source, k, candidates, **words)
    assert asked and asked[0] is not None, "the kernel leaves it to torch"
    assert torch.equal(got.indices, want.indices) and torch.equal(got.counts, want.counts)
    assert (got.scores is None) == ("forced" in words)
    if got.scores is not None:
        scores = source.scores().nan_to_num(nan=INF, posinf=INF, neginf=-INF).gather(-1, want.indices.clamp(min=0).long())
        # What is added up in another order is rounded otherwise: only means are no exact numbers.
        torch.testing.assert_close(
            got.scores.values, scores.masked_fill(want.indices < 0, -INF), rtol=1e-6 if "mean" in name else 0, atol=0
        )


@pytest.mark.parametrize("forced", [None, IntervalRule(((ROW * 0, ROW * 0),), 1, 1)], ids=["free", "forced"])
def test_shares_of_a_softmax_are_picked_as_well_as_their_roundings_allow(forced):
    x, y = torch.randn(1, 4, ROWS, 16, generator=torch.Generator().manual_seed(0)), tensor(1, 2, 75, 16, seed=1)
    shares = SoftmaxScores(DotScores(x, y, 0.25), None, Candidates(end=torch.arange(ROWS) * 2 - 2))
    source, k, candidates = RegroupedScores(GroupedScores(shares, 2, "sum"), 3), 4, Candidates(end=torch.arange(ROWS) - 1)
    got = top_k(source, k, candidates, choose=choosing.choose_blocks, forced=forced)
    want = top_k(source, k, candidates, forced=forced)
    assert torch.equal(got.counts, want.counts) and torch.equal((got.indices < 0), (want.indices < 0))
    exact = SoftmaxScores(DotScores(x.double(), y.double(), 0.25), None, shares.candidates)
    masses = RegroupedScores(GroupedScores(exact, 2, "sum"), 3).scores()
    # Exponents are of the size of the largest score, and rounded once a product and once in the total; six shares are added up.
    slack = 32 * torch.finfo(torch.float32).eps * (1 + float(shares.source.scores().abs().max())) * 6
    picked, best = (masses.gather(-1, lists.indices.clamp(min=0).long()) for lists in (got, want))
    there = want.indices >= 0
    off = (picked.masked_fill(~there, 0).sort(-1).values - best.masked_fill(~there, 0).sort(-1).values).abs()
    assert float(off.max()) <= slack
    if forced is not None:
        assert bool((got.indices[..., 0][want.counts > 0] == 0).all())


CAUSAL_PAIRS = kv_idx <= q_idx
OWN_PAGE = q_idx // 8 == kv_idx // 8


def chosen(scores: Any, k: int = 2, **words: Any) -> Any:
    return sd.attend(CAUSAL_PAIRS & sd.top_k(scores, k, **words))


MEANS = sd.summary(sd.k, 8)
DOT = sd.dot(sd.q, MEANS)
# Programs whose choices the kernel makes, and why torch makes others.
PROGRAMS: dict[str, tuple[Any, str | None]] = {
    "moba": (sd.patterns.moba(8, 2), None),
    "nsa": (sd.patterns.nsa(4, 8, 2, 8), None),
    "quest": (chosen(sd.bound(sd.q, sd.k, 8), forced=OWN_PAGE, extra=True), None),
    "group": (chosen(DOT.over_group("mean")), None),
    "all heads": (chosen(DOT.over_heads("max")), None),
    "blocks of queries": (chosen(sd.dot(sd.summary(sd.q, 8), MEANS), forced=OWN_PAGE), None),
    "top_p": (sd.attend(CAUSAL_PAIRS & sd.top_p(DOT, 0.5)), "the kernel knows top_k alone"),
    "sums": (chosen(DOT + sd.dot(sd.q, MEANS, scale=0.5)), "scores are made of sums"),
    "antidiagonals": (chosen(sd.antidiagonal(sd.q, sd.k, 4, 8)), "scores are made of antidiagonal"),
    "a late softmax": (chosen(DOT.over_heads("mean").softmax(CAUSAL_PAIRS)), "a softmax is taken over scores that are reduced before"),
    "strided": (chosen(DOT, among=CAUSAL_PAIRS & (kv_idx // 8 % 3 != 1)), "candidates are no ranges of keys"),
    "a maximum of sums": (chosen(DOT.over_heads("sum").regroup(2, "max")), "a maximum and a sum are taken, one of the other"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_explain_says_who_chooses(name, monkeypatch):
    program, why = PROGRAMS[name]
    answers, real = [], choosing.choose_blocks

    def spy(*arguments, **words):
        answers.append(real(*arguments, **words) is not None)
        return None  # torch goes on, which is quicker than the interpreter

    monkeypatch.setattr(choosing._Job, "launch", lambda *_: None)
    monkeypatch.setattr(choosing, "choose_blocks", spy)
    attn = sd.compile(program, backend="triton", allow=["selection reads later queries"])
    q, k, v = tensor(1, 2, 24, 16, seed=0), tensor(1, 1, 24, 16, seed=1), tensor(1, 1, 24, 16, seed=2)
    attn.choices(q, k, v, **({"gate": tensor(1, 2, 24, 3, seed=3)} if name == "nsa" else {}))
    text = str(attn.explain(24, heads=2, kv_heads=1, head_dim=16, device="cpu"))
    assert (": one kernel from landmarks to lists" in text) == (why is None) == answers[0]
    assert why is None or f": torch, since {why}" in text


class NothingIsReadBack(TorchDispatchMode):
    """Raises where torch would wait for the device: a number, a shape or a truth value that depends on what tensors hold."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "repeat_interleave.Tensor")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        by_flags = "aten.index." in name and any(t is not None and t.dtype == torch.bool for t in args[1])
        assert not by_flags and not any(f"aten.{word}" in name for word in self.WAITS), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def test_what_waits_for_the_device_is_seen():
    for wait in (torch.Tensor.item, lambda t: t[t > 0], torch.Tensor.nonzero):
        with pytest.raises(AssertionError, match="waits for the device"), NothingIsReadBack():
            wait(torch.ones(1))


@pytest.mark.parametrize(
    "name", ["causal, rows without blocks", "ranges", "forced", "forced on top", "shared by programs", "neighbours"]
)
def test_nothing_waits_for_the_device(name, monkeypatch):
    """All that torch does between rows and lists; kernels are launched and not waited for."""
    launched = []
    monkeypatch.setattr(choosing._Job, "launch", lambda job, kernel, programs, values: launched.append(kernel))
    source, k, candidates, words = CASES[name]
    with NothingIsReadBack():
        top_k(source, k, candidates, choose=choosing.choose_blocks, **words)
    assert launched == ["choose_best"]


def test_what_the_kernel_does_not_make_is_left_to_torch():
    cells = TensorScores(torch.zeros(1, 2, 3, 4))
    for source, k, candidates in (
        (cells, 2, None),
        (SumScores((dot(), dot())), 2, None),
        (dot(dtype=torch.float64), 2, None),
        (DotScores(dot().a, dot().b, -1.0), 2, None),
        (dot(1, 3, 600), 300, None),
        (dot(), 2, Candidates(allowed=lambda rows, blocks: blocks % 2 == 0)),
        (dot(), 2, Candidates(allowed=IntervalRule(tuple((ROW * n, ROW * n) for n in range(5)), 1, 1))),
    ):
        got = top_k(source, k, candidates, choose=choosing.choose_blocks)
        assert torch.equal(got.indices, top_k(source, k, candidates).indices)
