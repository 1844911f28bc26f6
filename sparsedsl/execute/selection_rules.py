"""The fast way to choose: from scores to lists of blocks, flags of keys, orders and subsets. Never queries x blocks at once."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import sympy
import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.execute.candidate_rules import allowed_blocks, block_rule
from sparsedsl.execute.lowering import Lowering, reads_nodes
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.steps import evaluate
from sparsedsl.program.axes import block_of, rows_on
from sparsedsl.program.branches import Attend
from sparsedsl.program.given_blocks import Given
from sparsedsl.program.key_choices import ChosenKeys, Divergence
from sparsedsl.program.node import Node, reached
from sparsedsl.program.orders import Inverse, Order, Tokens
from sparsedsl.program.scores import Antidiagonal
from sparsedsl.program.select import Choice, Select, Threshold, TopK, TopP, choices_in
from sparsedsl.runtime.heads import repeat_kv
from sparsedsl.runtime.interpreter import Rule
from sparsedsl.selection import choosing, counts, permutations
from sparsedsl.selection.candidates import Candidates, PairRule, Within, any_of_group
from sparsedsl.selection.key_flags import flags_of_best, flags_of_blocks, flags_of_share, in_blocks, shannon_distance
from sparsedsl.selection.listed_candidates import top_k_listed
from sparsedsl.selection.mass import threshold, top_p, top_p_of_map
from sparsedsl.selection.ranking import top_k
from sparsedsl.selection.scores import ScoreSource
from sparsedsl.selection.selected_blocks import KnownScores, SelectedBlocks
from sparsedsl.selection.stable_topk import ascending, compacted

__all__ = ["LISTED_RULES"]

Tensor = torch.Tensor


# ---- keys, orders and subsets ----------------------------------------------------------------------------------------------------


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
    candidates = Candidates() if node.among is None else allowed_blocks(run, node.among, node, source)
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
    candidates = allowed_blocks(run, beside, node, source)
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
        candidates = Candidates() if node.among is None else allowed_blocks(run, node.among, node, source)
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
