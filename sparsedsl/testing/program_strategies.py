"""Hypothesis strategies for programs: nodes composed at random, and the inputs that calls of them are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st

from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import Mask, kv_idx, q_idx, score
from sparsedsl.program import branches, given_blocks, orders, recurrences, scores, select, sources, tensors
from sparsedsl.program.axes import base_of, block_of, complete_on, in_blocks, rows_on
from sparsedsl.program.graph import Program, as_program
from sparsedsl.program.node import Node
from sparsedsl.testing.call_shapes import AttentionCase, tensor
from sparsedsl.testing.strategies import patterns

__all__ = ["draw_inputs", "gates_of", "named_inputs", "program_inputs", "program_of", "programs"]

CAUSAL: Mask = kv_idx <= q_idx
_BLOCKS = (1, 4, 8)
_HOW = ("sum", "mean", "max")


def program_of(value: object) -> Program:
    """The program that a value is.

    Raises:
        PatternError: it is none.
    """
    found = as_program(getattr(value, "program", value))
    if found is None:
        raise PatternError(f"a program is wanted: a node, an sd.Program, or what sd.compile() made of one; got {value!r}")
    return found


# ---- inputs of calls -------------------------------------------------------------------------------------------------------


def _size(axis: str, case: AttentionCase, free: Mapping[str, int], ragged: bool) -> int:
    if axis.isdecimal():
        return int(axis)
    known = {
        "batch": case.batch, "heads": case.heads, "kv_heads": case.kv_heads, "value_heads": case.kv_heads, "queries": case.q_len,
        "keys": case.kv_len,
        "head_dim": case.head_dim, "value_dim": case.head_dim_v, "one": 1,
    }  # fmt: skip
    tokens = known.get(base_of(axis))
    if tokens is None:
        return free[axis]
    return rows_on(axis, tokens) if ragged else complete_on(axis, tokens)


def _free_axes(program: Program) -> dict[str, bool]:
    """The axes whose sizes a call is free to choose -> whether they count heads."""
    usual = {"batch", "heads", "kv_heads", "value_heads", "queries", "keys", "head_dim", "value_dim", "one"}
    found: dict[str, bool] = {}
    for node in program.inputs.values():
        for place, axis in enumerate(node.axes):
            if not axis.isdecimal() and base_of(axis) not in usual:
                found[axis] = found.get(axis, False) or (place == 1 and len(node.axes) == 4)
    return found


def _documents(program: Program) -> set[str]:
    """Names of the inputs that hold document ids."""
    read = [getattr(node, "documents", None) for node in program.everything]
    return {node.name for node in read if isinstance(node, tensors.Input)}


def _seeds(program: Program) -> set[str]:
    """Names of the inputs that hold seeds of noise."""
    return {node.seed.name for node in program.nodes(scores.Gumbel) if isinstance(node.seed, tensors.Input)}


def _listed(program: Program) -> dict[str, given_blocks.Given]:
    """Names of the inputs that hold choices."""
    return {node.x.name: node for node in program.nodes(given_blocks.Given) if isinstance(node.x, tensors.Input)}


def _blocks(drawn: torch.Tensor, node: given_blocks.Given, case: AttentionCase) -> torch.Tensor:
    """A bitmap, or lists of different blocks in any order, of which some places are empty."""
    if node.is_bitmap:
        return drawn > 0
    blocks = rows_on(node.axes[3], case.kv_len)
    room = torch.arange(max(blocks, drawn.shape[3])).expand(*drawn.shape[:3], -1)
    mixed = (room * 7919 + (drawn[..., :1] * 1000).long()).remainder(7907).argsort(-1)[..., : drawn.shape[3]]
    return torch.where((mixed < blocks) & (drawn > -1), mixed, -1)


def gates_of(program: Program) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Names of the inputs that hold decays or shares of a linear attention -> what makes such of any numbers."""
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    for node in program.nodes(recurrences.Linear):
        for gate, make in ((node.gate, torch.sigmoid if node.factor is not None else _logarithms), (node.beta, torch.sigmoid)):
            if isinstance(gate, tensors.Input):
                found[gate.name] = make
    return found


def _logarithms(x: torch.Tensor) -> torch.Tensor:
    return -0.5 * x.abs()


def named_inputs(
    program: Program,
    case: AttentionCase,
    *,
    seed: int,
    dtype: torch.dtype = torch.float64,
    free: Mapping[str, int] | None = None,
    ragged: bool = False,
) -> dict[str, torch.Tensor]:
    """The inputs of a program beside q, k and v. ``free``: sizes of its own axes; ``ragged``: whether incomplete blocks are given too."""
    sizes = {axis: case.kv_heads if heads else 5 for axis, heads in _free_axes(program).items()} | dict(free or {})
    ids, seeds, gates, listed = _documents(program), _seeds(program), gates_of(program), _listed(program)
    votes = {node.x.given_name for node in program.nodes(scores.GivenKeyScores)}
    found = {}
    for number, (name, node) in enumerate(program.inputs.items()):
        shape = [_size(axis, case, sizes, ragged) for axis in node.axes]
        drawn = tensor(*shape, seed=seed + 7 + number, dtype=dtype)
        if name in seeds:
            drawn = torch.full(shape, seed)
        drawn = gates[name](drawn) if name in gates else drawn.abs() if name in votes else drawn
        if name in listed:
            drawn = _blocks(drawn, listed[name], case)
        found[name] = (drawn > 1).long().cumsum(-1) if name in ids else drawn
    return found


def draw_inputs(
    program: Program, case: AttentionCase, seed: int, given: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """q, k, v and all inputs of a program by name; those given stay as they are. float64, where no two scores are equal."""
    shapes = {"q": case.q_shape, "k": case.k_shape, "v": case.v_shape}
    drawn = {name: tensor(*shape, seed=seed + i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    return drawn | named_inputs(program, case, seed=seed, dtype=dtype) | dict(given)


@st.composite
def program_inputs(
    draw: st.DrawFn, program: Any, case: AttentionCase, *, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """What calls of a program are given beside q, k and v: a tensor for every input, as its axes say.

    Axes of the program's own get sizes (head axes one or all key heads); the row of an incomplete last block of keys is given or left
    out; inputs that another node stands in for are given or not; document ids never fall.

    >>> import sparsedsl as sd
    >>> from hypothesis import given
    >>> case = AttentionCase(heads=4, kv_heads=2, q_len=24, kv_len=24)
    >>> @given(program_inputs(sd.patterns.hsa(chunk=8, top_k=2), case))
    ... def test(named):
    ...     assert named["landmarks"].shape[2] == 3
    >>> test()
    """
    program = program_of(program)
    own = _free_axes(program).items()
    free = {axis: draw(st.sampled_from((1, case.kv_heads) if heads else (3, 8))) for axis, heads in own}
    found = named_inputs(program, case, seed=draw(st.integers(0, 2**16)), dtype=dtype, free=free, ragged=draw(st.booleans()))
    optional = [name for name, node in program.inputs.items() if node.default is not None]
    return {name: value for name, value in found.items() if name not in optional or draw(st.booleans())}


# ---- programs --------------------------------------------------------------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn, *, heads: int = 4, causal: bool | None = None, depth: int = 1) -> Program:
    """Programs: choices of every rule by every kind of score, sorted keys, weighed chunks, slots, linear attention, subsets, joint and
    mixed branches, with shapes that fit.

    Args:
        heads: query heads of the calls that are meant; linear attention has a decay for each.
        causal: ``True`` for programs in which nothing depends on later tokens; ``None`` for any.
        depth: how deep branches are joined.

    >>> from hypothesis import given
    >>> @given(programs(causal=True))
    ... def test(program):
    ...     assert not any("later" in effect for effect in effects(program))
    >>> from sparsedsl.program.effect_rules import effects
    >>> test()
    """
    return Program(draw(_branches(heads, bool(causal), depth)))


@st.composite
def _branches(draw: st.DrawFn, heads: int, causal: bool, depth: int) -> branches.Branch:
    if depth > 0 and draw(st.integers(0, 2)) == 0:
        parts = [draw(_branches(heads, causal, depth - 1)) for _ in range(2)]
        if all(part.weighable for part in parts) and draw(st.booleans()):
            return branches.joint(*parts)
        return branches.mix(*parts, weights=tensors.input("gate_of_two", "batch heads queries 2"))
    kinds = [_attending, _attending, _weighed, _static, _remembering, _fading]
    kinds += [] if causal else [_by_blocks, _sorted, _compact]
    return branches.as_branch("programs", draw(draw(st.sampled_from(kinds))(heads, causal)))


@st.composite
def _static(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    return draw(patterns(depth=1, tables=False, causal=causal or None))


@st.composite
def _rows(draw: st.DrawFn, block: int, q_block: int) -> tuple[Node, Node]:
    """What stands for queries, one row for ``q_block``, and what stands for blocks of keys."""
    if draw(st.booleans()):
        keys = tensors.k if block == 1 else tensors.summary(tensors.k, block, draw(st.sampled_from(("mean", "max", "last"))))
        rows: Node = tensors.q
    else:
        keys = tensors.input(f"marks_{block}", f"batch marked_heads keys/{block} marked_dim")
        rows = tensors.input("asking", "batch marked_heads queries marked_dim")
    return (rows if q_block == 1 else tensors.summary(rows, q_block, pad=draw(st.sampled_from(("valid", "zero"))))), keys


@st.composite
def _scores(draw: st.DrawFn, block: int, q_block: int) -> scores.Scores:
    kind = draw(st.sampled_from(("dot", "dot", "sum", "noisy", "bound", "mass", "regrouped", "weighed", "windows", "given")))
    rows, keys = draw(_rows(block, q_block))
    found: Any
    if q_block == block > 1 and draw(st.integers(0, 2)) == 0:
        return scores.antidiagonal(tensors.q, tensors.k, draw(st.sampled_from((1, 2, 4))), block)
    if kind == "bound":
        own = tensors.q if q_block == 1 else tensors.summary(tensors.q, q_block)
        found = scores.bound(own, tensors.k, block)
    elif kind == "given":
        by = draw(st.sampled_from(("heads", "kv_heads", "one")))
        axes = f"batch {by} {in_blocks('queries', q_block)} {in_blocks('keys', block)}"
        found = scores.given_scores(tensors.input(f"scores_{by}_{q_block}_{block}", axes))
    elif kind == "windows" and block > 1:
        own = tensors.q if q_block == 1 else tensors.summary(tensors.q, q_block)
        windows, step = tensors.summary(tensors.k, block, stride=block // 2), block // 2
        mass = scores.dot(own, windows).softmax(kv_idx * step + block <= q_idx + 1)
        found = mass.overlap(block, draw(st.sampled_from(("strips", "max"))))
    elif kind == "regrouped" and block > 1:
        rows, keys = draw(_rows(block // 2, q_block))
        found = scores.dot(rows, keys).softmax(CAUSAL).regroup(2, draw(st.sampled_from(_HOW)))
    else:
        found = scores.dot(rows, keys, scale=draw(st.none() | st.just(0.5)))
        if kind == "noisy":
            found = found.gumbel(tensors.input("seed", "1"))
        elif kind == "sum":
            found = found + scores.dot(*draw(_rows(block, q_block).filter(lambda pair: _joins(found, pair))))
        elif kind == "weighed":
            factor = tensors.input(f"factor_{found.axes[1]}_{q_block}", f"batch {' '.join(found.axes[1:3])}")
            found = factor * found.relu() - found / 3 + 0.1
        elif kind == "mass":
            found = found.softmax(draw(st.sampled_from((CAUSAL, True))) if q_block > 1 else CAUSAL)
    if found.axes[1] == "heads" and draw(st.booleans()):
        found = (
            found.over_group(draw(st.sampled_from(_HOW)))
            if draw(st.booleans())
            else found.over_heads(draw(st.sampled_from(_HOW)))
        )
    return found


def _joins(found: scores.Scores, pair: tuple[Node, Node]) -> bool:
    return ("marked_heads" in found.axes) == (pair[0].axes[1] == "marked_heads")


@st.composite
def _choice(draw: st.DrawFn, by: scores.Scores, among: Any) -> select.Select:
    block = by.axes[3]
    columns = block_of(block)
    own = q_idx // columns - kv_idx // columns
    forced = draw(st.sampled_from((None, kv_idx < columns, abs(own) <= 1)))
    if among is not None and by.axes[2] == "queries" and draw(st.integers(0, 3)) == 0:
        coarse = scores.dot(tensors.q, tensors.summary(tensors.k, 8)).over_heads("max")
        inner = select.top_k(coarse, 2, among=(kv_idx // 8 + 1) * 8 <= q_idx)
        among = among & draw(st.sampled_from((inner.as_expression(), ~inner, inner | (kv_idx < 4))))
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
def _attending(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """One softmax over pairs that a choice for single queries is part of."""
    block = draw(st.sampled_from(_BLOCKS))
    ended, own = (kv_idx // block + 1) * block <= q_idx, q_idx // block == kv_idx // block
    near = q_idx - kv_idx < draw(st.integers(1, 12))
    selected = draw(_choice(draw(_scores(block, 1)), draw(st.sampled_from((None, ended)))))
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
    block = draw(st.sampled_from(_BLOCKS[1:]))
    ended = (kv_idx // block + 1) * block <= q_idx
    rows, keys = draw(_rows(block, 1))
    by = scores.dot(rows, keys)
    selected = draw(_choice(by, ended))
    inner, weights = draw(st.sampled_from(("softmax", "softmax1"))), draw(st.sampled_from(sources.RULES))
    return branches.attend(ended & selected, normaliser=sources.per_chunk(selected, weights, inner=inner))


@st.composite
def _by_blocks(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """A choice for blocks of queries; sometimes a bias made of scores."""
    block = draw(st.sampled_from(_BLOCKS[1:]))
    by = draw(_scores(block, block))
    own = q_idx // block == kv_idx // block
    selected = draw(_choice(by, draw(st.sampled_from((None, CAUSAL)))))
    bias = (
        score + scores.dot(tensors.summary(tensors.q, block), tensors.summary(tensors.k, block)) if draw(st.booleans()) else None
    )
    return branches.attend(CAUSAL & (own | selected), bias)


@st.composite
def _key_scores(draw: st.DrawFn, *, before: bool = False) -> scores.KeyScores:
    words = (
        {"causal": True, "keep": "before"}
        if before
        else {"causal": draw(st.booleans()), "complete": draw(st.sampled_from((1, 8)))}
    )
    found: Any = scores.probe(tensors.q, tensors.k, rows=draw(st.sampled_from((1, 4, 16))), **words)
    return scores.smooth(found, 3) if draw(st.booleans()) else found


@st.composite
def _sorted(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """Keys sorted within segments, and blocks of them chosen."""
    block, segment = draw(st.sampled_from(((4, 8), (8, 8), (4, 16))))
    seen = draw(_key_scores())
    order = orders.segment_sort(seen.over_group("mean") if draw(st.booleans()) else seen, segment, descending=draw(st.booleans()))
    k, v = orders.take(tensors.k, order), orders.take(tensors.v, order)
    earlier, same = kv_idx // segment < q_idx // segment, kv_idx // segment == q_idx // segment
    pooled = tensors.summary(tensors.q, block, pad="zero"), tensors.summary(k, block, pad="zero")
    selected = draw(_choice(scores.dot(*pooled), earlier))
    first = kv_idx // block == order.place(0) // block
    return branches.attend(earlier & (selected | first) | same & (order.origin(kv_idx) <= q_idx), k=k, v=v)


@st.composite
def _compact(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """A program on a subset of the tokens."""
    rule = draw(st.sampled_from(("tail", "cover")))
    share: dict[str, Any] = {rule: draw(st.sampled_from((0.1, 0.5, 0.9)))}
    kept = orders.keep_tokens(
        draw(_key_scores(before=True)), least=draw(st.integers(0, 6)), always=draw(st.sampled_from((0, 4))), **share
    )
    inside = draw(st.sampled_from((_static, _sorted)))(heads, causal)
    return branches.compact(kept, draw(inside))


@st.composite
def _remembering(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """Slots, alone or in one softmax with what has not left the window."""
    window, empty = draw(st.integers(0, 9)), draw(st.sampled_from(("zero_sink", "masked")))
    documents = draw(st.none() | st.just(tensors.input("ids", "batch keys")))
    first = draw(st.integers(0, 3)) if empty == "zero_sink" and documents is None else 0
    memory = sources.slots(
        tensors.input("slot_gate", "batch kv_heads keys 3"), delay=window, temperature=draw(st.sampled_from((1.0, 8.0))),
        empty=empty, documents=documents, first=first,
    )  # fmt: skip
    far = branches.recall(memory)
    near = CAUSAL & ((q_idx - kv_idx < max(window, 1)) | (kv_idx < first))
    return branches.joint(far, near) if draw(st.booleans()) else far


@st.composite
def _fading(draw: st.DrawFn, heads: int, causal: bool) -> Any:
    """Linear attention, with constant decays or those of the data."""
    documents = draw(st.none() | st.just(tensors.input("ids", "batch keys")))
    if draw(st.booleans()):
        more = " head_dim" if draw(st.booleans()) else ""
        rule: dict[str, Any] = draw(
            st.sampled_from(({}, {"reads": "before"}, {"features": "elu1", "normalised": "sum", "eps": 0.5}))
        )
        if draw(st.booleans()):
            rule = {"beta": tensors.input("share_written", "batch kv_heads keys"), "features": "l2"}
        fading = tensors.input(f"fading{len(more)}", f"batch heads keys{more}")
        return recurrences.linear(log_decay=fading, documents=documents, **rule)
    decay = [math.exp(-draw(st.sampled_from((0.0, 0.1, 2.0)))) for _ in range(heads)]
    return recurrences.linear(decay, scale=draw(st.none() | st.just(0.3)), documents=documents)
