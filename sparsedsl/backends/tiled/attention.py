"""The ``tiled`` lowering as a kernel: schedules, kept for the lengths and tables seen last, and the two passes over them."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace

import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.totals import Totals
from sparsedsl.backends.protocol import PatternRunner
from sparsedsl.backends.tiled import passes
from sparsedsl.backends.tiled.decoding import decode
from sparsedsl.backends.tiled.score_rules import rule_of
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.runtime.autograd import differentiable
from sparsedsl.runtime.call import Call, check_call
from sparsedsl.runtime.request import CallFacts
from sparsedsl.runtime.torch_modes import is_transformed
from sparsedsl.runtime.unseen import Sight
from sparsedsl.tiling.schedule import Schedule
from sparsedsl.tiling.scheduling import HeadShape, make_schedule
from sparsedsl.tuning.rates import machine

__all__ = ["HeadSizes", "TiledKernel", "sight_of", "sizes_of"]

log = logging.getLogger("sparsedsl")


@dataclass(frozen=True)
class HeadSizes:
    """Key/value heads, head dimension of q and k, head dimension of v."""

    kv_heads: int
    head_dim: int
    head_dim_v: int


def sizes_of(call: Call) -> HeadSizes:
    """Those of a checked call."""
    return HeadSizes(call.k.shape[1], call.q.shape[3], call.v.shape[3])


class TiledKernel(PatternRunner):
    """One pattern on torch's dense products. Compiles nothing; any float dtype, any head ratio, forward and backward."""

    def __init__(self, pattern: Pattern, *, minimal: bool = True) -> None:
        self.pattern, self.minimal = pattern, minimal
        self._names = sorted(pattern.mask.tables)
        self._schedules: Cache[Schedule] = Cache()

    def attend(self, call: Call, *, lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Out and LSE, differentiable."""
        if call.domain.rows == 1 and not call.needs_grad and not is_transformed(call.q, call.k, call.v, *call.tables.values()):
            # Keys that are not seen are not read: there is no NaN to guard against.
            found = decode(self.pattern, call)
            if found is not None:
                return found
        return differentiable(self, call)

    @property
    def source(self) -> str:
        """The pattern, which is interpreted."""
        return self.pattern.text

    def described(self, domain: Domain, facts: CallFacts) -> tuple[str, ...]:
        """How the mask is cut."""
        return tuple(str(self.schedule_of(domain, HeadSizes(facts.kv_heads, facts.head_dim, facts.head_dim_v))).splitlines())

    def expected_seconds(self, domain: Domain, facts: CallFacts, totals: Totals) -> float | None:
        """Of the schedule, on a CPU."""
        if facts.device != "cpu":
            return None
        return self.schedule_of(domain, HeadSizes(facts.kv_heads, facts.head_dim, facts.head_dim_v)).seconds

    def schedule(self, call: Call) -> Schedule:
        """How the mask of this call is cut: made once for lengths and tables."""
        return self.schedule_of(call.domain, sizes_of(call), call.run or None)

    def schedule_of(self, domain: Domain, sizes: HeadSizes, height: int | None = None) -> Schedule:
        """How the mask is cut over ``domain``, for heads of these sizes, on this machine. ``height``: of strips; None: the cheapest."""
        names = self._names
        key = (
            domain.rows, domain.kv_len, domain.q_offset, domain.batch, domain.heads, sizes.kv_heads, sizes.head_dim, sizes.head_dim_v,
            torch.get_num_threads(), height,
        )  # fmt: skip

        def make() -> Schedule:
            start = time.perf_counter()
            mask, heads = self.pattern.mask.expr, domain.heads
            tables = {name: domain.tables[name].cpu() for name in names}
            narrowed = Domain(domain.rows, domain.kv_len, domain.q_offset, domain.batch, heads, tables)
            group = 1 if self.pattern.tells_heads_apart else heads // sizes.kv_heads
            strips = max(1, domain.batch * heads // group // narrowed.groups(mask).count)
            price = rule_of(self.pattern).price_ns
            with torch.no_grad():
                shape = HeadShape(group, strips, sizes.head_dim, sizes.head_dim_v, price)
                made = make_schedule(mask, narrowed, machine(), shape, height, minimal=self.minimal)
            log.debug("schedule: %.1f ms", (time.perf_counter() - start) * 1e3)
            return made

        return self._schedules.get(key, [domain.tables[name] for name in names], make)

    def forward(self, call: Call, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
        """``out (B, Hq, Sq, Dv)``, ``lse (B, Hq, Sq)``."""
        return passes.forward(self.pattern, call, schedule)

    def backward(
        self, call: Call, schedule: Schedule, out: torch.Tensor, lse: torch.Tensor, grad_out: torch.Tensor,
        grad_lse: torch.Tensor | None, learned: tuple[str, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
        """Gradients of q, k, v and the learned tables."""
        return passes.backward(self.pattern, call, schedule, out, lse, grad_out, grad_lse, learned)

    def sight(self, call: Call) -> Sight:
        """Who sees whom in a call."""
        return sight_of(self.pattern, call)


def sight_of(pattern: Pattern, call: Call) -> Sight:
    """Who sees whom in a call of ``pattern``."""
    mask = pattern.mask.expr
    kernel = _EQUAL_WEIGHTS.get(mask, [], lambda: TiledKernel(attend(Mask(mask))))
    q, k = (t.new_zeros((*t.shape[:3], 1), dtype=torch.float32) for t in (call.q, call.k))
    tables = {name: call.tables[name] for name in kernel.pattern.tables}
    base = check_call(kernel.pattern, q, k, k, tables, q_offset=call.domain.q_offset)
    schedule = kernel.schedule(base)
    return Sight(
        call.k.shape[:3],
        lambda v: kernel.forward(replace(base, v=v), schedule),
        lambda out, lse, grad: kernel.backward(base, schedule, out, lse, grad, None, ())[2],
    )


# The kernel of a mask alone, for any tables: who sees whom, whatever the logits.
_EQUAL_WEIGHTS: Cache[TiledKernel] = Cache()
