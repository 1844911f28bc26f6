"""From a mask to the blocks each row may choose: limits and a rule, without looking at every pair where intervals say it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch

from sparsedsl.analysis.block_masks import constant_in_blocks
from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.key_intervals import interval_rows, intervals, keys_of_one_query
from sparsedsl.execute.lowering import Lowering, reads_nodes
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.program.axes import block_of, windows_of
from sparsedsl.program.decided import possible
from sparsedsl.program.scores import Softmax
from sparsedsl.program.select import Select
from sparsedsl.runtime.torch_modes import is_transformed
from sparsedsl.selection.candidates import Candidates, IntervalRule, PairRule, any_of_group
from sparsedsl.selection.scores import ScoreSource

__all__ = ["allowed_blocks", "block_rule", "candidates_of"]

Tensor = torch.Tensor


def allowed_blocks(run: Lowering, mask: Mask, node: Select | Softmax, source: ScoreSource) -> Candidates:
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


def candidates_of(mask: Any, domain: Domain, q_block: int, kv_block: int, heads: int, device: torch.device) -> Candidates:
    """The blocks of ``kv_block`` keys with a pair that ``mask`` allows, for every block of ``q_block`` queries.

    ``heads``: of the scores; where the mask tells more heads apart, a block is allowed if it is for one head of the group. ``device``: of
    the scores. Limits are made where the tables are: on the host if there are none, so that a GPU is not asked how far to score.
    """
    if mask is sympy.true:
        return Candidates()
    blocks = _ranges(mask, domain, kv_block)
    if blocks is not None:
        return _of_ranges(blocks, domain.device)
    if is_transformed(*domain.tables.values()):
        return _of_rows(mask, domain, q_block, kv_block, heads, device)
    names = sorted(domain.tables)
    key = (
        mask, domain.rows, domain.kv_len, domain.q_offset, domain.batch, domain.heads, q_block, kv_block, heads, device, *names,
    )  # fmt: skip
    tables = [domain.tables[name] for name in names]
    return _KNOWN.get(key, tables, lambda: _of_rows(mask, domain, q_block, kv_block, heads, device))


# Of calls with the same lengths and tables.
_KNOWN: Cache[Candidates] = Cache()


def _of_rows(mask: Any, domain: Domain, q_block: int, kv_block: int, heads: int, device: torch.device) -> Candidates:
    ends = _ends(mask, domain, q_block, kv_block)
    if ends is None:
        return Candidates(allowed=_pair_rule(mask, domain, q_block, kv_block, heads, {}, device))
    if not ends:
        return Candidates(end=torch.zeros(-(-domain.rows // q_block), dtype=torch.int64, device=domain.device))
    # (.., rows, q_block): -1 and kv_len mark queries without keys
    begin = torch.stack(torch.broadcast_tensors(*(first.amin(-1) for first, _ in ends))).amin(0) // kv_block
    end = torch.stack(torch.broadcast_tensors(*(last.amax(-1) for _, last in ends))).amax(0) // kv_block + 1
    # As compiled code reads them.
    begin, end = (_joined(limit, heads, how).to(torch.int32).contiguous() for limit, how in ((begin, "amin"), (end, "amax")))
    exact = len(ends) == 1 and ends[0][0].shape[3] == 1 and ends[0][0].shape[1] in (1, heads)
    return Candidates(begin=begin, end=end, allowed=None if exact else _interval_rule(ends, kv_block, heads, device))


@functools.lru_cache(maxsize=256)  # steps of decoding change them once a block
def _of_ranges(blocks: tuple[range, ...], device: torch.device) -> Candidates:
    """The same for one row, whose blocks are ranges."""
    first, last = (blocks[0].start, blocks[-1].stop) if blocks else (0, 0)
    begin, end = (torch.tensor([[[limit]]], dtype=torch.int32, device=device) for limit in (first, last))
    return Candidates(begin=begin, end=end, allowed=_rule_of_ranges(blocks, device) if len(blocks) > 1 else None)


@functools.lru_cache(maxsize=256)
def _rule_of_ranges(blocks: tuple[range, ...], device: torch.device) -> IntervalRule:
    """Of one row, the blocks in one of several ranges."""

    def key(number: int) -> Tensor:
        return torch.tensor([[[[number]]]], device=device)

    ends = tuple((key(part.start), key(part.stop - 1)) for part in blocks or (range(0),))
    return IntervalRule(ends, kv_block=1, heads=1)


def _ranges(mask: Any, domain: Domain, kv_block: int) -> tuple[range, ...] | None:
    """The blocks with a key that the only query of a call sees; None where no closed form says them."""
    return _of_one_query(mask, domain.q_offset, domain.kv_len, kv_block) if domain.rows == 1 else None


@functools.lru_cache(maxsize=256)  # layer after layer asks for the same
def _of_one_query(mask: Any, q_offset: int, kv_len: int, kv_block: int) -> tuple[range, ...] | None:
    found = keys_of_one_query(mask, Domain(1, kv_len, q_offset))
    return None if found is None else tuple(range(part.start // kv_block, (part.stop - 1) // kv_block + 1) for part in found)


def _ends(mask: Any, domain: Domain, q_block: int, kv_block: int) -> list[Any] | None:
    """First and last key of each interval of the mask, ``(B, H, blocks of queries, q_block or 1)``; None: it is no union of intervals."""
    found = intervals(mask)
    if found is None:
        return None
    fills = (domain.kv_len, -1)
    ends = [
        tuple(_per_block(end, q_block, fill) for end, fill in zip(interval_rows(s, domain), fills, strict=True)) for s in found
    ]
    return [_together(first, last, domain.kv_len, kv_block) for first, last in ends]


def _together(first: Tensor, last: Tensor, kv_len: int, kv_block: int) -> tuple[Tensor, Tensor]:
    """The intervals of the queries of a block as one, ``(.., 1)``, where no block of keys lies between two; looked at on the host alone."""
    if first.shape[-1] == 1 or first.device.type != "cpu" or first.shape != last.shape:
        return first, last
    nowhere = -(-kv_len // kv_block) + 1
    there = last >= 0
    begin, order = torch.where(there, first // kv_block, nowhere).sort(dim=-1)
    reached = torch.where(there, last // kv_block, -1).gather(-1, order).cummax(-1).values
    if bool(((begin[..., 1:] > reached[..., :-1] + 1) & (begin[..., 1:] < nowhere)).any()):
        return first, last
    first = torch.where(there, first, kv_len).amin(-1, keepdim=True)
    return first, last.amax(-1, keepdim=True)


def _interval_rule(ends: list[Any], kv_block: int, heads: int, device: torch.device) -> PairRule:
    """A block is allowed where some interval of some query of the row reaches into it."""
    return IntervalRule(tuple((first.to(device), last.to(device)) for first, last in ends), kv_block, heads)


def _per_block(end: Tensor, block: int, fill: int) -> Tensor:
    """``(B, H, rows) -> (B, H, blocks, block)``."""
    missing = -end.shape[2] % block
    end = torch.cat([end, end.new_full((*end.shape[:2], missing), fill)], dim=2) if missing else end
    return end.long().unflatten(2, (-1, block))


def _joined(limit: Tensor, heads: int, how: str) -> Tensor:
    if limit.shape[1] in (1, heads):
        return limit
    return getattr(limit.unflatten(1, (heads, -1)), how)(2)


def block_rule(
    mask: Any, domain: Domain, q_block: int, kv_block: int, heads: int, tables: Mapping[str, Tensor], device: torch.device
) -> PairRule:
    """Whether a block of queries and a block of keys hold a pair that ``mask`` allows. ``tables``: those of the program's own nodes."""
    if not tables and (blocks := _ranges(mask, domain, kv_block)) is not None:
        return _rule_of_ranges(blocks, device)
    # Of tables that nodes give nothing is declared that intervals could rely on.
    ends = None if tables else _ends(mask, domain, q_block, kv_block)
    if not ends:
        return _pair_rule(mask, domain, q_block, kv_block, heads, tables, device)
    return _interval_rule(ends, kv_block, heads, device)


def _pair_rule(
    mask: Any, domain: Domain, q_block: int, kv_block: int, heads: int, tables: Mapping[str, Tensor], device: torch.device
) -> PairRule:
    """The same, looked up pair by pair, or at one pair where all of two blocks are alike."""
    one = constant_in_blocks(mask, q_block, kv_block)
    q_steps = torch.arange(1 if one else q_block, device=device)
    kv_steps = torch.arange(1 if one else kv_block, device=device)
    free = mask.free_symbols
    env: dict[str, Any] = {**domain.lengths, **domain.tables, **tables}
    env["b"] = torch.arange(domain.batch, device=device).view(-1, 1, 1, 1, 1, 1) if BATCH in free else 0
    env["h"] = torch.arange(domain.heads, device=device).view(-1, 1, 1, 1, 1) if HEAD in free else 0

    def rule(rows: Tensor, blocks: Tensor) -> Tensor:
        q = (rows[:, None] * q_block + q_steps + domain.q_offset).view(1, 1, len(rows), len(q_steps), 1, 1)
        kv = (blocks[:, None] * kv_block + kv_steps).view(1, 1, 1, 1, len(blocks), len(kv_steps))
        allowed = evaluate(mask, {**env, "q_idx": q, "kv_idx": kv})
        real = (q < domain.lengths["q_len"]) & (kv < domain.kv_len)
        return any_of_group((allowed & real).any(5).any(3), heads)

    return rule
