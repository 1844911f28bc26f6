"""The ``tiled`` lowering: dense products on the rectangles of a schedule, an online softmax over them, and an exact backward pass.

Stages of a forward pass, in order:

1. *prepare*: k and v contiguous, in float32 (float64 for float64): no copy if they are. Queries are read in place.
2. *strips* (:mod:`backends.tiled.tile_jobs`): for each strip, for as many heads at once as its logits have room for, its key tiles one
   after the other: product, score rule, mask where a key tile is masked, powers of two relative to the running maximum, sum, product
   with v. Strips share the cores, one thread each (:mod:`runtime.threads`): where torch splits every operation over all cores, each of
   them waits for a core that another program holds.
3. *scattered tiles* (:mod:`backends.tiled.gathered`): the same on keys gathered for one row of tiles at a time.
4. *merge*: where residue classes share queries, their results meet by LSE. A sink joins last.

The backward pass goes through the same strips with the global output and LSE; the key tiles' gradients add up to the exact ones. Each
thread has key/value heads of its own there: nobody else adds to their gradients.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch

from sparsedsl.backends.tiled.gathered import scattered_jobs
from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.backends.tiled.operands import GradientAccumulators, Operands
from sparsedsl.backends.tiled.score_rules import LN2, LOG2E
from sparsedsl.backends.tiled.tile_jobs import NO_KEY, ResiduePass, TileJob
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.sinks import sink_gradients, sink_logit
from sparsedsl.runtime.threads import run_all, share
from sparsedsl.runtime.torch_modes import plain_math
from sparsedsl.tiling.schedule import ResiduePlan, Schedule

__all__ = ["backward", "forward"]

Tensor = torch.Tensor
# An LSE further from 0 than this has lost digits of the logarithm that was added to the largest logit, at 1e9 all of them.
FAR_LSE = 1024.0


def forward(pattern: Pattern, call: Call, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """``out (B, Hq, Sq, Dv)`` in the dtype of q, ``lse (B, Hq, Sq)`` in float32 (float64 for float64 inputs)."""
    with plain_math(call.q.device.type):
        return TiledPass(pattern, call, schedule).forward()


def backward(
    pattern: Pattern, call: Call, schedule: Schedule, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    learned: tuple[str, ...] = (),
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """Gradients of q, k, v and of the tables named in ``learned``, from the results of :func:`forward` and the gradients by them."""
    with plain_math(call.q.device.type):
        return TiledPass(pattern, call, schedule).backward(out, lse, grad_out, grad_lse, learned)


class TiledPass(Operands):
    """One forward or backward pass."""

    def _jobs(self, plan: ResiduePlan, heads: range) -> Iterator[TileJob]:
        residue = ResiduePass(self, plan)
        return residue.jobs(heads) if plan.lists is None else scattered_jobs(residue, plan.lists, heads)

    @functools.cached_property
    def workers(self) -> int:
        """How many threads compute side by side: 1 if the work is not worth more, or the device is none that threads help."""
        worth = self.schedule.pairs * self.batch * self.shared * self.group >= LIMITS.now.threads_from
        return torch.get_num_threads() if worth and self.q.device.type == "cpu" else 1

    @property
    def flat_heads(self) -> range:
        """All heads that strips are made for."""
        return range(self.batch * self.shared)

    # ---- forward ----------------------------------------------------------------------------------------------

    def forward(self) -> tuple[Tensor, Tensor]:
        """Out and LSE."""
        shape = (self.batch, self.heads, self.rows)
        plain = not self.schedule.overlap and self.pattern.sink is None
        make = self.q.new_empty if self.schedule.covers else self.q.new_zeros
        out = make((*shape, self.call.v.shape[3]), dtype=self.call.q.dtype if plain else self.dtype)
        lse = self.q.new_full(shape, float("-inf"), dtype=self.dtype)
        self.by_row = {"out": self.grouped(out), "lse": self.grouped(lse)}
        for number, plan in enumerate(self.schedule.residue_classes):
            merge = self.schedule.overlap and number > 0
            work = (functools.partial(job.forward, merge=merge) for job in self._jobs(plan, self.flat_heads))
            if self.workers > 1:
                share(work, self.workers)
            else:
                for piece in work:
                    piece()
        lse.mul_(LN2)
        if self.pattern.sink is not None:
            logit = sink_logit(self.pattern, self.call, self.tables, self.dtype)
            left = torch.sigmoid(lse - logit).masked_fill_(lse == float("-inf"), 0.0)
            out.mul_(left[..., None])
            lse = torch.logaddexp(lse, logit)
        return out.to(self.call.q.dtype), lse

    # ---- backward ---------------------------------------------------------------------------------------------

    def backward(
        self, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, learned: tuple[str, ...]
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Gradients of q, k, v and the learned tables."""
        delta = (grad_out.to(self.dtype) * out.to(self.dtype)).sum(-1)
        if grad_lse is not None:
            delta = delta - torch.where(lse == float("-inf"), 0.0, grad_lse.to(self.dtype))
        lse2 = torch.where(lse == float("-inf"), float("inf"), lse * LOG2E)
        far = (lse.abs() > FAR_LSE) & lse.isfinite()
        if not self.pointwise and lse.dtype == torch.float32 and lse.device.type == "cpu" and bool(far.any()):
            most, sums = self._totals()
            # Gradients are linear in what comes from outside: a factor of all weights of a row is one of these.
            factor = torch.where(far, sums.reciprocal(), 1.0)
            lse2 = torch.where(far, most, lse2)
            grad_out, delta = grad_out.to(self.dtype) * factor[..., None], delta * factor
        dq = torch.zeros(self.call.q.shape, dtype=self.dtype, device=self.q.device)
        by_row = {"grad_out": grad_out, "lse": lse2, "delta": delta, "dq": dq}
        self.by_row = {name: self.grouped(t) for name, t in by_row.items()}
        # In float64, where torch adds in a fixed order whatever the number of threads.
        self.leaves = {name: self.tables[name].detach().double().requires_grad_() for name in learned}
        total = GradientAccumulators(self)
        kv_heads = self.call.k.shape[0] * self.call.k.shape[1]
        count, ratio = min(self.workers, kv_heads), len(self.flat_heads) // kv_heads
        if count <= 1:
            self._backward_heads(self.flat_heads, total)
        else:
            edges = [kv_heads * number // count * ratio for number in range(count + 1)]
            own = [total.with_tables_of_its_own() for _ in range(count)]
            pieces = zip(itertools.pairwise(edges), own, strict=True)
            run_all([functools.partial(self._backward_heads, range(*ends), accumulators) for ends, accumulators in pieces])
            for accumulators in own:
                total.add_tables(tuple(accumulators.tables.values()))
        for name, grad in sink_gradients(self.pattern, self.call, self.leaves, lse, delta).items():
            total.tables[name] += grad
        like = self.call
        grads = {name: grad.to(self.tables[name].dtype) for name, grad in total.tables.items()}
        return dq.to(like.q.dtype), total.dk.to(like.k.dtype), total.dv.to(like.v.dtype), grads

    def _totals(self) -> tuple[Tensor, Tensor]:
        """Of each row the largest logit in units of log2, and the sum of ``2**(logit - largest)``: an LSE as two numbers."""
        shape = (self.batch, self.heads, self.rows)
        most = self.q.new_full(shape, NO_KEY * torch.finfo(self.dtype).max, dtype=self.dtype)
        total = torch.zeros_like(most)
        self.by_row = {"most": self.grouped(most), "total": self.grouped(total)}
        for plan in self.schedule.residue_classes:
            for job in self._jobs(plan, self.flat_heads):
                job.add_totals()
        if self.pattern.sink is not None:
            logit = sink_logit(self.pattern, self.call, self.tables, self.dtype) * LOG2E
            larger = torch.maximum(most, logit)
            total, most = total * (most - larger).exp2_() + (logit - larger).exp2_(), larger
        return most, total

    def _backward_heads(self, heads: range, accumulators: GradientAccumulators) -> None:
        for plan in self.schedule.residue_classes:
            for job in self._jobs(plan, heads):
                job.backward(accumulators)
