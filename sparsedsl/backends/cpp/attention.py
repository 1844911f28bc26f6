"""The ``cpp`` lowering as a kernel: the two compiled passes, on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.totals import Totals
from sparsedsl.backends.cpp.call_bytes import HEAD, KINDS, OF_PATTERN, OF_REST, WEIGHING, call_block, place_fields, place_of
from sparsedsl.backends.cpp.libraries import fixed_pass, fixed_width, parallel
from sparsedsl.backends.cpp.limits import LIMITS
from sparsedsl.backends.cpp.prepared import BLOCK_KEYS, Prepared, Preparer
from sparsedsl.backends.protocol import ListMaker, PatternRunner
from sparsedsl.backends.tiled.attention import sight_of
from sparsedsl.lang.normalisers import STICK_BREAKING
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.autograd import differentiable
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.placed_rows import gather_rows, placed_sight
from sparsedsl.runtime.repeated import Again
from sparsedsl.runtime.request import CallFacts
from sparsedsl.runtime.sinks import sink_gradients
from sparsedsl.runtime.unseen import Sight
from sparsedsl.tuning.rates import machine

__all__ = ["CppKernel", "block_of", "of_pattern", "rows_without_gaps"]

Tensor = torch.Tensor
# Of the rate of one large product, what the passes reach on tiles that are not empty (`benchmarks/cpu.py patterns`); and small operations
# of a call.
SHARE_OF_PRODUCTS, CALLS = 0.85, 4


class CppKernel(PatternRunner):
    """One pattern as compiled C++, forward and backward. ``lists``: makes the tile lists of the mask."""

    def __init__(self, pattern: Pattern, lists: ListMaker) -> None:
        self.pattern = pattern
        self._prepare = Preparer(pattern, lists)

    def attend(self, call: Call, *, lse: bool) -> tuple[Tensor, Tensor]:
        """Out and LSE, differentiable."""
        return differentiable(self, call)

    def again(self, call: Call) -> Again | None:
        """Where nothing is made for lengths: the same fields but for a dozen."""
        source, q, v = self._prepare.source(double=call.q.dtype == torch.float64), call.q, call.v
        if source.slots or source.reads_lengths:
            return None
        schedule = self.schedule(call)
        (batch, heads, rows, width), kv_heads, v_width = q.shape, call.k.shape[1], v.shape[3]
        real = torch.float64 if q.dtype == torch.float64 else torch.float32
        tail = OF_PATTERN.pack(*of_pattern(schedule), *[0] * OF_REST)
        scale, kind, openmp, run = call.scale, KINDS[q.dtype], parallel(), fixed_pass("forward", real == torch.float64)
        out_head = rows * v_width
        out_batch = heads * out_head

        def again(q: Tensor, k: Tensor, v: Tensor, q_offset: int) -> tuple[Tensor, Tensor] | None:
            (q_batch, q_head, q_row, q_one), (k_batch, k_head, k_row, k_one) = q.stride(), k.stride()
            v_batch, v_head, v_row, v_one = v.stride()
            if not q_one == k_one == v_one == 1 or q.is_neg() or k.is_neg() or v.is_neg():
                return None
            out, lse = q.new_empty((batch, heads, rows, v_width)), q.new_empty((batch, heads, rows), dtype=real)
            block = HEAD.pack(
                batch, heads, kv_heads, rows, k.shape[2], width, v_width, q_offset, scale, kind, torch.get_num_threads(), openmp,
                q.data_ptr(), q_batch, q_head, q_row, k.data_ptr(), k_batch, k_head, k_row, v.data_ptr(), v_batch, v_head, v_row,
                out.data_ptr(), out_batch, out_head, v_width, lse.data_ptr(),
            )  # fmt: skip
            return (out, lse) if run(block + tail) > 0 else None

        return again

    @property
    def source(self) -> str:
        """The C++ of the pattern."""
        return self._prepare.source().text

    def described(self, domain: Domain, facts: CallFacts) -> tuple[str, ...]:
        """How keys are found."""
        source = self._prepare.source(double=facts.dtype == "float64")
        if source.intervals is None:
            lines = [f"keys: lists of blocks of {BLOCK_KEYS} keys, pairs looked at one by one in those that are not full"]
        else:
            searched = sum(interval.searched for interval in source.intervals)
            how = "worked out by the code" if not searched else f"{searched} of them looked up in monotone tables before"
            lines = [f"keys: {len(source.intervals)} interval{'s' * (len(source.intervals) != 1)} a query, {how}"]
        if source.step > 1:
            lines.append(f"positions of one residue modulo {source.step} at a time")
        if self.pattern.normaliser == STICK_BREAKING:
            lines.append("blocks of keys from the last to the first, until nothing is left")
        if facts.dtype in ("bfloat16", "float16"):
            lines.append(f"{facts.dtype} is widened to float32 as it is read")
        return tuple(lines)

    def expected_seconds(self, domain: Domain, facts: CallFacts, totals: Totals) -> float | None:
        """Products of the tiles that are not empty, at the rate of large products; residues are dense to it, and cost no more than that."""
        double = facts.dtype == "float64"
        pairs = totals.pairs_of(facts.batch, facts.heads) // self._prepare.source(double=double).step
        rate = max(machine().matmul_gflops) * 1e9 * SHARE_OF_PRODUCTS / (2 if double else 1)
        return 2 * pairs * (facts.head_dim + facts.head_dim_v) / rate + CALLS * machine().call_us * 1e-6

    def schedule(self, call: Call) -> Prepared:
        """Made once for lengths and tables."""
        return self._prepare.of(call)

    def sight(self, call: Call) -> Sight:
        """Who sees whom in a call."""
        places = call.places
        if places is None:
            return sight_of(self.pattern, call)
        domain, heads = call.domain, places.kv_heads(call.k)
        q = call.q[:, :, :1].expand(-1, -1, domain.rows, -1)
        k, v = (t[:, :1, :1].expand(-1, heads, domain.kv_len, -1) for t in (call.k, call.v))
        return placed_sight(places, call.q, call.k, lambda: sight_of(self.pattern, replace(call, q=q, k=k, v=v, places=None)))

    def forward(self, call: Call, schedule: Prepared) -> tuple[Tensor, Tensor, bool]:
        """``out (B, Hq, Sq, Dv)`` in the dtype of q, ``lse (B, Hq, Sq)`` in float32 (float64 for float64), whether ``out`` is finite."""
        q, k, v = (rows_without_gaps(t.detach()) for t in (call.q, call.k, call.v))
        shape = q.shape[:3]
        real = torch.float64 if q.dtype == torch.float64 else torch.float32
        out, lse = q.new_empty((*shape, v.shape[3])), q.new_empty(shape, dtype=real)
        if _has_rows_without_query(call):
            out.zero_()
            lse.fill_(-float("inf"))
        done = _run("forward", call, schedule, (q, k, v, out), lse, [0] * 15)
        return out, lse, bool(done)

    def backward(
        self, call: Call, schedule: Prepared, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
        learned: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        """Gradients of q, k, v and the learned tables; the same inputs give the same bits, whatever the number of threads."""
        q, k, v, out, grad_out = (rows_without_gaps(t.detach()) for t in (call.q, call.k, call.v, out, grad_out))
        domain, real = call.domain, lse.dtype
        lse = lse.detach().contiguous()
        delta, grad_q = torch.empty_like(lse), q.new_empty(q.shape, dtype=real)
        if _has_rows_without_query(call):
            delta.zero_()
            grad_q.zero_()
        width = fixed_width("backward", real == torch.float64)
        grad_k, grad_v = (t.new_zeros((*t.shape[:3], -(-t.shape[3] // width) * width), dtype=real) for t in (k, v))
        grads_lse = None if grad_lse is None else grad_lse.detach().to(real).contiguous()
        units = domain.batch * k.shape[1]
        parts = max(1, min(-(-LIMITS.now.parts // units), domain.rows * call.group // LIMITS.now.part_rows))
        read = [slot.name for slot in schedule.source.slots if slot.kind == "sums"]
        size = sum(call.tables[name].numel() for name in read)
        alone = size * units * parts * 8 > LIMITS.now.sums_bytes
        sums = torch.zeros((1 if alone else units * parts, size), dtype=torch.float64) if read and learned else None
        names = schedule.native.functions
        rest = [
            *place_of(grad_out), 0 if grads_lse is None else grads_lse.data_ptr(), delta.data_ptr(),
            grad_q.data_ptr(), grad_k.data_ptr(), grad_v.data_ptr(), names["slope"], names["gains"] if sums is not None else 0,
            0 if sums is None else sums.data_ptr(), size, parts, int(alone),
        ]  # fmt: skip
        _run("backward", call, schedule, (q, k, v, out), lse, rest)
        grads = self._table_gradients(call, read, sums, lse, delta, learned)
        grad_k, grad_v = (g[..., : t.shape[3]].to(t.dtype).contiguous() for g, t in ((grad_k, k), (grad_v, v)))
        return grad_q.to(q.dtype), grad_k, grad_v, grads

    def _table_gradients(
        self, call: Call, read: Sequence[str], sums: Tensor | None, lse: Tensor, delta: Tensor, learned: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """Out of the sums of all parts, in float64 and in a fixed order; and through the sink."""
        found = {name: torch.zeros(call.tables[name].shape, dtype=torch.float64) for name in learned}
        if sums is not None:
            total = sums[0].clone()
            for part in sums[1:]:
                total += part
            sizes = [call.tables[name].numel() for name in read]
            for name, grad in zip(read, total.split(sizes), strict=True):
                if name in found:
                    found[name] += grad.view(found[name].shape)
        leaves = {name: call.tables[name].detach().double().requires_grad_() for name in learned}
        if call.places is not None and call.places.queries is not None:
            lse, delta = (gather_rows(t[..., None], call.places.queries)[..., 0] for t in (lse, delta))
        for name, grad in sink_gradients(self.pattern, call, leaves, lse, delta).items():
            found[name] += grad
        return {name: grad.to(call.tables[name].dtype) for name, grad in found.items()}


def _has_rows_without_query(call: Call) -> bool:
    return call.places is not None and call.places.queries is not None


def _run(
    name: str, call: Call, schedule: Prepared, tensors: tuple[Tensor, Tensor, Tensor, Tensor], lse: Tensor, rest: Sequence[int]
) -> int:
    """Run a pass; ``rest``: the fields of the backward pass."""
    more, _held = schedule.fields(call)
    (q, k, *_), places = tensors, call.places
    keys, queries = (None, None) if places is None else places.narrow
    where = *place_fields(keys, k.shape[2]), *place_fields(queries, q.shape[2])
    block = block_of(call, schedule, tensors, lse, [*where, *rest], more)
    done = fixed_pass(name, lse.dtype == torch.float64)(block)
    if done < 0:
        raise MemoryError(f"the {name} pass found no memory for its sums")
    return done


def block_of(
    call: Call, schedule: Prepared, tensors: tuple[Tensor, Tensor, Tensor, Tensor], lse: Tensor, rest: Sequence[int], more: Sequence[int]
) -> bytes:  # fmt: skip
    """The bytes of a call: see ``codegen/cpp/call.h``. ``rest``: the fields of places and gradients."""
    q, k, v, out = tensors
    domain = call.domain
    return call_block(
        (
            domain.batch, domain.heads, k.shape[1], domain.rows, domain.kv_len, q.shape[3], v.shape[3], domain.q_offset,
        ),
        call.scale,
        [
            KINDS[q.dtype], torch.get_num_threads(), parallel(), *place_of(q), *place_of(k), *place_of(v), *place_of(out), lse.data_ptr(),
            *of_pattern(schedule), *rest, *more,
        ],
    )  # fmt: skip


def of_pattern(schedule: Prepared) -> tuple[int, ...]:
    """The fields of strips, of the functions of a pattern and of its lists."""
    source, names = schedule.source, schedule.native.functions
    intervals = -1 if source.intervals is None else len(source.intervals)
    return (
        *schedule.cut, source.step, WEIGHING[source.pattern.normaliser], intervals, names["ends"], names["mask"], names["score"],
        names["sink"], *schedule.lists,
    )  # fmt: skip


def rows_without_gaps(t: Tensor) -> Tensor:
    """The tensor with the entries of a row side by side, as they lie in memory; no copy if they do."""
    if t.is_neg():  # a view that says so alone
        t = t.resolve_neg()
    return t if t.stride(3) == 1 else t.contiguous()
