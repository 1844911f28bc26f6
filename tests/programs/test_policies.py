"""Published policies of choice as compiled programs: the reference tests S1 to S5, and MoBA, NSA and Quest as systems."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import testing as kit

Tensor = torch.Tensor
B, HQ, H, L, D = 2, 4, 2, 61, 8
CASE = kit.AttentionCase(batch=B, heads=HQ, kv_heads=H, q_len=L, kv_len=L, head_dim=D, head_dim_v=D)
CAUSAL = sd.kv_idx <= sd.q_idx


@pytest.fixture(scope="module")
def problem(draw: Any) -> Any:
    """q, k, v."""

    def make(length: int = L) -> dict[str, Tensor]:
        return {name: draw(B, n, length, D, seed=i) for i, (name, n) in enumerate({"q": HQ, "k": H, "v": H}.items())}

    return make


def table_of(attn: Any, t: dict[str, Tensor], name: str) -> Tensor:
    found = attn.choices(**t)[name]
    return found if isinstance(found, Tensor) else found.table()


@pytest.mark.parametrize(("cover", "count"), [(0.4, 1), (0.55, 2), (0.85, 3), (0.97, 4), (1.0, 4)])
def test_S1_how_many_tokens_cover_a_mass(backend: str, cover: float, count: int) -> None:
    """FlexPrefill: the masses .5 .3 .15 .05, as what the last query pays four keys. More than all there are is all."""
    k = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().double().view(1, 1, 4, 1)
    tokens = sd.keep_tokens(sd.probe(sd.q, sd.k, rows=1, scale=1.0), cover=cover)
    attn = sd.compile(sd.compact(tokens, True), backend=backend)
    (kept,) = attn.choices(torch.ones_like(k), k, k).values()
    assert kept[0].tolist() == [list(range(count))]


@pytest.mark.parametrize(("stride", "block"), [(2, 4), (4, 16), (8, 8)])
def test_S2_antidiagonal_sums(problem: Any, backend: str, stride: int, block: int) -> None:
    t = problem(64)
    selected = sd.top_p(
        sd.antidiagonal(sd.q, sd.k, stride, block), 0.5, among=CAUSAL, forced_in_mass=True, name="selected",
        forced=(sd.kv_idx < block) | (sd.q_idx // block == sd.kv_idx // block),
    )  # fmt: skip
    attn = sd.compile(sd.attend(CAUSAL & selected), backend=backend)
    found = table_of(attn, t, "selected")
    cells, blocks = 64 // stride, 64 // block
    assert found[:, :, :, 0].all() and found[:, :, range(blocks), range(blocks)].all()
    for b, h in itertools.product(range(B), range(HQ)):
        q, k = t["q"][b, h], t["k"][b, h // (HQ // H)]
        sums = torch.full((cells, cells), -torch.inf, dtype=torch.float64)
        for m, n in itertools.product(range(cells), range(cells)):
            if n <= m:
                sums[m, n] = sum(q[stride * m + stride - 1 - i] @ k[stride * n + i] for i in range(stride)) / (D**0.5 * stride)
        mass = sums.softmax(1).unflatten(0, (blocks, -1)).unflatten(2, (blocks, -1)).sum((1, 3))
        assert torch.allclose(mass.sum(1), torch.full((blocks,), float(block // stride), dtype=torch.float64))
        for row in range(blocks):
            first = sorted({0, row})
            rest = sorted((n for n in range(row) if n != 0), key=lambda n: -float(mass[row, n]))
            held, wanted = float(mass[row, first].sum()), set(first)
            for n in rest:
                if held >= 0.5 * float(mass[row].sum()):
                    break
                held, wanted = held + float(mass[row, n]), wanted | {n}
            assert set(found[b, h, row].nonzero()[:, 0].tolist()) == wanted


@pytest.mark.parametrize("page", [1, 4, 16])
def test_S3_pages_by_the_bound_of_their_keys(problem: Any, backend: str, page: int) -> None:
    """The pages with the greatest bounds; the page of the greatest logit has the bound of all pages of one key."""
    t, count = problem(), 2
    selected = sd.top_k(sd.bound(sd.q, sd.k, page), count, among=(sd.kv_idx // page + 1) * page <= sd.q_idx + 1, name="selected")
    found = table_of(sd.compile(sd.attend(CAUSAL & selected), backend=backend), t, "selected")
    k = t["k"].repeat_interleave(HQ // H, 1)
    logits = t["q"] @ k.transpose(2, 3) / D**0.5
    pages = [k[:, :, n : n + page] for n in range(0, L, page)]
    low, high = (torch.stack([getattr(rows, how)(2) for rows in pages], 2) for how in ("amin", "amax"))
    products = [t["q"][:, :, :, None] * x[:, :, None] for x in (low, high)]
    bounds = torch.maximum(*products).sum(-1) / D**0.5
    over = (torch.arange(len(pages)) + 1) * page <= torch.arange(L)[:, None] + 1
    best = bounds.masked_fill(~over, -torch.inf).sort(dim=-1, descending=True, stable=True)
    wanted = torch.zeros_like(found).scatter(-1, best.indices[..., :count], best.values[..., :count].isfinite())
    assert torch.equal(found, wanted)
    largest = torch.stack([logits[..., n : n + page].amax(-1) for n in range(0, L, page)], -1)
    assert (bounds >= largest - 1e-12).all() and (page > 1 or torch.allclose(bounds, largest))


def test_S4_columns_and_slashes_of_a_vertical_slash_mask(problem: Any, backend: str, assert_close: Any) -> None:
    """MInference: the first columns and the last diagonals always, single keys beside them by what the last queries pay."""
    t = problem()
    first, last = 5, 9
    near = (sd.q_idx - sd.kv_idx < last) | (sd.kv_idx < first)
    selected = sd.top_k(sd.dot(sd.q, sd.k), 3, name="selected")
    attn = sd.compile(sd.attend(CAUSAL & (near | selected)), backend=backend)
    found = table_of(attn, t, "selected")
    row, column = torch.arange(L)[:, None], torch.arange(L)
    always = (row - column < last) | (column < first)
    assert not (found & (always | (column > row))).any()  # what is seen in any case is not chosen, nor is the future
    allowed = (found | always) & (column <= row)
    k, v = (t[name].repeat_interleave(HQ // H, 1) for name in "kv")
    logits = (t["q"] @ k.transpose(2, 3) / D**0.5).masked_fill(~allowed, -torch.inf)
    assert_close(attn(**t, return_lse=True), (logits.softmax(-1) @ v, logits.logsumexp(-1)))


def moba_by_loops(t: dict[str, Tensor], chunk: int, top_k: int) -> Tensor:
    out = torch.zeros_like(t["q"])
    for b, h, row in itertools.product(range(B), range(HQ), range(t["q"].shape[2])):
        q, k, v = t["q"][b, h, row], t["k"][b, h // (HQ // H)], t["v"][b, h // (HQ // H)]
        own = row // chunk
        score = [float(q @ k[c * chunk : (c + 1) * chunk].mean(0)) for c in range(own)]
        best = sorted(range(own), key=lambda c: -score[c])[: top_k - 1]
        keys = [j for j in range(row + 1) if j // chunk in (*best, own)]
        out[b, h, row] = (q @ k[keys].T / D**0.5).softmax(0) @ v[keys]
    return out


@pytest.mark.parametrize(("chunk", "top_k"), [(8, 3), (16, 1), (5, 50)])
def test_S5_moba(problem: Any, backend: str, assert_close: Any, chunk: int, top_k: int) -> None:
    t = problem()
    assert_close(sd.compile(sd.patterns.moba(chunk, top_k), backend=backend)(**t), moba_by_loops(t, chunk, top_k))


def nsa_by_loops(t: dict[str, Tensor], block: int, select: int, top_k: int, window: int) -> tuple[Tensor, Tensor]:
    """The published branches, one query after the other; the output and the blocks picked, ``(B, H, L, blocks)``."""
    length, group = t["q"].shape[2], HQ // H
    out, found = torch.zeros_like(t["q"]), torch.zeros(B, H, length, -(-length // select), dtype=torch.bool)
    means = [x[:, :, : length // block * block].unflatten(2, (-1, block)).mean(3) for x in (t["k"], t["v"])]
    for b, g, row in itertools.product(range(B), range(H), range(length)):
        over, heads = (row + 1) // block, range(g * group, (g + 1) * group)
        k, v = t["k"][b, g], t["v"][b, g]
        paid = [(t["q"][b, h, row] @ means[0][b, g, :over].T / D**0.5).softmax(0) for h in heads]
        mass = torch.zeros(row // select + 1, dtype=torch.float64)
        for c in range(over):
            mass[c * block // select] += sum(p[c] for p in paid)
        forced = {0, row // select, max(row // select - 1, 0)}
        rest = sorted(set(range(len(mass))) - forced, key=lambda c: -float(mass[c]))
        best = [*forced, *rest][: max(top_k, 1)] if len(forced) <= top_k else sorted(forced)[:top_k]
        found[b, g, row, best] = True
        for h, p in zip(heads, paid, strict=True):
            q = t["q"][b, h, row]
            parts = [p @ means[1][b, g, :over]]
            for keys in ([j for j in range(row + 1) if j // select in best], range(max(0, row - window + 1), row + 1)):
                index = torch.tensor(list(keys))
                parts.append((q @ k[index].T / D**0.5).softmax(0) @ v[index])
            out[b, h, row] = sum(w * x for w, x in zip(t["gate"][b, h, row], parts, strict=True))
    return out, found


@pytest.mark.parametrize("block", [4, 8])
def test_S5_nsa(problem: Any, draw: Any, backend: str, assert_close: Any, block: int) -> None:
    """Blocks that are picked are larger than those that are averaged, or the same."""
    t = problem() | {"gate": draw(B, HQ, L, 3, seed=5)}
    attn = sd.compile(sd.patterns.nsa(block, 8, 4, 7), backend=backend)
    wanted, blocks = nsa_by_loops(t, block, 8, 4, 7)
    (label,) = attn.choices(**t)
    found = table_of(attn, t, label)
    assert torch.equal(found, blocks)
    row, column = torch.arange(L)[:, None] // 8, torch.arange(-(-L // 8))
    assert found[:, :, (column == 0) | ((row - column < 2) & (row >= column))].all() and not found[:, :, column > row].any()
    assert_close(attn(**t), wanted)


QUEST = sd.attend(CAUSAL & sd.top_k(sd.bound(sd.q, sd.k, 8), 2, forced=sd.q_idx // 8 == sd.kv_idx // 8, extra=True))
PICKS_AND_WINDOW = sd.attend(CAUSAL & (sd.patterns.sliding_window(5) | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8)), 2)), sink=0.3)
SYSTEMS = {
    "moba": sd.patterns.moba(8, 3),
    "nsa": sd.patterns.nsa(4, 8, 3, 7),
    "quest": QUEST,
    "window and picks": PICKS_AND_WINDOW,
}


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients(problem: Any, draw: Any, name: str, dtype: torch.dtype) -> None:
    t = {key: x.to(dtype) for key, x in (problem() | ({"gate": draw(B, HQ, L, 3)} if name == "nsa" else {})).items()}
    done = kit.assert_matches_reference(sd.compile(SYSTEMS[name], backend="tiled"), **t)
    wanted = ("out", "dq", "dk", "dv", "dgate") if name == "nsa" else ("out", "lse", "dq", "dk", "dv")
    assert done == ("choices", *wanted)


@pytest.mark.parametrize("name", ["moba", "nsa"])
def test_causal_and_cut_into_calls(name: str, backend: str) -> None:
    case = kit.AttentionCase(batch=1, heads=4, kv_heads=2, q_len=30, kv_len=30)
    attn = sd.compile(SYSTEMS[name], backend=backend)
    kit.assert_causal(attn, case)
    done = kit.assert_prefill_equals_decode(attn, case)
    assert done == ("one call", "chunks of 7", "token by token", "growing cache")


@pytest.mark.parametrize("mask", [CAUSAL, (sd.kv_idx // 8 + 1) * 8 <= sd.q_idx], ids=["causal", "over"])
def test_what_nobody_picked_learns_nothing(backend: str, mask: Any) -> None:
    attn = sd.compile(sd.attend(mask & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8)), 1)), backend=backend)
    assert kit.assert_unselected_gradients_zero(attn, kit.AttentionCase(1, 2, 2, 41, 41)) == ("k", "v")


def test_choosing_within_a_unit_that_is_not_over_leaks(backend: str) -> None:
    """The mean of the block a query stands in holds later keys; the mask itself is causal."""
    attn = sd.compile(sd.attend(CAUSAL & sd.top_k(sd.dot(sd.q, sd.summary(sd.k, 8)), 1)), backend=backend)
    with pytest.raises(kit.Counterexample, match="choice top_k"):
        kit.assert_causal(attn, kit.AttentionCase(1, 2, 2, 41, 41))


def test_moba_on_flex(problem: Any, assert_close: Any) -> None:
    t = {key: x.float() for key, x in problem().items()}
    wanted = sd.compile(SYSTEMS["moba"], backend="reference")(**t)
    assert_close(sd.compile(SYSTEMS["moba"], backend="flex")(**t), wanted, 1e-5)
