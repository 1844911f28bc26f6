"""Hierarchical sparse attention as a compiled program: the reference tests T01 to T16 of its specification, and what it suggests."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import testing as kit

Tensor = torch.Tensor
B, L, S, HQ, H, D, K = 2, 48, 8, 8, 2, 16, 3
CASE = kit.AttentionCase(batch=B, heads=HQ, kv_heads=H, q_len=L, kv_len=L, head_dim=D, head_dim_v=D)
RULES = ("softmax", "softmax1", "stick_breaking", "sigmoid")


@pytest.fixture(scope="module")
def problem(draw: Any) -> Any:
    """q, k, v, retrieval_q, landmarks."""

    def make(length: int = L, *, heads: int = HQ, kv_heads: int = H, chunk: int = S) -> dict[str, Tensor]:
        sizes = {"q": (heads, length), "k": (kv_heads, length), "v": (kv_heads, length)}
        found = {name: draw(B, *size, D, seed=i)[:, :, :length] for i, (name, size) in enumerate(sizes.items())}
        retrieval, marks = draw(B, kv_heads, length, 5, seed=3), draw(B, kv_heads, length // chunk, 5, seed=4)
        return found | {"retrieval_q": retrieval, "landmarks": marks}

    return make


def within_chunks(t: dict[str, Tensor], inner: str = "softmax") -> tuple[Tensor, Tensor]:
    """By loops over chunks: every chunk's own softmax output ``(B, HQ, L, NC, D)`` and LSE."""
    group = t["q"].shape[1] // t["k"].shape[1]
    k, v = (t[name].repeat_interleave(group, 1) for name in "kv")
    outs, lses = [], []
    for c in range(t["k"].shape[2] // S):
        logits = t["q"] @ k[:, :, c * S : (c + 1) * S].transpose(2, 3) / D**0.5
        if inner == "softmax1":
            logits = torch.cat([logits, torch.zeros_like(logits[..., :1])], -1)
        outs.append(logits.softmax(-1)[..., :S] @ v[:, :, c * S : (c + 1) * S])
        lses.append(logits.logsumexp(-1))
    return torch.stack(outs, 3), torch.stack(lses, 3)


def weights(t: dict[str, Tensor], rule: str, top_k: int) -> Tensor:
    """By loops over rows: the weight of every chunk, ``(B, HQ, L, NC)``."""
    scores = t["retrieval_q"] @ t["landmarks"].transpose(2, 3) / t["landmarks"].shape[3] ** 0.5
    found = torch.zeros_like(scores)
    for b, h, row in itertools.product(*map(range, scores.shape[:3])):
        over = row // S  # chunks that end before the row
        best = sorted(sorted(range(over), key=lambda c: -float(scores[b, h, row, c]))[:top_k])
        s = scores[b, h, row, best]
        if rule.startswith("softmax"):
            slots = s if rule == "softmax" else torch.cat([s, s.new_zeros(1)])
            found[b, h, row, best] = slots.softmax(0)[: len(best)] if best else s
        elif rule == "sigmoid":
            found[b, h, row, best] = s.sigmoid()
        else:
            left = 1.0
            for c, score in zip(reversed(best), s.flip(0), strict=True):
                found[b, h, row, c] = left * score.sigmoid()
                left = left * (1 - score.sigmoid())
    return found.repeat_interleave(t["q"].shape[1] // scores.shape[1], 1)


@pytest.mark.parametrize("inner", ["softmax", "softmax1"])
@pytest.mark.parametrize("rule", RULES)
def test_T02_T09_T11_the_formula(problem: Any, backend: str, assert_close: Any, rule: str, inner: str) -> None:
    t = problem()
    outs, _ = within_chunks(t, inner)
    wanted = torch.einsum("bhqc,bhqcd->bhqd", weights(t, rule, K), outs)
    assert_close(sd.compile(sd.patterns.hsa(S, K, rule, inner=inner), backend=backend)(**t), wanted)


@pytest.mark.parametrize("length", [8, 9, 21, 48])
def test_T01_rows_before_the_first_chunk_and_truncated_runs(
    problem: Any, backend: str, assert_close: Any, grads: Any, length: int
) -> None:
    attn = sd.compile(sd.patterns.hsa(S, 50), backend=backend)
    t = problem()
    part = {name: x[:, :, : length // (S if name == "landmarks" else 1)] for name, x in t.items()}
    out, lse = attn(**part, return_lse=True)
    assert_close(out, attn(**t)[:, :, :length])
    assert (out[:, :, :S] == 0).all() and (lse[:, :, :S] == -math.inf).all() and out.isfinite().all()
    for name, slope in grads(attn, part, lse=True).items():
        assert slope.isfinite().all(), name
        if name in ("q", "retrieval_q"):
            assert (slope[:, :, :S] == 0).all()


def test_T02_weights_add_up_to_one(backend: str) -> None:
    kit.assert_weights_sum(sd.compile(sd.patterns.hsa(S, K), backend=backend), CASE)


@pytest.mark.parametrize("rule", RULES)
def test_T03_T16_two_passes_on_flex(problem: Any, assert_close: Any, rule: str) -> None:
    t = {name: x.float() for name, x in problem().items()}
    wanted = sd.compile(sd.patterns.hsa(S, K, rule), backend="reference")(**t)
    assert_close(sd.compile(sd.patterns.hsa(S, K, rule), backend="flex")(**t), wanted, 1e-5)


@pytest.mark.parametrize("on", ["tiled", "flex"])
def test_a_score_within_chunks(problem: Any, assert_close: Any, on: str) -> None:
    t = {name: x.float() for name, x in problem().items()}
    plain = sd.patterns.hsa(S, K)
    capped = sd.attend(plain.pattern.mask, sd.tanh(sd.score) - 0.1 * sd.h, normaliser=plain.normaliser)
    wanted = sd.compile(capped, backend="reference")(**t)
    assert (wanted - sd.compile(plain, backend="reference")(**t)).abs().max() > 0.01
    assert_close(sd.compile(capped, backend=on)(**t), wanted, 1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_T03_T16_two_passes_by_hand(problem: Any, backend: str, assert_close: Any, rule: str) -> None:
    """One softmax over all picked chunks with ``logit + log w - lse``; its LSE is the log of the total weight."""
    t = problem()
    w, (_, lse) = weights(t, rule, K), within_chunks(t)
    chosen, bias = sd.table("chosen", dtype=bool), sd.table("bias", dtype=float)
    place = sd.b, sd.h, sd.q_idx, sd.kv_idx // S
    second = sd.compile(sd.attend(chosen[place], sd.score + bias[place]), backend=backend)
    out, total = second(t["q"], t["k"], t["v"], chosen=w > 0, bias=torch.where(w > 0, w.log() - lse, 0.0), return_lse=True)
    assert_close(total.exp(), w.sum(-1))
    assert_close(sd.compile(sd.patterns.hsa(S, K, rule), backend=backend)(**t), out * total.exp()[..., None])


def test_T04_weighed_by_their_mass_it_is_plain_softmax(problem: Any, backend: str, assert_close: Any) -> None:
    t = problem()
    _, lse = within_chunks(t)
    by = sd.dot(
        sd.input("asking", "batch heads queries mass_dim"), sd.input("marks", f"batch heads keys/{S} mass_dim"), scale=1.0
    )
    ended = (sd.kv_idx // S + 1) * S <= sd.q_idx
    selected = sd.top_k(by, K, among=ended)
    own = sd.attend(ended & selected, normaliser=sd.per_chunk(selected))
    # landmarks one-hot: the score of chunk c is the c-th entry of the query's, its exact LSE
    named = {"asking": lse, "marks": torch.eye(L // S, dtype=lse.dtype).expand(B, HQ, -1, -1)}
    qkv = {name: t[name] for name in "qkv"}
    wanted = sd.compile(sd.attend(ended & selected), backend=backend)(**qkv, **named, return_lse=True)
    assert_close(sd.compile(own, backend=backend)(**qkv, **named, return_lse=True), wanted)


def test_T05_all_chunks_are_not_dense_attention(problem: Any, backend: str) -> None:
    t = problem()
    out = sd.compile(sd.patterns.hsa(S, 100), backend=backend)(**t)
    for dense in (sd.kv_idx <= sd.q_idx, (sd.kv_idx // S + 1) * S <= sd.q_idx):
        assert (out - sd.compile(dense, backend=backend)(t["q"], t["k"], t["v"])).abs().max() > 0.5


def test_T06_one_chunk_is_its_own_softmax_and_scores_learn_nothing(
    problem: Any, backend: str, assert_close: Any, grads: Any
) -> None:
    t = problem()
    attn = sd.compile(sd.patterns.hsa(S, 1), backend=backend)
    chosen = weights(t, "softmax", 1)
    assert_close(attn(**t), torch.einsum("bhqc,bhqcd->bhqd", chosen, within_chunks(t)[0]))
    slopes = grads(attn, t)
    assert (slopes["retrieval_q"] == 0).all() and (slopes["landmarks"] == 0).all()


def test_T07_chunks_of_one_token(problem: Any, backend: str, assert_close: Any) -> None:
    t = problem() | {"landmarks": problem(chunk=1)["landmarks"]}
    t["q"], t["k"] = t["q"][:, ::4], t["k"] * 50  # as many heads as the landmarks; what q and k are is no matter
    wanted = sd.compile(sd.kv_idx < sd.q_idx, backend="reference")(t["retrieval_q"], t["landmarks"], t["v"])
    assert_close(sd.compile(sd.patterns.hsa(1, L), backend=backend)(**t), wanted)


def test_T08_order_is_no_matter(backend: str) -> None:
    kit.assert_permutation_invariant(sd.compile(sd.patterns.hsa(S, K), backend=backend), CASE, chunk=S)


def test_T09_in_stick_breaking_it_is(backend: str) -> None:
    attn = sd.compile(sd.patterns.hsa(S, K, "stick_breaking"), backend=backend)
    with pytest.raises(kit.Counterexample, match="order of past chunks"):
        kit.assert_permutation_invariant(attn, CASE, chunk=S)
    kit.assert_permutation_invariant(attn, CASE, chunk=S, of=("tokens",))
    kit.assert_weights_sum(attn, CASE, total=(0.0, 1.0))


@pytest.mark.parametrize("token", [S - 1, 3 * S, 4 * S - 1])
def test_T10_a_chunk_is_seen_when_it_is_over(problem: Any, backend: str, token: int) -> None:
    attn, t = sd.compile(sd.patterns.hsa(S, 50), backend=backend), problem()
    changed = {name: x.clone() for name, x in t.items()}
    for name in "kv":
        changed[name][:, :, token] += 1
    changed["landmarks"][:, :, token // S] += 1
    moved = (attn(**t) != attn(**changed)).any(-1).any(1).any(0).nonzero()[:, 0]
    assert int(moved[0]) == (token // S + 1) * S
    kit.assert_causal(attn, kit.AttentionCase(1, 4, 2, 20, 20))


def test_T11_softmax1_is_a_zero_key_in_every_chunk(problem: Any, backend: str, assert_close: Any) -> None:
    t = problem()
    wider = {name: x for name, x in t.items()}
    for name in "kv":
        wider[name] = torch.nn.functional.pad(t[name].unflatten(2, (-1, S)), (0, 0, 0, 1)).flatten(2, 3)
    # the queries' positions do not fit the longer chunks: the last rows see all of both
    last = slice(L - 1, L)
    got = sd.compile(sd.patterns.hsa(S, 5, inner="softmax1"), backend=backend)(**t)[:, :, last]
    rows = {"q": t["q"][:, :, last], "retrieval_q": t["retrieval_q"][:, :, last]}
    wanted = sd.compile(sd.patterns.hsa(S + 1, 5), backend=backend)(**(wider | rows), q_offset=5 * (S + 1))
    assert_close(got, wanted)


@pytest.mark.parametrize("rule", RULES)
def test_T12_gradients_are_those_of_the_formula(problem: Any, backend: str, assert_close: Any, grads: Any, rule: str) -> None:
    t = problem(24)

    def formula(return_lse: bool, **t: Tensor) -> Tensor:
        return torch.einsum("bhqc,bhqcd->bhqd", weights(t, rule, 2), within_chunks(t)[0])

    got, wanted = grads(sd.compile(sd.patterns.hsa(S, 2, rule), backend=backend), t), grads(formula, t)
    for name, slope in wanted.items():
        assert_close(got[name], slope)


def test_T12_what_nobody_picked_learns_nothing(backend: str) -> None:
    case = kit.AttentionCase(batch=2, heads=4, kv_heads=2, q_len=41, kv_len=41)
    attn = sd.compile(sd.patterns.hsa(4, 1), backend=backend)
    assert kit.assert_unselected_gradients_zero(attn, case) == ("k", "v", "landmarks")


def test_T13_decode_and_prefill_in_chunks(backend: str) -> None:
    attn = sd.compile(sd.patterns.hsa(S, K), backend=backend)
    done = kit.assert_prefill_equals_decode(attn, CASE, chunks=(5, 17, 32))
    assert done == ("one call", "chunks of 5", "chunks of 17", "chunks of 32", "token by token", "growing cache")


@pytest.mark.parametrize("t", [S - 1, S, S + 1, 3 * S - 1, 3 * S, L - 1])
def test_T13_decode_needs_complete_chunks_alone(problem: Any, backend: str, assert_close: Any, t: int) -> None:
    attn, given = sd.compile(sd.patterns.hsa(S, K), backend=backend), problem()
    cached = t // S * S
    rows = {name: given[name][:, :, t : t + 1] for name in ("q", "retrieval_q")}
    cache = {name: given[name][:, :, :cached] for name in "kv"} | {"landmarks": given["landmarks"][:, :, : t // S]}
    assert_close(attn(**rows, **cache, q_offset=t), attn(**given)[:, :, t : t + 1])


@pytest.mark.parametrize("window", [11, 16])
def test_T14_chunks_by_their_mass_and_a_window_are_dense_attention(
    problem: Any, backend: str, assert_close: Any, window: int
) -> None:
    """HiLS with the exact mass: all chunks before the window, whose edge is a chunk's, and the window, in one softmax."""
    t = problem()
    edge = (sd.q_idx - window + 1) // S * S
    by = sd.dot(
        sd.input("asking", "batch heads queries mass_dim"), sd.input("marks", f"batch heads keys/{S} mass_dim"), scale=1.0
    )
    selected = sd.top_k(by, 100, among=sd.kv_idx < edge)
    far = sd.attend((sd.kv_idx < edge) & selected, normaliser=sd.per_chunk(selected))
    near = sd.attend((sd.kv_idx <= sd.q_idx) & (sd.kv_idx >= edge))
    _, lse = within_chunks(t)
    named = {"asking": lse, "marks": torch.eye(L // S, dtype=lse.dtype).expand(B, HQ, -1, -1)}
    qkv = {name: t[name] for name in "qkv"}
    wanted = sd.compile(sd.kv_idx <= sd.q_idx, backend="reference")(**qkv, return_lse=True)
    assert_close(sd.compile(sd.joint(far, near), backend=backend)(**qkv, **named, return_lse=True), wanted)


def test_T15_a_landmark_bounds_the_mass_of_its_chunk(problem: Any, assert_close: Any) -> None:
    t = problem()
    keys = t["k"].unflatten(2, (-1, S))
    at = t["k"][:, :, S - 1 :: S, None] / D**0.5  # the landmark's own query
    p = (at * keys).sum(-1).softmax(-1)
    mark, entropy = (p[..., None] * keys).sum(3), -(p * p.log()).sum(-1)
    assert (entropy >= 0).all() and (entropy <= math.log(S)).all()
    group = HQ // H
    surrogate = (
        t["q"] @ mark.repeat_interleave(group, 1).transpose(2, 3) / D**0.5 + entropy.repeat_interleave(group, 1)[:, :, None]
    )
    assert (surrogate <= within_chunks(t)[1] + 1e-12).all()
    assert_close((at[:, :, :, 0] * mark).sum(-1) + entropy, (at * keys).sum(-1).logsumexp(-1))


# ---- suggested ------------------------------------------------------------------------------------------------------------------


def test_suggested_shorter_than_a_chunk(problem: Any, backend: str) -> None:
    out, lse = sd.compile(sd.patterns.hsa(S, K), backend=backend)(**problem(5), return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
def test_suggested_groups_of_all_sizes(problem: Any, group: int) -> None:
    t = problem(24, heads=group, kv_heads=1)
    done = kit.assert_matches_reference(sd.compile(sd.patterns.hsa(S, 2), backend="tiled"), **t)
    assert done == ("choices", "out", "lse", "dq", "dk", "dv", "dretrieval_q", "dlandmarks")


def test_suggested_equal_scores_weigh_the_same(problem: Any, backend: str, assert_close: Any) -> None:
    t = problem()
    t["landmarks"] = torch.ones_like(t["landmarks"])
    outs = within_chunks(t)[0]
    out = sd.compile(sd.patterns.hsa(S, L // S), backend=backend)(**t)
    for row in (S, 3 * S + 1, L - 1):
        assert_close(out[:, :, row], outs[:, :, row, : row // S].mean(2))
    twins = dict(t)  # equal chunks: whichever of them is taken, the result is one
    twins |= {name: t[name][:, :, :S].repeat(1, 1, L // S, 1) for name in "kv"}
    assert_close(sd.compile(sd.patterns.hsa(S, 1), backend=backend)(**twins)[:, :, -1], within_chunks(twins)[0][:, :, -1, 0])


def test_suggested_a_needle_is_found(problem: Any, backend: str, assert_close: Any) -> None:
    t = problem()
    t["landmarks"] = torch.eye(L // S, dtype=torch.float64).expand(B, H, -1, -1)
    t["retrieval_q"] = 1000 * torch.nn.functional.one_hot(torch.full((B, H, L), 2), L // S).double()
    out = sd.compile(sd.patterns.hsa(S, K), backend=backend)(**t)
    assert_close(out[:, :, 3 * S :], within_chunks(t)[0][:, :, 3 * S :, 2])


def test_suggested_noise_changes_choices_alone(problem: Any, backend: str) -> None:
    t = problem()
    heads = "batch marked_heads"
    by = sd.dot(sd.input("retrieval_q", f"{heads} queries marked_dim"), sd.input("landmarks", f"{heads} keys/{S} marked_dim"))
    ended = (sd.kv_idx // S + 1) * S <= sd.q_idx

    def attn(top_k: int, scores: Any) -> Any:
        selected = sd.top_k(scores, top_k, among=ended)
        return sd.compile(sd.attend(ended & selected, normaliser=sd.per_chunk(selected, scores=by)), backend=backend)

    noisy, seed = by.gumbel(sd.input("seed", "1")), torch.tensor([3])
    assert not torch.equal(attn(K, noisy)(**t, seed=seed), attn(K, by)(**t))
    assert torch.equal(attn(K, noisy)(**t, seed=seed), attn(K, noisy)(**t, seed=seed))
    # with all chunks picked there is nothing to choose, and noise is no part of the weights
    assert torch.equal(attn(50, noisy)(**t, seed=seed), attn(50, by)(**t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_suggested_low_precision(problem: Any, rule: str, dtype: torch.dtype) -> None:
    t = {name: x.to(dtype) for name, x in problem().items()}
    done = kit.assert_matches_reference(sd.compile(sd.patterns.hsa(S, K, rule), backend="tiled"), **t)
    assert "dlandmarks" in done
    if dtype == torch.bfloat16 and rule == "softmax":
        exact = sd.compile(sd.patterns.hsa(S, 50), backend="reference")(**{name: x.double() for name, x in t.items()})
        off = sd.compile(sd.patterns.hsa(S, 50), backend="tiled")(**t).double() - exact
        assert off.square().mean().sqrt() < 5e-3 * exact.square().mean().sqrt()
