"""What programs must do whatever their numbers are: not see the future, not depend on how they are cut into calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any

import sympy
import torch

from sparsedsl.analysis.proofs import PROVED, causality
from sparsedsl.errors import PatternError, UnsupportedError
from sparsedsl.execute.compiled import Attention
from sparsedsl.execute.state import ProgramState, horizon
from sparsedsl.lang.symbols import BATCH, Q_LEN
from sparsedsl.lang.tables import table_reads
from sparsedsl.program.axes import base_of, block_of, complete_on, rows_on
from sparsedsl.program.branches import Attend
from sparsedsl.program.decided import possible
from sparsedsl.program.effect_rules import LATER_QUERIES, reasons
from sparsedsl.program.given_blocks import Given
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.orders import Positions
from sparsedsl.program.tensors import k, q, v
from sparsedsl.testing.call_shapes import AttentionCase, tensor
from sparsedsl.testing.counterexamples import Counterexample, arguments_code
from sparsedsl.testing.numerics import ExpectedResult, Results
from sparsedsl.testing.program_inputs import draw_inputs, gates_of
from sparsedsl.testing.program_matching import program_lines
from sparsedsl.testing.program_numbers import ProgramRun, choice_tables, expect_program, moving

__all__ = ["failing", "program_is_causal", "program_is_equivariant", "program_prefill_equals_decode", "rows_of", "split_call"]

Tensor = torch.Tensor
Tensors = Mapping[str, Tensor]


def failing(
    what: str, assertion: str, attn: Attention, case: AttentionCase, seed: int, words: Mapping[str, Any]
) -> Counterexample:
    """The counterexample of an assertion about a program."""
    return Counterexample(
        what, *program_lines(attn), f"sd.testing.{assertion}({arguments_code('attn', case, seed=seed, **words)})"
    )


def split_call(tensors: Tensors) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """q, k, v and the rest."""
    return (tensors["q"], tensors["k"], tensors["v"]), {n: x for n, x in tensors.items() if n not in ("q", "k", "v")}


def rows_of(program: Program, kind: str) -> dict[str, tuple[int, str]]:
    """Name of a tensor -> which of its axes counts ``"queries"`` or ``"keys"``, and that axis."""
    return {
        node.name: (place, axis)
        for node in (*program.inputs.values(), q, k, v)
        for place, axis in enumerate(node.axes) if base_of(axis) == kind
    }  # fmt: skip


def _cut(program: Program, tensors: Tensors, kind: str, start: int, end: int) -> dict[str, Tensor]:
    """The tensors with rows of queries or of keys ``start .. end`` alone; blocks as far as they are complete.

    What a call is given of choices stays what it is of every query: bitmaps keep an incomplete last block, and lists name no block
    beyond it.
    """
    found = dict(tensors)
    listed = {str(node.x.given_name): node for node in program.order if isinstance(node, Given)}
    for name, (axis, word) in rows_of(program, kind).items():
        if name in tensors:
            before, after = complete_on(word, start), (rows_on if name in listed else complete_on)(word, end)
            found[name] = tensors[name].narrow(axis, before, min(after, tensors[name].shape[axis]) - before)
    if kind == "keys":
        for name, node in listed.items():
            if not node.is_bitmap:
                found[name] = found[name].masked_fill(found[name] >= rows_on(node.axes[3], end), -1)
    return found


# ---- the future --------------------------------------------------------------------------------------------------------------


def program_is_causal(attn: Attention, case: AttentionCase, seed: int, given: Tensors) -> None:
    """:func:`~sparsedsl.testing.assert_causal` for programs."""
    before = draw_inputs(attn.program, case, seed, given)
    first, last = case.q_offset, min(case.kv_len, case.q_offset + case.q_len) - 1
    for t in sorted({round(first + i * (last - first) / 5) for i in range(6)}):
        after = _changed_later(attn.program, before, given, t, case.q_offset, seed)
        moved, reached = _moved_before(attn, before, after, t, case.q_offset)
        if moved or reached:
            what = f"{', '.join(moved)} up to position {t} change when what comes after it changes" if moved else ""
            what += (
                f"{'; ' if moved else ''}gradients of results up to position {t} reach {', '.join(reached)} after it"
                if reached
                else ""
            )
            why = reasons(attn.program).get(LATER_QUERIES)
            raise failing(what + (f" ({'; '.join(why)})" if why else ""), "assert_causal", attn, case, seed, given)
    _check_state(attn, before, case, seed, given)


def _changed_later(program: Program, tensors: Tensors, given: Tensors, t: int, q_offset: int, seed: int) -> dict[str, Tensor]:
    """The tensors with other, larger numbers in all rows that hold a token after ``t``; those given, and ids, stay as they are."""
    found, gates = dict(tensors), gates_of(program)
    for kind, passed in (("queries", q_offset), ("keys", 0)):
        for number, (name, (axis, word)) in enumerate(sorted(rows_of(program, kind).items())):
            if name not in tensors or name in given or not tensors[name].is_floating_point():
                continue
            x = tensors[name]
            kept = min(complete_on(word, max(t + 1 - passed, 0)), x.shape[axis])
            other = x + 4 * tensor(*x.shape, seed=seed + 50 + number, dtype=x.dtype)
            other = gates[name](other) if name in gates else other
            found[name] = torch.cat([x.narrow(axis, 0, kept), other.narrow(axis, kept, x.shape[axis] - kept)], dim=axis)
    return found


def _moved_before(attn: Attention, before: Tensors, after: Tensors, t: int, q_offset: int) -> tuple[list[str], list[str]]:
    """What of the positions up to ``t`` is not the same for both: choices, results, gradients; and what gradients reach beyond them."""
    moved = [f"choice {label}" for label in _other_choices(attn, before, after, t, q_offset)]
    reached, rows = [], t + 1 - q_offset
    old, new = (_first_rows(attn, tensors, rows, q_offset) for tensors in (before, after))
    allowance = functools.cache(lambda: _allowance(attn.program, before, old, q_offset))

    def differ(name: str, part: Callable[[Tensor], Tensor], first: Tensor, second: Tensor) -> bool:
        """Other lists, and other orders of keys, change the order in which terms are added up."""
        return not torch.equal(first, second) and allowance().fault(name, second, part=part, wanted=first) is not None

    counted = {**rows_of(attn.program, "keys"), **rows_of(attn.program, "queries")}
    for name, value in old.items():
        if name in ("out", "lse"):
            moved += [name] if differ(name, lambda x: x[:, :, :rows], value, new[name]) else []
            continue
        axis, word = counted.get(name[1:], (0, ""))
        if name[1:] not in counted:
            continue
        passed = q_offset if name[1:] in rows_of(attn.program, "queries") else 0
        kept = min(complete_on(word, max(t + 1 - passed, 0)), value.shape[axis])

        def first_part(x: Tensor, axis: int = axis, kept: int = kept) -> Tensor:
            return x.narrow(axis, 0, kept)

        if bool((value.narrow(axis, kept, value.shape[axis] - kept) != 0).any()):
            reached.append(name[1:])
        if differ(name, first_part, first_part(value), first_part(new[name])):
            moved.append(f"the gradient of {name[1:]}")
    return moved, reached


def _allowance(program: Program, tensors: Tensors, found: Results, q_offset: int) -> ExpectedResult:
    """How far off the results of :func:`_first_rows` may be."""

    def slope(x: Tensor) -> Tensor:
        rows = 2 * torch.where(torch.isfinite(x), x, 0.0)
        return torch.cat([rows, rows.new_zeros(*x.shape[:2], tensors["q"].shape[2] - x.shape[2], *x.shape[3:])], dim=2)

    slopes = (slope(found["out"]), slope(found["lse"]) if "lse" in found else None) if "dq" in found else None
    return expect_program(program, {**program.bound, **tensors}, ProgramRun(q_offset), cotangents=slopes)


def _other_choices(attn: Attention, before: Tensors, after: Tensors, t: int, q_offset: int) -> list[str]:
    """Labels of the choices that a position up to ``t`` follows and that differ."""
    old, new = (
        choice_tables(attn.choices(*qkv, q_offset=q_offset, **named), qkv[0].shape[0])
        for qkv, named in map(split_call, (before, after))
    )
    labels = [(node, attn.program.labels[node]) for node in attn.program.order]
    return [name for node, name in labels if name in old and not _same_up_to(node, old[name], new[name], t, q_offset)]


def _same_up_to(node: Node, old: Any, new: Any, t: int, q_offset: int) -> bool:
    if isinstance(old, list):  # kept tokens: how many are kept beyond t is no matter
        flags = [
            torch.zeros((len(x), 1 + int(max(a.max(), b.max()))), dtype=torch.bool).scatter(1, x, True)[:, : t + 1]
            for a, b in zip(old, new, strict=True) for x in (a, b)
        ]  # fmt: skip
        return all(torch.equal(a, b) for a, b in zip(flags[::2], flags[1::2], strict=True))
    if isinstance(node, Positions):
        whole = (t + 1) // node.segment * node.segment
        return torch.equal(old[:, :, :whole], new[:, :, :whole])
    block = block_of(node.axes[2])
    rows = (t - q_offset) // block + 1
    return torch.equal(old[:, :, :rows], new[:, :, :rows])


def _first_rows(attn: Attention, tensors: Tensors, rows: int, q_offset: int) -> dict[str, Tensor]:
    """Results of the first rows, and gradients ``d<name>`` of the sum of their squares; what the program does not give is left out."""
    weighable = attn.program.root.weighable
    named = split_call(tensors)[1]

    def call(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given: dict[str, Any] = {**tensors, **leaves}
        made = attn(**given, q_offset=q_offset, return_lse=weighable)
        out, lse = made if weighable else (made, None)
        return {"out": out[:, :, :rows]} | ({} if lse is None else {"lse": lse[:, :, :rows]})

    with torch.no_grad():
        found = call({})
    leaves = {name: tensors[name].detach().requires_grad_() for name in ("q", "k", "v", *moving(attn.program, named))}
    try:
        made = call(leaves)
    except UnsupportedError:
        return found
    total = sum(torch.where(torch.isfinite(x), x, 0.0).square().sum() for x in made.values())
    if not getattr(total, "requires_grad", False):
        return found
    slopes = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)  # type: ignore[arg-type]
    return found | {f"d{n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), slopes, strict=True)}


def _parts(state: ProgramState) -> list[Tensor]:
    values = [*state.recent.values()]
    for value in state.recurrent.values():
        values += [value] if isinstance(value, Tensor) else list(value)
    return [value.clone() for value in values]


def _check_state(attn: Attention, tensors: Tensors, case: AttentionCase, seed: int, given: Tensors) -> None:
    """A state is not changed by the call that goes on from it, and does not depend on queries."""
    if not keeps_state(attn.program) or case.q_offset or case.q_len != case.kv_len or case.kv_len < 2:
        return
    half = case.kv_len // 2
    parts = [
        _cut(attn.program, _cut(attn.program, tensors, "keys", *ends), "queries", *ends)
        for ends in ((0, half), (half, case.kv_len))
    ]
    states = []
    for factor in (1.0, 2.0):
        asked = {name: x * factor if name in rows_of(attn.program, "queries") else x for name, x in parts[0].items()}
        qkv, named = split_call(asked)
        states.append(attn(*qkv, **named, return_state=True)[-1])
    kept = _parts(states[0])
    if not all(torch.equal(a, b) for a, b in zip(kept, _parts(states[1]), strict=True)):
        raise failing(
            f"the state after {half} tokens changes with the queries of the call", "assert_causal", attn, case, seed, given
        )
    qkv, named = split_call(parts[1])
    attn(*qkv, **named, state=states[0], return_state=True)
    if not all(torch.equal(a, b) for a, b in zip(kept, _parts(states[0]), strict=True)):
        what = f"the state after {half} tokens changes when a call goes on from it"
        raise failing(what, "assert_causal", attn, case, seed, given)


# ---- cutting into calls --------------------------------------------------------------------------------------------------------


def keeps_state(program: Program) -> bool:
    """Whether calls of a program can go on from a state."""
    try:
        horizon(program)
    except UnsupportedError:
        return False
    return True


def _never_looks_ahead(program: Program) -> bool:
    """Whether no mask allows a later key, whatever is chosen, so that keys may be given up to the last query alone."""
    attends = (node for node in program.nodes(Attend) if node.y.axes[2] == "keys")
    return all(causality(possible(node.pattern.mask)) == PROVED for node in attends)


def program_prefill_equals_decode(
    attn: Attention, case: AttentionCase, chunks: tuple[int, ...], seed: int, given: Tensors
) -> tuple[str, ...]:
    """:func:`~sparsedsl.testing.assert_prefill_equals_decode` for programs."""
    program = attn.program
    why = reasons(program).get(LATER_QUERIES)
    if why:
        raise PatternError(f"{LATER_QUERIES} ({'; '.join(why)}): cut into other calls the program means something else")
    if any(Q_LEN in expr.free_symbols for expr in program.exprs):
        raise PatternError("the program reads q_len, the end of each call: cut into other calls it means something else")
    tensors = draw_inputs(program, case, seed, given)
    wanted = expect_program(program, {**program.bound, **tensors}, ProgramRun(case.q_offset))
    lengths = {"one call": case.q_len, **{f"chunks of {n}": n for n in chunks}, "token by token": 1}
    plans = [(name, length, "whole") for name, length in lengths.items()]
    plans += [("growing cache", max(1, case.q_len // 3), "growing")] if _never_looks_ahead(program) else []
    square = case.q_offset == 0 and case.q_len == case.kv_len
    plans += [(f"state, {name}", length, "state") for name, length in lengths.items()] if square and keeps_state(program) else []
    for name, length, keys in plans:
        for rows, out in _pieces(attn, tensors, case, length, keys):
            fault = wanted.fault("out", out, part=itemgetter((..., rows, slice(None))))
            if fault:
                what = f"{name}: rows {rows.start} to {rows.stop - 1}: {fault}"
                raise failing(what, "assert_prefill_equals_decode", attn, case, seed, {"chunks": chunks, **given})
    return tuple(name for name, _, _ in plans)


def _pieces(attn: Attention, tensors: Tensors, case: AttentionCase, length: int, keys: str) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and what calls of ``length`` queries give for them: with the whole keys, those up to the last query, or a state."""
    state = None
    for start in range(0, case.q_len, length):
        rows = slice(start, min(start + length, case.q_len))
        part = _cut(attn.program, tensors, "queries", rows.start, rows.stop)
        if keys == "state":
            qkv, named = split_call(_cut(attn.program, part, "keys", rows.start, rows.stop))
            out, state = attn(*qkv, **named, state=state, return_state=True)
            yield rows, out
            continue
        end = min(case.q_offset + rows.stop, case.kv_len) if keys == "growing" else case.kv_len
        qkv, named = split_call(_cut(attn.program, part, "keys", 0, end) if keys == "growing" else part)
        yield rows, attn(*qkv, **named, q_offset=case.q_offset + rows.start)


# ---- order -----------------------------------------------------------------------------------------------------------------


def program_is_equivariant(attn: Attention, case: AttentionCase, seed: int, given: Tensors) -> tuple[str, ...]:
    """:func:`~sparsedsl.testing.assert_equivariant` for programs: entries of the batch in another order."""
    program = attn.program
    exprs = program.exprs
    nodes = {node.label for node in program.everything}
    known = {read: sympy.Dummy(integer=True) for expr in exprs for read in table_reads(expr) if read.spec.name in nodes}
    if any(BATCH in expr.xreplace(known).free_symbols for expr in exprs):
        return ()
    tensors = draw_inputs(program, case, seed, given)
    allowance = expect_program(program, {**program.bound, **tensors}, ProgramRun(case.q_offset))
    order = torch.randperm(case.batch, generator=torch.Generator().manual_seed(seed))
    by_entry = {"q", "k", "v", *(name for name, node in program.inputs.items() if node.axes[0] == "batch")}
    qkv, named = split_call({name: x[order] if name in by_entry else x for name, x in tensors.items()})
    with torch.no_grad():
        out = attn(*qkv, **named, q_offset=case.q_offset)
    fault = allowance.fault("out", out, part=lambda x: x[order])
    if fault:
        what = f"results do not follow a permutation of the batch, though the program does not read b: {fault}"
        raise failing(what, "assert_equivariant", attn, case, seed, given)
    return ("batch",)
