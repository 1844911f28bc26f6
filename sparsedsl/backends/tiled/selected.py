"""Attention along lists of selected blocks in plain torch: what a choice for single queries runs on, beside any mask and score.

Stages: heads -> head groups, queries -> blocks of queries (``head_groups.py``); the lists of such a block, by query -> by block
of keys, cut into tiles (``selected_invert.py``); products, score, mask and softmax of each tile, then the parts of each query
put together (``selected_passes.py``, ``selected_tiles.py``, ``selected_blocks.py``). Work and memory follow the lists: there is
neither a queries x blocks table nor a copy of keys for each query; a few queries read only the blocks of their lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

import torch

from sparsedsl.backends.tiled.selected_work import backward, forward
from sparsedsl.lang.symbols import SCORE
from sparsedsl.runtime.autograd import no_second_derivatives
from sparsedsl.runtime.call import check_tensors, wants_grad
from sparsedsl.runtime.torch_modes import is_transformed
from sparsedsl.runtime.unseen import Sight, guarded_backward, guarded_forward
from sparsedsl.selection.checks import check_selected_call
from sparsedsl.selection.selected_call import SelectedCall

__all__ = ["Passes", "differentiable_selected", "selected_attention", "sight_of_selected"]

Tensor = torch.Tensor


def selected_attention(q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall) -> tuple[Tensor, Tensor]:
    """Attention of each query over the blocks of its list: ``out (B, Hq, Sq, Dv)`` in the dtype of q and ``lse (B, Hq, Sq)``.

    Without weights there is one softmax over all pairs of the blocks that the mask allows, and ``lse`` is its own. With them each
    block has a softmax of its own, ``out = sum_k weights_k * out_k`` and ``lse = log(sum_k weights_k)``. A query without pairs has out
    0, lse -inf (0 with ``softmax1`` and without weights) and gradients 0. Gradients go to q, k, v, the weights and the learned tables,
    from out and lse; blocks that nobody selected get exact zeros. Sums have a fixed order.

    Args:
        q, k, v: ``(B, Hq, Sq, D)``, ``(B, Hkv, Skv, D)``, ``(B, Hkv, Skv, Dv)``, one float dtype, any strides.
        selected: lists, mask, score and weights; the heads of its lists divide Hq. Any of them may stand in it.

    Raises:
        ShapeError: tensors, lists and weights do not fit each other.
        UnsupportedError: lists are for more than one query each.

    >>> from sparsedsl import kv_idx, q_idx
    >>> from sparsedsl.analysis.domain import Domain
    >>> from sparsedsl.selection.selected_blocks import SelectedBlocks
    >>> q, k, v = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 4, 4), torch.arange(4.0).view(1, 1, 4, 1)
    >>> lists = torch.tensor([[-1, -1], [0, -1], [0, 1]], dtype=torch.int32)[None, None]
    >>> blocks = SelectedBlocks(lists, (lists >= 0).sum(-1, dtype=torch.int32), q_block=1, kv_block=2, blocks=2)
    >>> out, lse = selected_attention(q, k, v, SelectedCall(blocks, 0.5, Domain(3, 4, heads=2)))
    >>> (out[0, 0, :, 0] * 2).round().tolist(), lse[0, 0].exp().round().tolist()
    ([0.0, 1.0, 3.0], [0.0, 15.0, 30.0])
    >>> out, lse = selected_attention(q, k, v, SelectedCall(blocks, 0.5, Domain(3, 4, heads=2), mask=(kv_idx <= q_idx).expr))
    >>> (out[0, 0, :, 0] * 2).round().tolist()
    [0.0, 1.0, 2.0]
    >>> weights = torch.tensor([0.25, 0.75]).expand(1, 1, 3, 2)
    >>> out, lse = selected_attention(q, k, v, SelectedCall(blocks, 0.5, Domain(3, 4, heads=2), weights=weights))
    >>> (out[0, 0, :, 0] * 8).round().tolist()
    [0.0, 1.0, 16.0]
    """
    return differentiable_selected(q, k, v, selected, Passes(forward, backward))


class Passes(NamedTuple):
    """A forward and a backward pass along lists, with the arguments and results of
    :func:`~sparsedsl.backends.tiled.selected_work.forward` and ``backward``."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, list[Tensor]]]


def differentiable_selected(q: Tensor, k: Tensor, v: Tensor, selected: SelectedCall, passes: Passes) -> tuple[Tensor, Tensor]:
    """Results of a call, checked, with the gradients of its passes."""
    check_tensors(q, k, v)
    check_selected_call(selected, q, k)
    # Autograd keeps the tensors that get gradients: the job is without them.
    learned = {name: selected.tables[name] for name in selected.learned}
    fixed = {name: table for name, table in selected.tables.items() if name not in learned}
    job = _Along(replace(selected, tables=fixed, weights=None), tuple(learned), passes)
    tensors = (q, k, v, selected.weights, *learned.values())
    known = [t for t in tensors if t is not None]
    if wants_grad(*known) or is_transformed(*known):
        out, lse = _AlongForward.apply(job, *tensors)
    else:  # torch looks at the signature of a function at every call
        out, lse = _AlongForward.forward(job, *tensors)
    return out, lse


@dataclass(frozen=True, eq=False)
class _Along:
    """A call without the tensors that autograd keeps, and the names of its learned tables."""

    selected: SelectedCall
    learned: tuple[str, ...]
    passes: Passes

    def with_tables(self, tables: Sequence[Tensor]) -> SelectedCall:
        """The call with its learned tables."""
        named = {name: table.detach() for name, table in zip(self.learned, tables, strict=True)}
        return replace(self.selected, tables={**self.selected.tables, **named}) if named else self.selected


def sight_of_selected(job: SelectedCall, q: Tensor, k: Tensor) -> Sight:
    """Who sees whom along lists."""
    plain = replace(job, softmax1=False, scale=1.0, score=SCORE)
    q, k = (t.new_zeros((*t.shape[:3], 1), dtype=torch.float32) for t in (q, k))

    def slopes(out: Tensor, lse: Tensor, grad_out: Tensor) -> Tensor:
        found = backward(plain, True, grad_out, None, out, lse, q, k, torch.zeros_like(k), None)[2]
        assert found is not None
        return found

    return Sight(k.shape[:3], lambda v: forward(plain, q, k, v, None), slopes)


class _AlongForward(torch.autograd.Function):
    """Forward; inputs: a job, q, k, v, the weights or None, and the learned tables."""

    @staticmethod
    def forward(job: _Along, *tensors: Any) -> Any:
        q, k, v, weights, *tables = tensors
        call = job.with_tables(tables)
        return guarded_forward(
            q, k, v, call.scale, lambda q, k, v: job.passes.forward(call, q, k, v, weights), lambda: sight_of_selected(call, q, k)
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.job = inputs[0]
        ctx.save_for_backward(*output, *inputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        _, *wanted = ctx.needs_input_grad
        if grad_out is None and grad_lse is None:
            return None, *(None for _ in wanted)
        grads = _AlongBackward.apply(ctx.job, any(wanted[1:3]), grad_out, grad_lse, *ctx.saved_tensors)
        return None, *(grad if want else None for grad, want in zip(grads, wanted, strict=True))


class _AlongBackward(torch.autograd.Function):
    """Backward; inputs: a job, whether k or v want gradients, those of the results, the results, and the inputs of the forward pass."""

    @staticmethod
    def forward(job: _Along, want_kv: bool, grad_out: Any, grad_lse: Any, out: Tensor, lse: Tensor, *tensors: Any) -> Any:
        q, k, v, weights, *tables = tensors
        call = job.with_tables(tables)
        grad_out = torch.zeros((), dtype=q.dtype, device=q.device).expand(out.shape) if grad_out is None else grad_out

        def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Any) -> list[Tensor]:
            *grads, by_tables = job.passes.backward(call, want_kv, grad_out, grad_lse, out, lse, q, k, v, weights, job.learned)
            return [grad for grad in (*grads, *by_tables) if grad is not None]

        places = "q" + "kk" * want_kv + "q" * (weights is not None) + "*" * len(tables)
        found = iter(
            guarded_backward(
                q, k, v, call.scale, (out, lse, grad_out, grad_lse), run, places, lambda: sight_of_selected(call, q, k)
            )
        )
        first = next(found), *(next(found) if want_kv else None for _ in "kv"), None if weights is None else next(found)
        return *first, *found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        no_second_derivatives()
