"""Linear attention whose decays and write rule come with the data, in chunks, forward and backward.

With ``a_t = e^(g_t)``: ``Sd = diag(a_t) S_(t-1)``, ``u_t = v_t`` or, by the delta rule, ``beta_t (v_t - e_t Sd)``,
``S_t = Sd + k_t^T u_t``, ``out_t = scale q_t S_t``; ``e_t`` is ``k_t``, or a key of its own.
"""

from __future__ import annotations

import functools
import math

import torch

from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.backends.tiled.scan_chunked import ScanPlan, cut, scan
from sparsedsl.backends.tiled.scan_gated_chunks import GatedChunks
from sparsedsl.backends.tiled.scan_gated_tokens import token_by_token
from sparsedsl.runtime.call import wants_grad
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.scan_calls import check_gated
from sparsedsl.torch_private import is_batched

__all__ = ["gated_scan"]

Tensor = torch.Tensor


def gated_scan(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None = None, erase: Tensor | None = None, *, scale: float,
    q_offset: int = 0, state: Tensor | None = None, documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Results and the state after the last key.

    Head ``h`` of a tensor with ``Hx`` heads serves the neighbouring states ``h r .. h r + r - 1``, ``r = H / Hx``; ``H``, the heads with a
    state, is the most of k, v and the gates. Query heads above that share states. Time and memory grow with the length; states, decays
    and the solution of the delta rule are in float32 (float64 for float64 inputs), whatever q, k and v are.

    Args:
        q: ``(B, Hq, Sq, D)``, any float dtype. Query row ``i`` stands at position ``q_offset + i``.
        k, v: ``(B, Hk, Skv, D)`` and ``(B, Hv, Skv, Dv)``.
        log_decay: ``(1 or B, Hg, Skv)`` or ``(1 or B, Hg, Skv, D)``, at most 0; -inf forgets all that was before.
        beta: ``(1 or B, Hb, Skv)``: by the delta rule; None: every value is written as it is.
        erase: ``(1 or B, He, Skv, D)``: keys by which the delta rule reads what it takes off, in place of k; None: k. With beta.
        state: ``(B, H, D, Dv)``, what the keys before key 0 left; None: nothing.
        documents: integer ids ``(1 or B, Skv)``. Where the id changes, the state begins anew; ``state`` belongs to the document of key 0.

    Returns:
        out ``(B, max(Hq, H), Sq, Dv)`` in q's dtype, and the state. Differentiable once in q, k, v, log_decay, beta, erase and state.

    Raises:
        ShapeError: arguments that do not fit each other, a query after the last key.

    Example:
        >>> x = torch.ones(1, 1, 4, 1)
        >>> out, state = gated_scan(x, x, x, torch.tensor([[[0.0, -1e4, 0.0, 0.0]]]), scale=1.0)
        >>> out.flatten().tolist(), state.item()
        ([1.0, 1.0, 2.0, 3.0], 3.0)
        >>> gated_scan(x, x, 2 * x, torch.zeros(1, 1, 4), torch.full((1, 1, 4), 0.5), scale=1.0)[0].flatten().tolist()
        [1.0, 1.5, 1.75, 1.875]
    """
    call = check_gated(q, k, v, log_decay, beta, erase, scale=scale, q_offset=q_offset, state=state, documents=documents)
    kind, heads = accumulated(q.dtype), call.states
    if state is None:
        state = torch.zeros(q.shape[0], heads, q.shape[3], v.shape[3], dtype=kind, device=q.device)
    begins = None if call.begins is None else call.begins[:, None]
    keys = (k, v, log_decay, beta, erase, begins)
    lines = q.shape[0] * heads
    result = ((q.shape[0], max(q.shape[1], heads), q.shape[2], v.shape[3]), q.dtype)
    ranges = cut(q.shape[2], k.shape[2], call.q_offset, lines, LIMITS.now.gated_rows)
    few = k.shape[2] <= LIMITS.now.scan_tokens and not wants_grad(q, *(t for t in keys if t is not None), state)
    if few or not _finite(q, k, v, beta, erase):
        step = functools.partial(token_by_token, scale=call.scale)
        plan = ScanPlan(step, ranges, (result,))
    else:
        chunks = GatedChunks(call.scale)
        plan = ScanPlan(chunks.forward, ranges, (result,), chunks.backward)
    (out,), (last,) = scan(plan, (q,), keys, (state.to(kind),))
    return out, last


def _finite(*tensors: Tensor | None) -> bool:
    """Whether products may pass over rows that are not seen: 0 times NaN or infinity is not 0. On a GPU to look would be to wait."""
    given = [t for t in tensors if t is not None and t.numel()]
    if any(is_batched(t) for t in given):
        return False
    return all(t.device.type != "cpu" or math.isfinite(float(t.detach().sum(dtype=accumulated(t.dtype)))) for t in given)
