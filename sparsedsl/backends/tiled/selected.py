"""Attention over picked chunks in plain torch: what HSA, MoBA, NSA and any ``causal & (window | picks)`` run on.

Stages: heads -> lanes, queries -> blocks (``lanes.py``); the lists of a block, by query -> by chunk, cut into pieces (``inverted.py``);
products and softmax of
each piece, then the parts of each query put together (``passes.py``, ``blocks.py``). Work and memory follow the lists: there is
neither a queries x chunks table nor a copy of keys for each query; a few queries read only the chunks of their lists.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NoReturn

import torch

from sparsedsl.backends.tiled.selected_blocks import Inside, Job, backward, forward
from sparsedsl.errors import ShapeError
from sparsedsl.lang.pattern import attend
from sparsedsl.runtime.autograd import no_second_derivatives
from sparsedsl.runtime.call import check_call
from sparsedsl.runtime.unseen import Sight, guarded_backward, guarded_forward
from sparsedsl.selection.checks import check_one, check_picks, check_weights
from sparsedsl.selection.selected import Picks

__all__ = ["Inside", "picked_attention"]

Tensor = torch.Tensor
_ANY = attend(True)


def picked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    picks: Picks,
    *,
    scale: float,
    q_offset: int = 0,
    inside: Inside | None = None,
    weights: Tensor | None = None,
    one: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of each query over the chunks of its list: ``out (B, Hq, Sq, Dv)`` in the dtype of q and ``lse (B, Hq, Sq)``.

    Without ``weights`` there is one softmax over all tokens of the chunks, and ``lse`` is its own. With them each chunk has a softmax of
    its own, ``out = sum_k weights_k * out_k`` and ``lse = log(sum_k weights_k)``. A query without chunks has out 0, lse -inf and
    gradients 0. Gradients go to q, k, v and the weights, from out and lse; chunks that nobody picked get exact zeros. Sums have a
    fixed order.

    Args:
        q, k, v: ``(B, Hq, Sq, D)``, ``(B, Hkv, Skv, D)``, ``(B, Hkv, Skv, Dv)``, one float dtype, any strides.
        picks: a list for each query (``q_unit`` 1); its heads divide Hq.
        scale: factor of the logits.
        q_offset: position of the first query; only ``inside`` reads it.
        inside: which pairs of a picked chunk attend: ``(batch entry as a slice, query heads (n_heads,), query positions (n,), key positions
            (n, tokens)) -> bool (n, tokens)``, or ``(n_heads, n, tokens)`` where heads differ. Called from several threads.
        weights: ``(B, Hw, Sq, W)`` of a float dtype, Hw divides Hq; slots after the end of a list are ignored.
        one: each softmax has one logit 0 more, without a value (softmax1): every chunk's with ``weights``, the single one without.
            A query without chunks then has lse 0 in the latter case.

    Raises:
        ShapeError: tensors, picks and weights do not fit each other.
        UnsupportedError: lists are for more than one query each.

    >>> q, k, v = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 4, 4), torch.arange(4.0).view(1, 1, 4, 1)
    >>> lists = torch.tensor([[-1, -1], [0, -1], [0, 1]], dtype=torch.int32)[None, None]
    >>> picks = Picks(lists, (lists >= 0).sum(-1, dtype=torch.int32), q_unit=1, kv_unit=2, units=2)
    >>> out, lse = picked_attention(q, k, v, picks, scale=0.5)
    >>> (out[0, 0, :, 0] * 2).round().tolist(), lse[0, 0].exp().round().tolist()
    ([0.0, 1.0, 3.0], [0.0, 15.0, 30.0])
    >>> out, lse = picked_attention(q, k, v, picks, scale=0.5, weights=torch.tensor([0.25, 0.75]).expand(1, 1, 3, 2))
    >>> (out[0, 0, :, 0] * 8).round().tolist()
    [0.0, 1.0, 16.0]
    """
    call = check_call(_ANY, q, k, v, {}, q_offset=q_offset, scale=scale)
    check_picks(picks, call.q, call.k)
    _check_numbers(picks)
    if weights is not None:
        check_weights(weights, picks, call.q)
    check_one(one)
    job = Job(picks, call.scale, int(q_offset), inside, one)
    out, lse = _Attend.apply(job, q, k, v, weights)
    return out, lse


def _check_numbers(picks: Picks) -> None:
    """Whether the lists hold chunks that are there: read on the host."""
    largest = int(picks.indices.max()) if picks.indices.numel() else -1
    if largest >= picks.units:
        raise ShapeError(f"picks hold chunk {largest}, and there are {picks.units}. Choose among the keys that are passed")


def _sight(job: Job, q: Tensor, k: Tensor) -> Sight:
    plain = replace(job, one=False, scale=1.0)
    q, k = (t.new_zeros((*t.shape[:3], 1), dtype=torch.float32) for t in (q, k))

    def slopes(out: Tensor, lse: Tensor, grad_out: Tensor) -> Tensor:
        found = backward(plain, True, grad_out, None, out, lse, q, k, torch.zeros_like(k), None)[2]
        assert found is not None
        return found

    return Sight(k.shape[:3], lambda v: forward(plain, q, k, v, None), slopes)


class _Attend(torch.autograd.Function):
    """Forward; inputs: a job, q, k, v and the weights or None."""

    @staticmethod
    def forward(job: Job, *tensors: Any) -> Any:
        q, k, v, weights = tensors
        return guarded_forward(
            q, k, v, job.scale, lambda q, k, v: forward(job, q, k, v, weights), lambda: _sight(job, q, k)
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.job = inputs[0]
        ctx.save_for_backward(*output, *inputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        _, want_q, *want_kv, want_weights = ctx.needs_input_grad
        if grad_out is None and grad_lse is None:
            return None, None, None, None, None
        grads = _AttendBackward.apply(ctx.job, any(want_kv), grad_out, grad_lse, *ctx.saved_tensors)
        wanted = (want_q, *want_kv, want_weights)
        return None, *(grad if want else None for grad, want in zip(grads, wanted, strict=True))


class _AttendBackward(torch.autograd.Function):
    """Backward; inputs: a job, whether k or v want gradients, those of the results, the results, and the inputs of the forward pass."""

    @staticmethod
    def forward(job: Job, want_kv: bool, grad_out: Any, grad_lse: Any, out: Tensor, lse: Tensor, *tensors: Any) -> Any:
        q, k, v, weights = tensors
        grad_out = torch.zeros((), dtype=q.dtype, device=q.device).expand(out.shape) if grad_out is None else grad_out

        def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Any) -> list[Tensor]:
            grads = backward(job, want_kv, grad_out, grad_lse, out, lse, q, k, v, weights)
            return [grad for grad in grads if grad is not None]

        places = "q" + "kk" * want_kv + "q" * (weights is not None)
        found = iter(guarded_backward(q, k, v, job.scale, (out, lse, grad_out, grad_lse), run, places, lambda: _sight(job, q, k)))
        return next(found), *(next(found) if want_kv else None for _ in "kv"), None if weights is None else next(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        no_second_derivatives()
