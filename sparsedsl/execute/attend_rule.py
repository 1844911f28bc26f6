"""Attention of a program by kernels: along lists of what was chosen, over full tiles, or over tables; whatever a backend has for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch

from sparsedsl.backends.tiled.whole_blocks import WholeTiles, split, whole_tiles
from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.execute.candidates import unit_rule
from sparsedsl.execute.lowering import Lowering
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.lang.symbols import SCORE
from sparsedsl.program.branches import Attend
from sparsedsl.program.decided import assume, pairs_decided_by
from sparsedsl.program.node import Node
from sparsedsl.program.select import Select
from sparsedsl.runtime.autograd import differentiable
from sparsedsl.runtime.call import check_call
from sparsedsl.runtime.heads import alike, merged, spread
from sparsedsl.runtime.sinks import sink_logit
from sparsedsl.selection.selected_scores import picked_scores
from sparsedsl.selection.weights import weights_of

__all__ = ["attend_node"]

Tensor = torch.Tensor
# Output, and LSE where it is wanted.
Result = tuple[Tensor, Tensor | None]
# Tokens in the smallest tile that is worth a product of its own.
SMALLEST_TILE = 16


def attend_node(run: Lowering, node: Attend) -> Any:
    """``(out, lse)`` of an attend node; the LSE is None where nobody reads it."""
    q, k, v = alike(*(run.value(x) for x in (node.x, node.y, node.z)))
    if q.shape[1] % k.shape[1]:
        raise ShapeError(f"attend(): {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    choices = [s for s in node.selections if s.units[0] == 1]
    if node.normaliser is not None:
        return _per_chunk_of_picks(run, node, q, k, v)
    if not choices or run.kernels.whole_tables:
        return _by_tables(run, node, q, k, v)
    return _by_lists(run, node, choices, q, k, v)


def _by_tables(run: Lowering, node: Attend, q: Tensor, k: Tensor, v: Tensor) -> Result:
    """Choices for blocks of queries, and orders, as tables of an ordinary pattern."""
    pattern, tables = run.concrete_pattern(node.pattern)
    units = {choice.units for choice in node.selections}
    if run.kernels.whole_tiles and len(units) == 1:
        found = _by_blocks(run, pattern, *units.pop(), q, k, v, tables)
        if found is not None:
            return found
    scale, wanted = run.call.scale, node in run.weighed
    return run.kernels.attend(pattern, q, k, v, tables, q_offset=run.domain.q_offset, scale=scale, lse=wanted)


def _by_blocks(
    run: Lowering, pattern: Pattern, q_unit: int, kv_unit: int, q: Tensor, k: Tensor, v: Tensor, tables: dict[str, Tensor]
) -> Result | None:
    """What is the same for all pairs of two blocks as full tiles, the rest as an ordinary mask, one softmax over both."""
    parts = split(pattern.mask.expr, q_unit, kv_unit)
    if parts is None or min(q_unit, kv_unit) < SMALLEST_TILE:
        return None
    whole = Pattern(Mask(parts[0]), pattern.score, None, pattern.scale)
    domain = replace(run.domain, tables={name: tables[name] for name in whole.tables})
    rule = unit_rule(parts[0], domain, q_unit, kv_unit, run.domain.heads, {}, q.device)
    lists = whole_tiles(rule, domain, run.domain.heads, q_unit, kv_unit)
    call = check_call(whole, q, k, v, domain.tables, q_offset=run.domain.q_offset, scale=run.call.scale)
    found: list[Any] = [differentiable(WholeTiles(whole, lists), call)]
    if parts[1] != sympy.false or pattern.sink is not None:
        rest = Pattern(Mask(parts[1]), pattern.score, pattern.sink, pattern.scale)
        own = {name: tables[name] for name in rest.tables}
        found.append(run.kernels.attend(rest, q, k, v, own, q_offset=run.domain.q_offset, scale=run.call.scale, lse=True))
    return found[0] if len(found) == 1 else merged(found)


def _by_lists(run: Lowering, node: Attend, choices: list[Select], q: Tensor, k: Tensor, v: Tensor) -> Result:
    """Choices for single queries: what attends in any case by itself, what a choice adds along its lists, one softmax over both."""
    mask, score = node.pattern.mask, node.pattern.score
    dynamic = [name for name, bound in mask.bound.items() if isinstance(bound, Node)]
    beside = [name for name in dynamic if name != choices[0].label]
    added, removed = pairs_decided_by(mask, dynamic[0])
    lacks = [
        f"a choice for single queries, {choices[0].label}, beside {' and '.join(beside)} in one mask" if beside else "",
        "a modified score beside a choice for single queries" if score.expr != SCORE else "",
        "pairs that attend where nothing was chosen" if removed.expr != sympy.false else "",
    ]
    if any(lacks):
        raise UnsupportedError(
            f"backend {run.kernels.backend!r} has no lists for {' and '.join(filter(None, lacks))}: "
            f"{node.pattern.text.splitlines()[-1]}. Use backend='reference' or 'flex', which read choices as tables; choose for "
            "blocks of queries, by summaries of them; or, of two choices, choose once, by the sum of the scores"
        )
    always = Mask(assume(mask.expr, {dynamic[0]: False}))
    parts: list[Any] = []
    if always.expr != sympy.false:
        plain = Pattern(always, score, None, node.pattern.scale)
        given = {name: run.call.tables[name] for name in plain.tables}
        parts.append(run.kernels.attend(plain, q, k, v, given, q_offset=run.domain.q_offset, scale=run.call.scale, lse=True))
    parts.append(_picked(run, node, choices[0], q, k, v, added.expr))
    if node.pattern.sink is not None:
        call = check_call(attend(True), q, k, v, {}, q_offset=run.domain.q_offset)
        logit = sink_logit(node.pattern, call, run.call.tables, run.call.dtype)
        parts.append((torch.zeros_like(parts[0][0]), logit))
    return parts[0] if len(parts) == 1 else merged(parts)


def _picked(
    run: Lowering,
    node: Attend,
    choice: Select,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inside: Any,
    weights: Tensor | None = None,
    one: bool = False,
) -> Result:
    scale = run.scale(node.pattern.scale, q)
    picks = run.value(choice)
    needed = run.kernels.inside(inside, choice, run.domain, q.device)
    return run.kernels.picked(q, k, v, picks, scale=scale, q_offset=run.domain.q_offset, inside=needed, weights=weights, one=one)


def _per_chunk_of_picks(run: Lowering, node: Attend, q: Tensor, k: Tensor, v: Tensor) -> Result:
    rule = node.normaliser
    assert rule is not None
    if node.pattern.has_score:
        raise UnsupportedError("per_chunk() takes logits as they are; leave score= out, or use one softmax over all")
    picks, source = run.value(rule.picks), run.value(rule.scores)
    weights, log_total = weights_of(picked_scores(source, picks), rule.weights)  # type: ignore[arg-type]
    name = next(name for name, bound in node.pattern.mask.bound.items() if bound is rule.picks)
    inside = assume(node.pattern.mask.expr, {name: True})
    if run.kernels.whole_tables:
        scale = run.scale(node.pattern.scale, q)
        one = rule.inner == "softmax1"
        out = run.kernels.two_passes(
            q, k, v, picks, weights, inside, scale=scale, q_offset=run.domain.q_offset, one=one, tables=run.call.tables
        )
        return out, spread(log_total, q.shape[1])
    out, _ = _picked(run, node, rule.picks, q, k, v, inside, weights, rule.inner == "softmax1")
    return out, spread(log_total, q.shape[1])
