"""What every recurrent source is made of: tokens cut into row ranges, a state that goes from range to range, and a backward pass that
computes one row range again at a time.

A *row range* is what is computed at once; inside it a step works on *chunks* of ``LIMITS.now.scan_chunk`` rows: what happens
between the rows of a chunk goes into products for all chunks of the row range together, and only the states before the chunks are
computed one after the other (`carry`).
Memory: inputs, results and one state a row range; backward holds the intermediate tensors of a single row range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.runtime.autograd import only_first_derivatives
from sparsedsl.runtime.threads import on_one_core

__all__ = ["RowRanges", "ScanPlan", "carry", "cut", "scan"]

WORTH_CORES = 1 << 21  # numbers in all inputs, from which on cores gain more than they wait

# Of tensors, or None for what a call does not have; tuples because autograd's functions take tensors one by one.
Tensors = tuple[Any, ...]
# Rows of queries, rows of keys, state -> rows of results, state.
Step = Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]
# The same and gradients of rows of results and of the state after (None: none) -> gradients of what a step is given.
Slopes = Callable[[Tensors, Tensors, Tensors, Tensors, Tensors], tuple[Tensors, Tensors, Tensors]]


class RowRanges(NamedTuple):
    """Query rows ``q[0]..q[1] - 1`` and key rows ``k[0]..k[1] - 1`` that are computed at once; either may be none.

    Where there are both, they are as many, and a query sees the keys of the row range up to that of its own row.
    """

    q: tuple[int, int]
    k: tuple[int, int]


@dataclass(frozen=True, eq=False)
class ScanPlan:
    """A step and where it goes. ``results``: shape and dtype of each result; their dimension 2 counts the rows of queries. ``slopes``:
    the step backward, where it is written by hand; else autograd makes it."""

    step: Step
    steps_of_rows: tuple[RowRanges, ...]
    results: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    slopes: Slopes | None = None


def cut(q_len: int, kv_len: int, first: int, lines: int, at_once: int | None = None) -> tuple[RowRanges, ...]:
    """The row ranges of a call with ``q_len`` queries and ``kv_len`` keys where query row 0 sees the keys up to row ``first``.

    A negative ``first`` means that the first queries see the state the call began with. ``lines``: batch entries times heads;
    ``at_once``: rows of all of them in a range, by default ``LIMITS.scan_rows``.
    Spans of queries and keys hold whole chunks, but for the last of them, which may be shorter than one.
    """
    if not lines:
        return ()
    chunk = LIMITS.now.scan_chunk
    rows = max(chunk, (at_once or LIMITS.now.scan_rows) // lines // chunk * chunk)
    early = min(q_len, max(0, -first))
    begin = max(0, first) if early < q_len else kv_len
    end = begin + q_len - early
    whole = begin + (end - begin) // chunk * chunk
    return (
        *(RowRanges(piece, (0, 0)) for piece in _pieces(0, early, rows)),
        *(RowRanges((early, early), piece) for piece in _pieces(0, begin, rows)),
        *(
            RowRanges((a - begin + early, b - begin + early), (a, b))
            for a, b in (*_pieces(begin, whole, rows), *_pieces(whole, end, rows))
        ),
        *(RowRanges((q_len, q_len), piece) for piece in _pieces(end, kv_len, rows)),
    )


def _pieces(begin: int, end: int, rows: int) -> Iterator[tuple[int, int]]:
    for at in range(begin, end, rows):
        yield at, min(end, at + rows)


def carry(kept: torch.Tensor, added: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``state = kept[c] * state + added[c]`` over the chunks ``c`` in dimension 2: the states before each chunk, and the last one."""
    states = [state]
    for one_kept, one_added in zip(kept.expand(*added.shape[:3], *kept.shape[3:]).unbind(2), added.unbind(2), strict=True):
        states.append(torch.addcmul(one_added, one_kept, states[-1]))
    return torch.stack(states[:-1], dim=2), states[-1]


def scan(plan: ScanPlan, queries: Tensors, keys: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
    """Results for all rows and the state after all keys. ``queries`` and ``keys`` have their rows in dimension 2.

    Differentiable once, in everything that requires gradients; nothing is kept for a backward pass that cannot come.
    """
    inputs = (*queries, *keys, *state)
    with torch.autocast(state[0].device.type, enabled=False):
        outputs = _Scan.apply(plan, len(queries), len(keys), *inputs)
    return outputs[: len(plan.results)], outputs[len(plan.results) :]


def _rows(tensors: Tensors, ranges: tuple[int, int]) -> Tensors:
    return tuple(None if t is None else t[:, :, ranges[0] : ranges[1]] for t in tensors)


def _forward(plan: ScanPlan, queries: Tensors, keys: Tensors, state: Tensors, states: list[torch.Tensor]) -> Tensors:
    """Results and state; the states before each row range are added to ``states``."""
    results = tuple(torch.empty(shape, dtype=dtype, device=state[0].device) for shape, dtype in plan.results)
    begin = state
    for ranges in plan.steps_of_rows:
        states.extend(state)
        rows, state = plan.step(_rows(queries, ranges.q), _rows(keys, ranges.k), state)
        for result, part in zip(results, rows, strict=True) if ranges.q[0] < ranges.q[1] else ():
            result[:, :, ranges.q[0] : ranges.q[1]] = part
    # A state of the caller's own stays the caller's.
    return (*results, *(t.clone() if t is given else t for t, given in zip(state, begin, strict=True)))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: ScanPlan, n_queries: int, n_keys: int, *inputs: Any) -> Any:
        states: list[torch.Tensor] = []
        after = n_queries + n_keys
        outputs = _where_it_is_quick(
            lambda: _forward(plan, inputs[:n_queries], inputs[n_queries:after], inputs[after:], states), inputs
        )
        ctx.plan, ctx.n_queries, ctx.after, ctx.n_inputs = plan, n_queries, after, len(inputs)
        ctx.save_for_backward(*inputs, *states)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @only_first_derivatives
    def backward(ctx: Any, *gradients: Any) -> Any:
        saved = ctx.saved_tensors
        return _where_it_is_quick(lambda: _Scan.gradients(ctx, saved, gradients), saved[: ctx.n_inputs])

    @staticmethod
    def gradients(ctx: Any, saved: Tensors, gradients: Tensors) -> Any:
        """What :meth:`backward` gives."""
        plan, n_queries, after, n_inputs = ctx.plan, ctx.n_queries, ctx.after, ctx.n_inputs
        wanted = ctx.needs_input_grad[3:]
        inputs, states, n_state = saved[:n_inputs], saved[n_inputs:], n_inputs - after
        found = [torch.zeros_like(t) if want else None for t, want in zip(inputs[:after], wanted[:after], strict=True)]
        of_results, of_state = gradients[: len(plan.results)], gradients[len(plan.results) :]
        # A state is a link to the keys before it: no keys that want gradients, no link.
        linked = any(wanted[n_queries:])
        with torch.autocast(inputs[-1].device.type, enabled=False):
            for number, ranges in reversed(list(enumerate(plan.steps_of_rows))):
                pieces = (*_rows(inputs[:n_queries], ranges.q), *_rows(inputs[n_queries:after], ranges.k))
                if plan.slopes is not None:
                    of_state = _by_hand(
                        plan, ranges, pieces, n_queries, states[number * n_state :][:n_state], of_results, of_state, found
                    )
                    continue
                leaves = [_leaf(t, want) for t, want in zip(pieces, wanted[:after], strict=True)]
                before = tuple(_leaf(t, linked) for t in states[number * n_state : (number + 1) * n_state])
                with torch.enable_grad():
                    rows, state = plan.step(tuple(leaves[:n_queries]), tuple(leaves[n_queries:]), before)
                parts = [None if g is None else g[:, :, ranges.q[0] : ranges.q[1]] for g in of_results] if rows else []
                together = zip((*rows, *state), (*parts, *of_state), strict=True)
                outputs = [(t, g) for t, g in together if g is not None and t.requires_grad]
                sources = [t for t in (*leaves, *before) if t is not None and t.requires_grad]
                if not outputs or not sources:
                    of_state = (None,) * n_state
                    continue
                along = [g.to(t) for t, g in outputs]
                got = iter(torch.autograd.grad([t for t, _ in outputs], sources, along, allow_unused=True))
                for place, leaf in enumerate(leaves):
                    grad = next(got) if leaf is not None and leaf.requires_grad else None
                    if grad is not None:
                        begin, end = ranges.q if place < n_queries else ranges.k
                        found[place][:, :, begin:end] = grad  # type: ignore[index]
                of_state = tuple(next(got) if t.requires_grad else None for t in before)
        return (None, None, None, *found, *(g if want else None for g, want in zip(of_state, wanted[after:], strict=True)))


def _by_hand(
    plan: ScanPlan, ranges: RowRanges, pieces: Tensors, n_queries: int, before: Tensors, of_results: Tensors, of_state: Tensors,
    found: list[Any],
) -> Tensors:  # fmt: skip
    """One row range backward by the plan's own step: ``found`` is filled in; the gradient of the state before."""
    assert plan.slopes is not None
    parts = tuple(None if g is None else g[:, :, ranges.q[0] : ranges.q[1]] for g in of_results)
    seen = parts if ranges.q[0] < ranges.q[1] else ()
    if all(g is None for g in (*seen, *of_state)):
        return of_state
    by_queries, by_keys, by_state = plan.slopes(pieces[:n_queries], pieces[n_queries:], before, seen, of_state)
    for place, slope in enumerate((*by_queries, *by_keys)):
        begin, end = ranges.q if place < n_queries else ranges.k
        if found[place] is not None and slope is not None:
            found[place][:, :, begin:end] = slope
    return by_state


def _where_it_is_quick(work: Callable[[], Any], inputs: Tensors) -> Any:
    """Little work on one core: its many small operations would wait for all cores each time, for long where others use them too."""
    numbers = sum(t.numel() for t in inputs if t is not None)
    return on_one_core(work) if numbers < WORTH_CORES and inputs[-1].device.type == "cpu" else work()


def _leaf(t: Any, wanted: bool) -> Any:
    return None if t is None else t.detach().requires_grad_(wanted)
