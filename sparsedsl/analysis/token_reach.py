"""Whether an output of a program can depend on tokens after it: followed through the graph, node by node.

Each node's result is known by what it may depend on. Tensors and scores of queries: tokens up to the query (`own`), or later ones. Tensors
of keys: the tokens of a row (`own`), or any. Scores of (query, block): tokens up to the query (`past`), or up to the end of the
block as well (`block`), or any. What masks say is proved for all lengths by :mod:`sparsedsl.analysis.proofs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy

from sparsedsl.analysis.block_masks import constant_in_blocks
from sparsedsl.analysis.proofs import Verdict, implies
from sparsedsl.lang.expressions import Mask, as_mask, kv_idx, kv_len, q_idx
from sparsedsl.lang.numeric import minimum
from sparsedsl.lang.symbols import KV_IDX, KV_LEN
from sparsedsl.program import given_blocks, key_choices, select
from sparsedsl.program.axes import base_of, block_of, windows_of
from sparsedsl.program.branches import Attend, Branch, Compact, Joint, Mix, Recall, blocks_of_keys, reads_scores
from sparsedsl.program.decided import assume
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.orders import Inverse, Order, Take, Tokens
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.rules import Rules
from sparsedsl.program.scores import (
    Antidiagonal,
    Bound,
    Dot,
    GivenKeyScores,
    GivenScores,
    Grouped,
    GroupedKeys,
    Gumbel,
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
from sparsedsl.program.select import Select, choices_in
from sparsedsl.program.sources import Slots
from sparsedsl.program.tensors import Input, Summary

__all__ = ["CAUSALITY_RULES", "program_causality"]

PAST, OWN, BLOCK, ANY = "past", "own", "block", "any"
PROVED = Verdict("PROVED", reason="through the graph, for all indices, lengths and tables")


@dataclass(frozen=True)
class _Known:
    """What a result may depend on, and why, if that is more than a query may know."""

    reach: str
    why: str = ""
    verdict: Verdict | None = None


def program_causality(program: Program) -> Verdict:
    """PROVED, REFUTED with the node that reads the future (and a pair of positions where one is known), or UNKNOWN.

    REFUTED says that the declaration lets later tokens in; whether they change a given call is what
    :func:`sparsedsl.testing.assert_causal` finds out.

    >>> import sparsedsl as sd
    >>> program_causality(sd.Program(sd.patterns.hsa()))
    PROVED (through the graph, for all indices, lengths and tables)
    >>> print(program_causality(sd.Program(sd.patterns.token_sparse())).reason)
    keep_tokens is decided by probe, which looks at the last 128 queries
    """
    known: dict[Node, _Known] = {}
    for node in program.order:
        known[node] = CAUSALITY_RULES[type(node)](node, known)
    result = known[program.root]
    if result.verdict is not None:
        return replace(result.verdict, reason=program.worded(result.verdict.reason))
    return PROVED if result.reach == PAST else Verdict("REFUTED", reason=program.worded(result.why))


def _ends_before(axis: str, tokens: int = 1) -> Mask:
    """The last key of a block, or of a window, lies at or before the query. ``tokens``: those that ``kv_idx`` counts by."""
    windows = windows_of(axis)
    if windows is not None:
        length, stride = windows
        return kv_idx * stride + length <= q_idx + 1
    block = block_of(axis)
    if tokens > 1:
        return (kv_idx * tokens // block + 1) * block <= q_idx + 1
    return minimum((kv_idx // block + 1) * block, kv_len) <= q_idx + 1 if block > 1 else kv_idx <= q_idx


def _worst(nodes: Iterable[Node], known: dict[Node, _Known]) -> _Known | None:
    """What is known of the first of these results that may depend on anything, or of which that is not known."""
    return next((known[node] for node in nodes if known[node].reach == ANY or known[node].verdict is not None), None)


def _input(node: Input, known: dict[Node, _Known]) -> _Known:
    return _Known(OWN) if node.default is None else known[node.default]


def _summary(node: Summary, known: dict[Node, _Known]) -> _Known:
    below = known[node.x]
    if below.reach == OWN and base_of(node.axes[2]) == "queries" and node.block > 1:
        return _Known(ANY, f"{node.label} joins {node.block} queries, of which all but the last read later ones")
    return below


def _products(node: Dot | Bound | Antidiagonal, known: dict[Node, _Known]) -> _Known:
    """The key of a product may be any of its block."""
    return _scored(node, node.inputs, known) or _Known(BLOCK)


def _scores(node: Scores, known: dict[Node, _Known]) -> _Known:
    return _combined_scores(node, node.inputs, known)


def _gumbel(node: Gumbel, known: dict[Node, _Known]) -> _Known:
    """The seed says nothing of tokens."""
    return _combined_scores(node, (node.scores,), known)


def _combined_scores(node: Scores | Select, parts: Sequence[Node], known: dict[Node, _Known]) -> _Known:
    """What is made of scores knows what these know."""
    own = _Known(PAST if all(known[part].reach == PAST for part in parts) else BLOCK)
    return _scored(node, parts, known) or own


def _scored(node: Scores | Select, parts: Sequence[Node], known: dict[Node, _Known]) -> _Known | None:
    """Why scores may depend on anything, or None."""
    worst = _worst(parts, known)
    if worst is None and block_of(node.axes[2]) > 1:
        return _Known(ANY, f"{node.label} scores {block_of(node.axes[2])} queries at a time, by what the last of them reads")
    return worst


def _weighted(node: Weighted, known: dict[Node, _Known]) -> _Known:
    """Factors of queries may depend on later ones."""
    return _worst((node.by,), known) or _combined_scores(node, (node.x,), known)


def _given_scores(node: GivenScores, known: dict[Node, _Known]) -> _Known:
    """What a call is given is known to its queries."""
    return _worst((node.x,), known) or _Known(PAST)


def _given_blocks(node: given_blocks.Given, known: dict[Node, _Known]) -> _Known:
    return _worst((node.x,), known) or _Known(PAST)


def _given_keys(node: GivenKeyScores, known: dict[Node, _Known]) -> _Known:
    """One number a key for all queries: which of them it was made from is not known."""
    why = f"{node.label} is one number a key for all queries, and what it was made from is not known"
    return _Known(ANY, why, Verdict("UNKNOWN", reason=why))


def _within(node: Node, among: Mask, known: _Known, what: str, tokens: int = 1) -> _Known:
    """Scores of blocks, used for the candidates ``among``: known to the query if all of these have ended."""
    if known.reach in (PAST, ANY) or known.verdict is not None:
        return known
    axis = node.axes[3]
    verdict = implies(among, _ends_before(axis, tokens))
    if verdict.status == "PROVED":
        return _Known(PAST)
    kind = "window" if windows_of(axis) else "block"
    size = (windows_of(axis) or (0,))[0] or block_of(axis)
    why = f"{what}, where a {kind} of {size} keys may end after the query"
    status = "REFUTED" if verdict.status == "REFUTED" else "UNKNOWN"
    return _Known(ANY, why, Verdict(status, verdict.witness, reason=f"{why} ({verdict.reason})" if verdict.reason else why))


def _softmax(node: Softmax, known: dict[Node, _Known]) -> _Known:
    return _within(node, _told(node.among), _scores(node, known), f"{node.label} sums over blocks among {node.among}")


def _select(node: Select, known: dict[Node, _Known]) -> _Known:
    if node.whole_sequence:
        return _Known(ANY, f"{node.label}, which compares the blocks of all rows")
    among = Mask(sympy.true) if node.among is None else _told(node.among)
    found = _within(node, among, _combined_scores(node, node.inputs, known), f"{node.label} compares blocks among {among}")
    forced = next((known[source] for source in node.inputs if source is not node.scores and known[source].reach == ANY), None)
    return forced or found


def _probe(node: Probe | key_choices.Diagonals, known: dict[Node, _Known]) -> _Known:
    return _Known(ANY, f"{node.label}, which looks at the last {node.rows} queries")


def _key_scores(node: Smooth | GroupedKeys, known: dict[Node, _Known]) -> _Known:
    return known[node.x]


def _decided(node: Order | Tokens | key_choices.ChosenKeys | key_choices.Divergence, known: dict[Node, _Known]) -> _Known:
    below = _worst(node.inputs, known) or known[node.inputs[0]]
    return _Known(ANY, f"{node.label} is decided by {below.why}") if below.reach == ANY and below.verdict is None else below


def _by_all_keys(node: Tokens | key_choices.ChosenKeys | key_choices.Divergence, known: dict[Node, _Known]) -> _Known:
    """Whatever the scores were made from: those of later keys are compared with those of earlier ones."""
    found = _decided(node, known)
    if found.reach == ANY and found.verdict is None:
        return found
    return _Known(ANY, f"{node.label}, which compares all keys of the call with each other, later ones too")


def _inverse(node: Inverse, known: dict[Node, _Known]) -> _Known:
    return known[node.order]


def _take(node: Take, known: dict[Node, _Known]) -> _Known:
    return _worst((node.order, node.x), known) or known[node.order]


def _attend(node: Attend, known: dict[Node, _Known]) -> _Known:
    worst = _worst(node.inputs, known)
    if worst is not None:
        return worst
    mask = _with_choices(node)
    axis, block, windows = node.y.axes[2], blocks_of_keys(node), windows_of(node.y.axes[2])
    ended = _ends_before(axis) if windows or block == 1 else minimum((kv_idx + 1) * block, kv_len) <= q_idx + 1
    seen = implies(mask, ended)
    if seen.status != "PROVED":
        row = f"window of {windows[0]} keys" if windows else f"block of {block} keys"
        what = f"{node.label}: a query sees a later {'key' if axis == 'keys' else row}"
        return _Known(ANY, what, Verdict(seen.status, seen.witness, reason=what if seen.witness is None else ""))
    for scores in reads_scores(node.pattern):
        found = _within(scores, mask, known[scores], f"{node.label} reads {scores.label} in its score", block)
        if found.reach != PAST:
            return found
    return _Known(PAST)


def _with_choices(node: Attend) -> Mask:
    """The mask, with what is known of its choices: what was chosen was a candidate."""
    return _told(node.pattern.mask, blocks_of_keys(node))


def _told(among: Mask, tokens: int = 1) -> Mask:
    """A mask with what is known of the choices that it reads. ``tokens``: those that ``kv_idx`` counts by."""
    mask: Any = among.expr
    for name, choice in choices_in(among).items():
        candidates = choice.candidates
        if candidates is not None and constant_in_blocks(candidates.expr, *choice.blocks):
            if tokens > 1 and KV_LEN in candidates.expr.free_symbols:
                continue
            own = _told(candidates).expr.xreplace({KV_IDX: (kv_idx * tokens).expr})
            on, off = (assume(mask, {name: value}) for value in (True, False))
            mask = sympy.Or(sympy.And(on, own), off)
    return as_mask(Mask(mask))


def _recurrent(node: Linear | Recall, known: dict[Node, _Known]) -> _Known:
    """It runs along the tokens, and is read where it stands."""
    return _worst(node.inputs, known) or _Known(PAST)


def _combined(node: Branch | Slots, known: dict[Node, _Known]) -> _Known:
    """As its parts."""
    return _worst(node.inputs, known) or _Known(PAST)


CAUSALITY_RULES: Rules[Callable[[Any, dict[Node, _Known]], _Known]] = Rules(
    "the proof of causality",
    {
        Input: _input,
        Summary: _summary,
        **dict.fromkeys((Dot, Bound, Antidiagonal), _products),
        **dict.fromkeys((Grouped, Plus, Regroup, Relu, Scaled, Overlap), _scores),
        Weighted: _weighted,
        GivenScores: _given_scores,
        GivenKeyScores: _given_keys,
        given_blocks.Given: _given_blocks,
        Softmax: _softmax,
        Gumbel: _gumbel,
        **dict.fromkeys((select.TopK, select.TopP, select.Threshold), _select),
        **dict.fromkeys((Probe, key_choices.Diagonals), _probe),
        **dict.fromkeys((Smooth, GroupedKeys), _key_scores),
        Order: _decided,
        **dict.fromkeys((Tokens, key_choices.ChosenKeys, key_choices.Divergence), _by_all_keys),
        Inverse: _inverse,
        Take: _take,
        Attend: _attend,
        Slots: _combined,
        **dict.fromkeys((Linear, Recall), _recurrent),
        **dict.fromkeys((Joint, Mix, Compact), _combined),
    },
)
