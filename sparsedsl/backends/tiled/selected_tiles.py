"""Masks and scores at the pairs of a tile: keys of a few blocks against the queries whose lists they stand in.

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

from sparsedsl.backends.tiled.head_groups import Block, HeadGroups
from sparsedsl.backends.tiled.score_rules import ScoreRule, clamped
from sparsedsl.backends.tiled.selected_chunks import Chunks
from sparsedsl.backends.tiled.selected_invert import ChunkTile, Inverted
from sparsedsl.lang.shapes import joined_shape
from sparsedsl.lang.steps import evaluate, prepared
from sparsedsl.selection.selected_call import SelectedCall

__all__ = ["PairTiles"]

Tensor = torch.Tensor
INF = float("inf")


@dataclass(frozen=True, eq=False)
class PairTiles:
    """What a block of queries does to the products of its tiles. ``members (queries, W)``: bits of the choices, along the lists.

    ``leaves``: the learned tables in float64, which require gradients; ``accumulators``: where their gradients are added up.
    """

    selected: SelectedCall
    rule: ScoreRule
    head_groups: HeadGroups
    block: Block
    inverted: Inverted
    keys: Chunks
    members: Tensor | None
    leaves: Mapping[str, Tensor]
    accumulators: Mapping[str, Tensor]

    def logits(self, s: Tensor, tile: ChunkTile) -> Tensor:
        """Masked logits in units of log2 from products ``(blocks, places x heads, keys)``, in place where possible."""
        values = s.view(len(tile.chunks), tile.load, self.head_groups.heads, -1)
        env = self._env(tile, transposed=False)
        values, _ = self._modified(values, env, tile, kept=False)
        return values.reshape(s.shape)

    def logits_kept(self, s: Tensor, tile: ChunkTile) -> tuple[Tensor, Any]:
        """The same from products ``(blocks, keys, places x heads)``, and what :meth:`gradients` needs."""
        values = s.view(len(tile.chunks), -1, tile.load, self.head_groups.heads)
        env = self._env(tile, transposed=True)
        allowed = self._allowed(env, tile)
        values, kept = self._modified(values, env, tile, kept=True)
        return values.reshape(s.shape), (env, allowed, kept)

    def gradients(self, grad: Tensor, tile: ChunkTile, kept: Any) -> Tensor:
        """From the gradient by the logit ``(blocks, keys, places x heads)``, in place where possible: that by the scaled product. Those
        by learned tables are added to ``accumulators``."""
        env, allowed, of_rule = kept
        values = grad.view(len(tile.chunks), -1, tile.load, self.head_groups.heads)
        if self.rule.bias is not None:
            if self.leaves:
                self._bias_gradients(values, env)
            return grad
        values, tables = self.rule.gradients(values, of_rule, self.leaves)
        for name, found in tables.items():
            self.accumulators[name].add_(found)
        if self.rule.arbitrary and allowed is not None:
            values.masked_fill_(~allowed, 0.0)
        return values.reshape(grad.shape)

    def _modified(self, values: Tensor, env: dict[str, Any], tile: ChunkTile, *, kept: bool) -> tuple[Tensor, Any]:
        """Score rule and mask. A score may be anything where a pair is masked, so what is not plain is overwritten there."""
        rule, allowed = self.rule, self._allowed(env, tile)
        if rule.bias is not None:
            bias = clamped(evaluate(rule.bias, env, dtype=values.dtype).to(device=values.device, dtype=values.dtype))
            return values.add_(bias if allowed is None else torch.where(allowed, bias, -INF)), None
        if rule.arbitrary and allowed is not None:
            values.masked_fill_(~allowed, 1.0)
        of_rule = None
        if kept:
            values, of_rule = rule.logits_kept(values, env, self.leaves)
        else:
            values = rule.logits(values, env) if rule.changes else values
        if allowed is None:
            return values, of_rule
        if rule.arbitrary:
            return values.masked_fill_(~allowed, -INF), of_rule
        return values.add_(
            torch.zeros(allowed.shape, dtype=values.dtype, device=values.device).masked_fill_(~allowed, -INF)
        ), of_rule

    def _allowed(self, env: dict[str, Any], tile: ChunkTile) -> Tensor | None:
        """Which pairs attend, broadcasting against the tile; None: all. A place without a query has none, where a score is evaluated."""
        if "allowed" in env:
            return env["allowed"]
        allowed = None
        if self.selected.mask is not sympy.true:
            allowed = torch.as_tensor(self._mask(env), device=self.inverted.pairs.device)
            allowed = allowed.expand(joined_shape(allowed.shape, env["q_idx"].shape, env["kv_idx"].shape))
        if self.rule.arbitrary or self.rule.bias is not None:
            real = self.inverted.queries[tile.places] < self.block.queries
            if not bool(real.all()):
                real = real.view(env["q_idx"].shape)
                allowed = real if allowed is None else allowed & real
        env["allowed"] = allowed
        return allowed

    def _env(self, tile: ChunkTile, *, transposed: bool) -> dict[str, Any]:
        """Positions, heads, tables and choices. A place without a query stands for the last one, which picked nothing there."""
        count, load, device = len(tile.chunks), tile.load, self.inverted.pairs.device
        places = (count, 1, load, 1) if transposed else (count, load, 1, 1)
        query = self.inverted.queries[tile.places].clamp(max=self.block.queries - 1).view(places)
        _, head_groups, rows = self.block.sizes
        blocks, tokens = self.keys.blocks, self.keys.tokens
        start = torch.tensor([number % blocks * tokens for number in tile.chunks], device=device)
        keys = start[:, None] + torch.arange(self.keys.length(tile) if tile.ragged else tokens, device=device)
        head_group = (
            self.block.head_groups.start if head_groups == 1 else self.block.head_groups.start + query // rows % head_groups
        )
        env = dict(self._fixed)
        heads = torch.arange(self.head_groups.heads, device=device)
        several = head_groups > 1 or len(self.block.batch) > 1
        env["b"] = self.block.batch.start + (query // (rows * head_groups) if len(self.block.batch) > 1 else 0)
        env["h"] = head_group * self.head_groups.heads + (heads if transposed else heads[:, None])
        env["q_idx"] = self.selected.domain.q_offset + self.block.rows.start + (query % rows if several else query)
        env["kv_idx"] = keys.view(count, -1, 1, 1) if transposed else keys.view(count, 1, 1, -1)
        if self._bits is not None:
            bits = self._bits[self.inverted.pairs[tile.places]].view(places)
            env |= {name: (bits >> number & 1).bool() for number, name in enumerate(self.selected.choices)}
        return env

    @functools.cached_property
    def _mask(self) -> Callable[[Mapping[str, Any]], Tensor]:
        return prepared(self.selected.mask)

    @functools.cached_property
    def _fixed(self) -> dict[str, Any]:
        """What all tiles see alike: lengths and tables."""
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
                    self.accumulators[name].add_(found)
