"""Attention along lists of selected blocks on Triton kernels: what they take and refuse, and their place in autograd."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import sympy
import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.domain import Domain
from sparsedsl.backends.triton.attention import missing
from sparsedsl.backends.triton.config_choice import target_of
from sparsedsl.backends.triton.selected_configs import block_of, largest_tile
from sparsedsl.backends.triton.selected_interval import interval_of
from sparsedsl.backends.triton.selected_passes import SelectedJob, SelectedRun
from sparsedsl.codegen.to_triton_selected import SelectedSource, member_symbols, selected_source
from sparsedsl.codegen.triton_expression import LONGEST
from sparsedsl.errors import UnsupportedError
from sparsedsl.gpu.loading import interpreted
from sparsedsl.gpu.targets import Target
from sparsedsl.lang.pattern import attend
from sparsedsl.lang.symbols import INDEX_SYMBOLS, SCORE
from sparsedsl.lang.tables import table_reads
from sparsedsl.runtime.autograd import no_second_derivatives
from sparsedsl.runtime.call import check_call
from sparsedsl.runtime.hoisted_tables import fill
from sparsedsl.runtime.request import Request
from sparsedsl.selection.checks import check_selected_blocks, check_softmax1, check_weights
from sparsedsl.selection.selected_call import SelectedCall

__all__ = ["refusal", "refusal_of_selected", "selected_attention", "source_of_selected", "written"]

Tensor = torch.Tensor
# Keys of a block that the kernels hold at a time; widths of heads.
LONGEST_BLOCK, WIDEST_HEAD = 128, 256


def selected_attention(q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> tuple[Tensor, Tensor]:
    """``out (B, Hq, Sq, Dv)`` in the dtype of q and ``lse (B, Hq, Sq)`` in float32; gradients go to q, k, v, weights and learned tables.

    Any mask, score, and ratio of heads; weighed blocks of up to 128 tokens, others of any size that has a divisor from 16 to 128.
    Lists must ascend and hold a block once; what they hold is not checked, as nothing here waits for the device. Products of float32
    are IEEE, or TF32 where ``torch.backends.cuda.matmul.allow_tf32`` says so. Gradients are deterministic.

    Args:
        q, k, v: ``(B, Hq, Sq, D)``, ``(B, Hkv, Skv, D)``, ``(B, Hkv, Skv, Dv)``, one float dtype, any strides.
        selected: the blocks, and what attends in them; weights are read as float32.

    Raises:
        ShapeError: tensors, lists or weights do not fit each other.
        UnsupportedError: no GPU, float64, heads wider than 256, blocks that are too long or too large in float32, lists for several
            queries, or an operation that kernels cannot round as torch does; names the way out.
    """
    call = check_call(_ANY, q, k, v, {}, q_offset=selected.domain.q_offset, scale=selected.scale)
    check_selected_blocks(selected.blocks, call.q, call.k)
    widest, weighted = max(q.shape[3], v.shape[3]), selected.weights is not None
    target = target_of(q.device)
    lacks = missing(q.device.type) or refusal(q.dtype, widest, selected.blocks.kv_block, target, weighted=weighted)
    if lacks is not None:
        raise UnsupportedError(f"selected blocks on backend 'triton': {lacks}. Use backend='tiled'")
    selected = _in_short_blocks(selected, call.k, call.v, target)
    if selected.weights is not None:
        check_weights(selected.weights, selected.blocks, call.q)
    check_softmax1(selected.softmax1)
    job = _job(selected, q.device)
    weights = None if selected.weights is None else selected.weights.float()
    dtype = q.dtype
    if dtype == torch.bfloat16 and interpreted():  # Triton's interpreter multiplies the bits of bfloat16
        q, k, v = q.float(), k.float(), v.float()
    out, lse = _AlongForward.apply(job, q, k, v, weights, *(selected.tables[name] for name in job.learned))
    return out.to(dtype), lse


_ANY = attend(True)


def written(
    mask: sympy.Basic, score: sympy.Expr, choices: tuple[str, ...], tables: Mapping[str, Tensor], *, longest: int = 0,
    learned: frozenset[str] = frozenset(),
) -> SelectedSource:  # fmt: skip
    """The kernels for a mask and a score. ``longest``: the last position of the call. ``learned``: tables that want gradients.

    Raises:
        UnsupportedError: an operation that Triton cannot be made to round as torch does.
    """
    if choices:
        named = {sympy.Symbol(name): symbol for name, symbol in zip(choices, member_symbols(len(choices)), strict=True)}
        mask = mask.xreplace(named)
    large = frozenset(name for name, table in tables.items() if table.numel() >= 1 << 31)
    return selected_source(mask, score, wide=longest > LONGEST, wide_tables=large, learned=learned)


def _job(selected: SelectedCall, device: torch.device) -> SelectedJob:
    """The call as the kernels take it: its mask as an interval of keys where that is all there is to say, else written into them."""
    domain, mask, inside = replace(selected.domain, tables=selected.tables), selected.mask, None
    joined = mask.free_symbols & {sympy.Symbol(name) for name in selected.choices}
    if selected.score == SCORE and not joined and mask != sympy.true:
        own = {read.spec.name: selected.tables[read.spec.name] for read in table_reads(mask)}
        inside = interval_of(mask, replace(domain, tables=own), device)
        mask = mask if inside is None else sympy.true
    learned = frozenset(selected.learned if torch.is_grad_enabled() else ())
    longest = max(domain.lengths.values())
    source = written(mask, selected.score, selected.choices, selected.tables, longest=longest, learned=learned)
    prepared = _prepared(source, domain, device)
    reads = source.pattern.tables
    fixed = {name: table.detach() for name, table in selected.tables.items() if name in reads and name not in learned}
    members = None if selected.members is None or not joined else selected.members.int().contiguous()
    return SelectedJob(
        selected.blocks, selected.scale, inside, selected.softmax1, source, members, domain, {**fixed, **prepared},
        tuple(sorted(learned & set(reads))),
    )  # fmt: skip


_PREPARED: Cache[dict[str, Tensor]] = Cache()


def _prepared(source: SelectedSource, domain: Domain, device: torch.device) -> dict[str, Tensor]:
    """Tables that torch works out before the kernels run; remembered for lengths and the tables they are made of."""
    if not source.prepared:
        return {}
    reads = [domain.tables[name] for name in sorted(frozenset().union(*(one.reads for one in source.prepared)))]
    key = (source.prepared, domain.rows, domain.kv_len, domain.q_offset, device)
    return _PREPARED.get(key, reads, lambda: {one.name: fill(one, domain).to(device) for one in source.prepared})


def refusal(dtype: torch.dtype, widest: int, block: int, target: Target, *, weighted: bool) -> str | None:
    """Why the kernels cannot follow lists of blocks of ``block`` keys on a GPU, or None. ``widest``: of the heads of q and v."""
    if dtype == torch.float64:
        return "the kernels compute in float32, q is float64: results would lose digits"
    if widest > WIDEST_HEAD:
        return f"heads may be {WIDEST_HEAD} wide, as tiles of keys and sums for each row must fit an SM; got {widest}"
    size = _cut(block, widest, dtype.itemsize, target, weighted=weighted)
    if not 1 <= size <= LONGEST_BLOCK:
        if weighted:
            return f"a block may have {LONGEST_BLOCK} tokens, as its softmax is taken in one tile; got kv_block {block}"
        return (
            f"a block of more than {LONGEST_BLOCK} tokens is read in equal tiles of 16 to {LONGEST_BLOCK}, and {block} has no such "
            "divisor"
        )
    taken = _tile_bytes(size, widest, dtype.itemsize)
    if taken > largest_tile(target):
        return (
            f"{size} keys of {widest} numbers in {str(dtype).removeprefix('torch.')} take {taken:,} bytes, more than fits an SM "
            f"beside as many of V: {_smaller(dtype)}"
        )
    return None


def refusal_of_selected(request: Request) -> str | None:
    """Why the kernels along lists cannot do a piece of work, or None."""
    facts = request.facts
    widest = max(facts.head_dim, facts.head_dim_v)
    target = target_of(torch.device(facts.device))
    lacks = refusal(getattr(torch, facts.dtype), widest, request.block, target, weighted=request.per_block)
    return lacks or _unwritable(request.mask, request.score)


def source_of_selected(mask: sympy.Basic, score: sympy.Expr) -> str:
    """The modules with the forward and the backward kernels for a mask and a score, one after the other."""
    return "\n\n".join(dict.fromkeys(written(mask, score, _choices(mask), {}).texts.values()))


def _choices(mask: sympy.Basic) -> tuple[str, ...]:
    """Names of the symbols that stand for choices in a mask."""
    return tuple(sorted(symbol.name for symbol in mask.free_symbols - set(INDEX_SYMBOLS.values())))


@functools.lru_cache(maxsize=1024)
def _unwritable(mask: sympy.Basic, score: sympy.Expr) -> str | None:
    """Why a mask and a score cannot be written into the kernels, or None."""
    try:
        written(mask, score, _choices(mask), {})
    except UnsupportedError as error:
        return str(error).split(". Use ")[0]
    return None


def _tile_bytes(size: int, widest: int, itemsize: int) -> int:
    return block_of(size) * block_of(widest) * itemsize


def _smaller(dtype: torch.dtype) -> str:
    return "pass bfloat16 or float16" if dtype == torch.float32 else "declare shorter blocks"


def _cut(block: int, widest: int, itemsize: int, target: Target, *, weighted: bool) -> int:
    """Keys of the blocks that the kernels are given: under one softmax a long block may be so many short ones."""
    longest = min(LONGEST_BLOCK, largest_tile(target) // (block_of(widest) * itemsize))
    if weighted or block <= longest:
        return block
    return max((size for size in range(16, longest + 1) if block % size == 0), default=block)


def _in_short_blocks(selected: SelectedCall, k: Tensor, v: Tensor, target: Target) -> SelectedCall:
    """The same call with blocks of which a tile fits."""
    blocks, members = selected.blocks, selected.members
    widest = max(k.shape[3], v.shape[3])
    size = _cut(blocks.kv_block, widest, k.dtype.itemsize, target, weighted=selected.weights is not None)
    if size == blocks.kv_block:
        return selected
    if members is not None:
        members = members.repeat_interleave(blocks.kv_block // size, -1)
    return replace(selected, blocks=blocks.finer(size, k.shape[2]), members=members)


class _AlongForward(torch.autograd.Function):
    """Forward; inputs: a job, q, k, v, the weights or None, and the learned tables of the job."""

    @staticmethod
    def forward(
        ctx: Any, job: SelectedJob, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, *learned: Tensor
    ) -> tuple[Tensor, Tensor]:
        run = SelectedRun(job, q, k, v, weights, learned)
        out, lse, slot_lse = run.forward(save=any(ctx.needs_input_grad))
        ctx.job = job
        ctx.set_materialize_grads(False)
        lists = run.lists.chunks, run.lists.owners, run.lists.counts
        ctx.save_for_backward(out, lse, slot_lse, q, k, v, weights, *lists, *learned)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        if grad_out is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        _, want_q, want_k, want_v, *others = ctx.needs_input_grad
        grads = _AlongBackward.apply(ctx.job, want_k or want_v, grad_out, grad_lse, *ctx.saved_tensors)
        return None, *(grad if want else None for grad, want in zip(grads, (want_q, want_k, want_v, *others), strict=True))


class _AlongBackward(torch.autograd.Function):
    """Backward; inputs: a job, whether k or v want gradients, those of the results, and what the forward pass saved."""

    @staticmethod
    def forward(
        ctx: Any, job: SelectedJob, keys: bool, grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor,
        slot_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor | None, *rest: Tensor,
    ) -> Any:  # fmt: skip
        lists, learned = rest[:3], rest[3:]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        run = SelectedRun(job, q, k, v, weights, learned, lists)
        return run.backward(out, lse, slot_lse, grad_out, grad_lse, keys=keys)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        no_second_derivatives()
