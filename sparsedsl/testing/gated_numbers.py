"""Linear attention with decays from the data as kernels work it out: pairs of tokens, each with the decay between them.

The gradient of a decay is then what rows from its own on read less what they wrote: two sums that may be nearly equal, so that what they
round is much more than what their difference would. The recurrence, which says what is meant, has no such sums.
"""

from __future__ import annotations

from typing import Any

import torch

from sparsedsl.program.recurrences import Linear

__all__ = ["pair_rows"]

Tensor = torch.Tensor


def pair_rows(
    run: Any, node: Linear, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, beta: Tensor | None, bonus: Tensor | None,
    erased: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """What :func:`~sparsedsl.backends.reference.scan_linear.run_recurrence` asks for: the sums of all queries, ``(B, H, G, Sq, Dv)``."""
    first, rows, length = run.call.q_offset, q.shape[3], k.shape[2]
    logs = kept.expand(*kept.shape[:3], k.shape[3]).log()  # kernels add up over channels what a decay of all of them gets
    sums = logs.cumsum(2)
    readers = sums - logs if node.reads == "before" else sums
    own = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    begun = torch.zeros(1, 1, length, dtype=torch.bool)
    if node.documents is not None:
        ids = run.value(node.documents)[:, None]
        own, begun = own & (ids[..., :, None] == ids[..., None, :]), ids != ids[..., :1]
    before = own & ~torch.eye(length, dtype=torch.bool)
    reach = torch.where(begun[..., None], 0.0, readers.exp())
    state = run.call.state_of(node)
    state = k.new_zeros((*k.shape[:2], k.shape[3], v.shape[3])) if state is None else state.to(k.dtype)
    written = v
    if beta is not None:
        pairs = _pairs(k, k, sums, sums, before)
        left = v - (k * reach) @ state
        found: list[Tensor] = []
        for token in range(length):
            error = left[:, :, token]
            if found:
                error = error - (pairs[:, :, token, :token, None] * torch.stack(found, 2)).sum(2)
            found.append(beta[:, :, token, None] * error)
        written = torch.stack(found, 2)
    taken: list[Tensor] = []
    if erased is not None:  # what each token reads of what others wrote, and of what they took off along other keys
        by, along = erased
        others = _pairs(by, along, sums, sums, before)
        first_reads = _pairs(by, k, sums, sums, before) @ v + (by * reach) @ state
        for token in range(length):
            total = first_reads[:, :, token]
            if taken:
                total = total - (others[:, :, token, :token, None] * torch.stack(taken, 2)).sum(2)
            taken.append(total)
    seen = (before if node.reads == "before" else own)[:, :, first : first + rows]
    part = readers[:, :, first : first + rows]
    out = []
    for member, group in enumerate(q.unbind(2)):
        weights = _pairs(group, k, part, sums, seen)
        if bonus is not None:
            diagonal = (group * bonus[:, :, member, None] * k[:, :, first : first + rows]).sum(-1)
            place = torch.arange(rows)[:, None] + first == torch.arange(length)
            weights = weights + torch.where(place, diagonal[..., None], 0.0)
        sums_of_rows = weights @ written + (group * reach[:, :, first : first + rows]) @ state
        if erased is not None:
            sums_of_rows = sums_of_rows - _pairs(group, erased[1], part, sums, seen) @ torch.stack(taken, 2)
        out.append(sums_of_rows)
    return torch.stack(out, 2)


def _pairs(x: Tensor, k: Tensor, of_x: Tensor, of_k: Tensor, seen: Tensor) -> Tensor:
    """Products of rows of x and k, each times what is left between them; 0 where ``seen`` is not."""
    apart = torch.where(seen[..., None], of_x[:, :, :, None] - of_k[:, :, None], 0.0)
    decay = torch.where(seen[..., None], apart.exp(), 0.0)
    return (x[:, :, :, None] * decay * k[:, :, None]).sum(-1)
