"""Linear attention by its definition: token after token, one state a head, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from sparsedsl.backends.reference.tensor_rules import NEVER, repeat_kv
from sparsedsl.program.recurrences import Linear
from sparsedsl.runtime.linear_calls import check_decays, linear_heads

__all__ = ["run_recurrence"]

Tensor = torch.Tensor


def run_recurrence(run: Any, node: Linear, rows: Callable[..., Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
    """``(out, LSE or None)`` of a linear attention; ``run``: the evaluation by meaning that it is part of. ``rows``: what works out the
    sums in place of the recurrence, where the test kit asks what other ways round."""
    q, k, v = (run.value(x) for x in (node.x, node.y, node.z))
    gates = {
        word: run.value(x)
        for word, x in (
            ("decay", node.gate), ("beta", node.beta), ("write", node.write), ("erase", node.erase), ("along", node.along)
        )
        if x is not None
    }  # fmt: skip
    heads = linear_heads(node, q.shape[1], k.shape[1], v.shape[1], {word: x.shape[1] for word, x in gates.items()})
    check_decays(node, gates.get("decay"), gates.get("write"), q.dtype)
    scale = run.call.scale or node.scale or q.shape[3] ** -0.5
    if node.features == "taylor":
        q, k, scale = _taylor(q * scale**0.5), _taylor(k * scale**0.5), 1.0
    else:
        q, k = _features(node.features, q), _features(node.features, k)
    if node.normalised is not None:
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    q = repeat_kv(q, heads.out) * scale
    k, v = repeat_kv(k, heads.states), repeat_kv(v, heads.states)
    gates = {word: repeat_kv(x, heads.states).expand(k.shape[0], *[-1] * (x.ndim - 1)) for word, x in gates.items()}
    if node.write is not None:
        k = k * gates["write"].exp()[..., None]
    bonus = None if node.bonus is None else repeat_kv(run.value(node.bonus)[None], heads.out).unflatten(1, (heads.states, -1))
    q = q.unflatten(1, (heads.states, -1))
    erased = None if node.erase is None else (gates["erase"], gates.get("along", k))
    sums = (rows or _rows)(run, node, q, k, v, _kept(node, gates, k), gates.get("beta"), bonus, erased)
    return _normalised(node, sums.flatten(1, 2))


def _kept(node: Linear, gates: dict[str, Tensor], k: Tensor) -> Tensor:
    """What each token leaves of the state: ``(B, H, Skv, D or 1)``."""
    if node.gate is None:
        logs = torch.tensor(node.log_decays, dtype=k.dtype, device=k.device).expand(k.shape[1])
        return logs.exp()[None, :, None, None].expand(*k.shape[:3], 1)
    kept = gates["decay"] if node.factor is not None else gates["decay"].exp()
    return kept if node.vector else kept[..., None]


def _rows(
    run: Any, node: Linear, q: Tensor, k: Tensor, v: Tensor, kept: Tensor, beta: Tensor | None, bonus: Tensor | None,
    erased: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """The sums of all queries, ``q (B, H, G, Sq, D)``, ``bonus (1, H, G, D)``: ``(B, H, G, Sq, Dv)``. A token is seen by the queries
    from its own on."""
    state = run.call.state_of(node)
    state = k.new_zeros((*k.shape[:2], k.shape[3], v.shape[3])) if state is None else state.to(k.dtype)
    ids = None if node.documents is None else run.value(node.documents).expand(k.shape[0], -1)
    rows, first = [], run.call.q_offset
    states = [state]  # before the first token, after it, ..
    for token in range(k.shape[2]):
        key, value, keep = k[:, :, token], v[:, :, token], kept[:, :, token, :, None]
        if ids is not None and token > 0:
            goes_on = (ids[:, token] == ids[:, token - 1])[:, None, None, None]
            state = torch.where(goes_on, state, 0.0)
        if token < node.first:
            key, value = torch.zeros_like(key), torch.zeros_like(value)
        before = state
        state = torch.where(keep > 0, keep * state, 0.0)  # nothing is left of anything, NaN too
        if beta is not None:
            value = beta[:, :, token, None] * (value - (state * key[..., None]).sum(2))
        if erased is not None:
            by, along = (t[:, :, token, :, None] for t in erased)
            state = state - along * (by * state).sum(2, keepdim=True)
        state = state + key[..., None] * value[..., None, :]
        states = [*states, state][-node.delay - 1 :]
        if not first <= token < first + q.shape[3]:
            continue
        oldest = states[0]  # the one before as many tokens, or the oldest there is
        seen = (before if node.reads == "before" else oldest)[:, :, None]
        if bonus is not None:
            seen = seen + (bonus * key[:, :, None])[..., None] * value[:, :, None, None]
        rows.append((q[:, :, :, token - first, :, None] * seen).sum(3))
    return torch.stack(rows, 3)


def _normalised(node: Linear, sums: Tensor) -> tuple[Tensor, Tensor | None]:
    if node.normalised is None:
        return sums, None
    out, total = sums[..., :-1], sums[..., -1]
    if node.normalised == "max1":
        return out / total.abs().clamp(min=1.0)[..., None], None
    total = total + node.eps
    divisor = torch.where(total == 0, 1.0, total)
    out = torch.where(total[..., None] == 0, 0.0, out / divisor[..., None])
    if not node.has_lse:
        return out, None
    return out, torch.where(total > 0, torch.log(torch.where(total > 0, total, 1.0)), NEVER)


def _features(kind: str | None, x: Tensor) -> Tensor:
    if kind == "l2":
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    if kind == "elu1":
        return functional.elu(x) + 1
    if kind == "exp":
        return x.exp()
    return functional.relu(x) if kind == "relu" else x


def _taylor(x: Tensor) -> Tensor:
    """Rows whose products are ``1 + s + s^2 / 2`` of the products ``s`` of those of x."""
    width = x.shape[3]
    squares = [x[..., i] * x[..., j] * (0.5**0.5 if i == j else 1.0) for i in range(width) for j in range(i, width)]
    return torch.cat([torch.ones_like(x[..., :1]), x, torch.stack(squares, -1)], dim=-1)
