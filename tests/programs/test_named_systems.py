"""Systems that the library has by name, beside the golden values of T17, T19, T21, T23 to T25 and T28 to T31, and beside plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.program.effect_rules import LATER_QUERIES
from tests.programs.choices_recipe import chosen, dig, numbers

Tensor = torch.Tensor
P = sd.patterns
ALLOW = [LATER_QUERIES]
N, HEADS, D = 41, 4, 8


def compiled(program: Any, backend: str) -> Any:
    return sd.compile(program, backend=backend, allow=ALLOW)


@pytest.fixture(scope="module")
def prompt() -> dict[str, Tensor]:
    k = numbers(52, 3, 64, 8)
    k[0, :3] *= 3
    return {"q": 2 * numbers(51, 3, 64, 8)[None], "k": k[None], "v": numbers(53, 3, 64, 8)[None]}


@pytest.fixture(scope="module")
def held() -> dict[str, Tensor]:
    """The problem of T21 to T28."""
    return {"q": 2 * numbers(71, 2, 40, 8)[None], "k": numbers(72, 2, 40, 8)[None], "v": numbers(73, 2, 40, 8)[None]}


@pytest.fixture(scope="module")
def tokens() -> dict[str, Tensor]:
    def drawn(*shape: int, seed: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return {
        "q": drawn(1, HEADS, N, D, seed=1), "k": drawn(1, 2, N, D, seed=2), "v": drawn(1, 2, N, D, seed=3),
        "retrieval_q": drawn(1, HEADS, N, 5, seed=4), "landmarks": drawn(1, HEADS, 6, 5, seed=5),
    }  # fmt: skip


# ---- golden values ---------------------------------------------------------------------------------------------------------------------


def test_T17_xattention(backend: str, prompt: Any) -> None:
    picked = chosen(compiled(P.xattention(4, 8, 0.7), backend), "top_p", **prompt)
    assert [rows[7] for rows in picked] == [[0, 2, 3, 4, 5, 7], [0, 1, 2, 3, 5, 7], [0, 3, 4, 5, 6, 7]]
    assert [sum(map(len, rows)) for rows in picked] == [28, 29, 28]


def test_T19_seer_attention(backend: str, prompt: Any) -> None:
    """Pooled before the rotation, which is that of the first token of a block."""
    q, k = (prompt[name][0].unflatten(1, (8, 8)) for name in "qk")
    pooled = torch.cat([k.amax(2), k.amin(2), k.mean(2)], -1)
    turned = []
    for rows in (q.mean(2) @ numbers(61, 3, 8, 4), pooled @ numbers(62, 3, 24, 4)):
        angle = 8 * torch.arange(8.0, dtype=torch.float64)[:, None] * 1e4 ** -torch.tensor([0.0, 0.5], dtype=torch.float64)
        one, other = rows.chunk(2, -1)
        turned.append(torch.cat([one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()], -1)[None])
    attn = compiled(P.seer_attention(8, 0.15), backend)
    picked = chosen(attn, "threshold", **prompt, gate_q=turned[0], gate_k=turned[1])
    assert sum(len(row) for rows in picked for row in rows) == 48
    assert sum(u not in row for rows in picked for u, row in enumerate(rows)) == 4


@pytest.mark.parametrize("how", ["mean", "max"])
def test_T21_snapkv(backend: str, held: Any, how: str) -> None:
    attn = compiled(P.snapkv(16, 6, 5, how=how), backend)
    stays = attn.choices(**held)["kept"][0]
    wanted = [5, 6, 7, 8, 9, 27, 28, 29, 30, 31] if how == "max" else [7, 8, 9, 21, 22, 25, 27, 28, 29, 30]
    assert stays[0].nonzero()[:, 0].tolist() == wanted
    if how == "max":
        return
    more = [torch.cat([held[x], numbers(n, 2, 3, 8)[None]], 2) for x, n in (("k", 74), ("v", 75))]
    out = sd.compile(P.retained(40, 6), backend=backend)(2 * numbers(76, 2, 3, 8)[None], *more, q_offset=40, stays=stays[None])
    assert abs(dig(out) - 0.0866095783) < 1e-8


def test_T23_heavy_hitters_of_all_queries_at_once(backend: str, held: Any) -> None:
    """The golden ranking leaves the last four keys out, which stay anyway; so that only keys before them are compared."""
    stays = compiled(P.h2o(40, 4), backend).choices(**held)["kept"]
    assert stays.all()
    paid = [
        (held["q"][0, h] @ held["k"][0, h].T * 8**-0.5).masked_fill(~torch.ones(40, 40).tril().bool(), -torch.inf) for h in (0, 1)
    ]
    for head, logits in enumerate(paid):
        mass = logits.softmax(-1).sum(0)
        wanted = mass.topk(5).indices.sort().values.tolist()
        assert compiled(P.h2o(5, 4), backend).choices(**held)["kept"][0, head].nonzero()[:, 0].tolist() == wanted
        assert wanted == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 6]][head]


def test_T24_quest(backend: str, held: Any) -> None:
    ranked = chosen(compiled(P.quest(4, 3, own=False), backend), "top_k", **held)
    assert [rows[39] for rows in ranked] == [[5, 6, 8], [0, 5, 9]]
    assert sd.analyse(P.quest(4, 3, own=False), 64).causal.status == "REFUTED"
    # With the own page in any case, earlier pages alone are ranked, and none is read ahead of.
    ranked = chosen(compiled(P.quest(4, 3), backend), "top_k", **held)
    assert all(page < row // 4 for rows in ranked for row, pages in enumerate(rows) for page in pages)
    assert ranked[0][39] == [5, 6, 8]
    assert sd.analyse(P.quest(4, 3), 64).causal == sd.PROVED


def test_T25_mosa(backend: str) -> None:
    """Tokens of 8 numbers, of which the golden choice of head 0 and the count of rows of zeros follow; its digest of the result does not
    follow from the recipe, and plain heads stand for it."""
    x, router, weights, back = numbers(81, 40, 8), numbers(82, 8, 3), numbers(83, 3, 8, 24), numbers(84, 3, 8, 8)
    attn = compiled(P.mosa(10), backend)

    def layer(x: Tensor) -> tuple[list[list[int]], Tensor]:
        scores = (x @ router).sigmoid().T
        q, k, v = (x @ weights)[None].split(8, -1)
        words = {"q": q, "k": k, "v": v, "router": scores[None], "weights": scores[None, ..., None]}
        kept = attn.choices(**words)["keep_tokens"][0]
        wanted = torch.zeros(3, 40, 8, dtype=torch.float64)
        for head, among in enumerate(kept):
            logits = q[0, head, among] @ k[0, head, among].T * 8**-0.5
            mass = logits.masked_fill(~torch.ones(10, 10).tril().bool(), -torch.inf).softmax(-1)
            wanted[head, among] = scores[head, among, None] * (mass @ v[0, head, among])
        out = attn(**words)[0]
        torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
        return kept.tolist(), (out @ back).sum(0)

    kept, out = layer(x)
    assert kept[0] == [7, 9, 15, 17, 19, 24, 25, 32, 37, 38]
    assert int((out == 0).all(-1).sum()) == 15
    x[39] += 3 * router[:, 0]
    assert layer(x)[0][0] == [7, 9, 15, 19, 24, 25, 32, 37, 38, 39]


def test_T28_vsa(backend: str, held: Any) -> None:
    attn = compiled(P.vsa(8, 2), backend)
    one = torch.ones(1, 2, 40, 1, dtype=torch.float64)
    assert chosen(attn, "top_k", **held, gate=one.expand(1, 2, 40, 2))[0] == [[0, 2], [2, 3], [3, 4], [2, 4], [3, 4]]
    # The golden gate has a number a channel, and stands on the coarse part alone.
    coarse, fine = (attn(**held, gate=torch.cat([part * one, (1 - part) * one], -1))[0] for part in (1, 0))
    assert abs(dig(numbers(90, 2, 40, 8) * coarse + fine) - 1.877320645) < 1e-8


def forgetful() -> dict[str, Tensor]:
    """The problem of T29 to T31: q, k, v, and the logarithms of the gates."""
    gates = torch.nn.functional.logsigmoid(4 * numbers(104, 2, 48) + torch.tensor([[4.0], [-1.0]], dtype=torch.float64))
    drawn = {"q": 2 * numbers(101, 2, 48, 8), "k": numbers(102, 2, 48, 8), "v": numbers(103, 2, 48, 8)}
    return {name: x[None] for name, x in (drawn | {"gates": gates}).items()}


def test_T29_forgetting(backend: str) -> None:
    given = forgetful()
    gates = given.pop("gates").requires_grad_()
    out = sd.compile(sd.attend(P.causal(), score=P.fox()), backend=backend)(**given, forget=gates.cumsum(-1))
    (slope,) = torch.autograd.grad(out, gates, numbers(105, 2, 48, 8)[None])
    found = [out[0, 1, 47, 0].item(), dig(out), slope[0, 0, 20].item()]
    assert found == pytest.approx([-0.2343250772, -8.545680729, 0.1116936816], abs=2e-9)


def test_T30_keys_that_are_forgotten_by_a_bound(backend: str) -> None:
    """What a query still remembers begins at a key that never moves back: a table of first keys, and a window to every backend."""
    given = forgetful()
    forget = given.pop("gates").cumsum(-1)
    reach = float(given["q"].norm(dim=-1).max() * given["k"].norm(dim=-1).max()) * 8**-0.5
    bound = -(2 * reach + math.log(48)) - 1
    assert [reach, bound] == pytest.approx([3.2324017687, -11.3360045483], abs=1e-9)
    causal = torch.ones(48, 48, dtype=torch.bool).tril()
    kept = causal & (forget[0, :, :, None] - forget[0, :, None, :] >= bound)
    begins = kept.int().argmax(-1)
    assert begins[:, 47].tolist() == [0, 41] and int((causal & ~kept).sum()) == 831
    first = sd.table("first", monotone=True)
    pruned = sd.attend(P.causal() & (sd.kv_idx >= first[sd.h, sd.q_idx]), score=P.fox())
    out = sd.compile(sd.attend(P.causal(), score=P.fox()), backend=backend)(**given, forget=forget)
    off = (sd.compile(pruned, backend=backend)(**given, forget=forget, first=begins) - out).abs().max()
    assert 1e-5 < float(off) < 5.92e-5 * float(given["v"].abs().max()) * 2


def test_T31_selective_attention_by_a_table(backend: str) -> None:
    """Sums of one head's logits along the queries, of the caller's making, are a table of queries x keys."""
    given = forgetful()
    del given["gates"]
    logits = (given["q"] @ given["k"].mT * 8**-0.5)[0, 0].relu().tril(-1)
    logits[:, 0] = 0
    selected = sd.table("selected", dtype=float)
    attn = sd.compile(sd.attend(P.causal(), score=sd.score - selected[sd.q_idx, sd.kv_idx]), backend=backend)
    sums = logits.cumsum(0) - logits
    assert sums[47, :3].tolist() == pytest.approx([0, 8.9574473589, 11.2319103023], abs=1e-9)
    assert dig(attn(**given, selected=sums)) == pytest.approx(-3.358183084, abs=2e-9)


# ---- plain loops ---------------------------------------------------------------------------------------------------------------------


def under_one_softmax(q: Tensor, near: list[int], k: Tensor, v: Tensor, far: list[tuple[float, list[int]]]) -> Tensor:
    """Keys by their logits, and chunks by scores, each with a softmax of its own keys inside."""
    logits = k @ q * D**-0.5
    weights = [float(logits[j].exp()) for j in near] + [math.exp(s) for s, _ in far]
    rows = [v[j] for j in near] + [logits[keys].softmax(0) @ v[keys] for _, keys in far]
    if not rows:
        return torch.zeros(D, dtype=torch.float64)
    return sum(w * row for w, row in zip(weights, rows, strict=True)) / sum(weights)  # type: ignore[return-value]


def assert_follows(program: Any, backend: str, tokens: dict[str, Tensor], one: Callable[[int, int], Tensor]) -> None:
    """``one(head, query)`` is what the program gives, whole and cut before the last ten."""
    wanted = torch.stack([torch.stack([one(h, t) for t in range(N)]) for h in range(HEADS)])
    attn = compiled(program, backend)
    given = {name: x for name, x in tokens.items() if name in {"q", "k", "v", *sd.Program(program).inputs}}
    torch.testing.assert_close(attn(**given)[0], wanted, rtol=1e-10, atol=1e-10)
    late = {name: x[:, :, -10:] if name in ("q", "retrieval_q") else x for name, x in given.items()}
    torch.testing.assert_close(attn(**late, q_offset=N - 10)[0], wanted[:, -10:], rtol=1e-10, atol=1e-10)


def best(scores: Tensor, candidates: list[int], count: int) -> list[int]:
    return sorted(candidates, key=lambda c: (-float(scores[c]), c))[:count]


def test_hsa_ultralong(backend: str, tokens: Any) -> None:
    given = tokens | {"retrieval_q": tokens["retrieval_q"][:, :2], "landmarks": tokens["landmarks"][:, :2]}

    def one(h: int, t: int) -> Tensor:
        scores = given["landmarks"][0, h // 2] @ given["retrieval_q"][0, h // 2, t] * 5**-0.5
        picked = best(scores, [c for c in range(6) if (c + 1) * 8 <= t], 2)
        far = [(float(scores[c]), [j for j in range(8 * c, 8 * c + 8) if j < N]) for c in picked]
        return under_one_softmax(
            tokens["q"][0, h, t], [*range(max(0, t - 4), t + 1)], tokens["k"][0, h // 2], tokens["v"][0, h // 2], far
        )

    assert_follows(P.hsa_ultralong(8, 2, 5), backend, given, one)


def test_landmark(backend: str, tokens: Any) -> None:
    given = tokens | {"landmarks": torch.cat([tokens["landmarks"], tokens["landmarks"]], -1)[:, :2, :, :D]}

    def one(h: int, t: int) -> Tensor:
        q = tokens["q"][0, h, t]
        scores = given["landmarks"][0, h // 2] @ q * D**-0.5
        far = [(float(scores[c]), [*range(8 * c, 8 * c + 8)]) for c in best(scores, [*range(t // 8)], 2)]
        return under_one_softmax(q, [*range(t // 8 * 8, t + 1)], tokens["k"][0, h // 2], tokens["v"][0, h // 2], far)

    assert_follows(P.landmark(8, 2), backend, given, one)


def test_hils(backend: str, tokens: Any) -> None:
    def one(h: int, t: int) -> Tensor:
        edge = (t - 16 + 1) // 8
        scores = torch.stack([tokens["landmarks"][0, x] @ tokens["retrieval_q"][0, x, t] for x in (h // 2 * 2, h // 2 * 2 + 1)])
        before = [c for c in range(6) if c < edge]
        shared = torch.stack([row[before].softmax(0) for row in scores]).amax(0) if before else torch.zeros(0)
        far = [(float(scores[h % 2, c]), [*range(8 * c, 8 * c + 7)]) for c in best(shared, before, 2)]
        near = [j for j in range(t + 1) if j // 8 >= edge and j % 8 != 7]
        return under_one_softmax(tokens["q"][0, h, t], near, tokens["k"][0, h // 2], tokens["v"][0, h // 2], far)

    assert_follows(P.hils(8, 2, 16), backend, tokens, one)


def test_mosa(backend: str, tokens: Any) -> None:
    """Tokens of a head, chosen over the whole sequence; what was not taken is 0, and one later token evicts an earlier one."""
    router = tokens["retrieval_q"][..., 0].sigmoid()
    attn, qkv = compiled(P.mosa(10), backend), {x: tokens[x] for x in "qkv"}
    got, wanted = attn(**qkv, router=router, weights=router[..., None])[0], torch.zeros(HEADS, N, D, dtype=torch.float64)
    for h in range(HEADS):
        kept = sorted(best(router[0, h], [*range(N)], 10))
        for n, t in enumerate(kept):
            rows = kept[: n + 1]
            mass = (tokens["k"][0, h // 2, rows] @ tokens["q"][0, h, t] * D**-0.5).softmax(0)
            wanted[h, t] = router[0, h, t] * (mass @ tokens["v"][0, h // 2, rows])
    torch.testing.assert_close(got, wanted)
    weights = router[..., None].clone().requires_grad_()
    attn(**qkv, router=router, weights=weights).sum().backward()
    assert torch.equal(weights.grad[0, ..., 0] != 0, wanted.any(-1))
    verdict = sd.analyse(P.mosa(10), N).causal
    assert verdict.status == "REFUTED" and "compares all keys of the call with each other, later ones too" in verdict.reason


def test_mosa_says_that_its_pieces_are_not_the_whole() -> None:
    """Later tokens compete for a place: training wants to hear that it is meant, and nobody promises that prefill is decoding."""
    attn, case = sd.compile(P.mosa(3)), kit.AttentionCase(heads=2, kv_heads=2, q_len=9, kv_len=9)
    assert LATER_QUERIES in attn.effects
    words = "all keys of the call are compared with each other, later ones too"
    with pytest.raises(sd.PatternError, match=words):
        kit.assert_prefill_equals_decode(attn, case)
    q, router = torch.randn(1, 2, 9, 8, requires_grad=True), torch.rand(1, 2, 9)
    with pytest.raises(sd.UnsupportedError, match=words):
        attn(q, q, q, router=router, weights=router[..., None])
    with pytest.raises(kit.Counterexample, match="choice keep_tokens"):
        kit.assert_causal(sd.compile(P.mosa(3), allow=[LATER_QUERIES]), case)


def test_differential(backend: str, tokens: Any) -> None:
    second = {"q_2": tokens["q"].flip(3), "k_2": tokens["k"].flip(2), "gate": torch.rand(1, HEADS, N, 2, dtype=torch.float64)}
    got = compiled(P.differential(), backend)(**{x: tokens[x] for x in "qkv"}, **second)
    wanted = torch.zeros_like(got)
    for h, t in ((h, t) for h in range(HEADS) for t in range(N)):
        for n, (q, k) in enumerate([(tokens["q"], tokens["k"]), (second["q_2"], second["k_2"])]):
            mass = (k[0, h // 2, : t + 1] @ q[0, h, t] * D**-0.5).softmax(0)
            wanted[0, h, t] += second["gate"][0, h, t, n] * (mass @ tokens["v"][0, h // 2, : t + 1])
    torch.testing.assert_close(got, wanted)


def test_absorbed_latent_attention_is_the_expanded_one(backend: str) -> None:
    q, turned_q, c, turned_k = (
        numbers(n, *shape) for n, shape in ((1, (3, 20, 6)), (2, (3, 20, 2)), (3, (20, 10)), (4, (20, 2)))
    )
    up_k, up_v = numbers(5, 3, 10, 6), numbers(6, 3, 10, 7)
    rows = torch.cat([c, turned_k], -1)[None, None]
    absorbed = torch.cat([q @ up_k.mT, turned_q], -1)[None]
    latent = sd.compile(P.mla(8), backend=backend)(absorbed, rows, rows[..., :10])[0]
    keys, queries = torch.cat([c @ up_k, turned_k.expand(3, 20, 2)], -1), torch.cat([q, turned_q], -1)
    wanted = torch.nn.functional.scaled_dot_product_attention(queries, keys, c @ up_v, is_causal=True)
    torch.testing.assert_close(latent @ up_v, wanted)


@pytest.mark.parametrize(("name", "decays"), [
    ("retnet", [1 - 2.0 ** (-5 - h) for h in range(4)]),
    ("lightning", [math.exp(-2.0 * h * 0.75) for h in range(4)]),
])  # fmt: skip
def test_constant_decays(backend: str, tokens: Any, name: str, decays: list[float]) -> None:
    program = P.retnet(4) if name == "retnet" else P.lightning(4, 5, 20)
    got = compiled(program, backend)(**{x: tokens[x] for x in "qkv"})
    t = torch.arange(N)
    for h, decay in enumerate(decays):
        fades = (decay ** (t[:, None] - t).double()).tril()
        weights = tokens["q"][0, h] @ tokens["k"][0, h // 2].T * D**-0.5 * fades
        torch.testing.assert_close(got[0, h], weights @ tokens["v"][0, h // 2])


def token_by_token(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None) -> Tensor:
    """One head: the state decays, takes in a token, and is read."""
    state, out = torch.zeros(q.shape[1], v.shape[1], dtype=q.dtype), []
    for t in range(len(q)):
        state = state * g[t].exp().reshape(-1, 1)
        state = state + torch.outer(k[t], v[t] if beta is None else beta[t] * (v[t] - k[t] @ state))
        out.append(q[t] @ state)
    return torch.stack(out)


@pytest.mark.parametrize("name", ["gla", "ssd", "delta_net", "gated_delta", "kda"])
def test_recurrences(backend: str, tokens: Any, name: str) -> None:
    """The published step, in float64, to 1e-10."""
    delta, vector = name in ("delta_net", "gated_delta", "kda"), name in ("gla", "kda")
    g = -tokens["q"][:, :2].abs() if vector else -tokens["q"][:, :2, :, 0].abs()
    beta = tokens["v"][..., 0].sigmoid()
    inputs = ({} if name == "delta_net" else {"g": g}) | ({"beta": beta} if delta else {})
    got = sd.compile(getattr(P, name)(), backend=backend)(**{x: tokens[x][:, :2] for x in "qkv"}, **inputs)[0]
    for h in range(2):
        q, k, v = (tokens[x][0, h] for x in "qkv")
        if delta:
            q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        q = q if name == "ssd" else q * D**-0.5
        wanted = token_by_token(q, k, v, torch.zeros(N) if name == "delta_net" else g[0, h], beta[0, h] if delta else None)
        torch.testing.assert_close(got[h], wanted, rtol=1e-10, atol=1e-10)


def test_based(backend: str, tokens: Any) -> None:
    got = sd.compile(P.based(), backend=backend)(**{x: tokens[x] for x in "qkv"})[0]
    for h in range(HEADS):
        s = tokens["q"][0, h] @ tokens["k"][0, h // 2].T * D**-0.5
        weights = (1 + s + s.square() / 2).tril()
        torch.testing.assert_close(got[h], weights @ tokens["v"][0, h // 2] / (weights.sum(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: P.xattention(3, 8), "xattention(): stride must divide block, which is 8; got 3"),
        (lambda: P.seer_attention(0), "seer_attention(): block must be at least 1; got 0"),
        (lambda: P.vsa(8, 0), "vsa(): top_k must be at least 1; got 0"),
        (lambda: P.snapkv(8, 8), "snapkv(): capacity must be at least 9 (the window stays, and one key before it); got 8"),
        (lambda: P.snapkv(how="sum"), "snapkv(): how must be one of 'mean', 'max'; got 'sum'"),
        (lambda: P.h2o(heavy=0), "h2o(): heavy must be at least 1; got 0"),
        (lambda: P.mosa(1), "mosa(): count must be at least 2; got 1"),
        (lambda: P.quest(own=1), "quest(): own must be True or False; got 1 (int)"),
        (lambda: P.landmark(block=0), "landmark(): block must be at least 1; got 0"),
        (lambda: P.hils(window=100), "hils(): window must be a multiple of chunk, which is 64; got 100"),
        (lambda: P.hsa_ultralong(window=0), "hsa_ultralong(): window must be at least 1; got 0"),
        (lambda: P.retained(0), "retained(): prompt must be at least 1; got 0"),
        (lambda: P.mla(0), "mla(): head_dim must be at least 1; got 0"),
        (lambda: P.retnet(0), "retnet(): heads must be at least 1; got 0"),
        (lambda: P.kerple(kernel="exp"), "kerple(): kernel must be one of 'log', 'power'; got 'exp'"),
        (lambda: P.fire(0), "fire(): width must be at least 1; got 0"),
    ],
)
def test_errors_name_the_argument(make: Any, words: str) -> None:
    with pytest.raises(sd.PatternError) as error:
        make()
    assert words in str(error.value)


def test_what_is_proved_of_them() -> None:
    causal = {
        "hsa_ultralong": P.hsa_ultralong(), "landmark": P.landmark(), "hils": P.hils(), "quest": P.quest(), "mla": P.mla(),
        "differential": P.differential(), "retnet": P.retnet(4), "lightning": P.lightning(4, 0, 4),
    }  # fmt: skip
    for name, program in causal.items():
        assert sd.analyse(program, 256, **({"heads": 4} if "n" in name[-3:] else {})).causal == sd.PROVED, name
    for name, program in {
        "xattention": P.xattention(),
        "snapkv": P.snapkv(),
        "h2o": P.h2o(),
        "vsa": P.vsa(),
        "mosa": P.mosa(),
    }.items():
        assert sd.analyse(program, 256).causal != sd.PROVED, name
