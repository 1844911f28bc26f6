"""What attention must give, and how far off each element may be: plain attention in float64, and the rule of
:mod:`sparsedsl.testing.roundings`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsedsl.lang.exact import evaluate_any
from sparsedsl.lang.normalisers import SOFTPICK, STICK_BREAKING
from sparsedsl.lang.pattern import Pattern
from sparsedsl.testing.call_shapes import AttentionCase
from sparsedsl.testing.roundings import Roundings, stored

__all__ = ["ExpectedResult", "Results", "expect", "plain_attention"]

Tensor = torch.Tensor
Results = dict[str, Tensor]  # "out", "lse", and "dq", "dk", "dv", "d<table>" where gradients are asked for
Cotangents = tuple[Tensor, Tensor | None]

_SIGMAS = 4
# Runs that a first judgement takes, runs that an accusation takes, and the excess from which few are as good as many.
_FEW, _MANY, _PLAIN = 6, 40, 20
# Pairs of queries and keys that runs go through together: small problems cost what their operations cost to start.
_AT_ONCE = 1 << 18


def case_of(q: Tensor, k: Tensor, v: Tensor, q_offset: int = 0) -> AttentionCase:
    """The shape of a call."""
    (batch, heads, q_len, head_dim), (kv_heads, kv_len), head_dim_v = q.shape, k.shape[1:3], v.shape[3]
    return AttentionCase(batch, heads, kv_heads, q_len, kv_len, head_dim, head_dim_v, q_offset)


class _Weighed(torch.autograd.Function):
    """Softmax and weighted mean, ``(out, lse)``. As in kernels, the backward pass makes the weights again and has a mean from ``out``."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        empty = (scores == float("-inf")).all(dim=-1)
        lse = torch.logsumexp(scores.masked_fill(empty[..., None], 0.0), dim=-1)
        weights = torch.exp(scores - lse[..., None]).masked_fill(empty[..., None], 0.0)
        out = weights @ values
        ctx.save_for_backward(scores, values, lse, empty, out)
        return out, lse.masked_fill(empty, float("-inf"))

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor, Tensor]:
        scores, values, lse, empty, out = ctx.saved_tensors
        weights = torch.exp(scores - lse[..., None]).masked_fill(empty[..., None], 0.0)
        mean = (d_out * stored(out)).sum(dim=-1, keepdim=True)
        d_scores = weights * (d_out @ values.transpose(-1, -2) - mean + d_lse[..., None])
        return d_scores, weights.transpose(-1, -2) @ d_out


class _Picked(torch.autograd.Function):
    """Softpick and weighted mean; the backward pass makes the weights again, as in kernels."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, values: Tensor) -> Tensor:
        peak = scores.amax(dim=-1, keepdim=True).clamp(min=0.0)
        total = _less_one(scores, peak).abs().sum(dim=-1, keepdim=True)
        lse = torch.where(total == 0, 0.0, peak + torch.log(torch.where(total == 0, 1.0, total)))
        out = _less_one(scores, lse).relu() @ values
        ctx.save_for_backward(scores, values, lse, out)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        scores, values, lse, out = ctx.saved_tensors
        weights, more = torch.exp(scores - lse), _less_one(scores, lse)
        mean = (d_out * stored(out)).sum(dim=-1, keepdim=True)
        d_more = torch.where(more > 0, d_out @ values.transpose(-1, -2), 0.0) - more.sign() * mean
        return weights * d_more, more.relu().transpose(-1, -2) @ d_out


def _less_one(scores: Tensor, base: Tensor) -> Tensor:
    """``(exp(score) - 1) / exp(base)``, 0 where a score is -inf."""
    return (torch.exp(scores - base) - torch.exp(-base)).masked_fill(scores == float("-inf"), 0.0)


def _unnormalised(pattern: Pattern, scores: Tensor, allowed: Tensor) -> Tensor:
    """Weights of pairs, 0 where one is masked."""
    if pattern.normaliser == STICK_BREAKING:
        masked = scores.masked_fill(~allowed, float("-inf"))  # takes nothing, leaves all
        passed = torch.nn.functional.logsigmoid(-masked)
        # Summed up from the last key on, without the key itself.
        left = torch.cat([passed[..., 1:].flip(-1).cumsum(-1).flip(-1), torch.zeros_like(passed[..., :1])], dim=-1)
        scores = torch.sigmoid(scores) * torch.exp(left)
    return scores.masked_fill(~allowed, 0.0)


def plain_attention(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Mapping[str, Tensor],
    *,
    q_offset: int = 0,
    scale: float | None = None,
    copies: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Attention as in a textbook, in the dtype of ``q``: ``(out, lse)``. The batch may hold several ``copies`` of the same entries.
    Weights without a sum to divide by have no LSE.

    Shares nothing with the lowerings but the evaluator of expressions; heads are copied, a sink is one more key whose value is 0.
    """
    case, dtype = case_of(q, k, v, q_offset), q.dtype
    if scale is None:
        scale = pattern.scale or case.head_dim**-0.5
    k, v = (x.repeat_interleave(case.heads // case.kv_heads, dim=1) for x in (k, v))
    shape = case.positions.shape
    logits = q @ k.transpose(-1, -2) * scale
    env = {**case.env, **tables}
    env["b"] = env["b"] % max(case.batch // copies, 1)
    allowed = evaluate_any(pattern.mask.expr, env).expand(shape)
    env["score"] = logits.masked_fill(~allowed, 1.0)
    scores = evaluate_any(pattern.score.expr, env, dtype=dtype).to(dtype).expand(shape)
    if pattern.normaliser == SOFTPICK:
        return _Picked.apply(scores.masked_fill(~allowed, float("-inf")), v), None
    if not pattern.has_lse:
        return _unnormalised(pattern, scores, allowed) @ v, None
    scores = scores.masked_fill(~allowed, float("-inf"))
    if pattern.sink is not None:
        sink = evaluate_any(pattern.sink.expr, env, dtype=dtype).to(dtype).expand(*shape[:3], 1)
        scores = torch.cat([scores, sink], dim=3)
        v = torch.cat([v, v.new_zeros(*v.shape[:2], 1, v.shape[3])], dim=2)
    return _Weighed.apply(scores, v)


@dataclass
class ExpectedResult:
    """Results in float64, and how far a result of the tested precision may be off, element by element.

    ``moved``: ``(seed, runs, dtype) -> results`` of runs with roundings, a dimension in front for the runs, sums of gradients rounded in
    that dtype; ``kept``: the dtypes that results are given in; ``accumulated``: the dtype that they are worked out in.
    """

    values: Results
    moved: Callable[[int, int, torch.dtype], Results]
    kept: dict[str, torch.dtype]
    accumulated: torch.dtype
    _runs: dict[torch.dtype, int] = field(default_factory=dict)
    _lengths: dict[tuple[torch.dtype, str], Tensor] = field(default_factory=dict)

    def sigma(self, name: str, runs: int) -> Tensor:
        """The standard deviation of each element, from so many runs at least."""
        fine = self.accumulated
        summed = self.kept[name] if name[0] == "d" and torch.finfo(self.kept[name]).eps > torch.finfo(fine).eps else fine
        done = self._runs.get(summed, 0)
        if runs > done:
            for other, values in self.moved(done, runs - done, summed).items():
                moves = torch.nan_to_num(values - self.values[other], 0.0, 0.0, 0.0).unbind(0)
                known = self._lengths.get((summed, other))
                # hypot: the square of a move of 1e-170, of a weight that is nearly 0, would be 0
                self._lengths[summed, other] = functools.reduce(torch.hypot, moves if known is None else (known, *moves)).abs()
            self._runs[summed] = runs
        return self._lengths[summed, name] / self._runs[summed] ** 0.5

    def tolerance(self, name: str, runs: int = _FEW) -> Tensor:
        """How far off each element may be."""
        info, fine = torch.finfo(self.kept[name]), torch.finfo(self.accumulated)
        size = torch.nan_to_num(self.values[name], 0.0, 0.0, 0.0).abs()
        floor = info.eps * size + 2 * fine.eps * (size + (name == "lse")) + info.smallest_normal * info.eps
        floor += 2 * fine.smallest_normal  # weights this small lose their digits, or are taken for 0
        return _SIGMAS * self.sigma(name, runs) + floor

    def fault(
        self, name: str, got: Tensor, *, part: Callable[[Tensor], Tensor] = lambda x: x, wanted: Tensor | None = None
    ) -> str | None:
        """What is wrong with a result, in words, or None.

        ``part``: which elements of the expected result it is. ``wanted``: another result to compare with, which may be as far off.
        """
        times = 1 if wanted is None else 2
        wanted = part(self.values[name]) if wanted is None else wanted.detach().double().cpu()
        if got.shape != wanted.shape:
            return f"{name} has shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
        if not wanted.numel():
            return None
        got = got.detach().double().cpu()
        strange = ~(torch.isfinite(got) == torch.isfinite(wanted)) | torch.isnan(got) | (torch.isinf(got) & (got != wanted))
        if strange.any():
            place = tuple(strange.nonzero()[0].tolist())
            return f"{name}{list(place)} is {got[place].item():.9g}, wanted {wanted[place].item():.9g}"
        off = torch.where(torch.isfinite(wanted), (got - wanted).abs(), 0.0)
        for runs in (_FEW, _MANY):
            allowed = times * part(self.tolerance(name, runs))
            excess = off / allowed
            if float(excess.max()) <= 1:
                return None
            if float(excess.max()) > _PLAIN:
                break
        place = tuple((excess == excess.max()).nonzero()[0].tolist())
        return (
            f"{name}{list(place)} is {got[place].item():.9g}, wanted {wanted[place].item():.9g}; "
            f"off by {float(off[place]):.3g}, allowed {float(allowed[place]):.3g}; {int((excess > 1).sum())} of {off.numel()} are off"
        )


def expect(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Mapping[str, Tensor],
    *,
    q_offset: int = 0,
    scale: float | None = None,
    cotangents: Cotangents | None = None,
) -> ExpectedResult:
    """Expected results of a call, with gradients if ``cotangents`` of out and lse are given (as ``out`` takes them: in its dtype)."""
    words: dict[str, Any] = {"q_offset": q_offset, "scale": scale}
    learned = [name for name, spec in pattern.tables.items() if spec.learned] if cotangents is not None else []
    batch = q.shape[0]

    def run(tensors: dict[str, Tensor], leaves: Mapping[str, Tensor], asked: Cotangents | None) -> Results:
        q, k, v = (tensors.pop(name) for name in "qkv")
        out, lse = plain_attention(pattern, q, k, v, tensors, copies=q.shape[0] // batch if batch else 1, **words)
        return results_of(out, lse, leaves, asked)

    at_once = 1 if learned or not batch else max(_AT_ONCE // max(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2], 1), 1)
    moving = [*"qkv", *learned] if cotangents is not None else []
    return expected({"q": q, "k": k, "v": v, **tables}, moving, cotangents, run, at_once)


def expected(
    given: Mapping[str, Tensor],
    moving: list[str],
    cotangents: Cotangents | None,
    run: Callable[[dict[str, Tensor], Mapping[str, Tensor], Cotangents | None], Results],
    at_once: int = 1,
) -> ExpectedResult:
    """What ``run(tensors, leaves, cotangents)`` gives in float64 on the CPU.

    ``moving``: names of the tensors that get gradients. ``at_once``: of how many copies of q, k and v ``run`` takes a batch.
    """
    dtype = given["q"].dtype
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        name: x.detach().cpu().double() if name in moving or x.is_floating_point() else x.detach().cpu()
        for name, x in given.items()
    }
    slopes = None
    if cotangents is not None:
        slopes = [
            None if x is None else x.to(kind).double().cpu() for x, kind in zip(cotangents, (dtype, accumulated), strict=True)
        ]

    def runs(copies: int, **rounding: Any) -> Results:
        values = {name: x.repeat(copies, 1, 1, 1) if name in "qkv" and copies > 1 else x for name, x in tensors.items()}
        leaves = {name: values[name].detach().requires_grad_() for name in moving}
        asked: Any = slopes and tuple(x if x is None or copies == 1 else x.repeat(copies, *[1] * (x.ndim - 1)) for x in slopes)
        given = [*(values | leaves).values(), *(x for x in asked or () if x is not None)]
        with torch.set_grad_enabled(bool(moving)), Roundings(given=given, **rounding) if rounding else contextlib.nullcontext():
            return run(values | leaves, leaves, asked)

    def moved(seed: int, count: int, summed: torch.dtype) -> Results:
        parts = []
        for start in range(0, count, at_once):
            copies = min(at_once, count - start)
            found = runs(copies, seed=seed + start, accumulated=accumulated, kept=dtype, summed=summed)
            parts.append({name: x.unflatten(0, (copies, -1)) if at_once > 1 else x[None] for name, x in found.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    kept = {"out": dtype, "lse": accumulated} | {f"d{name}": given[name].dtype for name in moving}
    return ExpectedResult(runs(1), moved, kept, accumulated)


def results_of(out: Tensor, lse: Tensor | None, leaves: Mapping[str, Tensor], cotangents: Cotangents | None) -> Results:
    """The results by name, with gradients if cotangents are given."""
    found = {"out": out.detach()} | ({} if lse is None else {"lse": lse.detach()})
    return found if cotangents is None else found | gradients(out, lse, leaves, cotangents)


def gradients(out: Tensor, lse: Tensor | None, leaves: Mapping[str, Tensor], cotangents: Cotangents) -> Results:
    """Gradients of ``sum(out * d_out) + sum(lse * d_lse)``, the latter over rows that are not empty."""
    d_out, d_lse = cotangents
    asked = {out: d_out.to(out)}
    if lse is not None and d_lse is not None:
        asked[lse] = torch.where(torch.isfinite(lse), d_lse.to(lse), 0.0)
    # where nothing is attended to at all, results may be constants
    asked = {result: slope for result, slope in asked.items() if result.requires_grad}
    found: Any = [None] * len(leaves)
    if asked:
        found = torch.autograd.grad(list(asked), list(leaves.values()), list(asked.values()), allow_unused=True)
    return {f"d{n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}
