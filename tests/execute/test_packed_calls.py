"""Ragged and paged calls give each request what it gets by itself, and read nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx
from tests.execute import packed_cases as cases

EXACT: dict[str, float] = {"rtol": 1e-11, "atol": 1e-11}


def assert_paged_is_exact(name: str, backend: str, mix: cases.Mix, page: int, bad: float = float("nan")) -> None:
    pattern, tables = cases.PATTERNS[name], cases.tables_of(name, len(mix.requests), mix.seed)
    attn = sd.compile(pattern, backend=backend)
    k_pool, v_pool, table = mix.pools(page, bad)
    pages = attn.visible_pages(mix.starts, mix.q_lens, page, kv_lens=mix.kv_lens, heads=mix.heads, **tables)
    cases.free_what_nobody_sees(pages, k_pool, v_pool, table, bad)
    with torch.no_grad():
        found = attn.paged(
            mix.q, k_pool, v_pool, table, mix.kv_lens, mix.cu_q, mix.starts, return_lse=attn.has_lse, **tables
        )
    want = mix.wanted(pattern, tables)
    torch.testing.assert_close(found, want if attn.has_lse else want[0], **EXACT, msg=lambda text: f"{name} {mix.requests}: {text}")


MIX = cases.Mix([(35, 5, 40), (16, 1, 17), (0, 0, 9), (49, 1, 50), (0, 30, 30), (3, 2, 20), (0, 3, 0)], padding=2, seed=5)


@pytest.mark.parametrize("backend", ["tiled", "cpp"])
@pytest.mark.parametrize("name", cases.PATTERNS)
def test_paged_is_what_each_request_gets_by_itself(name: str, backend: str) -> None:
    assert_paged_is_exact(name, backend, MIX, page=8)


@pytest.mark.parametrize("seed", range(24))
def test_mixes(seed: int) -> None:
    names = list(cases.PATTERNS)
    bad = [float("nan"), float("inf"), 1e30][seed % 3]
    assert_paged_is_exact(names[seed * 5 % len(names)], ["cpp", "tiled"][seed % 2], cases.Mix.drawn(seed), [1, 4, 7, 16][seed % 4], bad)


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(20))
def test_two_thousand_mixes(part: int) -> None:
    names = list(cases.PATTERNS)
    for seed in range(1000 + 100 * part, 1000 + 100 * (part + 1)):
        mix, bad = cases.Mix.drawn(seed), [float("nan"), float("inf"), 1e30][seed % 3]
        assert_paged_is_exact(names[seed % len(names)], ["cpp", "tiled"][seed // 17 % 2], mix, [1, 4, 7, 16][seed // 3 % 4], bad)


@pytest.mark.parametrize("backend", ["tiled", "cpp"])
@pytest.mark.parametrize("name", cases.PATTERNS)
def test_ragged_with_gradients(name: str, backend: str) -> None:
    pattern, tables = cases.PATTERNS[name], cases.tables_of(name, len(MIX.requests), MIX.seed)
    q = MIX.q.clone().requires_grad_()
    k, v = (torch.cat([*(pair[side] for pair in MIX.keys), MIX.keys[0][side][:1] * float("nan")]).requires_grad_() for side in (0, 1))
    attn, reference = (sd.compile(pattern, backend=which) for which in (backend, "reference"))
    leaves = [q, k, v, *(t for t in tables.values() if t.requires_grad)]
    weights = cases.numbers(q.shape[0], 4, 12, seed=9)
    results = []
    for one in (attn, reference):
        found = one.ragged(q, k, v, MIX.cu_q, MIX.cu_k, MIX.starts, return_lse=one.has_lse, **tables)
        out, lse = found if one.has_lse else (found, None)
        loss = (out * weights).sum() + (0 if lse is None else lse[lse > -float("inf")].sum())
        results.append((out, lse, torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(results[0][:2], results[1][:2], **EXACT)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-10, atol=1e-10, equal_nan=False)
