"""The dense meaning of a program, in plain torch, differentiable: what all else is compared with. Holds queries x keys, and more.

Written for reading, and apart from the lowering: of what the lowering computes with nothing is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from sparsedsl.backends.reference import masks
from sparsedsl.backends.reference.attention import attend_reference
from sparsedsl.backends.reference.scan_linear import run_recurrence
from sparsedsl.backends.reference.scores import SCORE_RULES
from sparsedsl.backends.reference.selection import CHOICE_RULES
from sparsedsl.backends.reference.tensor_rules import NEVER, log_sum, repeat_kv, softmax
from sparsedsl.lang.expressions import Mask, Score, as_mask
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import SCORE
from sparsedsl.program.branches import Attend, Compact, Joint, Mix, Recall
from sparsedsl.program.node import Node
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.rules import Rules
from sparsedsl.program.sources import PerChunk, Slots
from sparsedsl.runtime.call import check_call
from sparsedsl.runtime.interpreter import Evaluation, Rule
from sparsedsl.runtime.program_call import ProgramCall
from sparsedsl.runtime.seen_products import seen_product

__all__ = ["REFERENCE_RULES", "Reference"]

Tensor = torch.Tensor


class Reference(Evaluation):
    """One evaluation by meaning. Tensors are in the dtype of the call; a branch gives ``(out, lse)``, the LSE None if it is no softmax."""

    def __init__(self, call: ProgramCall, rules: Mapping[type[Node], Rule] | None = None):
        super().__init__(REFERENCE_RULES if rules is None else rules, call)

    def concrete_pattern(self, pattern: Pattern) -> tuple[Pattern, dict[str, Tensor]]:
        """A pattern whose reads of nodes are reads of tables, and all tables it reads."""
        return masks.concrete_pattern(self, pattern)

    def pairs(self, mask: Mask) -> Tensor:
        """The mask at every pair: ``(batch, heads, queries, keys)``."""
        return masks.pairs(self, mask)

    def chunk_scores(self, rule: PerChunk) -> Tensor:
        """The scores that weigh chunks for every query head, -inf where a chunk was not picked."""
        heads = self.call.q.shape[1]
        return torch.where(repeat_kv(self.value(rule.selected), heads), repeat_kv(self.value(rule.scores), heads), NEVER)


# ---- attention -----------------------------------------------------------------------------------------------------------------


def _attend(run: Reference, node: Attend) -> tuple[Tensor, Tensor]:
    q, k, v = (run.value(x) for x in (node.x, node.y, node.z))
    if node.normaliser is not None:
        return _per_chunk(run, node, node.normaliser, q, k, v)
    if k.shape[2]:
        pattern, tables = run.concrete_pattern(node.pattern)
    else:  # no window is complete, or no block: one row of zeros that nobody may see
        k, v = (functional.pad(x, (0, 0, 0, 1)) for x in (k, v))
        pattern = replace(node.pattern, mask=as_mask(False), score=Score(SCORE), causal=False)
        tables = {name: run.call.tables[name] for name in pattern.tables}
    call = check_call(pattern, q, k, v, tables, q_offset=run.call.q_offset, scale=run.call.scale)
    return attend_reference(pattern, call)


def _per_chunk(run: Reference, node: Attend, rule: PerChunk, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    pattern, tables = run.concrete_pattern(node.pattern)
    check_call(pattern, q, k, v, tables, q_offset=run.call.q_offset, scale=run.call.scale)
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    logits = seen_product(q, k.transpose(-1, -2)) * (run.call.scale or node.pattern.scale or q.shape[3] ** -0.5)
    allowed = run.pairs(node.pattern.mask)
    if node.pattern.has_score:  # masked logits are 1, where every score function and its derivative are finite
        logits = masks.modified(run, node.pattern.score, torch.where(allowed, logits, 1.0))
    logits = torch.where(allowed, logits, NEVER)
    weights, log_total = _chunk_weights(run.chunk_scores(rule), rule.weights)
    out, block = q.new_zeros((*q.shape[:3], v.shape[3])), rule.selected.blocks[1]
    for chunk in range(weights.shape[3]):
        keys = slice(chunk * block, (chunk + 1) * block)
        inside = logits[..., keys]
        if rule.inner == "softmax1":
            share = softmax(functional.pad(inside, (0, 1), value=0.0))[..., :-1]
        else:
            share = softmax(inside)
        share = torch.where(inside == NEVER, 0.0, share)
        out = out + weights[..., chunk, None] * seen_product(share, v[:, :, keys])
    return out, log_total


def _chunk_weights(scores: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Weights of chunks from their scores along the last dimension (-inf: not picked, later is more recent), and the log of their sum."""
    if rule == "softmax":
        return softmax(scores), log_sum(scores)
    if rule == "softmax1":  # the LSE counts the logit of 0: that is what it weighs against other branches
        extended = functional.pad(scores, (0, 1), value=0.0)
        return softmax(extended)[..., :-1], log_sum(extended)
    chosen = scores != NEVER
    finite = torch.where(chosen, scores, 0.0)
    left = torch.ones_like(scores[..., 0])
    weights: list[Tensor] = []
    for chunk in reversed(range(scores.shape[-1])):
        weights.insert(0, torch.where(chosen[..., chunk], torch.sigmoid(finite[..., chunk]) * left, 0.0))
        if rule == "stick_breaking":
            left = torch.where(chosen[..., chunk], torch.sigmoid(-finite[..., chunk]) * left, left)
    found = torch.stack(weights, dim=-1)
    total = found.sum(-1)
    return found, torch.where(total > 0, torch.log(torch.where(total > 0, total, 1.0)), NEVER)


# ---- recurrences ---------------------------------------------------------------------------------------------------------------


def _slots(run: Reference, node: Slots) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and gates: what is in a slot depends on who looks, and when."""
    return run.value(node.y), run.value(node.z), run.value(node.gate)


def _recall(run: Reference, node: Recall) -> tuple[Tensor, Tensor]:
    memory, q = node.memory, run.value(node.x)
    k, v, gate = run.value(memory)
    log_keep = functional.logsigmoid(gate) / memory.temperature
    if memory.first:
        written = torch.arange(gate.shape[2], device=gate.device)[:, None] >= memory.first
        log_keep = torch.where(written, log_keep, 0.0)
    keep, write = torch.exp(log_keep)[..., None], -torch.expm1(log_keep)[..., None]
    firsts, entries = _first_tokens(run, memory.documents), []
    # Entries that say the same of documents and states go through the recurrence together.
    alike = memory.documents is None and run.call.state_of(node) is None
    for entry in [slice(None)] if alike else [slice(number, number + 1) for number in range(q.shape[0])]:
        first = firsts[entry.start or 0]
        slots = _contents(_before_call(run, node, entry, k, v, keep), first, k[entry], v[entry], keep[entry], write[entry])
        rows = [_recalled(run, node, row, first, slots, q[entry], k.shape[1]) for row in range(q.shape[2])]
        entries.append([torch.stack(parts, 2) for parts in zip(*rows, strict=True)])
    out, lse = (torch.cat(parts) for parts in zip(*entries, strict=True))
    return out, lse


@dataclass(frozen=True, eq=False)
class _SlotSource:
    """What slots of some batch entries hold, keys ``(B, Hkv, M, D)`` and values ``(B, Hkv, M, Dv)``: ``before`` the first token of a
    document, and ``after`` each token of the call. ``written``: whether anything is in them before."""

    before: tuple[Tensor, Tensor]
    written: bool
    after: list[tuple[Tensor, Tensor]]


def _before_call(run: Reference, node: Recall, entry: slice, k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, bool]:
    """The slots of batch entries before the first key: keys, values, and whether anything is in them."""
    state = run.call.state_of(node)
    if state is not None:
        return state.keys[entry], state.values[entry], bool(state.written[entry].all())
    slots = keep[entry].shape[:2] + keep.shape[3:4]
    return k.new_zeros((*slots, k.shape[3])), v.new_zeros((*slots, v.shape[3])), False


def _contents(
    before: tuple[Tensor, Tensor, bool], firsts: list[int], k: Tensor, v: Tensor, keep: Tensor, write: Tensor
) -> _SlotSource:
    """The slots after each token: every token fades what is in them and is written beside it; a document begins with empty ones."""
    *empty, written = before
    keys, values = empty
    after = []
    for token, first in enumerate(firsts):
        if token == first:
            keys, values = empty
        keys = keep[:, :, token] * keys + write[:, :, token] * k[:, :, token, None]
        values = keep[:, :, token] * values + write[:, :, token] * v[:, :, token, None]
        after.append((keys, values))
    return _SlotSource((empty[0], empty[1]), written, after)


def _recalled(
    run: Reference, node: Recall, row: int, firsts: list[int], slots: _SlotSource, q: Tensor, kv_heads: int
) -> tuple[Tensor, Tensor]:
    """What one query reads from the slots."""
    memory, position = node.memory, run.call.q_offset + row
    first, last = firsts[min(position, len(firsts) - 1)], min(position - memory.delay, len(firsts) - 1)
    keys, values = slots.after[last] if last >= first else slots.before
    here = q[:, :, row].unflatten(1, (kv_heads, -1))
    scale = run.call.scale or node.scale or q.shape[3] ** -0.5
    logits = (here @ keys.transpose(-1, -2) * scale).flatten(1, 2)
    if memory.empty == "masked" and position - memory.delay < first and not slots.written:
        logits = torch.full_like(logits, NEVER)
    out = softmax(logits).unflatten(1, (kv_heads, -1)) @ values
    return out.flatten(1, 2), log_sum(logits)


def _first_tokens(run: Reference, node: Node | None) -> list[list[int]]:
    """For each batch entry and token the first token of its document."""
    batch, keys = run.call.q.shape[0], run.call.k.shape[2]
    if node is None:
        return [[0] * keys] * batch
    ids = run.value(node).expand(batch, keys)
    return (ids[:, :, None] > ids[:, None, :]).sum(2).tolist()


# ---- combinations --------------------------------------------------------------------------------------------------------------


def _joint(run: Reference, node: Joint) -> tuple[Tensor, Tensor]:
    outs, lses = zip(*(run.value(branch) for branch in node.branches), strict=True)
    logits = torch.stack(lses, dim=-1)
    shares = softmax(logits)
    out = torch.stack([shares[..., i, None] * out.to(shares.dtype) for i, out in enumerate(outs)]).sum(0)
    return out, log_sum(logits)


def _mix(run: Reference, node: Mix) -> tuple[Tensor, None]:
    weights, out = run.value(node.weights), None
    for i, branch in enumerate(node.branches):
        part = weights[:, :, :, i : i + 1] * run.value(branch)[0]
        out = part if out is None else out + part
    assert out is not None
    return out, None


def _compact(run: Reference, node: Compact) -> tuple[Tensor, Tensor | None]:
    q, k, v = (repeat_kv(run.value(x), run.call.q.shape[1]) for x in node.inputs[1:])
    outs, lses = [], []
    for entry, kept in enumerate(run.value(node.tokens)):
        out, lse = q.new_zeros((*q.shape[1:3], v.shape[3])), q.new_full(q.shape[1:3], NEVER)
        if kept.numel():
            rows = [torch.stack([x[entry, head, index] for head, index in enumerate(kept)])[None] for x in (q, k, v)]
            few, few_lse = type(run)(run.call.inside(node.inside, *rows), run.rules).value(node.inside)
            head = torch.arange(len(kept), device=q.device)[:, None].expand_as(kept)
            out = out.index_put((head, kept), few[0])
            lse = lse if few_lse is None else lse.index_put((head, kept), few_lse[0])
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses) if node.weighable else None


REFERENCE_RULES: Rules[Rule] = Rules(
    "the reference",
    {
        **SCORE_RULES,
        **CHOICE_RULES,
        Attend: _attend,
        Slots: _slots,
        Recall: _recall,
        Linear: run_recurrence,
        Joint: _joint,
        Mix: _mix,
        Compact: _compact,
    },
)
