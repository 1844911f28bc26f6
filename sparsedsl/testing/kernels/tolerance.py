"""How far off each element of a kernel's results may be: one rule, derived from what attention has to round.

Roundings are independent, each of at most ``u`` (half the eps of the inputs' dtype) or ``a`` (of the dtype of accumulation); the root
of the sum of their squares is *sigma*, and a result may be off by 4 sigma and two roundings of its own. With ``c`` the scale, ``s`` a
score, ``p`` a weight, ``o`` an output:

- a score is off by ``a ((sqrt(D) + 3) c sum|q k| + 2 (|s| + max|s| + |lse|) + 4)``, times its slope where it is modified;
- an output by what its scores are off, one rounding ``u`` of every weight, the sum over keys in the accumulator, and its normalisation;
- an LSE by what its scores are off, and its own sum;
- gradients by what scores, weights and products of cotangents are off; the mean that all keys of a row share is off for all of them alike.

Nothing is taken over a whole tensor: a large number widens what it reaches and nothing else. Nothing is fitted to a kernel, and nothing
widens the rule but what a kernel declares to round (``rounds``).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from sparsedsl.testing.kernels.oracle import Exact, Gradients

__all__ = ["KAPPA", "Allowance"]

Tensor = torch.Tensor
KAPPA = 4.0
_PROBES = 32
_TF32 = 2.0**-11


@dataclass
class Allowance:
    """The rule for one call. ``rounds``: what the kernel rounds to the inputs' dtype: "p", "out", "q", "s"; "tf32": its products."""

    exact: Exact
    dtype: torch.dtype
    rounds: Collection[str] = ("p", "out")

    def __post_init__(self) -> None:
        wide = self.dtype == torch.float64
        # The oracle itself rounds as a kernel in float64 does.
        self.fine = torch.finfo(torch.float64 if wide else torch.float32).eps / 2 * (2 if wide else 1)
        self.unit = torch.finfo(self.dtype).eps / 2 * (2 if wide else 1)
        self.weight_unit = self.unit if "p" in self.rounds else self.fine
        self.product = _TF32 if "tf32" in self.rounds else self.fine
        exact, keys = self.exact, self.exact.keys
        size = torch.zeros_like(exact.scores)
        size[..., :keys] = (exact.q.abs() @ exact.k.abs().transpose(-1, -2)) * abs(exact.scale)
        raw = self.product * (exact.q.shape[3] ** 0.5 + 3) * size + ("q" in self.rounds) * self.unit * size
        scores = exact.scores.masked_fill(~exact.seen, 0.0)
        self.height = scores.abs().amax(dim=3, keepdim=True) if scores.shape[3] else scores.new_zeros(*scores.shape[:3], 1)
        self.raw = raw  # of a logit
        # what a modified score adds to its logit may cancel: it is rounded at its own size
        added = (scores[..., :keys] - exact.logits.detach()).abs() if exact.problem.pattern.has_score else 0.0
        delta = exact.slope.abs() * raw
        delta += self.fine * (2 * (scores.abs() + self.height + exact.level.abs()[..., None]) + 4)
        delta[..., :keys] += 2 * self.fine * added + ("s" in self.rounds) * self.unit * scores[..., :keys].abs()
        self.delta = torch.where(exact.seen, delta, 0.0)
        self.spread = exact.weights * self.delta

    def out_sigma(self) -> Tensor:
        """Of outputs, as they are accumulated."""
        exact, p, v = self.exact, self.exact.weights, self.exact.v
        found = self.weight_unit**2 * (p.square() @ v.square())
        # sum of (p delta)^2 (v - o)^2 over keys, multiplied out; what cancels may end below 0
        square = self.spread.square()
        parts = square @ v.square() - 2 * exact.out * (square @ v) + exact.out.square() * square.sum(dim=3, keepdim=True)
        found = found + parts.clamp_min(0.0) + 1e-14 * (square @ v.square())
        found = found + (self.product**2) * (exact.keys + 16) * (p @ v.abs()).square()
        normalised = self.fine * (4 + exact.level.abs()[..., None] + self.height) * exact.out
        return (found + normalised.square()).sqrt()

    def out(self) -> Tensor:
        """How far off outputs may be."""
        kept = self.dtype if "out" in self.rounds else torch.float32
        return KAPPA * self.out_sigma() + self._floor(self.exact.out, kept)

    def lse(self) -> Tensor:
        """How far off the LSE may be, in its natural base."""
        level = self.exact.level
        found = self.spread.square().sum(dim=3) + self.fine**2 * (2 + level.abs() + self.exact.keys**0.5).square()
        return KAPPA * found.sqrt() + 2 * self.fine * level.abs() + 2 * torch.finfo(torch.float32).smallest_normal

    def gradients(self, grads: Gradients, kept: dict[str, torch.dtype]) -> dict[str, Tensor]:
        """How far off gradients may be; ``kept``: the dtype that each is given in."""
        exact, p, keys = self.exact, self.exact.weights, self.exact.keys
        c, q, k, slope = abs(exact.scale), exact.q, exact.k, exact.slope
        e_weights = self.product * (exact.v.shape[3] ** 0.5 + 3) * (grads.d_out.abs() @ exact.v.abs().transpose(-1, -2))
        e_mean = self.unit**2 * (grads.d_out * exact.out).square().sum(dim=3, keepdim=True)
        e_mean = (e_mean + (grads.d_out * self.out_sigma()).square().sum(dim=3, keepdim=True)).sqrt()
        d = grads.d_scores
        epsilon = ((self.weight_unit * d).square() + (d * self.delta).square() + (p * e_weights).square()).sqrt()
        # of scaled products: also the slope is off
        alone = (epsilon * slope).square() + (d * exact.bend * self.raw).square()
        if exact.problem.pattern.has_score:
            # A small slope is often what is left of two numbers near 1, as of tanh: off by their roundings, however small it is.
            alone = alone + (4 * self.fine * d * slope.abs().clamp(min=1.0)).square()
        alone, shared = alone[..., :keys], (p * slope)[..., :keys]
        terms, p_keys = grads.d_logits.abs(), p[..., :keys]
        n, m = keys, q.shape[2] * max(exact.problem.q.shape[1] // exact.problem.k.shape[1], 1)
        dq = c**2 * (alone @ k.square()) + (c * e_mean * (shared @ k)).square()
        dq += (self.product * (n**0.5 + 4) * c * (terms @ k.abs())).square()
        each = alone + (shared * e_mean).square()
        dk = c**2 * exact.to_key_heads(each.transpose(-1, -2) @ q.square())
        dk += (self.product * (m**0.5 + 4) * c * exact.to_key_heads(terms.transpose(-1, -2) @ q.abs())).square()
        moved = (self.weight_unit * p_keys).square() + self.spread[..., :keys].square()
        dv = exact.to_key_heads(moved.transpose(-1, -2) @ grads.d_out.square())
        dv += (self.product * (m**0.5 + 4) * exact.to_key_heads(p_keys.transpose(-1, -2) @ grads.d_out.abs())).square()
        sigmas = {"dq": dq.sqrt(), "dk": dk.sqrt(), "dv": dv.sqrt(), **self._of_tables(grads, epsilon, e_mean)}
        return {name: KAPPA * x + self._floor(grads.values[name], kept[name]) for name, x in sigmas.items()}

    def _of_tables(self, grads: Gradients, epsilon: Tensor, e_mean: Tensor) -> dict[str, Tensor]:
        """Sigmas of the gradients of learned tables: how far random signs on what every score is off move them."""
        if not self.exact.leaves:
            return {}
        drawn = torch.Generator().manual_seed(0)
        total = {f"d{name}": torch.zeros_like(x) for name, x in self.exact.leaves.items()}
        pairs = self.exact.seen.sum().item()
        for _ in range(_PROBES):
            each, rows, terms = (_signs(x.shape, drawn) for x in (epsilon, e_mean, epsilon))
            moved = epsilon * each + self.exact.weights * e_mean * rows
            summed = self.fine * (pairs**0.5 + 4) * pairs**0.5 * grads.d_scores * terms
            for part in (moved, summed):
                for name, x in grads.of_tables(part).items():
                    total[f"d{name}"] += x.detach().square() / _PROBES
        return {name: x.sqrt() for name, x in total.items()}

    def _floor(self, exact: Tensor, kept: torch.dtype) -> Tensor:
        unit = max(torch.finfo(kept).eps / 2, self.fine)
        return 2 * unit * exact.abs() + 2 * torch.finfo(kept).smallest_normal


def _signs(shape: torch.Size, drawn: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=drawn).double() * 2 - 1
