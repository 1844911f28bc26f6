"""What a text form's words for attentions mean; a branch is ``(out, lse)``, the LSE None where it has none; see
:mod:`tests.programs.plain_programs`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from tests.programs.plain_grid import lifted
from tests.programs.plain_scores import NEVER, Part, PlainCall, shares, wide

__all__ = ["BRANCHES"]

Tensor = torch.Tensor
Both = tuple[Tensor, Tensor | None]


def _log_sum(x: Tensor) -> Tensor:
    """-inf, and no slope, where there is nothing to add up."""
    there = x > NEVER
    some = there.any(-1)
    safe = torch.where(there, x, -1e300)
    return torch.where(some, torch.where(some[..., None], safe, 0.0).logsumexp(-1), NEVER)


@dataclass(eq=False)
class _PerChunk:
    selected: Part
    weights: str
    scores: Part
    inner: str


def _attend(
    mask: Any, score: Any = None, sink: Any = None, scale: float | None = None, q: Part | None = None, k: Part | None = None,
    v: Part | None = None, normaliser: Any = "softmax", heads: int | None = None, causal: bool = False,
) -> Part:  # fmt: skip
    def make(call: PlainCall) -> Both:
        rows, keys, values = (
            x if part is None else part.at(call) for x, part in zip((call.q, call.k, call.v), (q, k, v), strict=True)
        )
        heads = rows.shape[1]
        keys, values = wide(keys, heads), wide(values, heads)
        logits = torch.einsum("bhqd,bhkd->bhqk", rows, keys) * (scale or rows.shape[3] ** -0.5)
        grid = call.grid(keys.shape[2])
        allowed = grid.filled(lifted(mask).of(grid))
        if score is not None:
            grid = call.grid(keys.shape[2], torch.where(allowed, logits, 1.0))
            logits = grid.filled(lifted(score).of(grid).double())
        logits = torch.where(allowed, logits, NEVER)
        if isinstance(normaliser, _PerChunk):
            return _by_chunks(call, normaliser, logits, values)
        if normaliser != "softmax":
            return _WEIGHTS[normaliser](logits, allowed) @ values, None
        if sink is not None:
            flat = call.grid(1)
            extra = lifted(sink).of(flat).double().expand(*logits.shape[:2], logits.shape[2], 1)
            more = torch.cat([logits, extra], 3)
            return shares(more)[..., :-1] @ values, _log_sum(more)
        return shares(logits) @ values, _log_sum(logits)

    return Part(make)


def _softpick(logits: Tensor, allowed: Tensor) -> Tensor:
    """``relu(exp(x) - 1) / sum |exp(x) - 1|``."""
    raised = torch.where(allowed & (logits > NEVER), torch.expm1(torch.where(logits > NEVER, logits, 0.0)), 0.0)
    total = raised.abs().sum(-1, keepdim=True)
    return raised.relu() / total.masked_fill(total == 0, 1.0)


def _broken(logits: Tensor, allowed: Tensor) -> Tensor:
    """From the last key to the first each takes its share of what is left."""
    left, found = torch.ones_like(logits[..., 0]), []
    for key in reversed(range(logits.shape[3])):
        share = torch.where(allowed[..., key], torch.sigmoid(torch.where(allowed[..., key], logits[..., key], 0.0)), 0.0)
        found.insert(0, share * left)
        left = left * (1 - share)
    return torch.stack(found, 3)


_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pointwise": lambda logits, allowed: torch.where(allowed, logits, 0.0),
    "softpick": _softpick,
    "stick_breaking": _broken,
}


def _by_chunks(call: PlainCall, rule: _PerChunk, logits: Tensor, values: Tensor) -> Both:
    """A softmax in each chunk, and weights for the chunks."""
    heads, block = logits.shape[1], rule.selected.columns
    chosen, by = wide(rule.selected.at(call), heads), wide(rule.scores.at(call), heads)
    inside = []
    for chunk in range(chosen.shape[3]):
        part = logits[..., chunk * block : (chunk + 1) * block]
        if rule.inner == "softmax1":
            part = functional.pad(part, (0, 1))
        share = shares(part)[..., : values[:, :, chunk * block : (chunk + 1) * block].shape[2]]
        inside.append(share @ values[:, :, chunk * block : (chunk + 1) * block])
    by = torch.where(chosen, by, NEVER)
    if rule.weights in ("softmax", "softmax1"):
        by = functional.pad(by, (0, 1)) if rule.weights == "softmax1" else by
        weights, lse = shares(by), _log_sum(by)
    else:
        taken = torch.where(chosen, torch.sigmoid(torch.where(chosen, by, 0.0)), 0.0)
        if rule.weights == "stick_breaking":
            later = (1 - taken).flip(3).cumprod(3).flip(3)
            taken = taken * functional.pad(later[..., 1:], (0, 1), value=1.0)
        total = taken.sum(3)
        weights, lse = taken, torch.where(total > 0, total.masked_fill(total == 0, 1.0).log(), NEVER)
    return sum((weights[..., n, None] * part for n, part in enumerate(inside)), torch.zeros_like(inside[0])), lse


# ---- recurrences ---------------------------------------------------------------------------------------------------------------


def _linear(
    decay: Any = None, log_decay: Any = None, beta: Part | None = None, features: str | None = None, normalised: str | None = None,
    eps: float = 1e-6, reads: str = "after", bonus: Part | None = None, write: Part | None = None, q: Part | None = None,
    k: Part | None = None, v: Part | None = None, scale: float | None = None, documents: Part | None = None,
    erase: Part | None = None, along: Part | None = None,
) -> Part:  # fmt: skip
    """As sums over pairs of tokens, each with the product of the decays between them."""

    def make(call: PlainCall) -> Both:
        x, y, z = (t if part is None else part.at(call) for t, part in zip((call.q, call.k, call.v), (q, k, v), strict=True))
        more = {"beta": beta, "write": write, "erase": erase, "along": along}
        parts = {name: part.at(call) for name, part in more.items() if part is not None}
        gates = _logs(decay, log_decay, call, max(x.shape[1], z.shape[1]))
        constant = not isinstance(decay, Part) and not isinstance(log_decay, Part)
        heads = max(t.shape[1] for t in ((x, y, z) if constant else (y, z)) + tuple(parts.values()) + (gates,))
        x, by = _features(features, x, y.shape[3], scale)
        y, _ = _features(features, y, y.shape[3], scale)
        y, z, gates = wide(y, heads), wide(z, heads), wide(gates, heads)
        out_heads = max(heads, x.shape[1])
        x = wide(x, out_heads)
        if write is not None:
            y = y * wide(parts["write"], heads).exp()[..., None]
        if normalised:
            z = torch.cat([z, torch.ones_like(z[..., :1])], 3)
        found = []
        group = out_heads // heads
        for n in range(heads):
            kept = gates[:, n].expand(y.shape[0], y.shape[2], -1)
            written = _written(y[:, n], z[:, n], kept, wide(parts["beta"], heads)[:, n] if beta else None, documents, call)
            off = wide(parts["along"], heads)[:, n] if along else y[:, n]
            gone = _gone(wide(parts["erase"], heads)[:, n], off, y[:, n], z[:, n], kept, documents, call) if erase else None
            for reader in range(n * group, (n + 1) * group):
                own = None if bonus is None else wide(bonus.at(call)[None], out_heads)[0, reader]
                found.append(_read(x[:, reader], y[:, n], written, kept, reads, own, documents, call))
                if gone is not None:
                    found[-1] = found[-1] - _read(x[:, reader], off, gone, kept, reads, None, documents, call)
        sums = torch.stack(found, 1) * by
        return _divided(sums, normalised, eps, features)

    return Part(make)


def _logs(decay: Any, log_decay: Any, call: PlainCall, heads: int) -> Tensor:
    """Factors of every key, ``(B, H, keys, 1 or D)``."""
    if isinstance(log_decay, Part) or isinstance(decay, Part):
        x = decay.at(call) if isinstance(decay, Part) else log_decay.at(call).exp()
        return x if x.ndim == 4 else x[..., None]
    numbers = torch.tensor(log_decay if log_decay is not None else decay, dtype=torch.float64).expand(heads)
    numbers = numbers.exp() if log_decay is not None else numbers
    return numbers[None, :, None, None].expand(call.q.shape[0], heads, call.k.shape[2], 1)


def _same(documents: Part | None, call: PlainCall, t: int, j: int) -> Tensor:
    if documents is None:
        return torch.ones(call.q.shape[0], 1)
    ids = documents.at(call).expand(call.q.shape[0], -1)
    return (ids[:, t] == ids[:, j]).double()[:, None]


def _left(kept: Tensor, after: int, upto: int) -> Tensor:
    """What is left at a token of what an earlier one wrote."""
    return kept[:, after + 1 : upto + 1].prod(1)


def _written(
    keys: Tensor, values: Tensor, kept: Tensor, beta: Tensor | None, documents: Part | None, call: PlainCall
) -> list[Tensor]:
    if beta is None:
        return list(values.unbind(1))
    found: list[Tensor] = []
    for t in range(keys.shape[1]):
        error = values[:, t]
        for j, before in enumerate(found):
            weight = (keys[:, t] * _left(kept, j, t) * keys[:, j]).sum(1, keepdim=True) * _same(documents, call, t, j)
            error = error - weight * before
        found.append(beta[:, t, None] * error)
    return found


def _gone(
    by: Tensor, along: Tensor, keys: Tensor, values: Tensor, kept: Tensor, documents: Part | None, call: PlainCall
) -> list[Tensor]:
    """What every token takes off along its second key: what it reads of earlier values, less what was taken of them already."""
    found: list[Tensor] = []
    for t in range(keys.shape[1]):
        total = torch.zeros_like(values[:, 0])
        for j in range(t):
            left = by[:, t] * _left(kept, j, t)
            mine = (left * keys[:, j]).sum(1, keepdim=True) * values[:, j] - (left * along[:, j]).sum(1, keepdim=True) * found[j]
            total = total + _same(documents, call, t, j) * mine
        found.append(total)
    return found


def _read(
    rows: Tensor, keys: Tensor, written: list[Tensor], kept: Tensor, reads: str, own: Tensor | None, documents: Part | None,
    call: PlainCall,
) -> Tensor:  # fmt: skip
    found = []
    for n in range(rows.shape[1]):
        t, total = call.offset + n, torch.zeros_like(written[0])
        for j in range(min(t + (reads == "after"), keys.shape[1])):
            left = _left(kept, j, t if reads == "after" else t - 1)
            total = total + (rows[:, n] * left * keys[:, j]).sum(1, keepdim=True) * _same(documents, call, t, j) * written[j]
        if own is not None:
            total = total + (rows[:, n] * own * keys[:, t]).sum(1, keepdim=True) * written[t]
        found.append(total)
    return torch.stack(found, 1)


def _features(kind: str | None, x: Tensor, width: int, scale: float | None) -> tuple[Tensor, float]:
    """Features of queries or keys, and the factor on their products."""
    by = scale or width**-0.5
    match kind:
        case "l2":
            return x * (x.pow(2).sum(3, keepdim=True) + 1e-6).rsqrt(), by
        case "elu1":
            return torch.where(x > 0, x + 1, x.clamp(max=0).exp()), by
        case "relu":
            return x.clamp(min=0), by
        case "taylor":
            y = x * by**0.5
            pairs = (y[..., :, None] * y[..., None, :]).flatten(3) * 0.5**0.5
            return torch.cat([torch.ones_like(y[..., :1]), y, pairs], 3), 1.0
    return x, by


def _divided(sums: Tensor, normalised: str | None, eps: float, features: str | None) -> Both:
    if normalised is None:
        return sums, None
    out, total = sums[..., :-1], sums[..., -1:]
    if normalised == "max1":
        return out / torch.maximum(total.abs(), torch.ones(())), None
    total = total + eps
    out = torch.where(total == 0, 0.0, out / total.masked_fill(total == 0, 1.0))
    return out, total[..., 0].log() if features in ("elu1", "taylor") else None


@dataclass(eq=False)
class _Memory:
    """Keys, values, gates, and how slots are written."""

    y: Part
    z: Part
    gate: Part
    delay: int = 0
    temperature: float = 1.0
    empty: str = "zero_sink"
    documents: Part | None = None
    first: int = 0


def _recall(memory: _Memory, q: Part | None = None, scale: float | None = None) -> Part:
    def make(call: PlainCall) -> Both:
        x = call.q if q is None else q.at(call)
        heads = x.shape[1]
        keys, values, gate = (wide(part.at(call), heads) for part in (memory.y, memory.z, memory.gate))
        kept = torch.sigmoid(gate).pow(1 / memory.temperature)
        outs, lses = [], []
        for n in range(x.shape[2]):
            upto = min(call.offset + n - memory.delay, keys.shape[2] - 1)
            here = min(call.offset + n, keys.shape[2] - 1)
            read, held = (t.new_zeros(*x.shape[:2], gate.shape[3], t.shape[3]) for t in (keys, values))
            some = torch.zeros(x.shape[0], 1, 1)
            for j in range(memory.first, max(upto, -1) + 1):
                mine = _same(memory.documents, call, here, j)[..., None]
                share = (1 - kept[:, :, j]) * kept[:, :, j + 1 : upto + 1].prod(2) * mine
                read, held = read + share[..., None] * keys[:, :, j, None], held + share[..., None] * values[:, :, j, None]
                some = torch.maximum(some, mine)
            logits = torch.einsum("bhd,bhmd->bhm", x[:, :, n], read) * (scale or x.shape[3] ** -0.5)
            if memory.empty == "masked":
                logits = torch.where(some > 0, logits, NEVER)
            outs.append(torch.einsum("bhm,bhmd->bhd", shares(logits), held))
            lses.append(_log_sum(logits))
        return torch.stack(outs, 2), torch.stack(lses, 2)

    return Part(make)


# ---- combinations --------------------------------------------------------------------------------------------------------------


def _joint(*branches: Part) -> Part:
    def make(call: PlainCall) -> Both:
        parts = [branch.at(call) for branch in branches]
        logits = torch.stack([lse for _, lse in parts], 3)
        weights = shares(logits)
        return sum(weights[..., n, None] * out for n, (out, _) in enumerate(parts)), _log_sum(logits)

    return Part(make)


def _mix(*branches: Part, weights: Part) -> Part:
    def make(call: PlainCall) -> Both:
        gate = weights.at(call)
        return sum(gate[..., n, None] * branch.at(call)[0] for n, branch in enumerate(branches)), None

    return Part(make)


def _compact(tokens: Part, inside: Part) -> Part:
    """One call for every batch entry, on rows that are taken; what is inside has one key head a query head."""

    def make(call: PlainCall) -> Both:
        heads, outs, lses = call.q.shape[1], [], []
        for entry, kept in enumerate(tokens.at(call)):
            out = call.q.new_zeros(1, heads, call.q.shape[2], call.v.shape[3])
            lse = call.q.new_full((1, heads, call.q.shape[2]), NEVER)
            if kept.shape[1]:
                taken = [
                    wide(x[entry : entry + 1], heads).gather(2, kept[None, ..., None].expand(1, -1, -1, x.shape[3]))
                    for x in (call.q, call.k, call.v)
                ]
                few, few_lse = inside.at(PlainCall(*taken, call.given))  # type: ignore[arg-type]
                out = out.scatter(2, kept[None, ..., None].expand(1, -1, -1, out.shape[3]), few)
                lse = lse if few_lse is None else lse.scatter(2, kept[None], few_lse)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)

    return Part(make)


BRANCHES: dict[str, Callable[..., Any]] = {
    "attend": _attend,
    "per_chunk": lambda selected, weights, scores, inner: _PerChunk(selected, weights, scores, inner),
    "linear": _linear,
    "slots": _Memory,
    "recall": _recall,
    "joint": _joint,
    "mix": _mix,
    "compact": _compact,
}
