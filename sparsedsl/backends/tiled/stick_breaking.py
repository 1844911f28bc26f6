"""Stick-breaking in the ``tiled`` lowering: rows of tiles, each from its last tile of keys to its first.

Of a row ``i`` key ``j`` gets ``s_ij`` of what the keys after it have left, ``A_ij = s_ij prod_{l > j} (1 - s_il)`` with ``s`` the
sigmoid of the logit and the product over keys that the row sees. What is left is carried from tile to tile as a logarithm: one less the
weights given away would lose all digits. A row of tiles ends where the weights of all further keys are 0 in the arithmetic at hand: keys
that lie so far back are not read.

The backward pass goes through the same tiles twice: from the last, for what is left at each, and from the first, for the sums over
earlier keys: ``dz_ij = A_ij g_ij (1 - s_ij) - s_ij sum_{l < j} A_il g_il`` with ``g = dO . v``. Nothing is subtracted from a total.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.nn import functional

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.lists import BlockLists
from sparsedsl.backends.protocol import ListMaker, PatternRunner
from sparsedsl.backends.tiled.attention import sight_of
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.steps import evaluate
from sparsedsl.runtime.autograd import differentiable
from sparsedsl.runtime.call import Call
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.request import CallFacts
from sparsedsl.runtime.torch_modes import plain_math
from sparsedsl.runtime.unseen import Sight

__all__ = ["StickBreakingKernel"]

Tensor = torch.Tensor
TILE = 128


class StickBreakingKernel(PatternRunner):
    """One pattern with ``normaliser='stick_breaking'``; ``lists``: makes the tile lists of its mask."""

    def __init__(self, pattern: Pattern, lists: ListMaker) -> None:
        self.pattern, self._lists = pattern, lists

    def attend(self, call: Call, *, lse: bool) -> tuple[Tensor, Tensor]:
        """Out, differentiable, and an LSE that means nothing."""
        return differentiable(self, call)

    @property
    def source(self) -> str:
        """The pattern, which is interpreted."""
        return self.pattern.text

    def described(self, domain: Domain, facts: CallFacts) -> tuple[str, ...]:
        """How keys are visited."""
        return (f"tiles of {TILE} x {TILE}, those of a row from the last key to the first, until nothing is left",)

    def schedule(self, call: Call) -> BlockLists:
        """The tiles of the mask."""
        return self._lists(call.domain, (TILE, TILE))

    def sight(self, call: Call) -> Sight:
        """Who sees whom in a call."""
        return sight_of(self.pattern, call)

    def forward(self, call: Call, schedule: BlockLists) -> tuple[Tensor, Tensor]:
        """``out (B, Hq, Sq, Dv)``; the LSE is 0 everywhere."""
        with plain_math(call.q.device.type):
            dtype = accumulated(call.q.dtype)
            out = call.q.new_zeros((*call.q.shape[:3], call.v.shape[3]), dtype=dtype)
            for row in _rows(self.pattern, call, schedule):
                row.heads_of(out)[:] = row.forward()
            return out.to(call.q.dtype), out.new_zeros(out.shape[:3])

    def backward(
        self, call: Call, schedule: BlockLists, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
        learned: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
        """Gradients of q, k, v and the learned tables."""
        with plain_math(call.q.device.type):
            dtype = accumulated(call.q.dtype)
            dq, dk, dv = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (call.q, call.k, call.v))
            leaves = {name: call.tables[name].detach().double().requires_grad_() for name in learned}
            tables = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
            for row in _rows(self.pattern, call, schedule):
                row.backward(row.heads_of(grad_out).to(dtype), row.heads_of(dq), row.keys_of(dk), row.keys_of(dv), leaves, tables)
            grads = {name: grad.to(call.tables[name].dtype) for name, grad in tables.items()}
            return dq.to(call.q.dtype), dk.to(call.k.dtype), dv.to(call.v.dtype), grads


def _rows(pattern: Pattern, call: Call, lists: BlockLists) -> Iterator[_Row]:
    """Every row of tiles that sees a key: of all batch entries and heads that share its list together, but for what takes much room."""
    batch, heads, count, _ = lists.shape
    ends = [part.counts.reshape(-1).cumsum(0).tolist() for part in (lists.full, lists.partial)]
    entries = 1 if batch > 1 else max(1, min(call.q.shape[0], (1 << 22) // (TILE * TILE * call.q.shape[1])))
    for line in range(batch * heads * count):
        tiles = []
        for part, end, whole in zip((lists.full, lists.partial), ends, (True, False), strict=True):
            tiles += [(column, whole) for column in part.columns[end[line - 1] if line else 0 : end[line]].tolist()]
        if not tiles:
            continue
        group, number = divmod(line, count)
        entry, head = divmod(group, heads)
        rows = slice(number * TILE, min((number + 1) * TILE, call.domain.rows))
        every = slice(0, call.q.shape[1]) if heads == 1 else slice(head, head + 1)
        for first in range(entry, entry + 1) if batch > 1 else range(0, call.q.shape[0], entries):
            yield _Row(pattern, call, rows, sorted(tiles, reverse=True), slice(first, first + entries), every)


@dataclass(frozen=True, eq=False)
class _Row:
    """One row of tiles: ``rows`` of the call, of some batch ``entries`` and query ``heads``, and its ``tiles``, the last one first, each
    with whether all its pairs are allowed."""

    pattern: Pattern
    call: Call
    rows: slice
    tiles: list[tuple[int, bool]]
    entries: slice
    heads: slice

    def heads_of(self, t: Tensor) -> Tensor:
        """These rows of ``(B, Hq, Sq, ..)``, ``(batch, key heads, group, rows, ..)``: a view."""
        heads = self.heads.stop - self.heads.start
        return t[self.entries, self.heads, self.rows].unflatten(1, (-1, min(self.call.group, heads)))

    def keys_of(self, t: Tensor) -> Tensor:
        """All keys ``(batch, key heads, Skv, ..)`` that these heads read: a view."""
        group = self.call.group
        return t[self.entries, self.heads.start // group : (self.heads.stop - 1) // group + 1]

    def forward(self) -> Tensor:
        """``(batch, key heads, group, rows, Dv)``."""
        v = self.keys_of(self.call.v)
        out: Any = 0
        for tile, left in self._visited():
            logits, allowed, _ = self._logits(tile)
            weights, _ = _weights(logits, allowed, left)
            out = out + _product(weights, self._tile_of(v, tile))
        return out

    def backward(
        self, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, leaves: dict[str, Tensor], tables: dict[str, Tensor]
    ) -> None:  # fmt: skip
        """Add to the gradients of the rows, of all keys and values, and of the learned tables."""
        k, v, scale = self.keys_of(self.call.k), self.keys_of(self.call.v), self.call.scale
        q = self.heads_of(self.call.q).to(grad.dtype)
        earlier = torch.zeros_like(grad[..., :1])
        for tile, left in reversed(list(self._visited())):
            logits, allowed, score = self._logits(tile, leaves)
            weights, share = _weights(logits, allowed, left)
            given = weights * _product(grad, self._tile_of(v, tile).mT)
            before = functional.pad(given.cumsum(-1)[..., :-1], (1, 0)) + earlier
            change = torch.where(allowed, given * torch.sigmoid(-logits) - share * before, 0.0)
            earlier = earlier + given.sum(-1, keepdim=True)
            change = self._through_score(change, allowed, score, leaves, tables)
            dq += _product(change, self._tile_of(k, tile)) * scale
            place = self._keys(tile)
            dk[:, :, place] += (change.flatten(2, 3).mT @ q.flatten(2, 3)) * scale
            dv[:, :, place] += weights.flatten(2, 3).mT @ grad.flatten(2, 3)

    # ---- tiles -------------------------------------------------------------------------------------------------------------------

    def _visited(self) -> Iterator[tuple[tuple[int, bool], Tensor]]:
        """The tiles from the last on, each with the logarithm of what is left to its keys, until weights are 0 whatever follows."""
        left = torch.zeros_like(self.heads_of(self.call.q)[..., :1], dtype=accumulated(self.call.q.dtype))
        info = torch.finfo(left.dtype)
        nothing = math.log(info.smallest_normal * info.eps) - 1
        for tile in self.tiles:
            yield tile, left
            logits, allowed, _ = self._logits(tile)
            left = left + _passed(logits, allowed).sum(-1, keepdim=True)
            if float(left.max()) < nothing:
                return

    def _keys(self, tile: tuple[int, bool]) -> slice:
        return slice(tile[0] * TILE, min((tile[0] + 1) * TILE, self.call.domain.kv_len))

    def _tile_of(self, t: Tensor, tile: tuple[int, bool]) -> Tensor:
        return t[:, :, self._keys(tile)].to(accumulated(self.call.q.dtype))

    def _env(self, tile: tuple[int, bool]) -> dict[str, Any]:
        """Indices that broadcast against ``(batch, key heads, group, rows, keys)``."""
        device, domain, place = self.call.q.device, self.call.domain, self._keys(tile)
        heads = torch.arange(self.heads.start, self.heads.stop, device=device)
        entries = range(domain.batch)[self.entries]
        return {
            "b": torch.arange(entries.start, entries.stop, device=device).view(-1, 1, 1, 1, 1),
            "h": heads.view(-1, min(self.call.group, len(heads)), 1, 1),
            "q_idx": domain.q_offset + torch.arange(self.rows.start, self.rows.stop, device=device)[:, None],
            "kv_idx": torch.arange(place.start, place.stop, device=device), **domain.lengths, **self.call.tables,
        }  # fmt: skip

    def _logits(self, tile: tuple[int, bool], leaves: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor, Any]:
        """Logits, which pairs are allowed, and with ``leaves`` scores and logits that are differentiable. What is masked is 1."""
        q, k = self.heads_of(self.call.q).to(accumulated(self.call.q.dtype)), self._tile_of(self.keys_of(self.call.k), tile)
        score, env = _product(q, k.mT) * self.call.scale, self._env(tile)
        mask = sympy.true if tile[1] else self.pattern.mask.expr
        allowed = torch.as_tensor(evaluate(mask, env), device=q.device).expand(score.shape)
        score = torch.where(allowed, score, 1.0)
        if not self.pattern.has_score:
            return score, allowed, None
        with torch.set_grad_enabled(leaves is not None):
            score = score.requires_grad_(leaves is not None)
            logits = evaluate(self.pattern.score.expr, {**env, "score": score, **(leaves or {})}, dtype=score.dtype)
            logits = logits.to(score.dtype).expand(score.shape)
        return logits.detach(), allowed, (score, logits)

    def _through_score(
        self, change: Tensor, allowed: Tensor, score: Any, leaves: dict[str, Tensor], tables: dict[str, Tensor]
    ) -> Tensor:  # fmt: skip
        """From gradients by logits to those by scores, and by learned tables, to which these are added."""
        if score is None:
            return change
        given, logits = score
        if not logits.requires_grad:  # the score drops the product altogether
            return torch.zeros_like(change)
        found, *more = torch.autograd.grad(logits, [given, *leaves.values()], change, allow_unused=True)
        for name, grad in zip(leaves, more, strict=True):
            if grad is not None:
                tables[name] += grad
        return torch.zeros_like(change) if found is None else torch.where(allowed, found, 0.0)


def _passed(logits: Tensor, allowed: Tensor) -> Tensor:
    """Of each key the logarithm of the share that it leaves."""
    return torch.where(allowed, functional.logsigmoid(-logits), 0.0)


def _weights(logits: Tensor, allowed: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the keys of a tile, and the share that each takes of what later keys left it; ``left``: what lies after the tile."""
    later = functional.pad(_passed(logits, allowed)[..., 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))
    share = torch.where(allowed, torch.sigmoid(logits), 0.0)
    return torch.where(allowed, torch.exp(functional.logsigmoid(logits) + later + left), 0.0), share


def _product(x: Tensor, y: Tensor) -> Tensor:
    """``(batch, key heads, group, rows, n) @ (batch, key heads, n, m)``, the rows of a group together."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])
