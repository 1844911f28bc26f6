"""Whether a measured kernel is right: attention of one key head as in a textbook, from the masks written by hand, in float32.

Nothing of sparsedsl is used. How far off a row of a result may be (as a vector: the norm of the difference) follows from what a kernel
must round to the dtype of the inputs, with unit ``eps``, twice the largest rounding: the row itself; each weight and each gradient of a
logit before it enters a product, independent of each other, hence a root of a sum of squares; and the output, whose product with
its gradient is taken off every gradient of a logit of its row. To that comes what float32 loses where large terms cancel. One limit
for all rows would not do: late rows of a causal mask average over thousands of keys and are a hundred times smaller than the first.
Where the whole square is too large, some rows are checked, and dk and dv are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Checked", "Problem", "reference"]

# Query heads of the group x queries x keys, up to which all rows are computed; and elements of a chunk of them.
MOST_PAIRS, CHUNK_PAIRS = 1 << 32, 1 << 27
SOME_ROWS = 256
# A float32 rounding of each term before terms cancel, and some more for sums of many.
CANCELLING = 2.0**-20

Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """Tensors of a call ``(B, H, S, D)``, the hand-written mask and score, and the position of the first query; ``d_out`` or None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    d_out: torch.Tensor | None
    mask_mod: Callable[..., torch.Tensor]
    score_mod: Callable[..., torch.Tensor] | None
    q_offset: int = 0

    @property
    def group(self) -> int:
        """Query heads for each key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def is_whole(self) -> bool:
        """Whether all rows can be computed, so that dk and dv can be checked."""
        return self.group * self.q.shape[2] * self.k.shape[2] <= MOST_PAIRS

    def rows(self) -> torch.Tensor:
        """The rows that are computed: all, or the first, the last and some between."""
        length, device = self.q.shape[2], self.q.device
        if self.is_whole or length <= SOME_ROWS:
            return torch.arange(length, device=device)
        generator = torch.Generator().manual_seed(0)
        inner = 1 + torch.randperm(length - 2, generator=generator)[: SOME_ROWS - 2].sort().values
        return torch.cat([torch.tensor([0]), inner, torch.tensor([length - 1])]).to(device)


@dataclass(frozen=True)
class Checked:
    """Float32 results of batch 0 and the last key head, each ``(.., rows, D)``, and how far off each row may be."""

    values: Results
    allowed: Results
    rows: torch.Tensor
    heads: slice

    def errors(self, got: Results) -> dict[str, Any]:
        """Of each result: the largest error, the worst row's share of what it is allowed, and whether that is at most 1."""
        found: dict[str, Any] = {}
        for name, tensor in got.items():
            if name not in self.values:
                continue
            wanted = self.values[name]
            part = tensor.detach()[0, -1] if name in ("dk", "dv") else tensor.detach()[0, self.heads].index_select(1, self.rows)
            off = part.float() - wanted
            shares = off.norm(dim=-1) / self.allowed[name]
            worst = float(shares.max())  # NaN stays NaN, and is not <= anything
            found[name] = {
                "largest": float(off.abs().max()),
                "relative": float(off.norm() / wanted.norm().clamp_min(1e-30)),
                "of_allowed": worst if worst == worst else "nan",
                "right": bool(worst <= 1.0),
            }
        return found


def reference(problem: Problem) -> Checked:
    """Compute the rows of :class:`Checked`, chunk by chunk."""
    heads = slice(problem.q.shape[1] - problem.group, problem.q.shape[1])
    rows, eps = problem.rows(), torch.finfo(problem.q.dtype).eps
    k, v = (t[0, -1].detach().float() for t in (problem.k, problem.v))
    k_squares, v_squares = k.square().sum(dim=-1), v.square().sum(dim=-1)
    k_most, v_most = float(k_squares.max().sqrt()), float(v_squares.max().sqrt())
    scale = problem.q.shape[3] ** -0.5
    sums = _Sums()
    with torch.no_grad():
        for some in rows.split(max(1, CHUNK_PAIRS // (problem.group * k.shape[0]))):
            q = problem.q[0, heads].detach().index_select(1, some).float()
            scores, slopes = _scores(problem, heads, some, (q @ k.T) * scale)
            weights = torch.softmax(scores, dim=-1)
            out = weights @ v
            rounded = (weights.square() @ v_squares).sqrt()
            sums.add_rows("out", out, eps * (_norm(out) + rounded) + CANCELLING * v_most)
            if problem.d_out is None:
                continue
            d_out = problem.d_out[0, heads].index_select(1, some).float()
            d_logits = weights * (d_out @ v.T - (d_out * out).sum(dim=-1, keepdim=True)) * slopes * scale
            of_out = (
                _norm(d_out) * _norm(out) * scale
            )  # by how much eps of the output moves a gradient of a logit, over its weight
            cancelling = _norm(d_out) * (v_most * scale)
            dq = d_logits @ k
            rounded = (d_logits.square() @ k_squares).sqrt() + of_out * _norm(weights @ k)
            sums.add_rows("dq", dq, eps * (_norm(dq) + rounded) + CANCELLING * cancelling * k_most)
            # Sums over queries, of values and of squares: their roots are taken at the end.
            sums.add_keys("dk", torch.einsum("gqk,gqd->kd", d_logits, q))
            sums.add_keys("dv", torch.einsum("gqk,gqd->kd", weights, d_out))
            q_norm = _norm(q)
            sums.add_keys("dk rounded", torch.einsum("gqk,gq->k", d_logits.square(), q_norm.square()))
            sums.add_keys("dk out", torch.einsum("gqk,gq->k", weights.square(), (of_out * q_norm).square()))
            sums.add_keys("dk cancelling", torch.einsum("gqk,gq->k", weights, cancelling * q_norm))
            sums.add_keys("dv rounded", torch.einsum("gqk,gq->k", weights.square(), _norm(d_out).square()))
            sums.add_keys("dv cancelling", torch.einsum("gqk,gq->k", weights, _norm(d_out)))
    values, allowed = ({name: torch.cat(parts, dim=1) for name, parts in kind.items()} for kind in (sums.rows, sums.allowed))
    if problem.d_out is not None and problem.is_whole:
        keys = sums.keys
        values |= {"dk": keys["dk"], "dv": keys["dv"]}
        dk_rounded, dv_rounded = keys["dk rounded"].sqrt() + keys["dk out"].sqrt(), keys["dv rounded"].sqrt()
        allowed["dk"] = eps * (_norm(keys["dk"]) + dk_rounded) + CANCELLING * keys["dk cancelling"]
        allowed["dv"] = eps * (_norm(keys["dv"]) + dv_rounded) + CANCELLING * keys["dv cancelling"]
    return Checked(values, allowed, rows, heads)


@dataclass
class _Sums:
    """Results of rows, one chunk after the other, and sums over all rows for each key."""

    rows: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    allowed: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    keys: dict[str, torch.Tensor] = field(default_factory=dict)

    def add_rows(self, name: str, values: torch.Tensor, allowed: torch.Tensor) -> None:
        self.rows.setdefault(name, []).append(values)
        self.allowed.setdefault(name, []).append(allowed)

    def add_keys(self, name: str, values: torch.Tensor) -> None:
        self.keys[name] = self.keys[name].add_(values) if name in self.keys else values


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x.norm(dim=-1)


def _scores(problem: Problem, heads: slice, rows: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Modified, masked logits of these rows, and their derivative by the logits."""
    device = logits.device
    b = torch.zeros((), dtype=torch.int64, device=device)
    h = torch.arange(heads.start, heads.stop, device=device)[:, None, None]
    q_idx = (rows + problem.q_offset)[None, :, None]
    kv_idx = torch.arange(logits.shape[2], device=device)[None, None, :]
    allowed = problem.mask_mod(b, h, q_idx, kv_idx)
    slopes: Any = 1.0
    scores = logits
    if problem.score_mod is not None:
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            modified = problem.score_mod(leaf, b, h, q_idx, kv_idx)
            (slopes,) = torch.autograd.grad(modified.sum(), leaf)
        scores = modified.detach()
    return scores.masked_fill(~allowed, float("-inf")), slopes
