"""Linear attention with a constant decay per query head: ``S_j = decay * S_{j-1} + k_j v_j^T``, ``out_i = scale * q_i S_p``. No softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.backends.tiled.scan_chunked import ScanPlan, carry, cut, scan
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.scan_calls import check_linear
from sparsedsl.runtime.seen_products import seen_product

__all__ = ["linear_scan"]


def linear_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    scale: float,
    q_offset: int = 0,
    state: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out[i] = scale * sum over j <= p of decay ** (p - j) * (q[i] . k[j]) * v[j]`` with ``p = q_offset + i``, and the state at the end.

    Time and memory grow with the length; states are held in float32 (float64 for float64 inputs), whatever the inputs are.

    Args:
        q: ``(B, Hq, Sq, D)``, any float dtype. Query row ``i`` stands at position ``q_offset + i``.
        k, v: ``(B, Hkv, Skv, D)`` and ``(B, Hkv, Skv, Dv)``, of q's dtype; ``Hq`` is a multiple of ``Hkv``. Key ``j`` stands at ``j``.
        log_decay: ``(Hq,)``, at most 0, -inf for a head that remembers nothing. It gets no gradient.
        state: ``(B, Hq, D, Dv)``, what the keys before key 0 left; None: nothing.
        documents: integer ids ``(1 or B, Skv)``. Where the id changes, the state begins anew; ``state`` belongs to the document of key 0.

    Returns:
        out ``(B, Hq, Sq, Dv)`` in q's dtype, and the state ``(B, Hq, D, Dv)``. Both are differentiable once in q, k, v and state.

    Raises:
        ShapeError: arguments that do not fit each other, a query after the last key, a positive log_decay.
        UnsupportedError: log_decay requires gradients.

    Example:
        >>> x = torch.ones(1, 1, 4, 1)
        >>> out, state = linear_scan(x, x, x, torch.tensor([0.5]).log(), scale=1.0)
        >>> out.flatten().tolist(), state.item()
        ([1.0, 1.5, 1.75, 1.875], 1.875)
        >>> linear_scan(x, x, x, torch.tensor([0.5]).log(), scale=1.0, state=state)[0].flatten()[0].item()
        1.9375
    """
    call = check_linear(q, k, v, log_decay, scale=scale, q_offset=q_offset, state=state, documents=documents)
    batch, heads, q_len, width = q.shape
    kind, begins = accumulated(q.dtype), None if call.begins is None else call.begins[:, None]
    if state is None:
        state = torch.zeros(batch, heads, width, v.shape[3], dtype=kind, device=q.device)
    by_group = (k.shape[1], heads // k.shape[1])
    step = _LinearStep(log_decay.to(kind).reshape(by_group), call.scale)
    plan = ScanPlan(step, cut(q_len, k.shape[2], call.q_offset, batch * heads), (((*q.shape[:3], v.shape[3]), q.dtype),))
    (out,), (last,) = scan(plan, (q,), (k, v, begins), (state.to(kind).unflatten(1, by_group),))
    return out, last.flatten(1, 2)


@dataclass(frozen=True, eq=False)
class _LinearStep:
    """One row range. Shapes within: B batch, H kv heads, N chunks, g query heads of a group, C rows of a chunk."""

    log_decay: torch.Tensor  # (H, g)
    scale: float

    def __call__(self, queries: Any, keys: Any, state: Any) -> Any:
        (q,), (k, v, begins), (state,) = queries, keys, state
        # Without queries nobody asks for what happened in between: the whole row range is one chunk.
        chunks = (-1, min(LIMITS.now.scan_chunk, k.shape[2]) if q.shape[2] else k.shape[2])
        k, v = (t.to(state.dtype).unflatten(2, chunks) for t in (k, v))  # (B, H, N, C, D)
        size = k.shape[3]
        row = torch.arange(size, device=k.device)
        later, total = self._power(size - 1 - row)[:, None, :, None], self._power(row[-1:] + 1)[None, :, None, :, :, None]
        # Which document of its chunk a row belongs to: (B or 1, 1, N, 1, C).
        document = None if begins is None else begins.unflatten(2, chunks).cumsum(3)[:, :, :, None]
        if document is not None:
            later = later * (document == document[..., -1:])[..., None, :]
            total = total * (document[..., -1:] == 0)[..., None]
        added = (k.transpose(3, 4)[:, :, :, None] * later).flatten(3, 4) @ v
        before, after = carry(total, added.unflatten(3, (state.shape[2], -1)), state)  # (B, H, N, g, D, Dv)
        if not q.shape[2]:
            return (), (after,)
        q = (
            (q.to(state.dtype) * self.scale).unflatten(1, state.shape[1:3]).unflatten(3, chunks).transpose(2, 3)
        )  # (B, H, N, g, C, D)
        distance = row[:, None] - row
        pairs = self._power(distance.clamp(min=0).flatten()).unflatten(2, (size, size))[:, None]  # (H, 1, g, C, C)
        pairs = pairs * (distance >= 0)
        reach = self._power(row + 1)[:, None, :, :, None]
        if document is not None:
            pairs = pairs * (document[..., None] == document[..., None, :])
            reach = reach * (document == 0)[..., None]
        scores = seen_product(q.flatten(3, 4), k.transpose(3, 4)).unflatten(3, q.shape[3:5])
        scores = torch.where(pairs > 0, scores * pairs, 0.0)  # a key outside may hold anything
        out = seen_product(scores.flatten(3, 4), v).unflatten(3, q.shape[3:5]) + (q @ before) * reach
        return (out.transpose(2, 3).flatten(3, 4).flatten(1, 2),), (after,)

    def _power(self, exponents: torch.Tensor) -> torch.Tensor:
        """``decay ** exponents``: (H, g, number of exponents). The power 0 is 1, also of a decay of 0."""
        return torch.where(exponents > 0, self.log_decay[..., None] * exponents.clamp(min=1), 0.0).exp()
