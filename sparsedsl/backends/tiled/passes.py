"""The ``tiled`` lowering: dense products on the rectangles of a schedule, an online softmax over them, and an exact backward pass.

Stages of a forward pass, in order:

1. *prepare*: k and v contiguous, in float32 (float64 for float64): no copy if they are. Queries are read in place.
2. *strips* (:mod:`backends.tiled.tile_jobs`): for each strip, its key tiles one after the other: product, score rule, mask where a
   key tile is masked, powers of two relative to the running maximum, sum, product with v. Strips and heads too small for a product of their own go together. Strips share the cores, one thread each
   (:mod:`runtime.threads`).
3. *scattered tiles* (:mod:`backends.tiled.gathered`): the same on keys gathered for one row of tiles at a time.
4. *merge*: where residue classes share queries, their results meet by LSE. A sink joins last.

The backward pass goes through the same strips with the global output and LSE; the key tiles' gradients add up to the exact ones.
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
from sparsedsl.tiling.schedule import Schedule

__all__ = ["backward", "forward"]

Tensor = torch.Tensor
# An LSE further from 0 than this has lost digits of the logarithm that was added to the largest logit, at 1e9 all of them.
FAR_LSE = 1024.0
# Threads that hold gradients of all keys each, where there are fewer heads than threads.
MOST_COPIES = 4


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

    def _jobs(self, residue: ResiduePass, heads: range) -> Iterator[TileJob]:
        lists = residue.plan.lists
        if lists is not None:  # rows of tiles are enough to share
            return scattered_jobs(residue, lists, heads, len(heads))
        # A thread computes several heads at once, but leaves some to the others.
        return residue.jobs(heads, max(1, len(heads) // self.workers))

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
        # Lanes that share queries wait for each other.
        stages = (
            [[plan] for plan in self.schedule.residue_classes] if self.schedule.overlap else [list(self.schedule.residue_classes)]
        )
        for number, plans in enumerate(stages):
            jobs = (job for plan in plans for job in self._jobs(ResiduePass(self, plan), self.flat_heads))
            work = (functools.partial(job.forward, merge=number > 0) for job in jobs)
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
        if lse.dtype == torch.float32 and lse.device.type == "cpu" and bool(far.any()):
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
        residue_classes = [ResiduePass(self, plan) for plan in self.schedule.residue_classes]
        kv_heads = self.call.k.shape[0] * self.call.k.shape[1]
        if self.workers == 1:
            self._backward_heads(residue_classes, self.flat_heads, total)
        elif kv_heads >= self.workers:
            self._backward_by_heads(residue_classes, kv_heads, total)
        else:
            self._backward_by_rows(residue_classes, total)
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
            for job in self._jobs(ResiduePass(self, plan), self.flat_heads):
                job.add_totals()
        if self.pattern.sink is not None:
            logit = sink_logit(self.pattern, self.call, self.tables, self.dtype) * LOG2E
            larger = torch.maximum(most, logit)
            total, most = total * (most - larger).exp2_() + (logit - larger).exp2_(), larger
        return most, total

    def _backward_heads(self, residue_classes: list[ResiduePass], heads: range, accumulators: GradientAccumulators) -> None:
        for residue in residue_classes:
            for job in self._jobs(residue, heads):
                job.backward(accumulators)

    def _backward_by_heads(self, residue_classes: list[ResiduePass], kv_heads: int, total: GradientAccumulators) -> None:
        """Each thread has key/value heads of its own: nobody else adds to their gradients."""
        ratio = len(self.flat_heads) // kv_heads
        edges = [kv_heads * number // self.workers * ratio for number in range(self.workers + 1)]
        own = [total.with_tables_of_its_own() for _ in range(self.workers)]
        run_all(
            [
                functools.partial(self._backward_heads, residue_classes, range(low, high), accumulators)
                for (low, high), accumulators in zip(itertools.pairwise(edges), own, strict=True)
            ]
        )
        for accumulators in own:
            total.add(accumulators)

    def _backward_by_rows(self, residue_classes: list[ResiduePass], total: GradientAccumulators) -> None:
        """Few heads: each thread has queries of its own, and adds to gradients of its own that are joined in a fixed order."""
        count = min(self.workers, MOST_COPIES)
        own = [total, *(GradientAccumulators(self) for _ in range(count - 1))]
        for residue in residue_classes:
            jobs = list(self._jobs(residue, self.flat_heads))
            edges = [len(jobs) * number // count for number in range(count + 1)]

            def task(low: int, high: int, accumulators: GradientAccumulators, jobs: list[TileJob] = jobs) -> None:
                for job in jobs[low:high]:
                    job.backward(accumulators)

            run_all(
                [
                    functools.partial(task, low, high, accumulators)
                    for (low, high), accumulators in zip(itertools.pairwise(edges), own, strict=True)
                ]
            )
        for accumulators in own[1:]:
            total.add(accumulators)
