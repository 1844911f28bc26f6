"""What a program must remember of the tokens it has read to go on with those that follow, without reading them again.

A state holds what recurrent nodes made of all tokens but the last few, and these last few as they were given: as many as the program looks
back at directly. A call that continues puts the new tokens behind them. A program that keeps the first tokens in sight for ever (attention
sinks) has their rows before the last few: what lies between is gone, so that positions in the call are smaller than those in the text, and
every mask that is let through here says the same of both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.key_intervals import KeyInterval, interval_rows, intervals
from sparsedsl.analysis.mask_clauses import only_difference
from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.execute.dispatch import Dispatch
from sparsedsl.execute.linear_rule import run_linear
from sparsedsl.lang.known_facts import facts
from sparsedsl.lang.symbols import KV_IDX, KV_LEN, Q_IDX, Q_LEN
from sparsedsl.program import given_blocks, key_choices, orders, scores, select, tensors
from sparsedsl.program.axes import base_of
from sparsedsl.program.branches import Attend, Compact, Joint, Mix, Recall
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.rules import Rules
from sparsedsl.program.sources import Slots
from sparsedsl.program.tensors import Input, k, v
from sparsedsl.quantities import bytes_text
from sparsedsl.runtime.program_call import ProgramCall
from sparsedsl.runtime.scan_calls import sparing

__all__ = ["STATE_RULES", "ProgramState", "advanced", "continued", "first_kept", "horizon"]

Tensor = torch.Tensor
# A position far enough from the beginning for a window to be whole.
FAR = 1 << 24


@dataclass(frozen=True, eq=False, repr=False)
class ProgramState:
    """``tokens`` read so far. ``recent``: input name -> its last rows; ``recurrent``: node -> its state before these rows."""

    program: str
    tokens: int
    recent: Mapping[str, Tensor]
    recurrent: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        tensors = [*self.recent.values()]
        for value in self.recurrent.values():
            tensors += [value] if isinstance(value, Tensor) else list(value)
        return sum(t.numel() * t.element_size() for t in tensors)

    def __repr__(self) -> str:
        return f"<ProgramState after {self.tokens:,} tokens: {bytes_text(self.nbytes)}>"

    def each(self, change: Callable[[Tensor], Tensor]) -> ProgramState:
        """The state with every tensor, whose first axis is the batch, replaced by what ``change`` makes of it."""

        def changed(value: Any) -> Any:
            return change(value) if isinstance(value, Tensor) else type(value)(*map(change, value))

        recent = {name: change(rows) for name, rows in self.recent.items()}
        return replace(self, recent=recent, recurrent={label: changed(value) for label, value in self.recurrent.items()})


@functools.lru_cache(maxsize=256)
def horizon(program: Program) -> int:
    """How many tokens before a query the program looks at as they are.

    Raises:
        UnsupportedError: there is no such number, or positions matter beyond their differences.

    >>> import sparsedsl as sd
    >>> horizon(sd.Program(sd.patterns.nha(slots=8, window=32)))
    32
    """
    reach = max(STATE_RULES[type(node)].looks_back(node) for node in program.order)
    first_kept(program)
    return reach


@functools.lru_cache(maxsize=256)
def first_kept(program: Program) -> int:
    """How many tokens at the beginning stay in sight of every later query.

    Raises:
        UnsupportedError: a recurrence of the program would read them again with every call that continues.

    >>> import sparsedsl as sd
    >>> first_kept(sd.Program(sd.patterns.nha(slots=8, window=32, first=1)))
    1
    """
    first = max(STATE_RULES[type(node)].keeps(node) for node in program.order)
    for node in program.order:
        spared = STATE_RULES[type(node)].spares(node)
        if first and spared not in (None, first):
            raise _no_state(node, f"reads the first {first} tokens, which other parts of the program keep in sight, as any other")
    return first


def _no_state(node: Node, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"the program keeps no state: {node!r} {why}. Pass all keys and values with q_offset= instead of state="
    )


@functools.lru_cache(maxsize=256)
def _by_keys(program: Program) -> tuple[Input, ...]:
    """Inputs that have rows for keys; k and v among them, which count the keys of a call, whether or not the program reads them."""
    read = [node for node in program.nodes(Input) if any(base_of(axis) == "keys" for axis in node.axes)]
    return tuple(dict.fromkeys([k, v, *read]))


def _key_axis(node: Input) -> int:
    return next(number for number, axis in enumerate(node.axes) if base_of(axis) == "keys")


def continued(call: ProgramCall, state: ProgramState) -> ProgramCall:
    """The call with the state's last rows before its own keys."""
    if not isinstance(state, ProgramState) or state.program != call.program.key:
        raise ShapeError("state must be what a call of the same program with return_state=True returned; got " + repr(state)[:80])
    if call.q_offset:
        raise ShapeError(f"with state= the queries stand at the new keys; q_offset must be 0, got {call.q_offset}")
    inputs = dict(call.inputs)
    for node in _by_keys(call.program):
        if node in inputs:
            if node.name not in state.recent:
                raise ShapeError(
                    f"input {node.name!r} was not given to the call that made the state; give it to all calls or to none"
                )
            inputs[node] = torch.cat([state.recent[node.name].to(inputs[node].dtype), inputs[node]], dim=_key_axis(node))
    missing = sorted(set(state.recent) - {node.name for node in inputs})
    if missing:
        raise ShapeError(f"input {missing[0]!r} was given to the call that made the state; give it to all calls or to none")
    before = state.recent["k"].shape[2]
    return replace(call, inputs=inputs, q_offset=before, state={**state.recurrent, "": state.tokens - before})


def advanced(call: ProgramCall, dispatch: Dispatch, known: Mapping[Node, tuple[int, Any]]) -> ProgramState:
    """The state after all keys of a call. ``known``: of recurrences that ran, how many keys they read, and the state after
    these."""
    program = call.program
    total = call.k.shape[2]
    first, kept = first_kept(program), min(horizon(program), total)
    # With nothing between the first tokens and the last few, all stay.
    kept = total if first and total - kept <= first else kept
    read = total - kept
    recurrent: dict[str, Any] = {}
    for node in program.order:
        after = STATE_RULES[type(node)].after
        if after is not None:
            rows, state = known.get(node, (None, None))
            recurrent[program.labels[node]] = state if rows == read else after(node, call, dispatch, read)
    # Copies: views would keep all tokens alive.
    recent = {
        node.name: _rows(call.inputs[node], _key_axis(node), first if read else 0, read) for node in _by_keys(program)
        if node in call.inputs
    }  # fmt: skip
    return ProgramState(program.key, int(call.state.get("", 0)) + total, recent, recurrent)


def _rows(x: Tensor, axis: int, first: int, read: int) -> Tensor:
    last = x.narrow(axis, read, x.shape[axis] - read)
    return torch.cat([x.narrow(axis, 0, first), last], dim=axis) if first else last.clone()


# ---- rules -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StateRule:
    """What a kind of node needs of tokens that are over. ``looks_back(node)``: how many tokens before a query it reads as they are.
    ``after(node, call, dispatch, read)``: of a recurrence, what it has made of the first ``read`` keys; None: it makes nothing of them.
    ``keeps(node)``: how many tokens at the beginning it tells from all others. ``spares(node)``: how many of these a recurrence leaves out;
    None: it is none.
    """

    looks_back: Callable[[Any], int]
    after: Callable[[Any, ProgramCall, Any, int], Any] | None = None
    keeps: Callable[[Any], int] = lambda node: 0
    spares: Callable[[Any], int | None] = lambda node: None


def _own_row(node: Node) -> int:
    return 0


def _all_tokens(node: Node) -> NoReturn:
    raise _no_state(node, "chooses or sums up among all tokens")


def _window(node: Attend) -> int:
    domain = Domain(1, 2 * FAR, FAR)
    reach = [
        _distance_of_first(interval) if _first_keys(interval) else FAR - int(interval_rows(interval, domain)[0].min())
        for interval in _intervals(node)
    ]
    if any(distance >= FAR for distance in reach):
        raise _no_state(node, "sees all earlier keys")
    return max(reach, default=0)


def _first_of_window(node: Attend) -> int:
    return max((_first_keys(interval) for interval in _intervals(node)), default=0)


def _intervals(node: Attend) -> tuple[KeyInterval, ...]:
    """The keys a query sees, all of them by their distance or as the first of all."""
    pattern = node.pattern
    found = intervals(pattern.mask.expr) if not pattern.mask.tables and node.y.axes[2] == "keys" else None
    positions = facts(pattern.score.expr).symbols & {Q_IDX, KV_IDX, Q_LEN, KV_LEN}
    by_distance = (
        only_difference(pattern.score.expr) and not positions & {Q_LEN, KV_LEN} and not (positions and pattern.score.tables)
    )
    if found is None or not by_distance:
        raise _no_state(node, "sees keys by more than their distance")
    for interval in found:
        first = _first_keys(interval)
        near = not interval.conditions and all(only_difference(bound.q_part + bound.kv_part) for bound in interval.bounds)
        if not (near if not first else not positions and _distance_of_first(interval) is not None):
            raise _no_state(node, "sees keys by more than their distance")
    return found


def _first_keys(interval: KeyInterval) -> int:
    """How many keys at the beginning an interval is limited to; 0 if it goes on with the queries."""
    ends = [bound.high for bound in interval.bounds if bound.q_part == 0 and bound.kv_part == KV_IDX and bound.high is not None]
    return min((int(end) + 1 for end in ends if end.is_Integer), default=0)


def _distance_of_first(interval: KeyInterval) -> Any:
    """The distance from which on a query sees the first keys, less one; None if more is said of them, which a state forgets."""
    least = 0
    for bound in interval.bounds:
        if bound.q_part == 0 and bound.kv_part == KV_IDX and bound.low in (None, 0):
            continue
        low, apart = bound.low, bound.q_part == Q_IDX and bound.kv_part == -KV_IDX
        if not apart or bound.high is not None or low is None or not low.is_Integer:
            return None
        least = max(least, int(low) - 1)
    return None if interval.conditions else least


def _delay(node: Slots) -> int:
    _check_one_document(node)
    return node.delay


def _spared(node: Slots | Linear) -> int:
    return node.first


def _linear(node: Linear) -> int:
    _check_one_document(node)
    return node.delay


def _check_one_document(node: Slots | Linear) -> None:
    if node.documents is not None:
        raise _no_state(node, "begins anew with every document; call it document by document")


def _given(call: ProgramCall, node: Any) -> Tensor:
    while node not in call.inputs:
        node = node.default
    return call.inputs[node]


def _slots_after(node: Recall, call: ProgramCall, dispatch: Dispatch, read: int) -> Any:
    memory = node.memory
    y, z, gate = (_given(call, x)[:, :, :read] for x in (memory.y, memory.z, memory.gate))
    none = _given(call, node.x)[:, :, :0]
    return dispatch.slots(
        none, y, z, sparing(gate, memory.first), delay=memory.delay, temperature=memory.temperature, scale=1.0, empty=memory.empty,
        state=call.state_of(node),
    )[2]  # fmt: skip


def _linear_after(node: Linear, call: ProgramCall, dispatch: Dispatch, read: int) -> Any:
    given = functools.partial(_given, call)
    return run_linear(node, call, dispatch, given, state=call.state_of(node), rows=read).state


_LOOKS_AT_ALL = StateRule(_all_tokens)
STATE_RULES: Rules[StateRule] = Rules(
    "the state",
    {
        **dict.fromkeys((Input, Joint, Mix), StateRule(_own_row)),
        Attend: StateRule(_window, keeps=_first_of_window),
        Slots: StateRule(_delay, keeps=_spared, spares=_spared),
        Recall: StateRule(_own_row, _slots_after),
        Linear: StateRule(_linear, _linear_after, keeps=_spared, spares=_spared),
        **dict.fromkeys(
            (scores.Dot, scores.Bound, scores.Antidiagonal, scores.Softmax, scores.Regroup, scores.Plus), _LOOKS_AT_ALL
        ),
        **dict.fromkeys((scores.Gumbel, scores.Grouped, scores.Probe, scores.Smooth, scores.GroupedKeys), _LOOKS_AT_ALL),
        **dict.fromkeys((scores.Relu, scores.Scaled, scores.Weighted, scores.Overlap, scores.GivenScores), _LOOKS_AT_ALL),
        **dict.fromkeys(
            (scores.GivenKeyScores, given_blocks.Given, key_choices.Diagonals, key_choices.ChosenKeys), _LOOKS_AT_ALL
        ),
        key_choices.Divergence: _LOOKS_AT_ALL,
        **dict.fromkeys((select.TopK, select.TopP, select.Threshold, tensors.Summary, Compact), _LOOKS_AT_ALL),
        **dict.fromkeys((orders.Take, orders.Order, orders.Inverse, orders.Tokens), _LOOKS_AT_ALL),
    },
)
