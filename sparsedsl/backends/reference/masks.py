"""Masks and scores of a program as they are meant: evaluated at every pair, with what nodes give as tables."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional

from sparsedsl.backends.reference.tensor_rules import repeat_kv
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.expressions import Mask, Score
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.tables import read_class, table_reads
from sparsedsl.program.axes import block_of, rows_on, windows_of
from sparsedsl.program.node import Node
from sparsedsl.runtime.interpreter import Evaluation

__all__ = ["blocks", "concrete_pattern", "pairs"]

Tensor = torch.Tensor


def concrete_pattern(run: Evaluation, pattern: Pattern) -> tuple[Pattern, dict[str, Tensor]]:
    """A pattern whose reads of nodes are reads of tables, and all tables it reads."""
    (mask, masks), (score, scores) = _concrete(run, pattern.mask), _concrete(run, pattern.score)
    made = replace(pattern, mask=Mask(mask), score=Score(score), causal=False)
    tables = {**run.call.tables, **masks, **scores}
    return made, {name: tables[name] for name in made.tables}


def _concrete(run: Evaluation, part: Any) -> tuple[Any, dict[str, Tensor]]:
    """An expression, and the tables of the nodes it reads: ``(B, heads, ..)``. Rows of a table begin with the call's first block."""
    tables = {name: node for name, node in part.bound.items() if isinstance(node, Node) and name in part.tables}
    counted = {}
    for read in table_reads(part.expr):
        node = tables.get(read.spec.name)
        if node is not None and len(read.args) == 4:
            first = run.call.q_offset // block_of(node.axes[2])
            entry, head, row, column = read.args
            counted[read] = read_class(read.spec)(entry, head, row - first, column)
    heads = run.call.q.shape[1]
    return part.expr.xreplace(counted), {name: repeat_kv(run.value(node), heads) for name, node in tables.items()}


def pairs(run: Evaluation, mask: Mask) -> Tensor:
    """The mask at every pair: ``(batch, heads, queries, keys)``."""
    expr, env = _at_pairs(run, mask)
    return evaluate(expr, env).expand(*run.call.q.shape[:3], run.call.k.shape[2])


def _at_rows(run: Evaluation, mask: Mask, rows: int) -> Tensor:
    """The mask where ``kv_idx`` counts so many rows: ``(batch, heads, queries, rows)``."""
    expr, env = _at_pairs(run, mask)
    env |= {"kv_idx": torch.arange(rows, device=run.call.q.device), "kv_len": rows}
    return evaluate(expr, env).expand(*run.call.q.shape[:3], rows)


def modified(run: Evaluation, score: Score, logits: Tensor) -> Tensor:
    """What a score makes of logits ``(batch, heads, queries, keys)``."""
    expr, env = _at_pairs(run, score)
    return evaluate(expr, {**env, "score": logits}, dtype=logits.dtype).to(logits.dtype).expand(logits.shape)


def _at_pairs(run: Evaluation, part: Mask | Score) -> tuple[Any, dict[str, Any]]:
    """An expression, and the values of what it reads at every pair."""
    q, keys, device = run.call.q, run.call.k.shape[2], run.call.q.device
    expr, tables = _concrete(run, part)
    env: dict[str, Any] = {**run.domain.lengths, **run.call.tables, **tables}
    env["b"] = torch.arange(q.shape[0], device=device)[:, None, None, None]
    env["h"] = torch.arange(q.shape[1], device=device)[:, None, None]
    env["q_idx"] = run.call.q_offset + torch.arange(q.shape[2], device=device)[:, None]
    env["kv_idx"] = torch.arange(keys, device=device)
    return expr, env


def blocks(run: Evaluation, mask: Mask, node: Any) -> Tensor:
    """Which (block of queries, block of keys) of a node hold a pair that the mask allows: ``(batch, heads, blocks, blocks)``."""
    windows = windows_of(node.axes[3])
    rows, columns = block_of(node.axes[2]), 1 if windows else block_of(node.axes[3])
    allowed = _at_rows(run, mask, rows_on(node.axes[3], run.call.k.shape[2])) if windows else pairs(run, mask)
    allowed = functional.pad(allowed, (0, -allowed.shape[3] % columns, 0, -allowed.shape[2] % rows))
    return allowed.unflatten(3, (allowed.shape[3] // columns, columns)).any(4).unflatten(2, (-1, rows)).any(3)
