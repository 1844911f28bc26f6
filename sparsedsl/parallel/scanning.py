"""Recurrences on ranks: runs of neighbouring tokens are scanned where they lie, and what goes from one to the next is a state.

The stages of a scan, each on all ranks at once:

1. *close*   each rank scans the keys of its runs: what a run writes into an empty state, and what it leaves of a state before it
2. *deal*    both go to the ranks that put them together, each of which does this for some heads of some batch entries
3. *follow*  run by run, in the order of positions: the state before each, which goes back to where the run lies
4. *scan*    each rank scans its runs from these states

Keys are scanned twice, queries once. What is sent is two states a run and head, however long the runs are.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch

from sparsedsl.execute.dispatch import Dispatch
from sparsedsl.execute.linear_rule import heads_of_state, left_of_state, run_linear
from sparsedsl.parallel.holding import Held
from sparsedsl.parallel.sending import dealt, sent, tied
from sparsedsl.program.branches import Recall
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.sources import Slots
from sparsedsl.program.tensors import Input
from sparsedsl.runtime.heads import NEVER
from sparsedsl.runtime.program_call import ProgramCall
from sparsedsl.runtime.scan_calls import SlotState, sparing

__all__ = ["Recurrence", "scanned"]

Tensor = torch.Tensor
Recurrence = Linear | Recall
# What a run writes into an empty state ``(B, H, D, W)``, and what it leaves of one before it: factors of its rows ``(B, H, D or 1, 1)``, or
# matrices ``(B, H, D, D)``.
Closed = tuple[Tensor, Tensor]


def scanned(node: Recurrence, call: ProgramCall, dispatch: Dispatch, held: Held) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Out and LSE of the rows of this rank (None: it holds no tokens), and the states that came for its runs, which gradients go back to.

    call: with the rows of this rank of all that has a row a token.
    """
    scan = _LinearScan(node, dispatch) if isinstance(node, Linear) else _SlotScan(node, dispatch)
    moved, came = _shifted(scan, call, held)
    parts = [(_narrowed(moved, row, count), position) for row, position, count in held.runs[held.rank]]
    follows = None if scan.documents is None else _follows(_given(moved, scan.documents), held)
    closed = [scan.closed(*part) for part in parts or [_nothing(moved)]]
    made, left = (torch.stack(found, dim=2) for found in zip(*closed, strict=True))
    # What has no way back of its own, as runs before the first key that is seen, gets one: backward, all take part.
    made = made if made.requires_grad or left.requires_grad else tied(made, *moved.inputs.values())
    states = tied(_states_before(made[:, :, : len(parts)], left[:, :, : len(parts)], follows, held), *came)
    if not parts:
        return None, None, states
    outs, lses = zip(*(scan.run(*part, state) for part, state in zip(parts, states.unbind(2), strict=True)), strict=True)
    out, lse = torch.cat(outs, dim=2), None if lses[0] is None else torch.cat(lses, dim=2)
    if isinstance(scan, _SlotScan) and scan.delay:
        out, lse = scan.emptied(call, moved, held, out, lse)
    return out, lse, states


def _given(call: ProgramCall, node: Any) -> Tensor:
    return call.inputs[_input(call, node)]


def _input(call: ProgramCall, node: Any) -> Input:
    """The input that gives what a node gives: it, or its default."""
    while node not in call.inputs:
        node = node.default
    found: Input = node
    return found


def _narrowed(call: ProgramCall, row: int, count: int) -> ProgramCall:
    """The call of some neighbouring rows."""
    inputs = {}
    for node, value in call.inputs.items():
        axis = _row_axis(node)
        inputs[node] = value if axis is None else value.narrow(axis, row, count)
    return replace(call, inputs=inputs)


def _nothing(call: ProgramCall) -> tuple[ProgramCall, int]:
    """A run of zeros, for a rank that has none: it says how large states are."""
    inputs = {}
    for node, value in call.inputs.items():
        axis = _row_axis(node)
        # What gradients reach on other ranks they reach on this one: backward, all take part.
        if axis is not None:
            shape = (*value.shape[:axis], 1, *value.shape[axis + 1 :])
            value = torch.cat([value, value.new_zeros(shape)], dim=axis)
        inputs[node] = value
    return replace(call, inputs=inputs), 0


def _row_axis(node: Input) -> int | None:
    """The axis of an input that has a row a token."""
    return next((number for number, axis in enumerate(node.axes) if axis in ("queries", "keys")), None)


def _shifted(scan: _LinearScan | _SlotScan, call: ProgramCall, held: Held) -> tuple[ProgramCall, list[Tensor]]:
    """The call in which each key stands where queries begin to see it, behind its delay, and what came for it. Rows before the first one
    are zeros."""
    if not scan.delay:
        return call, []
    route = held.behind(scan.delay)
    early, inputs, arrived = call.q.shape[2] - route.places.numel(), dict(call.inputs), list[Tensor]()
    for node in {_input(call, read): None for read in scan.keys}:
        axis = _row_axis(node)
        assert axis is not None
        came = sent(call.inputs[node].movedim(axis, 0), route)
        arrived.append(came)
        inputs[node] = torch.cat([came.new_zeros((early, *came.shape[1:])), came]).movedim(0, axis)
    return replace(call, inputs=inputs), arrived


# ---- states between runs -------------------------------------------------------------------------------------------------------------


def _states_before(made: Tensor, left: Tensor, follows: Tensor | None, held: Held) -> Tensor:
    """The states before the runs of this rank, ``(B, H, runs, D, W)``, from what they write and leave. ``follows``: see
    :func:`_follows`."""
    (batch, heads, own), widths = made.shape[:3], [math.prod(made.shape[3:]), math.prod(left.shape[3:])]
    world, counts = len(held.rows), [len(runs) for runs in held.runs]
    lines = batch * heads
    shares = [lines // world + (rank < lines % world) for rank in range(world)]
    first, share = sum(shares[: held.rank]), shares[held.rank]
    there, here = [own * each for each in shares], [share * count for count in counts]
    packed = torch.cat([made.flatten(3), left.flatten(3)], dim=3).flatten(0, 2)
    came = dealt(packed, there, here, held.group).split(here)
    order = held.run_order.to(packed.device)
    each = torch.cat([part.view(share, count, sum(widths)) for part, count in zip(came, counts, strict=True)], dim=1)[:, order]
    made, left = (x.unflatten(2, like.shape[3:]) for x, like in zip(each.split(widths, dim=2), (made, left), strict=True))
    entry = torch.arange(first, first + share, device=packed.device) // heads
    before = _followed(made, left, None if follows is None else follows[:, entry if follows.shape[1] > 1 else entry * 0])
    back = before[:, order.argsort()].split(counts, dim=1)
    states = dealt(torch.cat([part.flatten(0, 1) for part in back]), here, there, held.group).split(there)
    found = torch.cat([part.unflatten(0, (each, own)) for part, each in zip(states, shares, strict=True)])
    return found.unflatten(0, (batch, heads))


def _followed(made: Tensor, left: Tensor, follows: Tensor | None) -> Tensor:
    """The states before all runs of some lines, ``(lines, runs, D, W)``: of each the state before the last one, and what that wrote."""
    state, found = torch.zeros_like(made[:, 0]), []
    for run, (wrote, keeps) in enumerate(zip(made.unbind(1), left.unbind(1), strict=True)):
        found.append(state if follows is None else torch.where(follows[run, :, None, None], state, 0.0))
        # Of what is forgotten nothing is left, NaN neither.
        state = wrote + (torch.where(keeps > 0, keeps * found[-1], 0.0) if keeps.shape[2] == 1 else keeps @ found[-1])
    return torch.stack(found, dim=1)


def _follows(documents: Tensor, held: Held) -> Tensor:
    """Whether the first token of each run, in the order of positions, is of the document of the token before, ``(runs, 1 or B)``."""
    rows = torch.tensor([[row, row + count - 1] for row, _, count in held.runs[held.rank]], dtype=torch.int64).view(-1, 2)
    ends = sent(documents[:, rows.to(documents.device)].movedim(1, 0), held.runs_to_all)
    return torch.cat([torch.zeros_like(ends[:1, :, 0], dtype=torch.bool), ends[1:, :, 0] == ends[:-1, :, 1]])


def _of_one(documents: Tensor | None, left: Tensor) -> Tensor:
    """What is left of a state before a run; of a document that ends within it nothing."""
    if documents is None:
        return left
    return torch.where((documents[:, 1:] == documents[:, :-1]).all(1)[:, None, None, None], left, 0.0)


# ---- scans ---------------------------------------------------------------------------------------------------------------------------


class _LinearScan:
    """A linear attention."""

    def __init__(self, node: Linear, dispatch: Dispatch) -> None:
        self.node, self.dispatch = node, dispatch
        self.delay, self.documents, self.keys = node.delay, node.documents, (node.y, node.z)

    def _at(self, position: int) -> Linear:
        """The node of a call whose first row stands there, of keys that are behind their delay."""
        return replace(self.node, first=max(0, self.node.first + self.delay - position), delay=0)

    def closed(self, call: ProgramCall, position: int) -> Closed:
        """See :data:`Closed`; of the rows of a call, the first of which stands there."""
        node, rows, value = self._at(position), call.q.shape[2], functools.partial(_given, call)
        if node.beta is None and node.erase is None:
            made = run_linear(node, call, self.dispatch, value, state=None, rows=rows).state
            return made, _of_one(None if node.documents is None else value(node.documents), left_of_state(node, call, value))
        # The rule is linear in the state: with values of 0 it makes of the columns of 1 the matrix that it multiplies states by.
        v, width = value(node.z), value(node.y).shape[3]
        (batch, _, _, columns), heads = v.shape, heads_of_state(node, value).states
        eye = torch.eye(width, columns + width, dtype=call.dtype, device=v.device).roll(columns, 1)
        wide = replace(_input(call, node.z), name="v and zeros")
        call = replace(call, inputs={**call.inputs, wide: torch.cat([v, v.new_zeros((*v.shape[:3], width))], dim=3)})
        node, state = replace(node, z=wide), eye.expand(batch, heads, -1, -1)
        found = run_linear(node, call, self.dispatch, functools.partial(_given, call), state=state, rows=rows).state
        return found[..., :columns], found[..., columns:]

    def run(self, call: ProgramCall, position: int, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """Out and LSE of the rows of a call, from the state before them."""
        found = run_linear(self._at(position), call, self.dispatch, functools.partial(_given, call), state=state)
        return found.out, found.lse


class _SlotScan:
    """An attention to slots; its state are their keys and values, side by side."""

    def __init__(self, node: Recall, dispatch: Dispatch) -> None:
        self.node, self.memory, self.dispatch = node, node.memory, dispatch
        assert isinstance(self.memory, Slots)
        self.delay, self.documents = self.memory.delay, self.memory.documents
        more = () if self.documents is None else (self.documents,)
        self.keys = (self.memory.y, self.memory.z, self.memory.gate, *more)

    def _scan(self, call: ProgramCall, position: int, q: Tensor, scale: float, state: SlotState | None) -> Any:
        k, v = (_given(call, x) for x in (self.memory.y, self.memory.z))
        return self.dispatch.slots(
            q, k, v, self._gate(call, position), delay=0, temperature=self.memory.temperature, scale=scale, empty=self.memory.empty,
            state=state, documents=None if self.documents is None else _given(call, self.documents),
        )  # fmt: skip

    def _gate(self, call: ProgramCall, position: int) -> Tensor:
        return sparing(_given(call, self.memory.gate), max(0, self.memory.first + self.delay - position))

    def closed(self, call: ProgramCall, position: int) -> Closed:
        """See :data:`Closed`; of the rows of a call, the first of which stands there."""
        q = _given(call, self.node.x)
        state = self._scan(call, position, q[:, :, :0], 1.0, None)[2]
        kept = torch.nn.functional.logsigmoid(self._gate(call, position).to(call.dtype)).sum(2) / self.memory.temperature
        documents = None if self.documents is None else _given(call, self.documents)
        return torch.cat([state.keys, state.values], dim=3), _of_one(documents, kept.exp()[..., None])

    def run(self, call: ProgramCall, position: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """Out and LSE of the rows of a call, from the state before them."""
        q, width = _given(call, self.node.x), _given(call, self.memory.y).shape[3]
        written = torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
        before = SlotState(state[..., :width], state[..., width:], written)
        out, lse, _ = self._scan(call, position, q, call.scale or self.node.scale or q.shape[3] ** -0.5, before)
        return out, lse

    def emptied(self, call: ProgramCall, moved: ProgramCall, held: Held, out: Tensor, lse: Any) -> tuple[Tensor, Tensor]:
        """Out and LSE of all rows of this rank, of which those that see no key of their document see slots that are empty.

        call, moved: with keys where they are, and behind their delay.
        """
        seen = (held.rows[held.rank] >= self.delay).to(out.device)[None]
        if self.documents is not None:
            seen = seen & (_given(call, self.documents) == _given(moved, self.documents))
        slots = _given(call, self.memory.gate).shape[3]
        empty = NEVER if self.memory.empty == "masked" else math.log(slots)
        return torch.where(seen[:, None, :, None], out, 0.0), torch.where(seen[:, None], lse, empty)
