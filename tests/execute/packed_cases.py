"""Random mixes of requests over pages, with everything that nobody may read poisoned, and what each request gets by itself."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, q_idx, score

Tensor = torch.Tensor
CAUSAL = kv_idx <= q_idx
win, near, keep, bias = sd.table("win"), sd.table("near"), sd.table("keep", dtype=bool), sd.table("bias", learned=True)
LONGEST = 80

PATTERNS: dict[str, Any] = {
    "causal": CAUSAL,
    "window": sd.patterns.sliding_window(13),
    "streaming": sd.patterns.streaming_llm(10, 3),
    "chunked": CAUSAL & (kv_idx // 16 == q_idx // 16),
    "blocks back": CAUSAL & (q_idx // 8 - kv_idx // 8 < 2),
    "dilated": CAUSAL & ((q_idx - kv_idx) % 4 == 0) & (q_idx - kv_idx < 24),
    "prefix": (kv_idx < 5) | (CAUSAL & (q_idx - kv_idx < 9)),
    "both ways": abs(q_idx - kv_idx) < 7,
    "all": kv_idx >= 0,
    "by request": CAUSAL & (q_idx - kv_idx < win[b]),
    "by head": CAUSAL & (q_idx - kv_idx < near[h]),
    "tiles": CAUSAL & keep[h, q_idx // 8, kv_idx // 8],
    "length": CAUSAL & (kv_idx >= sd.kv_len - 20),
    "alibi": sd.attend(sd.patterns.sliding_window(17), score=sd.patterns.alibi(4)),
    "soft cap": sd.attend(CAUSAL, score=sd.tanh(score / 3) * 3, sink=0.5),
    "learned": sd.attend(sd.patterns.sliding_window(11), score=score + bias[h, q_idx - kv_idx]),
    "sigmoid": sd.attend(CAUSAL & (q_idx - kv_idx < 12), score=sd.sigmoid(score), normaliser="pointwise"),
}


def tables_of(name: str, requests: int, seed: int = 0) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {
        "by request": {"win": torch.randint(1, 30, (requests,), generator=made)},
        "by head": {"near": torch.tensor([1, 5, 30, 9])},
        "tiles": {"keep": torch.rand(4, LONGEST // 8 + 1, LONGEST // 8 + 1, generator=made) < 0.4},
        "learned": {"bias": torch.randn(4, 11, generator=made, dtype=torch.float64).requires_grad_()},
    }.get(name, {})


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dataclass
class Mix:
    """Some requests, each ``(first query, queries, keys)``, and their rows."""

    requests: list[tuple[int, int, int]]
    padding: int = 0
    heads: int = 4
    kv_heads: int = 2
    dims: tuple[int, int] = (8, 12)
    seed: int = 0
    dtype: torch.dtype = torch.float64
    q: Tensor = field(init=False)
    keys: list[tuple[Tensor, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        rows = sum(n for _, n, _ in self.requests) + self.padding
        self.q = numbers(rows, self.heads, self.dims[0], seed=self.seed, dtype=self.dtype)
        self.keys = [
            (
                numbers(kv, self.kv_heads, self.dims[0], seed=self.seed + 7 * n + 1, dtype=self.dtype),
                numbers(kv, self.kv_heads, self.dims[1], seed=self.seed + 7 * n + 2, dtype=self.dtype),
            )
            for n, (_, _, kv) in enumerate(self.requests)
        ]

    @property
    def cu_q(self) -> Tensor:
        return torch.tensor([0, *(n for _, n, _ in self.requests)]).cumsum(0)

    @property
    def cu_k(self) -> Tensor:
        return self.kv_lens.cumsum(0) if not self.requests else torch.nn.functional.pad(self.kv_lens.cumsum(0), (1, 0))

    @property
    def q_lens(self) -> Tensor:
        return torch.tensor([n for _, n, _ in self.requests], dtype=torch.int64)

    @property
    def kv_lens(self) -> Tensor:
        return torch.tensor([n for _, _, n in self.requests], dtype=torch.int64)

    @property
    def starts(self) -> Tensor:
        return torch.tensor([n for n, _, _ in self.requests], dtype=torch.int64)

    @staticmethod
    def drawn(seed: int, least: int = 1, most: int = 6) -> Mix:
        """Prompts, pieces of prompts, single tokens, a few drafted ones, nothing; queries at the end as a rule."""
        rng = random.Random(seed)
        found = []
        for _ in range(rng.randint(least, most)):
            queries = rng.choice([0, 1, 1, 1, 2, 3, 5, rng.randint(6, 40)])
            seen = rng.choice([0, 1, rng.randint(0, 15), rng.randint(16, LONGEST - 40)])
            keys = queries + seen
            start = seen if rng.random() < 0.8 else rng.randint(0, seen)
            found.append((start, queries, keys if rng.random() < 0.95 else 0))
        return Mix(found, padding=rng.choice([0, 0, 3]), seed=rng.randint(0, 10**6))

    def wanted(self, pattern: Any, tables: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Each request in an ordinary call of the dense meaning, among as many batch entries as make it the one it is."""
        attn = sd.compile(pattern, backend="reference")
        out = torch.zeros(self.q.shape[0], self.heads, self.dims[1], dtype=self.dtype)
        real = torch.float64 if self.dtype == torch.float64 else torch.float32
        lse = torch.full((self.heads, self.q.shape[0]), -float("inf"), dtype=real)
        begin = 0
        for n, (start, queries, _) in enumerate(self.requests):
            rows = slice(begin, begin + queries)
            begin += queries
            q, k, v = (x.transpose(0, 1)[None].expand(n + 1, -1, -1, -1) for x in (self.q[rows], *self.keys[n]))
            if not queries:
                continue
            weight = None
            if attn.has_lse:
                found, weight = attn(q, k, v, q_offset=start, return_lse=True, **tables)
            else:
                found = attn(q, k, v, q_offset=start, **tables)
            out[rows] = found[n].transpose(0, 1)
            if weight is not None:
                lse[:, rows] = weight[n]
        return out, lse

    def pools(self, page: int, bad: float = float("nan"), *, spare: int = 3) -> tuple[Tensor, Tensor, Tensor]:
        """Pools in which all that is no key is ``bad``, and the table of pages, in no order."""
        counts = [-(-kv // page) for _, _, kv in self.requests]
        rng = random.Random(self.seed)
        free = list(range(sum(counts) + spare))
        rng.shuffle(free)
        table = torch.tensor([[-1] * (max(counts, default=0) + 2) for _ in counts], dtype=torch.int32).reshape(len(counts), -1)
        k_pool, v_pool = (torch.full((len(free), page, self.kv_heads, width), bad, dtype=self.dtype) for width in self.dims)
        for n, count in enumerate(counts):
            for number in range(count):
                place = free.pop()
                table[n, number] = place
                for pool, x in zip((k_pool, v_pool), self.keys[n], strict=True):
                    rows = x[number * page : (number + 1) * page]
                    pool[place, : len(rows)] = rows
            table[n, count:] = rng.choice([-1, 2**30])
        return k_pool, v_pool, table


def free_what_nobody_sees(pages: sd.VisiblePages, k_pool: Tensor, v_pool: Tensor, table: Tensor, bad: float) -> None:
    """Poison the pages that are not listed, and forget where they were."""
    kept = torch.zeros(table.shape, dtype=torch.bool)
    kept[pages.owners, pages.indices.long()] = True
    live = torch.zeros(len(k_pool), dtype=torch.bool)
    live[table[kept].long()] = True
    k_pool[~live], v_pool[~live] = bad, bad
    table[~kept] = 2**30
