"""Tensors and scores as they are meant: dense, in plain torch, differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from sparsedsl.program.axes import unit_of
from sparsedsl.program.orders import Take
from sparsedsl.program.scores import (
    Antidiagonal,
    Bound,
    Dot,
    Grouped,
    GroupedKeys,
    Gumbel,
    Plus,
    Probe,
    Regroup,
    Scores,
    Smooth,
    Softmax,
)
from sparsedsl.program.tensors import Summary
from sparsedsl.run.choosing.noise import GumbelScores
from sparsedsl.run.programs.parts import NEVER, pool, reduced, safe_softmax, together
from sparsedsl.run.programs.runner import Runner, means

__all__ = ["DenseScores"]

Tensor = torch.Tensor


class DenseScores(Runner):
    """Summaries, reordered rows; scores ``(batch, heads, units of queries, units of keys)``, key scores ``(batch, heads, keys)``."""

    @means(Summary)
    def _summary(self, node: Summary) -> Tensor:
        return pool(self.value(node.x), node.unit, node.how, node.pad)

    @means(Take)
    def _take(self, node: Take) -> Tensor:
        x, order = together(self.value(node.x), self.value(node.order))
        return x.gather(2, order[..., None].expand(*order.shape, x.shape[3]))

    # ---- scores: (batch, heads, units of queries, units of keys) --------------------------------------------------------

    def scale_of(self, scale: float | None, x: Tensor) -> float:
        """A scale, or the usual one for rows like these."""
        return x.shape[-1] ** -0.5 if scale is None else scale

    @means(Dot)
    def _dot(self, node: Dot) -> Tensor:
        x, y = together(self.value(node.x), self.value(node.y))
        scores = x @ y.transpose(-1, -2) * self.scale_of(node.scale, x)
        return self._whole_rows(node, scores)

    def _whole_rows(self, node: Scores, scores: Tensor) -> Tensor:
        """With a column for each unit of keys: an input may lack the last, ragged one, which then is no candidate."""
        unit = unit_of(node.axes[3])
        return functional.pad(scores, (0, -(-self.domain.kv_len // unit) - scores.shape[3]), value=NEVER)

    @means(Bound)
    def _bound(self, node: Bound) -> Tensor:
        x, y = together(self.value(node.x), self.value(node.y))
        low, high = pool(y, node.unit, "min", "valid"), pool(y, node.unit, "max", "valid")
        best = torch.maximum(x[:, :, :, None] * low[:, :, None], x[:, :, :, None] * high[:, :, None])
        return best.sum(-1) * self.scale_of(node.scale, x)

    @means(Antidiagonal)
    def _antidiagonal(self, node: Antidiagonal) -> Tensor:
        self.check_aligned(node.block, "antidiagonal()")
        x, y = together(self.value(node.x), self.value(node.y))
        stride, cells = node.stride, node.block // node.stride
        rows, columns = -(-x.shape[2] // node.block) * node.block, -(-y.shape[2] // node.block) * node.block
        x, y = functional.pad(x, (0, 0, 0, rows - x.shape[2])), functional.pad(y, (0, 0, 0, columns - y.shape[2]))
        sums = [x[:, :, stride - 1 - i :: stride] @ y[:, :, i::stride].transpose(-1, -2) for i in range(stride)]
        logits = torch.stack(sums).sum(0) * (self.scale_of(None, x) / stride)
        row = torch.arange(rows // stride, device=x.device)[:, None] + self.domain.q_offset // stride
        column = torch.arange(columns // stride, device=x.device)
        real = row - self.domain.q_offset // stride < -(-self.domain.rows // stride)
        seen = (column <= row) & (column < -(-self.domain.kv_len // stride)) & real
        mass = safe_softmax(torch.where(seen, logits, NEVER))
        return mass.unflatten(3, (-1, cells)).sum(4).unflatten(2, (-1, cells)).sum(3)

    @means(Softmax)
    def _softmax(self, node: Softmax) -> Tensor:
        allowed = self.units(node.among, node)
        scores = self.value(node.scores)
        # A unit that an input lacks is no unit, and not one of mass 0.
        return torch.where(scores == NEVER, NEVER, safe_softmax(torch.where(allowed, scores, NEVER)))

    @means(Regroup)
    def _regroup(self, node: Regroup) -> Tensor:
        scores = self.value(node.scores)
        parts = []
        for part in scores.split(node.unit, dim=3):
            here = part != NEVER
            count = here.sum(3)
            total = torch.where(here, part, 0.0).sum(3)
            joined = part.amax(3) if node.how == "max" else total / count.clamp(min=1) if node.how == "mean" else total
            parts.append(torch.where(count > 0, joined, NEVER))
        return torch.stack(parts, dim=3)

    @means(Plus)
    def _plus(self, node: Plus) -> Tensor:
        first, second = together(self.value(node.first), self.value(node.second))
        return first + second

    @means(Gumbel)
    def _gumbel(self, node: Gumbel) -> Tensor:
        scores = self.value(node.scores)
        return scores + self.noise(node, scores.shape).scores().to(scores.dtype)

    def noise(self, node: Gumbel, size: Any) -> GumbelScores:
        """Numbers that depend on the seed and their place alone: the same wherever a call begins."""
        first = self.domain.q_offset // unit_of(node.axes[2])
        return GumbelScores(tuple(size), self.value(node.seed).long(), self.call.q.device, first_row=first)

    @means(Grouped)
    def _grouped(self, node: Grouped) -> Tensor:
        return reduced(self.value(node.x), self.call.k.shape[1] if node.heads == "kv_heads" else 1, node.how)

    # ---- key scores: (batch, heads, keys) ---------------------------------------------------------------------------------

    @means(Probe)
    def _probe(self, node: Probe) -> Tensor:
        x, y = together(self.value(node.x), self.value(node.y))
        keys, rows = y.shape[2], min(node.rows, x.shape[2])
        last = self.domain.q_offset + x.shape[2]
        position = torch.arange(last - rows, last, device=x.device)[:, None]
        column = torch.arange(keys, device=x.device)
        seen = (column < keys // node.complete * node.complete).expand(rows, keys)
        seen = seen & (column <= position) if node.causal else seen
        logits = x[:, :, -rows:] @ y.transpose(-1, -2) * self.scale_of(node.scale, x)
        mass = safe_softmax(torch.where(seen, logits, NEVER)).mean(2)
        return torch.where(column < last - rows, mass, 0.0) if node.keep == "before" else mass

    @means(Smooth)
    def _smooth(self, node: Smooth) -> Tensor:
        x = self.value(node.x)
        kept = x.shape[2] - (self.probing(node) if self.before(node) else 0)
        if not kept:
            return x
        pooled = functional.avg_pool1d(x[:, :, :kept].flatten(0, 1)[:, None], node.pool, 1, node.pool // 2)
        return functional.pad(pooled[:, 0].unflatten(0, x.shape[:2]), (0, x.shape[2] - kept))

    def before(self, node: Any) -> bool:
        """Whether key scores end before the rows that probe."""
        return node.keep == "before" if isinstance(node, Probe) else self.before(node.x)

    def probing(self, node: Any) -> int:
        """Keys from the first probing row on."""
        if isinstance(node, Probe):
            rows = min(node.rows, self.domain.rows)
            return self.domain.kv_len - (self.domain.q_offset + self.domain.rows - rows)
        return self.probing(node.x)

    @means(GroupedKeys)
    def _grouped_keys(self, node: GroupedKeys) -> Tensor:
        return reduced(self.value(node.x), self.call.k.shape[1] if node.heads == "kv_heads" else 1, node.how)
