"""A gated scan in chunks: what happens within them all at once, states from chunk to chunk, and the gradients of all of it.

Per chunk, with ``Qh = q e^c``, ``Kh = k e^c``, ``Kt_i = k_i e^(c_C - c_i)``, ``M_ij = q_i . k_j e^(c_i - c_j)`` (j <= i) and ``N`` the
same of ``beta_i e_i`` with ``k_j`` (j < i), ``e`` the keys that erase (k unless the call has others), ``Eh = e e^c``::

    U = V, or (I + N)^-1 diag(beta) (V - Eh S)        O = scale (Qh S + M U)        S' = diag(e^(c_C)) S + Kt^T U

``(I + N)^-1`` is applied by substitution: entries of powers of N grow beyond what numbers hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.backends.tiled.scan_pair_decays import PairDecays, ScalarDecays, VectorDecays, suffix_sums
from sparsedsl.runtime.heads import repeat_kv

__all__ = ["GatedChunks"]

Tensor = torch.Tensor
# A decay by less is one by 0 in these types, and sums of such logarithms are still exact enough.
LEAST = {torch.float32: -110.0, torch.float64: -800.0}


@dataclass(frozen=True, eq=False)
class _Cut:
    """The rows of one range in chunks. X lines, N chunks, C rows, R query heads that share a state; None: there are no queries, no delta
    rule, no documents."""

    q: Tensor | None  # (X, N, R, C, D)
    k: Tensor  # (X, N, C, D)
    e: Tensor  # what erases by the delta rule: k, if the call has nothing else
    v: Tensor
    g: Tensor  # (X, N, C) or (X, N, C, D), clamped
    beta: Tensor | None  # (X, N, C, 1)
    number: Tensor | None  # (X, N, C)
    decays: PairDecays


@dataclass(frozen=True, eq=False)
class _Made:
    """What the forward pass makes of them. ``states`` (X, N + 1, D, Dv): before each chunk, and the last."""

    eh: Tensor | None
    kt: Tensor
    pairs: Tensor | None  # (X, N, R, C, C): M
    between: Tensor | None  # (X, N, C, C): N without beta
    solved: Tensor | None  # (X, N, C, D): (I + N)^-1 diag(beta) Eh
    u: Tensor
    states: Tensor


@dataclass(frozen=True, eq=False)
class GatedChunks:
    """One row range, forward and backward, as :mod:`sparsedsl.backends.tiled.scan_chunked` asks for it."""

    scale: float

    def forward(self, queries: Any, keys: Any, states: Any) -> Any:
        """Results and state."""
        (state,) = states
        x = self._cut(queries, keys, state)
        made = self._made(x, state)
        last = made.states[:, -1].view_as(state)
        if x.q is None:
            return (), (last,)
        seen = (x.q * x.decays.reach[:, :, None]).flatten(2, 3) @ made.states[:, :-1]
        assert made.pairs is not None
        seen.add_(made.pairs.flatten(2, 3) @ made.u)
        out = self._rows(seen.unflatten(2, x.q.shape[2:4]), state, queries[0].shape[2]).mul_(self.scale)
        return (out,), (last,)

    def _cut(self, queries: Any, keys: Any, state: Tensor) -> _Cut:
        (q,), (k, v, log_decay, beta, erase, begins) = queries, keys
        (batch, heads), rows = state.shape[:2], k.shape[2]
        size = 1
        while size < min(LIMITS.now.scan_chunk, rows) and 2 * size <= LIMITS.now.scan_chunk:
            size *= 2

        def chunks(t: Tensor) -> Tensor:
            """(B or 1, Hx, rows, ..) -> (X, N, C, ..), rows of zeros at the end."""
            t = repeat_kv(t, heads).to(state.dtype)
            t = t.expand(batch, *t.shape[1:]).reshape(batch * heads, *t.shape[2:])
            missing = -rows % size
            t = functional.pad(t, (*(0, 0) * (t.ndim - 2), 0, missing)) if missing else t
            return t.unflatten(1, (-1, size))

        shared = max(1, q.shape[1] // heads)
        split = None
        if q.shape[2]:
            parts = repeat_kv(q, max(heads, q.shape[1])).unflatten(1, (heads, shared)).unbind(2)
            split = chunks(parts[0])[:, :, None] if shared == 1 else torch.stack([chunks(part) for part in parts], dim=2)
        g = chunks(log_decay).clamp(min=LEAST[state.dtype])
        number = None
        if begins is not None:
            number = chunks(begins.expand(-1, heads, -1)).cumsum(2)
        kind = VectorDecays if g.ndim == 4 else ScalarDecays
        decays: PairDecays = kind(g, number)
        made, share = chunks(k), None if beta is None else chunks(beta)[..., None]
        return _Cut(split, made, made if erase is None else chunks(erase), chunks(v), g, share, number, decays)

    def _made(self, x: _Cut, state: Tensor) -> _Made:
        decays, kt = x.decays, x.k * x.decays.left
        readers = [t for t in (x.q, None if x.beta is None else x.e[:, :, None]) if t is not None]
        products = decays.products(torch.cat(readers, 2) if len(readers) > 1 else readers[0], x.k) if readers else None
        pairs = between = None
        if products is not None and x.q is not None:
            pairs = products[:, :, : x.q.shape[2]]
            if isinstance(decays, VectorDecays):
                pairs.diagonal(0, 3, 4).copy_((x.q * x.k[:, :, None]).sum(4))
        states = state.new_empty(x.k.shape[0], x.k.shape[1] + 1, *state.shape[2:])
        states[:, 0] = state.flatten(0, 1)
        kept = decays.total.expand(*decays.total.shape[:2], state.shape[2], 1)
        if x.beta is None:
            added = kt.mT @ x.v
            for n in range(added.shape[1]):
                torch.addcmul(added[:, n], kept[:, n], states[:, n], out=states[:, n + 1])
            return _Made(None, kt, pairs, None, None, x.v, states)
        assert products is not None
        between, eh = products[:, :, -1], x.e * decays.reach
        solved = _substituted(between * x.beta, torch.cat([x.v, eh], 3) * x.beta)
        u, w = solved[..., : x.v.shape[3]].contiguous(), solved[..., x.v.shape[3] :].contiguous()
        for n in range(u.shape[1]):
            before = states[:, n]
            u[:, n] -= w[:, n] @ before
            torch.baddbmm(kept[:, n] * before, kt[:, n].mT, u[:, n], out=states[:, n + 1])
        return _Made(eh, kt, pairs, between, w, u, states)

    def _rows(self, t: Tensor, state: Tensor, rows: int) -> Tensor:
        """(X, N, R, C, ..) -> (B, H R, rows, ..)."""
        t = t.transpose(1, 2).flatten(2, 3)[:, :, :rows]  # (X, R, rows, ..)
        return t.reshape(state.shape[0], state.shape[1] * t.shape[1], *t.shape[2:])

    # ---- backward ----------------------------------------------------------------------------------------------------------------

    def backward(self, queries: Any, keys: Any, states: Any, of_rows: Any, of_states: Any) -> Any:
        """Gradients of queries, keys and state, from those of results and state (None: none)."""
        (state,), (of_state,) = states, of_states
        x = self._cut(queries, keys, state)
        made = self._made(x, state)
        grad = None
        if x.q is not None and of_rows and of_rows[0] is not None:
            grad = self._of_rows(of_rows[0], state, x.q)
        after, by_u = self._carried_back(x, made, grad, of_state, state)
        by_state = after[:, 0].view_as(state)
        found = self._slopes(x, made, grad, after[:, 1:], by_u)
        (q,), given = queries, keys[:5]
        by_q = None if found[0] is None else _joined(self._rows(found[0], state, q.shape[2]), q)
        by_keys = [
            None if t is None or slope is None else _joined(self._rows(slope[:, :, None], state, t.shape[2]), t)
            for t, slope in zip(given, found[1:], strict=True)
        ]
        return (by_q,), (*by_keys, None), (by_state,)

    def _of_rows(self, grad: Tensor, state: Tensor, q: Tensor) -> Tensor:
        """The gradient of the results, times the scale, as queries are cut: (X, N, R C, Dv)."""
        grad = grad.to(state.dtype).unflatten(1, (state.shape[1], -1)).flatten(0, 1) * self.scale  # (X, R, rows, Dv)
        missing = q.shape[1] * q.shape[3] - grad.shape[2]
        grad = functional.pad(grad, (0, 0, 0, missing)) if missing else grad
        return grad.unflatten(2, (-1, q.shape[3])).transpose(1, 2).flatten(2, 3)

    def _carried_back(
        self, x: _Cut, made: _Made, grad: Tensor | None, of_state: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the states before each chunk and of the last, (X, N + 1, D, Dv); and of U."""
        after = torch.zeros_like(made.states)
        if of_state is not None:
            after[:, -1] = of_state.flatten(0, 1)
        kept = x.decays.total.expand(*x.decays.total.shape[:2], state.shape[2], 1)
        by_u = torch.zeros_like(made.u)
        if grad is not None and x.q is not None and made.pairs is not None:
            by_u = made.pairs.flatten(2, 3).mT @ grad
            after[:, :-1] = (x.q * x.decays.reach[:, :, None]).flatten(2, 3).mT @ grad
        for n in reversed(range(by_u.shape[1])):
            leaving = after[:, n + 1]
            after[:, n] += kept[:, n] * leaving
            if made.solved is not None:
                by_u[:, n] += made.kt[:, n] @ leaving
                after[:, n] -= made.solved[:, n].mT @ by_u[:, n]
        if made.solved is None:
            by_u += made.kt @ after[:, 1:]
        return after, by_u

    def _slopes(self, x: _Cut, made: _Made, grad: Tensor | None, leaving: Tensor, by_u: Tensor) -> Any:
        """Gradients of q, k, v, g, beta and what erases as they are cut; the last None where that is k."""
        decays, before = x.decays, made.states[:, :-1]
        by_k_written = (made.u @ leaving.mT).mul_(decays.left)
        by_q = by_erase = by_beta = None
        readers, of_pairs = [], []
        if grad is not None and x.q is not None:
            by_q = (grad @ before.mT).unflatten(2, x.q.shape[2:4]).mul_(decays.reach[:, :, None])
            readers.append(x.q)
            of_pairs.append((grad @ made.u.mT).unflatten(2, x.q.shape[2:4]).tril_())
        by_v = by_u
        if x.beta is not None:
            assert made.between is not None and made.eh is not None
            error = x.v - made.eh @ before
            through = _substituted_back(made.between * x.beta, by_u)
            of_between = (through @ made.u.mT).tril_(-1).neg_()
            by_v = through * x.beta
            by_beta = (through * error).sum(3) + (of_between * made.between).sum(3)
            by_erase = -(by_v @ before.mT).mul_(decays.reach)
            readers.append(x.e[:, :, None])
            of_pairs.append((of_between * x.beta)[:, :, None])
        if readers:
            of_all = torch.cat(of_pairs, 2) if len(readers) > 1 else of_pairs[0]
            by_readers, by_writer = decays.slopes(of_all, torch.cat(readers, 2) if len(readers) > 1 else readers[0], x.k)
            by_k_written += by_writer
            if by_q is not None:
                assert x.q is not None
                by_q += by_readers[:, :, : by_q.shape[2]]
                if isinstance(decays, VectorDecays):
                    own = of_pairs[0].diagonal(0, 3, 4)[..., None]
                    by_q += own * x.k[:, :, None]
                    by_k_written += (own * x.q).sum(2)
            if by_erase is not None:
                by_erase += by_readers[:, :, -1]
        by_g = self._of_decays(x, made, by_q, by_erase, by_k_written, leaving)
        if by_erase is not None and x.e is x.k:
            by_k_written, by_erase = by_k_written.add_(by_erase), None
        return by_q, by_k_written, by_v, by_g, by_beta, by_erase

    def _of_decays(
        self, x: _Cut, made: _Made, by_q: Tensor | None, by_erase: Tensor | None, by_k_written: Tensor, leaving: Tensor
    ) -> Tensor:
        """``dc_i = reads of row i - its writes``, and sums of these from each row on."""
        reads = torch.zeros_like(x.k)
        if by_q is not None and x.q is not None:
            reads += (x.q * by_q).sum(2)
        if by_erase is not None:
            reads += x.e * by_erase
        sums = reads - x.k * by_k_written
        end = (made.states[:, 1:] * leaving).sum(3)
        if x.g.ndim == 3:
            sums, end = sums.sum(3), end.sum(2)
        sums[:, :, -1] += end
        found = suffix_sums(sums, x.number)
        unread = x.g <= LEAST[x.g.dtype]
        if x.number is not None:  # the first row of a document decays nothing
            starts = torch.zeros_like(x.number, dtype=torch.bool)
            starts[..., 1:] = x.number[..., 1:] != x.number[..., :-1]
            starts[..., 0] = x.number[..., 0] != 0
            unread = unread | (starts if x.g.ndim == 3 else starts[..., None])
        return found.masked_fill_(unread, 0.0)


def _substituted(lower: Tensor, right: Tensor) -> Tensor:
    """``(I + lower)^-1 right``; what stands on and above the diagonal of ``lower`` is not read."""
    return torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)


def _substituted_back(lower: Tensor, right: Tensor) -> Tensor:
    """``(I + lower)^-T right``."""
    return torch.linalg.solve_triangular(lower.mT, right, upper=True, unitriangular=True)


def _joined(slope: Tensor, t: Tensor) -> Tensor:
    """The gradient of a tensor whose heads, and batch entries, were repeated."""
    if slope.shape[1] > t.shape[1]:
        slope = slope.unflatten(1, (t.shape[1], -1)).sum(2)
    return slope.sum(0, keepdim=True) if slope.shape[0] > t.shape[0] else slope
