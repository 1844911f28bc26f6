"""The fast way to scores: those of blocks stay sources that give some blocks at a time, those of keys are tensors."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.nn import functional

from sparsedsl.execute.candidate_rules import allowed_blocks
from sparsedsl.execute.kept_summaries import Pooling
from sparsedsl.execute.lowering import Lowering
from sparsedsl.program.axes import block_of, rows_on, windows_of
from sparsedsl.program.key_choices import Diagonals
from sparsedsl.program.node import Node, reached
from sparsedsl.program.scores import (
    Antidiagonal,
    Bound,
    Dot,
    GivenKeyScores,
    GivenScores,
    Grouped,
    GroupedKeys,
    Gumbel,
    KeyScores,
    Overlap,
    Plus,
    Probe,
    Regroup,
    Relu,
    Scaled,
    Smooth,
    Softmax,
    Weighted,
)
from sparsedsl.runtime.heads import alike, reduced
from sparsedsl.runtime.interpreter import Rule
from sparsedsl.selection import proxies
from sparsedsl.selection.antidiagonals import antidiagonal
from sparsedsl.selection.composed_scores import BoundScores, GroupedScores, SumScores
from sparsedsl.selection.derived_scores import OverlapScores, RegroupedScores, softmax_scores
from sparsedsl.selection.noise import GumbelScores
from sparsedsl.selection.score_arithmetic import ReluScores, WeightedScores
from sparsedsl.selection.scores import DotScores, ScoreSource, TensorScores

__all__ = ["SCORE_RULES"]

Tensor = torch.Tensor


# ---- scores, as sources --------------------------------------------------------------------------------------------------------


def _scale(scale: float | None, x: Tensor) -> float:
    """A scale, or the usual one for rows like these."""
    return x.shape[-1] ** -0.5 if scale is None else scale


def _dot(run: Lowering, node: Dot) -> ScoreSource:
    x, y = alike(run.value(node.x), run.value(node.y))
    found = DotScores(x, y, _scale(node.scale, x))
    if run.keeps:
        run.shortcuts[node] = functools.partial(_dot_again, node, found.scale, found.dtype)
    return found


def _dot_again(node: Dot, scale: float, dtype: torch.dtype, run: Lowering) -> ScoreSource:
    x, y = run.value(node.x), run.value(node.y)
    if x.dtype is not y.dtype:
        x, y = alike(x, y)
    return DotScores.known(x, y, scale, dtype)


def _bound(run: Lowering, node: Bound) -> ScoreSource:
    x = run.value(node.x)
    pool, scale = run.dispatch.pooler(run.shaped(node.y)), _scale(node.scale, x)

    def make(y: Tensor) -> Tensor:
        found = None if pool is None else pool(y, node.block, "bounds", "valid")
        return torch.stack(proxies.bounds(y, node.block)) if found is None else found

    low, high = run.pooled(node, node.y, make)
    made = BoundScores(x, low, high, scale)
    if run.keeps and pool is not None:
        run.shortcuts[node] = functools.partial(_bound_again, node, make, scale, made.dtype)
    return made


def _bound_again(node: Bound, make: Pooling, scale: float, dtype: torch.dtype, run: Lowering) -> ScoreSource:
    low, high = run.pooled(node, node.y, make)
    return BoundScores.known(run.value(node.x), low, high, scale, dtype)


def _antidiagonal(run: Lowering, node: Antidiagonal) -> ScoreSource:
    x, y = run.value(node.x), run.value(node.y)
    return antidiagonal(x, y, stride=node.stride, block=node.block, q_offset=run.domain.q_offset)


def _softmax(run: Lowering, node: Softmax) -> ScoreSource:
    source = run.value(node.scores)
    return softmax_scores(source, allowed_blocks(run, node.among, node, source))


def _regroup(run: Lowering, node: Regroup) -> ScoreSource:
    return RegroupedScores(run.value(node.scores), node.block, node.how)


def _plus(run: Lowering, node: Plus) -> ScoreSource:
    sources = [run.value(node.first), run.value(node.second)]
    blocks = min(source.shape[3] for source in sources)  # an input may lack the last, ragged block, which then is no candidate
    rows = slice(0, sources[0].shape[2])
    return SumScores(tuple(s if s.shape[3] == blocks else s.narrowed(rows, slice(0, blocks)) for s in sources))


def _relu(run: Lowering, node: Relu) -> ScoreSource:
    return ReluScores(run.value(node.x))


def _scaled(run: Lowering, node: Scaled) -> ScoreSource:
    source = run.value(node.x)
    if not node.offset:
        return SumScores((source,), (node.factor,))
    offset = torch.full((1, 1, 1, 1), node.offset, dtype=source.dtype, device=source.device)
    return SumScores((source, TensorScores(offset)), (node.factor, 1.0))


def _weighted(run: Lowering, node: Weighted) -> ScoreSource:
    source, by = run.value(node.x), run.value(node.by)
    return WeightedScores(source, by.expand(source.shape[0], -1, -1)[..., None])


def _overlap(run: Lowering, node: Overlap) -> ScoreSource:
    length, stride = windows_of(node.x.axes[3]) or (1, 1)
    blocks = rows_on(node.axes[3], run.domain.kv_len)
    return OverlapScores(run.value(node.x), length // stride, node.block // stride, node.how, blocks)


def _given_scores(run: Lowering, node: GivenScores) -> ScoreSource:
    scores = run.value(node.x)
    run.call.check_scores(node, scores)
    return TensorScores(scores.expand(run.domain.batch, -1, -1, -1))


def _given_key_scores(run: Lowering, node: GivenKeyScores) -> Tensor:
    scores = run.value(node.x)
    run.call.check_key_scores(node, scores)
    return scores.to(run.call.dtype).expand(run.domain.batch, -1, -1)


def _gumbel(run: Lowering, node: Gumbel) -> ScoreSource:
    """Noise depends on the seed and its place alone: it is the same wherever a call begins."""
    source = run.value(node.scores)
    first = run.domain.q_offset // block_of(node.axes[2])
    noise = GumbelScores(source.shape, run.value(node.seed).long(), run.call.q.device, first_row=first)
    return SumScores((source, noise))


def _heads(run: Lowering, node: Grouped | GroupedKeys) -> int:
    return run.call.k.shape[1] if node.heads == "kv_heads" else 1


def _grouped(run: Lowering, node: Grouped) -> ScoreSource:
    return GroupedScores(run.value(node.x), _heads(run, node), node.how)  # type: ignore[arg-type]


# ---- key scores --------------------------------------------------------------------------------------------


def _grouped_keys(run: Lowering, node: GroupedKeys) -> Tensor:
    return reduced(run.value(node.x), _heads(run, node), node.how)


def _probe(run: Lowering, node: Probe) -> Tensor:
    x, y = run.value(node.x), run.value(node.y)
    if node.pooled is not None:
        return proxies.estimate(x, y, rows=node.rows, block=node.pooled, scale=_scale(node.scale, x))
    keys, rows = y.shape[2], min(node.rows, x.shape[2])
    normalised = keys // node.complete * node.complete
    kept = min(run.domain.q_offset + x.shape[2] - rows, normalised) if node.keep == "before" else normalised
    words: dict[str, Any] = {
        "rows": rows, "causal": node.causal, "scale": _scale(node.scale, x), "keys_normalised": normalised, "keys_kept": kept,
        "q_offset": run.domain.q_offset,
    }  # fmt: skip
    prober = run.dispatch.prober(x, y)
    found = None if prober is None else prober(x, y, **words, length=keys)
    return functional.pad(proxies.probe(x, y, **words), (0, keys - kept)) if found is None else found


def _smooth(run: Lowering, node: Smooth) -> Tensor:
    x = run.value(node.x)
    kept = x.shape[2] - _probing(run, node)
    return functional.pad(proxies.smooth(x[:, :, :kept], node.pool, node.how), (0, x.shape[2] - kept))  # type: ignore[arg-type]


def _probing(run: Lowering, node: KeyScores) -> int:
    """Keys from the first probing row on, if scores end before it."""
    probe = next((part for part in reached(node) if isinstance(part, Probe)), None)
    if probe is None or probe.keep != "before":
        return 0
    first = run.domain.q_offset + run.domain.rows - min(probe.rows, run.domain.rows)
    return max(run.domain.kv_len - first, 0)


def _diagonals(run: Lowering, node: Diagonals) -> Tensor:
    x, y = run.value(node.x), run.value(node.y)
    return proxies.by_distance(x, y, rows=node.rows, scale=_scale(node.scale, x), q_offset=run.domain.q_offset)


SCORE_RULES: dict[type[Node], Rule] = {
    Dot: _dot,
    Bound: _bound,
    Antidiagonal: _antidiagonal,
    Softmax: _softmax,
    Regroup: _regroup,
    Plus: _plus,
    Relu: _relu,
    Scaled: _scaled,
    Weighted: _weighted,
    Overlap: _overlap,
    GivenScores: _given_scores,
    GivenKeyScores: _given_key_scores,
    Gumbel: _gumbel,
    Grouped: _grouped,
    GroupedKeys: _grouped_keys,
    Probe: _probe,
    Smooth: _smooth,
    Diagonals: _diagonals,
}
