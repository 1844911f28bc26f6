"""What attention must give, and how far off it may be: plain attention in float64, and a tolerance measured, not tuned.

A result may be off by twice as much as the plainest implementation in the same precision, plus one rounding: of every weight
and output in the dtype of the inputs, and of every logit, LSE and scaled query in the dtype of accumulation (a backward pass may make
the weights again from these). What should be finite must be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.lang.evaluate import evaluate
from sparsedsl.lang.pattern import Pattern
from sparsedsl.testing.shapes import AttentionCase

__all__ = ["Expected", "Results", "expect", "plain_attention"]

Results = dict[str, torch.Tensor]  # "out", "lse", and "dq", "dk", "dv", "d<table>" where gradients are asked for


def case_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_offset: int = 0) -> AttentionCase:
    """The shape of a call."""
    (batch, heads, q_len, head_dim), (kv_heads, kv_len), head_dim_v = q.shape, k.shape[1:3], v.shape[3]
    return AttentionCase(batch, heads, kv_heads, q_len, kv_len, head_dim, head_dim_v, q_offset)


@dataclass(frozen=True)
class Terms:
    """The intermediate values of one attention, each ``(batch, heads, q_len, kv_len)``; ``slopes``: d score / d logit."""

    logits: torch.Tensor
    scores: torch.Tensor
    weights: torch.Tensor
    slopes: torch.Tensor

    def detached(self) -> Terms:
        """Without the graph."""
        return Terms(*(x.detach() for x in (self.logits, self.scores, self.weights, self.slopes)))


def plain_attention(
    pattern: Pattern,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: Mapping[str, torch.Tensor],
    *,
    q_offset: int = 0,
    scale: float | None = None,
    rounded: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Terms]:
    """Attention as in a textbook, in the dtype of ``q``: ``(out, lse, terms)``.

    Weights and output are rounded to ``rounded`` if given. Shares nothing with the lowerings but the evaluator of
    expressions; heads are copied, softmax is torch's logsumexp.
    """
    case, dtype = case_of(q, k, v, q_offset), q.dtype
    if scale is None:
        scale = pattern.scale or case.head_dim**-0.5
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, dim=1) for x in (k, v))
    shape = case.positions.shape
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    env = {**case.env, **tables}
    allowed = evaluate(pattern.mask.expr, env).expand(shape)
    env["score"] = logits.masked_fill(~allowed, 1.0)
    scores = evaluate(pattern.score.expr, env, dtype=dtype).to(dtype).expand(shape)
    scores = scores.masked_fill(~allowed, float("-inf"))
    columns = scores
    if pattern.sink is not None:
        sink = evaluate(pattern.sink.expr, env, dtype=dtype).to(dtype).expand(*shape[:3], 1)
        columns = torch.cat([scores, sink], dim=3)
    empty = (columns == float("-inf")).all(dim=3)
    lse = torch.logsumexp(columns.masked_fill(empty[..., None], 0.0), dim=3)
    weights = torch.exp(scores - lse[..., None]).masked_fill(empty[..., None], 0.0)
    if rounded is None:
        out = weights @ v
    else:
        out = (weights.to(rounded).to(dtype) @ v).to(rounded)
    return out, lse.masked_fill(empty, float("-inf")), Terms(logits, scores, weights, _slopes(scores, logits))


def _slopes(scores: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    if not scores.requires_grad:
        return torch.ones_like(logits)
    (found,) = torch.autograd.grad(scores.sum(), logits, retain_graph=True, allow_unused=True)
    return torch.zeros_like(logits) if found is None else found


@dataclass(frozen=True)
class Expected:
    """Results in float64, and how far a result of the tested precision may be off in any element."""

    values: Results
    tolerance: dict[str, float]

    def fault(self, name: str, got: torch.Tensor, wanted: torch.Tensor | None = None) -> str | None:
        """What is wrong with a result, in words, or None. ``wanted``: a part or rearrangement of the expected values."""
        wanted = self.values[name] if wanted is None else wanted
        if got.shape != wanted.shape:
            return f"{name} has shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
        if not wanted.numel():
            return None
        got = got.detach().double().cpu()
        strange = ~(torch.isfinite(got) == torch.isfinite(wanted)) | torch.isnan(got) | (torch.isinf(got) & (got != wanted))
        off = torch.where(torch.isfinite(got) & torch.isfinite(wanted), (got - wanted).abs(), 0.0)
        if not strange.any() and float(off.max()) <= self.tolerance[name]:
            return None
        place = tuple((strange if strange.any() else off == off.max()).nonzero()[0].tolist())
        return (
            f"{name}{list(place)} is {got[place].item():.9g}, wanted {wanted[place].item():.9g}; "
            f"largest error {float(off.max()):.3g}, allowed {self.tolerance[name]:.3g}"
        )


def expect(
    pattern: Pattern,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: Mapping[str, torch.Tensor],
    *,
    q_offset: int = 0,
    scale: float | None = None,
    cotangents: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> Expected:
    """Expected results of a call, with gradients if ``cotangents`` of out and lse are given."""
    words: dict[str, Any] = {"q_offset": q_offset, "scale": scale}
    exact, terms = _run(pattern, (q, k, v), tables, torch.float64, None, cotangents, words)
    accumulated = torch.float64 if q.dtype == torch.float64 else torch.float32
    plain, _ = _run(pattern, (q, k, v), tables, accumulated, q.dtype, cotangents, words)
    finite = terms.scores[torch.isfinite(terms.scores)]
    largest = max(float(x.abs().max()) for x in (terms.logits, finite) if x.numel())
    largest += _largest(exact["lse"][torch.isfinite(exact["lse"])])
    fine = torch.finfo(accumulated).eps
    tolerance = {}
    factor = float(scale or pattern.scale or q.shape[3] ** -0.5)
    for name, size in _magnitudes(exact, terms, (q, k, v), cotangents, factor).items():
        wanted, got = exact[name], plain[name].double()
        both = torch.isfinite(wanted) & torch.isfinite(got)
        error = float((wanted - got)[both].abs().max()) if both.any() else 0.0
        kinds = [torch.finfo(kind) for kind in ((accumulated,) if name == "lse" else (q.dtype, plain[name].dtype))]
        rounding = max(kind.eps for kind in kinds) + fine * (1 + largest)
        # Numbers so small that their digits run out (float16 below 6e-5) are rounded to multiples of this.
        step = max(kind.smallest_normal * kind.eps for kind in kinds)
        tolerance[name] = 2 * (error + rounding * size) + step
    return Expected(exact, tolerance)


def _run(
    pattern: Pattern,
    qkv: tuple[torch.Tensor, ...],
    tables: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    rounded: torch.dtype | None,
    cotangents: tuple[torch.Tensor, torch.Tensor | None] | None,
    words: dict[str, Any],
) -> tuple[Results, Terms]:
    leaves = {name: x.detach().cpu().to(dtype).requires_grad_(cotangents is not None) for name, x in zip("qkv", qkv, strict=True)}
    known = {name: t.detach().cpu() for name, t in tables.items()}
    if cotangents is not None:
        learned = [name for name, spec in pattern.tables.items() if spec.learned]
        # the plain run keeps a table's own precision, in which its gradient is added up
        known |= {name: known[name].to(dtype if rounded is None else known[name].dtype).requires_grad_() for name in learned}
        leaves |= {name: known[name] for name in learned}
    out, lse, terms = plain_attention(pattern, leaves["q"], leaves["k"], leaves["v"], known, rounded=rounded, **words)
    results = {"out": out.detach(), "lse": lse.detach()}
    if cotangents is not None:
        results |= gradients(out, lse, leaves, cotangents)
    return results, terms.detached()


def gradients(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    leaves: Mapping[str, torch.Tensor],
    cotangents: tuple[torch.Tensor, torch.Tensor | None],
) -> Results:
    """Gradients of ``sum(out * d_out) + sum(lse * d_lse)``, the latter over rows that are not empty."""
    d_out, d_lse = cotangents
    total = (out * d_out.to(out)).sum()
    if lse is not None and d_lse is not None:
        total = total + (torch.where(torch.isfinite(lse), lse, 0.0) * d_lse.to(lse)).sum()
    # where nothing is attended to at all, results may be constants
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True) if total.requires_grad else [None] * len(leaves)
    return {f"d{n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}


def _magnitudes(
    exact: Results,
    terms: Terms,
    qkv: tuple[torch.Tensor, ...],
    cotangents: tuple[torch.Tensor, torch.Tensor | None] | None,
    scale: float,
) -> dict[str, float]:
    """The size of what is added up in each result, before anything cancels: what one rounding is relative to."""
    q, k, v = (x.detach().cpu().double() for x in qkv)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    finite = terms.scores[torch.isfinite(terms.scores)]
    sizes = {"out": _largest(v), "lse": 1 + _largest(finite)}
    if cotangents is None:
        return sizes
    d_out = cotangents[0].detach().cpu().double()
    d_lse = torch.zeros(q.shape[:3]) if cotangents[1] is None else cotangents[1].detach().cpu().double()
    # d_scores = weights * (d_weights - their weighted mean + d_lse)
    d_weights = torch.einsum("bhqd,bhkd->bhqk", d_out, v).abs()
    # Where a product cancels, what was rounded on the way is as large as its terms, which add up as the root of their squares.
    d_weights = torch.maximum(d_weights, torch.einsum("bhqd,bhkd->bhqk", d_out.square(), v.square()).sqrt())
    mean = (terms.weights * d_weights).sum(dim=3, keepdim=True)
    d_scores = terms.weights * (d_weights + mean + d_lse.abs()[..., None])
    d_logits = d_scores * terms.slopes.abs() * scale
    sizes["dq"] = _largest(d_logits @ k.abs())
    sizes["dk"] = group * _largest(d_logits.transpose(2, 3) @ q.abs())
    sizes["dv"] = group * _largest(terms.weights.transpose(2, 3) @ d_out.abs())
    for name in exact.keys() - sizes.keys():
        sizes[name] = max(_largest(exact[name]), float(d_scores.sum()))
    return sizes


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
