"""Orders, subsets and choices as they are meant: dense, in plain torch.

Orders are positions ``(batch, heads, keys)``; subsets positions ``(heads, kept)`` for each batch entry; choices booleans
``(batch, heads, blocks of queries, blocks of keys)``.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from sparsedsl.backends.reference.masks import blocks
from sparsedsl.backends.reference.tensor_rules import NEVER, per_head, repeat_kv, softmax
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.expressions import Mask
from sparsedsl.program.axes import block_of, rows_on
from sparsedsl.program.given_blocks import Given
from sparsedsl.program.key_choices import ChosenKeys, Divergence
from sparsedsl.program.node import Node
from sparsedsl.program.orders import Inverse, Order, Tokens
from sparsedsl.program.select import Threshold, TopK, TopP
from sparsedsl.runtime.interpreter import Evaluation, Rule

__all__ = ["CHOICE_RULES"]

Tensor = torch.Tensor


def _order(run: Evaluation, node: Order) -> Tensor:
    scores, found = run.value(node.scores), []
    for start in range(0, scores.shape[2], node.segment):
        segment = scores[:, :, start : start + node.segment]
        if segment.shape[2] == node.segment:
            places = segment.sort(dim=2, descending=node.descending, stable=True).indices
        else:  # keys after the last whole segment stay
            places = torch.arange(segment.shape[2], device=scores.device).expand(segment.shape)
        found.append(start + places)
    return torch.cat(found, dim=2)


def _inverse(run: Evaluation, node: Inverse) -> Tensor:
    return run.value(node.order).argsort(dim=2)


# ---- subsets -------------------------------------------------------------------------------------------------------------------


def _tokens(run: Evaluation, node: Tokens) -> list[Tensor]:
    scores, by = run.value(node.scores), run.value(node.by)[:, 0]
    before = max(scores.shape[2] - node.always, 0)
    always = torch.arange(before, scores.shape[2], device=scores.device)
    kept = []
    for one, mass in zip(scores, by, strict=True):
        count = max(before - _dropped(mass[:before], node), min(node.least, before))
        best = [torch.cat([head[:before].sort(descending=True, stable=True).indices[:count], always]) for head in one]
        kept.append(repeat_kv(torch.stack([index.sort().values for index in best])[None], run.call.q.shape[1])[0])
    return kept


def _dropped(by: Tensor, node: Tokens) -> int:
    """How many of the keys with the mass ``by`` are dropped."""
    total = by.sum()
    ascending = (by / torch.where(total > 0, total, 1.0)).sort().values
    if node.tail is not None:
        below = int((ascending.cumsum(0) < node.tail).sum())
        return min(below + 1, by.numel()) if below else 0
    assert node.cover is not None
    if node.cover == 1:  # rounding may bring a sum to 1 early
        return 0
    held = ascending.flip(0).cumsum(0)
    return by.numel() - min(int((held <= node.cover).sum()) + 1, by.numel())


# ---- choices -------------------------------------------------------------------------------------------------------------------


def _candidates(run: Evaluation, node: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with -inf where there is no candidate, the candidates, and the forced ones."""
    scores = run.value(node.scores).detach()
    heads = run.call.check_heads(node, scores.shape[1])
    allowed = scores != NEVER
    if node.among is not None:
        allowed = allowed & per_head(blocks(run, node.among, node), heads)
    forced = allowed & (node.forced is not None)
    if node.forced is not None:
        forced = allowed & per_head(blocks(run, node.forced, node), heads)
    return torch.where(allowed, scores, NEVER), allowed, forced


def _best_first(key: Tensor, forced: Tensor | None = None) -> Tensor:
    """Blocks of every row by their key, equal ones by number, NaN as infinity; before all others the forced ones, by number."""
    key = torch.where(key.isnan(), float("inf"), key)
    if forced is None:
        return key.sort(dim=3, descending=True, stable=True).indices
    order = torch.where(forced, 0.0, key).sort(dim=3, descending=True, stable=True).indices
    return order.gather(3, forced.gather(3, order).int().sort(dim=3, descending=True, stable=True).indices)


def _mass(node: Any, scores: Tensor, allowed: Tensor) -> Tensor:
    """Scores as shares of the mass of a row's candidates."""
    if not node.scores.is_mass:
        return softmax(scores)
    mass = torch.where(allowed, scores, 0.0)
    total = mass.sum(3, keepdim=True)
    return mass / torch.where(total > 0, total, 1.0)


def _top_k(run: Evaluation, node: TopK) -> Tensor:
    scores, allowed, forced = _candidates(run, node)
    rank = _best_first(scores, forced).argsort(dim=3)
    count = node.count + (forced.sum(3, keepdim=True) if node.extra else 0)
    return allowed & (rank < count)


def _top_p(run: Evaluation, node: TopP) -> Tensor:
    scores, allowed, forced = _candidates(run, node)
    if node.share == 1:  # whether rounded sums reach 1 is a matter of chance
        return allowed
    mass = _mass(node, scores, allowed)
    if node.over == "map":
        return allowed & (_of_map(node, mass, allowed) | forced)
    order = _best_first(torch.where(allowed, mass, -1.0), forced if node.forced_in_mass else None)
    upto = mass.gather(3, order).cumsum(3)
    reached = upto >= node.share
    before = upto.new_zeros(reached.shape, dtype=torch.bool)
    before[..., 1:] = reached[..., :-1].cumsum(3) > 0  # one of the blocks before has reached the share
    taken = ~before if node.inclusive else ~reached
    if node.unmet == "none":
        taken = taken & reached.any(3, keepdim=True)
    return allowed & (torch.zeros_like(allowed).scatter(3, order, taken) | forced)


def _of_map(node: TopP, mass: Tensor, allowed: Tensor) -> Tensor:
    """Of each head the greatest parts of the map, until their sum, taken one by one, reaches the share."""
    taken = torch.zeros_like(allowed)
    for batch, head in itertools.product(*map(range, mass.shape[:2])):
        places = [place for place in range(mass[0, 0].numel()) if allowed[batch, head].flatten()[place]]
        parts = mass[batch, head].flatten()
        total, held, whole = parts[places].sum(), parts.new_zeros(()), False
        for place in sorted(places, key=lambda place: (-float(parts[place].nan_to_num(nan=float("inf"))), place)):
            held = held + parts[place]
            whole = bool(held >= node.share * total)
            if whole and not node.inclusive:
                break
            taken[batch, head].view(-1)[place] = True
            if whole:
                break
        if not whole:
            taken[batch, head] = node.unmet == "all"
    return taken


def _threshold(run: Evaluation, node: Threshold) -> Tensor:
    scores, allowed, forced = _candidates(run, node)
    height = _mass(node, scores, allowed) if node.scores.is_mass else scores
    return allowed & ((height >= node.least) | forced)


def _given(run: Evaluation, node: Given) -> Tensor:
    given, blocks = run.value(node.x), rows_on(node.axes[3], run.call.k.shape[2])
    lead = (run.call.q.shape[0], *given.shape[1:3])
    if node.is_bitmap:
        run.call.check_bitmap(node, given)
        known = given.bool().expand(*lead, -1)
        missing = known.new_zeros(*lead, blocks - known.shape[3])
        return torch.cat([known, missing], dim=3)
    run.call.check_lists(node, given)
    number = torch.arange(blocks, device=given.device)
    return (given[..., None] == number).any(3).expand(*lead, -1)


def _keys(run: Evaluation, node: ChosenKeys) -> Tensor:
    scores = run.value(node.scores).detach()
    allowed, forced = (_of_keys(run, node, mask, scores) for mask in (node.among, node.forced))
    allowed = torch.ones_like(scores, dtype=torch.bool) if node.among is None else allowed
    forced = forced & allowed
    if node.block > 1:
        return _blocks_of_keys(node, scores, allowed, forced)
    row = torch.where(allowed, scores, NEVER)[:, :, None]
    if node.count is not None:
        rank = _best_first(row, forced[:, :, None]).argsort(dim=3)[:, :, 0]
        return allowed & (rank < node.count)
    assert node.share is not None
    if node.share == 1:  # whether rounded sums reach 1 is a matter of chance
        return allowed
    order = _best_first(row)[:, :, 0]
    mass = torch.where(allowed, scores, 0.0)
    total = mass.sum(2, keepdim=True)
    reached = (mass / torch.where(total > 0, total, 1.0)).gather(2, order).cumsum(2) >= node.share
    before = torch.cat([torch.zeros_like(reached[:, :, :1]), reached[:, :, :-1].cumsum(2) > 0], dim=2)
    taken = ~before if node.inclusive else ~reached
    return allowed & (torch.zeros_like(allowed).scatter(2, order, taken) | forced)


def _blocks_of_keys(node: ChosenKeys, scores: Tensor, allowed: Tensor, forced: Tensor) -> Tensor:
    """Blocks by the sums of their candidates: so many, or as many as the single keys ask for that hold the share."""
    parts = [torch.where(allowed, scores, 0.0), allowed, forced]
    sums, some, first = (torch.stack([part.sum(2) for part in x.split(node.block, dim=2)], dim=2) for x in parts)
    some, first = some > 0, first > 0
    row = torch.where(some, sums, NEVER)[:, :, None]
    if node.count is not None:
        rank = _best_first(row, first[:, :, None]).argsort(dim=3)[:, :, 0]
        return some & (rank < node.count)
    assert node.share is not None
    if node.share == 1:
        return some
    single = _best_first(torch.where(allowed, scores, NEVER)[:, :, None])[:, :, 0]
    total = parts[0].sum(2, keepdim=True)
    held = (parts[0] / torch.where(total > 0, total, 1.0)).gather(2, single).cumsum(2)
    count = ((held < node.share).sum(2, keepdim=True) + int(node.inclusive)) // node.block + 1
    return some & ((_best_first(row, first[:, :, None]).argsort(dim=3)[:, :, 0] < count) | first)


def _divergence(run: Evaluation, node: Divergence) -> Tensor:
    """Term by term; a part of 0 adds nothing."""
    x, y = (run.value(scores).detach() for scores in (node.x, node.y))
    block = max(block_of(scores.axes[2]) for scores in (node.x, node.y))
    sizes = [block_of(scores.axes[2]) for scores in (node.x, node.y)]
    p, r = (
        scores if size == block else torch.stack([part.sum(2) for part in scores.split(block, dim=2)], dim=2)
        for scores, size in zip((x, y), sizes, strict=True)
    )
    heads = max(p.shape[1], r.shape[1])
    p, r = (
        repeat_kv(part / torch.where(part.sum(2, keepdim=True) > 0, part.sum(2, keepdim=True), 1.0), heads) for part in (p, r)
    )
    m = (p + r) / 2
    terms = [torch.where(part > 0, part * (part / m).log(), 0.0).sum(2) for part in (p, r)]
    return ((terms[0] + terms[1]) / 2).clamp(min=0.0).sqrt()


def _of_keys(run: Evaluation, node: ChosenKeys, mask: Mask | None, scores: Tensor) -> Tensor:
    """What a mask says of every key, or distance, for the heads of the scores."""
    if mask is None:
        return torch.zeros_like(scores, dtype=torch.bool)
    number, zero, q = torch.arange(scores.shape[2], device=scores.device), torch.zeros((), dtype=torch.int64), run.call.q
    env: dict[str, Any] = {**run.domain.lengths, **run.call.tables}
    env |= {"q_idx": number, "kv_idx": zero.to(q.device)} if node.of_distances else {"q_idx": zero.to(q.device), "kv_idx": number}
    env["b"] = torch.arange(q.shape[0], device=q.device)[:, None, None]
    env["h"] = torch.arange(q.shape[1], device=q.device)[:, None]
    flags = evaluate(mask.expr, env).expand(*q.shape[:2], scores.shape[2])
    return per_head(flags, run.call.check_heads(node, scores.shape[1]))


CHOICE_RULES: dict[type[Node], Rule] = {
    Order: _order,
    Inverse: _inverse,
    Tokens: _tokens,
    TopK: _top_k,
    TopP: _top_p,
    Threshold: _threshold,
    Given: _given,
    ChosenKeys: _keys,
    Divergence: _divergence,
}
