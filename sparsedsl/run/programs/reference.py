"""The dense meaning of every node, in plain torch, differentiable: what all else is compared with. Holds queries x keys, and more."""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatchmethod
from typing import Any

import sympy
import torch
from torch.nn import functional

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.lang.evaluate import evaluate
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.lang.tables import read_class, table_reads
from sparsedsl.program.axes import unit_of
from sparsedsl.program.branches import Attend, Compact, Joint, Linear, Mix, Recall, units_of_keys
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.orders import Inverse, Order, Take, Tokens
from sparsedsl.program.scores import (
    Antidiagonal,
    Bound,
    Dot,
    Grouped,
    GroupedKeys,
    Gumbel,
    Plus,
    Probe,
    Regroup,
    Scores,
    Smooth,
    Softmax,
)
from sparsedsl.program.select import Threshold, TopK, TopP
from sparsedsl.program.sources import PerChunk, Slots
from sparsedsl.program.tensors import Input, Summary
from sparsedsl.run.choosing.noise import GumbelScores
from sparsedsl.run.inputs import check_call
from sparsedsl.run.programs.call import ProgramCall
from sparsedsl.run.reference import attend_reference

__all__ = ["Reference", "merged", "pool", "spread"]

Tensor = torch.Tensor
NEVER = float("-inf")


def spread(x: Tensor, heads: int, dim: int = 1) -> Tensor:
    """``x`` with its heads repeated to ``heads``."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)


def together(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the larger number of heads."""
    heads = max(x.shape[1], y.shape[1])
    if heads % x.shape[1] or heads % y.shape[1]:
        raise ShapeError(f"{x.shape[1]} and {y.shape[1]} heads do not fit: one must be a multiple of the other")
    return spread(x, heads), spread(y, heads)


def pool(x: Tensor, unit: int, how: str, pad: str) -> Tensor:
    """One row for each ``unit`` rows of ``(B, H, N, D)``."""
    parts = []
    for rows in x.split(unit, dim=2):
        match how:
            case "mean":
                parts.append(rows.sum(2) / (rows.shape[2] if pad == "valid" else unit))
            case "sum":
                parts.append(rows.sum(2))
            case "max" | "min":
                parts.append(getattr(rows, f"a{how}")(2))
            case _:
                parts.append(rows[:, :, 0 if how == "first" else -1])
    return torch.stack(parts, dim=2) if parts else x.new_zeros((*x.shape[:2], 0, x.shape[3]))


def reduced(x: Tensor, heads: int, how: str) -> Tensor:
    """Heads in dimension 1 joined to ``heads``."""
    groups = x.unflatten(1, (heads, x.shape[1] // heads))
    return groups.amax(2) if how == "max" else getattr(groups, how)(2)


def safe_softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension; rows without a finite entry are 0."""
    none = (x == NEVER).all(-1, keepdim=True)
    return torch.where(none, 0.0, torch.softmax(torch.where(none, 0.0, x), -1))


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax over branches that were normalised by themselves."""
    lses = torch.stack([lse for _, lse in parts])
    peak = lses.amax(0).detach()
    peak = torch.where(peak == NEVER, 0.0, peak)
    weights = torch.exp(lses - peak)
    total = weights.sum(0)
    empty = total == 0
    lse = torch.where(empty, NEVER, peak + torch.log(torch.where(empty, 1.0, total)))
    shares = weights / torch.where(empty, 1.0, total)
    out = sum(share[..., None] * part.to(share.dtype) for share, (part, _) in zip(shares, parts, strict=True))
    return out, lse  # type: ignore[return-value]


def weigh(scores: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Weights of chunks from their scores along the last dimension (-inf: not picked, later is more recent), and the log of their sum."""
    picked = scores != NEVER
    finite = torch.where(picked, scores, 0.0)
    if rule in ("softmax", "softmax1"):
        peak = scores.amax(-1, keepdim=True).clamp(min=0.0 if rule == "softmax1" else NEVER).detach()
        peak = torch.where(peak == NEVER, 0.0, peak)
        raised = torch.where(picked, torch.exp(finite - peak), 0.0)
        total = raised.sum(-1, keepdim=True) + (torch.exp(-peak) if rule == "softmax1" else 0.0)
        empty = total == 0
        weights = raised / torch.where(empty, 1.0, total)
        # Of softmax1 the LSE counts the zero logit: that is what it weighs against other branches.
        log_total = torch.where(empty, NEVER, peak + torch.log(torch.where(empty, 1.0, total))).squeeze(-1)
        return weights, log_total
    open_ = torch.where(picked, functional.logsigmoid(finite), NEVER)
    if rule == "stick_breaking":
        shut = torch.where(picked, functional.logsigmoid(-finite), 0.0)
        later = shut.flip(-1).cumsum(-1).flip(-1) - shut
        open_ = open_ + later
    weights = torch.exp(open_)
    total = weights.sum(-1)
    return weights, torch.where(total > 0, torch.log(torch.where(total > 0, total, 1.0)), NEVER)


class Reference:
    """One evaluation: node -> value, each once. Tensors are in the dtype of the call; a branch gives ``(out, lse)``."""

    def __init__(self, call: ProgramCall):
        self.call = call
        self.values: dict[Node, Any] = {}
        self.domain = call.domain

    def value(self, node: Node) -> Any:
        """What a node gives."""
        if node not in self.values:
            self.values[node] = self.run(node)
        return self.values[node]

    @singledispatchmethod
    def run(self, node: Any) -> Any:
        """The value of one node from those of its inputs."""
        raise UnsupportedError(f"no meaning is written for {type(node).__name__}")

    # ---- tensors ------------------------------------------------------------------------------------------------------

    @run.register
    def _input(self, node: Input) -> Tensor:
        if node not in self.call.inputs:
            assert node.default is not None
            return self.value(node.default)
        return self.as_given(self.call.inputs[node])

    def as_given(self, x: Tensor) -> Tensor:
        """An input in the type that is computed in."""
        return x.to(self.call.dtype) if x.is_floating_point() else x

    @run.register
    def _summary(self, node: Summary) -> Tensor:
        return pool(self.value(node.x), node.unit, node.how, node.pad)

    @run.register
    def _take(self, node: Take) -> Tensor:
        x, order = together(self.value(node.x), self.value(node.order))
        return x.gather(2, order[..., None].expand(*order.shape, x.shape[3]))

    # ---- scores: (batch, heads, units of queries, units of keys) --------------------------------------------------------

    def _scale(self, scale: float | None, x: Tensor) -> float:
        return x.shape[-1] ** -0.5 if scale is None else scale

    @run.register
    def _dot(self, node: Dot) -> Tensor:
        x, y = together(self.value(node.x), self.value(node.y))
        scores = x @ y.transpose(-1, -2) * self._scale(node.scale, x)
        return self._whole_rows(node, scores)

    def _whole_rows(self, node: Scores, scores: Tensor) -> Tensor:
        """With a column for each unit of keys: an input may lack the last, ragged one, which then is no candidate."""
        unit = unit_of(node.axes[3])
        return functional.pad(scores, (0, -(-self.domain.kv_len // unit) - scores.shape[3]), value=NEVER)

    @run.register
    def _bound(self, node: Bound) -> Tensor:
        x, y = together(self.value(node.x), self.value(node.y))
        low, high = pool(y, node.unit, "min", "valid"), pool(y, node.unit, "max", "valid")
        best = torch.maximum(x[:, :, :, None] * low[:, :, None], x[:, :, :, None] * high[:, :, None])
        return best.sum(-1) * self._scale(node.scale, x)

    @run.register
    def _antidiagonal(self, node: Antidiagonal) -> Tensor:
        self._check_aligned(node.block, "antidiagonal()")
        x, y = together(self.value(node.x), self.value(node.y))
        stride, cells = node.stride, node.block // node.stride
        rows, columns = -(-x.shape[2] // node.block) * node.block, -(-y.shape[2] // node.block) * node.block
        x, y = functional.pad(x, (0, 0, 0, rows - x.shape[2])), functional.pad(y, (0, 0, 0, columns - y.shape[2]))
        logits = sum(x[:, :, stride - 1 - i :: stride] @ y[:, :, i::stride].transpose(-1, -2) for i in range(stride))
        logits = logits * (self._scale(None, x) / stride)  # type: ignore[operator]
        row = torch.arange(rows // stride, device=x.device)[:, None] + self.domain.q_offset // stride
        column = torch.arange(columns // stride, device=x.device)
        real = row - self.domain.q_offset // stride < -(-self.domain.rows // stride)
        seen = (column <= row) & (column < -(-self.domain.kv_len // stride)) & real
        mass = safe_softmax(torch.where(seen, logits, NEVER))
        return mass.unflatten(3, (-1, cells)).sum(4).unflatten(2, (-1, cells)).sum(3)

    @run.register
    def _softmax(self, node: Softmax) -> Tensor:
        allowed = self.units(node.among, node)
        return safe_softmax(torch.where(allowed, self.value(node.scores), NEVER))

    @run.register
    def _regroup(self, node: Regroup) -> Tensor:
        scores = self.value(node.scores)
        parts = scores.split(node.unit, dim=3)
        return torch.stack([p.amax(3) if node.how == "max" else getattr(p, node.how)(3) for p in parts], dim=3)

    @run.register
    def _plus(self, node: Plus) -> Tensor:
        first, second = together(self.value(node.first), self.value(node.second))
        return first + second

    @run.register
    def _gumbel(self, node: Gumbel) -> Tensor:
        scores = self.value(node.scores)
        return scores + self.noise(node, scores.shape).scores().to(scores.dtype)

    def noise(self, node: Gumbel, size: Any) -> GumbelScores:
        """Numbers that depend on the seed and their place alone."""
        return GumbelScores(tuple(size), self.value(node.seed).long(), self.call.q.device)

    @run.register
    def _grouped(self, node: Grouped) -> Tensor:
        return reduced(self.value(node.x), self.call.k.shape[1] if node.heads == "kv_heads" else 1, node.how)

    # ---- key scores: (batch, heads, keys) ---------------------------------------------------------------------------------

    @run.register
    def _probe(self, node: Probe) -> Tensor:
        x, y = together(self.value(node.x), self.value(node.y))
        keys, rows = y.shape[2], min(node.rows, x.shape[2])
        last = self.domain.q_offset + x.shape[2]
        position = torch.arange(last - rows, last, device=x.device)[:, None]
        column = torch.arange(keys, device=x.device)
        seen = (column < keys // node.complete * node.complete).expand(rows, keys)
        seen = seen & (column <= position) if node.causal else seen
        logits = x[:, :, -rows:] @ y.transpose(-1, -2) * self._scale(node.scale, x)
        mass = safe_softmax(torch.where(seen, logits, NEVER)).mean(2)
        return torch.where(column < last - rows, mass, 0.0) if node.keep == "before" else mass

    @run.register
    def _smooth(self, node: Smooth) -> Tensor:
        x = self.value(node.x)
        kept = x.shape[2] - (self._probing(node) if self._before(node) else 0)
        if not kept:
            return x
        pooled = functional.avg_pool1d(x[:, :, :kept].flatten(0, 1)[:, None], node.pool, 1, node.pool // 2)
        return functional.pad(pooled[:, 0].unflatten(0, x.shape[:2]), (0, x.shape[2] - kept))

    def _before(self, node: Any) -> bool:
        """Whether key scores end before the rows that probe."""
        return node.keep == "before" if isinstance(node, Probe) else self._before(node.x)

    def _probing(self, node: Any) -> int:
        """Keys from the first probing row on."""
        if isinstance(node, Probe):
            rows = min(node.rows, self.domain.rows)
            return self.domain.kv_len - (self.domain.q_offset + self.domain.rows - rows)
        return self._probing(node.x)

    @run.register
    def _grouped_keys(self, node: GroupedKeys) -> Tensor:
        return reduced(self.value(node.x), self.call.k.shape[1] if node.heads == "kv_heads" else 1, node.how)

    # ---- orders and subsets -------------------------------------------------------------------------------------------------

    @run.register
    def _order(self, node: Order) -> Tensor:
        scores = self.value(node.scores)
        whole = scores.shape[2] // node.segment * node.segment
        inside = scores[:, :, :whole].unflatten(2, (-1, node.segment))
        order = inside.sort(dim=3, descending=node.descending, stable=True).indices
        order = (order + torch.arange(0, whole, node.segment, device=scores.device)[:, None]).flatten(2)
        tail = torch.arange(whole, scores.shape[2], device=scores.device).expand(*scores.shape[:2], -1)
        return torch.cat([order, tail], dim=2)

    @run.register
    def _inverse(self, node: Inverse) -> Tensor:
        return self.value(node.order).argsort(dim=2)

    @run.register
    def _tokens(self, node: Tokens) -> list[Tensor]:
        """For each batch entry the positions ``(heads, kept)``, ascending."""
        scores, by, heads = self.value(node.scores), self.value(node.by)[:, 0], self.call.q.shape[1]
        self._check_square("keep_tokens()")
        before = max(scores.shape[2] - node.always, 0)
        kept = []
        for entry in range(scores.shape[0]):
            count = before - dropped(by[entry, :before], node)
            best = (
                scores[entry, :, :before]
                .sort(dim=1, descending=True, stable=True)
                .indices[:, : max(count, min(node.least, before))]
            )
            always = torch.arange(before, scores.shape[2], device=scores.device).expand(best.shape[0], -1)
            kept.append(spread(torch.cat([best, always], dim=1).sort(dim=1).values, heads, dim=0))
        return kept

    def _check_square(self, what: str) -> None:
        if self.domain.q_offset or self.domain.rows != self.domain.kv_len:
            raise UnsupportedError(
                f"{what} chooses among the tokens of one whole sequence: it needs as many queries as keys and q_offset=0; got "
                f"{self.domain.rows} queries at {self.domain.q_offset} and {self.domain.kv_len} keys. Use it for prefill, and another pattern to decode"
            )

    # ---- choices: (batch, heads, units of queries, units of keys), bool ---------------------------------------------------------

    def _check_aligned(self, unit: int, what: str) -> None:
        if self.domain.q_offset % unit:
            raise UnsupportedError(
                f"{what} works on whole units of {unit} queries: q_offset must be a multiple of {unit}; got {self.domain.q_offset}"
            )

    def units(self, mask: Mask, node: Any) -> Tensor:
        """Which (unit of queries, unit of keys) hold a pair that the mask allows."""
        rows, columns = unit_of(node.axes[2]), unit_of(node.axes[3])
        self._check_aligned(rows, f"{node.function}()")
        allowed = self._pairs(mask)
        height, width = self.domain.rows, self.domain.kv_len
        allowed = functional.pad(allowed, (0, -width % columns, 0, -height % rows))
        allowed = allowed.unflatten(3, (-1, columns)).any(4).unflatten(2, (-1, rows)).any(3)
        return allowed

    def _pairs(self, mask: Mask) -> Tensor:
        """The mask at every pair: ``(batch or 1, heads or 1, rows, keys)``."""
        domain, device = self.domain, self.call.q.device
        expr, tables = self.concrete(mask)
        env: dict[str, Any] = {**domain.lengths, **self.call.tables, **tables}
        env["b"] = torch.arange(domain.batch, device=device)[:, None, None, None]
        env["h"] = torch.arange(domain.heads, device=device)[:, None, None]
        env["q_idx"] = torch.arange(domain.q_offset, domain.q_offset + domain.rows, device=device)[:, None]
        env["kv_idx"] = torch.arange(domain.kv_len, device=device)
        value = evaluate(expr, env)
        reads = any(isinstance(bound, Node) for bound in mask.bound.values())
        lead = [
            size if symbol in expr.free_symbols or reads else 1 for symbol, size in ((BATCH, domain.batch), (HEAD, domain.heads))
        ]
        return value.expand(*lead, domain.rows, domain.kv_len)

    def _candidates(self, node: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Scores with -inf where there is no candidate, the candidates, and the forced ones."""
        scores = self.value(node.scores).detach()
        among = node.among if node.among is not None else Mask(sympy.true)
        allowed = self.units(among, node)
        allowed = self._per_head(allowed, scores.shape[1]) & (scores != NEVER)
        forced = allowed.new_zeros(()) if node.forced is None else self._per_head(self.units(node.forced, node), scores.shape[1])
        return torch.where(allowed, scores, NEVER), allowed, (forced & allowed).expand(allowed.shape)

    def _per_head(self, flags: Tensor, heads: int) -> Tensor:
        """Flags of query heads for fewer heads: any head's."""
        if flags.shape[1] in (1, heads):
            return flags
        return flags.unflatten(1, (heads, -1)).any(2)

    @run.register
    def _top_k(self, node: TopK) -> Tensor:
        scores, allowed, forced = self._candidates(node)
        first = torch.where(forced, float("inf"), scores)
        ranked = first.sort(dim=3, descending=True, stable=True).indices
        rank = ranked.argsort(dim=3)
        count = node.count + (forced.sum(3, keepdim=True) if node.extra else 0)
        return allowed & (rank < count)

    @run.register
    def _top_p(self, node: TopP) -> Tensor:
        scores, allowed, forced = self._candidates(node)
        if node.scores.is_mass:
            mass = torch.where(allowed, scores, 0.0)
            total = mass.sum(3, keepdim=True)
            mass = mass / torch.where(total > 0, total, 1.0)
        else:
            mass = safe_softmax(scores)
        key = torch.where(allowed, mass, -1.0)
        if node.forced_in_mass:
            key = torch.where(forced, float("inf"), key)
        ranked = key.sort(dim=3, descending=True, stable=True).indices
        upto = mass.gather(3, ranked).cumsum(3)
        reached = upto >= node.share
        # the first that reaches it, and all before
        before = reached.cumsum(3) - reached.long()
        taken = (before == 0) if node.inclusive else ~reached
        if node.unmet == "none":
            taken = taken & reached.any(3, keepdim=True)
        picked = torch.zeros_like(allowed).scatter(3, ranked, taken)
        return allowed & (picked | forced)

    @run.register
    def _threshold(self, node: Threshold) -> Tensor:
        scores, allowed, forced = self._candidates(node)
        if node.scores.is_mass:
            mass = torch.where(allowed, scores, 0.0)
            total = mass.sum(3, keepdim=True)
            scores = mass / torch.where(total > 0, total, 1.0)
        return allowed & ((scores >= node.least) | forced)

    def table(self, node: Node) -> Tensor:
        """What a node gives, as a table ``(B, H, ..)`` that masks and scores read."""
        return spread(self.value(node), self.domain.heads)

    # ---- branches ---------------------------------------------------------------------------------------------------------------

    def concrete(self, part: Any) -> tuple[Any, dict[str, Tensor]]:
        """An expression whose reads of nodes are reads of tables, and those tables. Rows of units are counted from the call's first."""
        expr, tables = part.expr, {}
        for name, node in part.bound.items():
            if not isinstance(node, Node) or name not in part.tables:
                continue
            table = tables[name] = self.table(node)
            for read in table_reads(expr):
                if read.spec.name == name and table.ndim == 4:
                    first = self.domain.q_offset // unit_of(node.axes[2])
                    moved = (read.args[0], read.args[1], read.args[2] - first, read.args[3])
                    expr = expr.xreplace({read: read_class(read.spec)(*moved)})
        return expr, tables

    @run.register
    def _attend(self, node: Attend) -> tuple[Tensor, Tensor]:
        q, k, v = (self.value(x) for x in (node.x, node.y, node.z))
        unit = units_of_keys(node)
        if unit > 1:
            self._check_complete(k, unit)
        if node.normaliser is not None:
            return self._per_chunk(node, node.normaliser, q, k, v)
        parts = [self.concrete(node.pattern.mask), self.concrete(node.pattern.score)]
        mask, score = (type(whole)(expr) for whole, (expr, _) in zip((node.pattern.mask, node.pattern.score), parts, strict=True))
        pattern = Pattern(mask, score, node.pattern.sink, node.pattern.scale)
        dynamic = parts[0][1] | parts[1][1]
        tables = {name: self.call.tables[name] if name in self.call.tables else dynamic[name] for name in pattern.tables}
        k, v = (spread(x, q.shape[1]) if q.shape[1] % x.shape[1] else x for x in (k, v))
        call = check_call(pattern, q, k, v, tables, q_offset=self.domain.q_offset, scale=self.call.scale)
        return attend_reference(pattern, call)

    def _check_complete(self, k: Tensor, unit: int) -> None:
        """Units of keys are counted as the keys they summarise; nothing to check beyond their number."""
        if k.shape[2] > -(-self.domain.kv_len // unit):
            raise ShapeError(f"{k.shape[2]} units of {unit} keys are more than {self.domain.kv_len} keys have")

    def _per_chunk(self, node: Attend, rule: PerChunk, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k = together(q, k)
        v = spread(v, q.shape[1])
        shape = (*q.shape[:3], k.shape[2])
        scale = self.call.scale or node.pattern.scale or q.shape[3] ** -0.5
        logits = q @ k.transpose(-1, -2) * scale
        allowed = self._pairs(node.pattern.mask).expand(shape)
        if node.pattern.has_score:
            raise UnsupportedError("per_chunk() takes logits as they are; leave score= out, or use one softmax over all")
        unit = rule.picks.units[1]
        pad = -shape[3] % unit
        logits = functional.pad(torch.where(allowed, logits, NEVER), (0, pad), value=NEVER).unflatten(3, (-1, unit))
        values = functional.pad(v, (0, 0, 0, pad)).unflatten(2, (-1, unit))
        weights, log_total = weigh(self.chunk_scores(rule, q.shape[1]), rule.weights)
        if rule.inner == "softmax1":
            extended = functional.pad(logits, (0, 1), value=0.0)
            share = torch.softmax(extended, -1)[..., :-1]
        else:
            share = safe_softmax(logits)
        out = torch.einsum("bhqc,bhqcs,bhcsd->bhqd", weights, share, values)
        return out, log_total

    def chunk_scores(self, rule: PerChunk, heads: int) -> Tensor:
        """The scores that weigh chunks, -inf where a chunk was not picked."""
        picked = self.value(rule.picks)
        scores, picked = together(self.value(rule.scores), picked)
        return spread(torch.where(picked, scores, NEVER), heads)

    @run.register
    def _slots(self, node: Slots) -> Slots:
        return node  # read row by row by what recalls them

    @run.register
    def _recall(self, node: Recall) -> tuple[Tensor, Tensor]:
        memory, q = node.memory, self.value(node.x)
        k, v, gate = (self.value(x) for x in (memory.y, memory.z, memory.gate))
        log_keep = functional.logsigmoid(gate) / memory.temperature
        keep, write = torch.exp(log_keep)[..., None], -torch.expm1(log_keep)[..., None]
        entries = []
        for entry, first in enumerate(self._first_tokens(memory.documents)):
            e = slice(entry, entry + 1)
            before = self._before_call(node, e, k, v, keep)
            rows = [self._recalled(node, row, first, before, q[e], k[e], v[e], keep[e], write[e]) for row in range(q.shape[2])]
            entries.append([torch.stack(parts, 2) for parts in zip(*rows, strict=True)])
        out, lse = (torch.cat(parts) for parts in zip(*entries, strict=True))
        return out, lse

    def _before_call(self, node: Recall, entry: slice, k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, bool]:
        """The slots of one batch entry before the first key: keys, values, and whether anything is in them."""
        state = self.call.state.get(node.label)
        if state is not None:
            return state.keys[entry], state.values[entry], bool(state.written[entry].all())
        slots = keep[entry].shape[:2] + keep.shape[3:4]
        return k.new_zeros((*slots, k.shape[3])), v.new_zeros((*slots, v.shape[3])), False

    def _recalled(
        self,
        node: Recall,
        row: int,
        firsts: list[int],
        before: tuple[Tensor, Tensor, bool],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor,
        write: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What one query of one batch entry reads from the slots."""
        memory, position = node.memory, self.domain.q_offset + row
        first = firsts[min(position, k.shape[2] - 1)]
        keys, values, written = before
        for token in range(first, min(position - memory.delay + 1, k.shape[2])):
            keys = keep[:, :, token] * keys + write[:, :, token] * k[:, :, token, None]
            values = keep[:, :, token] * values + write[:, :, token] * v[:, :, token, None]
        here = q[:, :, row].unflatten(1, (k.shape[1], -1))
        scale = self.call.scale or node.scale or q.shape[3] ** -0.5
        logits = (here @ keys.transpose(-1, -2) * scale).flatten(1, 2)
        if memory.empty == "masked" and position - memory.delay < first and not written:
            logits = torch.full_like(logits, NEVER)
        out = safe_softmax(logits).unflatten(1, (k.shape[1], -1)) @ values
        lse = torch.where((logits == NEVER).all(-1), NEVER, torch.logsumexp(torch.where(logits == NEVER, 0.0, logits), -1))
        return out.flatten(1, 2), lse

    def _first_tokens(self, node: Node | None) -> list[list[int]]:
        """For each batch entry and token the first token of its document."""
        batch, keys = self.domain.batch, self.domain.kv_len
        if node is None:
            return [[0] * keys] * batch
        ids = self.value(node).expand(batch, keys)
        return (ids[:, :, None] > ids[:, None, :]).sum(2).tolist()

    @run.register
    def _linear(self, node: Linear) -> tuple[Tensor, None]:
        q, k, v = (self.value(x) for x in (node.x, node.y, node.z))
        if len(node.decay) != q.shape[1]:
            raise ShapeError(
                f"linear() was declared with {len(node.decay)} decays; q has {q.shape[1]} heads: one for each is wanted"
            )
        q, k = together(q, k)
        v = spread(v, q.shape[1])
        position = torch.arange(q.shape[2], device=q.device)[:, None] + self.domain.q_offset
        distance = position - torch.arange(k.shape[2], device=q.device)
        rate = torch.tensor(node.decay, dtype=q.dtype, device=q.device)[:, None, None]
        fade = torch.where(distance >= 0, torch.exp(rate * distance.clamp(min=0)), 0.0)
        if node.documents is not None:
            ids = self.value(node.documents)
            own = ids[:, position[:, 0].clamp(max=k.shape[2] - 1)]
            fade = torch.where((own[:, :, None] == ids[:, None, :])[:, None], fade, 0.0)
        scale = self.call.scale or node.scale or q.shape[3] ** -0.5
        out = (q @ k.transpose(-1, -2) * scale * fade) @ v
        before = self.call.state.get(node.label)
        if before is not None:
            out = out + scale * torch.exp(rate * (position + 1)) * (q @ before.to(q.dtype))
        return out, None

    @run.register
    def _joint(self, node: Joint) -> tuple[Tensor, Tensor]:
        return merged([self.value(branch) for branch in node.branches])

    @run.register
    def _mix(self, node: Mix) -> tuple[Tensor, None]:
        weights = self.value(node.weights)
        return sum(weights[..., i, None] * self.value(branch)[0] for i, branch in enumerate(node.branches)), None  # type: ignore[return-value]

    @run.register
    def _compact(self, node: Compact) -> tuple[Tensor, Tensor | None]:
        kept = self.value(node.tokens)
        q, k, v = (spread(self.value(x), self.call.q.shape[1]) for x in node.inputs[1:])
        outs: list[Tensor] = []
        lses: list[Tensor | None] = []
        for entry, index in enumerate(kept):
            if not index.numel():  # nothing was kept
                outs.append(q.new_zeros((1, *q.shape[1:3], v.shape[3])))
                lses.append(q.new_full((1, *q.shape[1:3]), NEVER, dtype=self.call.dtype))
                continue
            rows = index[None, :, :, None]
            inner = {
                name: x[entry : entry + 1].gather(2, rows.expand(-1, -1, -1, x.shape[3]))
                for name, x in zip("qkv", (q, k, v), strict=True)
            }
            out, lse = self.inside(node, inner)
            full = out.new_zeros((1, *q.shape[1:3], v.shape[3]))
            outs.append(full.scatter(2, rows.expand(-1, -1, -1, v.shape[3]), out))
            lses.append(None if lse is None else lse.new_full((1, *q.shape[1:3]), NEVER).scatter(2, index[None], lse))
        known = [lse for lse in lses if lse is not None]
        return torch.cat(outs), torch.cat(known) if len(known) == len(lses) else None

    def inside(self, node: Compact, inner: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """What runs on the kept tokens of one batch entry."""
        return type(self)(self.inner_call(node, inner)).value(node.inside)

    def inner_call(self, node: Compact, inner: dict[str, Tensor]) -> ProgramCall:
        """The call on the kept tokens."""
        program = Program(node.inside)
        inputs = {leaf: inner[leaf.name] for leaf in program.everything if isinstance(leaf, Input)}
        return replace(self.call, program=program, inputs=inputs, q_offset=0)


def dropped(by: Tensor, node: Tokens) -> int:
    """How many of the keys with the mass ``by`` are dropped."""
    total = by.sum()
    ascending = (by / torch.where(total > 0, total, 1.0)).sort().values
    if node.tail is not None:
        below = int((ascending.cumsum(0) < node.tail).sum())
        return min(below + 1, by.numel()) if below else 0
    held = ascending.flip(0).cumsum(0)
    return by.numel() - min(int((held <= node.cover).sum()) + 1, by.numel())
