"""Attention along lists of selected blocks in C++: each query against the blocks of its list, whatever mask and score are written."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.nn import functional

from sparsedsl.analysis.domain import Domain
from sparsedsl.backends.cpp.attention import block_of, of_pattern, rows_without_gaps
from sparsedsl.backends.cpp.call_bytes import HEAD, KINDS, OF_PATTERN, OF_PLACES, OF_REST, first_of, place_of, whole_vectors
from sparsedsl.backends.cpp.libraries import fixed_library, fixed_pass, fixed_width, parallel
from sparsedsl.backends.cpp.limits import LIMITS
from sparsedsl.backends.cpp.prepared import Prepared, Preparer
from sparsedsl.backends.tiled import selected_work as tiled
from sparsedsl.backends.tiled.passes import FAR_LSE
from sparsedsl.backends.tiled.selected import Passes, differentiable_selected
from sparsedsl.codegen.to_triton_selected import member_symbols
from sparsedsl.lang.expressions import Mask, Score
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.call import Call, check_tensors, wants_grad
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.torch_modes import is_transformed
from sparsedsl.selection.checks import check_selected_call
from sparsedsl.selection.selected_blocks import SelectedBlocks
from sparsedsl.selection.selected_call import Results, SelectedAgain, SelectedCall

__all__ = ["along_lists", "joined_attention", "preparer_of", "selected_again", "selected_attention"]

Tensor = torch.Tensor
# What the passes are told of lists, as in codegen/cpp/selected.cpp.
_OWN = struct.Struct("=14q")


def selected_attention(q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> tuple[Tensor, Tensor]:
    """``out (B, Hq, Sq, Dv)`` and ``lse (B, Hq, Sq)``, differentiable: see
    :func:`sparsedsl.backends.tiled.selected.selected_attention`, which gives the same.

    Raises:
        ShapeError: tensors, lists and weights do not fit each other.
        UnsupportedError: no compiler, or lists are for more than one query each.
    """
    known = [q, k, v, *selected.tables.values(), *([] if selected.weights is None else [selected.weights])]
    if not wants_grad(*known) and not is_transformed(*known) and (found := joined_attention(q, k, v, selected, None)) is not None:
        return found
    return differentiable_selected(q, k, v, selected, Passes(_forward, _backward))


def joined_attention(q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall, near: Results | None) -> Results | None:
    """The same without gradients; with ``near`` of one softmax with these results over other keys. None where some of it is not finite, or
    ``near`` is of another kind, or there are no lists to join it with."""
    real = accumulated(q.dtype)
    if near is not None:
        out, lse = near
        alike = out.dtype is q.dtype and lse.dtype is real and out.is_contiguous() and lse.is_contiguous()
        if not alike or not selected.blocks.indices.numel():
            return None
    check_tensors(q, k, v)
    check_selected_call(selected, q, k)
    *found, finite = _run(q, k, v, selected, selected.weights, near)
    return (found[0], found[1]) if finite else None


def selected_again(q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> SelectedAgain | None:
    """What runs calls of the kind of this one, which was checked: see :meth:`sparsedsl.backends.protocol.Backend.selected_again`."""
    if selected.choices or selected.tables:
        return None
    call, prepared = _checked_call(q, k, v, selected)
    if prepared.source.slots:  # made for lengths
        return None
    (batch, heads, rows, width), kv_heads, v_width = q.shape, k.shape[1], v.shape[3]
    real, kind, softmax1 = accumulated(q.dtype), KINDS[q.dtype], int(selected.softmax1)
    double = real == torch.float64
    run, columns = fixed_pass("selected", double), _columns(selected.blocks, selected.weights, double)
    tail = OF_PATTERN.pack(*of_pattern(prepared), *[0] * OF_REST)
    scale, openmp, out_head = call.scale, parallel(), rows * v_width

    def again(
        q: Tensor, k: Tensor, v: Tensor, q_offset: int, blocks: SelectedBlocks, weights: Tensor | None,
        near: Results | None,
    ) -> Results | None:  # fmt: skip
        indices = blocks.indices
        list_batch, list_heads, _, slots = indices.shape
        (q_batch, q_head, q_row, q_one), (k_batch, k_head, k_row, k_one) = q.stride(), k.stride()
        v_batch, v_head, v_row, v_one = v.stride()
        if not (q_one == k_one == v_one == 1 and 0 < slots <= blocks.blocks) or q.is_neg() or k.is_neg() or v.is_neg():
            return None
        if weights is not None and not (weights.dtype is real and weights.is_contiguous()):
            weights = weights.to(real).contiguous()
        # In the place of what it is joined with.
        out, lse = near or (
            torch.empty((batch, heads, rows, v_width), dtype=q.dtype),
            torch.empty((batch, heads, rows), dtype=real),
        )
        turned, values = _turned(q, k, v, blocks, real, columns, rows=True)
        block = HEAD.pack(
            batch, heads, kv_heads, rows, k.shape[2], width, v_width, q_offset, scale, kind, torch.get_num_threads(), openmp,
            q.data_ptr(), q_batch, q_head, q_row, k.data_ptr(), k_batch, k_head, k_row, v.data_ptr(), v_batch, v_head, v_row,
            out.data_ptr(), heads * out_head, out_head, v_width, lse.data_ptr(),
        )  # fmt: skip
        own = _OWN.pack(
            indices.data_ptr(), 0, 0 if weights is None else weights.data_ptr(), slots, blocks.kv_block, blocks.blocks, list_heads,
            list_heads if list_batch > 1 else 0, 0 if weights is None else weights.shape[1], softmax1, first_of(turned), first_of(values),
            *_places(near),
        )  # fmt: skip
        return (out, lse) if run(block + tail, own) > 0 else None

    return again


@functools.lru_cache(maxsize=256)
def along_lists(mask: sympy.Basic, score: sympy.Expr) -> Pattern:
    """A mask and a score as a pattern, in which :func:`~sparsedsl.codegen.to_triton_selected.member_symbols` ask about a block."""
    asked = {s: member_symbols(int(s.name.split()[1]) + 1)[-1] for s in mask.free_symbols if s.name.startswith("chosen ")}
    return Pattern(Mask(mask.xreplace(asked)), Score(score))


@functools.lru_cache(maxsize=256)
def preparer_of(mask: sympy.Basic, score: sympy.Expr) -> Preparer:
    """What makes the code for a mask and a score, whose symbols ``chosen i`` say whether choice i selected the block of a pair."""
    numbers = [int(s.name.split()[1]) for s in mask.free_symbols if s.name.startswith("chosen ")]
    return Preparer(along_lists(mask, score), None, max(numbers, default=-1) + 1)


@dataclass(frozen=True, eq=False)
class _Lists:
    """What a call's lists and weights are to the compiled code. ``held``: the tensors that ``fields`` point at."""

    slots: int
    fields: tuple[int, ...]
    held: tuple[Tensor | None, ...]

    @staticmethod
    def of(selected: SelectedCall, weights: Tensor | None, real: torch.dtype) -> _Lists:
        blocks = selected.blocks
        indices = blocks.indices[..., : blocks.blocks].contiguous()
        members = None
        if selected.members is not None and selected.choices:
            members = selected.members[..., : indices.shape[3]].expand(indices.shape).to(torch.int32).contiguous()
        if weights is not None:
            weights = weights.detach()[..., : indices.shape[3]].expand(-1, -1, indices.shape[2], -1).to(real).contiguous()
        batch, heads, _, slots = indices.shape
        fields = (
            indices.data_ptr(), 0 if members is None else members.data_ptr(), 0 if weights is None else weights.data_ptr(), slots,
            blocks.kv_block, blocks.blocks, heads, heads if batch > 1 else 0, 0 if weights is None else weights.shape[1],
            int(selected.softmax1),
        )  # fmt: skip
        return _Lists(slots, fields, (indices, members, weights))


def _checked_call(q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> tuple[Call, Prepared]:
    """The call as the compiled code takes it."""
    mask = selected.mask
    named = {sympy.Symbol(name): sympy.Symbol(f"chosen {n}") for n, name in enumerate(selected.choices) if name != f"chosen {n}"}
    preparer = preparer_of(mask.xreplace(named) if named else mask, selected.score)
    tables = {name: selected.tables[name].detach() for name in preparer.pattern.tables}
    domain = Domain(q.shape[2], k.shape[2], selected.domain.q_offset, q.shape[0], q.shape[1], tables)
    call = Call(q, k, v, domain, selected.scale, tables)
    prepared = preparer.of(call)
    return call, prepared.without_mask() if selected.mask == sympy.true else prepared


def _turned(
    q: Tensor, k: Tensor, v: Tensor, blocks: SelectedBlocks, real: torch.dtype, columns: int, *, rows: bool
) -> list[Tensor | None]:
    """Room for keys turned block by block, and for values as rows (``rows``) or turned; None where blocks are made ready as they are met
    or keys are gathered, and where values are read as they lie. ``columns``: of a block of keys, turned (:func:`_columns`)."""
    batch, kv_heads, kv_len, width = v.shape
    size, lists = 64 // real.itemsize, blocks.indices.shape
    if lists[2] * lists[3] * q.shape[1] < LIMITS.now.worth_turning * kv_heads * blocks.blocks:
        return [None, None]
    if not columns:
        return [None, None]
    entries = batch * kv_heads * blocks.blocks * columns
    found: list[Tensor | None] = [torch.empty(entries * q.shape[3], dtype=real)]
    if not rows:
        return [*found, torch.empty(entries * width, dtype=real)]
    as_they_lie = q.dtype == real and width % size == 0
    return [*found, None if as_they_lie else torch.empty(batch * kv_heads * kv_len * whole_vectors(width, size), dtype=real)]


def _columns(blocks: SelectedBlocks, weights: Tensor | None, double: bool) -> int:
    """Columns of the keys of a block, turned; 0 where blocks are so small that the keys of each query are gathered."""
    columns: int = fixed_library("selected", double).turned_columns(blocks.kv_block, int(weights is not None))
    return columns


def _copies(q: Tensor, k: Tensor, v: Tensor, real: torch.dtype) -> int:
    """In how many parts the gradients of keys and values are added up where keys are gathered; no matter of threads, so that sums have one
    order."""
    lines, limits = k.shape[0] * k.shape[1], LIMITS.now
    size = (k.numel() + v.numel()) * real.itemsize
    return max(
        1,
        min(limits.parts // lines, q.shape[0] * q.shape[1] * q.shape[2] // (lines * limits.part_rows), limits.sums_bytes // size),
    )


def _places(near: Results | None) -> tuple[int, int]:
    return (0, 0) if near is None else (near[0].data_ptr(), near[1].data_ptr())


def _run(
    q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall, weights: Tensor | None, near: Results | None = None
) -> tuple[Tensor, Tensor, bool]:
    """Results, and whether all of ``out`` is finite."""
    q, k, v = (rows_without_gaps(t.detach() if t.requires_grad else t) for t in (q, k, v))
    real = accumulated(q.dtype)
    out, lse = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3], dtype=real)
    lists = _Lists.of(selected, weights, real)
    if not lists.slots or not out.numel():
        return out.zero_(), lse.fill_(0.0 if selected.softmax1 and weights is None else -float("inf")), True
    call, prepared = _checked_call(q, k, v, selected)
    columns = _columns(selected.blocks, weights, real == torch.float64)
    turned, values = _turned(q, k, v, selected.blocks, real, columns, rows=True)
    more, _held = prepared.fields(call)
    own = _OWN.pack(*lists.fields, first_of(turned), first_of(values), *_places(near))
    done = fixed_pass("selected", real == torch.float64)(block_of(call, prepared, (q, k, v, out), lse, [0] * OF_REST, more), own)
    if done < 0:
        raise MemoryError("attention along selected blocks found no memory for its sums")
    return out, lse, bool(done)


def _forward(job: SelectedCall, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    return _run(q, k, v, job, weights)[:2]


def _backward(
    job: SelectedCall, want_kv: bool, grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor,
    v: Tensor, weights: Tensor | None, learned: tuple[str, ...] = (),
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, list[Tensor]]:  # fmt: skip
    """Gradients of q, k, v, the weights and the tables named in ``learned``."""
    real, double = accumulated(q.dtype), q.dtype == torch.float64
    known = lse.isfinite()
    lists = _Lists.of(job, weights, real)
    far = not double and weights is None and bool(((lse.abs() > FAR_LSE) & known).any())
    if far or not lists.slots or not out.numel():  # an LSE that has lost digits is taken apart again there
        return tiled.backward(job, want_kv, grad_out, grad_lse, out, lse, q, k, v, weights, learned)
    grad_out = torch.zeros((), dtype=q.dtype).expand(out.shape) if grad_out is None else grad_out
    slopes = None if grad_lse is None else torch.where(known, grad_lse.to(real), 0.0)
    q, k, v, out, grad_out = (rows_without_gaps(t.detach()) for t in (q, k, v, out, grad_out))
    delta = (grad_out.to(real) * out.to(real)).sum(-1)
    delta = (delta if slopes is None or weights is not None else delta - slopes).contiguous()
    lse = lse.contiguous()
    call, prepared = _checked_call(q, k, v, job)
    names, width = prepared.native.functions, fixed_width("selected_backward", double)
    columns = _columns(job.blocks, weights, double)
    copies = 1 if columns else _copies(q, k, v, real)
    grad_q, grad_k, grad_v = (
        t.new_zeros((n, *t.shape[:3], whole_vectors(t.shape[3], width)), dtype=real)
        for t, n in ((q, 1), (k, copies), (v, copies))
    )
    by_head = None if weights is None else q.new_zeros((*q.shape[:3], lists.slots), dtype=real)
    read = [slot.name for slot in prepared.source.slots if slot.kind == "sums"] if learned else []
    size = sum(call.tables[name].numel() for name in read)
    parts = max(1, min(LIMITS.now.parts, LIMITS.now.sums_bytes // max(1, size * 8)))
    sums = torch.zeros((parts, size), dtype=torch.float64) if read else None
    turned, turned_v = _turned(q, k, v, job.blocks, real, columns, rows=False)
    more, _held = prepared.fields(call)
    rest = [0] * OF_REST
    rest[OF_PLACES + 9 : OF_PLACES + 11] = names["slope"], names["gains"] if sums is not None else 0
    own = _OWN.pack(*lists.fields, first_of(turned), 0, 0, 0)
    grads = struct.pack(
        "=14q", *place_of(grad_out), delta.data_ptr(), grad_q.data_ptr(), grad_k.data_ptr(), grad_v.data_ptr(), first_of(by_head),
        first_of(turned_v), first_of(sums), size, parts, copies,
    )  # fmt: skip
    block = block_of(call, prepared, (q, k, v, out), lse, rest, more)
    if fixed_pass("selected_backward", double)(block, own, grads) < 0:
        raise MemoryError("gradients along selected blocks found no memory for their sums")
    found = [
        (g[0] if len(g) == 1 else g.sum(0))[..., : t.shape[3]].to(t.dtype) for g, t in ((grad_q, q), (grad_k, k), (grad_v, v))
    ]
    by_table = {name: torch.zeros(job.tables[name].shape, dtype=torch.float64) for name in learned}
    if sums is not None:
        for name, grad in zip(read, sums.sum(0).split([call.tables[name].numel() for name in read]), strict=True):
            if name in by_table:
                by_table[name] += grad.view(by_table[name].shape)
    grad_weights = None if weights is None else _by_weight(by_head, weights, slopes, lse, job.blocks.indices)
    kv = found[1:] if want_kv else (None, None)
    return found[0], *kv, grad_weights, [by_table[name].to(job.tables[name].dtype) for name in learned]


def _by_weight(by_head: Any, weights: Tensor, slopes: Tensor | None, lse: Tensor, indices: Tensor) -> Tensor:
    """Gradients of the weights, from those of each query head; ``lse`` is the logarithm of their sum."""
    slots = by_head.shape[3]
    if slopes is not None:
        listed = (indices[..., :slots] >= 0).repeat_interleave(by_head.shape[1] // indices.shape[1], 1)
        by_head = by_head + torch.where(listed, (slopes * torch.where(lse.isfinite(), -lse, 0.0).exp())[..., None], 0.0)
    grad = by_head.unflatten(1, (weights.shape[1], -1)).sum(2)
    return functional.pad(grad, (0, weights.shape[3] - slots)).to(weights.dtype)
