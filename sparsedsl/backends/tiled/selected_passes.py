"""Forward and backward pass over one block of queries: tile by tile, then for each query the places of its list together.

Logits are in units of log2, so that ``exp2`` serves. Rows are places x heads of a head group. The forward pass holds its tiles
as (rows, tokens), the backward pass as (tokens, rows): four of its five products are then ones that CPUs are quick at (see
``runtime/gemm.py``).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding_bag

from sparsedsl.backends.tiled.selected_chunks import Chunks, ChunkSums
from sparsedsl.backends.tiled.selected_invert import ChunkTile, Inverted
from sparsedsl.backends.tiled.selected_tiles import PairTiles
from sparsedsl.runtime.gemm import product, product_nt, product_tn

__all__ = ["BlockPass"]

Tensor = torch.Tensor
INF = float("inf")


@dataclass(frozen=True, eq=False)
class BlockPass:
    """One block. ``q (queries + 1, heads, D)`` times the factor of the score rule, the last row 0; ``weights (queries, heads, W)``, 0
    after the ends of lists, or None for one softmax over all chunks. ``tiles``: score rule and mask; None where products are logits in
    units of log2 and all of them attend. ``tanh``: whether the rule wants that of the products. ``softmax1``: a logit 0 more, without a
    value, in each softmax.
    """

    inverted: Inverted
    q: Tensor
    k: Chunks
    v: Chunks
    weights: Tensor | None
    tiles: PairTiles | None
    tanh: bool
    softmax1: bool

    # ---- forward ----------------------------------------------------------------------------------------------

    def forward(self) -> tuple[Tensor, Tensor]:
        """``out (queries, heads, Dv)`` and ``lse (queries, heads)``, in units of log2."""
        places, heads = self.inverted.pairs.shape[0], self.q.shape[1]
        out = self.q.new_empty((places + 1, heads, self.v.x.shape[3]))
        peak, total = self.q.new_empty((places + 1, heads)), self.q.new_empty((places + 1, heads))
        out[-1], peak[-1], total[-1] = 0.0, -INF, 0.0

        for tile in self.inverted.tiles:
            at = tile.places
            weights = self._logits(tile)
            largest, sums = self._exponentials(weights, dim=2)
            peak[at], total[at] = largest.view(-1, heads), sums.view(-1, heads)
            out[at] = product(weights, self.v.read(tile)).view(-1, heads, out.shape[2])
        peak, total = peak.take(self._index), total.take(self._index)
        if self.weights is None:
            largest, shares, sums = self._joined(peak, total)
            lse = largest + sums.log2()
            factors = shares.div_(sums[..., None]).masked_fill_((sums == 0)[..., None], 0.0)
        else:
            factors = (self.weights / total).masked_fill_(total == 0, 0.0)
            lse = self.weights.sum(2).log2()
        return self._summed(out, factors), lse

    def totals(self) -> tuple[Tensor, Tensor]:
        """Of each query and head the largest logit in units of log2, and the sum of ``2**(logit - largest)``: an LSE as two numbers."""
        places, heads = self.inverted.pairs.shape[0], self.q.shape[1]
        peak, total = self.q.new_full((places + 1, heads), -INF), self.q.new_zeros((places + 1, heads))
        for tile in self.inverted.tiles:
            largest, sums = self._exponentials(self._logits(tile), dim=2)
            peak[tile.places], total[tile.places] = largest.view(-1, heads), sums.view(-1, heads)
        largest, _, sums = self._joined(peak.take(self._index), total.take(self._index))
        return largest, sums

    def _logits(self, tile: ChunkTile) -> Tensor:
        """``(chunks, rows, tokens)``."""
        logits = product_nt(self._rows(self.q, tile), self.k.read(tile), tanh=self.tanh)
        return logits if self.tiles is None else self.tiles.logits(logits, tile)

    def _joined(self, peak: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the largest logits and the sums relative to them, by chunk: the largest of all, ``2**(each - largest)``, and the sum
        relative to it. Logits may be so large that their LSE has no digits left for a sum."""
        largest = peak.amax(2).clamp_(min=0.0 if self.softmax1 else torch.finfo(peak.dtype).min)
        shares = (peak - largest[..., None]).exp2_()
        sums = (shares * total).sum(2)
        if self.softmax1:
            sums += (-largest).exp2_()
        return largest, shares, sums

    def _exponentials(self, logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Make logits into ``exp2(logits - largest)`` in place; ``largest`` and the sums along ``dim``."""
        largest = logits.amax(dim, keepdim=True)
        if self.tiles is not None:
            largest.clamp_(min=torch.finfo(logits.dtype).min)  # -inf - -inf is no number
        sums = logits.sub_(largest).exp2_().sum(dim, keepdim=True)
        if self.softmax1 and self.weights is not None:
            sums += (-largest).exp2_()  # inf where the logits are so far below 0 that nothing is left of them
        return largest, sums

    # ---- backward ---------------------------------------------------------------------------------------------

    def backward(
        self, grad_out: Tensor, lse: Tensor, delta: Tensor, sums: tuple[ChunkSums, ChunkSums] | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients by the scaled products of q, ``(queries, heads, D)``, without the scale, and of the weights ``(queries, heads, W)``.

        ``grad_out (queries + 1, heads, Dv)``, the last row 0. For one softmax ``lse (queries + 1, heads)`` in units of log2, inf where
        there is none, and ``delta = <grad_out, out> - grad_lse``; where each chunk has a softmax of its own it has a delta of its own.
        Adds to ``sums`` of k (to be multiplied by the scale and divided by the factor in q) and v.
        """
        places, heads = self.inverted.pairs.shape[0], self.q.shape[1]
        grad_q = self.q.new_empty((places + 1, heads, self.q.shape[2]))
        by_place = self.q.new_empty((places + 1, heads))
        grad_q[-1], by_place[-1] = 0.0, 0.0
        shares = None if self.weights is None else _with_none(self.weights.transpose(1, 2).reshape(-1, heads))

        for tile in self.inverted.tiles:
            at = tile.places
            rows, grads, keys = self._rows(self.q, tile), self._rows(grad_out, tile), self.k.read(tile)
            weights, kept = product_nt(keys, rows, tanh=self.tanh), None
            if self.tiles is not None:
                weights, kept = self.tiles.logits_kept(weights, tile)
            slopes = product_nt(self.v.read(tile), grads)
            if shares is None:
                weights.sub_(self._rows(lse, tile))
                if self.tiles is not None:
                    weights.clamp_(max=0.0)  # so large a logit that the LSE could not hold what was added to it
                weights.exp2_()
                slopes.sub_(self._rows(delta, tile))
            else:
                total = self._exponentials(weights, dim=1)[1].clamp_(min=torch.finfo(weights.dtype).tiny)
                own = (weights * slopes).sum(1, keepdim=True).div_(total)
                by_place[at] = own.view(-1, heads)
                weights.mul_(shares.index_select(0, self.inverted.pairs[at]).view(total.shape).div_(total))
                slopes.sub_(own)
            slopes.mul_(weights)
            if self.tiles is not None:
                slopes = self.tiles.gradients(slopes, tile, kept)
            if sums is not None:
                sums[0].add(tile, product(slopes, rows))
                sums[1].add(tile, product(weights, grads))
            grad_q[at] = product_tn(slopes, keys).reshape(-1, heads, grad_q.shape[2])
        return self._summed(grad_q, None), None if shares is None else by_place.take(self._index)

    # ---- between queries and places ---------------------------------------------------------------------------

    def _rows(self, x: Tensor, tile: ChunkTile) -> Tensor:
        """What the places of a tile have of ``x (queries + 1, heads, n)``: ``(chunks, rows, n)``; without n ``(chunks, 1, rows)``."""
        chosen = x.index_select(0, self.inverted.queries[tile.places])
        number = len(tile.chunks)
        return chosen.view(number, -1, x.shape[2]) if x.ndim == 3 else chosen.view(number, 1, -1)

    @functools.cached_property
    def _index(self) -> Tensor:
        """Where each query, head and slot stands in a tensor ``(places + 1, heads)``."""
        heads = self.q.shape[1]
        return self.inverted.place[:, None] * heads + torch.arange(heads, device=self.q.device)[:, None]

    def _summed(self, x: Tensor, factors: Tensor | None) -> Tensor:
        """For each query and head the sum over its list of ``x (places + 1, heads, n)``, times factors."""
        queries, heads, slots = self._index.shape
        if factors is not None:
            factors = factors.view(-1, slots)
        flat = embedding_bag(self._index.view(-1, slots), x.flatten(0, 1), mode="sum", per_sample_weights=factors)
        return flat.view(queries, heads, -1)


def _with_none(x: Tensor) -> Tensor:
    """With a row of zeros more, for places without a pair."""
    return torch.cat([x, x.new_zeros((1, x.shape[1]))])
