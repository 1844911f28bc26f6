"""Sums over the pairs of a chunk, each pair with a decay of its own a slot, without one exponential or quotient a pair.

A chunk is halved again and again. Where a query lies in the second half of a block and a key in the first, the decay between them is
(what the query's half decays up to the query) x (what the key's half decays after the key): two factors of at most 1, so nothing can
overflow, however hard the gates close, and pairs become products of matrices. What blocks of one size decay comes from the next
smaller ones by multiplication: a decay of 0, of a closed gate or where a document begins, is an ordinary number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Decays", "from_slots", "halve", "into_slots"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Decays:
    """The decays within chunks; ``L`` chunks of ``C`` rows, ``M`` slots.

    ``write`` (L, C, M): what a key writes. ``reach`` (L, C, M): what is left at a row of what was there before the chunk. ``left``
    (L, C, M): what is left after the chunk of what a row wrote. ``halves``: for blocks of 2, 4, .. C rows, with ``b`` half of that,
    what is left at the rows of second halves of what was there before them, and at the end of first halves of what their rows
    wrote; each (L * C / 2b, b, M).
    """

    write: Tensor
    reach: Tensor
    left: Tensor
    halves: tuple[tuple[Tensor, Tensor], ...]


def halve(keep: Tensor, write: Tensor) -> Decays:
    """The decays of chunks with the factors ``keep`` and the writes ``write``, both (L, C, M); C is a power of two."""
    reach, left = keep.flatten(0, 1)[:, None], write.flatten(0, 1)[:, None]  # blocks of one row
    halves = []
    while reach.shape[1] < keep.shape[1]:
        (reach_1, reach_2), (left_1, left_2) = (t.unflatten(0, (-1, 2)).unbind(1) for t in (reach, left))
        halves.append((reach_2, left_1))
        reach = torch.cat([reach_1, reach_2 * reach_1[:, -1:]], dim=1)
        left = torch.cat([left_1 * reach_2[:, -1:], left_2], dim=1)
    return Decays(write, reach, left, tuple(halves))


def into_slots(q: Tensor, k: Tensor, decays: Decays) -> Tensor:
    """``x[i, m] = sum over j <= i of (q[i] . k[j]) * decay[i, j, m] * write[j, m]``.

    q (L, C, g, D), the g query heads of a key head side by side; k (L, C, D); the result (L, C, g, M).
    """
    length, size, group, _ = q.shape
    x = (q * k[:, :, None]).sum(dim=3, keepdim=True) * decays.write[:, :, None]
    for reach, left in decays.halves:
        later, earlier = _second(q, reach), _first(k, left)
        added = (later @ earlier.transpose(1, 2)) @ left
        x = _add(x, added.unflatten(1, (-1, group)) * reach[:, :, None])
    return x.view(length, size, group, -1)


def from_slots(p: Tensor, v: Tensor, decays: Decays) -> Tensor:
    """``out[i] = sum over j <= i of (sum over m of p[i, m] * decay[i, j, m] * write[j, m]) * v[j]``: p (L, C, g, M), v (L, C, Dv)."""
    length, size, group, _ = p.shape
    out = (p * decays.write[:, :, None]).sum(dim=3, keepdim=True) * v[:, :, None]
    for reach, left in decays.halves:
        later = _second(p, reach).unflatten(1, (-1, group)) * reach[:, :, None]
        added = (later.flatten(1, 2) @ left.transpose(1, 2)) @ _first(v, left)
        out = _add(out, added.unflatten(1, (-1, group)))
    return out.view(length, size, group, -1)


def _second(x: Tensor, half: Tensor) -> Tensor:
    """The rows (L, C, g, ..) in second halves of blocks, those of a block's g heads together: (blocks, b * g, ..)."""
    return x.reshape(half.shape[0], 2, half.shape[1] * x.shape[2], -1)[:, 1]


def _first(x: Tensor, half: Tensor) -> Tensor:
    """The rows (L, C, ..) in first halves of blocks: (blocks, b, ..)."""
    return x.reshape(half.shape[0], 2, half.shape[1], -1)[:, 0]


def _add(x: Tensor, added: Tensor) -> Tensor:
    """``x`` with ``added`` (blocks, b, g, ..) on top of the second halves of its blocks."""
    first, second = x.reshape(added.shape[0], 2, *added.shape[1:]).unbind(1)
    return torch.stack([first, second + added], dim=1)
