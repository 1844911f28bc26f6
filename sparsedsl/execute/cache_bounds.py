"""``sd.cache_bound``: what a pattern or a program must keep of the tokens it has read, to go on with those that follow."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch

from sparsedsl.analysis.cached_keys import GROWS, STATE, CacheBound, pattern_bound
from sparsedsl.analysis.proofs import PROVED, Verdict
from sparsedsl.analysis.token_reach import program_causality
from sparsedsl.errors import UnsupportedError
from sparsedsl.execute.dispatch import Dispatch
from sparsedsl.execute.node_rules import lowered
from sparsedsl.execute.state import STATE_RULES, advanced, first_kept, horizon
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern, as_pattern, attend
from sparsedsl.program.axes import base_of, rows_on
from sparsedsl.program.branches import Attend
from sparsedsl.program.decided import assume, possible
from sparsedsl.program.graph import Program, as_program
from sparsedsl.program.node import Node
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.select import choices_in
from sparsedsl.program.tensors import OWN, Input, k, v
from sparsedsl.runtime.program_call import check_program_call

__all__ = ["cache_bound"]


def cache_bound(pattern: Any) -> CacheBound:
    """What a cache must hold so that later queries miss no key, proved for all lengths and tables.

    Args:
        pattern: a mask, a pattern or a program.

    Returns:
        :class:`~sparsedsl.analysis.cached_keys.CacheBound`; ``print`` it. Programs of recurrences and windows have kind ``"state"``:
        calls with ``return_state=True`` make it. Programs that choose among all keys have kind ``"grows"``, and ``step`` says what a step
        of decoding reads of them.

    Raises:
        PatternError: it is neither.

    A number is a candidate that the bounds of the mask say, certified by :func:`sparsedsl.implies`, and lowered until a pair refutes it. A
    mask that no number is enough for, such as documents alone, grows.

    >>> import sparsedsl as sd
    >>> causal = sd.patterns.causal()
    >>> bound = sd.cache_bound(causal & (sd.patterns.sliding_window(512) | sd.patterns.sinks(4)))
    >>> bound.kind, bound.first, bound.recent, bound.witness.q_idx - bound.witness.kv_idx
    ('first + ring', 4, 512, 511)
    >>> print(sd.cache_bound(causal & (sd.q_idx // 64 - sd.kv_idx // 64 <= 2)))
    ring: a ring of 192 keys; PROVED (for all indices, lengths and tables)
    >>> sd.cache_bound(sd.patterns.nha(slots=16, window=32)).kind
    'state'
    """
    program = as_program(pattern)
    if program is None:
        return pattern_bound(as_pattern(pattern))
    return _program_bound(program) if program.static is None else pattern_bound(program.static)


@functools.lru_cache(maxsize=64)
def _program_bound(program: Program) -> CacheBound:
    union = _union(program)
    if union is not None:
        return pattern_bound(union)
    causal = program_causality(program)
    try:
        back, first = horizon(program), first_kept(program)
    except UnsupportedError as error:
        why = str(error).removeprefix("the program keeps no state: ").split(". Pass all")[0]
        why = program.worded(re.sub(r"<\w+ (\w+)>", r"\1", why))
        return CacheBound(GROWS, None, Verdict("UNKNOWN", reason=why), causal=causal, step=_step(program))
    size = functools.partial(_state_bytes, program, first + back)
    return CacheBound(STATE, None, PROVED, first=first, recent=back, causal=causal, state_bytes=size)


def _union(program: Program) -> Pattern | None:
    """One pattern that asks for the keys of all attentions of a program, where it is made of these alone; else None."""
    attends = list(program.nodes(Attend))
    for node in set(program.everything) - set(attends):
        rule = STATE_RULES[type(node)]
        try:
            if rule.after is not None or rule.looks_back(node):
                return None
        except UnsupportedError:
            return None
    for node in attends:
        if not {node.y, node.z} <= {k, v} or any(isinstance(value, Node) for value in node.pattern.bound.values()):
            return None
    masks = [node.pattern.mask for node in attends]
    return attend(functools.reduce(operator.or_, masks)) if masks else None


def _step(program: Program) -> str:
    """What a step of decoding reads, where it chooses, with summaries kept; else nothing."""
    parts: list[str] = []
    for node in program.nodes(Attend):
        choices = choices_in(node.pattern.mask)
        if not choices:
            continue
        for choice in choices.values():
            block = choice.blocks[1]
            row, chosen = ("key", "keys") if block == 1 else (f"{block} keys", f"blocks of {block} keys")
            count = f"as many {chosen} as it takes" if choice.most is None else f"{choice.most} {chosen}"
            parts += [f"one row for each {row}", count]
        mask = node.pattern.mask
        without = pattern_bound(attend(possible(Mask(assume(mask.expr, dict.fromkeys(choices, False)), mask.bound))))
        if without.is_bounded and without.most(1 << 30):
            parts.append(f"{without.kind} of {without.most(1 << 30)} keys" if without.every is None else without.kind)
    return ", ".join(dict.fromkeys(parts))


def _state_bytes(
    program: Program, kept: int, length: int, kv_heads: int, head_dim: int, dtype: str, *, head_dim_v: int, batch: int,
    heads: int | None, sizes: Mapping[str, int], given: Collection[str],
    tables: Mapping[str, torch.Tensor],
) -> int:  # fmt: skip
    """What the state of a call takes: that of one token is made, and its rows counted for as many as are held."""
    decays = [len(node.log_decays) for node in program.nodes(Linear) if isinstance(node.decay, tuple)]
    known = {
        "batch": batch, "heads": heads or (decays[0] if decays else kv_heads), "kv_heads": kv_heads, "value_heads": kv_heads,
        "head_dim": head_dim, "value_dim": head_dim_v, "queries": 1, "keys": 1, **sizes,
    }  # fmt: skip

    def size(axis: str) -> int:
        if axis.isdecimal():
            return int(axis)
        base = base_of(axis)
        return rows_on(axis, known.get(base, head_dim if base.endswith("dim") else kv_heads))

    def zeros(node: Input) -> torch.Tensor:
        axes = (node.axes[0], "value_heads", *node.axes[2:]) if node is v else node.axes
        return torch.zeros([size(axis) for axis in axes], dtype=getattr(torch, dtype))

    asked = [node for node in program.inputs.values() if node.default is None or node.name in given]
    made = {node.name: zeros(node) for node in (*OWN, *asked)}
    with torch.no_grad():
        call = check_program_call(program, made.pop("q"), made.pop("k"), made.pop("v"), {**made, **tables})
        run = lowered(call, Dispatch("tiled"), lse=False)
        run.value(program.root)
        state = advanced(call, run.dispatch, run.after)
    rows = sum(tensor.numel() * tensor.element_size() for tensor in state.recent.values())
    return state.nbytes - rows + rows * min(kept, length)
