"""Candidates within candidates: masses among some blocks, choices among others, in a mask that is wider or narrower than both.

The oracle is written in loops over plain numbers. It shares nothing with the dense meaning, nor with the ways of the backends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.program.effect_rules import LATER_QUERIES
from sparsedsl.selection.candidates import Candidates
from sparsedsl.selection.derived_scores import softmax_scores
from sparsedsl.selection.scores import TensorScores

INF = math.inf
# Where a decision hangs on less than this, rounding may turn it.
NEAR = 1e-9
Pairs = Callable[[int, int, int, int], bool]


def menu(block: int) -> list[tuple[Any, Pairs]]:
    """Masks of the language, and the same as functions of batch entry, head, query and key."""
    b, h, q, k = sd.b, sd.h, sd.q_idx, sd.kv_idx
    return [
        (k <= q, lambda b, h, q, k: k <= q),
        (k >= 0, lambda b, h, q, k: True),
        ((k // block + 1) * block <= q, lambda b, h, q, k: (k // block + 1) * block <= q),
        (k // block < q // block, lambda b, h, q, k: k // block < q // block),
        (abs(q - k) < 4, lambda b, h, q, k: abs(q - k) < 4),
        (k < block, lambda b, h, q, k: k < block),
        (k // block % 2 == 0, lambda b, h, q, k: k // block % 2 == 0),
        ((k // block) * block + h * block <= q, lambda b, h, q, k: k // block * block + h * block <= q),
        (k + b <= q, lambda b, h, q, k: k + b <= q),
        ((k < 2) | (q - k == 3), lambda b, h, q, k: k < 2 or q - k == 3),
        (k < 0, lambda b, h, q, k: False),
    ]


@dataclass
class Nested:
    """One random program with the numbers of one call, and what they mean."""

    seed: int

    def __post_init__(self) -> None:
        random = self.random = Random(self.seed)
        pick = random.choice
        self.batch, self.kv_heads, group = pick((1, 2)), pick((1, 2)), pick((1, 2))
        self.heads, self.block = self.kv_heads * group, pick((1, 2, 4))
        self.keys = random.randint(1, 13)
        self.rows = random.randint(1, self.keys)
        self.offset = random.randint(0, self.keys - self.rows)
        self.fine = self.block // 2 if self.block > 1 and random.random() < 0.4 else self.block
        masks = menu(self.block)
        self.softmax = pick([None, *masks, *masks])
        self.join = pick((None, None, ("kv_heads", pick(("sum", "mean", "max"))), ("one", pick(("sum", "mean", "max")))))
        self.join_first = random.random() < 0.5
        self.regroup = pick(("sum", "mean", "max"))
        self.mask, self.among, self.forced = pick(masks[:-1]), pick([None, *masks]), pick([None, None, *masks])
        self.rule = pick(("top_k", "top_p", "threshold"))
        self.words: dict[str, Any] = {}
        if self.rule == "top_k":
            self.words = {"count": pick((1, 2, 3, 50)), "extra": random.random() < 0.5}
        elif self.rule == "top_p":
            flags = {name: random.random() < 0.5 for name in ("inclusive", "forced_in_mass")}
            self.words = {"share": pick((1e-300, 0.31, 0.72, 0.999, 1.0, 1.0)), "unmet": pick(("all", "none")), **flags}
        else:
            self.words = {"least": pick((-INF, -0.31, 0.0, 0.11, 1.0, INF))}
        self.weights = pick((None, "softmax", "softmax1", "stick_breaking", "sigmoid"))
        self.inner = pick(("softmax", "softmax1"))
        draw = torch.Generator().manual_seed(self.seed)
        shape = (self.batch, self.heads, self.rows), (self.batch, self.kv_heads, self.keys)
        self.q, self.k, self.v = (
            torch.randn((*lead, 4), generator=draw, dtype=torch.float64) for lead in (shape[0], *shape[1:] * 2)
        )

    # ---- the program ------------------------------------------------------------------------------------------------------

    def scores(self) -> Any:
        """The scores as the language says them."""
        found: Any = sd.dot(sd.q, sd.summary(sd.k, self.fine))
        joined = self.joined(found) if self.join_first else found
        mass = joined if self.softmax is None else joined.softmax(self.softmax[0])
        mass = mass if self.join_first else self.joined(mass)
        return mass if self.fine == self.block else mass.regroup(2, self.regroup)

    def joined(self, found: Any) -> Any:
        """With heads joined."""
        if self.join is None:
            return found
        where, how = self.join
        return found.over_group(how) if where == "kv_heads" else found.over_heads(how)

    def program(self) -> sd.Program:
        """The whole."""
        by = self.scores()
        words = dict(self.words)
        first = words.pop({"top_k": "count", "top_p": "share", "threshold": "least"}[self.rule])
        among, forced = (None if mask is None else mask[0] for mask in (self.among, self.forced))
        selected = getattr(sd, self.rule)(by, first, among=among, forced=forced, **words)
        # Sums over groups can be picked by, but have no gradient and no place in the weights.
        rule = None if self.weights is None or self.fine != self.block else sd.per_chunk(selected, self.weights, inner=self.inner)
        self.weighed = rule is not None
        return sd.Program(sd.attend(self.mask[0] & selected, normaliser=rule))

    # ---- what it means ------------------------------------------------------------------------------------------------------

    def holds(self, pairs: Pairs, b: int, heads: list[int], row: int, block: int, size: int) -> bool:
        """Whether a block of so many keys has a pair that the mask allows, for one of the heads."""
        keys = range(block * size, min((block + 1) * size, self.keys))
        return any(pairs(b, h, self.offset + row, k) for h in heads for k in keys)

    def row_scores(self, b: int, row: int) -> tuple[list[list[float]], bool]:
        """Scores of one row, by head of the choice and block, and whether they are mass."""
        q, k = self.q[b, :, row].tolist(), self.k[b].tolist()
        group = self.heads // self.kv_heads
        tops = []
        for h in range(self.heads):
            line = []
            for start in range(0, self.keys, self.fine):
                part = k[h // group][start : start + self.fine]
                line.append(sum(q[h][d] * sum(key[d] for key in part) / len(part) for d in range(4)) / 2)
            tops.append(line)
        tops = self.joined_lines(tops) if self.join_first else tops
        if self.softmax is not None:
            tops = [self.shares(b, row, i, line, len(tops)) for i, line in enumerate(tops)]
        tops = tops if self.join_first else self.joined_lines(tops)
        mass = self.softmax is not None
        if self.fine != self.block:
            mass = mass and self.regroup == "sum"
            tops = [[self.reduced(line[i : i + 2], self.regroup) for i in range(0, len(line), 2)] for line in tops]
        return tops, mass

    def shares(self, b: int, row: int, head: int, line: list[float], heads: int) -> list[float]:
        """The softmax of a row over the blocks that its mask allows."""
        assert self.softmax is not None
        group = self.heads // heads
        mine = list(range(head * group, (head + 1) * group))
        raised = [math.exp(x) if self.holds(self.softmax[1], b, mine, row, u, self.fine) else 0.0 for u, x in enumerate(line)]
        return [x / (sum(raised) or 1.0) for x in raised]

    @staticmethod
    def reduced(values: list[float], how: str) -> float:
        """Several as one."""
        return max(values) if how == "max" else sum(values) / (len(values) if how == "mean" else 1)

    def joined_lines(self, lines: list[list[float]]) -> list[list[float]]:
        """Heads joined."""
        if self.join is None:
            return lines
        where, how = self.join
        group = len(lines) // (self.kv_heads if where == "kv_heads" else 1)
        parts = [lines[i : i + group] for i in range(0, len(lines), group)]
        return [[self.reduced(list(values), how) for values in zip(*part, strict=True)] for part in parts]

    def chosen(self, b: int, row: int, head: int, line: list[float], heads: int, mass: bool) -> tuple[set[int], bool]:
        """The blocks of a row, and whether that is beyond doubt."""
        group = self.heads // heads
        mine = list(range(head * group, (head + 1) * group))
        within = (self.among or self.mask)[1]
        live = [u for u in range(len(line)) if self.holds(within, b, mine, row, u, self.block)]
        named = [u for u in live if self.forced is not None and self.holds(self.forced[1], b, mine, row, u, self.block)]
        order = sorted(live, key=lambda u: (-line[u], u))
        sure = all(line[a] - line[c] > NEAR or line[a] == line[c] == 0 for a, c in pairwise(order))
        if self.rule == "top_k":
            rest = [u for u in order if u not in named]
            kept = [*([] if self.words["extra"] else named), *rest][: self.words["count"]]
            return {*kept, *(named if self.words["extra"] else [])}, sure
        if mass:
            total = sum(line[u] for u in live)
            height = {u: line[u] / (total or 1.0) for u in live}
        else:
            total = sum(math.exp(line[u]) for u in live)
            height = {u: math.exp(line[u]) / total for u in live}
        if self.rule == "threshold":
            least = self.words["least"]
            tall = height if mass else dict(enumerate(line))
            sure = all(abs(tall[u] - least) > NEAR or tall[u] == 0 for u in live)
            return {u for u in live if tall[u] >= least or u in named}, sure
        share = self.words["share"]
        if share == 1:
            return set(live), True
        if self.words["forced_in_mass"]:
            order = [*named, *[u for u in order if u not in named]]
        taken: list[int] = []
        total, reached = 0.0, False
        for u in order:
            total += height[u]
            sure = sure and abs(total - share) > min(NEAR, share / 2)
            if total >= share:
                reached = True
                taken += [u] if self.words["inclusive"] else []
                break
            taken.append(u)
        if not reached:
            taken = live if self.words["unmet"] == "all" else []
        return {*taken, *named}, sure

    def output(self, b: int, h: int, row: int, blocks: set[int], line: list[float]) -> list[float]:
        """What a query of one head gets from the chosen blocks."""
        group = self.heads // self.kv_heads
        q, keys, values = self.q[b, h, row].tolist(), self.k[b, h // group].tolist(), self.v[b, h // group].tolist()

        def attended(places: list[int], one: bool) -> list[float]:
            raised = [math.exp(sum(x * y for x, y in zip(q, keys[k], strict=True)) / 2) for k in places]
            total = sum(raised) + one
            return [sum(w * values[k][d] for w, k in zip(raised, places, strict=True)) / (total or 1.0) for d in range(4)]

        seen = [
            [k for k in range(u * self.block, min((u + 1) * self.block, self.keys)) if self.mask[1](b, h, self.offset + row, k)]
            for u in sorted(blocks)
        ]
        if not self.weighed:
            return attended([k for part in seen for k in part], False)
        s = [line[u] for u in sorted(blocks)]
        if self.weights in ("softmax", "softmax1"):
            total = sum(map(math.exp, s)) + (self.weights == "softmax1")
            weights = [math.exp(x) / total for x in s]
        else:
            weights, left = [], 1.0
            for x in reversed(s):
                weights.insert(0, left / (1 + math.exp(-x)))
                left *= 1 / (1 + math.exp(x)) if self.weights == "stick_breaking" else 1.0
        parts = [attended(part, self.inner == "softmax1") for part in seen]
        return [sum(w * part[d] for w, part in zip(weights, parts, strict=True)) for d in range(4)]

    def assert_right(self, *backends: str) -> str:
        """Every backend chooses and gives what the loops do. How it went: ``"right"``, ``"near"`` a tie, or ``"refused"``."""
        program = self.program()
        lines = {(b, row): self.row_scores(b, row) for b in range(self.batch) for row in range(self.rows)}
        done = "right"
        for backend in backends:
            attn = sd.compile(program, backend=backend, allow=[LATER_QUERIES])
            try:
                (found,) = attn.choices(self.q, self.k, self.v, q_offset=self.offset).values()
                out = attn(self.q, self.k, self.v, q_offset=self.offset)
            except sd.UnsupportedError as refusal:
                assert backend != "reference" and "Use" in str(refusal), refusal
                done = "refused"
                continue
            table = found if isinstance(found, torch.Tensor) else found.table()
            heads = table.shape[1]
            for (b, row), (tops, mass) in lines.items():
                for i, line in enumerate(tops):
                    wanted, sure = self.chosen(b, row, i, line, heads, mass)
                    got = set(table[min(b, table.shape[0] - 1), i, row].nonzero()[:, 0].tolist())
                    where = f"Nested({self.seed}), {backend}: entry {b}, head {i}, row {row}"
                    if got != wanted and not sure:
                        done = "near"
                        continue
                    assert got == wanted, f"{where} chooses {got}, wanted {wanted}\n{program.text}"
                    for h in range(i * self.heads // heads, (i + 1) * self.heads // heads):
                        values = out[b, h, row].tolist()
                        right = self.output(b, h, row, got, line)
                        assert max(abs(x - y) for x, y in zip(values, right, strict=True)) < 1e-9, (
                            f"{where}, query head {h} is {values}, wanted {right}\n{program.text}"
                        )
        return done


@given(seed=st.integers(0, 2**40))
@settings(max_examples=40)
def test_nested_candidates_as_loops_say(seed: int) -> None:
    Nested(seed).assert_right("reference", "tiled", "auto")


def test_most_random_cases_are_run_and_decided() -> None:
    """Hardly any is a tie or refused, and the ends of every rule are among them."""
    done = [Nested(seed).assert_right("tiled") for seed in range(24)]
    assert done.count("right") >= 20
    assert {case.words.get("share") for case in map(Nested, range(200))} >= {1e-300, 1.0}
    assert any(case.softmax and case.among and case.softmax is not case.among for case in map(Nested, range(20)))


# ---- what was wrong --------------------------------------------------------------------------------------------------------------


def test_mass_is_0_where_the_softmax_has_no_candidate() -> None:
    """Also at blocks that were picked under wider candidates; and what has no mass learns nothing."""
    values = torch.tensor([[[[1.0, 2.0, 500.0], [1.0, 2.0, 3.0]]]], dtype=torch.float64).requires_grad_()
    indices = torch.tensor([[[[0, 2], [1, 2]]]])
    odd = Candidates(allowed=lambda rows, blocks: (rows[:, None] + blocks) % 2 == 0)
    for candidates, wanted in (
        (Candidates(end=torch.tensor([2, 1])), [[1 / (1 + math.e), 0.0], [0.0, 0.0]]),
        (Candidates(begin=torch.tensor([1, 2])), [[0.0, 1.0], [0.0, 1.0]]),
        (odd, [[0.0, 1.0], [1.0, 0.0]]),
    ):
        mass = softmax_scores(TensorScores(values), candidates).at(indices)
        assert torch.allclose(mass[0, 0], torch.tensor(wanted, dtype=torch.float64), atol=1e-12)
        (slope,) = torch.autograd.grad(mass.sum(), values)
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_all_of_the_mass_is_all_blocks(backend: str) -> None:
    """float32 and float64, wherever rounded sums reach 1; then PBS is attention to all earlier segments."""
    for dtype in (torch.float32, torch.float64):
        q, k, v = (torch.randn(1, 2, 128, 8, generator=torch.Generator().manual_seed(n)).to(dtype) * 3 for n in range(3))
        attn = sd.compile(sd.patterns.pbs(block=4, segment=8, mass=1.0), backend=backend)
        (selected,) = [value for label, value in attn.choices(q, k, v).items() if label.startswith("top_p")]
        table = selected if isinstance(selected, torch.Tensor) else selected.table()
        block = torch.arange(32)
        assert torch.equal(table, (block // 2 < block[:, None] // 2).expand(1, 2, -1, -1))
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(attn(q, k, v), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_shares_of_tokens_at_their_ends(backend: str) -> None:
    q, k, v = (torch.randn(1, 2, 300, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
    seen = sd.probe(sd.q, sd.k, rows=8, causal=True, keep="before")
    for words, count in (
        ({"cover": 1.0}, 300), ({"cover": 0.0}, 9), ({"tail": 0.0}, 300), ({"tail": 1.0}, 8), ({"tail": 1.0, "least": 5}, 13),
        ({"tail": 1.0, "least": 999}, 300),
    ):  # fmt: skip
        kept = sd.keep_tokens(seen, always=8, **words)
        attn = sd.compile(sd.compact(kept, sd.kv_idx <= sd.q_idx), backend=backend)
        (found,) = attn.choices(q, k, v).values()
        assert [index.shape for index in found] == [(2, count)], words


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_a_score_that_is_no_number_is_picked_so_that_it_shows(backend: str) -> None:
    """Whatever the sign of the NaN, and before every number; but not before what is forced, nor where it is no candidate."""
    for dtype in (torch.float32, torch.float64):
        for bad in (torch.nan, -torch.nan, torch.inf):
            marks = torch.zeros(1, 1, 4, 2, dtype=dtype)
            marks[0, 0, 2, 0] = bad
            q = torch.ones(1, 1, 16, 2, dtype=dtype)
            by = sd.dot(sd.q, sd.input("marks", "batch kv_heads keys/4 head_dim"))
            before = (sd.kv_idx // 4 + 1) * 4 <= sd.q_idx
            for forced, wanted in ((None, {2}), (sd.kv_idx < 4, {0})):
                attn = sd.compile(sd.attend(before & sd.top_k(by, 1, forced=forced)), backend=backend)
                (selected,) = attn.choices(q, q, q, marks=marks).values()
                table = selected if isinstance(selected, torch.Tensor) else selected.table()
                assert set(table[0, 0, 15].nonzero()[:, 0].tolist()) == wanted
                assert set(table[0, 0, 11].nonzero()[:, 0].tolist()) == {0}


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_a_unit_that_one_summand_lacks_is_no_candidate(backend: str) -> None:
    """One block of two is not one for all."""
    q = torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by = sd.dot(sd.q, sd.summary(sd.k, 4)) + sd.dot(sd.q, sd.input("marks", "batch kv_heads keys/4 head_dim"))
    attn = sd.compile(sd.attend(sd.top_k(by, 2) & (sd.kv_idx >= 0)), backend=backend, allow=[LATER_QUERIES])
    (selected,) = attn.choices(q, q, q, marks=q[:, :, :1]).values()
    table = selected if isinstance(selected, torch.Tensor) else selected.table()
    assert table.tolist() == [[[[True, False]] * 6]]
