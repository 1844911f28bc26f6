"""What linear attention with decays from the data means: the recurrence, token by token."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def loop(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None = None, erase: Tensor | None = None, *, scale: float, q_offset: int = 0,
    state: Tensor | None = None, documents: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition."""
    heads = max(t.shape[1] for t in (k, v, g, beta, erase) if t is not None)

    def widened(t: Tensor, to: int = heads) -> Tensor:
        return t.repeat_interleave(max(1, to // t.shape[1]), 1)

    k, v, g, beta = widened(k), widened(v), widened(g), None if beta is None else widened(beta)
    erase = k if erase is None else widened(erase)
    q = widened(q, max(heads, q.shape[1]))
    a = (g if g.ndim == 4 else g[..., None]).exp()
    state = k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]) if state is None else state
    rows = []
    for t in range(k.shape[2]):
        if documents is not None and t:
            state = torch.where((documents[:, t] == documents[:, t - 1])[:, None, None, None], state, torch.zeros(()).to(state))
        state = a[:, :, t, :, None] * state
        u = v[:, :, t]
        if beta is not None:
            u = beta[:, :, t, None] * (u - torch.einsum("bhd,bhde->bhe", erase[:, :, t], state))
        state = state + torch.einsum("bhd,bhe->bhde", k[:, :, t], u)
        if q_offset <= t < q_offset + q.shape[2]:
            seen = state.repeat_interleave(q.shape[1] // heads, 1)
            rows.append(torch.einsum("bhd,bhde->bhe", q[:, :, t - q_offset], seen))
    return scale * torch.stack(rows, 2), state
