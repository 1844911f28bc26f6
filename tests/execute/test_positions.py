"""Calls that hold a part of the rows or heads: each row gets what it gets in the call that holds all.

The whole is computed by the reference, with the keys that are not there masked by a table: nothing of it knows of positions.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.analysis.residue_classes import residues
from sparsedsl.execute.relocated_calls import relocated_call
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.program.graph import Program
from sparsedsl.program.relocation import Relocation, Rows, relocated
from sparsedsl.runtime.standing import Standing, runs_of

N = 160
ZIGZAG = torch.cat([torch.arange(16, 48), torch.arange(112, 144)])
HALO = torch.arange(30, 118)
GAPS = torch.randperm(N, generator=torch.Generator().manual_seed(3))[:90].sort().values
HERE = sd.table("here")[sd.kv_idx] == 1
DOC = sd.table("doc", monotone=True)
BIAS = sd.table("bias", learned=True)
NEAR = sd.patterns.sliding_window(24)
TABLES = {"doc": torch.arange(N) // 45, "bias": torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}
PATTERNS: dict[str, Any] = {
    "window": NEAR,
    "dilated": sd.patterns.dilated(10, 4),
    "blocks": (sd.kv_idx <= sd.q_idx) & (sd.q_idx // 16 - sd.kv_idx // 16 < 3),
    "documents": (sd.kv_idx <= sd.q_idx) & (DOC[sd.q_idx] == DOC[sd.kv_idx]),
    "learned": sd.attend(NEAR, score=sd.score + BIAS[sd.q_idx - sd.kv_idx] - 0.1 * sd.h * sd.q_idx, sink=0.5),
    "length": sd.attend(sd.kv_idx <= sd.q_idx, score=sd.score + sd.kv_idx / sd.kv_len),
}


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(heads: int = 2, length: int = N, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [numbers(2, heads, length, 8, seed=seed, dtype=dtype).requires_grad_() for seed in range(3)]


def read_by(pattern: Any) -> dict[str, torch.Tensor]:
    return {
        name: table.clone().requires_grad_(table.is_floating_point()) for name, table in TABLES.items() if name in pattern.tables
    }


def with_keys_here(pattern: Any) -> Any:
    if isinstance(pattern, sd.Pattern):
        return sd.attend(pattern.mask & HERE, score=pattern.score, sink=pattern.sink)
    return pattern & HERE


CASES = {
    ("window", ZIGZAG, GAPS): "reference tiled", ("window", HALO[40:], HALO): "tiled", ("dilated", ZIGZAG, ZIGZAG): "tiled cpp",
    ("dilated", HALO, GAPS): "tiled", ("blocks", GAPS, GAPS): "tiled", ("documents", ZIGZAG, GAPS): "tiled cpp",
    ("learned", ZIGZAG, GAPS): "reference tiled cpp", ("learned", GAPS[-1:], GAPS): "tiled", ("length", GAPS, ZIGZAG): "tiled",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "q_at", "kv_at", "backend"), [(*case, backend) for case, backends in CASES.items() for backend in backends.split()]
)
def test_rows_get_what_they_get_in_the_whole(name: str, q_at: torch.Tensor, kv_at: torch.Tensor, backend: str) -> None:
    pattern, (q, k, v) = PATTERNS[name], qkv()
    tables, here = read_by(pattern), torch.zeros(N, dtype=torch.int64)
    here[kv_at] = 1
    whole = sd.compile(with_keys_here(pattern), backend="reference")(q, k, v, return_lse=True, here=here, **tables)
    want = [x[:, :, q_at] for x in whole]
    found = sd.compile(pattern, backend=backend)(
        q[:, :, q_at], k[:, :, kv_at], v[:, :, kv_at], q_positions=q_at, kv_positions=kv_at, whole=(N, N), return_lse=True, **tables
    )  # fmt: skip
    torch.testing.assert_close(found, tuple(want), rtol=1e-12, atol=1e-12)
    leaves = [q, k, v, *(t for t in tables.values() if t.requires_grad)]
    weights, seen = numbers(*want[0].shape, seed=7), want[1] != float("-inf")

    def loss(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return (out * weights).sum() + lse[seen].sum()

    torch.testing.assert_close(
        torch.autograd.grad(loss(*found), leaves), torch.autograd.grad(loss(*want), leaves), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize(
    "pattern", [sd.patterns.sigmoid(NEAR, length=24), sd.patterns.stick_breaking()], ids=["sigmoid", "stick_breaking"]
)
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_other_weights_than_a_softmaxs_stand_where_rows_stand(pattern: sd.Pattern, backend: str) -> None:
    (q, k, v), here = qkv(), torch.zeros(N, dtype=torch.int64)
    here[GAPS] = 1
    whole = sd.attend(pattern.mask & HERE, score=pattern.score, normaliser=pattern.normaliser)
    want = sd.attention(q, k, v, whole, here=here, backend="reference")[:, :, ZIGZAG]
    mine = q[:, :, ZIGZAG], k[:, :, GAPS], v[:, :, GAPS]
    found = sd.attention(*mine, pattern, q_positions=ZIGZAG, kv_positions=GAPS, backend=backend)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_a_batch_of_positions_and_rows_of_every_layout() -> None:
    q, k, v = (x.detach() for x in qkv())
    at = torch.stack([ZIGZAG, N - 1 - ZIGZAG.flip(0) - 7])

    def rows(x: torch.Tensor) -> torch.Tensor:
        return x.gather(2, at[:, None, :, None].expand(-1, 2, -1, 8))

    here = torch.zeros(2, N, dtype=torch.int64).scatter(1, at, 1)
    want = rows(sd.attention(q, k, v, NEAR & (sd.table("here")[sd.b, sd.kv_idx] == 1), here=here, backend="reference"))
    mine = [rows(x).transpose(1, 2) for x in (q, k, v)]
    found = sd.attention(*mine, NEAR, q_positions=at, kv_positions=at.to(torch.int32), backend="tiled", layout="bshd")
    torch.testing.assert_close(found.transpose(1, 2), want, rtol=1e-12, atol=1e-12)
    alike = sd.attention(*mine, NEAR, q_positions=at[:1].expand(2, -1), kv_positions=at[:1], layout="bshd")
    torch.testing.assert_close(alike, sd.attention(*mine, NEAR, q_positions=at[0], kv_positions=at[0], layout="bshd"))


# ---- how positions are written -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=4), st.data())
def test_runs_and_tables_say_the_same(parts: list[tuple[int, int, int]], data: st.DataObject) -> None:
    places, last = [], -1
    for rows, step, gap in parts:
        places += [last + gap + step * row for row in range(rows)]
        last = places[-1]
    q_at = torch.tensor(places)
    kv_at = torch.tensor(sorted(data.draw(st.sets(st.integers(0, 40), min_size=1, max_size=6))))
    q_runs, kv_runs = (runs_of("x", at, 1, len(at), at.device, None) for at in (q_at, kv_at))
    assert all(q_at[row] == place for row, place, _ in q_runs)
    pattern = Program(sd.attend(PATTERNS["dilated"] & (sd.q_idx // 3 != sd.kv_idx), score=sd.score + sd.q_idx - 2 * sd.kv_idx))
    places_of = {"q_idx": q_at[:, None], "kv_idx": kv_at}
    env = {"q_idx": torch.arange(len(q_at))[:, None], "kv_idx": torch.arange(len(kv_at)), "q_at": q_at, "kv_at": kv_at}
    for where in (
        Relocation(Rows(rank=1), Rows(rank=1)),
        Relocation(Rows(q_runs), Rows(kv_runs)),
        Relocation(Rows(q_runs), Rows(rank=1)),
    ):
        told = relocated(pattern, where).static
        for mine, whole in zip(told.exprs, pattern.static.exprs, strict=True):
            values = evaluate(mine, {**env, "score": torch.zeros(())}), evaluate(whole, {**places_of, "score": torch.zeros(())})
            torch.testing.assert_close(*(x.expand(len(q_at), len(kv_at)) for x in values))


def told(pattern: Any, q_at: torch.Tensor, kv_at: torch.Tensor | None) -> tuple[Any, dict[str, torch.Tensor], int | None]:
    q, k = numbers(1, 1, len(q_at), 4), numbers(1, 1, N if kv_at is None else len(kv_at), 4)
    program = Program(pattern)
    where, tables, offset = relocated_call(program, Standing(q_at, kv_at), q, k, k, {})
    return relocated(program, where).static, tables, offset


def test_closed_forms_survive() -> None:
    # Rows from one position on are what every call can be told, and so is a distance where that is all that a pattern is about.
    assert told(NEAR, torch.arange(16, 80), None)[1:] == ({}, 16)
    pattern, tables, offset = told(NEAR, HALO[40:], HALO)
    assert (pattern, tables, offset) == (sd.attend(NEAR), {}, 40)
    # Rising tables leave bounds on positions what they are: solved without a look at pairs.
    pattern, tables, _ = told(NEAR, ZIGZAG, GAPS)
    assert set(tables) == {"q_at", "kv_at"} and not any(clause.rest for clause in clauses(pattern.mask.expr))
    # Residues are kept by runs.
    pattern, tables, _ = told(PATTERNS["dilated"], ZIGZAG, ZIGZAG)
    found = residues(pattern)
    assert not tables and found is not None and found.step == 4


# ---- programs ----------------------------------------------------------------------------------------------------------------------

MOBA = sd.patterns.moba(chunk=8, top_k=3)
PROGRAMS: dict[str, Any] = {
    "moba": MOBA,
    "joint": sd.joint(sd.patterns.sliding_window(16), sd.patterns.sinks(4) & (sd.q_idx - sd.kv_idx >= 16)),
    "blocks of queries": sd.attend(
        (sd.kv_idx <= sd.q_idx) & sd.top_k(sd.dot(sd.summary(sd.q, 16), sd.summary(sd.k, 8)), 4),
        score=sd.score - 0.01 * sd.kv_idx,
    ),
    "means": sd.attend(sd.kv_idx * 16 + 15 <= sd.q_idx, k=sd.summary(sd.k, 16), v=sd.summary(sd.v, 16)),
}


@pytest.mark.parametrize(("name", "backend"), [*((name, "tiled") for name in PROGRAMS), ("moba", "reference"), ("moba", "cpp")])
def test_programs_choose_among_the_keys_that_are_there(name: str, backend: str) -> None:
    """The keys that are not there are of no use in the whole, where their logits are about -2,000."""
    kv_at = torch.cat([torch.arange(0, 48), torch.arange(64, 80), torch.arange(112, 144)])
    q, k, v = (x.detach().clone() for x in qkv())
    q[..., 0] = 8.0
    k[..., 0] = -1000.0
    k[:, :, kv_at, 0] = 0.0
    q_at = ZIGZAG
    out = sd.compile(PROGRAMS[name], backend="reference")(q, k, v)[:, :, q_at]
    found = sd.compile(PROGRAMS[name], backend=backend)(
        q[:, :, q_at], k[:, :, kv_at], v[:, :, kv_at], q_positions=q_at, kv_positions=kv_at
    )  # fmt: skip
    torch.testing.assert_close(found, out, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("program", "message"), [
    (MOBA, r"blocks of 8 tokens, and kv_positions has a part of one at row \d+.*multiples of 8"),
    (sd.linear(0.9), r"linear\(\) goes by the order of all rows"),
    (sd.patterns.token_sparse(), r"goes by the order of all rows of a call"),
    (sd.attend(sd.kv_idx <= sd.q_idx, k=sd.summary(sd.k, 16, stride=8), v=sd.summary(sd.v, 16, stride=8)), "counts windows of keys"),
])  # fmt: skip
def test_what_positions_mean_nothing_for_is_refused(program: Any, message: str) -> None:
    q, k = numbers(1, 2, 64, 8), numbers(1, 2, 90, 8)
    with pytest.raises(sd.UnsupportedError, match=message):
        sd.compile(program)(q, k, k, q_positions=ZIGZAG, kv_positions=GAPS)


# ---- heads -------------------------------------------------------------------------------------------------------------------------

ALIBI = sd.attend(sd.kv_idx <= sd.q_idx, score=sd.patterns.alibi(4))
WINDOWS = (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < sd.table("win")[sd.h])
WIN = torch.tensor([3, 9, 20, 40])


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@pytest.mark.parametrize(("pattern", "tables"), [
    (ALIBI, {}), (WINDOWS, {"win": WIN}), (sd.joint(ALIBI, WINDOWS & (sd.kv_idx < 2)), {"win": WIN}),
    (sd.linear([0.5, 0.7, 0.9, 0.95]), {}),
])  # fmt: skip
def test_a_part_of_the_heads_gets_what_is_meant_for_it(pattern: Any, tables: dict[str, Any], backend: str) -> None:
    q, k, v = (x.detach() for x in qkv(heads=4, length=40))
    attn = sd.compile(pattern, backend=backend)
    part = attn(q[:, 2:], k[:, 2:], v[:, 2:], head_offset=2, **tables)
    torch.testing.assert_close(part, sd.compile(pattern, backend="reference")(q, k, v, **tables)[:, 2:], rtol=1e-12, atol=1e-12)
    # Of rows of a part, too.
    if not isinstance(pattern, sd.Program) and backend == "tiled" and pattern is WINDOWS:
        rows = attn(q[:, 2:, 20:], k[:, 2:], v[:, 2:], head_offset=2, heads=4, q_positions=torch.arange(20, 40), **tables)
        torch.testing.assert_close(rows, part[:, :, 20:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("words", "message"), [
    ({}, "declared for 4 heads; this call has 2.*head_offset="),
    ({"head_offset": 3}, "head_offset=3 and 2 heads end at head 5; the whole has 4"),
    ({"heads": 4}, r"heads=4 says that the whole has so many heads, and this call has 2: say which, head_offset="),
    ({"heads": 8, "head_offset": 0}, "heads=8, and the pattern is declared for 4 heads"),
    ({"head_offset": -1}, "head_offset must be a whole number of at least 0; got -1"),
    ({"heads": True}, "heads must be a whole number of at least 1"),
])  # fmt: skip
def test_heads_that_do_not_fit_are_refused(words: dict[str, Any], message: str) -> None:
    q = numbers(1, 2, 8, 4)
    with pytest.raises(sd.ShapeError, match=message):
        sd.compile(ALIBI)(q, q, q, **words)


# ---- what a call says ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "message"), [
    ({"q_positions": [0, 1]}, r"q_positions must be a tensor.*torch.as_tensor\(q_positions\)"),
    ({"q_positions": torch.arange(8), "q_offset": 0}, "q_offset and q_positions both say"),
    ({"kv_positions": torch.arange(8)}, "say where the queries do, too: q_positions="),
    ({"q_positions": torch.arange(7)}, r"q_positions must have the shape \(8,\) or \(1, 8\).*got \(7,\)"),
    ({"q_positions": torch.arange(8).float()}, "q_positions must be whole numbers.*float32"),
    ({"q_positions": torch.tensor([0, 1, 2, 2, 4, 5, 6, 7])}, "q_positions must rise from row to row; got 2 and then 2 at row 3"),
    ({"q_positions": torch.arange(-1, 7)}, "positions from 0 on, up to 2.*got -1"),
    ({"q_positions": torch.arange(8), "kv_positions": torch.arange(1, 9), "whole": (8, 8)}, "kv_positions.*the whole length 8; got 8"),
    ({"q_positions": torch.arange(8), "whole": 8}, r"whole must be \(q_len, kv_len\)"),
])  # fmt: skip
def test_positions_that_do_not_fit_are_refused(words: dict[str, Any], message: str) -> None:
    q = numbers(1, 2, 8, 4)
    with pytest.raises(sd.ShapeError, match=message):
        sd.compile(NEAR)(q, q, q, **words)


def test_lengths_that_positions_leave_open_are_asked_for() -> None:
    q = numbers(1, 2, 64, 4)
    attn = sd.compile(PATTERNS["length"])
    with pytest.raises(sd.ShapeError, match=r"reads kv_len, and positions do not say how long the whole is: pass whole="):
        attn(q, q, q, q_positions=ZIGZAG, kv_positions=ZIGZAG)
    with pytest.raises(sd.UnsupportedError, match="state= and return_state= count tokens from the first"):
        sd.compile(NEAR)(q, q, q, q_positions=ZIGZAG, return_state=True)


def test_positions_in_a_graph() -> None:
    attn = sd.compile(sd.attend(NEAR, score=sd.score + 0.5 * sd.h))
    q, k, v = (x.detach().float() for x in qkv())

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return attn(q, k, v, q_positions=at, kv_positions=at, head_offset=1, whole=(N, N))

    mine = [x[:, :, ZIGZAG].requires_grad_() for x in (q, k, v)]
    found, want = torch.compile(call, fullgraph=True, backend="aot_eager")(*mine, ZIGZAG), call(*mine, ZIGZAG)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), mine), torch.autograd.grad(want.sum(), mine))
    queries, keys = mine[0].detach(), k[:, :, ZIGZAG]

    def once(q: torch.Tensor) -> torch.Tensor:
        return attn(q, keys, keys, q_positions=ZIGZAG, kv_positions=ZIGZAG)

    torch.testing.assert_close(torch.func.vmap(once)(queries[None])[0], once(queries))


@pytest.mark.parametrize("mask", [sd.kv_idx < 50, sd.q_idx >= 20, True])
def test_masks_that_look_at_one_side_take_positions(mask: Any) -> None:
    program = sd.mix(sd.attend(mask), sd.patterns.moba(chunk=16, top_k=2), weights=sd.input("w", "batch heads queries 2"))
    q, k, v = qkv()
    w = numbers(2, 2, N, 2).sigmoid()
    whole = sd.attention(q, k, v, program, w=w, backend="reference")
    found = sd.attention(
        q[:, :, ZIGZAG], k, v, program, w=w[:, :, ZIGZAG], q_positions=ZIGZAG, kv_positions=torch.arange(N), backend="tiled"
    )
    torch.testing.assert_close(found, whole[:, :, ZIGZAG], atol=1e-12, rtol=1e-12)
    here = torch.cat([torch.arange(0, 64), torch.arange(96, 160)])
    alone = sd.attention(q[:, :, ZIGZAG], k[:, :, here], v[:, :, here], sd.attend(mask), q_positions=ZIGZAG, kv_positions=here)
    want = sd.attention(q, k, v, HERE & mask, here=torch.isin(torch.arange(N), here).int(), backend="reference")
    torch.testing.assert_close(alone, want[:, :, ZIGZAG], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("queries", "keys"), [(0, 9), (9, 0), (0, 0)])
def test_no_rows_stand_nowhere(queries: int, keys: int) -> None:
    q, k, v = (x[:, :, :rows] for x, rows in zip(qkv(), (queries, keys, keys), strict=True))
    out, lse = sd.attention(q, k, v, NEAR, q_positions=ZIGZAG[:queries], kv_positions=HALO[:keys], return_lse=True)
    assert out.shape == q.shape and not out.any() and bool((lse == -torch.inf).all())
