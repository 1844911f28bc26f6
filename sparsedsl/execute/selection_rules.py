"""The fast way to choose: scores stay sources that give blocks, choices come out as lists. Never queries x blocks at once."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.nn import functional

from sparsedsl.analysis.caches import Cache
from sparsedsl.execute.candidate_rules import block_rule, candidates_of
from sparsedsl.execute.kept_summaries import Pooling
from sparsedsl.execute.lowering import Lowering, reads_nodes
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.steps import evaluate
from sparsedsl.program.axes import block_of, rows_on, windows_of
from sparsedsl.program.branches import Attend
from sparsedsl.program.decided import possible
from sparsedsl.program.given_blocks import Given
from sparsedsl.program.key_choices import ChosenKeys, Diagonals, Divergence
from sparsedsl.program.node import Node, reached
from sparsedsl.program.orders import Inverse, Order, Tokens
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
from sparsedsl.program.select import Choice, Select, Threshold, TopK, TopP, choices_in
from sparsedsl.runtime.heads import alike, reduced, repeat_kv
from sparsedsl.runtime.interpreter import Rule
from sparsedsl.selection import choosing, counts, permutations, proxies
from sparsedsl.selection.antidiagonals import antidiagonal
from sparsedsl.selection.candidates import Candidates, PairRule, Within, any_of_group
from sparsedsl.selection.composed_scores import BoundScores, GroupedScores, SumScores
from sparsedsl.selection.derived_scores import OverlapScores, RegroupedScores, softmax_scores
from sparsedsl.selection.key_flags import flags_of_best, flags_of_blocks, flags_of_share, in_blocks, shannon_distance
from sparsedsl.selection.listed_candidates import top_k_listed
from sparsedsl.selection.mass import threshold, top_p, top_p_of_map
from sparsedsl.selection.noise import GumbelScores
from sparsedsl.selection.ranking import top_k
from sparsedsl.selection.score_arithmetic import ReluScores, WeightedScores
from sparsedsl.selection.scores import DotScores, ScoreSource, TensorScores
from sparsedsl.selection.selected_blocks import KnownScores, SelectedBlocks
from sparsedsl.selection.stable_topk import ascending, compacted

__all__ = ["LISTED_RULES"]

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
    x, y = run.value(node.x), run.value(node.y)
    pool, scale = run.dispatch.pooler(y), _scale(node.scale, x)

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
    return softmax_scores(source, _allowed(run, node.among, node, source))


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


# ---- key scores, orders and subsets --------------------------------------------------------------------------------------------


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


def _keys(run: Lowering, node: ChosenKeys) -> Tensor:
    scores = run.value(node.scores)
    among, forced = (_of_keys(run, node, mask, scores.shape[1], scores.shape[2]) for mask in (node.among, node.forced))
    if node.block > 1:
        return flags_of_blocks(scores, node.block, among, forced, count=node.count, share=node.share, inclusive=node.inclusive)
    if node.count is not None:
        return flags_of_best(scores, node.count, among, forced)
    assert node.share is not None
    return flags_of_share(scores, node.share, among, forced, inclusive=node.inclusive)


def _divergence(run: Lowering, node: Divergence) -> Tensor:
    x, y = run.value(node.x), run.value(node.y)
    block = max(block_of(scores.axes[2]) for scores in (node.x, node.y))
    x, y = (part if block_of(scores.axes[2]) == block else in_blocks(part, block) for part, scores in ((x, node.x), (y, node.y)))
    heads = max(x.shape[1], y.shape[1])
    return shannon_distance(repeat_kv(x, heads), repeat_kv(y, heads))


def _of_keys(run: Lowering, node: ChosenKeys, mask: Mask | None, heads: int, keys: int) -> Tensor | None:
    """What a mask says of every key, or distance, for so many heads."""
    run.call.check_heads(node, heads)
    if mask is None:
        return None
    domain, device = run.domain, run.call.q.device
    number, zero = torch.arange(keys, device=device), torch.zeros((), dtype=torch.int64, device=device)
    indices = {"q_idx": number, "kv_idx": zero} if node.of_distances else {"q_idx": zero, "kv_idx": number}
    indices |= {
        "b": torch.arange(domain.batch, device=device).view(-1, 1, 1),
        "h": torch.arange(domain.heads, device=device).view(-1, 1),
    }
    flags = evaluate(mask.expr, {**domain.lengths, **domain.tables, **indices})
    return any_of_group(flags.expand(domain.batch, domain.heads, keys), heads)


def _order(run: Lowering, node: Order) -> Tensor:
    return permutations.segment_sort(run.value(node.scores), node.segment, descending=node.descending)


def _inverse(run: Lowering, node: Inverse) -> Tensor:
    return permutations.inverse(run.value(node.order))


def _tokens(run: Lowering, node: Tokens) -> list[Tensor]:
    scores, by, heads = run.value(node.scores), run.value(node.by)[:, 0], run.call.q.shape[1]
    total = scores.shape[2]
    before = max(total - node.always, 0)
    if node.tail is not None:
        count = counts.tail_count(by[:, :before], node.tail, min(node.least, before))
    else:
        count = counts.cover_count(by[:, :before], node.cover, least=min(node.least, before))  # type: ignore[arg-type]
    kept, sizes = permutations.keep_tokens(scores[:, :, :before], count, always=total - before, total=total)
    # Programs on the kept tokens need their number: the one place where a GPU is waited for.
    return [repeat_kv(index[:, :size], heads, dim=0) for index, size in zip(kept, sizes.tolist(), strict=True)]


# ---- choices, as lists -----------------------------------------------------------------------------------------------------------


def _allowed(run: Lowering, mask: Mask, node: Select | Softmax, source: ScoreSource) -> Candidates:
    """The blocks with a pair that a mask allows; of windows those it allows by their number."""
    rows, axis = block_of(node.axes[2]), node.axes[3]
    heads = run.call.check_heads(node, source.shape[1])
    windows = windows_of(axis) is not None
    domain = replace(run.domain, kv_len=max(1, source.shape[3])) if windows else run.domain
    columns, device = 1 if windows else block_of(axis), run.call.q.device
    if not (mask.has_bound and reads_nodes(mask)):
        return candidates_of(mask.expr, domain, rows, columns, heads, device)
    # What choices leave open bounds what is looked at; they themselves are read as tables.
    bounds = candidates_of(possible(mask).expr, domain, rows, columns, heads, device)
    expr, tables = run.concrete(mask.expr, mask.bound)
    own = block_rule(expr, domain, rows, columns, heads, tables, device)
    return replace(bounds, allowed=own)  # the limits of what is possible, and the pairs that are


def _forced(run: Lowering, node: Select, candidates: Candidates, source: ScoreSource) -> PairRule | None:
    if node.forced is None:
        return None
    expr, tables = run.concrete(node.forced.expr, node.forced.bound)
    rule = block_rule(expr, run.domain, *node.blocks, source.shape[1], tables, run.call.q.device)
    if candidates.allowed is None:
        return rule
    return Within(rule, candidates.allowed)


def _choose(run: Lowering, node: Select, choose: Any, *numbers: Any, **words: Any) -> SelectedBlocks:
    source, (q_block, kv_block) = run.value(node.scores), node.blocks
    run.call.check_heads(node, source.shape[1])
    candidates = Candidates() if node.among is None else _allowed(run, node.among, node, source)
    forced, first = _forced(run, node, candidates, source), run.domain.q_offset // q_block
    words["choose"] = run.dispatch.chooser(run.call.q.device, run.call.dtype)
    selected = choose(source, *numbers, candidates, forced=forced, q_block=q_block, kv_block=kv_block, first=first, **words)
    blocks = -(-run.domain.kv_len // kv_block)
    return selected if selected.blocks == blocks else replace(selected, blocks=blocks)


def _inner(node: TopK) -> tuple[Choice, Mask] | None:
    """The choice within whose blocks another one chooses, for single queries, and what its mask of candidates says beside; None where it
    says anything else of choices."""
    if node.among is None or node.blocks[0] != 1 or any(isinstance(part, Antidiagonal) for part in reached(node.scores)):
        return None
    inner = list(choices_in(node.among).values())
    if len(inner) != 1 or inner[0].blocks[0] != 1 or inner[0].blocks[1] % node.blocks[1]:
        return None
    own, parts = inner[0].as_expression().expr, sympy.And.make_args(node.among.expr)
    rest = Mask(sympy.And(*(part for part in parts if part != own)), node.among.bound)
    return None if own not in parts or reads_nodes(rest) else (inner[0], rest)


def _top_k_within(run: Lowering, node: TopK, inner: Choice, beside: Mask) -> SelectedBlocks | None:
    """Scores of the blocks that lie in those of another choice alone; None where heads that share a choice follow different ones."""
    source, lists, kv_len = run.value(node.scores), run.value(inner), run.domain.kv_len
    if source.shape[1] % lists.indices.shape[1]:
        return None
    candidates = _allowed(run, beside, node, source)
    forced = _forced(run, node, candidates, source)
    fine = lists if inner.blocks[1] == node.blocks[1] else lists.finer(node.blocks[1], kv_len)
    found = top_k_listed(source, node.count, fine, candidates, forced=forced, extra=node.extra and forced is not None)
    return replace(found, blocks=rows_on(node.axes[3], kv_len))


def _top_k(run: Lowering, node: TopK) -> SelectedBlocks:
    inner = _inner(node)
    within = None if inner is None else _top_k_within(run, node, *inner)
    if within is not None:
        return within
    extra = run.value(node.scores).shape[3] if node.extra and node.forced is not None else None
    if run.keeps and not any(mask is not None and reads_nodes(mask) for mask in (node.among, node.forced)):
        choose = run.dispatch.chooser(run.call.q.device, run.call.dtype)
        if choose is not None:
            weighed = any(isinstance(n, Attend) and n.normaliser is not None for n in run.call.program.order)
            run.shortcuts[node] = functools.partial(_top_k_again, node, choose, weighed, Cache())
    return _choose(run, node, top_k, node.count, forced_extra=extra)


@functools.lru_cache(maxsize=256)
def _rule(count: int, extra: bool, scores: bool) -> choosing.Rule:
    return choosing.Rule("top_k", count, extra=extra, scores=scores)


def _top_k_again(node: TopK, choose: choosing.Choose, weighed: bool, known: Cache[Any], run: Lowering) -> SelectedBlocks | None:
    """The pass alone. ``weighed``: somebody may read the scores; ``known``: candidates and what is forced, by lengths."""
    source, domain = run.value(node.scores), run.domain
    _, _, rows, blocks = source.shape

    def find() -> tuple[Candidates, PairRule | None]:
        candidates = Candidates() if node.among is None else _allowed(run, node.among, node, source)
        return candidates, _forced(run, node, candidates, source)

    # One query's are found at once, and change with every step of decoding.
    candidates, forced = find() if domain.rows == 1 else known.get((domain.kv_len, domain.q_offset), (), find)
    extra = node.extra and node.forced is not None
    count = min(node.count, blocks)
    width, (q_block, kv_block) = count + blocks if extra else count, node.blocks
    found = choose(source, candidates, forced, _rule(count, extra, weighed), slice(0, rows), 0, width)
    if found is None:
        return None
    lists, counts, values = found
    scores = None if values is None else KnownScores(source, values)
    return SelectedBlocks(lists, counts, q_block, kv_block, -(-domain.kv_len // kv_block), domain.q_offset // q_block, scores)


def _top_p(run: Lowering, node: TopP) -> SelectedBlocks:
    measure = "share" if node.scores.is_mass else "softmax"
    words = {"inclusive": node.inclusive, "unmet": node.unmet}
    if node.over == "map":
        return _choose(run, node, top_p_of_map, node.share, measure=measure, **words)
    words["forced_in_mass"] = node.forced_in_mass
    return _choose(run, node, top_p, node.share, measure=measure, **words)


def _threshold(run: Lowering, node: Threshold) -> SelectedBlocks:
    return _choose(run, node, threshold, node.least, measure="share" if node.scores.is_mass else "score")


def _given(run: Lowering, node: Given) -> SelectedBlocks:
    given, domain, (q_block, kv_block) = run.value(node.x), run.domain, node.blocks
    blocks, first = rows_on(node.axes[3], domain.kv_len), domain.q_offset // q_block
    run.call.check_heads(node, given.shape[1])
    if node.is_bitmap:
        run.call.check_bitmap(node, given)
        counts = given.sum(-1, dtype=torch.int32)
        # On a GPU, where to read a length is to wait, lists are as wide as there are blocks.
        width = int(counts.max()) if counts.numel() and not counts.is_cuda else given.shape[3]
        return SelectedBlocks(compacted(given, width), counts, q_block, kv_block, blocks, first)
    run.call.check_lists(node, given)
    lists, counts = ascending(given, given >= 0)
    return SelectedBlocks(lists, counts, q_block, kv_block, blocks, first)


LISTED_RULES: dict[type[Node], Rule] = {
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
    ChosenKeys: _keys,
    Divergence: _divergence,
    Order: _order,
    Inverse: _inverse,
    Tokens: _tokens,
    TopK: _top_k,
    TopP: _top_p,
    Threshold: _threshold,
    Given: _given,
}
