"""The dense meaning of a program, in plain torch, differentiable: what all else is compared with. Holds queries x keys, and more."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.program.branches import Attend, Compact, Joint, Linear, Mix, Recall, units_of_keys
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.sources import PerChunk
from sparsedsl.program.tensors import Input
from sparsedsl.run.inputs import check_call
from sparsedsl.run.programs.call import ProgramCall
from sparsedsl.run.programs.dense_choices import DenseChoices
from sparsedsl.run.programs.parts import NEVER, merged, safe_softmax, spread, together, weigh
from sparsedsl.run.programs.runner import means
from sparsedsl.run.reference import attend_reference
from sparsedsl.run.seen_product import seen_product

__all__ = ["Reference"]

Tensor = torch.Tensor


class Reference(DenseChoices):
    """One evaluation by meaning. Tensors are in the dtype of the call; a branch gives ``(out, lse)``, the LSE None if it is no softmax."""

    @means(Attend)
    def _attend(self, node: Attend) -> tuple[Tensor, Tensor]:
        q, k, v = (self.value(x) for x in (node.x, node.y, node.z))
        unit = units_of_keys(node)
        if unit > 1:
            self._check_complete(k, unit)
        if node.normaliser is not None:
            return self._per_chunk(node, node.normaliser, q, k, v)
        pattern, tables = self.concrete_pattern(node.pattern)
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
        logits = seen_product(q, k.transpose(-1, -2)) * scale
        allowed = self.pairs(node.pattern.mask).expand(shape)
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
        share = torch.where(logits > NEVER, share, 0.0) * weights[..., None]
        return seen_product(share.flatten(3), values.flatten(2, 3)), log_total

    def chunk_scores(self, rule: PerChunk, heads: int) -> Tensor:
        """The scores that weigh chunks, -inf where a chunk was not picked."""
        picked = self.value(rule.picks)
        scores, picked = together(self.value(rule.scores), picked)
        return spread(torch.where(picked, scores, NEVER), heads)

    @means(Recall)
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

    @means(Linear)
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
        pairs = torch.where(fade > 0, seen_product(q, k.transpose(-1, -2)) * scale, 0.0)
        out = seen_product(pairs * fade, v)
        before = self.call.state.get(node.label)
        if before is not None:
            out = out + scale * torch.exp(rate * (position + 1)) * (q @ before.to(q.dtype))
        return out, None

    @means(Joint)
    def _joint(self, node: Joint) -> tuple[Tensor, Tensor]:
        return merged([self.value(branch) for branch in node.branches])

    @means(Mix)
    def _mix(self, node: Mix) -> tuple[Tensor, None]:
        weights = self.value(node.weights)
        parts = [weights[..., i, None] * self.value(branch)[0] for i, branch in enumerate(node.branches)]
        return torch.stack(parts).sum(0), None

    @means(Compact)
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
