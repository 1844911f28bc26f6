"""Token sparse attention as a compiled program: the reference tests T1 to T11 of its specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import testing as kit

Tensor = torch.Tensor
B, HQ, H, L, D, W = 2, 4, 2, 61, 8, 6
CAUSAL = sd.kv_idx <= sd.q_idx
LATER = ["selection reads later queries"]


@pytest.fixture(scope="module")
def problem(draw: Any) -> Any:
    """q, k, v."""

    def make(length: int = L) -> dict[str, Tensor]:
        sizes = {"q": HQ, "k": H, "v": H}
        return {name: draw(B, n, length, D, seed=i) for i, (name, n) in enumerate(sizes.items())}

    return make


def pattern(share: float, *, pool: int = 7, least: int = 4, inside: Any = None) -> Any:
    return sd.patterns.token_sparse(share, W, pool, least, inside=inside)


def scores_of(t: dict[str, Tensor], pool: int = 7) -> Tensor:
    """What the last queries pay each token before them, smoothed with zeros beyond the ends: ``(B, HQ, L - W)``."""
    length = t["q"].shape[2]
    k = t["k"].repeat_interleave(HQ // H, 1)
    logits = t["q"][:, :, -W:] @ k.transpose(2, 3) / D**0.5
    future = torch.arange(length) > torch.arange(length - W, length)[:, None]
    mass = logits.masked_fill(future, -torch.inf).softmax(-1).mean(2)[..., : length - W]
    padded = torch.nn.functional.pad(mass, (pool // 2, pool // 2))
    return padded.unfold(2, pool, 1).sum(-1) / pool


def kept_by_loops(t: dict[str, Tensor], share: float, pool: int = 7, least: int = 4) -> list[Tensor]:
    """For each batch entry the tokens kept by every head."""
    length, found = t["q"].shape[2], []
    for scores in scores_of(t, pool):
        total = scores.mean(0)
        ascending, below = sorted((total / total.sum()).tolist()), 0.0
        n = 0
        for mass in ascending:
            below += mass
            if below >= share:
                break
            n += 1
        n = min(n + 1, len(ascending)) if n else 0
        keep = max(least, length - W - n)
        best = (-scores).argsort(dim=1, stable=True)[:, :keep]
        found.append(torch.cat([best, torch.arange(length - W, length).expand(HQ, -1)], 1).sort(1).values)
    return found


def kept(attn: Any, t: dict[str, Tensor]) -> list[Tensor]:
    (found,) = (value for label, value in attn.choices(**t).items() if label.startswith("keep_tokens"))
    return list(found)


def masked_dense(t: dict[str, Tensor], tokens: list[Tensor]) -> Tensor:
    """Attention under ``kept[q] & kept[k] & k <= q``; rows that are not kept are 0."""
    flags = torch.stack([torch.zeros(HQ, t["q"].shape[2], dtype=torch.bool).scatter(1, index, True) for index in tokens])
    table = sd.table("kept", dtype=bool)
    mask = CAUSAL & table[sd.b, sd.h, sd.q_idx] & table[sd.b, sd.h, sd.kv_idx]
    return sd.compile(mask, backend="reference")(**t, kept=flags)


@pytest.mark.parametrize("share", [0.005, 0.05, 0.2, 0.6, 0.99])
def test_TSA_T1_masked_dense_attention(problem: Any, backend: str, assert_close: Any, share: float) -> None:
    t, attn = problem(), sd.compile(pattern(share), backend=backend)
    wanted = kept_by_loops(t, share)
    assert all(torch.equal(a, b) for a, b in zip(kept(attn, t), wanted, strict=True))
    assert_close(attn(**t), masked_dense(t, wanted))


def test_TSA_T2_rows_of_dropped_tokens_are_zero(problem: Any, backend: str) -> None:
    t, attn = problem(), sd.compile(pattern(0.4), backend=backend)
    out, lse = attn(**t, return_lse=True)
    for entry, index in enumerate(kept(attn, t)):
        flags = torch.zeros(HQ, L, dtype=torch.bool).scatter(1, index, True)
        assert flags.any() and not flags.all()
        assert (out[entry][~flags] == 0).all() and (lse[entry][~flags] == -torch.inf).all()
        assert (out[entry][flags] != 0).all() and out[entry].isfinite().all() and lse[entry][flags].isfinite().all()


def test_TSA_T3_tokens_ascend_and_hold_the_last(problem: Any, backend: str) -> None:
    t = problem()
    for index in kept(sd.compile(pattern(0.3), backend=backend), t):
        assert index.shape[0] == HQ and (index.diff(dim=1) > 0).all()
        assert (index[:, -W:] == torch.arange(L - W, L)).all()


@pytest.mark.parametrize(("share", "least"), [(0.0, 4), (0.5, L - W), (0.9, 1000)])
def test_TSA_T4_nothing_dropped_is_dense_to_the_bit(problem: Any, backend: str, share: float, least: int) -> None:
    t = problem()
    out = sd.compile(pattern(share, least=least), backend=backend)(**t)
    repeat_kv = {name: x.repeat_interleave(HQ // x.shape[1], 1)[:1] for name, x in t.items()}
    assert torch.equal(out[:1], sd.compile(CAUSAL, backend=backend)(**repeat_kv))


def test_TSA_T5_fewer_stay_for_a_greater_share(problem: Any, backend: str) -> None:
    t, before = problem(), L + 1
    for share in (0.0, 0.01, 0.1, 0.3, 0.7, 0.999):
        count = kept(sd.compile(pattern(share), backend=backend), t)[0].shape[1]
        assert count <= before
        before = count
    assert before == 4 + W


@pytest.mark.parametrize("share", [0.05, 0.2, 0.6])
def test_TSA_T6_the_tail_that_is_dropped(problem: Any, backend: str, share: float) -> None:
    t = problem()
    for index, scores in zip(kept(sd.compile(pattern(share), backend=backend), t), scores_of(t), strict=True):
        ascending = (scores.mean(0) / scores.mean(0).sum()).sort().values
        n = L - index.shape[1]
        assert ascending[: n - 1].sum() < share <= ascending[:n].sum() + 1e-12


def test_TSA_T7_positions_come_before_the_subset(problem: Any, backend: str) -> None:
    """Positions turned into q and k after tokens were dropped are others: the result is not that of T1."""

    def turned(x: Tensor) -> Tensor:
        half, place = x.shape[-1] // 2, torch.arange(x.shape[2], dtype=x.dtype)[:, None]
        angle = place * 100 ** (-torch.arange(half, dtype=x.dtype) / half)
        one, two = x[..., :half], x[..., half:]
        return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], -1)

    t = problem()
    early = t | {"q": turned(t["q"]), "k": turned(t["k"])}
    tokens = kept(sd.compile(pattern(0.4), backend=backend), early)
    right = sd.compile(pattern(0.4), backend=backend)(**early)
    torch.testing.assert_close(right, masked_dense(early, tokens))
    index = tokens[0][None, ..., None].expand(-1, -1, -1, D)
    late = {name: x.repeat_interleave(HQ // x.shape[1], 1)[:1].gather(2, index) for name, x in t.items()}
    wrong = sd.compile(CAUSAL, backend=backend)(turned(late["q"]), turned(late["k"]), late["v"])
    assert (wrong - right[:1].gather(2, index)).abs().max() > 0.05


@pytest.mark.parametrize("share", [0.101, 0.299, 0.56])
def test_TSA_T8_equal_scores(problem: Any, backend: str, share: float) -> None:
    """A query of zeros looks at all tokens alike: a share of the tokens is dropped, the last ones (earlier ones win ties)."""
    t = problem()
    t["q"] = torch.zeros_like(t["q"])
    n = -int(-share * (L - 1) // 1)
    attn = sd.compile(sd.patterns.token_sparse(share, 1, 1, 0), backend=backend)
    for index in kept(attn, t):
        assert index.shape[1] == L - n
        assert (index[:, :-1] == torch.arange(L - 1 - n)).all()


def test_TSA_T9_another_kernel_inside(problem: Any, backend: str, assert_close: Any) -> None:
    t = problem()
    dense = sd.compile(pattern(0.3), backend=backend)(**t, return_lse=True)
    for inside in (sd.patterns.pbs(8, 16, 1.0), sd.patterns.moba(8, 50)):
        assert_close(sd.compile(pattern(0.3, inside=inside), backend=backend)(**t, return_lse=True), dense)


def test_TSA_T9_a_sparse_kernel_inside_counts_kept_tokens(problem: Any, backend: str, assert_close: Any) -> None:
    t = problem()
    inner = sd.patterns.pbs(8, 16, 0.4)
    attn = sd.compile(pattern(0.3, inside=inner), backend=backend)
    out = attn(**t)
    for entry, index in enumerate(kept(attn, t)):
        place = index[None, ..., None].expand(-1, -1, -1, D)
        small = {name: x.repeat_interleave(HQ // x.shape[1], 1)[entry : entry + 1].gather(2, place) for name, x in t.items()}
        assert_close(out[entry : entry + 1].gather(2, place), sd.compile(inner, backend=backend)(**small))


def test_TSA_T10_inputs_are_left_as_they_are(problem: Any, backend: str) -> None:
    """What a model keeps in its cache are the k and v of the call; the program writes to neither."""
    t = problem()
    before = {name: x.clone() for name, x in t.items()}
    sd.compile(pattern(0.3), backend=backend)(**t)
    assert all(torch.equal(t[name], before[name]) for name in t)


def test_TSA_T11_a_lone_sink_keeps_a_seventh(problem: Any, backend: str) -> None:
    """All attention on token 0: its neighbours get a seventh each, so that four tokens hold all of the score, in equal parts."""
    t = problem()
    t["q"], t["k"] = torch.zeros_like(t["q"]), torch.zeros_like(t["k"])
    t["q"][..., 0], t["k"][:, :, 0, 0] = 100.0, 100.0
    tokens = kept(sd.compile(pattern(0.2, least=0), backend=backend), t)
    assert all((index[:, :-W] == torch.arange(index.shape[1] - W)).all() and index.shape[1] - W <= 4 for index in tokens)
    score = scores_of(t)
    assert torch.allclose(score[..., :4], torch.full_like(score[..., :4], 1 / 7)) and (score[..., 4:] == 0).all()


def test_gradients_are_refused_and_given_where_they_are_meant(problem: Any) -> None:
    with pytest.raises(sd.UnsupportedError, match="learns from the future"):
        sd.compile(pattern(0.3), backend="tiled")(**{name: x.requires_grad_() for name, x in problem().items()})
    for program in (pattern(0.3), pattern(0.3, inside=sd.patterns.pbs(8, 16, 0.5))):
        done = kit.assert_matches_reference(sd.compile(program, backend="tiled", allow=LATER), **problem())
        assert done == ("choices", "out", "lse", "dq", "dk", "dv")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(problem: Any, dtype: torch.dtype) -> None:
    t = {name: x.to(dtype) for name, x in problem().items()}
    done = kit.assert_matches_reference(sd.compile(pattern(0.3), backend="tiled", allow=LATER), **t)
    assert done == ("choices", "out", "lse", "dq", "dk", "dv")


def test_what_moves_with_the_future_is_named(backend: str) -> None:
    case = kit.AttentionCase(batch=1, heads=4, kv_heads=2, q_len=30, kv_len=30)
    with pytest.raises(kit.Counterexample, match=r"choice keep_tokens, out, lse up to position \d+ change .*last 6 queries"):
        kit.assert_causal(sd.compile(pattern(0.4), backend=backend), case)


def test_it_is_for_whole_sequences(problem: Any, backend: str) -> None:
    t = problem()
    with pytest.raises(sd.UnsupportedError, match="as many queries as keys"):
        sd.compile(pattern(0.3), backend=backend)(t["q"][:, :, -1:], t["k"], t["v"], q_offset=L - 1)
