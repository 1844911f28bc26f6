"""How a linear attention runs: features, strengths and sums that weigh are made here, and a backend scans what is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from sparsedsl.execute.dispatch import Dispatch
from sparsedsl.program.node import Node
from sparsedsl.program.recurrences import Linear
from sparsedsl.runtime.heads import NEVER, alike, repeat_kv
from sparsedsl.runtime.linear_calls import LinearHeads, check_decays, linear_heads
from sparsedsl.runtime.program_call import ProgramCall

__all__ = ["Scanned", "heads_of_state", "left_of_state", "run_linear"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Scanned:
    """What a linear attention gives: rows of all queries, the LSE if it has one, and the state after the last key."""

    out: Tensor
    lse: Tensor | None
    state: Tensor


def run_linear(
    node: Linear,
    call: ProgramCall,
    dispatch: Dispatch,
    value: Callable[[Node], Tensor],
    *,
    state: Tensor | None,
    rows: int | None = None,
) -> Scanned:
    """``value``: what a node gives. ``state``: what the keys before the first one left; None: nothing. ``rows``: only the state after so
    many keys is wanted; None: all."""
    q, k, v = (value(x) for x in (node.x, node.y, node.z))
    gate, beta, write, erase, along = (
        None if x is None else value(x) for x in (node.gate, node.beta, node.write, node.erase, node.along)
    )
    documents = None if node.documents is None else value(node.documents)
    offset = call.q_offset
    if rows is not None:
        k, v = k[:, :, :rows], v[:, :, :rows]
        gate, beta, write, erase, along = (None if t is None else t[:, :, :rows] for t in (gate, beta, write, erase, along))
        documents, q, offset = None if documents is None else documents[:, :rows], q[:, :, :0], 0
    heads = heads_of_state(node, value)
    check_decays(node, gate, write, call.dtype)
    scale = call.scale or node.scale or q.shape[3] ** -0.5
    q, k, v, scale = _made(node, q, k, v, write, scale, call.dtype)
    if node.first:  # (values too: nobody sees them, whatever they hold)
        k, v = (torch.cat([torch.zeros_like(x[:, :, : node.first]), x[:, :, node.first :]], dim=2) for x in (k, v))
    if node.delay and rows is None:  # each key is written so many tokens later
        k, v = (functional.pad(x, (0, 0, node.delay, 0))[:, :, : x.shape[2]] for x in (k, v))
    words: dict[str, Any] = {"scale": scale, "state": state, "documents": documents}

    def scan(q: Tensor, offset: int) -> tuple[Tensor, Tensor]:
        """Results of queries that read what their token, the first at ``offset``, has written; and the state after the last key."""
        if not node.form:
            logs = torch.tensor(node.log_decays, dtype=call.dtype, device=q.device).expand(heads.out)
            most = max(k.shape[1], v.shape[1])
            found = dispatch.linear(
                repeat_kv(q, heads.out), repeat_kv(k, most), repeat_kv(v, most), logs, q_offset=offset, **words
            )
            return found[0], found[1]
        log_decay = _logarithms(node, gate, heads, k, call.dtype)
        if along is not None and erase is not None:
            return _scan_in_two(dispatch, node.form, q, k, v, log_decay, erase, along, offset=offset, **words)
        share = None if beta is None else beta.to(call.dtype)
        share = log_decay.new_ones(1, 1, k.shape[2]) if erase is not None else share
        found = dispatch.gated(q, k, v, log_decay, share, erase, node.form, q_offset=offset, **words)
        return found[0], found[1]

    if node.reads == "before":
        out, state = _read_before(q, offset, scan, heads, **words)
    else:
        out, state = scan(q, offset)
    if node.bonus is not None:
        out = out + _own(value(node.bonus), q, k, v, offset, heads) * scale
    return Scanned(*_normalised(node, out), state)


def heads_of_state(node: Linear, value: Callable[[Node], Tensor]) -> LinearHeads:
    """How many heads have a state of their own, and the output."""
    gates = {"decay": node.gate, "beta": node.beta, "write": node.write, "erase": node.erase, "along": node.along}
    given = {word: value(gate).shape[1] for word, gate in gates.items() if gate is not None}
    q, k, v = (value(x).shape[1] for x in (node.x, node.y, node.z))
    return linear_heads(node, q, k, v, given)


def left_of_state(node: Linear, call: ProgramCall, value: Callable[[Node], Tensor]) -> Tensor:
    """What the keys of a call, of one document, leave of each row of a state before them: the product of their decays,
    ``(B, H, D or 1, 1)``. Not of the delta rule, which mixes rows."""
    k, gate, heads = value(node.y), None if node.gate is None else value(node.gate), heads_of_state(node, value)
    total = _logarithms(node, gate, heads, k, call.dtype).sum(2)
    total = repeat_kv(total if node.vector else total[..., None], heads.states)
    return total.exp()[..., None].expand(k.shape[0], -1, -1, -1)


def _made(
    node: Linear, q: Tensor, k: Tensor, v: Tensor, write: Tensor | None, scale: float, real: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, float]:
    """q, k and v as they are scanned, and the scale: with their features, strengths, and a value of 1 whose sum is that of the weights."""
    if node.features is None and node.normalised is None:
        return q, k, v, scale
    q, k = q.to(real), k.to(real)
    if node.normalised is not None or not node.form:  # elsewhere values stay as they came, which says how exact products need be
        v = v.to(real)
    if node.features == "taylor":
        q, k, scale = _taylor(q * math.sqrt(scale)), _taylor(k * math.sqrt(scale)), 1.0
    elif node.features is not None:
        q, k = _FEATURES[node.features](q), _FEATURES[node.features](k)
    if write is not None:
        most = max(k.shape[1], write.shape[1])
        k = repeat_kv(k, most) * repeat_kv(write.to(real), most).exp()[..., None]
    if node.normalised is not None:
        v = functional.pad(v, (0, 1), value=1.0)
    return q, k, v, scale


def _taylor(x: Tensor) -> Tensor:
    """Rows whose products are ``1 + s + s^2 / 2``, s that of rows of x: 1, x, and products of two entries."""
    first, second = torch.triu_indices(x.shape[3], x.shape[3], device=x.device)
    share = x.new_ones(first.shape).masked_fill_(first == second, math.sqrt(0.5))
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., first] * x[..., second] * share], dim=3)


_FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda x: x * torch.rsqrt((x * x).sum(3, keepdim=True) + 1e-6),
    "elu1": lambda x: functional.elu(x) + 1,
    "relu": torch.relu,
    "exp": torch.exp,
}


def _logarithms(node: Linear, gate: Tensor | None, heads: LinearHeads, k: Tensor, real: torch.dtype) -> Tensor:
    """The logarithms of decays: ``(1 or B, H, Skv)`` or ``(1 or B, H, Skv, D)``."""
    if gate is None:
        logs = torch.tensor(node.log_decays, dtype=real, device=k.device).expand(heads.states)
        return logs[None, :, None].expand(1, -1, k.shape[2])
    gate = gate.to(real)
    if node.factor is None:
        return gate
    return torch.where(gate > 0, torch.where(gate > 0, gate, 1.0).log(), NEVER)


def _read_before(
    q: Tensor, offset: int, scan: Callable[[Tensor, int], tuple[Tensor, Tensor]], heads: LinearHeads, *, scale: float,
    state: Tensor | None, documents: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a token reads before it writes is what the token before it reads after: queries stand one row earlier, so that scans know of
    one way to read. The first of all tokens reads the state that the call begins with, and the first of a document nothing."""
    early = int(offset == 0 and q.shape[2] > 0)
    out, last = scan(q[:, :, early:], offset - 1 + early if q.shape[2] else 0)
    if early:
        first = torch.zeros_like(last) if state is None else state.to(last.dtype)
        rows = repeat_kv(q[:, :, :1], heads.out).to(last.dtype).unflatten(1, (heads.states, -1))[:, :, :, 0]
        out = torch.cat([(rows @ first * scale).flatten(1, 2)[:, :, None].to(out.dtype), out], dim=2)
    if documents is not None:
        begins = torch.cat([torch.zeros_like(documents[:, :1], dtype=torch.bool), documents[:, 1:] != documents[:, :-1]], dim=1)
        out = out.masked_fill(begins[:, None, offset : offset + q.shape[2], None], 0.0)
    return out, last


def _scan_in_two(
    dispatch: Dispatch, form: str, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, erase: Tensor, along: Tensor, *, offset: int,
    documents: Tensor | None, **words: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A delta rule that takes off along one key and writes along another: two rows a token, of which the first decays and takes off, with
    no value of its own, and the second writes. Queries read after the second."""

    def paired(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([first, second], dim=3).flatten(2, 3)

    heads = max(k.shape[1], along.shape[1])
    rows = paired(*alike(repeat_kv(along, heads).expand(k.shape[0], -1, -1, -1), repeat_kv(k, heads)))
    documents = None if documents is None else documents.repeat_interleave(2, dim=1)
    out, state = dispatch.gated(
        paired(torch.zeros_like(q), q), rows, paired(torch.zeros_like(v), v), paired(log_decay, torch.zeros_like(log_decay)),
        log_decay.new_ones(1, 1, rows.shape[2]), paired(erase, torch.zeros_like(erase)), form, q_offset=2 * offset, documents=documents,
        **words,
    )  # fmt: skip
    return out[:, :, 1::2], state


def _own(bonus: Tensor, q: Tensor, k: Tensor, v: Tensor, offset: int, heads: LinearHeads) -> Tensor:
    """What queries read of their own token's key and value, which is not written yet: ``(B, H, Sq, Dv)``."""
    k, v = (repeat_kv(t[:, :, offset : offset + q.shape[2]], heads.out) for t in (k, v))
    return (repeat_kv(q, heads.out) * repeat_kv(bonus, heads.out, 0)[:, None] * k).sum(3, keepdim=True) * v


def _normalised(node: Linear, sums: Tensor) -> tuple[Tensor, Tensor | None]:
    """Out and LSE, of sums whose last column is that of the weights."""
    if node.normalised is None:
        return sums, None
    out, total = sums[..., :-1], sums[..., -1:]
    if node.normalised == "max1":
        return out / total.abs().clamp(min=1.0), None
    total = total + node.eps
    divisor = total.masked_fill(total == 0, 1.0)
    out = (out / divisor).masked_fill(total == 0, 0.0)
    lse = torch.where(total > 0, total.clamp(min=torch.finfo(total.dtype).tiny).log(), NEVER)[..., 0] if node.has_lse else None
    return out, lse
