"""Attention over picked chunks on Triton kernels: what they take and refuse, and their place in autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import sympy
import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.spans import span_rows, spans
from sparsedsl.backends.triton.attention import missing
from sparsedsl.backends.triton.selected_configs import block_of
from sparsedsl.backends.triton.selected_passes import Interval, Job, Run
from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.gpu.loading import interpreted
from sparsedsl.lang.expressions import Score
from sparsedsl.lang.pattern import attend
from sparsedsl.lang.symbols import SCORE
from sparsedsl.lang.tables import table_reads
from sparsedsl.runtime.autograd import no_second_derivatives
from sparsedsl.runtime.call import check_call
from sparsedsl.selection.checks import check_one, check_picks, check_weights
from sparsedsl.selection.selected import Picks
from sparsedsl.selection.selected_call import SelectedCall

__all__ = ["Interval", "picked_attention_triton", "selected_attention"]

Tensor = torch.Tensor
WIDEST_HEAD, LONGEST_CHUNK, LARGEST_TILE = 256, 128, 1 << 16
LESS = "Use backend='tiled'"
_INTERVALS: Cache[Any] = Cache()


def selected_attention(q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> tuple[Tensor, Tensor]:
    """:func:`~sparsedsl.backends.tiled.selected.selected_attention` on Triton kernels.

    Raises:
        UnsupportedError: a modified score, several choices in one mask, a mask that is no single interval of keys for each query, or
            what :func:`picked_attention_triton` cannot run; names the way out.
    """
    picks, inside = selected.blocks, None
    if selected.score != SCORE:
        raise UnsupportedError(f"the kernels that follow lists take logits as they are; got {Score(selected.score)}. {LESS}")
    if selected.choices:
        raise UnsupportedError(f"the kernels follow the lists of one choice; got {len(selected.choices)} in one mask. {LESS}")
    if selected.mask != sympy.true:
        inside = _interval_of(selected, q.device)
    # Under one softmax long chunks are so many short ones.
    fits = [size for size in range(16, LONGEST_CHUNK + 1) if picks.kv_unit % size == 0]
    if selected.weights is None and picks.kv_unit > LONGEST_CHUNK and fits:
        picks = picks.finer(fits[-1], k.shape[2])
    return picked_attention_triton(
        q, k, v, picks, scale=selected.scale, q_offset=selected.domain.q_offset, inside=inside, weights=selected.weights,
        one=selected.one,
    )  # fmt: skip


def _interval_of(selected: SelectedCall, device: torch.device) -> Interval:
    """The first and last key of each query under the mask of a call."""
    reads = {read.spec.name for read in table_reads(selected.mask)}
    tables = {name: selected.tables[name] for name in sorted(reads)}
    domain = replace(selected.domain, tables=tables)
    key = (selected.mask, domain.rows, domain.kv_len, domain.q_offset, domain.batch, domain.heads, device)
    ends = _INTERVALS.get(key, list(tables.values()), lambda: one_interval(selected.mask, domain))
    if ends is None:
        raise UnsupportedError(
            f"the kernels follow lists under one interval of keys for each query; the mask {selected.mask} is none. {LESS}"
        )
    return Interval(*(end.to(device) for end in ends))


def one_interval(mask: Any, domain: Domain) -> tuple[Tensor, Tensor] | None:
    """First and last key of each query, if these are all it sees: ``(B|1, H|1, Sq)`` each, where the tables are (on the host without any).

    Of several intervals at most one may hold keys: conditions that exclude each other are two intervals, of which one is empty.
    """
    found = spans(mask)
    if found is None or not found:
        return None
    ends = [torch.broadcast_tensors(*parts) for parts in zip(*(span_rows(span, domain) for span in found), strict=True)]
    first, last = (torch.stack(parts) for parts in ends)
    holds = last >= first
    if len(found) > 1 and bool((holds.sum(0) > 1).any()):
        return None
    return torch.where(holds, first, domain.kv_len).amin(0), torch.where(holds, last, -1).amax(0)


def picked_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    picks: Picks,
    *,
    scale: float,
    q_offset: int = 0,
    inside: Interval | None = None,
    weights: Tensor | None = None,
    one: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`~sparsedsl.backends.tiled.selected.selected_attention` on Triton kernels; the LSE is float32.

    Any ratio of heads, any chunk up to 128 tokens. Lists must ascend and hold a chunk once; what they hold is not checked, as
    nothing here waits for the device. Products of float32 are IEEE, or TF32 where ``torch.backends.cuda.matmul.allow_tf32`` says
    so. Gradients are deterministic.

    Args:
        q, k, v, picks, scale, weights, one: as there; weights are read as float32.
        q_offset: position of the first query; only for the signature's sake, as an interval says positions of keys.
        inside: which keys of a picked chunk attend: an :class:`Interval`.

    Raises:
        ShapeError: tensors, picks, weights or interval do not fit each other.
        UnsupportedError: no GPU, float64, heads wider than 256, chunks longer than 128 or too large in float32, lists for several
            queries, or ``inside`` is a function; names the way out.
    """
    call = check_call(_ANY, q, k, v, {}, q_offset=q_offset, scale=scale)
    check_picks(picks, call.q, call.k)
    _refuse(call.q, call.v, picks, inside)
    if inside is not None:
        inside = _checked_interval(inside, call.q)
    if weights is not None:
        check_weights(weights, picks, call.q)
        weights = weights.float()
    check_one(one)
    dtype = q.dtype
    if dtype == torch.bfloat16 and interpreted():  # Triton's interpreter multiplies the bits of bfloat16
        q, k, v = q.float(), k.float(), v.float()
    out, lse = _Attend.apply(Job(picks, call.scale, inside, one), q, k, v, weights)
    return out.to(dtype), lse


_ANY = attend(True)


def _refuse(q: Tensor, v: Tensor, picks: Picks, inside: Any) -> None:
    """Raise for what the kernels cannot do."""
    lacking = missing(q.device.type)
    if lacking is not None:
        raise UnsupportedError(f"picked_attention_triton: {lacking}. {LESS}")
    if q.dtype == torch.float64:
        raise UnsupportedError(f"the kernels compute in float32, q is float64: results would lose digits. {LESS}")
    widest = max(q.shape[3], v.shape[3])
    if widest > WIDEST_HEAD:
        raise UnsupportedError(
            f"heads may be {WIDEST_HEAD} wide, as tiles of keys and sums for each row must fit an SM; got {widest}. {LESS}"
        )
    if not 1 <= picks.kv_unit <= LONGEST_CHUNK:
        raise UnsupportedError(
            f"a chunk may have {LONGEST_CHUNK} tokens, as its softmax is taken in one tile; got kv_unit {picks.kv_unit}. {LESS}"
        )
    taken = block_of(picks.kv_unit) * block_of(widest) * q.dtype.itemsize
    if taken > LARGEST_TILE:
        raise UnsupportedError(
            f"{picks.kv_unit} keys of {widest} numbers in {str(q.dtype).removeprefix('torch.')} take {taken:,} bytes, more than "
            f"fits an SM beside as many of V: pass bfloat16 or float16. {LESS}"
        )
    if inside is not None and not isinstance(inside, tuple):
        raise UnsupportedError(
            f"a kernel cannot call inside, which is a {type(inside).__name__}: pass Interval(first, last), the keys that each "
            f"query may attend to. {LESS}"
        )


def _checked_interval(inside: Interval, q: Tensor) -> Interval:
    """Both ends as int32 ``(B or 1, Hq or 1, Sq)``, contiguous."""
    ends = []
    for name, end in zip(Interval._fields, inside, strict=True):
        fits = (
            end.ndim == 3 and end.shape[0] in (1, q.shape[0]) and end.shape[1] in (1, q.shape[1]) and end.shape[2] == q.shape[2]
        )
        if not fits or end.dtype not in (torch.int32, torch.int64) or end.device != q.device:
            raise ShapeError(
                f"inside.{name} must be whole numbers (B or 1, Hq or 1, Sq) on {q.device}; got {end.dtype} {tuple(end.shape)} on "
                f"{end.device} for q {tuple(q.shape)}"
            )
        ends.append(end.int())
    first, last = torch.broadcast_tensors(*ends)
    return Interval(first.contiguous(), last.contiguous())


class _Attend(torch.autograd.Function):
    """Forward; inputs: a job, q, k, v and the weights or None."""

    @staticmethod
    def forward(ctx: Any, job: Job, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        run = Run(job, q, k, v, weights)
        out, lse, slot_lse = run.forward(save=any(ctx.needs_input_grad))
        ctx.job = job
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, slot_lse, q, k, v, weights, run.lists.chunks, run.lists.owners, run.lists.counts)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        if grad_out is None and grad_lse is None:
            return None, None, None, None, None
        _, want_q, *want_kv, want_weights = ctx.needs_input_grad
        grads = _AttendBackward.apply(ctx.job, any(want_kv), grad_out, grad_lse, *ctx.saved_tensors)
        return None, *(grad if want else None for grad, want in zip(grads, (want_q, *want_kv, want_weights), strict=True))


class _AttendBackward(torch.autograd.Function):
    """Backward; inputs: a job, whether k or v want gradients, those of the results, and what the forward pass saved."""

    @staticmethod
    def forward(
        ctx: Any, job: Job, keys: bool, grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor,
        slot_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, *lists: Tensor,
    ) -> Any:  # fmt: skip
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        return Run(job, q, k, v, weights, lists).backward(out, lse, slot_lse, grad_out, grad_lse, keys=keys)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        no_second_derivatives()
