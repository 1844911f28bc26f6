"""Masks and scores at the pairs of a piece: keys of a few blocks against the queries whose lists they stand in.

Tiles of logits are ``(blocks, places x heads, keys)`` in the forward pass and ``(blocks, keys, places x heads)`` in the backward pass; a
*place* is a query that picked the block. Positions, heads and bits of choices broadcast against them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from sparsedsl.backends.tiled.head_groups import Block, Lanes
from sparsedsl.backends.tiled.score_rules import ScoreRule, clamped
from sparsedsl.backends.tiled.selected_chunks import Chunks
from sparsedsl.backends.tiled.selected_invert import Inverted, Piece
from sparsedsl.lang.shapes import joined_shape
from sparsedsl.lang.steps import evaluate, prepared
from sparsedsl.selection.selected_call import SelectedCall

__all__ = ["PairTiles"]

Tensor = torch.Tensor
INF = float("inf")


@dataclass(frozen=True, eq=False)
class PairTiles:
    """What a block of queries does to the products of its pieces. ``members (queries, W)``: bits of the choices, along the lists.

    ``leaves``: the learned tables in float64, which require gradients; ``gains``: where their gradients are added up.
    """

    selected: SelectedCall
    rule: ScoreRule
    lanes: Lanes
    block: Block
    inverted: Inverted
    keys: Chunks
    members: Tensor | None
    leaves: Mapping[str, Tensor]
    gains: Mapping[str, Tensor]

    def logits(self, s: Tensor, piece: Piece) -> Tensor:
        """Masked logits in units of log2 from products ``(blocks, places x heads, keys)``, in place where possible."""
        tile = s.view(len(piece.chunks), piece.load, self.lanes.heads, -1)
        env = self._env(piece, transposed=False)
        tile, _ = self._modified(tile, env, piece, kept=False)
        return tile.reshape(s.shape)

    def logits_kept(self, s: Tensor, piece: Piece) -> tuple[Tensor, Any]:
        """The same from products ``(blocks, keys, places x heads)``, and what :meth:`gradients` needs."""
        tile = s.view(len(piece.chunks), -1, piece.load, self.lanes.heads)
        env = self._env(piece, transposed=True)
        allowed = self._allowed(env, piece)
        tile, kept = self._modified(tile, env, piece, kept=True)
        return tile.reshape(s.shape), (env, allowed, kept)

    def gradients(self, grad: Tensor, piece: Piece, kept: Any) -> Tensor:
        """From the gradient by the logit ``(blocks, keys, places x heads)``, in place where possible: that by the scaled product. Those
        by learned tables are added to ``gains``."""
        env, allowed, of_rule = kept
        tile = grad.view(len(piece.chunks), -1, piece.load, self.lanes.heads)
        if self.rule.bias is not None:
            if self.leaves:
                self._bias_gradients(tile, env)
            return grad
        tile, tables = self.rule.gradients(tile, of_rule, self.leaves)
        for name, found in tables.items():
            self.gains[name].add_(found)
        if self.rule.arbitrary and allowed is not None:
            tile.masked_fill_(~allowed, 0.0)
        return tile.reshape(grad.shape)

    def _modified(self, tile: Tensor, env: dict[str, Any], piece: Piece, *, kept: bool) -> tuple[Tensor, Any]:
        """Score rule and mask. A score may be anything where a pair is masked, so what is not plain is overwritten there."""
        rule, allowed = self.rule, self._allowed(env, piece)
        if rule.bias is not None:
            bias = clamped(evaluate(rule.bias, env, dtype=tile.dtype).to(device=tile.device, dtype=tile.dtype))
            return tile.add_(bias if allowed is None else torch.where(allowed, bias, -INF)), None
        if rule.arbitrary and allowed is not None:
            tile.masked_fill_(~allowed, 1.0)
        of_rule = None
        if kept:
            tile, of_rule = rule.logits_kept(tile, env, self.leaves)
        else:
            tile = rule.logits(tile, env) if rule.changes else tile
        if allowed is None:
            return tile, of_rule
        if rule.arbitrary:
            return tile.masked_fill_(~allowed, -INF), of_rule
        return tile.add_(torch.zeros(allowed.shape, dtype=tile.dtype, device=tile.device).masked_fill_(~allowed, -INF)), of_rule

    def _allowed(self, env: dict[str, Any], piece: Piece) -> Tensor | None:
        """Which pairs attend, broadcasting against the tile; None: all. A place without a query has none, where a score is evaluated."""
        if "allowed" in env:
            return env["allowed"]
        allowed = None
        if self.selected.mask is not sympy.true:
            allowed = torch.as_tensor(self._mask(env), device=self.inverted.pairs.device)
            allowed = allowed.expand(joined_shape(allowed.shape, env["q_idx"].shape, env["kv_idx"].shape))
        if self.rule.arbitrary or self.rule.bias is not None:
            real = self.inverted.queries[piece.places] < self.block.queries
            if not bool(real.all()):
                real = real.view(env["q_idx"].shape)
                allowed = real if allowed is None else allowed & real
        env["allowed"] = allowed
        return allowed

    def _env(self, piece: Piece, *, transposed: bool) -> dict[str, Any]:
        """Positions, heads, tables and choices. A place without a query stands for the last one, which picked nothing there."""
        count, load, device = len(piece.chunks), piece.load, self.inverted.pairs.device
        places = (count, 1, load, 1) if transposed else (count, load, 1, 1)
        query = self.inverted.queries[piece.places].clamp(max=self.block.queries - 1).view(places)
        _, lanes, rows = self.block.sizes
        units, tokens = self.keys.units, self.keys.tokens
        start = torch.tensor([number % units * tokens for number in piece.chunks], device=device)
        keys = start[:, None] + torch.arange(self.keys.length(piece) if piece.ragged else tokens, device=device)
        lane = self.block.lanes.start if lanes == 1 else self.block.lanes.start + query // rows % lanes
        env = dict(self._fixed)
        heads = torch.arange(self.lanes.heads, device=device)
        several = lanes > 1 or len(self.block.batch) > 1
        env["b"] = self.block.batch.start + (query // (rows * lanes) if len(self.block.batch) > 1 else 0)
        env["h"] = lane * self.lanes.heads + (heads if transposed else heads[:, None])
        env["q_idx"] = self.selected.domain.q_offset + self.block.rows.start + (query % rows if several else query)
        env["kv_idx"] = keys.view(count, -1, 1, 1) if transposed else keys.view(count, 1, 1, -1)
        if self._bits is not None:
            bits = self._bits[self.inverted.pairs[piece.places]].view(places)
            env |= {name: (bits >> number & 1).bool() for number, name in enumerate(self.selected.choices)}
        return env

    @functools.cached_property
    def _mask(self) -> Callable[[Mapping[str, Any]], Tensor]:
        return prepared(self.selected.mask)

    @functools.cached_property
    def _fixed(self) -> dict[str, Any]:
        """What all pieces see alike: lengths and tables."""
        return {**self.selected.domain.lengths, **self.selected.tables}

    @functools.cached_property
    def _bits(self) -> Tensor | None:
        """The bits by pair; none of the number that stands for no pair."""
        return None if self.members is None else torch.cat([self.members.flatten(), self.members.new_zeros(1)])

    def _bias_gradients(self, grad: Tensor, env: dict[str, Any]) -> None:
        """Gradients of the tables that the bias reads, from those by the logits."""
        with torch.enable_grad():
            value = evaluate(self.rule.bias, {**env, **self.leaves}, dtype=torch.float64)
            value = value.view(*(1,) * (grad.ndim - value.ndim), *value.shape)
        if value.requires_grad:
            wanted = grad.double().sum_to_size(value.shape)
            for name, found in zip(
                self.leaves, torch.autograd.grad(value, list(self.leaves.values()), wanted, allow_unused=True), strict=True
            ):
                if found is not None:
                    self.gains[name].add_(found)
