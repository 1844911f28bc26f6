"""What lies between the rows of a chunk: decays that the data give, one a key (scalar) or one a channel of a key (vector).

``X`` lines (batch entries times heads with a state), ``N`` chunks, ``C`` rows, ``D`` channels; ``c_i`` the sum of the logarithms up to
row ``i``. A reader ``i`` sees a writer ``j`` through ``e^(c_i - c_j)``. Every exponent that is used is at most 0, so that nothing
overflows, however hard the gates close, and none is the difference of two sums that are much larger than it.
"""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["PairDecays", "ScalarDecays", "VectorDecays", "suffix_sums"]

Tensor = torch.Tensor


class PairDecays(Protocol):
    """The decays of all chunks of a row range. ``reach`` (X, N, C, 1 or D): of the state before the chunk, at a reader; ``left``: of what
    a row wrote, at the end of the chunk; ``total`` (X, N, 1 or D, 1): of the state before, at the end."""

    reach: Tensor
    left: Tensor
    total: Tensor

    def products(self, x: Tensor, k: Tensor) -> Tensor:
        """``sum_d x_id k_jd e^(c_id - c_jd)`` for pairs ``j <= i`` that see each other, else 0: x (X, N, R, C, D), R readers of a row;
        k (X, N, C, D); the result (X, N, R, C, C). The entries ``j = i`` are left to the caller where decays are vectors."""
        ...

    def slopes(self, grad: Tensor, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of x and k from that of the products."""
        ...


def suffix_sums(x: Tensor, number: Tensor | None) -> Tensor:
    """Sums over the rows of a chunk from each row on, as far as its document goes: x (X, N, C, ..), number (X, N, C)."""
    if number is None:
        return x.flip(2).cumsum(2).flip(2)
    size = x.shape[2]
    own = (number[..., :, None] == number[..., None, :]).to(x.dtype).triu()
    return (own @ x.reshape(*x.shape[:2], size, -1)).view_as(x)


def _within(number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows before the first document of a chunk begins, rows of its last one, (X, N, C, 1); whether none begins, (X, N, 1, 1)."""
    last = number[..., -1:]
    return (number == 0)[..., None], (number == last)[..., None], (last == 0)[..., None]


class ScalarDecays:
    """One decay a key: pairs are a product times a table of decays."""

    def __init__(self, g: Tensor, number: Tensor | None):
        """``g`` (X, N, C): logarithms, finite. ``number``: documents of the rows, from 0 in each chunk."""
        sums = g.cumsum(2)
        self.reach = sums.exp()[..., None]
        self.total = sums[..., -1:, None].exp()
        after = torch.cat([g[..., 1:], torch.zeros_like(g[..., :1])], dim=2)
        self.left = after.flip(2).cumsum(2).flip(2).exp()[..., None]
        self.pairs = _pair_table(g)
        if number is not None:
            first, last, whole = _within(number)
            self.reach, self.left, self.total = self.reach * first, self.left * last, self.total * whole
            self.pairs = self.pairs * (number[..., :, None] == number[..., None, :])

    def products(self, x: Tensor, k: Tensor) -> Tensor:
        """With the entries ``j = i``."""
        found = (x.flatten(2, 3) @ k.mT).unflatten(2, x.shape[2:4])
        return found.mul_(self.pairs[:, :, None])

    def slopes(self, grad: Tensor, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Two products."""
        weighed = (grad * self.pairs[:, :, None]).flatten(2, 3)
        return (weighed @ k).unflatten(2, x.shape[2:4]), weighed.mT @ x.flatten(2, 3)


def _pair_table(g: Tensor) -> Tensor:
    """``e^(c_i - c_j)`` where row i reads row j, else 0: (X, N, C, C). Sums are made in float64 and split into what float32 holds and the
    rest, since the difference of two large sums is as wrong as they are."""
    size = g.shape[2]
    sums = g.double().cumsum(2)
    unseen = torch.ones(size, size, dtype=torch.bool, device=g.device).triu(1)
    high = sums.to(g.dtype)
    found = high[..., :, None] - high[..., None, :]
    if g.dtype != torch.float64:
        low = (sums - high).to(g.dtype)
        found += low[..., :, None] - low[..., None, :]
    return found.masked_fill_(unseen, float("-inf")).exp_()


class VectorDecays:
    """One decay a channel: a chunk is halved again and again. Where a reader lies in the second half of a block and a writer in the first,
    the decay between them is that from the middle to the reader times that from the writer to the middle: two factors of at most 1, and
    pairs are products of matrices. The middle lies in the past of every reader."""

    def __init__(self, g: Tensor, number: Tensor | None):
        """``g`` (X, N, C, D), C a power of two; the rest as for scalars."""
        sums = g.cumsum(2)
        self.reach = sums.exp()
        self.total = sums[:, :, -1, :, None].exp()
        self.left = _from_next(g).exp()
        self.halves: list[tuple[Tensor, Tensor]] = []
        half = 1
        while half < g.shape[2]:
            first, second = g.unflatten(2, (-1, 2, half)).unbind(3)  # (X, N, blocks, half, D)
            self.halves.append((second.cumsum(3).exp_(), _from_next(first).exp_()))
            half *= 2
        self.same = None
        if number is not None:
            first, last, whole = _within(number)
            self.reach, self.left, self.total = self.reach * first, self.left * last, self.total * whole
            self.same = (number[..., :, None] == number[..., None, :])[:, :, None]

    def products(self, x: Tensor, k: Tensor) -> Tensor:
        """Without the entries ``j = i``."""
        found = x.new_zeros(*x.shape[:4], x.shape[3])
        for reader, writer in self.halves:
            later, earlier = _second(x, 3, reader), _first(k, 2, writer)
            _blocks(found, reader.shape[3]).copy_((later @ earlier.mT[:, :, None]).movedim(3, -1))
        return found if self.same is None else found.mul_(self.same)

    def slopes(self, grad: Tensor, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Two products a halving."""
        grad = grad if self.same is None else grad * self.same
        by_x, by_k = torch.zeros_like(x), torch.zeros_like(k)
        for reader, writer in self.halves:
            half = reader.shape[3]
            later, earlier = _second(x, 3, reader), _first(k, 2, writer)
            pairs = _blocks(grad, half).movedim(-1, 3)
            by_x.unflatten(3, (-1, 2, half))[:, :, :, :, 1].add_((pairs @ earlier[:, :, None]).mul_(reader[:, :, None]))
            by_k.unflatten(2, (-1, 2, half))[:, :, :, 0].add_((pairs.mT @ later).sum(2).mul_(writer))
        return by_x, by_k


def _from_next(g: Tensor) -> Tensor:
    """Sums of what follows a row, in the second dimension from the end."""
    following = torch.cat([g[..., 1:, :], torch.zeros_like(g[..., :1, :])], dim=-2)
    return following.flip(-2).cumsum(-2).flip(-2)


def _second(x: Tensor, rows: int, factor: Tensor) -> Tensor:
    """The rows of x (X, N, R, C, D) in second halves of blocks, each times its factor: (X, N, R, blocks, half, D)."""
    return x.unflatten(rows, (-1, 2, factor.shape[3]))[:, :, :, :, 1] * factor[:, :, None]


def _first(k: Tensor, rows: int, factor: Tensor) -> Tensor:
    """The rows of k (X, N, C, D) in first halves of blocks, each times its factor: (X, N, blocks, half, D)."""
    return k.unflatten(rows, (-1, 2, factor.shape[3]))[:, :, :, 0] * factor


def _blocks(pairs: Tensor, half: int) -> Tensor:
    """A view of the pairs (X, N, R, C, C) of second with first halves of one block: (X, N, R, half, half, blocks)."""
    split = pairs.unflatten(4, (-1, 2, half)).unflatten(3, (-1, 2, half))
    return split[:, :, :, :, 1, :, :, 0].diagonal(0, 3, 5)
