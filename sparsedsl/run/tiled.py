"""The ``tiled`` lowering: dense products on the rectangles of a schedule, an online softmax over them, and an exact backward pass.

Stages of a forward pass, in order:

1. *prepare*: k and v contiguous, in float32 (float64 for float64): no copy if they are. Queries are read in place.
2. *strips* (:mod:`run.tiled_units`): for each strip, its pieces of keys one after the other: product, score rule, mask where a piece is
   masked, running maximum and sum, product with v. Strips and heads too small for a product of their own go together.
3. *scattered tiles* (:mod:`run.tiled_scatter`): the same on keys gathered for one row of tiles at a time.
4. *merge*: where lanes share queries, their results meet by LSE. A sink joins last.

The backward pass goes through the same strips with the global output and LSE; the pieces' gradients add up to the exact ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sparsedsl.lang.evaluate import evaluate
from sparsedsl.lang.pattern import Pattern
from sparsedsl.run.inputs import Call
from sparsedsl.run.score_rules import LN2, LOG2E
from sparsedsl.run.tiled_operands import Operands
from sparsedsl.run.tiled_scatter import scattered_units
from sparsedsl.run.tiled_units import Lane, Unit
from sparsedsl.tiling.schedule import LanePlan, Schedule

__all__ = ["backward", "forward"]

Tensor = torch.Tensor


def forward(pattern: Pattern, call: Call, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """``out (B, Hq, Sq, Dv)`` in the dtype of q, ``lse (B, Hq, Sq)`` in float32 (float64 for float64 inputs)."""
    with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
        return Pass(pattern, call, schedule).forward()


def backward(
    pattern: Pattern, call: Call, schedule: Schedule, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    learned: tuple[str, ...] = (),
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """Gradients of q, k, v and of the tables named in ``learned``, from the results of :func:`forward` and the gradients by them."""
    with torch.no_grad(), torch.autocast(call.q.device.type, enabled=False):
        return Pass(pattern, call, schedule).backward(out, lse, grad_out, grad_lse, learned)


class Pass(Operands):
    """One forward or backward pass."""

    def _units(self, plan: LanePlan) -> Iterator[Unit]:
        lane = Lane(self, plan)
        return lane.units() if plan.lists is None else scattered_units(lane, plan.lists)

    # ---- forward ----------------------------------------------------------------------------------------------

    def forward(self) -> tuple[Tensor, Tensor]:
        """Out and LSE."""
        shape = (self.batch, self.heads, self.rows)
        plain = not self.schedule.overlap and self.pattern.sink is None
        make = self.q.new_empty if self.schedule.covers else self.q.new_zeros
        out = make((*shape, self.call.v.shape[3]), dtype=self.call.q.dtype if plain else self.dtype)
        lse = self.q.new_full(shape, float("-inf"), dtype=self.dtype)
        self.by_row = {"out": self.grouped(out), "lse": self.grouped(lse)}
        for number, plan in enumerate(self.schedule.lanes):
            merge = self.schedule.overlap and number > 0
            for unit in self._units(plan):
                unit.forward(merge=merge)
        lse.mul_(LN2)
        if self.pattern.sink is not None:
            logit = self._sink(self.tables)
            share = torch.sigmoid(lse - logit).masked_fill_(lse == float("-inf"), 0.0)
            out.mul_(share[..., None])
            lse = torch.logaddexp(lse, logit)
        return out.to(self.call.q.dtype), lse

    def _sink(self, tables: Mapping[str, Tensor]) -> Tensor:
        assert_sink: Any = self.pattern.sink
        device = self.call.q.device
        env = {"b": torch.arange(self.batch, device=device)[:, None, None], "h": torch.arange(self.heads, device=device)[:, None]}
        value = evaluate(assert_sink.expr, {**env, **self.call.domain.lengths, **tables}, dtype=self.dtype)
        return value.to(self.dtype).expand(self.batch, self.heads, self.rows)

    # ---- backward ---------------------------------------------------------------------------------------------

    def backward(
        self, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, learned: tuple[str, ...]
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Gradients of q, k, v and the learned tables."""
        delta = (grad_out.to(self.dtype) * out.to(self.dtype)).sum(-1)
        if grad_lse is not None:
            delta = delta - torch.where(lse == float("-inf"), 0.0, grad_lse.to(self.dtype))
        lse2 = torch.where(lse == float("-inf"), float("inf"), lse * LOG2E)
        dq = torch.zeros(self.call.q.shape, dtype=self.dtype, device=self.q.device)
        dk, dv = (torch.zeros(t.shape, dtype=self.dtype, device=t.device) for t in (self.call.k, self.call.v))
        by_row = {"grad_out": grad_out, "lse": lse2, "delta": delta, "dq": dq}
        self.by_row = {name: self.grouped(t) for name, t in by_row.items()}
        self.by_key = {"dk": dk, "dv": dv}
        # In float64, where torch adds in a fixed order whatever the number of threads.
        self.leaves = {name: self.tables[name].detach().double().requires_grad_() for name in learned}
        self.table_grads = {name: torch.zeros_like(leaf) for name, leaf in self.leaves.items()}
        for plan in self.schedule.lanes:
            for unit in self._units(plan):
                unit.backward()
        if self.pattern.sink is not None and self.leaves:
            self._sink_backward(lse, delta)
        like = self.call
        grads = {name: grad.to(self.tables[name].dtype) for name, grad in self.table_grads.items()}
        return dq.to(like.q.dtype), dk.to(like.k.dtype), dv.to(like.v.dtype), grads

    def _sink_backward(self, lse: Tensor, delta: Tensor) -> None:
        with torch.enable_grad():
            logit = self._sink({**self.tables, **self.leaves})
        if logit.requires_grad:
            share = torch.where(lse == float("-inf"), 0.0, torch.exp(logit.detach() - lse))
            self.add_table_grads(torch.autograd.grad(logit, list(self.leaves.values()), -share * delta, allow_unused=True))
