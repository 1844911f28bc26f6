"""Whether anything may see the future, asked of the prover before cases are drawn; what it refutes is run, and fails as code."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

from sparsedsl.analysis.proofs import PROVED, REFUTED, Verdict, Witness, causality
from sparsedsl.analysis.token_reach import program_causality
from sparsedsl.errors import SparseDSLError, TableError
from sparsedsl.execute.compiled import Attention
from sparsedsl.program.effect_rules import LATER_QUERIES, reasons
from sparsedsl.program.recurrences import Linear
from sparsedsl.testing.behaviour import assert_causal
from sparsedsl.testing.call_shapes import AttentionCase
from sparsedsl.testing.counterexamples import Counterexample, NotApplicable, pattern_code
from sparsedsl.testing.list_checks import allowed_pairs

__all__ = ["ask_about_pattern", "ask_about_program"]

# Keys and pairs of a case that is run; a witness beyond them fails by the prover's word alone.
_KEYS, _PAIRS = 1 << 18, 1 << 21
# Positions that bound tables reach are looked at one by one up to here, so many queries at a time.
_SEARCHED, _ROWS = 4096, 256
# A program is run on whole sequences.
_TOKENS = 400
_STRICT = "To have that fail: sd.attend(..., causal=True), or check(..., causal=True) (--causal)"


def ask_about_pattern(attn: Attention, causal: bool | None, within: AttentionCase | None = None) -> str:
    """What the prover says about the mask of a pattern, in words.

    Args:
        attn: the compiled pattern, its tables bound as far as they are given.
        causal: as in :func:`sparsedsl.testing.check`.
        within: the largest batch, heads, and positions that bound tables reach.

    Raises:
        Counterexample: it is refuted, and a run at the witness shows it (or the witness is too far away to be run).
        NotApplicable: it is refuted, and nobody asked for a causal pattern.
    """
    pattern = attn.pattern
    verdict = causality(pattern.mask)
    if verdict.witness is None or verdict != REFUTED:
        return _said(verdict)
    if causal is not True:
        raise NotApplicable(f"the mask lets a query see a later position: {verdict.witness}. {_STRICT}")
    witness = verdict.witness
    given: dict[str, Any] = {name: t for name, t in witness.tables.items() if name not in pattern.bound}
    case = _case_at(witness)
    if case is not None:
        with contextlib.suppress(TableError):  # tables that are bound end before the witness
            assert_causal(attn, case, **given)
    elif not pattern.has_score and set(witness.tables) == set(given):
        raise Counterexample(
            f"the mask lets a query see a later position: {witness}",
            f"pattern = {pattern_code(pattern)}",
            "assert sd.implies(pattern, sd.kv_idx <= sd.q_idx) != sd.REFUTED",
        )
    if within is not None and set(pattern.mask.tables) <= set(pattern.bound):
        return f"{_said(verdict)}; {_searched(attn, within)}"
    return f"{_said(verdict)}, which no case that was tried shows"


def _searched(attn: Attention, within: AttentionCase) -> str:
    """Look at every pair that bound tables reach, and run the first leak."""
    keys = min(within.kv_len, _SEARCHED)
    for start in range(0, keys, _ROWS):
        part = replace(within, q_len=min(_ROWS, keys - start), kv_len=keys, q_offset=start)
        later = allowed_pairs(attn.pattern, part) & (part.env["kv_idx"] > part.env["q_idx"])
        if later.any():
            b, h, row, kv = later.nonzero()[0].tolist()
            assert_causal(attn, AttentionCase(b + 1, h + 1, h + 1, 1, kv + 1, q_offset=start + row))
            return "the score keeps it from the result"
    return f"with the tables given no query among the first {keys} positions sees a later one"


def _case_at(witness: Witness) -> AttentionCase | None:
    """The smallest case that the witness lies in; None if it is too large to be run."""
    rows = 1 if witness.q_len is None else witness.q_len - witness.q_idx
    keys = witness.kv_idx + 1 if witness.kv_len is None else witness.kv_len
    batch, heads = witness.b + 1, witness.h + 1
    if batch * heads * keys > _KEYS or batch * heads * rows * keys > _PAIRS:
        return None
    return AttentionCase(batch, heads, heads, rows, keys, q_offset=witness.q_idx)


def ask_about_program(attn: Attention, causal: bool | None) -> str:
    """:func:`ask_about_pattern` for programs, whose declaration is followed through the graph."""
    why = reasons(attn.program).get(LATER_QUERIES)
    if why and causal is not True:
        raise NotApplicable(f"{LATER_QUERIES}: {'; '.join(why)}. {_STRICT}")
    verdict = program_causality(attn.program)
    if verdict != REFUTED:
        return _said(verdict)
    if causal is not True:
        raise NotApplicable(f"the program lets a query see later tokens: {verdict}. {_STRICT}")
    witness = verdict.witness
    if witness is not None and witness.kv_idx < _TOKENS:
        heads = next(
            (len(node.log_decays) for node in attn.program.nodes(Linear) if isinstance(node.decay, tuple)), witness.h + 1
        )
        case = AttentionCase(witness.b + 1, heads, heads, witness.q_idx + 1, witness.kv_idx + 1)
        given: dict[str, Any] = {name: t for name, t in witness.tables.items() if name in attn.program.tables}
        with contextlib.suppress(SparseDSLError):  # a call that is refused: the random ones are of shapes that fit
            assert_causal(attn, case, **given)
    return f"{_said(verdict)}, which no case that was tried shows"


def _said(verdict: Verdict) -> str:
    if verdict in (PROVED, REFUTED):
        return str(verdict)
    return f"{verdict}: only what was tried is known"
