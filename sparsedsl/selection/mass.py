"""Rules that pick as many blocks as it takes: top-p and thresholds. Rows are taken a few at a time, each with all its blocks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch

from sparsedsl.errors import PatternError
from sparsedsl.selection.candidates import Candidates, PairRule, TableRule
from sparsedsl.selection.choosing import Choose, Rule
from sparsedsl.selection.chunking import cut, rows_at_once
from sparsedsl.selection.scores import ScoreSource, TensorScores
from sparsedsl.selection.selected_blocks import SelectedBlocks
from sparsedsl.selection.stable_topk import compacted

__all__ = ["Measure", "threshold", "top_p", "top_p_of_map"]

Tensor = torch.Tensor
Measure = Literal["softmax", "share", "score"]


@torch.no_grad()
def top_p(
    source: ScoreSource,
    p: float,
    candidates: Candidates | None = None,
    *,
    measure: Literal["softmax", "share"],
    inclusive: bool = True,
    unmet: Literal["all", "none"] = "all",
    forced: PairRule | None = None,
    forced_in_mass: bool = False,
    at_most: int | None = None,
    kv_block: int = 1,
    q_block: int = 1,
    first: int = 0,
    choose: Choose | None = None,
) -> SelectedBlocks:
    """The fewest blocks of each row whose mass reaches ``p``: in descending order (equal ones by number) until the sum is ``>= p``.

    Args:
        source: scores ``(B, Hs, R, U)``.
        p: a share of the mass of the row's candidates. Masses are added in float32 (float64 for float64 scores), so that a share near 1
            may not be reached: see ``unmet``. 1 itself means all candidates, whatever ``inclusive`` and ``unmet`` say.
        candidates: what each row may choose, and what its mass is normalised over; None: everything.
        measure: "softmax" of the scores over the candidates, or their "share" of the row's sum (scores that are masses, >= 0).
        inclusive: whether the block that crosses p is picked; without it, what stays is below p.
        unmet: what a row picks whose mass never reaches p: "all" its candidates, or "none".
        forced: as in :func:`~sparsedsl.selection.ranking.top_k`: picked whatever their mass. They are added to what the rule picks, or,
            with ``forced_in_mass``, counted first: others follow only until p is reached.
        at_most: a bound on the blocks of a row; of more the forced and then the greatest stay. On a GPU lists are as wide as
            this, or as the blocks within reach, since no count is read back; on CPU as wide as the longest. kv_block, q_block,
            first: what the lists say of themselves. choose: a backend's own way, which gives the same.

    Raises:
        PatternError: a measure or a behaviour that is not one of these, or ``at_most`` below 1.

    >>> from sparsedsl.selection.scores import TensorScores
    >>> mass = TensorScores(torch.tensor([[[[1.0, 5.0, 1.0, 3.0]]]]))
    >>> top_p(mass, 0.75, measure="share").indices
    tensor([[[[1, 3]]]], dtype=torch.int32)
    >>> top_p(mass, 0.75, measure="share", inclusive=False).indices
    tensor([[[[1]]]], dtype=torch.int32)
    """
    _check(measure, ("softmax", "share"), at_most)
    if unmet not in ("all", "none"):
        raise PatternError(f"top_p: unmet is {unmet!r}; wanted 'all' or 'none'")

    def pick(scores: Tensor, named: Tensor | None) -> Tensor:
        chosen = scores != float("-inf")
        if p == 1:  # when rounded sums reach 1 is a matter of chance
            return chosen
        mass = _mass(scores, measure)
        counted = named if forced_in_mass else None
        order = _order(scores, counted)
        sums = mass.gather(-1, order).cumsum(-1)
        before = (sums < p).sum(-1, keepdim=True)
        kept = before + 1 if inclusive else before
        rank = torch.arange(scores.shape[-1], device=scores.device)
        table = torch.zeros_like(chosen).scatter_(-1, order, rank < kept)
        table &= chosen if counted is None else chosen | counted
        missed = ~(sums[..., -1:] >= p)  # NaN reaches nothing
        return torch.where(missed, chosen if unmet == "all" else torch.zeros_like(chosen), table)

    rule = Rule("top_p", share=p, measure=measure, inclusive=inclusive, unmet=unmet, forced_in_mass=forced_in_mass)
    return _by_rows(source, candidates, pick, forced, at_most, (q_block, kv_block, first), _own(choose, rule, at_most))


@torch.no_grad()
def top_p_of_map(
    source: ScoreSource, p: float, candidates: Candidates | None = None, *, measure: Literal["softmax", "share"], inclusive: bool = True,
    unmet: Literal["all", "none"] = "all", forced: PairRule | None = None, kv_block: int = 1, q_block: int = 1, first: int = 0,
    choose: Choose | None = None,
) -> SelectedBlocks:  # fmt: skip
    """The fewest blocks of all rows of a head together that hold ``p`` of their mass, which is 1 a row with candidates; rows that ask for
    less than others may get none. The map is held. Arguments as of :func:`top_p`; ``choose`` is not asked.

    >>> from sparsedsl.selection.scores import TensorScores
    >>> mass = TensorScores(torch.tensor([[[[9.0, 1.0], [6.0, 4.0]]]]))
    >>> top_p_of_map(mass, 0.7, measure="share").table()
    tensor([[[[ True, False],
              [ True, False]]]])
    """
    candidates = candidates or Candidates()
    rows, blocks = slice(0, source.shape[2]), slice(0, source.shape[3])
    scores = candidates.scored(source, rows, blocks)
    chosen = scores != float("-inf")
    table = chosen
    if p != 1:  # when rounded sums reach 1 is a matter of chance
        mass = _mass(scores, measure).masked_fill(~chosen, -1.0).flatten(2)
        ranked, order = mass.sort(dim=-1, descending=True, stable=True)
        sums = ranked.clamp(min=0.0).cumsum(-1)
        least = p * mass.clamp(min=0.0).sum(-1, keepdim=True)
        kept = (sums < least).sum(-1, keepdim=True) + int(inclusive)
        taken = (torch.arange(mass.shape[-1], device=mass.device) < kept).expand(mass.shape)
        table = torch.zeros_like(taken).scatter(-1, order, taken).view(scores.shape) & chosen
        if mass.shape[-1]:
            missed = ~(sums[..., -1:] >= least)[..., None]
            table = torch.where(missed, chosen if unmet == "all" else torch.zeros_like(chosen), table)
    if forced is not None:
        table = table | candidates.within(forced, rows, blocks, scores)
    counts = table.sum(-1, dtype=torch.int32)
    lists = _lists(table, counts, 0, None)
    return SelectedBlocks(lists, counts, q_block=q_block, kv_block=kv_block, blocks=source.shape[3], first=first)


@torch.no_grad()
def threshold(
    source: ScoreSource,
    least: float,
    candidates: Candidates | None = None,
    *,
    measure: Measure = "score",
    forced: PairRule | None = None,
    at_most: int | None = None,
    kv_block: int = 1,
    q_block: int = 1,
    first: int = 0,
    choose: Choose | None = None,
) -> SelectedBlocks:
    """The blocks of each row whose score, or mass, is at least ``least``; the forced ones beside them. Arguments as of :func:`top_p`.

    >>> from sparsedsl.selection.scores import TensorScores
    >>> threshold(TensorScores(torch.tensor([[[[1.0, 5.0, 1.0, 3.0]]]])), 0.3, measure="share").indices
    tensor([[[[1, 3]]]], dtype=torch.int32)
    """
    _check(measure, ("softmax", "share", "score"), at_most)

    def pick(scores: Tensor, named: Tensor | None) -> Tensor:
        mass = scores if measure == "score" else _mass(scores, measure)
        return (mass >= least) & (scores != float("-inf"))

    rule = Rule("threshold", share=least, measure=measure)
    return _by_rows(source, candidates, pick, forced, at_most, (q_block, kv_block, first), _own(choose, rule, at_most))


def _own(choose: Choose | None, rule: Rule, at_most: int | None) -> Any:
    """A backend's own way to follow a rule; none, where lists are bounded beside it."""
    return None if choose is None or at_most is not None else functools.partial(choose, rule=rule)


def _by_rows(
    source: ScoreSource,
    candidates: Candidates | None,
    pick: Callable[[Tensor, Tensor | None], Tensor],
    forced: PairRule | None,
    at_most: int | None,
    says: tuple[int, int, int],
    choose: Any,
) -> SelectedBlocks:
    """``pick(scores, forced)`` of a few rows at a time, made into lists; or what ``choose`` picks."""
    candidates = candidates or Candidates()
    batch, heads, rows, blocks = source.shape
    lists, counts = [], []
    # Order and sums take about ten numbers of eight bytes a cell.
    for some in cut(0, rows, rows_at_once((source.cell_bytes + 80 * batch * heads) * blocks + source.row_bytes)):
        tile = slice(*candidates.span(some, blocks))
        if tile.start == tile.stop:
            counts.append(torch.zeros((batch, heads, some.stop - some.start), dtype=torch.int32, device=source.device))
            lists.append(counts[-1].new_empty((*counts[-1].shape, 0)))
            continue
        width = tile.stop - tile.start
        found = None if choose is None else choose(source, candidates, forced, rows=some, start=0, width=width)
        if found is None:
            scores = candidates.scored(source, some, tile)
            named = None if forced is None else candidates.within(forced, some, tile, scores)
            if choose is not None:
                rule, here = None if named is None else TableRule(named), slice(0, scores.shape[2])
                found = choose(TensorScores(scores), Candidates(), rule, rows=here, start=tile.start, width=width)
        if found is not None:
            counts.append(found[1])
            lists.append(found[0][..., : int(found[1].max()) if found[1].numel() else 0])
            continue
        table = pick(scores, named)
        table = table if named is None else table | named
        if at_most is not None and at_most < table.shape[-1]:
            order = _order(scores.masked_fill(~table, float("-inf")), named)
            rank = torch.arange(table.shape[-1], device=table.device)
            table &= torch.zeros_like(table).scatter_(-1, order, (rank < at_most).expand(order.shape))
        counts.append(table.sum(-1, dtype=torch.int32))
        lists.append(_lists(table, counts[-1], tile.start, at_most))
    width = max((part.shape[-1] for part in lists), default=0)
    q_block, kv_block, first = says
    indices = torch.full((batch, heads, rows, width), -1, dtype=torch.int32, device=source.device)
    done = 0
    for part in lists:
        indices[:, :, done : done + part.shape[2], : part.shape[-1]] = part
        done += part.shape[2]
    every = torch.cat(counts, dim=2) if counts else indices.new_zeros((batch, heads, 0))
    return SelectedBlocks(indices, every, q_block=q_block, kv_block=kv_block, blocks=blocks, first=first)


def _lists(table: Tensor, counts: Tensor, start: int, at_most: int | None) -> Tensor:
    """The blocks that ``table`` has, ascending: as wide as needed on CPU, where looking costs nothing."""
    width = table.shape[-1] if at_most is None else min(at_most, table.shape[-1])
    if table.device.type == "cpu":
        width = int(counts.max()) if counts.numel() else 0
    lists = compacted(table, width)
    return torch.where(lists < 0, lists, lists + start)


def _mass(scores: Tensor, measure: str) -> Tensor:
    """Softmax or share over what is not -inf; zeros in rows without candidates."""
    if measure == "softmax":
        return torch.softmax(scores, dim=-1).nan_to_num(nan=0.0)
    mass = scores.masked_fill(scores == float("-inf"), 0.0)
    total = mass.sum(-1, keepdim=True)
    return mass / total.masked_fill(total == 0, 1.0)


def _order(scores: Tensor, named: Tensor | None) -> Tensor:
    """Places by descending score, equal ones by number; the forced ones first."""
    key = scores if named is None else scores.masked_fill(named, float("inf"))
    return torch.sort(key, dim=-1, descending=True, stable=True).indices


def _check(measure: str, measures: tuple[str, ...], at_most: int | None) -> None:
    if measure not in measures:
        raise PatternError(f"measure is {measure!r}; wanted one of {', '.join(map(repr, measures))}")
    if at_most is not None and at_most < 1:
        raise PatternError(f"at_most is {at_most}; wanted 1 or more blocks, or None")
