"""The ``flex`` lowering: generated mask and score functions, compact tile lists, torch's compiled FlexAttention.

A pattern is compiled once for each dtype, number of heads, head dimension and scale, and never again for another length, batch
size, offset, table or memory layout. What that takes (facts and experiments: CONTRIBUTING.md, "FlexAttention on CPU"):

- everything that varies is a tensor argument of the compiled function, which makes its own BlockMask;
- sizes are symbols without exceptions: no duck shaping (equal sizes at the first call need not stay equal), no special case for
  size 1, and the first call is made with copies of k and v whose strides have nothing to do with their sizes;
- one query row is run as two.

FlexAttention itself never runs uncompiled here: that would hold all logits. A compile that fails is an error.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.lists import BlockLists
from sparsedsl.analysis.totals import Totals
from sparsedsl.backends.flex.flex_lists import block_mask, mask_mod, pack, score_mod, tall_enough, widened
from sparsedsl.backends.protocol import ListMaker, PatternRunner
from sparsedsl.backends.tiled.attention import sight_of
from sparsedsl.codegen.to_flex import FlexSource, flex_kernel
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.expressions import Score
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.autograd import transformed
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.request import CallFacts
from sparsedsl.runtime.torch_modes import is_transformed
from sparsedsl.runtime.unseen import guarded_forward
from sparsedsl.torch_private import compile_failure, tile_sizes_named, varying_sizes
from sparsedsl.tuning.rates import machine

__all__ = ["FlexKernel", "block_mask", "mask_mod", "score_mod"]

# Tiles of tokens (queries, keys): what FlexAttention takes on every device.
BLOCK = (128, 128)


def reads_unwritten(device: str, kv_len: int) -> bool:
    """Whether torch's kernel for CPUs without AVX-512 reads memory that nobody wrote, with so many keys.

    Seen in torch 2.13 on a processor with AVX2 alone (AMD, Zen 3), heads 16 wide: the tile of keys is as long as all keys, and that is 8
    more than a multiple of 16. Found with MALLOC_PERTURB_ set, which fills such memory, at lengths of 8, 24, 40, .. 120.
    """
    return device == "cpu" and kv_len < BLOCK[1] and kv_len % 16 == 8 and torch.backends.cpu.get_cpu_capability() != "AVX512"


class FlexKernel(PatternRunner):
    """One pattern on FlexAttention; compiled at the first :meth:`run` of each kind of call."""

    def __init__(self, pattern: Pattern, lists: ListMaker) -> None:
        self.pattern, self._lists = pattern, lists
        self._packed: Cache[tuple[torch.Tensor, ...]] = Cache()

    @functools.cached_property
    def _source(self) -> FlexSource:
        return flex_kernel(self.pattern, sink_key=True)

    @property
    def source(self) -> str:
        """The generated module (as it is for CPU)."""
        return self._source.text

    def attend(self, call: Call, *, lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Out, and the LSE where it is wanted; differentiable on a GPU."""
        if is_transformed(call.q, call.k, call.v, *call.tables.values()):
            result = transformed(self.pattern, functools.partial(self._run, lse), call, lse)
        else:
            result = self._run(lse, call)
        return result if lse else (result, None)

    def expected_seconds(self, domain: Domain, facts: CallFacts, totals: Totals) -> float | None:
        """On a CPU: products of the tiles that are not empty, at the rate of torch's own flash attention, of which it is a variant."""
        if facts.device != "cpu":
            return None
        return (
            2 * totals.pairs_of(facts.batch, facts.heads) * (facts.head_dim + facts.head_dim_v) / (machine().flash_gflops * 1e9)
        )

    def _run(self, return_lse: bool, call: Call) -> Any:
        kernel = self._padded if reads_unwritten(call.q.device.type, call.k.shape[2]) else self
        return kernel.run(call, self._lists(call.domain, BLOCK), return_lse=return_lse)

    @functools.cached_property
    def _padded(self) -> FlexKernel:
        """The same attention over as many keys as a tile has, and one more: a sink whose logit is -inf adds them, and changes nothing."""
        own = self.pattern
        return (
            self if own.sink is not None else FlexKernel(Pattern(own.mask, own.score, Score(-sympy.oo), own.scale), self._lists)
        )

    def run(self, call: Call, lists: BlockLists, *, return_lse: bool = False) -> Any:
        """``out (B, Hq, Sq, Dv)``, or ``(out, lse (B, Hq, Sq))`` with the natural-log LSE.

        Raises:
            UnsupportedError: torch cannot compile the pattern.
        """
        grad = call.needs_grad
        if call.q.device.type == "cpu":

            def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return self._run_forward(replace(call, q=q, k=k, v=v), lists), q[..., :0]

            q, k, v = (t.detach() for t in (call.q, call.k, call.v))
            return guarded_forward(q, k, v, call.scale, run, lambda: sight_of(self.pattern, call))[0]
        return self._run_with_lse(call, lists, grad, return_lse)

    def _run_forward(self, call: Call, lists: BlockLists) -> torch.Tensor:
        """CPU: no LSE, so a sink is the logit of one more key."""
        source, domain = self._source, call.domain
        q, k, v = call.q.detach(), call.k.detach(), call.v.detach()
        sink_at = None
        if self.pattern.sink is not None and "sink_at" in source.values:  # alone in a tile of its own, which ends with it
            sink_at = -(-domain.kv_len // lists.block[1]) * lists.block[1]
            k, v = (F.pad(t, (0, 0, 0, sink_at + 1 - domain.kv_len)) for t in (k, v))
        packed = self._pack(lists, q.device, sink=sink_at is not None, backward=False)
        with torch.no_grad():
            values = kernel_values(source, domain, q.device, keys=k.shape[2], sink_at=sink_at)
            return _launch(source, (q, k, v), packed, values, call.scale, lists.block, lse=False)

    def _run_with_lse(self, call: Call, lists: BlockLists, grad: bool, return_lse: bool) -> Any:
        """GPU: a sink is joined through the LSE; gradients flow through both."""
        sink = self.pattern.sink
        source = flex_kernel(self.pattern, backward=grad)
        packed = self._pack(lists, call.q.device, sink=False, backward=grad)
        with ExitStack() as stack:
            if not grad:
                stack.enter_context(torch.no_grad())
            values = kernel_values(source, call.domain, call.q.device, keys=call.domain.kv_len)
            want_lse = return_lse or sink is not None
            result = _launch(source, (call.q, call.k, call.v), packed, values, call.scale, lists.block, lse=want_lse)
            if not want_lse:
                return result
            out, lse = result[0], result[1].lse
            if sink is not None:
                logit = evaluate(sink.expr, _head_env(call), dtype=torch.float32).to(torch.float32).expand(lse.shape)
                out = out * torch.sigmoid(lse - logit).unsqueeze(-1).to(out.dtype)
                lse = torch.logaddexp(lse, logit)
            return (out, lse) if return_lse else out

    def _pack(self, lists: BlockLists, device: torch.device, *, sink: bool, backward: bool) -> tuple[torch.Tensor, ...]:
        """The lists as the kernel takes them, remembered while ``lists`` lives."""

        def make() -> tuple[torch.Tensor, ...]:
            return tuple(t.to(device) for t in pack(lists, sink=sink, backward=backward))

        parts = [part for rows in (lists.full, lists.partial) for part in (rows.counts, rows.columns)]
        return self._packed.get((device, sink, backward, lists.block, lists.q_rows, lists.kv_len), parts, make)


# ---- values -----------------------------------------------------------------------------------------------------------


def kernel_values(
    source: FlexSource, domain: Domain, device: torch.device, *, keys: int, sink_at: int | None = None
) -> list[torch.Tensor]:
    """The arguments of the generated ``mods``: 0-d tensors, then the tables, as long as their direct reads reach.

    ``keys``: how many keys the kernel is given, padding and the sink's included.
    """
    # One row more than asked for, since a single query is run as two.
    reach = {"b": domain.batch, "h": domain.heads, "kv_idx": keys, "q_idx": domain.q_offset + max(domain.rows, 2)}
    reach |= {name: length + 1 for name, length in domain.lengths.items()}
    numbers = [domain.q_offset, *domain.lengths.values(), *(() if sink_at is None else (sink_at,))]
    values = [torch.tensor(n, device=device) for n in numbers]
    return values + [_table(domain.tables[name], extents, reach) for name, extents in source.extents.items()]


def _table(table: torch.Tensor, extents: tuple[frozenset[str | int], ...], reach: Mapping[str, int]) -> torch.Tensor:
    """A table in the type that the generated code computes in. Where it is too short the last entry repeats, as clamped reads have it."""
    table = widened(table)
    for dim, wanted in enumerate(extents):
        least = max((reach[w] if isinstance(w, str) else w for w in wanted), default=0)
        if least > table.shape[dim]:
            index = torch.arange(least, device=table.device).clamp(max=table.shape[dim] - 1)
            table = table.index_select(dim, index)
    return table.contiguous()


def _head_env(call: Call) -> dict[str, Any]:
    device, domain = call.q.device, call.domain
    batch = torch.arange(domain.batch, device=device)[:, None, None]
    return {"b": batch, "h": torch.arange(domain.heads, device=device)[:, None], **call.tables}


# ---- launching ----------------------------------------------------------------------------------------------------------

_Attention = Callable[..., Any]
_compiled: dict[tuple[Any, ...], _Attention] = {}
_lock = threading.RLock()
_serial = itertools.count()


def _launch(
    source: FlexSource,
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    lists: tuple[torch.Tensor, ...],
    values: list[torch.Tensor],
    scale: float,
    block: tuple[int, int],
    *,
    lse: bool,
) -> Any:
    """Run the compiled function of this kind of call; compile it if this is the first call of the kind."""
    q, k, v = qkv
    rows = q.shape[2]
    if rows == 1:
        q = torch.cat([q, q], dim=2)
    lists = tall_enough(lists, q.shape[2], block[0])
    # The output takes the layout of q.
    q, k, v = q.contiguous(), _unit_stride(k), _unit_stride(v)
    kind = (
        source.text, q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3], v.shape[3], scale, block, lse,
        torch.is_grad_enabled(), any(t.is_inference() for t in (q, k, v, *values, *lists)), torch.get_num_threads(),
    )  # fmt: skip
    with _steady(q.device.type), _explained(q.device.type):
        attention = _compiled.get(kind)
        if attention is None:
            with _lock:
                attention = _build(source, scale, block, lse)
                with tile_sizes_named():
                    result = _first_call(attention, q, k, v, lists, values)
                _compiled[kind] = attention
        else:
            result = attention(q, k, v, lists, *values)
    if rows > 1:
        return result
    return (result[0][:, :, :1], type(result[1])(lse=result[1].lse[:, :, :1])) if lse else result[:, :, :1]


def _build(source: FlexSource, scale: float, block: tuple[int, int], lse: bool) -> _Attention:
    """A function object of its own for each kind of call: torch limits how often one code object may be compiled."""
    namespace: dict[str, Any] = {"SCALE": scale, "BLOCK": block, "AUX": AuxRequest(lse=True) if lse else None}
    name = f"<sparsedsl flex {next(_serial)}>"
    exec(compile(source.text, name, "exec"), namespace)
    # fullgraph: one more compile than torch allows is an error, never a quiet return to eager code.
    return torch.compile(namespace["attention"], dynamic=True, fullgraph=True)


def _first_call(
    attention: _Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lists: tuple[torch.Tensor, ...],
    values: list[torch.Tensor],
) -> Any:
    """Compile on inputs that have nothing in common by chance: no shared storage, no strides that follow from sizes."""
    return attention(q.clone(), _odd_strides(k), _odd_strides(v), tuple(t.clone() for t in lists), *(t.clone() for t in values))


def _odd_strides(x: torch.Tensor) -> torch.Tensor:
    """A copy whose strides are no products of sizes, and that is no view."""
    _batch, heads, length, dim = x.shape
    row = dim + 8
    column = row * (length + 1)
    copy = torch.empty_strided(x.shape, (column * (heads + 1), column, row, 1), dtype=x.dtype, device=x.device)
    return copy.copy_(x)


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


@contextmanager
def _steady(device: str) -> Iterator[None]:
    """Whatever the caller's context, the compiled function sees one and the same."""
    with varying_sizes(), torch.autocast(device, enabled=False):
        yield


@contextmanager
def _explained(device: str) -> Iterator[None]:
    """Failures of torch's compiler as errors that name the way out."""
    try:
        yield
    except Exception as error:
        if not compile_failure(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        if "InvalidCxxCompiler" in reason:
            raise UnsupportedError(
                "backend 'flex' needs a C++ compiler on CPU, and torch found none that works. Install g++ or name one in the environment "
                "variable CXX, or use backend='tiled', which compiles nothing"
            ) from error
        raise UnsupportedError(
            f"torch {torch.__version__} cannot compile this pattern for FlexAttention on {device}: {type(error).__name__}: {reason}. "
            "Use backend='tiled', and please report the pattern"
        ) from error
