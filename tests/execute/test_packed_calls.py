"""Ragged and paged calls give each request what it gets by itself, and read nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparsedsl as sd
from sparsedsl.analysis.key_intervals import interval_rows, intervals
from sparsedsl.execute.packed_calls import PackedAttention
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.runtime.packed_rows import KeyRows, requests_of
from sparsedsl.runtime.seen_pages import seen_pages
from tests.execute import packed_cases as cases

EXACT: dict[str, float] = {"rtol": 1e-11, "atol": 1e-11}


def assert_paged_is_exact(name: str, backend: str, mix: cases.Mix, page: int, bad: float = float("nan")) -> None:
    pattern, tables = cases.PATTERNS[name], cases.tables_of(name, len(mix.requests), mix.seed)
    attn = sd.compile(pattern, backend=backend)
    k_pool, v_pool, table = mix.pools(page, bad)
    pages = attn.visible_pages(mix.starts, mix.q_lens, page, kv_lens=mix.kv_lens, heads=mix.heads, **tables)
    cases.free_what_nobody_sees(pages, k_pool, v_pool, table, bad)
    with torch.no_grad():
        found = attn.paged(mix.q, k_pool, v_pool, table, mix.kv_lens, mix.cu_q, mix.starts, return_lse=attn.has_lse, **tables)
    want = mix.wanted(pattern, tables)
    wanted = want if attn.has_lse else want[0]
    torch.testing.assert_close(found, wanted, **EXACT, msg=lambda text: f"{name} {mix.requests}: {text}")


MIX = cases.Mix([(35, 5, 40), (16, 1, 17), (0, 0, 9), (49, 1, 50), (0, 30, 30), (3, 2, 20), (0, 3, 0)], padding=2, seed=5)


@pytest.mark.parametrize("backend", ["tiled", "cpp"])
@pytest.mark.parametrize("name", cases.PATTERNS)
def test_paged_is_what_each_request_gets_by_itself(name: str, backend: str) -> None:
    assert_paged_is_exact(name, backend, MIX, page=8)


@pytest.mark.parametrize("seed", range(16))
def test_mixes(seed: int) -> None:
    names = list(cases.PATTERNS)
    bad = [float("nan"), float("inf"), 1e30][seed % 3]
    page, mix = [1, 4, 7, 16][seed % 4], cases.Mix.drawn(seed)
    assert_paged_is_exact(names[seed * 5 % len(names)], ["cpp", "tiled"][seed % 2], mix, page, bad)


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(20))
def test_two_thousand_mixes(part: int) -> None:
    names = list(cases.PATTERNS)
    for seed in range(1000 + 100 * part, 1000 + 100 * (part + 1)):
        mix, bad = cases.Mix.drawn(seed), [float("nan"), float("inf"), 1e30][seed % 3]
        assert_paged_is_exact(names[seed % len(names)], ["cpp", "tiled"][seed // 17 % 2], mix, [1, 4, 7, 16][seed // 3 % 4], bad)


COMPILED = ("window", "streaming", "by request", "tiles", "learned")


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "tiled") for name in cases.PATTERNS), *((name, "cpp") for name in COMPILED)]
)
def test_ragged_with_gradients(name: str, backend: str) -> None:
    pattern, tables = cases.PATTERNS[name], cases.tables_of(name, len(MIX.requests), MIX.seed)
    q = MIX.q.clone().requires_grad_()
    rows = [[*(pair[side] for pair in MIX.keys), MIX.keys[0][side][:1] * float("nan")] for side in (0, 1)]
    k, v = (torch.cat(parts).requires_grad_() for parts in rows)
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


# ---- which pages are seen ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.PATTERNS)
def test_the_pages_that_are_listed_are_those_that_are_seen(name: str) -> None:
    mix, page = cases.Mix.drawn(77, least=6), 4
    tables = cases.tables_of(name, len(mix.requests), mix.seed)
    attn = sd.compile(cases.PATTERNS[name])
    pages = attn.visible_pages(mix.starts, mix.q_lens, page, kv_lens=mix.kv_lens, heads=4, **tables)
    mask = attn.pattern.mask
    own = {table: value for table, value in tables.items() if table in mask.tables}
    for n, (start, queries, kv) in enumerate(mix.requests):
        found = pages.indices[pages.indptr[n] : pages.indptr[n + 1]].tolist()
        seen: list[int] = []
        if queries and kv:
            where = {"q_idx": torch.arange(start, start + queries)[:, None], "kv_idx": torch.arange(kv)}
            places = {"b": n, "h": torch.arange(4)[:, None, None], "q_len": start + queries, "kv_len": kv, **where}
            pairs = evaluate(mask.expr, {**places, **own}).expand(4, queries, kv)
            seen = sorted({int(key) // page for key in pairs.any(0).any(0).nonzero()[:, 0]})
        assert found == seen, (n, mix.requests[n])


def test_a_window_reads_what_it_sees() -> None:
    lens = torch.tensor([300, 17, 64, 201, 500])
    pages = sd.compile(sd.patterns.sliding_window(48)).visible_pages(lens - 1, torch.ones(5, dtype=torch.int64), page=16)
    ends = torch.minimum((pages.indices + 1) * 16, lens[pages.owners])
    assert int((ends - pages.indices * 16).sum()) == 234 < int(lens.sum()) == 1082


# ---- pools and layouts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "tiled", "cpp"])
def test_pools_of_every_layout(backend: str) -> None:
    attn = sd.compile(cases.PATTERNS["streaming"], backend=backend)
    k_pool, v_pool, table = MIX.pools(8, 0.0)
    v_pool = v_pool[..., :8].contiguous()
    words = (table, MIX.kv_lens, MIX.cu_q, MIX.starts)
    want, lse = attn.paged(MIX.q, k_pool, v_pool, *words, return_lse=True)
    hnd = (x.transpose(1, 2).contiguous() for x in (k_pool, v_pool))
    torch.testing.assert_close(attn.paged(MIX.q, *hnd, *words, pool_layout="hnd"), want)
    both = torch.stack([k_pool, v_pool], 1)  # (pages, 2, page, Hkv, D)
    torch.testing.assert_close(attn.paged(MIX.q, both[:, 0], both[:, 1], *words), want)
    one = torch.cat([k_pool, v_pool], 3)  # (pages, page, Hkv, 2 D)
    torch.testing.assert_close(attn.paged(MIX.q, one[..., :8], one[..., 8:], *words), want)
    found = attn.paged(MIX.q.transpose(0, 1).contiguous(), k_pool, v_pool, *words, layout="htd", return_lse=True)
    torch.testing.assert_close(found, (want.transpose(0, 1), lse))


@pytest.mark.parametrize("backend", ["tiled", "cpp"])
@pytest.mark.parametrize(("kind", "by_head"), [(torch.float8_e4m3fn, False), (torch.float8_e5m2, True), (torch.int8, True)])
def test_quantised_pools(backend: str, kind: torch.dtype, by_head: bool) -> None:
    mix = cases.Mix(MIX.requests, padding=2, seed=3, dtype=torch.float32)
    *floats, table = mix.pools(8, 0.0)
    shape = (len(floats[0]), 2) if by_head else (len(floats[0]),)
    scales = [cases.numbers(*shape, seed=seed).abs().float() / 50 + 0.03 for seed in (1, 2)]
    wide = [scale.view(len(scale), 1, -1, 1) for scale in scales]
    told = [pool / scale for pool, scale in zip(floats, wide, strict=True)]
    small = [(x.round() if kind == torch.int8 else x).to(kind) for x in told]
    exact = [x.float() * scale for x, scale in zip(small, wide, strict=True)]
    attn = sd.compile(cases.PATTERNS["window"], backend=backend)
    pages = attn.visible_pages(mix.starts, mix.q_lens, 8, kv_lens=mix.kv_lens)
    kept = torch.zeros(table.shape, dtype=torch.bool)
    kept[pages.owners, pages.indices.long()] = True
    for scale in scales:  # factors of pages that nobody sees are not read either
        live = torch.zeros(len(scale), dtype=torch.bool)
        live[table[kept].long()] = True
        scale[~live] = float("nan")
    words = (table, mix.kv_lens, mix.cu_q, mix.starts)
    want = sd.compile(cases.PATTERNS["window"], backend="reference").paged(mix.q, *exact, *words, return_lse=True)
    found = attn.paged(mix.q, *small, *words, k_scale=scales[0], v_scale=scales[1], return_lse=True)
    torch.testing.assert_close(found, want, rtol=2e-5, atol=2e-5)
    half, finer = (
        attn.paged(q, *small, *words, k_scale=scales[0], v_scale=scales[1]) for q in (mix.q.bfloat16(), mix.q.bfloat16().float())
    )
    assert torch.equal(half, finer.bfloat16())  # sums are made in float32


# ---- programs ----------------------------------------------------------------------------------------------------------------------

PROGRAMS: dict[str, Any] = {
    "moba": sd.patterns.moba(chunk=8, top_k=2),
    "quest": sd.patterns.quest(page=8, pages=3),
    "nsa": sd.patterns.nsa(block=4, select=8, top_k=2, window=6),
    "decayed": sd.linear([0.9, 0.8, 0.7, 0.6]),
}


@pytest.mark.parametrize(("name", "backend"), [*((name, "tiled") for name in PROGRAMS), ("moba", "cpp"), ("quest", "auto")])
def test_programs_by_request(name: str, backend: str) -> None:
    mix = cases.Mix([(35, 5, 40), (16, 1, 17), (0, 0, 9), (0, 30, 30), (10, 2, 12)], padding=2, seed=4, dims=(8, 8))
    attn, reference = (sd.compile(PROGRAMS[name], backend=which) for which in (backend, "reference"))
    gates = {"gate": cases.numbers(1, 4, len(mix.q), 3, seed=6).sigmoid()} if name == "nsa" else {}
    out = torch.zeros_like(mix.q)
    for n, (start, _, _) in enumerate(mix.requests):
        rows = slice(int(mix.cu_q[n]), int(mix.cu_q[n + 1]))
        if rows.start < rows.stop:
            q, k, v = (x.transpose(0, 1)[None] for x in (mix.q[rows], *mix.keys[n]))
            own = {key: value[:, :, rows] for key, value in gates.items()}
            out[rows] = reference(q, k, v, q_offset=start, **own)[0].transpose(0, 1)
    q, k, v = (x.clone().requires_grad_() for x in (mix.q, *(torch.cat(parts) for parts in zip(*mix.keys, strict=True))))
    found = attn.ragged(q, k, v, mix.cu_q, mix.cu_k, mix.starts, **gates)
    torch.testing.assert_close(found, out, **EXACT)
    found.sum().backward()
    assert all(bool(x.grad.isfinite().all()) and bool((x.grad != 0).any()) for x in (q, k, v) if x.grad is not None)
    *pools, table = mix.pools(8)
    torch.testing.assert_close(attn.paged(mix.q, *pools, table, mix.kv_lens, mix.cu_q, **gates), out, **EXACT)


# ---- no numbers are looked at ------------------------------------------------------------------------------------------------------


def test_nothing_waits_for_numbers_that_lie_elsewhere() -> None:
    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "item", "equal"), func
            return func(*args, **(kwargs or {}))

    packed = PackedAttention(sd.compile(cases.PATTERNS["streaming"]).pattern, "cpp")
    requests = replace(requests_of(MIX.cu_q, MIX.kv_lens, MIX.starts, len(MIX.q), MIX.q.device), looked_at=False)
    rows, span = int(MIX.kv_lens.sum()), packed.packing.span
    with Waits():
        seen_pages(packed.pattern.mask, requests, 8, 10, 4, {})
        keys = KeyRows.behind_each_other(MIX.cu_k, rows, span)
        made = {**requests.row_tables(span), "kv_place": keys.place, "kv_position": keys.position}
        own = {name: made[what] for what, name in packed.packing.wanted.items()}
        q, k, v = (x.transpose(0, 1)[None] for x in (MIX.q, *(torch.cat(parts) for parts in zip(*MIX.keys, strict=True))))
        call = packed._unlooked(q, k, v, own, {}, None, None)
        for interval in intervals(packed.packing.pattern.mask.expr) or ():
            interval_rows(interval, call.domain)


# ---- refusals ----------------------------------------------------------------------------------------------------------------------

ENDS, LENS = torch.tensor([0, 2, 5]), torch.tensor([6, 9])
Q, KEYS, POOL, TABLE = torch.zeros(5, 4, 8), torch.zeros(15, 2, 8), torch.zeros(6, 4, 2, 8), torch.tensor([[0, 1, 9], [3, 4, 5]])
LOCAL = sd.compile(sd.patterns.sliding_window(4), backend="tiled")
RAGGED: dict[str, tuple[dict[str, Any], str]] = {
    "a batch": ({"q": Q[None]}, "q must be a tensor (tokens, heads, head_dim), requests behind each other; got"),
    "a list": ({"cu_seqlens_q": [0, 2, 5]}, "cu_seqlens_q must be a tensor of whole numbers (R + 1,); got [0, 2, 5]"),
    "floats": ({"cu_seqlens_q": ENDS.float()}, "cu_seqlens_q must be int32 or int64 (R + 1,); got torch.float32"),
    "nothing": ({"cu_seqlens_q": ENDS[:0]}, "must begin with 0 and say where each request ends"),
    "lengths": ({"cu_seqlens_q": torch.tensor([2, 3])}, "must begin with 0 and never fall"),
    "too long": ({"cu_seqlens_k": torch.tensor([0, 6, 16])}, "cu_seqlens_k ends at 16, and k has 15 rows"),
    "of others": ({"cu_seqlens_k": torch.tensor([0, 15])}, "cu_seqlens_q is of 2 requests, and cu_seqlens_k of 1"),
    "fewer keys": ({"cu_seqlens_k": torch.tensor([0, 1, 15])}, "request 0 has 2 queries and 1 keys: without q_start"),
    "start": ({"q_start": torch.tensor([0, -1])}, "q_start must hold numbers from 0 to 2**31; got -1"),
    "starts": ({"q_start": torch.tensor([0])}, "q_start must be int32 or int64 (2,); got torch.int64 (1,)"),
    "layout": ({"layout": "bshd"}, "layout must be one of"),
    "heads": ({"k": torch.zeros(15, 3, 8), "v": torch.zeros(15, 3, 8)}, "4 is not a multiple of 3"),
    "a table": ({"docs": ENDS}, "unexpected argument docs"),
}
PAGED: dict[str, tuple[dict[str, Any], str]] = {
    "one pool": ({"k_pool": KEYS}, "k_pool must be a tensor (pages, page, Hkv, D); got"),
    "no page": ({"k_pool": POOL[:, :0]}, "has a size of 0: pages hold at least one key"),
    "dtype": ({"k_pool": POOL.half(), "v_pool": POOL.half()}, "k_pool must be torch.float32 as q is, or quantised"),
    "other pools": ({"v_pool": POOL[:5]}, "k_pool and v_pool must have the same pages, heads and dtype"),
    "head_dim": ({"k_pool": POOL[..., :4]}, "must have one head_dim, and query heads a multiple"),
    "scale": ({"k_scale": torch.ones(6)}, "k_scale is for quantised pools, and this one holds torch.float32"),
    "table": ({"block_table": TABLE[0]}, "block_table must be int32 or int64 (requests, pages); got"),
    "requests": ({"block_table": TABLE[:1]}, "is of 1 requests, and kv_lens of 2"),
    "narrow": ({"kv_lens": torch.tensor([6, 13])}, "a request has 13 keys, in 4 pages of 4, and block_table has room for 3"),
    "a page": ({"block_table": TABLE + 4}, "has page 7 for page 0 of request 1, which its queries see; the pool has pages 0 to 5"),
    "pool_layout": ({"pool_layout": "thd"}, "pool_layout must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", RAGGED)
def test_ragged_refuses(case: str) -> None:
    words = {"q": Q, "k": KEYS, "v": KEYS, "cu_seqlens_q": ENDS, "cu_seqlens_k": torch.tensor([0, 6, 15])}
    changed, message = RAGGED[case]
    with pytest.raises((sd.ShapeError, sd.TableError, sd.PatternError), match=re.escape(message)):
        LOCAL.ragged(**{**words, **changed})


@pytest.mark.parametrize("case", PAGED)
def test_paged_refuses(case: str) -> None:
    words = {"q": Q, "k_pool": POOL, "v_pool": POOL, "block_table": TABLE, "kv_lens": LENS, "cu_seqlens_q": ENDS}
    changed, message = PAGED[case]
    with pytest.raises((sd.ShapeError, sd.PatternError), match=re.escape(message)):
        LOCAL.paged(**{**words, **changed})


def test_what_cannot_work_says_what_does() -> None:
    words = (POOL, POOL, TABLE, LENS, ENDS)
    with pytest.raises(sd.UnsupportedError, match=re.escape("paged() is forward only, and q, a pool or a table wants gradients")):
        LOCAL.paged(Q.clone().requires_grad_(), *words)
    with pytest.raises(sd.UnsupportedError, match="backend='flex' reads keys that lie behind each other, and no pages"):
        sd.compile(sd.patterns.causal(), backend="flex").paged(Q, *words)
    with pytest.raises(sd.UnsupportedError, match="its elements must lie side by side"):
        LOCAL.paged(Q, POOL.transpose(2, 3).contiguous().transpose(2, 3), POOL, *words[2:])
    sinks = sd.attend(sd.patterns.causal(), sink=sd.table("sink", dtype=float)[sd.b])
    with pytest.raises(sd.UnsupportedError, match=r"reads b: one row holds all requests.*Use backend='reference'"):
        sd.compile(sinks, backend="tiled").paged(Q, *words, sink=torch.zeros(2))
    found = sd.compile(sinks, backend="reference").paged(Q, *words, sink=torch.zeros(2))
    assert found.shape == Q.shape
    with pytest.raises(torch._dynamo.exc.Unsupported, match="not part of a graph"):
        torch.compile(LOCAL.paged, backend="eager", fullgraph=True)(Q, *words)
    assert not torch.compile(LOCAL.paged, backend="eager")(Q, *words).any()  # between two graphs


def test_no_requests_no_keys_and_padding() -> None:
    none = torch.zeros(1, dtype=torch.int64)
    for backend in ("reference", "tiled", "cpp"):
        attn = sd.compile(sd.attend(sd.patterns.causal(), sink=0.5), backend=backend)
        out, lse = attn.paged(Q, POOL, POOL, TABLE[:0], LENS[:0], none, return_lse=True)
        assert out.shape == Q.shape and not out.any() and lse.shape == (4, 5) and bool((lse == -float("inf")).all())
        out, lse = attn.paged(Q, POOL, POOL, TABLE, LENS * 0, ENDS.clamp(max=3), LENS, return_lse=True)
        assert not out.any() and bool((lse[:, :3] == 0.5).all()) and bool((lse[:, 3:] == -float("inf")).all())
