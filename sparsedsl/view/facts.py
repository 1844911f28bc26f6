"""What stands beside the map: text, cost, causality, cache, generated source. Each is asked for by itself, as some take seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import sympy

from sparsedsl.analysis.mask_clauses import clauses, only_difference
from sparsedsl.analysis.proofs import Verdict, causality
from sparsedsl.analysis.report import analyse
from sparsedsl.analysis.token_reach import program_causality
from sparsedsl.errors import SparseDSLError
from sparsedsl.execute.cache_bounds import cache_bound
from sparsedsl.execute.compiling import compile as compile_pattern
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import HEAD
from sparsedsl.program.graph import Program
from sparsedsl.view.setting import Setting

__all__ = ["FACTS", "fact"]

# Tiles that are counted one by one, where the mask has conditions that no interval solves.
COUNTED = 1 << 16


def _one_head(pattern: Pattern, head: int) -> Pattern:
    """What one head sees: the map is of that head, and so is what stands beside it."""
    if HEAD not in pattern.mask.expr.free_symbols:
        return pattern
    mask = Mask(pattern.mask.expr.xreplace({HEAD: sympy.Integer(head)}), pattern.mask.bound)
    return replace(pattern, mask=mask)


def _cost(subject: Pattern | Program, setting: Setting, tables: Mapping[str, Any]) -> dict[str, Any]:
    words: dict[str, Any] = {"q_offset": setting.q_offset, **tables}
    if isinstance(subject, Program):
        return {"text": str(analyse(subject, setting.q_len, setting.kv_len, **words))}
    subject = _one_head(subject, setting.head)
    mask = subject.mask.expr
    tiles = -(-setting.q_len // setting.q_block) * -(-setting.keys // setting.kv_block)
    if tiles > COUNTED and not all(only_difference(literal) for clause in clauses(mask) for literal in clause.rest):
        return {
            "text": f"not counted here: the mask has conditions that no interval solves, and {tiles:,} tiles may have to be looked at one "
            f"by one. python -m sparsedsl explain SPEC --q-len {setting.q_len} counts them"
        }
    return {"text": str(analyse(subject, setting.q_len, setting.kv_len, (setting.q_block, setting.kv_block), **words))}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    """A verdict, and the pair of its witness, which the page jumps to."""
    witness = verdict.witness
    found: dict[str, Any] = {"text": str(verdict), "status": verdict.status}
    if witness is not None:
        found["witness"] = {"q_idx": int(witness.q_idx), "kv_idx": int(witness.kv_idx), "text": str(witness)}
    return found


def _causal(subject: Pattern | Program, setting: Setting, tables: Mapping[str, Any]) -> dict[str, Any]:
    return _verdict(program_causality(subject) if isinstance(subject, Program) else causality(subject.mask))


def _cache(subject: Pattern | Program, setting: Setting, tables: Mapping[str, Any]) -> dict[str, Any]:
    bound = cache_bound(subject)
    found: dict[str, Any] = {"text": str(bound)}
    if bound.witness is not None:
        found["witness"] = {"q_idx": int(bound.witness.q_idx), "kv_idx": int(bound.witness.kv_idx), "text": str(bound.witness)}
    return found


def _source(subject: Pattern | Program, setting: Setting, tables: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": compile_pattern(subject).source}


def _declared(subject: Pattern | Program, setting: Setting, tables: Mapping[str, Any]) -> dict[str, Any]:
    return {"text": subject.text}


Answer = Callable[["Pattern | Program", Setting, Mapping[str, Any]], dict[str, Any]]
FACTS: dict[str, Answer] = {"text": _declared, "causal": _causal, "cache": _cache, "cost": _cost, "source": _source}


def fact(name: str, subject: Pattern | Program, setting: Setting, tables: Mapping[str, Any]) -> dict[str, Any]:
    """One of :data:`FACTS`: ``text``, and where there is one a ``status`` and a ``witness``. What is refused is told as its message.

    >>> import sparsedsl as sd
    >>> fact("causal", sd.attend(sd.kv_idx <= sd.q_idx + 1), Setting(q_len=8), {})["witness"]["text"]
    'b=0, h=0, q_idx=0, kv_idx=1'
    """
    try:
        return FACTS[name](subject, setting, tables)
    except SparseDSLError as error:
        return {"text": str(error), "refused": True}
