"""Gated slots: M slots a head that keys and values are written into with decaying weights, and a softmax over the slots.

Two scans, keys and values, with a softmax between them. The state is a matrix ``(M, D + Dv)`` a head, its rows decay each by its own gate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.backends.tiled.scan_chunked import ScanPlan, carry, cut, scan
from sparsedsl.backends.tiled.scan_decays import from_slots, halve, into_slots
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.scan_calls import SlotState, check_slots

__all__ = ["SlotState", "slot_scan"]


def slot_scan(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    *,
    delay: int,
    temperature: float,
    scale: float,
    empty: Literal["zero_sink", "masked"] = "zero_sink",
    q_offset: int = 0,
    state: SlotState | None = None,
    documents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, SlotState]:
    """Attention over slots: ``softmax(scale * K q) V``, where key by key ``K = a * K + (1 - a) k``, ``V = a * V + (1 - a) v``.

    ``a = sigmoid(gate) ** (1 / temperature)``, one number a key and slot. The query at position ``p`` sees the slots with the keys
    ``0 .. p - delay`` written. Time and memory grow with the length; the state is held in float32 (float64 for float64 inputs).

    Args:
        q: ``(B, Hq, Sq, D)``, any float dtype. Query row ``i`` stands at position ``q_offset + i``.
        k, v: ``(B, Hkv, Skv, D)`` and ``(B, Hkv, Skv, Dv)``, of q's dtype; ``Hq`` is a multiple of ``Hkv``. Key ``j`` stands at ``j``.
        gate: ``(B, Hkv, Skv, M)`` logits, any float dtype.
        empty: what a query sees before anything is written: slots of zeros, so that out is 0 and lse ``log(M)``, or with ``"masked"``
            nothing, so that out is 0 and lse -inf.
        state: what the keys before key 0 left; None: nothing was written.
        documents: integer ids ``(1 or B, Skv)``. Where the id changes, a document begins: its queries see the slots with its own keys only,
            however large the delay. ``state`` belongs to the document of key 0.

    Returns:
        out ``(B, Hq, Sq, Dv)`` in q's dtype, lse ``(B, Hq, Sq)`` in float32 (float64), the logarithm of the softmax's denominator, and
        the state after all keys. All but ``written`` are differentiable once in q, k, v, gate and the state.

    Raises:
        ShapeError: arguments that do not fit each other, a query that sees further than the last key.
        UnsupportedError: documents, and queries at positions that they do not reach.

    Example:
        >>> x = torch.ones(1, 1, 3, 1)
        >>> shut = torch.full((1, 1, 3, 2), -100.0)  # slots that forget all but the last key
        >>> out, lse, state = slot_scan(x, x, x, shut, delay=1, temperature=1.0, scale=1.0)
        >>> out.flatten().tolist(), state.keys.flatten().tolist()
        ([0.0, 1.0, 1.0], [1.0, 1.0])
        >>> [round(value, 4) for value in lse.flatten().tolist()]  # log(2), then log(2 e)
        [0.6931, 1.6931, 1.6931]
    """
    call = check_slots(
        q, k, v, gate, delay=delay, temperature=temperature, scale=scale, empty=empty, q_offset=q_offset, state=state, documents=documents
    )  # fmt: skip
    kind, before = accumulated(q.dtype), call.before
    pieces = cut(q.shape[2], k.shape[2], call.q_offset - call.delay, q.shape[0] * q.shape[1])
    step = _SlotStep(call.scale, call.temperature, call.masked)
    plan = ScanPlan(step, pieces, (((*q.shape[:3], v.shape[3]), q.dtype), (tuple(q.shape[:3]), kind)))
    begins = None if call.begins is None else call.begins[:, None]
    slots = torch.cat([before.keys, before.values], dim=3).to(kind)
    (out, lse), (last,) = scan(plan, (q, call.seen), (k, v, gate, begins), (slots,))
    keys, values = last.split([k.shape[3], v.shape[3]], dim=3)
    return out, lse, SlotState(keys, values, before.written if not k.shape[2] else torch.ones_like(before.written))


@dataclass(frozen=True, eq=False)
class _SlotStep:
    """One row range. Shapes within: B batch, H kv heads, N chunks, C rows of a chunk, g query heads of a group, M slots."""

    scale: float
    temperature: float
    masked: bool

    def __call__(self, queries: Any, keys: Any, state: Any) -> Any:
        (q, seen), (k, v, gate, begins), (slots,) = queries, keys, state
        width, kind, rows = k.shape[3], slots.dtype, k.shape[2]
        if rows:
            log_keep, write = self._gates(gate.to(kind), begins)
            kv = torch.cat([k, v], dim=3).to(kind)
        if not q.shape[2]:
            return (), (_write(log_keep, write, kv, slots),)
        q = (q.to(kind) * self.scale).unflatten(1, (k.shape[1], -1)).transpose(2, 3)  # (B, H, rows, g, D)
        if not rows:
            logits = q @ slots[:, :, None, :, :width].transpose(3, 4)
            weights, lse = self._softmax(logits, seen)
            return self._results(weights @ slots[:, :, None, :, width:], lse, seen), state
        size = min(LIMITS.now.scan_chunk, 1 << (rows - 1).bit_length())
        q, log_keep, write, kv = (_in_chunks(t, size) for t in (q, log_keep, write, kv))
        lead = kv.shape[:3]
        decays = halve(log_keep.exp().flatten(0, 2), write.flatten(0, 2))
        reach, left = decays.reach.unflatten(0, lead), decays.left.unflatten(0, lead)
        # Sums of logarithms, not products: over a million chunks the error of a factor close to 1 would add up.
        before, after = carry(log_keep.sum(dim=3)[..., None].exp(), left.transpose(3, 4) @ kv, slots)  # (B, H, N, M, D + Dv)
        logits = into_slots(q.flatten(0, 2), kv[..., :width].flatten(0, 2), decays).unflatten(0, lead)
        logits = logits + _times(q, before[..., :width].transpose(3, 4)) * reach[..., None, :]
        weights, lse = self._softmax(logits.flatten(2, 3)[:, :, :rows], seen)
        weights = _in_chunks(weights, size)
        out = from_slots(weights.flatten(0, 2), kv[..., width:].flatten(0, 2), decays).unflatten(0, lead)
        out = out + _times(weights * reach[..., None, :], before[..., width:])
        return self._results(out.flatten(2, 3)[:, :, :rows], lse, seen), (after,)

    def _gates(self, gate: torch.Tensor, begins: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The logarithm of what is kept when a key is written, and how much of the key is written."""
        log_keep = torch.nn.functional.logsigmoid(gate) / self.temperature
        write = -torch.expm1(log_keep)
        return log_keep if begins is None else log_keep.masked_fill(begins[..., None], -math.inf), write

    def _softmax(self, logits: torch.Tensor, seen: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Over the slots of (B, H, rows, g, M); a query that sees no key sees slots of zeros."""
        if seen is not None:
            logits = torch.where(seen[..., None, None], logits, 0.0)
        lse = logits.logsumexp(dim=4, keepdim=True)
        return (logits - lse).exp(), lse[..., 0]

    def _results(self, out: torch.Tensor, lse: torch.Tensor, seen: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """From (B, H, rows, g, ..) to (B, Hq, rows, ..), and what a query sees that sees no key."""
        if seen is not None:
            out = torch.where(seen[..., None, None], out, 0.0)
            lse = torch.where(seen[..., None], lse, -math.inf) if self.masked else lse
        return out.transpose(2, 3).flatten(1, 2), lse.transpose(2, 3).flatten(1, 2)


def _write(log_keep: torch.Tensor, write: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The slots after all rows: each row's share is what the rows after it keep."""
    total = log_keep.flip(2).cumsum(dim=2).flip(2)
    later = torch.cat([total[:, :, 1:], torch.zeros_like(total[:, :, :1])], dim=2)
    return total[:, :, 0, :, None].exp() * slots + (later.exp() * write).transpose(2, 3) @ kv


def _in_chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, rows, ..) -> (B, H, N, size, ..); rows that are missing are zeros: they keep all and write nothing."""
    missing = -x.shape[2] % size
    if missing:
        x = torch.cat([x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])], dim=2)
    return x.unflatten(2, (-1, size))


def _times(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """(B, H, N, C, g, X) @ (B, H, N, X, Y), one matrix a chunk."""
    return (rows.flatten(3, 4) @ matrices).unflatten(3, rows.shape[3:5])
