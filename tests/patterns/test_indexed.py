"""Patterns that follow an index or lists, beside loops over single queries; and their errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import sparsedsl as sd

Tensor = torch.Tensor
P = sd.patterns
N, HEADS, D = 41, 4, 8


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def tokens() -> dict[str, Tensor]:
    return {"q": drawn(1, HEADS, N, D, seed=1), "k": drawn(1, 2, N, D, seed=2), "v": drawn(1, 2, N, D, seed=3)}


INDEX = {"index_q": drawn(1, 3, N, 5, seed=4), "index_k": drawn(1, 1, N, 5, seed=5), "index_weights": drawn(1, 3, N, seed=6)}


def indexed(t: int, rows: Tensor) -> list[float]:
    """The indexer's score of every row for query t."""
    found = []
    for row in rows:
        products = [max(0.0, float(q @ row)) for q in INDEX["index_q"][0, :, t]]
        found.append(sum(float(w) * x for w, x in zip(INDEX["index_weights"][0, :, t], products, strict=True)))
    return found


def best(count: int, heights: Sequence[float], candidates: Sequence[int], first: Sequence[int] = ()) -> list[int]:
    """The candidates of the greatest heights, the forced ones before them."""
    forced = [n for n in candidates if n in first]
    others = sorted((n for n in candidates if n not in first), key=lambda n: (-heights[n], n))
    return sorted([*forced, *others][:count])


def softmax_over(q: Tensor, keys: Tensor, values: Tensor, sink: float | None = None) -> Tensor:
    """Attention of one query to some rows."""
    logits = keys @ q * D**-0.5
    share = torch.cat([logits, logits.new_tensor([] if sink is None else [sink])]).softmax(0)[: len(keys)]
    return share @ values if len(keys) else values.new_zeros(values.shape[1])


def rows_of(tokens: dict[str, Tensor], h: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a query head."""
    return tokens["q"][0, h], tokens["k"][0, h // 2], tokens["v"][0, h // 2]


def assert_follows(pattern: Any, tokens: dict[str, Tensor], one: Callable[[int, int], Tensor], **named: Tensor) -> None:
    """``one(head, query)`` is what the pattern gives, on both backends, whole and from the middle on."""
    wanted = torch.stack([torch.stack([one(h, t) for t in range(N)]) for h in range(HEADS)])
    for backend in ("reference", "tiled"):
        attn = sd.compile(pattern, backend=backend)
        torch.testing.assert_close(attn(**tokens, **named)[0], wanted, rtol=1e-10, atol=1e-10)
        late = {name: x.narrow(2, 30, N - 30) if name in ("q", "index_q", "index_weights", "gate", "blocks") else x for name, x in
                (tokens | named).items()}  # fmt: skip
        torch.testing.assert_close(attn(**late, q_offset=30)[0], wanted[:, 30:], rtol=1e-10, atol=1e-10)


def test_dsa(tokens: Any) -> None:
    def one(h: int, t: int) -> Tensor:
        q, k, v = rows_of(tokens, h)
        keys = best(6, indexed(t, INDEX["index_k"][0, 0]), range(t + 1))
        return softmax_over(q[t], k[keys], v[keys])

    assert_follows(P.dsa(6), tokens, one, **INDEX)


def test_hisa(tokens: Any) -> None:
    means = torch.stack([rows.mean(0) for rows in INDEX["index_k"][0, 0].split(4)])

    def one(h: int, t: int) -> Tensor:
        q, k, v = rows_of(tokens, h)
        over = [u for u in range(len(means)) if (u + 1) * 4 <= t or u == t // 4]
        blocks = best(3, indexed(t, means), over, (0, t // 4))
        keys = best(6, indexed(t, INDEX["index_k"][0, 0]), [j for j in range(t + 1) if j // 4 in blocks])
        return softmax_over(q[t], k[keys], v[keys])

    assert_follows(P.hisa(4, 3, 6), tokens, one, **INDEX)


@pytest.mark.parametrize("sink", [None, 0.7])
def test_csa_and_hca(tokens: Any, sink: float | None) -> None:
    shared = {"entries": drawn(1, 2, N // 4, D, seed=7), "index_entries": drawn(1, 1, N // 4, 5, seed=8)}
    tokens = tokens | {"v": tokens["k"]}

    def one(h: int, t: int, count: int | None) -> Tensor:
        q, k, _ = rows_of(tokens, h)
        over = [w for w in range(N // 4) if (w + 1) * 4 <= t + 1]
        picked = over if count is None else best(count, indexed(t, shared["index_entries"][0, 0]), over)
        rows = torch.cat([k[max(0, t - 5) : t + 1], shared["entries"][0, h // 2][picked]])
        return softmax_over(q[t], rows, rows, sink)

    named = {name: x for name, x in INDEX.items() if name != "index_k"} | shared
    assert_follows(P.csa(4, 3, 6, sink=sink), tokens, lambda h, t: one(h, t, 3), **named)
    assert_follows(P.hca(4, 6, sink=sink), tokens, lambda h, t: one(h, t, None), entries=shared["entries"])


def test_csa_of_means(tokens: Any) -> None:
    """Heads of a group pick together."""
    means = {name: tokens[name][0, :, : N // 4 * 4].unflatten(1, (-1, 4)).mean(2) for name in "kv"}

    def one(h: int, t: int) -> Tensor:
        q, k, v = rows_of(tokens, h)
        over = [w for w in range(N // 4) if (w + 1) * 4 <= t + 1]
        group = (h // 2 * 2, h // 2 * 2 + 1)
        liked = {w: sum(float((tokens["q"][0, g, t] @ means["k"][h // 2, w]).relu()) for g in group) for w in over}
        picked = sorted(over, key=lambda w: (-liked[w], w))[:3]
        near = slice(max(0, t - 5), t + 1)
        seen, held = (torch.cat([rows[near], means[name][h // 2, picked]]) for name, rows in (("k", k), ("v", v)))
        return softmax_over(q[t], seen, held)

    assert_follows(P.csa(4, 3, 6, compressed="mean"), tokens, one)


def test_qsa(tokens: Any) -> None:
    blocks = torch.stack([torch.randperm(11, generator=torch.Generator().manual_seed(t))[:4] for t in range(N)])
    blocks[::3, 1] = -1

    def one(h: int, t: int) -> Tensor:
        q, k, v = rows_of(tokens, h)
        keys = [j for j in range(t + 1) if j // 4 in blocks[t].tolist()]
        return softmax_over(q[t], k[keys], v[keys])

    assert_follows(P.qsa(4), tokens, one, blocks=blocks[None, None])


def window_means(x: Tensor) -> Tensor:
    """Of six keys, one every two."""
    return torch.stack([x[c : c + 6].mean(0) for c in range(0, len(x) - 5, 2)])


def paid(tokens: dict[str, Tensor], group: int, t: int, how: str) -> list[float]:
    """What the heads of a group pay each block of eight tokens."""
    kc = window_means(tokens["k"][0, group])
    over = [c for c in range(len(kc)) if 2 * c + 6 <= t + 1]
    heights = [0.0] * -(-N // 8)
    mass = torch.zeros(len(kc), dtype=torch.float64)
    for h in (2 * group, 2 * group + 1):
        if over:
            mass[over] += (kc[over] @ tokens["q"][0, h, t] * D**-0.5).softmax(0)
    for u in range(len(heights)):
        for c in range(len(kc)):
            shared = len(set(range(u * 8, u * 8 + 8)) & set(range(2 * c, 2 * c + 6))) // 2
            heights[u] = heights[u] + shared * float(mass[c]) if how == "sum" else max(heights[u], float(mass[c]) * bool(shared))
    return heights


def test_nsa_published(tokens: Any) -> None:
    gate = torch.rand(1, HEADS, N, 3, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def one(h: int, t: int) -> Tensor:
        q, k, v = rows_of(tokens, h)
        kc, vc = window_means(k), window_means(v)
        over = [c for c in range(len(kc)) if 2 * c + 6 <= t + 1]
        blocks = best(3, paid(tokens, h // 2, t, "sum"), range(t // 8 + 1), (0, t // 8, t // 8 - 1))
        keys = [j for j in range(t + 1) if j // 8 in blocks]
        near = slice(max(0, t - 4), t + 1)
        parts = softmax_over(q[t], kc[over], vc[over]), softmax_over(q[t], k[keys], v[keys]), softmax_over(q[t], k[near], v[near])
        return sum(g * part for g, part in zip(gate[0, h, t], parts, strict=True))  # type: ignore[return-value]

    assert_follows(P.nsa_published(6, 2, 8, 3, 5), tokens, one, gate=gate)


def test_infllm_v2(tokens: Any) -> None:
    def one(h: int, t: int) -> Tensor:
        q, k, v = rows_of(tokens, h)
        blocks = best(3, paid(tokens, h // 2, t, "max"), range(t // 8 + 1), (0, t // 8, t // 8 - 1))
        keys = [j for j in range(t + 1) if j // 8 in blocks]
        return softmax_over(q[t], k[keys], v[keys])

    assert_follows(P.infllm_v2(6, 2, 8, 3, 1), tokens, one)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: P.dsa(0), "dsa(): top_k must be at least 1; got 0"),
        (lambda: P.hisa(block=0), "hisa(): block must be at least 1; got 0"),
        (lambda: P.hisa(blocks=1.5), "hisa(): blocks must be a whole number; got 1.5"),
        (lambda: P.csa(window=0), "csa(): window must be at least 1; got 0"),
        (lambda: P.hca(block=-1), "hca(): block must be at least 1; got -1"),
        (lambda: P.hca(sink="one"), "hca(): sink"),
        (lambda: P.qsa(0), "qsa(): unit must be at least 1; got 0"),
        (
            lambda: P.nsa_published(stride=12),
            "nsa_published(): stride must divide length and select, which are 32 and 64; got 12",
        ),
        (lambda: P.infllm_v2(local=-1), "infllm_v2(): local must be at least 0; got -1"),
    ],
)
def test_errors_name_the_argument(make: Any, words: str) -> None:
    with pytest.raises(sd.PatternError) as error:
        make()
    assert words in str(error.value)


def test_what_is_proved_of_them() -> None:
    for pattern in (P.dsa(), P.csa(), P.hca(), P.qsa(), P.nsa_published(), P.infllm_v2()):
        assert sd.analyse(pattern, 256).causal == sd.PROVED, pattern
    assert sd.analyse(P.hisa(), 256).causal.status == "REFUTED"
