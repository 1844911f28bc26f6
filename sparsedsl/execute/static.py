"""One pattern whose mask reads tables only: choose who runs a call, and run it. The stages:

1. *choose*   (:mod:`backends.registry`): facts of the call -> :class:`~sparsedsl.runtime.request.Plan`
2. *analyse*  (:mod:`analysis.tiles`, :mod:`tiling`): mask, domain -> tile lists or a schedule, remembered per lengths and tables
3. *emit*     (``codegen``): pattern -> source of mask and score functions (`flex`) or of kernels (`triton`), once per pattern
4. *run*      (``attention`` in the folder of each backend, :mod:`backends`): tensors and lists -> out, lse
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.lists import BlockLists
from sparsedsl.analysis.tiles import classify
from sparsedsl.backends.protocol import PatternRunner
from sparsedsl.backends.registry import AUTO, choose, named
from sparsedsl.execute.empty import attend_empty
from sparsedsl.execute.measured_backend import fastest_backend
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.heads import NEVER
from sparsedsl.runtime.patience import Patience
from sparsedsl.runtime.placed_rows import gather_rows, scatter_rows
from sparsedsl.runtime.places import Places
from sparsedsl.runtime.repeated import Again, Repeated
from sparsedsl.runtime.request import CallFacts, Plan, Request
from sparsedsl.runtime.torch_modes import is_transformed
from sparsedsl.settings import tune_mode

__all__ = ["StaticAttention", "static_attention"]

Tensor = torch.Tensor
log = logging.getLogger("sparsedsl")


class StaticAttention:
    """A pattern with what is remembered for it: tile lists, and what each backend has made ready.

    ``minimal``: its tile lists are to have no tile too many, which is not worth the time where tables are new with every call.
    """

    def __init__(self, pattern: Pattern, *, minimal: bool = True):
        self.pattern, self.minimal = pattern, minimal
        self._lists: Cache[BlockLists] = Cache()
        self._runners: dict[str, PatternRunner] = {}
        self._repeated: dict[str, Repeated[Again]] = {}

    def again(self, q: Any, k: Any, v: Any, backend: str, q_offset: Any, scale: Any) -> tuple[Tensor, Tensor] | None:
        """``(out, lse)`` of a call of a kind that was checked and run before, on unchecked arguments; None: make an ordinary call."""
        repeated = self._repeated.get(backend)
        found = None if repeated is None else repeated.find(q, k, v, q_offset, scale)
        return None if found is None else found[0](q, k, v, found[1])

    def runner(self, backend: str) -> PatternRunner:
        """The pattern on a backend."""
        found = self._runners.get(backend)
        if found is None:
            found = self._runners[backend] = named(backend).pattern(self.pattern, self.lists, minimal=self.minimal)
        return found

    def request(self, facts: CallFacts) -> Request:
        """What a call asks of a backend."""
        return Request("attention", facts, self.pattern, new_tables=not self.minimal)

    def plan(self, call: Call, backend: str, *, lse: bool, patience: Patience | None = None) -> Plan:
        """Who runs a call. ``patience``: of the call that it is a piece of.

        Raises:
            UnsupportedError: the backend that was asked for cannot.
        """
        fastest = None
        if backend == AUTO and call.q.device.type != "cpu":

            def fastest(backends: tuple[str, ...]) -> tuple[str, str] | None:
                return self._fastest(call, backends)

        facts = CallFacts.of(call.q, call.k, call.v, grad=call.needs_grad, lse=lse)
        if call.places is not None:
            heads = call.places.kv_heads(call.k)
            facts = replace(facts, kv_heads=heads, q_len=call.domain.rows, kv_len=call.domain.kv_len)
        return choose(self.request(facts), backend, fastest=fastest, patience=patience)

    def attend(
        self, call: Call, backend: str, *, lse: bool, patience: Patience | None = None
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """``out``, and the LSE where it is wanted."""
        asked = backend
        if backend == AUTO or named(backend).may_refuse:
            backend = self.plan(call, backend, lse=lse, patience=patience).backend
        if call.is_empty:
            return attend_empty(self.pattern, call)
        if call.places is not None and (
            not named(backend).reads_places(call) or is_transformed(call.q, call.k, call.v, *call.given.values())
        ):
            return self._gathered(call, call.places, backend, lse)
        runner = self.runner(backend)
        found = runner.attend(call, lse=lse)
        if call.places is None and not call.given and not call.needs_grad and (again := runner.again(call)) is not None:
            usual = self.pattern.scale or call.q.shape[3] ** -0.5
            scales = (call.scale, None) if call.scale == usual else (call.scale,)
            self._repeated.setdefault(asked, Repeated()).remember(call, scales, again)
        return found

    def _gathered(self, call: Call, places: Places, backend: str, lse: bool) -> tuple[Tensor, Tensor | None]:
        """The same on copies of the rows, in the order of the call."""
        q = call.q if places.queries is None else gather_rows(call.q, places.queries)
        k, v = (t if places.keys is None else gather_rows(t, places.keys) for t in (call.k, call.v))
        out, found = self.runner(backend).attend(replace(call, q=q, k=k, v=v, places=None), lse=lse)
        if places.queries is None:
            return out, found
        rows = call.q.shape[2]
        found = None if found is None else scatter_rows(found, places.queries, rows, NEVER)
        return scatter_rows(out, places.queries, rows), found

    def again_of(self, call: Call, backend: str, patience: Patience | None = None) -> Again | None:
        """What runs calls of the kind of this one, which is one without tables that was run; None: nothing does."""
        if backend == AUTO or named(backend).may_refuse:
            plan = self.plan(call, backend, lse=True, patience=patience)
            if not plan.lasting:
                return None
            backend = plan.backend
        return self.runner(backend).again(call)

    def _fastest(self, call: Call, backends: tuple[str, ...]) -> tuple[str, str] | None:
        """The backend that was measured to be the fastest for calls like this one."""
        if "triton" not in backends or tune_mode() == "off" or is_transformed(call.q, call.k, call.v, *call.tables.values()):
            return None

        def run(backend: str) -> Callable[[], Any]:
            q, k, v = leaves = [t.detach().requires_grad_(t.requires_grad) for t in (call.q, call.k, call.v)]
            own = Call(q, k, v, call.domain, call.scale, call.given)

            def once() -> None:
                out, _ = self.runner(backend).attend(own, lse=False)
                if call.needs_grad:
                    wanted = [t for t in (*leaves, *call.tables.values()) if t.requires_grad]
                    torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)

            return once

        density: str = self.runner("triton").density(call)  # type: ignore[attr-defined]
        return fastest_backend(self.pattern.key, density, call, backends, run)

    def lists(self, domain: Domain, block: tuple[int, int]) -> BlockLists:
        """The tile lists of the mask over ``domain``, remembered while the tables live unchanged."""
        expr = self.pattern.mask.expr
        names = sorted(self.pattern.mask.tables)
        tables = [domain.tables[name] for name in names]
        free = expr.free_symbols
        key = (
            domain.rows, domain.kv_len, domain.q_offset, block,
            domain.batch if BATCH in free else 1, domain.heads if HEAD in free else 1,
        )  # fmt: skip

        def make() -> BlockLists:
            start = time.perf_counter()
            narrowed = Domain(
                domain.rows, domain.kv_len, domain.q_offset, domain.batch, domain.heads, dict(zip(names, tables, strict=True))
            )
            with torch.no_grad():
                lists = classify(expr, narrowed, block, minimal=self.minimal)
            log.debug("analyse %s: %.1f ms", lists, (time.perf_counter() - start) * 1e3)
            return lists

        return self._lists.get(key, tables, make)


_KNOWN: Cache[StaticAttention] = Cache()


def static_attention(pattern: Pattern, *, new_tables: bool) -> StaticAttention:
    """A pattern, remembered with its lists. ``new_tables``: its tables may be others at every call."""
    return _KNOWN.get((pattern, new_tables), [], lambda: StaticAttention(pattern, minimal=not new_tables))
