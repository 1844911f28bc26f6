"""The tensors of a ``tiled`` pass, as every residue of it sees them."""

from __future__ import annotations

from typing import Any

import torch

from sparsedsl.backends.tiled.score_rules import rule_of
from sparsedsl.lang.normalisers import POINTWISE, SOFTPICK
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.tiling.schedule import Schedule

__all__ = ["GradientAccumulators", "Operands"]

Tensor = torch.Tensor


class Operands:
    """q, k, v and what belongs to them; rows are ``(B, heads that share keys, S, heads of a group, ..)``, keys ``(B, Hkv, Skv, ..)``.

    ``by_row``: results, and what the backward pass reads, by name. ``leaves``: learned tables, in the order of their gradients.
    """

    def __init__(self, pattern: Pattern, call: Call, schedule: Schedule) -> None:
        self.pattern, self.call, self.schedule = pattern, call, schedule
        self.rule = rule_of(pattern)
        self.pointwise, self.picks = pattern.normaliser == POINTWISE, pattern.normaliser == SOFTPICK
        self.dtype = accumulated(call.q.dtype)
        self.group = 1 if pattern.tells_heads_apart else call.group
        self.batch, self.heads, self.rows = call.q.shape[:3]
        self.shared = self.heads // self.group  # heads that strips are made for
        self.factor = self.rule.factor(call.scale)
        self.q = self.grouped(call.q)
        self._keys: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self.tables = dict(call.tables)
        self.by_row: dict[str, Tensor] = {}
        self.leaves: dict[str, Tensor] = {}

    def keys(self, part: slice) -> tuple[Tensor, Tensor]:
        """k and v at some positions, ``(B x Hkv, keys, ..)`` in the type of arithmetic: views where rows lie one after the other."""
        hashed = (part.start, part.stop, part.step)
        if hashed not in self._keys:
            self._keys[hashed] = (self._rows(self.call.k[:, :, part]), self._rows(self.call.v[:, :, part]))
        return self._keys[hashed]

    def _rows(self, t: Tensor) -> Tensor:
        t = t.to(self.dtype)
        dense = t.shape[2] <= 1 or t.stride(2) == t.shape[3]
        return (t if dense and t.stride(3) == 1 else t.contiguous()).flatten(0, 1)

    def grouped(self, t: Tensor) -> Tensor:
        """``(B, Hq, S, ..)`` as a view ``(B, heads that share keys, S, heads of a group, ..)``."""
        return t.unflatten(1, (self.shared, self.group)).transpose(2, 3)


class GradientAccumulators:
    """Gradients that one thread adds up: of keys and values ``(B, Hkv, Skv, ..)``, and of the learned tables in the order of ``leaves``."""

    def __init__(self, run: Operands) -> None:
        k, v = run.call.k, run.call.v
        self.dk, self.dv = (torch.zeros(t.shape, dtype=run.dtype, device=t.device) for t in (k, v))
        self.tables = {name: torch.zeros_like(leaf) for name, leaf in run.leaves.items()}
        self._places: dict[Any, tuple[Tensor, Tensor]] = {}

    def of(self, residue: Any, keys: slice) -> tuple[Tensor, Tensor]:
        """Gradients of the keys and values of a residue, ``(B x Hkv, keys, ..)``: views."""
        if residue not in self._places:
            self._places[residue] = (self.dk.flatten(0, 1)[:, keys], self.dv.flatten(0, 1)[:, keys])
        return self._places[residue]

    def add_tables(self, found: tuple[Tensor | None, ...]) -> None:
        """Add gradients of the learned tables, in their order."""
        for name, grad in zip(self.tables, found, strict=True):
            if grad is not None:
                self.tables[name] += grad

    def with_tables_of_its_own(self) -> GradientAccumulators:
        """The same keys and values, for a thread that adds to other heads of them."""
        other = object.__new__(GradientAccumulators)
        other.dk, other.dv, other._places = self.dk, self.dv, {}
        other.tables = {name: torch.zeros_like(grad) for name, grad in self.tables.items()}
        return other
