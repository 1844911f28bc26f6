"""What a kernel must give: textbook attention in float64 on the inputs as they were rounded, gradients worked out by hand.

Heads are copied, nothing is cut into tiles, and who sees whom comes from the pattern's own evaluator. A sink is one more key whose value is
0. Nothing here is shared with the backends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from sparsedsl.lang.exact import evaluate_any
from sparsedsl.lang.pattern import Pattern
from sparsedsl.testing.call_shapes import AttentionCase

__all__ = ["Bent", "Exact", "Gradients", "Problem"]

Tensor = torch.Tensor
_NONE = float("-inf")


@dataclass(frozen=True)
class Problem:
    """One call, as the kernel is given it: tensors in their dtypes, every table by name, and the positions of the rows."""

    pattern: Pattern
    q: Tensor
    k: Tensor
    v: Tensor
    tables: Mapping[str, Tensor]
    q_offset: int = 0
    scale: float | None = None

    @property
    def factor(self) -> float:
        """The scale that counts."""
        return float(self.scale or self.pattern.scale or self.q.shape[3] ** -0.5)

    @property
    def shape(self) -> AttentionCase:
        """The sizes of the call."""
        (batch, heads, q_len, head_dim), (kv_heads, kv_len), head_dim_v = self.q.shape, self.k.shape[1:3], self.v.shape[3]
        return AttentionCase(batch, heads, kv_heads, q_len, kv_len, head_dim, head_dim_v, self.q_offset)

    @property
    def learned(self) -> tuple[str, ...]:
        """The tables that gradients reach."""
        return tuple(name for name, spec in self.pattern.tables.items() if spec.learned)

    @functools.cached_property
    def allowed(self) -> Tensor:
        """Who sees whom: bool ``(batch, heads, q_len, kv_len)``."""
        case = self.shape
        found = evaluate_any(self.pattern.mask.expr, {**case.env, **self.tables})
        return torch.as_tensor(found).expand(case.positions.shape)


@dataclass(frozen=True)
class Bent:
    """What an oracle does otherwise than the pattern says, to see whether a wrong kernel does the same.

    ``keep``: another mask for the right one. ``heads``: the key head that each query head reads. ``factor``: on the scale. ``sink``,
    ``score``: whether they are there. ``sink_factor``: on the sink. ``stray``: keys with a logit and a value of 0 that are seen by every
    row. ``shift``: added to positions of rows in scores.
    """

    keep: Callable[[Tensor], Tensor] | None = None
    heads: Tensor | None = None
    factor: float = 1.0
    sink: bool = True
    score: bool = True
    sink_factor: float = 1.0
    stray: int = 0
    shift: int = 0


@dataclass
class Exact:
    """Attention in float64; every array is ``(batch, heads, q_len, ...)``, columns of keys first and then those of sinks.

    ``logits``: scaled products; ``scores``: what became of them; ``weights``: their softmax, 0 where nothing is seen.
    """

    problem: Problem
    bent: Bent = field(default_factory=Bent)

    def __post_init__(self) -> None:
        problem, bent = self.problem, self.bent
        case = problem.shape
        heads = torch.arange(case.heads) // (case.heads // case.kv_heads) if bent.heads is None else bent.heads
        self.heads, self.scale = heads, problem.factor * bent.factor
        self.q = problem.q.detach().cpu().double()
        self.k, self.v = (x.detach().cpu().double()[:, heads] for x in (problem.k, problem.v))
        self.leaves = {name: problem.tables[name].detach().cpu().double().requires_grad_() for name in problem.learned}
        self.tables = {**{name: _wide(t) for name, t in problem.tables.items()}, **self.leaves}
        allowed = problem.allowed if bent.keep is None else bent.keep(problem.allowed)
        self.logits = (self.q @ self.k.transpose(-1, -2) * self.scale).requires_grad_()
        with torch.enable_grad():
            graph = self._scores(allowed)
        self.graph, scores = graph, graph.detach()
        self.keys = self.logits.shape[-1]
        self.seen = torch.cat([allowed, allowed.new_ones(*scores.shape[:3], scores.shape[3] - self.keys)], dim=3) & (
            scores != _NONE
        )
        self.scores = scores.masked_fill(~self.seen, _NONE)
        self.v = torch.cat([self.v, self.v.new_zeros(*self.v.shape[:2], scores.shape[3] - self.keys, self.v.shape[3])], dim=2)
        self.empty = ~self.seen.any(dim=3)
        self.peak = (
            self.scores.amax(dim=3).masked_fill(self.empty, 0.0) if scores.shape[3] else scores.new_zeros(scores.shape[:3])
        )
        total = torch.exp(self.scores - self.peak[..., None]).sum(dim=3)
        self.lse = (self.peak + torch.log(total)).masked_fill(self.empty, _NONE)
        self.level = self.lse.masked_fill(self.empty, 0.0)
        self.weights = torch.exp(self.scores - self.level[..., None]).masked_fill(self.empty[..., None], 0.0)
        self.out = self.weights @ self.v

    def _scores(self, allowed: Tensor) -> Tensor:
        """Modified logits, and those of sinks behind them; differentiable in logits and tables."""
        problem, bent, case = self.problem, self.bent, self.problem.shape
        env = {**case.env, **self.tables, "score": self.logits.masked_fill(~allowed, 1.0)}
        env["q_idx"] = env["q_idx"] + bent.shift
        scores = self.logits
        if problem.pattern.has_score and bent.score:
            scores = evaluate_any(problem.pattern.score.expr, env, dtype=torch.float64).double().expand(self.logits.shape)
        parts = [scores]
        if problem.pattern.sink is not None and bent.sink:
            sink = evaluate_any(problem.pattern.sink.expr, env, dtype=torch.float64).double()
            parts.append((sink * bent.sink_factor).expand(*scores.shape[:3], 1))
        parts += [scores.new_zeros(*scores.shape[:3], 1)] * bent.stray
        return torch.cat(parts, dim=3) if len(parts) > 1 else scores

    @functools.cached_property
    def slope(self) -> Tensor:
        """How fast each score grows with its logit; 0 for sinks."""
        return self._slopes[0]

    @functools.cached_property
    def bend(self) -> Tensor:
        """How fast the slope grows."""
        return self._slopes[1]

    @functools.cached_property
    def _slopes(self) -> tuple[Tensor, Tensor]:
        none = torch.zeros_like(self.scores)
        if not self.problem.pattern.has_score or not self.bent.score:
            none[..., : self.keys] = 1.0
            return none * self.seen, torch.zeros_like(none)
        if not self.graph.requires_grad:
            return none, none
        kept = torch.where(self.seen, self.graph, 0.0).sum()
        first = torch.autograd.grad(kept, self.logits, create_graph=True, allow_unused=True)[0]
        if first is None:
            return none, none
        second = (
            torch.autograd.grad(first.sum(), self.logits, retain_graph=True, allow_unused=True)[0]
            if first.requires_grad
            else None
        )
        pad = (0, self.scores.shape[3] - self.keys)
        widen = functools.partial(torch.nn.functional.pad, pad=pad)
        return widen(first.detach()), torch.zeros_like(none) if second is None else widen(second)

    def gradients(self, d_out: Tensor, d_lse: Tensor | None) -> Gradients:
        """Gradients of ``sum(out * d_out) + sum(lse * d_lse)``, the latter over rows that are not empty."""
        return Gradients(self, d_out.detach().cpu().double(), None if d_lse is None else d_lse.detach().cpu().double())

    def to_key_heads(self, x: Tensor) -> Tensor:
        """What query heads contribute, added up for the key heads that they read."""
        found = x.new_zeros(x.shape[0], self.problem.k.shape[1], *x.shape[2:])
        return found.index_add(1, self.heads, x)


@dataclass
class Gradients:
    """Gradients by hand. ``d_scores``: of every score; ``mean``: the sum over values of ``d_out * out``, of every row."""

    exact: Exact
    d_out: Tensor
    d_lse: Tensor | None

    def __post_init__(self) -> None:
        exact = self.exact
        self.mean = (self.d_out * exact.out).sum(dim=3, keepdim=True)
        level = 0.0 if self.d_lse is None else self.d_lse[..., None]
        self.d_weights = self.d_out @ exact.v.transpose(-1, -2)
        self.d_scores = exact.weights * (self.d_weights - self.mean + level)

    @functools.cached_property
    def d_logits(self) -> Tensor:
        """Of every scaled product: ``(batch, heads, q_len, kv_len)``."""
        return (self.d_scores * self.exact.slope)[..., : self.exact.keys]

    @functools.cached_property
    def values(self) -> dict[str, Tensor]:
        """By name: dq, dk, dv, and d<table> of learned tables."""
        exact, keys = self.exact, self.exact.keys
        found = {
            "dq": self.d_logits @ exact.k * exact.scale,
            "dk": exact.to_key_heads(self.d_logits.transpose(-1, -2) @ exact.q * exact.scale),
            "dv": exact.to_key_heads((exact.weights.transpose(-1, -2) @ self.d_out)[:, :, :keys]),
        }
        return found | {f"d{name}": x for name, x in self.of_tables(self.d_scores).items()}

    def of_tables(self, d_scores: Tensor) -> dict[str, Tensor]:
        """What the learned tables get, by name, where scores get ``d_scores``."""
        leaves = self.exact.leaves
        if not leaves:
            return {}
        slopes = torch.where(self.exact.seen, d_scores, 0.0)
        found = torch.autograd.grad(self.exact.graph, list(leaves.values()), slopes, retain_graph=True, allow_unused=True)
        return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}


def _wide(table: Tensor) -> Tensor:
    table = table.detach().cpu() if isinstance(table, Tensor) else torch.as_tensor(table)
    return table.double() if table.is_floating_point() else table
