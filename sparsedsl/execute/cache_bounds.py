"""``sd.cache_bound``: what a pattern or a program must keep of the tokens it has read, to go on with those that follow."""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from sparsedsl.analysis.cached_keys import GROWS, NOTHING, STATE, CacheBound, pattern_bound
from sparsedsl.analysis.proofs import PROVED, Verdict
from sparsedsl.analysis.report import ITEM_BYTES
from sparsedsl.analysis.token_reach import program_causality
from sparsedsl.errors import UnsupportedError
from sparsedsl.execute.dispatch import Dispatch
from sparsedsl.execute.node_rules import lowered
from sparsedsl.execute.state import STATE_RULES, advanced, first_kept, horizon
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern, as_pattern, attend
from sparsedsl.program import scores, select
from sparsedsl.program.axes import base_of, block_of, rows_on, windows_of
from sparsedsl.program.branches import Attend, Joint, Mix
from sparsedsl.program.decided import assume, possible
from sparsedsl.program.graph import Program, as_program
from sparsedsl.program.node import Node
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.select import choices_in
from sparsedsl.program.tensors import OWN, Input, k, v
from sparsedsl.runtime.program_call import check_program_call

__all__ = ["beside_blocks", "cache_bound", "union_of"]


def cache_bound(pattern: Any) -> CacheBound:
    """What a cache must hold so that later queries miss no key, proved for all lengths and tables.

    Args:
        pattern: a mask, a pattern or a program.

    Returns:
        :class:`~sparsedsl.analysis.cached_keys.CacheBound`; ``print`` it. Programs of recurrences and windows have kind ``"state"``:
        calls with ``return_state=True`` make it. Programs of windows beside compressed keys have ``"blocks"`` in their kind, and keep
        what their windows see. Programs that choose among all keys have kind ``"grows"``, and ``step`` says what a step
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
    union = union_of(program)
    if union is not None:
        return pattern_bound(union)
    causal = program_causality(program)
    beside = beside_blocks(program)
    if beside is not None and (near := pattern_bound(beside[0])).is_bounded:
        kind = "blocks" if near.kind == NOTHING else f"{near.kind} + blocks"
        size = functools.partial(_block_bytes, program, near)
        return replace(near, kind=kind, blocks=beside[1], causal=causal, step=_step(program), state_bytes=size)
    try:
        back, first = horizon(program), first_kept(program)
    except UnsupportedError as error:
        why = str(error).removeprefix("the program keeps no state: ").split(". Pass all")[0]
        why = program.worded(re.sub(r"<\w+ (\w+)>", r"\1", why))
        return CacheBound(GROWS, None, Verdict("UNKNOWN", reason=why), causal=causal, step=_step(program))
    size = functools.partial(_state_bytes, program, first + back)
    return CacheBound(STATE, None, PROVED, first=first, recent=back, causal=causal, state_bytes=size)


@functools.lru_cache(maxsize=256)
def union_of(program: Program) -> Pattern | None:
    """One pattern that asks for the keys of all attentions of a program, where it is made of these alone; else None.

    >>> import sparsedsl as sd
    >>> causal, near = sd.kv_idx <= sd.q_idx, sd.q_idx - sd.kv_idx < 8
    >>> union = union_of(sd.Program(sd.joint(causal & near, causal & ~near & (sd.kv_idx < 2))))
    >>> sd.equivalent(union.mask, causal & (near | (sd.kv_idx < 2))) == sd.PROVED
    True
    """
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


# What there may be beside attention to keys by a mask.
_BESIDE_BLOCKS = (
    Input, Attend, Joint, Mix,
    scores.Dot, scores.Relu, scores.Scaled, scores.Weighted, scores.Plus, scores.Softmax, scores.Grouped, scores.GivenScores,
    select.TopK, select.TopP, select.Threshold,
)  # fmt: skip


@functools.lru_cache(maxsize=256)
def beside_blocks(program: Program) -> tuple[Pattern, dict[str, int]] | None:
    """Of a program that sees keys as they are by masks alone, and else rows for blocks of keys that calls give: one pattern that asks for
    these keys, and the inputs with such rows -> keys in a block. None: it is another.

    >>> import sparsedsl as sd
    >>> pattern, blocks = beside_blocks(sd.Program(sd.patterns.hca(block=8, window=16)))
    >>> print(pattern.mask, blocks)
    (kv_idx <= q_idx) & (q_idx - kv_idx < 16) {'entries': 8}
    >>> beside_blocks(sd.Program(sd.patterns.moba(8, 2))) is None
    True
    """
    masks, blocks = list[Mask](), dict[str, int]()
    for node in program.everything:
        given, seen = _blocks_given(node), _seen_by_mask(node)
        if given is None or seen is None or not isinstance(node, _BESIDE_BLOCKS):
            return None
        if not seen and not isinstance(node, Input) and any("keys" in child.axes for child in _inputs_among(node.inputs)):
            return None
        blocks.update(given)
        masks += seen
    return (attend(functools.reduce(operator.or_, masks)), blocks) if masks and blocks else None


def _inputs_among(nodes: Iterable[Node]) -> list[Input]:
    return [node for node in nodes if isinstance(node, Input)]


def _blocks_given(node: Node) -> dict[str, int] | None:
    """Of an input with rows for blocks of keys, how many keys these have; None: they have windows."""
    of_blocks = [(one.name, x) for one in _inputs_among([node]) for x in one.axes if base_of(x) == "keys" and x != "keys"]
    return None if any(windows_of(axis) for _, axis in of_blocks) else {name: block_of(axis) for name, axis in of_blocks}


def _seen_by_mask(node: Node) -> list[Mask] | None:
    """The mask of attention to the keys that a call gives; None: something else decides which keys are seen, or what they are."""
    if not isinstance(node, Attend) or node.y.axes[2] != "keys":
        return []
    alone = len(_inputs_among([node.y, node.z])) == 2 and not any(isinstance(x, Node) for x in node.pattern.bound.values())
    return [node.pattern.mask] if alone else None


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

    def zeros(node: Input) -> torch.Tensor:
        axes = (node.axes[0], "value_heads", *node.axes[2:]) if node is v else node.axes
        return torch.zeros([_size(axis, known) for axis in axes], dtype=getattr(torch, dtype))

    asked = _asked(program, given)
    made = {node.name: zeros(node) for node in (*OWN, *asked)}
    with torch.no_grad():
        call = check_program_call(program, made.pop("q"), made.pop("k"), made.pop("v"), {**made, **tables})
        run = lowered(call, Dispatch("tiled"), lse=False)
        run.value(program.root)
        state = advanced(call, run.dispatch, run.after)
    rows = sum(tensor.numel() * tensor.element_size() for tensor in state.recent.values())
    return state.nbytes - rows + rows * min(kept, length)


def _asked(program: Program, given: Collection[str]) -> list[Input]:
    return [node for node in program.inputs.values() if node.default is None or node.name in given]


def _size(axis: str, known: Mapping[str, int]) -> int:
    """How many rows an axis has in a call of these sizes; what is named nowhere is as wide or as many as the heads of keys are."""
    if axis.isdecimal():
        return int(axis)
    base = base_of(axis)
    return rows_on(axis, known.get(base, known["head_dim"] if base.endswith("dim") else known["kv_heads"]))


def _block_bytes(
    program: Program, near: CacheBound, length: int, kv_heads: int, head_dim: int, dtype: str, *, head_dim_v: int, batch: int,
    heads: int | None, sizes: Mapping[str, int], given: Collection[str], tables: Mapping[str, torch.Tensor],
) -> int:  # fmt: skip
    """What the keys that ``near`` asks for take, and the rows for all blocks that are over."""
    known = {
        "batch": batch, "heads": heads or kv_heads, "one": 1, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": head_dim_v,
        "queries": 1, **sizes,
    }  # fmt: skip
    kept = {"keys": near.most(length, batch=batch, heads=heads, **tables)}
    numbers = 0
    for node in dict.fromkeys([*OWN, *_asked(program, given)]):
        (axis,) = [axis for axis in node.axes if base_of(axis) == "keys"] or [""]
        if axis:
            others = math.prod(_size(other, known) for other in node.axes if other != axis)
            numbers += others * kept.get(axis, length // block_of(axis))
    return numbers * ITEM_BYTES[dtype]
