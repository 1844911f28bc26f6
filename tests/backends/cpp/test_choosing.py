"""Blocks that C++ chooses are those that torch chooses: whatever scores are made of, whatever a row may have, whichever rule there is."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.backends.cpp import choosing
from sparsedsl.backends.cpp.backend import FIXED_PARTS
from sparsedsl.backends.cpp.choosing import choose_blocks
from sparsedsl.backends.cpp.libraries import fixed_library
from sparsedsl.selection.candidates import Candidates, IntervalRule, PairRule, TableRule, Within
from sparsedsl.selection.composed_scores import BoundScores, GroupedScores, SumScores
from sparsedsl.selection.derived_scores import RegroupedScores, softmax_scores
from sparsedsl.selection.mass import threshold, top_p
from sparsedsl.selection.ranking import top_k
from sparsedsl.selection.score_arithmetic import ReluScores, WeightedScores
from sparsedsl.selection.scores import DotScores, ScoreSource, TensorScores
from sparsedsl.selection.selected_blocks import SelectedBlocks

INF = float("inf")
Tensor = torch.Tensor


class Draw:
    """Seeded tensors, small whole numbers: products and sums of them are exact, so that both sides see the same ties."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def ints(self, low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=self.generator)

    def numbers(self, *size: int) -> Tensor:
        return self.ints(-3, 4, *size).to(self.dtype)

    def some(self, share: float, *size: int) -> Tensor:
        return torch.rand(size, generator=self.generator) < share

    def scores(self, kind: str, batch: int, heads: int, rows: int, blocks: int) -> ScoreSource:
        """Of some kind; ``heads`` of the result."""
        of, width = 2 * heads, 1 + int(self.ints(0, 20, 1))
        match kind:
            case "dot":
                return DotScores(self.numbers(batch, of, rows, width), self.numbers(batch, heads, blocks, width), 0.5)
            case "wide dot":
                return DotScores(self.numbers(batch, heads, rows, width), self.numbers(batch, of, blocks, width))
            case "bound":
                low = self.numbers(batch, heads, blocks, width)
                return BoundScores(
                    self.numbers(batch, of, rows, width), low, low + self.numbers(batch, heads, blocks, width).abs()
                )
            case "cells":
                return TensorScores(self.numbers(batch, heads, rows, blocks))
            case "sum":
                bias = TensorScores(self.numbers(1, 1, 1, blocks))
                return SumScores((self.scores("dot", batch, heads, rows, blocks), bias, bias), (2.0, 0.5, -1.0))
            case "group":
                how = ("sum", "mean", "max")[int(self.ints(0, 3, 1))]
                return GroupedScores(self.scores("dot", batch, heads, rows, blocks), heads, how)  # type: ignore[arg-type]
            case "weighted":  # factors of more heads than there are scores of, or fewer
                factors = self.numbers(1, of if self.some(0.5, 1) else heads, rows, 1)
                return WeightedScores(ReluScores(self.scores("wide dot", batch, heads, rows, blocks)), factors)
            case "indexed":
                dots = ReluScores(self.scores("dot", batch, heads, rows, blocks))
                return GroupedScores(WeightedScores(dots, self.numbers(batch, of, rows, 1)), heads, "sum")
            case "regroup":
                how = ("sum", "mean", "max")[int(self.ints(0, 3, 1))]
                return RegroupedScores(self.scores("dot", batch, heads, rows, 3 * blocks - 1), 3, how)
            case "softmax":
                return softmax_scores(self.scores("dot", batch, heads, rows, blocks), self.limits(batch, of, rows, blocks))
        fine = self.scores("softmax", batch, heads, rows, 2 * blocks)
        return RegroupedScores(GroupedScores(fine, heads), 2)

    def limits(self, batch: int, heads: int, rows: int, blocks: int) -> Candidates:
        """Limits and intervals, or not."""
        begin = self.ints(0, blocks, *((batch, heads) if self.some(0.5, 1) else (1, 1)), rows) if self.some(0.5, 1) else None
        end = self.ints(0, blocks + 1, batch, heads, rows) if self.some(0.5, 1) else None
        return Candidates(begin, end, self.intervals(heads, rows, blocks) if self.some(0.5, 1) else None)

    def intervals(self, heads: int, rows: int, blocks: int) -> IntervalRule:
        """Two of each of three queries, of twice the heads; some are empty."""
        ends = []
        for _ in range(2):
            first = self.ints(0, 4 * blocks, 1, 2 * heads, rows, 3)
            last = (first + self.ints(0, 3 * blocks, 1, 2 * heads, rows, 3)).clamp(max=4 * blocks - 1)
            ends.append((first, last.masked_fill(self.some(0.4, *last.shape), -1)))
        return IntervalRule(tuple(ends), 4, heads)


KINDS = ["dot", "wide dot", "bound", "cells", "sum", "group", "weighted", "indexed", "regroup", "softmax", "mass"]


def assert_same(got: SelectedBlocks, want: SelectedBlocks) -> None:
    assert torch.equal(got.counts, want.counts)
    width = max(got.indices.shape[3], want.indices.shape[3])
    a, b = (torch.nn.functional.pad(x.indices, (0, width - x.indices.shape[3]), value=-1) for x in (got, want))
    assert torch.equal(a, b)


def native(*given: Any, **words: Any) -> tuple[Tensor, Tensor]:
    """Nothing of these is left to torch."""
    found = choose_blocks(*given, **words)
    assert found is not None
    return found


def drawn(data: Any, exact: bool) -> tuple[ScoreSource, Candidates, PairRule | None, Draw]:
    draw = Draw(data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([torch.float32, torch.float64])))
    kinds = [kind for kind in KINDS if not (exact and kind in ("softmax", "mass"))]
    batch, heads = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    rows, blocks = data.draw(st.sampled_from([1, 2, 70])), data.draw(st.sampled_from([1, 2, 7, 33, 130]))
    source = draw.scores(data.draw(st.sampled_from(kinds)), batch, heads, rows, blocks)
    heads = source.shape[1]
    candidates = draw.limits(batch, heads, rows, blocks)
    forced: PairRule | None = None
    how = data.draw(st.sampled_from(["none", "intervals", "within", "table"]))
    if how in ("intervals", "within"):
        forced = draw.intervals(heads, rows, blocks)
        if how == "within" and candidates.allowed is not None:
            forced = Within(forced, candidates.allowed)
    if how == "table":
        forced = TableRule(draw.some(0.2, *source.shape))
    return source, candidates, forced, draw


def spoiled(source: ScoreSource, draw: Draw) -> ScoreSource:
    """The same scores with infinities and what is no number."""
    values = source.scores()
    for value in (-INF, INF, float("nan")):
        values = values.masked_fill(draw.some(0.2, *values.shape), value)
    return TensorScores(values)


@given(data=st.data(), k=st.sampled_from([1, 2, 5, 40]), extra=st.booleans(), strange=st.booleans())
@settings(max_examples=200)
def test_top_k(data: Any, k: int, extra: bool, strange: bool) -> None:
    source, candidates, forced, draw = drawn(data, exact=True)
    source = spoiled(source, draw) if strange else source
    words: dict[str, Any] = {"forced": forced, "forced_extra": source.shape[3] if extra and forced is not None else None}
    assert_same(top_k(source, k, candidates, choose=native, **words), top_k(source, k, candidates, **words))


@given(
    data=st.data(), share=st.sampled_from([0.3, 0.9, 1.0]), inclusive=st.booleans(), unmet=st.sampled_from(["all", "none"]),
    in_mass=st.booleans(), strange=st.booleans(),
)  # fmt: skip
@settings(max_examples=200)
def test_top_p(data: Any, share: float, inclusive: bool, unmet: Any, in_mass: bool, strange: bool) -> None:
    source, candidates, forced, draw = drawn(data, exact=True)
    source = spoiled(source, draw) if strange else source
    words: dict[str, Any] = {
        "measure": "softmax", "inclusive": inclusive, "unmet": unmet, "forced": forced, "forced_in_mass": in_mass,
    }  # fmt: skip
    assert_same(top_p(source, share, candidates, choose=native, **words), top_p(source, share, candidates, **words))


@given(data=st.data(), measure=st.sampled_from(["score", "softmax"]), least=st.sampled_from([0.013, 0.27, 1.51]))
@settings(max_examples=100)
def test_threshold(data: Any, measure: Any, least: float) -> None:
    source, candidates, forced, _ = drawn(data, exact=True)
    words: dict[str, Any] = {"measure": measure, "forced": forced}
    assert_same(threshold(source, least, candidates, choose=native, **words), threshold(source, least, candidates, **words))


@given(data=st.data(), kind=st.sampled_from(["softmax", "mass"]), k=st.sampled_from([1, 3]))
@settings(max_examples=100)
def test_masses_are_those_of_torch(data: Any, kind: str, k: int) -> None:
    """Which of two equal masses is greater is a matter of rounding: what is picked is as great as what torch picks."""
    draw = Draw(data.draw(st.integers(0, 2**31)), torch.float64)
    blocks = data.draw(st.sampled_from([1, 2, 7, 33]))
    source = draw.scores(kind, 2, 2, 5, blocks)
    candidates = draw.limits(2, source.shape[1], 5, blocks)
    got, want = (top_k(source, k, candidates, choose=choose) for choose in (native, None))
    assert torch.equal(got.counts, want.counts)
    values = source.scores()
    a, b = (values.gather(3, x.indices.clamp(min=0).long()).masked_fill(x.indices < 0, 0).sum(3) for x in (got, want))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    draw = Draw(0, dtype)
    source = DotScores(draw.numbers(2, 4, 40, 24), draw.numbers(2, 2, 50, 24), 0.25)
    end = torch.arange(40) + 1
    assert_same(top_k(source, 6, Candidates(end=end), choose=choose_blocks), top_k(source, 6, Candidates(end=end)))


def test_scores_of_another_kind_are_made_by_torch_and_chosen_in_cpp() -> None:
    draw = Draw(0, torch.float32)

    class Other(TensorScores):
        """One that C++ does not know."""

    source = SumScores((Other(draw.numbers(2, 2, 9, 40)), TensorScores(draw.numbers(2, 2, 9, 40))))
    rule = draw.intervals(2, 9, 40)
    odd = lambda rows, blocks: ((rows[:, None] + blocks) % 3 > 0)[None, None]  # noqa: E731
    for forced in (None, rule):
        candidates = Candidates(allowed=odd)
        assert_same(
            top_k(source, 4, candidates, forced=forced, choose=choose_blocks), top_k(source, 4, candidates, forced=forced)
        )


def test_rows_that_grow_from_call_to_call() -> None:
    """A thread's memory is kept; a sanitizer sees where it is too small by less than what it is aligned by."""
    for blocks in range(100, 700):
        source = TensorScores(torch.arange(2.0 * blocks).view(1, 1, 2, blocks))
        assert top_k(source, 2, choose=choose_blocks).indices[0, 0].tolist() == [[blocks - 2, blocks - 1]] * 2


@pytest.mark.parametrize("name", sorted({part for parts in FIXED_PARTS.values() for part in parts}))
def test_parts_that_no_pattern_changes_compile(name: str) -> None:
    """Torch would stand in for one of them, at another speed."""
    assert fixed_library(name, False) is not None


def test_what_cannot_be_compiled_is_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(name: str, double: bool) -> None:
        raise sd.UnsupportedError(f"{name}: it fails")

    monkeypatch.setattr(choosing, "fixed_library", fails)
    with caplog.at_level(logging.WARNING, "sparsedsl"):
        assert not choosing.can_choose("a compiler that nobody asked for yet")
    assert "blocks are chosen by torch, which takes longer: choosing: it fails" in caplog.text
