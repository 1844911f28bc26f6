"""Which keys of the past later queries may ask for: the last few, the first few, every so-many-th, proved and made as small as can be.

The stages: each clause of the mask says a share (:mod:`past_bounds`); their union is proved to cover the mask for all lengths and tables;
then each number is lowered until a pair refutes it. That pair is the witness that the number is the least.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.analysis.past_bounds import Share, share_of
from sparsedsl.analysis.proofs import PROVED, REFUTED, Verdict, Witness, implies, satisfiable
from sparsedsl.lang import functions as fn
from sparsedsl.lang.expressions import Index, Mask, kv_idx, q_idx

__all__ = ["PastKeys", "past_keys"]

# A pair whose key is neither one of so many first ones nor of so many last ones says that no number is enough.
FAR = 1 << 16
# Remainders that are asked about one by one.
MOST_RESIDUES = 16
# Names of the numbers, as users know them.
RECENT, FIRST, EVERY = "recent", "first", "every"


@dataclass(frozen=True)
class PastKeys:
    """``share``: the keys that later queries may ask for; None: any key, and then ``verdict`` says why, with a pair where one is known.
    ``witnesses``: of a share, the pair that each number is needed for. ``needed``: the pairs meant, those of a query and a key before it
    or its own."""

    share: Share | None
    verdict: Verdict
    needed: Boolean = field(repr=False)
    witnesses: tuple[tuple[str, Witness], ...] = ()


@functools.lru_cache(maxsize=256)
def past_keys(mask: Boolean) -> PastKeys:
    """What a mask needs of the past.

    >>> import sparsedsl as sd
    >>> causal = sd.kv_idx <= sd.q_idx
    >>> past_keys((causal & ((sd.q_idx - sd.kv_idx < 512) | (sd.kv_idx < 4))).expr).share
    Share(recent=512, first=4, every=None, residues=())
    """
    past = (Mask(mask) & (kv_idx <= q_idx)).expr
    found = [share_of(clause) for clause in clauses(past)]
    share = _joined(part for part in found if part is not None)
    if None in found:
        beyond = Mask(past) & ~_cover(share) & (q_idx - kv_idx >= FAR) & (kv_idx >= FAR)
        asked = satisfiable(beyond.expr)
        if asked != REFUTED:
            why = "a query may ask for any earlier key" if asked == PROVED else f"no limit was found: {asked.reason}"
            return PastKeys(None, Verdict("REFUTED" if asked == PROVED else "UNKNOWN", asked.witness, why), past)
        share = _far_enough(past, share)
    if share.every is not None and len(share.residues) == share.every:
        return PastKeys(None, Verdict("UNKNOWN", reason="keys of every remainder may be asked for"), past)
    verdict = implies(Mask(past), _cover(share))
    if verdict != PROVED:
        return PastKeys(None, Verdict("UNKNOWN", reason=f"no limit was proved: {verdict}"), past)
    share, witnesses = _least(past, share)
    return PastKeys(share, verdict, past, witnesses)


def _far_enough(past: Boolean, share: Share) -> Share:
    """A share that covers what is known to be near or among the first keys: by one number if that will do."""
    raised = {name: fn.Max(getattr(share, name), sympy.Integer(FAR)) for name in (RECENT, FIRST)}
    for name, number in raised.items():
        if _covers(past, share, name, number) == PROVED:
            return replace(share, **{name: number})
    return replace(share, **raised)


def _joined(shares: Iterable[Share]) -> Share:
    """The keys in any of several shares."""
    parts = list(shares)
    strided = [part for part in parts if part.every is not None]
    every = math.lcm(1, *(part.every or 1 for part in strided))
    residues = {r for part in strided for r in range(every) if r % part.every in part.residues}  # type: ignore[operator]
    recent, first = (_largest([number for part in parts if (number := getattr(part, name)) != 0]) for name in (RECENT, FIRST))
    return Share(recent, first, every if strided else None, tuple(sorted(residues)))


def _largest(numbers: list[sympy.Expr]) -> sympy.Expr:
    return fn.Max(*numbers) if numbers else sympy.Integer(0)


def _cover(share: Share) -> Mask:
    """The pairs whose key is in the share."""
    found = (q_idx - kv_idx < Index(share.recent)) | (kv_idx < Index(share.first))
    runs: list[list[int]] = []
    for residue in share.residues:
        if runs and residue == runs[-1][1] + 1:
            runs[-1][1] = residue
        else:
            runs.append([residue, residue])
    for begin, end in runs:
        found = found | ((kv_idx % share.every >= begin) & (kv_idx % share.every <= end))
    return found


def _least(past: Boolean, share: Share) -> tuple[Share, tuple[tuple[str, Witness], ...]]:
    """The share with the least numbers, and the pair each one is needed for."""
    witnesses: dict[str, Witness] = {}
    needs: dict[str, Callable[[Witness], int]] = {RECENT: lambda w: w.q_idx - w.kv_idx + 1, FIRST: lambda w: w.kv_idx + 1}
    for name, needed in needs.items():
        number = getattr(share, name)
        if number == 0:
            continue
        if number.is_Integer:
            claim = functools.partial(_covers, past, share, name)
            least, witness = _lowered(claim, int(number), needed)
            share = replace(share, **{name: sympy.Integer(least)})
        else:
            witness = _covers(past, share, name, number - 1).witness
        if witness is not None:
            witnesses[name] = witness
    if 0 < len(share.residues) <= MOST_RESIDUES:
        for residue in share.residues:
            left = tuple(other for other in share.residues if other != residue)
            asked = implies(Mask(past), _cover(replace(share, residues=left)))
            if asked == PROVED:
                share = replace(share, residues=left)
            elif asked.witness is not None:
                witnesses[EVERY] = asked.witness
    if not share.residues:
        share = replace(share, every=None)
    return share, tuple(witnesses.items())


def _covers(past: Boolean, share: Share, name: str, number: Any) -> Verdict:
    return implies(Mask(past), _cover(replace(share, **{name: sympy.sympify(number)})))


def _lowered(claim: Callable[[int], Verdict], proved: int, needed: Callable[[Witness], int]) -> tuple[int, Witness | None]:
    """The least number for which ``claim`` is proved, and what refutes the one below; None: that one is not decided."""
    low, high, number, witness = 0, proved, proved - 1, None
    while low < high:
        asked = claim(number)
        if asked == PROVED:
            high = number
        elif asked.witness is not None:
            witness = asked.witness
            low = max(number + 1, min(needed(asked.witness), high))
        else:
            low = number + 1
        number = min((low + high) // 2, 2 * low + 1)
    if witness is not None and needed(witness) < high:
        witness = claim(high - 1).witness
    return high, witness
