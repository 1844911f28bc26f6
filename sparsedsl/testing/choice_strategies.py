"""Hypothesis strategies for what programs choose by and what they choose: scores of blocks and of keys, choices, strategies a head."""

from __future__ import annotations

import functools
from typing import Any

from hypothesis import strategies as st

from sparsedsl.lang.expressions import Mask, kv_idx, q_idx
from sparsedsl.program import given_blocks, key_choices, scores, select, tensors
from sparsedsl.program.axes import block_of, in_blocks
from sparsedsl.program.node import Node

__all__ = [
    "BLOCKS",
    "CAUSAL",
    "HOW",
    "block_scores",
    "choices",
    "given_block_scores",
    "given_choices",
    "inner_choices",
    "key_scores",
    "keys_chosen",
    "overlapping_scores",
    "rows_and_keys",
    "strategies_of_heads",
    "summed_scores",
]

CAUSAL: Mask = kv_idx <= q_idx
BLOCKS = (1, 4, 8)
HOW = ("sum", "mean", "max")
_HEADS = ("heads", "kv_heads", "one")


# ---- scores of blocks ----------------------------------------------------------------------------------------------------------------


@st.composite
def rows_and_keys(draw: st.DrawFn, block: int, q_block: int) -> tuple[Node, Node]:
    """What stands for queries, one row for ``q_block``, and what stands for blocks of keys: summaries, learned rows, landmarks."""
    kind = draw(st.sampled_from(("summary", "learned", "landmarks", "landmarks")))
    rows: Node = tensors.q
    if kind == "landmarks":
        keys: Node = tensors.input(f"marks_{block}", f"batch marked_heads {in_blocks('keys', block)} marked_dim")
        rows = tensors.input("asking", "batch marked_heads queries marked_dim")
    elif block == 1:
        keys = tensors.k
    else:
        how = draw(st.sampled_from(("mean", "max", "last")))
        keys = tensors.summary(tensors.k, block, how)
        if kind == "learned":
            keys = tensors.input(f"learned_{how}_{block}", f"batch kv_heads keys/{block} head_dim", default=keys)
    return (rows if q_block == 1 else tensors.summary(rows, q_block, pad=draw(st.sampled_from(("valid", "zero"))))), keys


@st.composite
def block_scores(draw: st.DrawFn, block: int, q_block: int) -> scores.Scores:
    """Scores of every kind, of ``block`` keys for ``q_block`` queries."""
    kind = draw(st.sampled_from(("dot", "dot", "sums", "noisy", "bound", "mass", "regrouped", "windows", "given")))
    if q_block == block > 1 and draw(st.integers(0, 2)) == 0:
        return scores.antidiagonal(tensors.q, tensors.k, draw(st.sampled_from((1, 2, 4))), block)
    if kind == "sums":
        return draw(summed_scores(block, q_block))
    if kind == "windows" and block > 1:
        return draw(overlapping_scores(block, q_block))
    found: Any
    if kind == "bound":
        found = scores.bound(tensors.q if q_block == 1 else tensors.summary(tensors.q, q_block), tensors.k, block)
    elif kind == "given":
        found = draw(given_block_scores(block, q_block))
    elif kind == "regrouped" and block > 1:
        found = scores.dot(*draw(rows_and_keys(block // 2, q_block))).softmax(CAUSAL).regroup(2, draw(st.sampled_from(HOW)))
    else:
        found = scores.dot(*draw(rows_and_keys(block, q_block)), scale=draw(st.none() | st.just(0.5)))
        if kind == "noisy":
            found = found.gumbel(tensors.input("seed", "1"))
        elif kind == "mass":
            found = found.softmax(draw(st.sampled_from((CAUSAL, True))) if q_block > 1 else CAUSAL)
    return draw(_joined(found))


@st.composite
def _joined(draw: st.DrawFn, found: Any) -> Any:
    """Sometimes with the query heads of a group, or all of them, as one."""
    if found.axes[1] != "heads" or draw(st.booleans()):
        return found
    how = draw(st.sampled_from(HOW))
    return found.over_group(how) if draw(st.booleans()) else found.over_heads(how)


@st.composite
def given_block_scores(draw: st.DrawFn, block: int, q_block: int) -> Any:
    """Scores that a call is given: logits, or the mass that they make."""
    by = draw(st.sampled_from(_HEADS))
    axes = f"batch {by} {in_blocks('queries', q_block)} {in_blocks('keys', block)}"
    found = scores.given_scores(tensors.input(f"scores_{by}_{q_block}_{block}", axes))
    return found.softmax(CAUSAL) if draw(st.booleans()) else found


@st.composite
def summed_scores(draw: st.DrawFn, block: int, q_block: int) -> Any:
    """Scores made of scores: sums and differences, factors, cut off below 0, times a factor for each row, over heads."""
    found: Any = scores.dot(*draw(rows_and_keys(block, q_block)), scale=draw(st.none() | st.just(0.5)))
    for _ in range(draw(st.integers(1, 3))):
        step = draw(st.sampled_from(("plus", "minus", "relu", "weighed", "scaled", "given", "own")))
        if step in ("plus", "minus"):
            other = scores.dot(*draw(rows_and_keys(block, q_block).filter(functools.partial(_joins, found))))
            found = found + other if step == "plus" else found - 2 * other
        elif step == "weighed":
            factor = tensors.input(f"factor_{found.axes[1]}_{q_block}", f"batch {' '.join(found.axes[1:3])}")
            found = factor * found
        elif step == "given":
            found = found + scores.given_scores(
                tensors.input(
                    f"scores_one_{q_block}_{block}", f"batch one {in_blocks('queries', q_block)} {in_blocks('keys', block)}"
                )
            )
        elif step == "own":
            found = found - found.relu() / 3
        else:
            found = found.relu() if step == "relu" else 0.1 - found / 2
    return draw(_joined(found))


def _joins(found: scores.Scores, pair: tuple[Node, Node]) -> bool:
    return ("marked_heads" in found.axes) == (pair[0].axes[1] == "marked_heads")


@st.composite
def overlapping_scores(draw: st.DrawFn, block: int, q_block: int = 1) -> Any:
    """Mass of blocks, made of that of windows which overlap: means of their keys, or rows that were learned."""
    step = draw(st.sampled_from([n for n in (block // 2, block // 4) if n]))
    length = step * draw(st.sampled_from((1, 2)))
    windows: Node = tensors.summary(tensors.k, length, stride=step)
    if draw(st.booleans()):
        windows = tensors.input(f"windows_{length}_{step}", f"batch kv_heads keys/{length}+{step} head_dim", default=windows)
    rows = tensors.q if q_block == 1 else tensors.summary(tensors.q, q_block)
    found: Any = scores.dot(rows, windows).softmax(kv_idx * step + length <= q_idx + 1)
    if draw(st.booleans()):
        found = found.over_group("sum") if draw(st.booleans()) else found.over_heads(draw(st.sampled_from(HOW)))
    return found.overlap(block, draw(st.sampled_from(("strips", "max"))))


# ---- choices of blocks ---------------------------------------------------------------------------------------------------------------


@st.composite
def inner_choices(draw: st.DrawFn) -> Mask:
    """Masks of candidates that read a choice made before."""
    coarse = scores.dot(tensors.q, tensors.summary(tensors.k, 8)).over_heads("max")
    inner = select.top_k(coarse, draw(st.integers(1, 2)), among=(kv_idx // 8 + 1) * 8 <= q_idx)
    return draw(st.sampled_from((inner.as_expression(), ~inner, inner | (kv_idx < 4), inner & (kv_idx % 3 != 1))))


@st.composite
def choices(draw: st.DrawFn, by: scores.Scores, among: Any, *, nested: bool | None = None) -> select.Select:
    """A choice by scores, of every rule. ``nested``: whether its candidates read another choice; None: sometimes."""
    block = by.axes[3]
    columns = block_of(block)
    own = q_idx // columns - kv_idx // columns
    forced = draw(st.sampled_from((None, kv_idx < columns, abs(own) <= 1)))
    if among is not None and by.axes[2] == "queries" and (draw(st.integers(0, 3)) == 0 if nested is None else nested):
        among = among & draw(inner_choices())
    words: dict[str, Any] = {"forced": forced, "among": among}
    rule = draw(st.sampled_from(("top_k", "top_k", "top_p", "threshold")))
    if rule == "top_k":
        return select.top_k(by, draw(st.sampled_from((1, 2, 3, 50))), extra=draw(st.booleans()), **words)
    if rule == "top_p":
        flags: dict[str, Any] = {name: draw(st.booleans()) for name in ("inclusive", "forced_in_mass")}
        share, unmet = draw(st.sampled_from((0.2, 0.6, 0.95))), draw(st.sampled_from(("all", "none")))
        return select.top_p(by, share, unmet=unmet, **flags, **words)
    return select.threshold(by, draw(st.sampled_from((-0.3, 0.1))), **words)


@st.composite
def given_choices(draw: st.DrawFn) -> given_blocks.Given:
    """Lists of blocks, or a bitmap, that a call is given."""
    unit, heads = draw(st.sampled_from((1, 2, 4))), draw(st.sampled_from(_HEADS))
    if draw(st.booleans()):
        return given_blocks.given(tensors.input(f"bits_{heads}_{unit}", f"batch {heads} queries {in_blocks('keys', unit)}"), unit)
    return given_blocks.given(tensors.input(f"lists_{heads}_{unit}", f"batch {heads} queries width"), unit)


# ---- scores and choices of keys ------------------------------------------------------------------------------------------------------


@st.composite
def key_scores(draw: st.DrawFn, *, before: bool = False, given: bool = True) -> scores.KeyScores:
    """One score a key: what the last queries pay, ``before``: the keys before these queries alone; or, if ``given``, votes of a call."""
    if given and draw(st.integers(0, 3)) == 0:
        heads = draw(st.sampled_from(("heads", "one")))
        found: Any = scores.given_key_scores(tensors.input(f"votes_{heads}", f"batch {heads} keys"))
    else:
        words: dict[str, Any] = {"causal": True, "keep": "before"} if before else {}
        words = words or {"causal": draw(st.booleans()), "complete": draw(st.sampled_from((1, 8)))}
        found = scores.probe(tensors.q, tensors.k, rows=draw(st.sampled_from((1, 4, 16))), **words)
    return scores.smooth(found, 3, draw(st.sampled_from(("mean", "max")))) if draw(st.booleans()) else found


@st.composite
def keys_chosen(draw: st.DrawFn) -> key_choices.ChosenKeys:
    """Keys, or distances, or blocks of these, one set for all queries of a head."""
    distances = draw(st.booleans())
    by: Any = key_choices.diagonals(tensors.q, tensors.k, rows=draw(st.sampled_from((1, 4)))) if distances else draw(key_scores())
    by = by.over_group(draw(st.sampled_from(HOW))) if by.axes[1] == "heads" and draw(st.integers(0, 3)) == 0 else by
    place = q_idx - kv_idx if distances else kv_idx
    words: dict[str, Any] = {
        "among": draw(st.sampled_from((None, place % 3 != 1, place < 9))),
        "forced": draw(st.sampled_from((None, place < 2, place % 5 == 1))),
        "block": draw(st.sampled_from((1, 1, 4))),
    }
    if draw(st.booleans()):
        return select.top_k(by, draw(st.sampled_from((1, 3, 40))), **words)
    return select.top_p(by, draw(st.sampled_from((0.4, 0.9, 1.0))), inclusive=draw(st.booleans()), **words)


@st.composite
def strategies_of_heads(draw: st.DrawFn) -> Mask:
    """One strategy for the heads whose attention an estimate tells, blocks of the map perhaps, and another one for the rest."""
    block, rows = draw(st.sampled_from((4, 8))), draw(st.sampled_from((1, 4)))
    paid = scores.probe(tensors.q, tensors.k, rows=rows, causal=True)
    near = key_choices.divergence(scores.probe(tensors.q, tensors.k, rows=rows, pooled=block), paid)
    tells: Mask = near < draw(st.sampled_from((0.0, 0.1, 0.2, 0.9)))
    pooled = scores.dot(tensors.summary(tensors.q, block), tensors.summary(tensors.k, block))
    of_map = select.top_p(
        pooled, draw(st.sampled_from((0.3, 0.8))), over="map", inclusive=draw(st.booleans()), among=CAUSAL,
        forced=draw(st.sampled_from((None, kv_idx < block))),
    )  # fmt: skip
    one = draw(st.sampled_from((of_map.as_expression(), q_idx - kv_idx < 5)))
    return tells & one | ~tells & draw(keys_chosen()).as_expression()
