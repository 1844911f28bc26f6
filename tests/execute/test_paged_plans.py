"""Plans of paged calls: each layer of a step gets what a paged call gives, and what is the same for all is made once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl.execute import paged_work
from tests.execute import packed_cases as cases

MIX = cases.Mix([(35, 5, 40), (16, 1, 17), (0, 0, 9), (49, 1, 50), (0, 30, 30)], padding=2, seed=5)
LAYERS = [MIX, cases.Mix(MIX.requests, padding=2, seed=6)]
EXACT: dict[str, float] = {"rtol": 1e-11, "atol": 1e-11}


def pools(mix: cases.Mix) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of a layer in the pages of the first one."""
    own, table = mix.pools(8), MIX.pools(8)[2]
    moved = [torch.full_like(pool, float("nan")) for pool in own[:2]]
    for row, from_row, kv in zip(table, own[2], mix.kv_lens.tolist(), strict=True):
        for pool, old in zip(moved, own[:2], strict=True):
            pool[row[: -(-kv // 8)].long()] = old[from_row[: -(-kv // 8)].long()]
    return moved[0], moved[1]


def planned(attn: Any, **words: Any) -> Any:
    table = MIX.pools(8)[2]
    rows = {"heads": 4, "page": 8, "pages": len(pools(MIX)[0]), "rows": len(MIX.q)}
    return attn.plan_paged(table, MIX.kv_lens, MIX.cu_q, MIX.starts, **{**rows, **words})


@pytest.mark.parametrize(("backend", "copy"), [("tiled", False), ("tiled", True), ("reference", False)])
@pytest.mark.parametrize("name", ["streaming", "tiles", "soft cap"])
def test_every_layer_gets_what_a_paged_call_gives(name: str, backend: str, copy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    found = paged_work.seen_pages
    monkeypatch.setattr(paged_work, "seen_pages", lambda *args: asked.append(1) or found(*args))
    tables = cases.tables_of(name, len(MIX.requests))
    plan = planned(sd.compile(cases.PATTERNS[name], backend=backend), copy=copy, **tables)
    looked = len(asked)
    for mix in LAYERS:
        results = plan(mix.q, *pools(mix), return_lse=True)
        torch.testing.assert_close(results, mix.wanted(cases.PATTERNS[name], tables), **EXACT)
    assert len(asked) == looked == (0 if backend == "reference" else 2)  # few queries and many, each once


def test_a_program_goes_from_request_to_request() -> None:
    attn = sd.compile(sd.patterns.quest(page=4, pages=3), backend="tiled")
    plan = planned(attn)
    for mix in LAYERS:
        want = attn.paged(mix.q, *pools(mix), MIX.pools(8)[2], MIX.kv_lens, MIX.cu_q, MIX.starts)
        assert torch.equal(plan(mix.q, *pools(mix)), want)
    with pytest.raises(sd.TableError, match="extra: tables and inputs of a program"):
        plan(MIX.q, *pools(MIX), extra=MIX.q)


def test_scores_have_the_tables_of_their_layer() -> None:
    slopes, window = sd.table("slopes", dtype=float), sd.table("win")
    pattern = sd.attend(
        cases.CAUSAL & (sd.q_idx - sd.kv_idx < window[sd.h]), score=sd.score + slopes[sd.h] * (sd.kv_idx - sd.q_idx)
    )
    tables = {"win": torch.tensor([3, 20, 7, 60]), "slopes": torch.zeros(4)}
    plan = planned(sd.compile(pattern, backend="tiled"), **tables)
    for mix, steep in zip(LAYERS, (0.5, 0.25), strict=True):
        own = {"slopes": torch.full((4,), steep)}
        torch.testing.assert_close(plan(mix.q, *pools(mix), **own), mix.wanted(pattern, {**tables, **own})[0], **EXACT)
    with pytest.raises(sd.TableError, match="the mask reads the table win, and a plan has looked at the mask"):
        plan(MIX.q, *pools(MIX), win=tables["win"])


def test_nobody_asks() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    attn = sd.compile(cases.CAUSAL, backend="tiled")
    plan = attn.plan_paged(
        torch.zeros(0, 3, dtype=torch.int64), none, torch.zeros(1, dtype=torch.int64), heads=4, page=8, pages=5, rows=2
    )
    out, lse = plan(torch.ones(2, 4, 8), torch.ones(5, 8, 2, 8), torch.ones(5, 8, 2, 12), return_lse=True)
    assert out.shape == (2, 4, 12)
    assert not out.any()
    assert bool((lse == -float("inf")).all())


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"q": torch.zeros(5, 2, 8)}, "heads of q: got 2, and the plan was made for 4"),
        ({"q": torch.zeros(4, 4, 8)}, "rows of q: got 4, and the plan was made for 5"),
        (
            {"k_pool": torch.zeros(6, 8, 2, 8), "v_pool": torch.zeros(6, 8, 2, 8)},
            "keys of a page: got 8, and the plan was made for 4",
        ),
        ({"k_pool": torch.zeros(7, 4, 2, 8), "v_pool": torch.zeros(7, 4, 2, 8)}, "pages: got 7, and the plan was made for 6"),
        ({"q": torch.zeros(5, 4, 8, requires_grad=True)}, r"paged\(\) is forward only"),
    ],
)
def test_calls_that_a_plan_is_not_for(changed: dict[str, torch.Tensor], says: str) -> None:
    table, lens, ends = torch.tensor([[0, 1, 9], [3, 4, 5]]), torch.tensor([6, 9]), torch.tensor([0, 2, 5])
    plan = sd.compile(sd.patterns.sliding_window(4), backend="tiled").plan_paged(table, lens, ends, heads=4, page=4, pages=6)
    words = {"q": torch.zeros(5, 4, 8), "k_pool": torch.zeros(6, 4, 2, 8), "v_pool": torch.zeros(6, 4, 2, 8)}
    with pytest.raises((sd.ShapeError, sd.UnsupportedError), match=says):
        plan(**{**words, **changed})


def test_plans_are_refused_as_calls_are() -> None:
    table, lens, ends = torch.tensor([[0, 1], [3, 4]]), torch.tensor([6, 9]), torch.tensor([0, 2, 5])
    local = sd.patterns.sliding_window(4)
    with pytest.raises(sd.UnsupportedError, match="backend='flex' reads keys that lie behind each other"):
        sd.compile(local, backend="flex").plan_paged(table, lens, ends, heads=4, page=8, pages=6)
    with pytest.raises(sd.ShapeError, match="block_table has page 4 for page 1 of request 1"):
        sd.compile(local, backend="tiled").plan_paged(table, lens, ends, heads=4, page=8, pages=4)
    with pytest.raises(sd.ShapeError, match="heads must be"):
        sd.compile(local, backend="tiled").plan_paged(table, lens, ends, heads=0, page=8, pages=4)
