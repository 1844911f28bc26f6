"""The fast way to choose: scores stay sources that give blocks, choices come out as lists."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sparsedsl.lang.expressions import Mask
from sparsedsl.program.axes import unit_of
from sparsedsl.program.orders import Inverse, Order, Tokens
from sparsedsl.program.scores import (
    Antidiagonal,
    Bound,
    Dot,
    Grouped,
    Gumbel,
    Plus,
    Probe,
    Regroup,
    Smooth,
    Softmax,
)
from sparsedsl.program.select import Threshold, TopK, TopP
from sparsedsl.program.tensors import Summary
from sparsedsl.run.choosing import counts, orders, proxies
from sparsedsl.run.choosing.antidiagonal import antidiagonal
from sparsedsl.run.choosing.candidates import Candidates, PairRule
from sparsedsl.run.choosing.composed_scores import BoundScores, GroupedScores, SumScores
from sparsedsl.run.choosing.derived import RegroupedScores, softmax_scores
from sparsedsl.run.choosing.mass_rules import threshold, top_p
from sparsedsl.run.choosing.rules import top_k
from sparsedsl.run.choosing.scores import DotScores, ScoreSource
from sparsedsl.run.picked.picks import Picks
from sparsedsl.run.programs.candidates import candidates_of, unit_rule
from sparsedsl.run.programs.parts import alike, spread
from sparsedsl.run.programs.reference import Reference
from sparsedsl.run.programs.runner import means

__all__ = ["ListedChoices"]

Tensor = torch.Tensor


class ListedChoices(Reference):
    """Scores give blocks on demand, choices are :class:`Picks`: never queries x units at once."""

    def as_given(self, x: Tensor) -> Tensor:
        """Inputs keep their type: half precision is cast piece by piece, where it is used."""
        return x

    @means(Summary)
    def _summary(self, node: Summary) -> Tensor:
        return proxies.pooled(self.value(node.x), node.unit, node.how, node.pad)  # type: ignore[arg-type]

    # ---- scores, as sources -------------------------------------------------------------------------------------------

    @means(Dot)
    def _dot(self, node: Dot) -> ScoreSource:
        x, y = self.value(node.x), self.value(node.y)
        x, y = alike(x, y)
        return DotScores(x, y, self.scale_of(node.scale, x))

    @means(Bound)
    def _bound(self, node: Bound) -> ScoreSource:
        x, y = self.value(node.x), self.value(node.y)
        return BoundScores(x, *proxies.bounds(y, node.unit), self.scale_of(node.scale, x))

    @means(Antidiagonal)
    def _antidiagonal(self, node: Antidiagonal) -> ScoreSource:
        self.check_aligned(node.block, "antidiagonal()")
        x, y = self.value(node.x), self.value(node.y)
        return antidiagonal(x, y, stride=node.stride, block=node.block, q_offset=self.domain.q_offset)

    @means(Softmax)
    def _softmax(self, node: Softmax) -> ScoreSource:
        source = self.value(node.scores)
        return softmax_scores(source, self._allowed(node.among, node, source))

    @means(Regroup)
    def _regroup(self, node: Regroup) -> ScoreSource:
        return RegroupedScores(self.value(node.scores), node.unit, node.how)

    @means(Plus)
    def _plus(self, node: Plus) -> ScoreSource:
        return SumScores((self.value(node.first), self.value(node.second)))

    @means(Gumbel)
    def _gumbel(self, node: Gumbel) -> ScoreSource:
        source = self.value(node.scores)
        return SumScores((source, self.noise(node, source.shape)))

    @means(Grouped)
    def _grouped(self, node: Grouped) -> ScoreSource:
        return GroupedScores(self.value(node.x), self.call.k.shape[1] if node.heads == "kv_heads" else 1, node.how)  # type: ignore[arg-type]

    # ---- key scores, orders and subsets ---------------------------------------------------------------------------------

    @means(Probe)
    def _probe(self, node: Probe) -> Tensor:
        x, y = self.value(node.x), self.value(node.y)
        keys, rows = y.shape[2], min(node.rows, x.shape[2])
        normalised = keys // node.complete * node.complete
        kept = min(self.domain.q_offset + x.shape[2] - rows, normalised) if node.keep == "before" else normalised
        scale = self.scale_of(node.scale, x)
        mass = proxies.probe(
            x, y, rows=rows, causal=node.causal, scale=scale, keys_normalised=normalised, keys_kept=kept,
            q_offset=self.domain.q_offset,
        )  # fmt: skip
        return torch.nn.functional.pad(mass, (0, keys - kept))

    @means(Smooth)
    def _smooth(self, node: Smooth) -> Tensor:
        x = self.value(node.x)
        kept = x.shape[2] - (self.probing(node) if self.before(node) else 0)
        return torch.nn.functional.pad(proxies.smooth(x[:, :, :kept], node.pool), (0, x.shape[2] - kept))

    @means(Order)
    def _order(self, node: Order) -> Tensor:
        return orders.segment_sort(self.value(node.scores), node.segment, descending=node.descending)

    @means(Inverse)
    def _inverse(self, node: Inverse) -> Tensor:
        return orders.inverse(self.value(node.order))

    @means(Tokens)
    def _tokens(self, node: Tokens) -> list[Tensor]:
        scores, by, heads = self.value(node.scores), self.value(node.by)[:, 0], self.call.q.shape[1]
        self.check_square("keep_tokens()")
        total = scores.shape[2]
        before = max(total - node.always, 0)
        if node.tail is not None:
            count = counts.tail_count(by[:, :before], node.tail, min(node.least, before))
        else:
            count = counts.cover_count(by[:, :before], node.cover, least=min(node.least, before))  # type: ignore[arg-type]
        kept, sizes = orders.keep_tokens(scores[:, :, :before], count, always=total - before, total=total)
        # Programs on the kept tokens need their number: the one place where a GPU is waited for.
        return [spread(index[:, :size], heads, dim=0) for index, size in zip(kept, sizes.tolist(), strict=True)]

    # ---- choices, as lists ------------------------------------------------------------------------------------------------

    def _allowed(self, mask: Mask, node: Any, source: ScoreSource) -> Candidates:
        rows, columns = unit_of(node.axes[2]), unit_of(node.axes[3])
        self.check_aligned(rows, f"{node.function}()")
        return candidates_of(mask.expr, self.domain, rows, columns, source.shape[1], self.call.q.device)

    def _forced(self, node: Any, candidates: Candidates, source: ScoreSource) -> PairRule | None:
        if node.forced is None:
            return None
        expr, tables = self.concrete(node.forced)
        rule = unit_rule(
            expr, self.domain, unit_of(node.axes[2]), unit_of(node.axes[3]), source.shape[1], tables, self.call.q.device
        )
        if candidates.allowed is None:
            return rule
        allowed = candidates.allowed
        return lambda rows, units: rule(rows, units) & allowed(rows, units)

    def _choose(self, node: Any, choose: Any, *numbers: Any, **words: Any) -> Picks:
        source = self.value(node.scores)
        candidates = Candidates() if node.among is None else self._allowed(node.among, node, source)
        q_unit, kv_unit = node.units
        forced = self._forced(node, candidates, source)
        picks = choose(
            source,
            *numbers,
            candidates,
            forced=forced,
            q_unit=q_unit,
            kv_unit=kv_unit,
            first=self.domain.q_offset // q_unit,
            **words,
        )
        return replace(picks, units=-(-self.domain.kv_len // kv_unit))

    @means(TopK)
    def _top_k(self, node: TopK) -> Picks:
        source = self.value(node.scores)
        extra = source.shape[3] if node.extra and node.forced is not None else None
        return self._choose(node, top_k, node.count, forced_extra=extra)

    @means(TopP)
    def _top_p(self, node: TopP) -> Picks:
        measure = "share" if node.scores.is_mass else "softmax"
        words = {"inclusive": node.inclusive, "unmet": node.unmet, "forced_in_mass": node.forced_in_mass}
        return self._choose(node, top_p, node.share, measure=measure, **words)

    @means(Threshold)
    def _threshold(self, node: Threshold) -> Picks:
        return self._choose(node, threshold, node.least, measure="share" if node.scores.is_mass else "score")
