"""Tensors and scores as they are meant: dense, in plain torch, differentiable.

Scores are ``(batch, heads, blocks of queries, blocks of keys)``, -inf where an input lacks a block; key scores ``(batch, heads, keys)``.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from sparsedsl.backends.reference.masks import blocks
from sparsedsl.backends.reference.tensor_rules import NEVER, gumbel_noise, joined_heads, of_one_size, per_head, pooled, softmax
from sparsedsl.program.axes import block_of, rows_on, windows_of
from sparsedsl.program.key_choices import Diagonals
from sparsedsl.program.node import Node, reached
from sparsedsl.program.orders import Take
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
    Scores,
    Smooth,
    Softmax,
    Weighted,
)
from sparsedsl.program.tensors import Input, Summary
from sparsedsl.runtime.interpreter import Evaluation, Rule

__all__ = ["SCORE_RULES"]

Tensor = torch.Tensor


def _input(run: Evaluation, node: Input) -> Tensor:
    """In the type that is computed in."""
    if node not in run.call.inputs:
        assert node.default is not None
        return run.value(node.default)
    x = run.call.inputs[node]
    return x.to(run.call.dtype) if x.is_floating_point() else x


def _summary(run: Evaluation, node: Summary) -> Tensor:
    x = run.value(node.x)
    if node.stride is None:
        return pooled(x, node.block, node.how, node.pad)
    windows = [pooled(x[:, :, n : n + node.block], node.block, node.how, "valid") for n in _windows(run, node.axes[2])]
    return torch.cat(windows, dim=2) if windows else x[:, :, :0]


def _windows(run: Evaluation, axis: str) -> range:
    """First keys of the complete windows of an axis."""
    length, stride = windows_of(axis) or (1, 1)
    return range(0, run.call.k.shape[2] - length + 1, stride)


def _take(run: Evaluation, node: Take) -> Tensor:
    x, order = of_one_size(run.value(node.x), run.value(node.order))
    return torch.stack(
        [torch.stack([rows[place] for rows, place in zip(*entry, strict=True)]) for entry in zip(x, order, strict=True)]
    )


# ---- scores ------------------------------------------------------------------------------------------------------------------


def _scale(scale: float | None, x: Tensor) -> float:
    return x.shape[-1] ** -0.5 if scale is None else scale


def _dot(run: Evaluation, node: Dot) -> Tensor:
    x, y = of_one_size(run.value(node.x), run.value(node.y))
    return _whole_rows(run, node, x @ y.transpose(-1, -2) * _scale(node.scale, x))


def _whole_rows(run: Evaluation, node: Scores, scores: Tensor) -> Tensor:
    """With a column for each block of keys: an input may lack the last, ragged one, which then is no candidate."""
    wanted = rows_on(node.axes[3], run.call.k.shape[2])
    return functional.pad(scores, (0, wanted - scores.shape[3]), value=NEVER)


def _bound(run: Evaluation, node: Bound) -> Tensor:
    x, y = of_one_size(run.value(node.x), run.value(node.y))
    low, high = pooled(y, node.block, "min", "valid"), pooled(y, node.block, "max", "valid")
    best = torch.maximum(x[:, :, :, None] * low[:, :, None], x[:, :, :, None] * high[:, :, None])
    return _whole_rows(run, node, best.sum(-1) * _scale(node.scale, x))


def _antidiagonal(run: Evaluation, node: Antidiagonal) -> Tensor:
    x, y = of_one_size(run.value(node.x), run.value(node.y))
    stride, cells = node.stride, node.block // node.stride
    queries, keys = x.shape[2], y.shape[2]
    x, y = (functional.pad(t, (0, 0, 0, -t.shape[2] % node.block)) for t in (x, y))
    sums = [x[:, :, stride - 1 - i :: stride] @ y[:, :, i::stride].transpose(-1, -2) for i in range(stride)]
    logits = torch.stack(sums).sum(0) * (_scale(None, x) / stride)
    row, column = torch.arange(x.shape[2] // stride, device=x.device), torch.arange(y.shape[2] // stride, device=x.device)
    real = (row * stride < queries)[:, None] & (column * stride < keys)
    seen = real & (column <= row[:, None] + run.call.q_offset // stride)
    mass = softmax(torch.where(seen, logits, NEVER))
    return mass.unflatten(3, (-1, cells)).sum(4).unflatten(2, (-1, cells)).sum(3)


def _softmax(run: Evaluation, node: Softmax) -> Tensor:
    scores = run.value(node.scores)
    allowed = per_head(blocks(run, node.among, node), run.call.check_heads(node, scores.shape[1]))
    # A block that an input lacks is no block, and not one of mass 0.
    return torch.where(scores == NEVER, NEVER, softmax(torch.where(allowed, scores, NEVER)))


def _regroup(run: Evaluation, node: Regroup) -> Tensor:
    joined = []
    for part in run.value(node.scores).split(node.block, dim=3):
        here = part != NEVER
        total, count = torch.where(here, part, 0.0).sum(3), here.sum(3)
        how = {"sum": total, "mean": total / count.clamp(min=1), "max": part.amax(3)}[node.how]
        joined.append(torch.where(count == 0, NEVER, how))
    return torch.stack(joined, dim=3)


def _plus(run: Evaluation, node: Plus) -> Tensor:
    first, second = of_one_size(run.value(node.first), run.value(node.second))
    return first + second


def _relu(run: Evaluation, node: Relu) -> Tensor:
    scores = run.value(node.x)
    # A block that an input lacks is no block, and not one of score 0.
    return torch.where((scores < 0) & (scores != NEVER), 0.0, scores)


def _scaled(run: Evaluation, node: Scaled) -> Tensor:
    scores = run.value(node.x)
    return torch.where(scores == NEVER, NEVER, node.factor * torch.where(scores == NEVER, 0.0, scores) + node.offset)


def _weighted(run: Evaluation, node: Weighted) -> Tensor:
    scores, by = of_one_size(run.value(node.x), run.value(node.by))
    return torch.where(scores == NEVER, NEVER, by[..., None] * torch.where(scores == NEVER, 0.0, scores))


def _overlap(run: Evaluation, node: Overlap) -> Tensor:
    mass, keys = run.value(node.x), run.call.k.shape[2]
    length, stride = windows_of(node.x.axes[3]) or (1, 1)
    blocks = []
    for start in range(0, keys, node.block):
        found = torch.zeros_like(mass[..., :1].sum(3))
        for window, first in enumerate(_windows(run, node.x.axes[3])):
            shared = min(start + node.block, first + length) - max(start, first)
            if shared > 0:
                part = mass[..., window]
                found = found + shared // stride * part if node.how == "strips" else torch.maximum(found, part)
        blocks.append(found)
    return torch.stack(blocks, dim=3)


def _given_scores(run: Evaluation, node: GivenScores) -> Tensor:
    scores = run.value(node.x).to(run.call.dtype)
    run.call.check_scores(node, scores)
    batch = torch.zeros(run.call.q.shape[0], 1, 1, 1, dtype=scores.dtype, device=scores.device)
    return _whole_rows(run, node, scores + batch)


def _given_key_scores(run: Evaluation, node: GivenKeyScores) -> Tensor:
    scores = run.value(node.x).to(run.call.dtype)
    run.call.check_key_scores(node, scores)
    return scores + torch.zeros(run.call.q.shape[0], 1, 1, dtype=scores.dtype, device=scores.device)


def _gumbel(run: Evaluation, node: Gumbel) -> Tensor:
    scores = run.value(node.scores)
    first = run.call.q_offset // block_of(node.axes[2])
    return scores + gumbel_noise(tuple(scores.shape), run.value(node.seed), first, scores.device).to(scores.dtype)


def _grouped(run: Evaluation, node: Grouped | GroupedKeys) -> Tensor:
    return joined_heads(run.value(node.x), run.call.k.shape[1] if node.heads == "kv_heads" else 1, node.how)


# ---- key scores ----------------------------------------------------------------------------------------------------------------


def _probe(run: Evaluation, node: Probe) -> Tensor:
    x, y = of_one_size(run.value(node.x), run.value(node.y))
    if node.pooled is not None:
        means = torch.stack([part.mean(2) for part in y.split(node.pooled, dim=2)], dim=2)
        return softmax((means @ x[:, :, -node.rows :].mean(2)[..., None])[..., 0] * _scale(node.scale, x))
    key = torch.arange(y.shape[2], device=x.device)
    position = run.call.q_offset + torch.arange(x.shape[2], device=x.device)[-node.rows :, None]
    seen = key < y.shape[2] // node.complete * node.complete
    seen = seen & (key <= position) if node.causal else seen.expand(len(position), -1)
    logits = x[:, :, -node.rows :] @ y.transpose(-1, -2) * _scale(node.scale, x)
    mass = softmax(torch.where(seen, logits, NEVER)).mean(2)
    return torch.where(key < position[0], mass, 0.0) if node.keep == "before" else mass


def _smooth(run: Evaluation, node: Smooth) -> Tensor:
    x, reach = run.value(node.x), node.pool // 2
    ends = _scored_keys(run, node)
    kept, rest = x[:, :, :ends], x[:, :, ends:]
    padded = functional.pad(kept, (reach, reach))
    neighbours = torch.stack([padded[:, :, i : i + kept.shape[2]] for i in range(node.pool)])
    joined = neighbours.sum(0) / node.pool if node.how == "mean" else neighbours.amax(0)
    return torch.cat([joined, rest], dim=2)


def _diagonals(run: Evaluation, node: Diagonals) -> Tensor:
    x, y = of_one_size(run.value(node.x), run.value(node.y))
    first = run.call.q_offset + max(0, x.shape[2] - node.rows)
    keys, found = y.shape[2], torch.zeros_like(x[:, :, :1, 0]).expand(-1, -1, y.shape[2]).clone()
    for number, row in enumerate(x[:, :, -node.rows :].unbind(2)):
        seen = min(first + number + 1, keys)
        mass = softmax((y[:, :, :seen] @ row[..., None])[..., 0] * _scale(node.scale, x))
        apart = first + number - torch.arange(seen, device=x.device)
        for key in range(seen):
            if int(apart[key]) < keys:
                found[:, :, int(apart[key])] += mass[:, :, key]
    return found / min(node.rows, x.shape[2])


def _scored_keys(run: Evaluation, node: KeyScores) -> int:
    """How many keys have scores: all, or those before the rows that probe."""
    queries, keys = run.call.q.shape[2], run.call.k.shape[2]
    probe = next((part for part in reached(node) if isinstance(part, Probe)), None)
    if probe is None or probe.keep != "before":
        return keys
    return min(keys, run.call.q_offset + queries - min(probe.rows, queries))


SCORE_RULES: dict[type[Node], Rule] = {
    Input: _input,
    Summary: _summary,
    Take: _take,
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
    GroupedKeys: _grouped,
    Probe: _probe,
    Diagonals: _diagonals,
    Smooth: _smooth,
}
