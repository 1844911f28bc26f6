"""What programs that pick chunks promise: chunks have no order, weights have a total, and what nobody picked learns nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparsedsl.backends.reference.nodes import Reference
from sparsedsl.errors import PatternError
from sparsedsl.execute.compiled import Attention
from sparsedsl.program.axes import base_of, block_of
from sparsedsl.program.branches import Attend, Branch, Joint, Mix
from sparsedsl.program.effect_rules import LATER_QUERIES, reasons
from sparsedsl.program.node import reached
from sparsedsl.program.select import Choice
from sparsedsl.runtime.program_call import check_program_call
from sparsedsl.testing.call_shapes import AttentionCase, tensor
from sparsedsl.testing.program_behaviour import failing, rows_of, split_call
from sparsedsl.testing.program_inputs import draw_inputs
from sparsedsl.testing.program_matching import compiled_program
from sparsedsl.testing.program_numbers import ProgramRun, choice_tables, expect_program, moving

__all__ = ["assert_permutation_invariant", "assert_unselected_gradients_zero", "assert_weights_sum"]

Tensor = torch.Tensor
_CASE = AttentionCase(batch=2, heads=4, kv_heads=2, q_len=24, kv_len=24)


# ---- order of chunks, and of the tokens in them -------------------------------------------------------------------------------


def assert_permutation_invariant(
    attn: Any,
    case: AttentionCase = _CASE,
    *,
    chunk: int,
    of: Sequence[str] = ("chunks", "tokens"),
    seed: int = 0,
    **inputs: Tensor,
) -> None:
    """Past chunks in another order, or the tokens within them, are the same to the queries after them, but for rounding.

    The first half of the chunks is permuted: keys, values, and every input that has a row for a key or a chunk. Queries after these must
    get what they got before.

    Args:
        attn: a node (run by the reference), or what :func:`sparsedsl.compile` made of it.
        case: shape of the problem; at least two chunks and a query after them.
        chunk: tokens in a chunk.
        of: ``"chunks"``: whole chunks change places, with their landmarks; ``"tokens"``: within each chunk, which keeps its landmark.
        seed: of the inputs and of the order.
        inputs: of the program; others are drawn.

    >>> import sparsedsl as sd
    >>> assert_permutation_invariant(sd.patterns.hsa(chunk=4, top_k=2), chunk=4)
    """
    attn = compiled_program(attn)
    count = case.kv_len // chunk // 2 + 1
    first = count * chunk
    if count < 2 or first >= case.q_offset + case.q_len or first > case.kv_len:
        raise PatternError(f"{case} has no query after {max(count, 2)} chunks of {chunk} keys; give a longer one")
    tensors = draw_inputs(attn.program, case, seed, inputs)
    allowance = expect_program(attn.program, {**attn.program.bound, **tensors}, ProgramRun(case.q_offset))
    rows = slice(max(first - case.q_offset, 0), None)
    generator = torch.Generator().manual_seed(seed)
    for what in of:
        order = torch.arange(first).view(count, chunk)
        if what == "chunks":
            order = order[_moved_order(count, generator)]
        else:
            order = torch.stack([row[_moved_order(chunk, generator)] for row in order])
        changed = dict(tensors)
        for name, (axis, word) in rows_of(attn.program, "keys").items():
            x, block = tensors[name], block_of(word)
            moved = order.flatten()[::block] // block if block <= chunk and chunk % block == 0 else None
            if moved is None:
                raise PatternError(f"{name!r} has a row for {block} keys, which chunks of {chunk} do not consist of")
            if what == "tokens" and block > 1:
                continue
            place = torch.cat([moved, torch.arange(first // block, x.shape[axis])])
            changed[name] = x.index_select(axis, place)
        qkv, named = split_call(changed)
        with torch.no_grad():
            out = attn(*qkv, **named, q_offset=case.q_offset)[:, :, rows]
        fault = allowance.fault("out", out, part=lambda x: x[:, :, rows])
        if fault:
            moved_words = "past chunks" if what == "chunks" else "tokens within past chunks"
            words: dict[str, Any] = {"chunk": chunk, "of": (what,), **inputs}
            what = f"results change with the order of {moved_words}: {fault}"
            raise failing(what, "assert_permutation_invariant", attn, case, seed, words)


def _moved_order(count: int, generator: torch.Generator) -> Tensor:
    """A permutation that is not the identity, if there is one."""
    order = torch.randperm(count, generator=generator)
    return order if count < 2 or not torch.equal(order, torch.arange(count)) else order.roll(1)


# ---- weights ----------------------------------------------------------------------------------------------------------------


def assert_weights_sum(
    attn: Any,
    case: AttentionCase = _CASE,
    *,
    total: float | tuple[float, float] = 1.0,
    seed: int = 0,
    **inputs: Tensor,
) -> None:
    """The weights of all values add up to ``total`` in every row that sees something, and to 0 in the others.

    A value of 1 everywhere is put in, and what comes out is the total: a product of the weights of chunks and of those in them.

    Args:
        attn: a node (run by the reference), or what :func:`sparsedsl.compile` made of it; it must have an LSE.
        case: shape of the problem.
        total: the sum; two numbers: it lies strictly between them, as for ``"stick_breaking"``.
        seed: of the inputs.
        inputs: of the program; others are drawn.

    >>> import sparsedsl as sd
    >>> assert_weights_sum(sd.patterns.hsa(chunk=4, top_k=2))
    >>> assert_weights_sum(sd.patterns.hsa(chunk=4, top_k=2, weights="stick_breaking"), total=(0.0, 1.0))
    """
    attn = compiled_program(attn)
    if not attn.program.root.weighable:
        raise PatternError(f"{attn.program!r} is no softmax: its weights have no total")
    tensors = draw_inputs(attn.program, case, seed, inputs)
    tensors["v"] = torch.ones_like(tensors["v"])
    qkv, named = split_call(tensors)
    with torch.no_grad():
        out = attn(*qkv, **named, q_offset=case.q_offset)
        seen = _rows_that_see(attn, tensors, case)
    rounding = torch.finfo(out.dtype).eps * case.kv_len * 2
    low, high = total if isinstance(total, tuple) else (total - rounding, total + rounding)
    wrong = torch.where(seen[..., None], (out <= low) | (out >= high), out != 0)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        wanted = "0 where nothing is seen" if not seen[place[:3]] else f"between {low} and {high}"
        what = f"the weights of row {list(place[:3])} add up to {out[place].item():.9g}; wanted {wanted}"
        raise failing(what, "assert_weights_sum", attn, case, seed, {"total": total, **inputs})


def _rows_that_see(attn: Attention, tensors: dict[str, Tensor], case: AttentionCase) -> Tensor:
    """Rows whose softmax has something to weigh, by the dense meaning."""
    qkv, named = split_call(tensors)
    call = check_program_call(attn.program, *qkv, {**attn.program.bound, **named}, q_offset=case.q_offset)
    runner = Reference(call)
    _, lse = runner.value(attn.program.root)
    root = attn.program.root
    if isinstance(root, Attend) and root.normaliser is not None:  # a zero logit more is seen, and gives nothing
        return runner.chunk_scores(root.normaliser).amax(-1) > float("-inf")
    return lse > float("-inf")


# ---- gradients --------------------------------------------------------------------------------------------------------------


def assert_unselected_gradients_zero(
    attn: Any, case: AttentionCase = _CASE, *, seed: int = 0, **inputs: Tensor
) -> tuple[str, ...]:
    """Keys that no query attends to, and blocks that no query picked, get a gradient of exactly 0.

    Args:
        attn: a node (run by the reference), or what :func:`sparsedsl.compile` made of it; of attentions, joined and mixed.
        case: shape of the problem.
        seed: of the inputs.
        inputs: of the program; others are drawn.

    Returns:
        What was looked at: ``"k"``, ``"v"``, and inputs by blocks that choices are made by.

    >>> import sparsedsl as sd
    >>> assert_unselected_gradients_zero(sd.patterns.hsa(chunk=4, top_k=1))
    ('k', 'v', 'landmarks')
    """
    attn = compiled_program(attn)
    program = attn.program
    tensors = draw_inputs(program, case, seed, inputs)
    unused = _unused_rows(attn, tensors, case)
    named = split_call(tensors)[1]
    leaves = {name: tensors[name].detach().requires_grad_() for name in ("q", "k", "v", *moving(program, named))}
    out = attn(**{**tensors, **leaves}, q_offset=case.q_offset)
    d_out = tensor(*out.shape, seed=seed + 1, dtype=out.dtype)
    found = torch.autograd.grad((out * d_out).sum(), list(leaves.values()), allow_unused=True)
    slopes = dict(zip(leaves, found, strict=True))
    for name, flags in unused.items():
        slope = slopes[name]
        if slope is not None and bool((slope[flags] != 0).any()):
            place = (flags & (slope != 0).any(-1)).nonzero()[0].tolist()
            largest = float(slope[tuple(place)].abs().max())
            what = f"row {place} of {name} was neither picked nor attended to, and its gradient is {largest:.3g}"
            raise failing(what, "assert_unselected_gradients_zero", attn, case, seed, inputs)
    return tuple(unused)


def _unused_rows(attn: Attention, tensors: dict[str, Tensor], case: AttentionCase) -> dict[str, Tensor]:
    """Name -> flags ``(batch, heads, rows)`` of the rows that nothing should flow to."""
    program = attn.program
    attends = list(program.nodes(Attend))
    others = [node for node in program.nodes(Branch) if type(node) not in (Attend, Joint, Mix)]
    if others or any(node.y.axes[2] != "keys" for node in attends) or LATER_QUERIES in reasons(program):
        raise PatternError(
            f"{program!r} does more than attend to keys that single queries picked; which rows are unused is not known"
        )
    qkv, named = split_call(tensors)
    call = check_program_call(program, *qkv, {**program.bound, **named}, q_offset=case.q_offset)
    chosen = choice_tables(attn.choices(*qkv, q_offset=case.q_offset, **named), case.batch)
    runner = Reference(call)
    labels = program.labels
    runner.values |= {node: chosen[labels[node]] for node in program.order if labels[node] in chosen}
    shape = (case.batch, case.heads, case.q_len, case.kv_len)
    seen = torch.stack([runner.pairs(node.pattern.mask).expand(shape) for node in attends]).any(0)
    used = seen.any(2).unflatten(1, (case.kv_heads, -1)).any(2)
    found = {"k": ~used, "v": ~used}
    for name, node in program.inputs.items():
        selected = [choice for choice in program.nodes(Choice) if any(part is node for part in reached(choice))]
        if (
            selected
            and len(node.axes) == 4
            and base_of(node.axes[2]) == "keys"
            and all(p.axes[3] == node.axes[2] for p in selected)
        ):
            heads, blocks = tensors[name].shape[1:3]
            tables = [chosen[labels[p]].repeat_interleave(case.heads // chosen[labels[p]].shape[1], 1) for p in selected]
            flags = [table.any(2).unflatten(1, (heads, -1)).any(2)[..., :blocks] for table in tables]
            found[name] = ~torch.stack(flags).any(0)
    return found
