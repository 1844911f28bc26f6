"""Hypothesis strategies for programs: nodes composed at random."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import check_word, shown
from sparsedsl.lang.expressions import Mask, Score, kv_idx, q_idx, score
from sparsedsl.lang.normalisers import POINTWISE, SOFTPICK, STICK_BREAKING
from sparsedsl.lang.numeric import relu, sigmoid
from sparsedsl.program import branches, orders, recurrences, scores, sources, tensors
from sparsedsl.program.graph import Program
from sparsedsl.testing.choice_strategies import (
    BLOCKS,
    CAUSAL,
    block_scores,
    choices,
    given_block_scores,
    given_choices,
    key_scores,
    keys_chosen,
    overlapping_scores,
    rows_and_keys,
    strategies_of_heads,
    summed_scores,
)
from sparsedsl.testing.strategies import patterns
from sparsedsl.tracing import trace_mask, trace_score

__all__ = ["programs"]


def programs(
    *, heads: int = 4, causal: bool | None = None, depth: int = 1, about: Sequence[str] | None = None
) -> st.SearchStrategy[Program]:
    """Programs over all that the language has: a branch of some kind, or several joined or mixed, with shapes that fit.

    Args:
        heads: query heads of the calls that are meant; linear attention with constant decays has one for each.
        causal: ``True`` for programs in which nothing depends on later tokens; ``None`` for any.
        depth: how deep branches are joined.
        about: only branches of these kinds: ``"static"`` patterns; ``"choices"`` for single queries, ``"blocks"`` for blocks of them,
            ``"chunks"`` weighed each by itself; ``"sums"``, choices by scores made of scores, and such scores in logits; ``"given"``,
            choices and scores that a call is given; ``"nested"``, choices within choices, of blocks that overlap, by rows that were
            learned; ``"keys"``, of keys and distances, and a strategy a head; ``"normalisers"`` other than a softmax; ``"vectors"``, rows
            of tables as short vectors; ``"sorted"`` keys; ``"subsets"`` of tokens; ``"slots"``; linear attention with constant
            ``"decays"``, or ``"gated"``: decays and write rules from inputs. ``None`` for all.

    Raises:
        PatternError: a kind that there is not, or that no causal program has.

    >>> from hypothesis import given
    >>> @given(programs(causal=True))
    ... def test(program):
    ...     assert not any("later" in effect for effect in effects(program))
    >>> from sparsedsl.program.effect_rules import effects
    >>> test()
    >>> @given(programs(about=["gated"], depth=0))
    ... def test(program):
    ...     assert program.root.function == "linear"
    >>> test()
    """
    known = {**_CAUSAL, **({} if causal else _LATER)}
    if about is None:
        return _programs(heads, bool(causal), depth, (*known, "choices", "gated", "gated"))
    if isinstance(about, str) or not isinstance(about, Sequence) or not about:
        raise PatternError(f"programs(): about must be a list of kinds, as in about=['gated']; got {shown(about)}")
    for kind in about:
        check_word("programs(): about", kind, tuple({**_CAUSAL, **_LATER}))
        if kind not in known:
            raise PatternError(f"programs(): {kind!r} looks at later tokens, and causal=True asks for none that does")
    return _programs(heads, bool(causal), depth, tuple(about))


@st.composite
def _programs(draw: st.DrawFn, heads: int, causal: bool, depth: int, kinds: tuple[str, ...]) -> Program:
    return Program(draw(_branches(heads, causal, depth, kinds)))


@st.composite
def _branches(draw: st.DrawFn, heads: int, causal: bool, depth: int, kinds: tuple[str, ...]) -> branches.Branch:
    if depth > 0 and draw(st.integers(0, 2)) == 0:
        parts = [draw(_branches(heads, causal, depth - 1, kinds)) for _ in range(2)]
        if all(part.weighable for part in parts) and draw(st.booleans()):
            return branches.joint(*parts)
        return branches.mix(*parts, weights=tensors.input("gate_of_two", "batch heads queries 2"))
    made = {**_CAUSAL, **_LATER}[draw(st.sampled_from(kinds))](heads, causal)
    return branches.as_branch("programs", draw(made))


# ---- attention -----------------------------------------------------------------------------------------------------------------------


@st.composite
def _static(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    return draw(patterns(depth=1, tables=False, causal=causal or None))


@st.composite
def _attending(
    draw: st.DrawFn, heads: int, causal: bool, by: Callable[..., Any] = block_scores, nested: bool | None = None
) -> Any:
    """One softmax over pairs that a choice for single queries is part of."""
    block = draw(st.sampled_from(BLOCKS))
    ended, own = (kv_idx // block + 1) * block <= q_idx, q_idx // block == kv_idx // block
    near = q_idx - kv_idx < draw(st.integers(1, 12))
    selected = draw(choices(draw(by(block, 1)), ended if nested else draw(st.sampled_from((None, ended))), nested=nested))
    shapes = [ended & selected, CAUSAL & (own | selected), CAUSAL & (near | selected)]
    # what chooses among blocks that are not over looks at tokens after the query
    shapes += [] if causal else [CAUSAL & selected, selected & True]
    words: dict[str, Any] = {"sink": draw(st.none() | st.just(0.3)), "scale": draw(st.none() | st.just(0.2))}
    mask = draw(st.sampled_from(shapes if selected.among is None or not causal else shapes[:3]))
    if causal and selected.among is None:
        mask = draw(st.sampled_from(shapes[:2]))
    return branches.attend(mask, **words)


@st.composite
def _weighed(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """A softmax a chunk, and weights for the chunks."""
    block = draw(st.sampled_from(BLOCKS[1:]))
    ended = (kv_idx // block + 1) * block <= q_idx
    selected = draw(choices(scores.dot(*draw(rows_and_keys(block, 1))), ended))
    inner, weights = draw(st.sampled_from(("softmax", "softmax1"))), draw(st.sampled_from(sources.RULES))
    return branches.attend(ended & selected, normaliser=sources.per_chunk(selected, weights, inner=inner))


@st.composite
def _summed(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """Scores made of scores: a choice by them, or logits that they are part of."""
    if draw(st.booleans()):
        return draw(_attending(heads, causal, summed_scores))
    found = draw(summed_scores(draw(st.sampled_from((1, 4))), 1))
    # the row of a block that is not over is made of later tokens
    block = 1 if found.axes[3] == "keys" else 4
    mask = (kv_idx // block + 1) * block <= q_idx + (block == 1)
    return branches.attend(mask, draw(st.sampled_from((score + found, score / 2 - 0.5 * found))))


@st.composite
def _given(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """Lists, bitmaps and scores of a call's own, alone or beside a choice that is made here."""
    picked = draw(given_choices())
    near, ended = q_idx - kv_idx < 3, (kv_idx // 4 + 1) * 4 <= q_idx
    if draw(st.booleans()):
        return branches.attend(draw(st.sampled_from((CAUSAL & picked, CAUSAL & (near | picked), CAUSAL & ~picked))))
    other = draw(choices(draw(given_block_scores(4, 1)), ended, nested=False))
    return branches.attend(ended & draw(st.sampled_from((other, picked | other))))


@st.composite
def _nested(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """Choices within choices, of blocks that overlap, or attention to rows that were learned."""
    kind = draw(st.sampled_from(("within", "overlapping", "rows")))
    if kind == "within":
        return draw(_attending(heads, causal, nested=True))
    if kind == "overlapping":
        return draw(_picked_by_windows(heads, causal))
    length, step = draw(st.sampled_from(((4, 2), (4, 4), (8, 4))))
    windows = {name: tensors.summary(x, length, stride=step) for name, x in (("keys", tensors.k), ("values", tensors.v))}
    k, v = (
        tensors.input(f"{name}_{length}_{step}", " ".join(x.axes), default=x) if draw(st.booleans()) else x
        for name, x in windows.items()
    )
    return branches.attend(kv_idx * step + length <= q_idx + 1, k=k, v=v, sink=draw(st.none() | st.just(0.3)))


@st.composite
def _picked_by_windows(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """Blocks chosen by windows that overlap, of q and k alone or of rows that a call may give."""
    block = draw(st.sampled_from((4, 8)))
    picked = draw(choices(draw(overlapping_scores(block)), draw(st.sampled_from((None, CAUSAL))), nested=False))
    return branches.attend(CAUSAL & (picked | (q_idx - kv_idx < 2)))


@st.composite
def _normalised(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """Weights that no softmax makes, over static pairs or chosen ones."""
    name = draw(st.sampled_from((POINTWISE, SOFTPICK, STICK_BREAKING)))
    logit: Score = draw(st.sampled_from((score, score / 2 - 0.1 * (q_idx - kv_idx))))
    shapes = (sigmoid(logit - 1), relu(logit) ** 2, logit * sigmoid(logit), logit)
    block = draw(st.sampled_from((1, 4)))
    ended = (kv_idx // block + 1) * block <= q_idx
    masks: list[Any] = [CAUSAL, kv_idx < q_idx, CAUSAL & (q_idx - kv_idx < draw(st.integers(1, 9)))]
    masks += [] if causal else [abs(q_idx - kv_idx) < 4]
    if draw(st.booleans()):
        masks = [ended & draw(choices(draw(block_scores(block, 1)), ended, nested=False)), CAUSAL & draw(given_choices())]
    found = draw(st.sampled_from(shapes)) if name == POINTWISE else logit
    return branches.attend(draw(st.sampled_from(masks)), found, normaliser=name)


# Captured by traced functions as FlexAttention's users do; a call brings tables of its own under these names.
_PLACE, _LISTED = torch.tensor([[2, 0, 1], [0, 2, 2]]), torch.tensor([[1, 0], [0, 1]])
_POINT = torch.tensor([[0.5, -1.0], [-0.5, 2.0]])
_ABOUT_VECTORS: Mapping[str, Callable[..., Any]] = {
    "one of a few keys": lambda b, h, q, kv: (_LISTED[q] == kv).any(-1),
    "near by all coordinates": lambda b, h, q, kv: ((_PLACE[q] - _PLACE[kv]).abs() <= 3).all(-1),
    "near by their sum": lambda b, h, q, kv: (_PLACE[q] - _PLACE[kv]).abs().sum(-1) < 7,
    "near by the largest": lambda b, h, q, kv: (_PLACE[q] - _PLACE[kv]).abs().amax(-1) <= 4,
    "a count": lambda b, h, q, kv: (_PLACE[q] == _PLACE[kv]).sum(-1) >= 1,
}


@st.composite
def _by_vectors(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """Rows of tables as short vectors: a mask by them, and sometimes a score."""
    traced = trace_mask(_ABOUT_VECTORS[draw(st.sampled_from(sorted(_ABOUT_VECTORS)))])
    mask = Mask(traced.expr)  # without the tensors that it was traced with
    mask = mask if draw(st.booleans()) else ~mask
    far = trace_score(lambda s, b, h, q, kv: s - (_POINT[q] - _POINT[kv]).pow(2).sum(-1))
    near = q_idx - kv_idx < 2
    pairs = CAUSAL & (mask | near) if causal or draw(st.booleans()) else mask
    return branches.attend(pairs, Score(far.expr) if draw(st.booleans()) else None, sink=draw(st.none() | st.just(0.3)))


# ---- what looks at later tokens ------------------------------------------------------------------------------------------------------


@st.composite
def _by_blocks(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """A choice for blocks of queries; sometimes a bias made of scores."""
    block = draw(st.sampled_from(BLOCKS[1:]))
    by = draw(block_scores(block, block))
    own = q_idx // block == kv_idx // block
    selected = draw(choices(by, draw(st.sampled_from((None, CAUSAL)))))
    bias = (
        score + scores.dot(tensors.summary(tensors.q, block), tensors.summary(tensors.k, block)) if draw(st.booleans()) else None
    )
    return branches.attend(CAUSAL & (own | selected), bias)


@st.composite
def _by_keys(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """Lines and slashes, or a strategy for each head."""
    if draw(st.booleans()):
        return branches.attend(CAUSAL & draw(strategies_of_heads()))
    picked = draw(keys_chosen())
    return branches.attend(draw(st.sampled_from((CAUSAL & picked, CAUSAL & (picked | (q_idx == kv_idx)), CAUSAL & ~picked))))


@st.composite
def _sorted(draw: st.DrawFn, heads: int, causal: bool, given: bool = True) -> Any:
    """Keys sorted within segments, and blocks of them chosen."""
    block, segment = draw(st.sampled_from(((4, 8), (8, 8), (4, 16))))
    seen: Any = draw(key_scores(given=given))
    seen = seen.over_group("mean") if seen.axes[1] == "heads" and draw(st.booleans()) else seen
    order = orders.segment_sort(seen, segment, descending=draw(st.booleans()))
    k, v = orders.take(tensors.k, order), orders.take(tensors.v, order)
    earlier, same = kv_idx // segment < q_idx // segment, kv_idx // segment == q_idx // segment
    pooled = tensors.summary(tensors.q, block, pad="zero"), tensors.summary(k, block, pad="zero")
    selected = draw(choices(scores.dot(*pooled), earlier))
    first = kv_idx // block == order.place(0) // block
    return branches.attend(earlier & (selected | first) | same & (order.origin(kv_idx) <= q_idx), k=k, v=v)


@st.composite
def _compact(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """A program on a subset of the tokens."""
    rule = draw(st.sampled_from(("tail", "cover")))
    share: dict[str, Any] = {rule: draw(st.sampled_from((0.1, 0.5, 0.9)))}
    kept = orders.keep_tokens(
        draw(key_scores(before=True)), least=draw(st.integers(0, 6)), always=draw(st.sampled_from((0, 4))), **share
    )
    inside = (_static(heads, causal), _sorted(heads, causal, given=False), _picked_by_windows(heads, causal))
    return branches.compact(kept, draw(draw(st.sampled_from(inside))))


# ---- recurrences ---------------------------------------------------------------------------------------------------------------------


@st.composite
def _remembering(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """Slots, alone or in one softmax with what has not left the window."""
    window, empty = draw(st.integers(0, 9)), draw(st.sampled_from(("zero_sink", "masked")))
    documents = draw(_documents())
    first = draw(st.integers(0, 3)) if empty == "zero_sink" and documents is None else 0
    memory = sources.slots(
        tensors.input("slot_gate", "batch kv_heads keys 3"), delay=window, temperature=draw(st.sampled_from((1.0, 8.0))),
        empty=empty, documents=documents, first=first,
    )  # fmt: skip
    far = branches.recall(memory)
    near = CAUSAL & ((q_idx - kv_idx < max(window, 1)) | (kv_idx < first))
    return branches.joint(far, near) if draw(st.booleans()) else far


def _documents() -> st.SearchStrategy[Any]:
    return st.none() | st.just(tensors.input("ids", "batch keys"))


@st.composite
def _fading(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """Linear attention with constant decays."""
    decay = [math.exp(-draw(st.sampled_from((0.0, 0.1, 2.0)))) for _ in range(heads)]
    return recurrences.linear(decay, scale=draw(st.none() | st.just(0.3)), documents=draw(_documents()))


_BONUSES = tuple(tensors.input(f"bonus_{heads}", f"{heads} head_dim") for heads in ("kv_heads", "heads"))


@st.composite
def _gated(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """Linear attention with decays of the data, for heads or their channels, and every rule of writing and reading."""
    rule = draw(st.sampled_from(("plain", "delta", "delta", "erase", "before", "sum", "taylor", "max1")))
    by = draw(st.sampled_from(("heads", "kv_heads", "one")))
    vector = " head_dim" if rule != "taylor" and draw(st.booleans()) else ""
    word = draw(st.sampled_from(("decay", "log_decay")))
    words: dict[str, Any] = {word: tensors.input(f"{word}_{by}{len(vector)}", f"batch {by} keys{vector}")}
    if rule != "plain" and draw(st.integers(0, 3)) == 0:
        words = {"decay": draw(st.sampled_from((1.0, [0.5 + 0.5 / (n + 1) for n in range(heads)])))}
    words |= {"documents": draw(_documents()), "scale": draw(st.none() | st.just(0.7))}
    words["features"] = draw(st.sampled_from((None, "l2", "elu1", "relu")))
    if rule == "delta":
        share = draw(st.sampled_from(("heads", "kv_heads")))
        words |= {"beta": tensors.input(f"share_{share}", f"batch {share} keys"), "features": "l2"}
    elif rule == "erase":
        share = draw(st.sampled_from(("heads", "kv_heads", "one")))
        words |= {"erase": tensors.input(f"erase_{share}", f"batch {share} keys head_dim")}
        share = draw(st.sampled_from(("heads", "kv_heads", "one")))
        along = {"along": tensors.input(f"along_{share}", f"batch {share} keys head_dim")}
        words |= along if draw(st.booleans()) else {"features": "l2"}
    elif rule == "before":
        words |= {"reads": "before", "bonus": draw(st.none() | st.sampled_from(_BONUSES))}
    elif rule in ("sum", "taylor"):
        words |= {
            "normalised": "sum",
            "eps": 0.5,
            "features": "taylor" if rule == "taylor" else draw(st.sampled_from(("elu1", "relu"))),
        }
    elif rule == "max1":
        words |= {"normalised": "max1", "write": draw(st.none() | st.just(tensors.input("strength", "batch heads keys")))}
    return recurrences.linear(**words)


# Kind, as `about` says it -> a strategy for branches, given heads and whether they must be causal.
_CAUSAL: dict[str, Callable[[int, bool], st.SearchStrategy[Any]]] = {
    "static": _static,
    "choices": _attending,
    "chunks": _weighed,
    "sums": _summed,
    "given": _given,
    "nested": _nested,
    "normalisers": _normalised,
    "vectors": _by_vectors,
    "slots": _remembering,
    "decays": _fading,
    "gated": _gated,
}
_LATER: dict[str, Callable[[int, bool], st.SearchStrategy[Any]]] = {
    "blocks": _by_blocks,
    "keys": _by_keys,
    "sorted": _sorted,
    "subsets": _compact,
}
