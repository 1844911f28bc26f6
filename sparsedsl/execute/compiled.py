"""A compiled pattern. The stages of a call, in order:

1. *check*    (:mod:`runtime.call`): tensors, tables, offset -> :class:`~sparsedsl.runtime.call.Call`
2. *plan*     (:mod:`plan`): pattern, facts of the call -> :class:`~sparsedsl.plan.Plan`
3. *analyse*  (:mod:`analysis.tiles`, :mod:`tiling`): mask, domain -> tile lists or a schedule, remembered per lengths and tables
4. *emit*     (``codegen``): pattern -> source of mask and score functions (`flex`) or of kernels (`triton`), once per pattern
5. *run*      (``attention`` in the folder of each backend, :mod:`backends`): tensors and lists -> out, lse
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.analysis.lists import TileLists
from sparsedsl.analysis.tiles import block_pair, classify
from sparsedsl.backends.flex import attention
from sparsedsl.backends.reference.attention import attend_reference
from sparsedsl.backends.tiled.attention import HeadSizes, TiledKernel
from sparsedsl.backends.tiled.score_rules import score_rule
from sparsedsl.backends.triton.attention import TritonKernel, missing
from sparsedsl.execute import operators
from sparsedsl.execute.empty import attend_empty
from sparsedsl.execute.measured_backend import fastest_backend
from sparsedsl.gpu.kernel_config import Shape
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.plan import CallFacts, Costs, choose
from sparsedsl.runtime.arguments import arranged, warn_of_slips
from sparsedsl.runtime.autograd import differentiable, transformed
from sparsedsl.runtime.call import Call, bind_tables, check_call, exactly
from sparsedsl.runtime.torch_modes import is_traced, is_transformed
from sparsedsl.runtime.vmap import reads_batch
from sparsedsl.settings import tune_mode
from sparsedsl.tiling.cost import flex_seconds
from sparsedsl.tiling.schedule import Schedule
from sparsedsl.tuning.measure import machine

__all__ = ["Attention"]

# Positions, batch entries and heads that functions for FlexAttention reckon with where nobody says how many there are.
UNTOLD = 1 << 24
log = logging.getLogger("sparsedsl")


class Attention:
    """A compiled pattern; call it on tensors. Made by :func:`sparsedsl.compile`.

    The same pattern at a new length compiles nothing new. Tile lists and schedules are kept for the lengths and tables seen
    last, as many as ``SPARSEDSL_MEMORY_BYTES`` holds; :func:`sparsedsl.clear_caches` lets go of them.
    """

    def __init__(self, pattern: Pattern, backend: str, *, minimal: bool = True):
        self.pattern = pattern
        self.backend = backend
        # Whether its tile lists are to have no tile too many: not worth the time where tables are new with every call.
        self.minimal = minimal
        self._lists: Cache[TileLists] = Cache()
        # What a traced call needs, as plain values: torch.compile follows no sympy.
        self._handle, self._bound = operators.handle_of(pattern, backend), pattern.bound
        operators.remember(self._handle, self)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        q_offset: int | torch.Tensor | Literal["end"] | None = None,
        return_lse: bool = False,
        scale: float | None = None,
        **tables: Any,
    ) -> Any:
        """Attention of ``q (B, Hq, Sq, D)`` over ``k (B, Hkv, Skv, D)``, ``v (B, Hkv, Skv, Dv)``; ``Hq % Hkv == 0``.

        Args:
            q_offset: position of the first query (decode and chunked prefill); a number or a 0-d integer tensor. ``"end"``: the last
                query stands at the last key. None is 0, and warns once where there are fewer queries than keys.
            return_lse: also return the natural-log-sum-exp of the modified logits, ``(B, Hq, Sq)`` in float32 or float64.
            scale: factor on the dot product; default the pattern's, else ``D ** -0.5``.
            tables: one tensor for each table of the pattern that is not bound to it.

        Returns:
            ``out (B, Hq, Sq, Dv)``, or ``(out, lse)``. A row that may attend to nothing has out 0 and lse -inf. Under
            ``torch.autocast`` float32 inputs are cast as for torch's ``scaled_dot_product_attention``.

        Raises:
            ShapeError, TableError: see :func:`sparsedsl.runtime.call.check_call`.
            UnsupportedError: the backend cannot run this call; the message names the way out.
        """
        given = q_offset
        q, k, v, q_offset = arranged(q, k, v, q_offset)
        if is_traced(q, k, v):
            return operators.attend_traced(
                self._handle, self._bound, q, k, v, tables, q_offset=q_offset, return_lse=return_lse, scale=scale
            )
        warn_of_slips((self.pattern,), q, k, given)
        return self.attend_now(q, k, v, tables, q_offset=q_offset, return_lse=return_lse, scale=scale)

    def attend_now(
        self, q: Any, k: Any, v: Any, tables: Mapping[str, Any], *, q_offset: Any, return_lse: bool, scale: float | None
    ) -> Any:
        """The call on tensors that hold values; :meth:`__call__` says what it takes and gives."""
        call = check_call(self.pattern, q, k, v, tables, q_offset=q_offset, scale=scale)
        plan = choose(
            self.pattern,
            call_facts(call, return_lse),
            self.backend,
            missing=self.missing,
            fastest=lambda backends: self._fastest(call, backends),
        )
        if call.is_empty or plan.backend == "reference":
            out, lse = (attend_empty if call.is_empty else attend_reference)(self.pattern, call)
            return (out, lse) if return_lse else out
        if plan.backend in ("tiled", "triton"):
            out, lse = differentiable(self._tiled if plan.backend == "tiled" else self._triton, call)
            return (out, lse) if return_lse else out
        if is_transformed(call.q, call.k, call.v, *call.tables.values()):
            return transformed(self.pattern, functools.partial(self._run_flex, plan.block, return_lse), call, return_lse)
        return self._run_flex(plan.block, return_lse, call)

    def _fastest(self, call: Call, backends: tuple[str, ...]) -> tuple[str, str] | None:
        """The backend that was measured to be the fastest for calls like this one."""
        if "triton" not in backends or tune_mode() == "off" or is_transformed(call.q, call.k, call.v, *call.tables.values()):
            return None

        def run(backend: str) -> Callable[[], Any]:
            other = Attention(self.pattern, backend)
            q, k, v = leaves = [t.detach().requires_grad_(t.requires_grad) for t in (call.q, call.k, call.v)]

            def once() -> None:
                tables, offset = call.tables, call.domain.q_offset
                out = other.attend_now(q, k, v, tables, q_offset=offset, return_lse=False, scale=call.scale)
                if call.needs_grad:
                    wanted = [t for t in (*leaves, *tables.values()) if t.requires_grad]
                    torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)

            return once

        return fastest_backend(self.pattern.key, self._triton.density(call), call, backends, run)

    def _run_flex(self, block: tuple[int, int], return_lse: bool, call: Call) -> Any:
        return self._kernel.run(call, self.lists(call.domain, block), return_lse=return_lse)

    @functools.cached_property
    def _tiled(self) -> TiledKernel:
        return TiledKernel(self.pattern, minimal=self.minimal)

    @functools.cached_property
    def _triton(self) -> TritonKernel:
        return TritonKernel(self.pattern, self.lists)

    @property
    def reads_batch(self) -> bool:
        """Whether batch entries are told apart."""
        return reads_batch(self.pattern)

    # For the operators: every pattern has an LSE, and is one call of one lowering.
    has_lse = one_call = True

    def missing(self, device: str) -> str | None:
        """Why generated kernels of this pattern cannot run on a kind of device ("cpu", "cuda"), or None."""
        return missing(device) or self._triton.refusal

    def kernels(self, domain: Domain, device: str, shape: Shape, *, grad: bool) -> tuple[str, ...]:
        """How `triton` would find its tiles and launch its kernels, in words."""
        return self._triton.described(domain, device, shape, grad=grad)

    def schedule(self, domain: Domain, sizes: HeadSizes) -> Schedule:
        """How `tiled` cuts the mask over ``domain``, remembered while the tables live unchanged."""
        return self._tiled.schedule_of(domain, sizes)

    def costs(self, domain: Domain, sizes: HeadSizes) -> Costs:
        """What a forward pass on CPU is expected to take."""
        rates, lists = machine(), self.lists(domain, (128, 128))
        groups = lists.shape[0] * lists.shape[1]
        pairs = lists.listed * 128 * 128 * (domain.batch * domain.heads / groups)
        price = score_rule(self.pattern.score.expr).price_ns
        return Costs(
            self._tiled.schedule_of(domain, sizes).seconds,
            flex_seconds(rates, pairs, sizes.head_dim, sizes.head_dim_v, price),
            rates.source,
        )

    @functools.cached_property
    def _kernel(self) -> attention.FlexKernel:
        return attention.FlexKernel(self.pattern)

    def lists(self, domain: Domain, block: tuple[int, int]) -> TileLists:
        """The tile lists of the mask over ``domain``, remembered while the tables live unchanged."""
        expr = self.pattern.mask.expr
        names = sorted(self.pattern.mask.tables)
        tables = [domain.tables[name] for name in names]
        free = expr.free_symbols
        key = (
            domain.rows, domain.kv_len, domain.q_offset, block,
            domain.batch if BATCH in free else 1, domain.heads if HEAD in free else 1,
        )  # fmt: skip

        def make() -> TileLists:
            start = time.perf_counter()
            narrowed = Domain(
                domain.rows, domain.kv_len, domain.q_offset, domain.batch, domain.heads, dict(zip(names, tables, strict=True))
            )
            with torch.no_grad():
                lists = classify(expr, narrowed, block, minimal=self.minimal)
            log.debug("analyse %s: %.1f ms", lists, (time.perf_counter() - start) * 1e3)
            return lists

        return self._lists.get(key, tables, make)

    @property
    def source(self) -> str:
        """The generated code, readable; for ``"reference"`` and ``"tiled"`` the pattern itself, which they interpret.

        Of ``"triton"``: the kernels for heads 64 wide.
        """
        if self.backend in ("reference", "tiled"):
            return self.pattern.text
        return self._triton.source().text if self.backend == "triton" else self._kernel.source

    def block_mask(
        self,
        q_len: int,
        kv_len: int,
        *,
        batch: int = 1,
        heads: int | None = None,
        q_offset: int = 0,
        block_size: Any = 128,
        device: Any = None,
        backward: bool = True,
        **tables: Any,
    ) -> Any:
        """A torch ``BlockMask`` with compact storage for plain ``flex_attention``; its ``mask_mod`` takes local query indices.

        ``batch`` and ``heads`` (query heads; by default as many as the pattern is written for, else 1) matter only if the pattern
        reads ``b`` or ``h``: a dimension it does not read has
        size 1 in the lists and broadcasts. Lengths in tokens. Modified scores and sinks are not part of a BlockMask:
        see :meth:`score_mod`. ``backward=False`` leaves out the tiles by key, which only gradients need: with a column that all
        queries see (a sink) they grow with the square of the length.

        Raises :class:`~sparsedsl.UnsupportedError`, with the bytes, where the lists do not fit into memory.

        >>> import sparsedsl as sd
        >>> attn = sd.compile((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 512))
        >>> attn.block_mask(4096, 4096).kv_indices.shape
        torch.Size([1, 1, 32, 32])
        """
        bound = bind_tables(self.pattern, tables, device=None if device is None else torch.device(device))
        domain = Domain(q_len, kv_len, q_offset, batch, count_heads((self.pattern,), bound, heads), bound)
        domain = exactly((self.pattern.mask.expr,), domain)
        lists = self.lists(domain, block_pair(block_size))
        where = torch.device(device) if device is not None else domain.device
        return attention.block_mask(self.pattern, lists, domain, where, backward=backward)

    def _bound_exactly(
        self, expr: Any, tables: Mapping[str, Any], q_offset: int, q_len: int | None, kv_len: int | None
    ) -> Mapping[str, torch.Tensor]:
        """The tables for a function of positions, of which ``UNTOLD`` at most are reckoned with where lengths are not given."""
        rows = UNTOLD if q_len is None else max(1, q_len - q_offset)
        domain = Domain(rows, kv_len or UNTOLD, q_offset, UNTOLD, UNTOLD, bind_tables(self.pattern, tables))
        return exactly((expr,), domain).tables

    def mask_mod(self, *, q_offset: int = 0, q_len: int | None = None, kv_len: int | None = None, **tables: Any) -> Any:
        """The mask as a FlexAttention ``mask_mod(b, h, q_idx, kv_idx)`` of local query indices. Lengths only if the pattern reads them."""
        bound = self._bound_exactly(self.pattern.mask.expr, tables, q_offset, q_len, kv_len)
        return attention.mask_mod(self.pattern, bound, q_offset=q_offset, q_len=q_len, kv_len=kv_len)

    def score_mod(self, *, q_offset: int = 0, q_len: int | None = None, kv_len: int | None = None, **tables: Any) -> Any:
        """The score as a FlexAttention ``score_mod(score, b, h, q_idx, kv_idx)``; None if the pattern does not modify scores."""
        bound = self._bound_exactly(self.pattern.score.expr, tables, q_offset, q_len, kv_len)
        return attention.score_mod(self.pattern, bound, q_offset=q_offset, q_len=q_len, kv_len=kv_len)

    def explain(
        self,
        q_len: int,
        kv_len: int | None = None,
        *,
        batch: int = 1,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int = 64,
        head_dim_v: int | None = None,
        dtype: Any = "float32",
        device: Any = "cpu",
        q_offset: int = 0,
        grad: bool = False,
        return_lse: bool = False,
        **tables: Any,
    ) -> Any:
        """What a call of this shape would do and cost, before anything runs: backend and why, tiles, FLOPs, bytes, warnings.

        Returns an :class:`~sparsedsl.execute.explain.Explanation`; ``print`` it. Lengths in tokens.
        """
        from sparsedsl.execute.explain import explain

        heads = count_heads((self.pattern,), {**self.pattern.bound, **tables}, heads)
        facts = CallFacts(
            torch.device(device).type, str(dtype).removeprefix("torch."), batch, heads, kv_heads or heads, q_len,
            q_len if kv_len is None else kv_len, head_dim, head_dim_v or head_dim, grad, return_lse,
        )  # fmt: skip
        return explain(self, facts, q_offset, tables)

    def __repr__(self) -> str:
        return f"<Attention backend={self.backend!r} {self.pattern!r}>"

    def __reduce__(self) -> Any:
        return Attention, (self.pattern, self.backend)


operators.register("pattern", lambda first, text: Attention(operators.read_pattern(text), first.split()[1]))


def call_facts(call: Call, return_lse: bool) -> CallFacts:
    """The plain facts of a checked call."""
    domain = call.domain
    return CallFacts(
        call.q.device.type, str(call.q.dtype).removeprefix("torch."), domain.batch, domain.heads, call.k.shape[1], domain.rows,
        domain.kv_len, call.q.shape[3], call.v.shape[3], call.needs_grad, return_lse,
    )  # fmt: skip
