"""Inputs of programs: a tensor for every input by name, of the shape that its axes say, with numbers that it may hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st

from sparsedsl.errors import PatternError
from sparsedsl.program import given_blocks, recurrences, scores, tensors
from sparsedsl.program.axes import base_of, complete_on, rows_on
from sparsedsl.program.graph import Program, as_program
from sparsedsl.testing.call_shapes import AttentionCase, tensor
from sparsedsl.testing.strategies import seeded_tables

__all__ = ["draw_inputs", "gates_of", "named_inputs", "program_inputs", "program_of"]


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
    """Names of the inputs that hold decays, shares or erasing keys of a linear attention, or scores of keys -> what makes such of any
    numbers."""
    votes = (node.x for node in program.nodes(scores.GivenKeyScores))
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {x.given_name: torch.abs for x in votes}
    for node in program.nodes(recurrences.Linear):
        decay = torch.sigmoid if node.factor is not None else _logarithms
        erasing = ((node.erase, _short), (node.along, _short))
        for gate, make in ((node.gate, decay), (node.beta, torch.sigmoid), *erasing):
            if isinstance(gate, tensors.Input):
                found[gate.name] = make
    return found


def _short(x: torch.Tensor) -> torch.Tensor:
    """Keys that make no state grow."""
    return x / (x.square().sum(-1, keepdim=True) + 1).sqrt()


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
    found = {}
    for number, (name, node) in enumerate(program.inputs.items()):
        shape = [_size(axis, case, sizes, ragged) for axis in node.axes]
        drawn = tensor(*shape, seed=seed + 7 + number, dtype=dtype)
        if name in seeds:
            drawn = torch.full(shape, seed)
        drawn = gates[name](drawn) if name in gates else drawn
        if name in listed:
            drawn = _blocks(drawn, listed[name], case)
        found[name] = (drawn > 1).long().cumsum(-1) if name in ids else drawn
    return found


def _tables(program: Program, case: AttentionCase, seed: int, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tables that a call must bring and is not given yet."""
    missing = program.tables.keys() - program.bound.keys() - given.keys()
    drawn = seeded_tables(program.exprs, case, {**program.bound, **given}, seed) if missing else {}
    return {name: value for name, value in drawn.items() if name in missing}


def draw_inputs(
    program: Program, case: AttentionCase, seed: int, given: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """q, k, v, all inputs and tables of a program by name; those given stay as they are. float64, where no two scores are equal."""
    shapes = {"q": case.q_shape, "k": case.k_shape, "v": case.v_shape}
    drawn = {name: tensor(*shape, seed=seed + i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
    tables = _tables(program, case, seed, given)
    return drawn | named_inputs(program, case, seed=seed, dtype=dtype) | tables | dict(given)


@st.composite
def program_inputs(
    draw: st.DrawFn, program: Any, case: AttentionCase, *, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """What calls of a program are given beside q, k and v: a tensor for every input, as its axes say, and for tables without one.

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
    seed = draw(st.integers(0, 2**16))
    found = named_inputs(program, case, seed=seed, dtype=dtype, free=free, ragged=draw(st.booleans()))
    optional = [name for name, node in program.inputs.items() if node.default is not None]
    found = {name: value for name, value in found.items() if name not in optional or draw(st.booleans())}
    return found | _tables(program, case, seed, {})
