"""Orders, subsets and choices as they are meant: dense, in plain torch."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from sparsedsl.lang.expressions import Mask
from sparsedsl.program.orders import Inverse, Order, Tokens
from sparsedsl.program.select import Threshold, TopK, TopP
from sparsedsl.run.programs.dense_scores import DenseScores
from sparsedsl.run.programs.parts import NEVER, safe_softmax, spread
from sparsedsl.run.programs.runner import means

__all__ = ["DenseChoices"]

Tensor = torch.Tensor


class DenseChoices(DenseScores):
    """Orders and subsets as positions; choices as booleans ``(batch, heads, units of queries, units of keys)``."""

    @means(Order)
    def _order(self, node: Order) -> Tensor:
        scores = self.value(node.scores)
        whole = scores.shape[2] // node.segment * node.segment
        inside = scores[:, :, :whole].unflatten(2, (-1, node.segment))
        order = inside.sort(dim=3, descending=node.descending, stable=True).indices
        order = (order + torch.arange(0, whole, node.segment, device=scores.device)[:, None]).flatten(2)
        tail = torch.arange(whole, scores.shape[2], device=scores.device).expand(*scores.shape[:2], -1)
        return torch.cat([order, tail], dim=2)

    @means(Inverse)
    def _inverse(self, node: Inverse) -> Tensor:
        return self.value(node.order).argsort(dim=2)

    @means(Tokens)
    def _tokens(self, node: Tokens) -> list[Tensor]:
        """For each batch entry the positions ``(heads, kept)``, ascending."""
        scores, by, heads = self.value(node.scores), self.value(node.by)[:, 0], self.call.q.shape[1]
        self.check_square("keep_tokens()")
        before = max(scores.shape[2] - node.always, 0)
        kept = []
        for entry in range(scores.shape[0]):
            count = before - dropped(by[entry, :before], node)
            best = (
                scores[entry, :, :before]
                .sort(dim=1, descending=True, stable=True)
                .indices[:, : max(count, min(node.least, before))]
            )
            always = torch.arange(before, scores.shape[2], device=scores.device).expand(best.shape[0], -1)
            kept.append(spread(torch.cat([best, always], dim=1).sort(dim=1).values, heads, dim=0))
        return kept

    def _candidates(self, node: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Scores with -inf where there is no candidate, the candidates, and the forced ones."""
        scores = self.value(node.scores).detach()
        among = node.among if node.among is not None else Mask(sympy.true)
        allowed = self.units(among, node)
        allowed = self._per_head(allowed, scores.shape[1]) & (scores != NEVER)
        forced = allowed.new_zeros(()) if node.forced is None else self._per_head(self.units(node.forced, node), scores.shape[1])
        return torch.where(allowed, scores, NEVER), allowed, (forced & allowed).expand(allowed.shape)

    def _per_head(self, flags: Tensor, heads: int) -> Tensor:
        """Flags of query heads for fewer heads: any head's."""
        if flags.shape[1] in (1, heads):
            return flags
        return flags.unflatten(1, (heads, -1)).any(2)

    @means(TopK)
    def _top_k(self, node: TopK) -> Tensor:
        scores, allowed, forced = self._candidates(node)
        first = torch.where(forced, float("inf"), scores)
        ranked = first.sort(dim=3, descending=True, stable=True).indices
        rank = ranked.argsort(dim=3)
        count = node.count + (forced.sum(3, keepdim=True) if node.extra else 0)
        return allowed & (rank < count)

    @means(TopP)
    def _top_p(self, node: TopP) -> Tensor:
        scores, allowed, forced = self._candidates(node)
        if node.scores.is_mass:
            mass = torch.where(allowed, scores, 0.0)
            total = mass.sum(3, keepdim=True)
            mass = mass / torch.where(total > 0, total, 1.0)
        else:
            mass = safe_softmax(scores)
        key = torch.where(allowed, mass, -1.0)
        if node.forced_in_mass:
            key = torch.where(forced, float("inf"), key)
        ranked = key.sort(dim=3, descending=True, stable=True).indices
        upto = mass.gather(3, ranked).cumsum(3)
        reached = upto >= node.share
        # the first that reaches it, and all before
        before = reached.cumsum(3) - reached.long()
        taken = (before == 0) if node.inclusive else ~reached
        if node.unmet == "none":
            taken = taken & reached.any(3, keepdim=True)
        picked = torch.zeros_like(allowed).scatter(3, ranked, taken)
        return allowed & (picked | forced)

    @means(Threshold)
    def _threshold(self, node: Threshold) -> Tensor:
        scores, allowed, forced = self._candidates(node)
        if node.scores.is_mass:
            mass = torch.where(allowed, scores, 0.0)
            total = mass.sum(3, keepdim=True)
            scores = mass / torch.where(total > 0, total, 1.0)
        return allowed & ((scores >= node.least) | forced)


def dropped(by: Tensor, node: Tokens) -> int:
    """How many of the keys with the mass ``by`` are dropped."""
    total = by.sum()
    ascending = (by / torch.where(total > 0, total, 1.0)).sort().values
    if node.tail is not None:
        below = int((ascending.cumsum(0) < node.tail).sum())
        return min(below + 1, by.numel()) if below else 0
    assert node.cover is not None
    held = ascending.flip(0).cumsum(0)
    return by.numel() - min(int((held <= node.cover).sum()) + 1, by.numel())
