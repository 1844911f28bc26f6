"""A strategy for each head by a statistic: FlexPrefill beside the golden values of T14, T15 and T20, and its parts beside loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from sparsedsl.program.effect_rules import LATER_QUERIES
from sparsedsl.program.program_text import read_program
from tests.programs.choices_recipe import chosen, dig, numbers, value_of

Tensor = torch.Tensor
CAUSAL = kv_idx <= q_idx
PAID = sd.probe(sd.q, sd.k, rows=8, causal=True)
SLASHES = sd.diagonals(sd.q, sd.k, rows=8)
APART = sd.divergence(sd.probe(sd.q, sd.k, rows=8, pooled=8), PAID)
LINES = sd.top_p(PAID, 0.7, forced=kv_idx < 1, block=8, name="columns") | sd.top_p(
    SLASHES, 0.7, forced=q_idx - kv_idx < 1, block=8, name="slashes"
)


@pytest.fixture(scope="module")
def prompt() -> dict[str, Tensor]:
    k = numbers(52, 3, 64, 8)
    k[0, :3] *= 3
    return {"q": 2 * numbers(51, 3, 64, 8)[None], "k": k[None], "v": numbers(53, 3, 64, 8)[None]}


def compiled(program: Any, backend: str) -> Any:
    return sd.compile(program, backend=backend, allow=[LATER_QUERIES])


def pairs_of(columns: Tensor, slashes: Tensor, block: int, length: int) -> Tensor:
    """The pairs of blocks whose column, or whose distance, was chosen."""
    return torch.tensor(
        [
            [v // block <= t // block and bool(columns[v // block] or slashes[t // block - v // block]) for v in range(length)]
            for t in range(length)
        ]
    )


def dense(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor) -> Tensor:
    return (q @ k.T * 8**-0.5).masked_fill(~(pairs & torch.ones_like(pairs).tril()), -torch.inf).softmax(-1) @ v


def test_T14_how_far_the_estimate_is_from_what_is_paid(backend: str, prompt: Any) -> None:
    attn = compiled(sd.attend(CAUSAL & ((APART < 0.1) | LINES)), backend)
    found = value_of(attn, APART, **prompt)
    wanted = torch.tensor([[0.0647340519, 0.0651648258, 0.0638965524]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_T15_lines_and_slashes_of_blocks(backend: str, prompt: Any) -> None:
    flags = compiled(sd.attend(CAUSAL & LINES), backend).choices(**prompt)
    rows = []
    for head in range(3):
        pairs = pairs_of(flags["columns"][0, head], flags["slashes"][0, head], 8, 64)[::8, ::8]
        rows.append([row.nonzero()[:, 0].tolist() for row in pairs])
    assert [lists[7] for lists in rows] == [[0, 2, 4, 5, 6, 7], [*range(8)], [0, *range(2, 8)]]
    assert [sum(map(len, lists)) for lists in rows] == [31, 34, 33]


def test_T15_blocks_of_the_map(backend: str, prompt: Any) -> None:
    attn = compiled(sd.patterns.flexprefill(8, 0.7, tau=0.2), backend)
    picked = chosen(attn, "top_p", **prompt)
    assert [sum(map(len, rows)) for rows in picked] == [22, 23, 23]
    assert all(rows[7] == [0, 7] for rows in picked)  # late rows starve
    pairs = torch.zeros(3, 64, 64, dtype=torch.bool)
    for head, rows in enumerate(picked):
        for u, row in enumerate(rows):
            for c in row:
                pairs[head, 8 * u : 8 * u + 8, 8 * c : 8 * c + 8] = True
    out = attn(**prompt)[0]
    for head in range(3):
        torch.testing.assert_close(out[head], dense(*(prompt[x][0, head] for x in "qkv"), pairs[head]))


def test_heads_take_different_strategies(backend: str, prompt: Any) -> None:
    """Between the distances of T14 lies a tau that parts them."""
    both = compiled(sd.patterns.flexprefill(8, 0.7, tau=0.065), backend)(**prompt)
    aware, lines = (compiled(sd.patterns.flexprefill(8, 0.7, tau=tau), backend)(**prompt) for tau in (0.2, 0.0))
    torch.testing.assert_close(both, torch.stack([aware[:, 0], lines[:, 1], aware[:, 2]], 1))
    assert not torch.allclose(aware, lines)


def test_T20_lines_and_slashes_among_kept_tokens(backend: str, prompt: Any) -> None:
    seen = sd.probe(sd.q, sd.k, rows=8, causal=True, keep="before")
    tokens = sd.keep_tokens(seen, tail=1.0, least=32, always=8)
    attn = compiled(sd.compact(tokens, sd.attend(CAUSAL & LINES)), backend)
    out = attn(**prompt)
    assert attn.choices(**prompt)["keep_tokens"][0][0, :8].tolist() == [*range(7), 10]
    assert abs(dig(out) - 7.732009271) < 1e-8
    assert int((out == 0).all(-1).sum()) == 72
    # The published composition: all of FlexPrefill inside, by its name.
    whole = sd.compact(tokens, sd.patterns.flexprefill(8, 0.7, tau=0.0))
    torch.testing.assert_close(compiled(whole, backend)(**prompt), out)
    named = sd.patterns.token_sparse(0.3, 8, 3, 16, inside=sd.patterns.flexprefill(8, 0.7))
    assert compiled(named, backend)(**prompt).isfinite().all()


# ---- at random, beside loops -------------------------------------------------------------------------------------------------------


def blocks_by_loops(scores: list[float], block: int, share: float | None, count: int, first: int) -> list[int]:
    """Numbers of the blocks chosen of one head; block ``first`` is forced."""
    sums = [sum(scores[i : i + block]) for i in range(0, len(scores), block)]
    order = sorted(range(len(sums)), key=lambda u: (-sums[u], u))
    order = [first, *(u for u in order if u != first)]
    if share is None:
        return sorted(order[:count])
    held, n = 0.0, 0
    for score in sorted(scores, reverse=True):
        held, n = held + score / sum(scores), n + 1
        if held >= share:
            break
    return sorted(order[: n // block + 1])


@given(st.data())
@settings(max_examples=6)
def test_parts_beside_loops(data: st.DataObject) -> None:
    """Blocks of keys and distances, the map, the distance of two scores: with ragged blocks and heads that share keys."""
    length, block = data.draw(st.integers(5, 30)), data.draw(st.sampled_from((2, 3, 8)))
    rows, share = data.draw(st.sampled_from((1, 4))), data.draw(st.sampled_from((0.3, 0.6, 0.9)))
    inclusive = data.draw(st.booleans())
    count = data.draw(st.none() | st.integers(1, 3))
    make = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    q, k = (torch.randn(1, heads, length, 4, generator=make, dtype=torch.float64) for heads in (2, 1))
    paid = sd.probe(sd.q, sd.k, rows=rows, causal=True)
    estimate = sd.probe(sd.q, sd.k, rows=rows, pooled=block)
    slashes = sd.diagonals(sd.q, sd.k, rows=rows)
    choose = (
        (lambda s, f, n: sd.top_k(s, count, forced=f, block=block, name=n))
        if count
        else (lambda s, f, n: sd.top_p(s, share, forced=f, block=block, name=n))
    )
    columns, lines = choose(paid, kv_idx < 1, "columns"), choose(slashes, q_idx - kv_idx < 1, "lines")
    pooled = sd.dot(sd.summary(sd.q, block), sd.summary(sd.k, block))
    aware = sd.top_p(pooled, share, over="map", inclusive=inclusive, among=CAUSAL, forced=kv_idx < block, name="aware")
    apart = sd.divergence(estimate, paid)
    program = sd.attend(CAUSAL & ((apart < 0.1) & aware | ~(apart < 0.1) & (columns | lines)))
    assert read_program(sd.Program(program).text) == sd.Program(program)
    found = {}
    for backend in ("reference", "tiled"):
        attn = compiled(program, backend)
        choices = attn.choices(q, k, k)
        found[backend] = (
            [value_of(attn, node, q=q, k=k, v=k) for node in (apart, paid, slashes)]
            + [x if isinstance(x, Tensor) else x.table() for x in (choices["columns"], choices["lines"], choices["aware"])]
            + [attn(q, k, k)]
        )
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    distance, paid_by, by_slash, columns_of, lines_of, aware_of, _ = found["reference"]
    for h in range(2):
        for scores, flags in ((paid_by, columns_of), (by_slash, lines_of)):
            wanted = blocks_by_loops(scores[0, h].tolist(), block, None if count else share, count or 0, 0)
            assert flags[0, h].nonzero()[:, 0].tolist() == wanted
        means = torch.stack([part.mean(0) for part in k[0, 0].split(block)])
        guess = (means @ q[0, h, -rows:].mean(0) / 2).softmax(0)
        real = [sum(paid_by[0, h, i : i + block].tolist()) for i in range(0, length, block)]
        middle = [(a + b) / 2 for a, b in zip(guess.tolist(), real, strict=True)]
        halves = [sum(a * math.log(a / m) for a, m in zip(part, middle, strict=True) if a > 0) for part in (guess.tolist(), real)]
        assert abs(float(distance[0, h]) - math.sqrt(max(sum(halves) / 2, 0.0))) < 1e-7
        cells = []
        for u, row in enumerate(torch.stack([part.mean(0) for part in q[0, h].split(block)])):
            mass = (means[: u + 1] @ row / 2).softmax(0).tolist()
            cells += [(-part, u, c) for c, part in enumerate(mass)]
        held, taken = 0.0, {(u, 0) for u in range(len(means))}
        for part, u, c in sorted(cells):
            held -= part
            if held < share * len(means) or inclusive:
                taken.add((u, c))
            if held >= share * len(means):
                break
        assert {tuple(cell) for cell in aware_of[0, h].nonzero().tolist()} == taken


def test_what_is_said_of_it() -> None:
    program = sd.patterns.flexprefill(8, 0.7)
    assert sd.compile(program).effects == {LATER_QUERIES}
    assert sd.analyse(program, 64).causal.status == "REFUTED"
    alone = sd.attend(CAUSAL & sd.top_p(sd.dot(sd.q, sd.summary(sd.k, 8)), 0.5, over="map", among=(kv_idx // 8 + 1) * 8 <= q_idx))
    assert sd.compile(alone).effects == {LATER_QUERIES} and sd.analyse(alone, 64).causal.status == "REFUTED"
    q = torch.randn(1, 1, 8, 4)
    with pytest.raises(sd.UnsupportedError):
        sd.compile(alone)(q, *[torch.randn(1, 1, 16, 4)] * 2, q_offset=8)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sd.probe(sd.q, sd.k, rows=8, pooled=0), "probe(): pooled must be a whole number of at least 1"),
        (lambda: sd.probe(sd.q, sd.k, rows=8, pooled=8, causal=True), "leave causal, complete and keep out"),
        (lambda: sd.divergence(PAID, SLASHES), "divergence(): y must be scores of keys"),
        (lambda: sd.divergence(PAID, sd.k), "divergence(): y must be scores of keys"),
        (
            lambda: sd.divergence(sd.probe(sd.q, sd.k, rows=8, pooled=8), sd.probe(sd.q, sd.k, rows=8, pooled=4)),
            "blocks of different sizes, 'keys/8' and 'keys/4'",
        ),
        (lambda: sd.top_k(sd.probe(sd.q, sd.k, rows=8, pooled=8), 2), "choose by scores of keys, and blocks of them by block="),
        (lambda: sd.top_k(PAID, 2, block=0), "top_k(): block must be a whole number of at least 1; got 0"),
        (lambda: sd.top_k(sd.dot(sd.q, sd.k), 2, block=4), "choose blocks by regroup(); got 4"),
        (lambda: sd.top_p(sd.dot(sd.q, sd.k), 0.5, over="head"), "top_p(): over must be one of 'row', 'map'; got 'head'"),
        (lambda: sd.top_p(sd.dot(sd.q, sd.k), 0.5, over="map", forced_in_mass=True), "leave forced_in_mass out"),
        (lambda: sd.top_p(PAID, 0.5, over="map"), "leave both out, and over too"),
        (lambda: APART[sd.h], "is read with two indices, (batch entry, query head); got 1"),
        (lambda: sd.patterns.flexprefill(0), "flexprefill(): block must be at least 1; got 0"),
    ],
)
def test_errors(make: Any, words: str) -> None:
    with pytest.raises(sd.PatternError) as error:
        make()
    assert words in str(error.value), str(error.value)
