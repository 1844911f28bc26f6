"""Keys in pages on generated kernels: rows are read by their numbers, and no page that nobody sees is."""

from __future__ import annotations

import pytest
import torch

import sparsedsl as sd
from sparsedsl.backends.triton.limits import LIMITS
from tests.execute import packed_cases as cases

# Of sums of 12 products and of 80 weighted values at most, all about 1, in float32.
CLOSE = {"rtol": 0.0, "atol": 128 * 2**-23}
MIX = cases.Mix([(18, 3, 21), (16, 1, 17), (0, 0, 9), (49, 1, 50), (0, 12, 12), (0, 3, 0)], padding=2, seed=5)
ONE_BY_ONE = cases.Mix([(13, 3, 16), (16, 2, 18), (0, 0, 9)], seed=6, heads=2, kv_heads=1)


def assert_paged(name: str, mix: cases.Mix, page: int) -> None:
    pattern, tables = cases.PATTERNS[name], cases.tables_of(name, len(mix.requests), mix.seed)
    attn = sd.compile(pattern, backend="triton")
    k_pool, v_pool, table = mix.pools(page)
    pages = attn.visible_pages(mix.starts, mix.q_lens, page, kv_lens=mix.kv_lens, heads=mix.heads, **tables)
    cases.free_what_nobody_sees(pages, k_pool, v_pool, table, float("nan"))
    given = [x.float() for x in (mix.q, k_pool, v_pool)]
    with torch.no_grad():
        found = attn.paged(*given, table, mix.kv_lens, mix.cu_q, mix.starts, return_lse=attn.has_lse, **tables)
    want = mix.wanted(pattern, tables)
    if not attn.has_lse:
        found, want = (found,), want[:1]
    torch.testing.assert_close([x.double() for x in found], list(want), **CLOSE)


# One of each way to find tiles, and of each kind of score; the others are a campaign.
USUAL = ("streaming", "dilated", "tiles", "by request", "soft cap", "learned")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in USUAL else pytest.mark.campaign) for name in cases.PATTERNS]
)
def test_few_queries(name: str) -> None:
    assert_paged(name, MIX, page=8)


@pytest.mark.parametrize("name", ["window", "dilated"])
def test_many_queries(name: str) -> None:
    with LIMITS.using(decode_rows=0):
        assert_paged(name, ONE_BY_ONE, page=4)


def test_pools_in_parts_of_larger_tensors() -> None:
    attn = sd.compile(cases.PATTERNS["streaming"], backend="triton")
    mix = cases.Mix(ONE_BY_ONE.requests, seed=5, heads=2, kv_heads=1, dims=(8, 8), dtype=torch.float32)
    k_pool, v_pool, table = mix.pools(8, 0.0)
    words = (table, mix.kv_lens, mix.cu_q, mix.starts)
    want = mix.wanted(cases.PATTERNS["streaming"], {})[0]
    both = torch.stack([k_pool, v_pool], 1)  # (pages, 2, page, Hkv, D)
    hnd = (x.transpose(1, 2).contiguous() for x in (k_pool, v_pool))
    for found in (attn.paged(mix.q, both[:, 0], both[:, 1], *words), attn.paged(mix.q, *hnd, *words, pool_layout="hnd")):
        torch.testing.assert_close(found, want, **CLOSE)


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is given the pool itself, and the numbers of the rows that are seen."""
    from sparsedsl.backends.triton import attention

    seen = {}
    launch = attention.launch

    def watched(source, name, programs, values, *rest, **words):  # type: ignore[no-untyped-def]
        seen[name] = values
        return launch(source, name, programs, values, *rest, **words)

    monkeypatch.setattr(attention, "launch", watched)
    mix = cases.Mix(ONE_BY_ONE.requests, seed=5, heads=2, kv_heads=1, dtype=torch.float32)
    k_pool, v_pool, table = mix.pools(8)
    attn = sd.compile(cases.PATTERNS["window"], backend="triton")
    attn.paged(mix.q, k_pool, v_pool, table, mix.kv_lens, mix.cu_q, mix.starts)
    pages = attn.visible_pages(mix.starts, mix.q_lens, 8, kv_lens=mix.kv_lens)
    assert seen["decode"]["k_ptr"].data_ptr() == k_pool.data_ptr()
    assert seen["decode"]["kv_rows_ptr"].numel() == 8 * pages.indices.numel() == seen["decode"]["kv_len"]


def test_programs_read_what_they_choose() -> None:
    program = (sd.kv_idx <= sd.q_idx) & sd.top_k(sd.bound(sd.q, sd.k, 8), 2)
    attn, reference = (sd.compile(program, backend=which) for which in ("triton", "reference"))
    k_pool, v_pool = (cases.numbers(12, 8, 1, 16, seed=n, dtype=torch.float32) for n in (1, 2))
    q, table = cases.numbers(1, 2, 16, seed=3, dtype=torch.float32), torch.arange(11)[None]
    words = (table, torch.tensor([85]), torch.tensor([0, 1]))
    kept = attn.page_summaries(k_pool, v_pool)
    for _ in range(2):
        found = attn.paged(q, k_pool, v_pool, *words, summaries=kept)
        torch.testing.assert_close(found, reference.paged(q, k_pool, v_pool, *words), **CLOSE)
    assert kept.pages_read[1] <= 5
