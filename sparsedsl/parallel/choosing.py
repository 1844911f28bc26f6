"""Calls of programs on ranks: what blocks are compared by goes to all, each rank chooses for its own queries and is sent what it chose.

The stages of a call, each on all ranks at once:

1. *spread*  rows that blocks are compared by, and what attends to such rows alone, are made where the keys lie and sent to all
2. *scan*    recurrences run along the keys that lie here, from the states that others end in (:mod:`.scanning`)
3. *choose*  the program of the queries of this rank over all blocks gives its choices
4. *fetch*   whole blocks of keys: those that the mask allows in any case, and those that were chosen; who is asked is told first
5. *attend*  the program of these queries and these keys, in which the choices are known

Backward, gradients go back the ways that rows came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsedsl.errors import ShapeError, TableError, UnsupportedError
from sparsedsl.execute.attend_rule import chunk_weights
from sparsedsl.execute.call_words import CallWords
from sparsedsl.execute.calls import Calls
from sparsedsl.execute.kept_summaries import Pooling
from sparsedsl.lang.tables import by_kept_name
from sparsedsl.parallel.holding import Held
from sparsedsl.parallel.scanning import scanned
from sparsedsl.parallel.sending import sent, tied
from sparsedsl.parallel.stages import Stages, stages_of, whole_blocks
from sparsedsl.program import tensors
from sparsedsl.program.axes import base_of, block_of, rows_on
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.relocation import Relocation, relocated_nodes
from sparsedsl.program.tensors import Input
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.program_call import check_program_call
from sparsedsl.runtime.standing import Standing
from sparsedsl.selection.selected_blocks import SelectedBlocks

__all__ = ["ChoosingCalls"]

Tensor = torch.Tensor
Values = Mapping[Input, Tensor]


class ChoosingCalls:
    """One rank's part of the calls of a program. ``certain``: positions of keys that its queries see whatever is chosen; ``last_keys``: of
    those that the last call had."""

    def __init__(self, program: Program, held: Held, certain: Tensor) -> None:
        self.held, self.certain = held, certain
        self.whole, self.unit = whole_blocks(program)
        self.last_keys = certain
        self._stages: dict[frozenset[str], Stages] = {}
        self._nodes: dict[Relocation, dict[Node, Any]] = {}

    def attend(self, calls: Calls, q: Tensor, k: Tensor, v: Tensor, words: CallWords) -> Any:
        """The call of ``calls`` on this rank's rows."""
        named = by_kept_name(words.named, calls.table_names)
        inputs = {node: named[name] for name, node in calls.program.inputs.items() if named.get(name) is not None}
        given = frozenset(node.name for node in inputs)
        for name, node in calls.program.inputs.items():
            if name not in given and node.default is None:
                raise TableError(f"missing input {name!r}: pass {name}=tensor with the axes {' '.join(node.axes)!r}")
        if given not in self._stages:
            self._stages[given] = stages_of(calls.program, given)
        values = {tensors.q: q, tensors.k: k, tensors.v: v, **self._checked(inputs)}
        if not q.shape[0]:
            raise ShapeError(f"q must have a batch entry at least, with cp= and a program; got {tuple(q.shape)}")
        call = _Call(self, calls, self._stages[given], values, words._replace(named=named))
        refused = calls.refused_use(grad=any(x.requires_grad for x in values.values()), lse=words.return_lse)
        if refused is not None:
            raise UnsupportedError(refused)
        with torch.autocast(q.device.type, enabled=False):
            out, lse = call.densely() if calls.backend == "reference" else call.made()
        return (out.to(q.dtype), lse) if words.return_lse else out.to(q.dtype)

    def nodes(self, program: Program, where: Relocation) -> dict[Node, Any]:
        """Each node of the program -> that of the program told where it stands."""
        if where not in self._nodes:
            self._nodes[where] = relocated_nodes(program, where)
        return self._nodes[where]

    def _checked(self, inputs: Values) -> dict[Input, Tensor]:
        """Inputs that have a row for each of this rank's keys, or blocks of them."""
        local, found = self.held.rows[self.held.rank].numel(), {}
        for node, value in inputs.items():
            if not isinstance(value, Tensor) or value.ndim not in (len(node.axes), len(node.axes) - 1):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ShapeError(f"input {node.name!r} must be a tensor with the axes {' '.join(node.axes)!r}; got {got}")
            found[node] = value = value if value.ndim == len(node.axes) else value[None]
            for axis, size in zip(node.axes, value.shape, strict=True):
                if base_of(axis) == "keys" and size != rows_on(axis, local):
                    raise ShapeError(
                        f"input {node.name!r} with the axes {' '.join(node.axes)!r} has {size} rows for {axis!r}; wanted "
                        f"{rows_on(axis, local)}, those of the {local} tokens of rank {self.held.rank}, a last block that is not full "
                        "included: plan.shard() of what the whole has a row a token of"
                    )
        return found


@dataclass
class _Call:
    """One call on its way through the stages. ``values``: this rank's rows; ``ways``: tensors that came from others; ``graded``: nodes of
    the first evaluation that make rows of blocks and get gradients."""

    part: ChoosingCalls
    calls: Calls
    stages: Stages
    values: dict[Input, Tensor]
    words: CallWords

    def __post_init__(self) -> None:
        self.ways: list[Tensor] = []
        self.graded: Set[Node] = frozenset()

    @property
    def where(self) -> Standing:
        """Where the queries stand."""
        assert self.words.where is not None
        return replace(self.words.where, scanned=bool(self.stages.recurrent))

    # ---- stages ---------------------------------------------------------------------------------------------------------------------

    def densely(self) -> tuple[Tensor, Tensor | None]:
        """Every key to all ranks: the reference looks at all pairs in any case. Recurrences are of whole sequences there, with all
        queries."""
        every, where = ("keys", "queries") if self.stages.recurrent else ("keys",), self.words.where
        whole = {node: self._whole(node, x) for node, x in self.values.items() if _token_axis(node, *every) is not None}
        named = {**self.words.named, **{node.name: x for node, x in {**self.values, **whole}.items()}}
        q, k, v = (named.pop(node.name) for node in (tensors.q, tensors.k, tensors.v))
        words = self.words._replace(named=named, return_lse=self.calls.has_lse)
        if where is not None and self.stages.recurrent:
            words = words._replace(where=replace(where, queries=None, lengths=None))
        found = self.calls(q, k, v, words)
        out, lse = found if self.calls.has_lse else (found, None)
        if self.stages.recurrent:
            rows = self.part.held.rows[self.part.held.rank].to(q.device)
            out, lse = out[:, :, rows], None if lse is None else lse[:, :, rows]
        return self._tied(out, lse)

    def made(self) -> tuple[Tensor, Tensor | None]:
        """Out, and the LSE where it is wanted."""
        stages, program = self.stages, self.calls.program
        # Whatever the way of this rank through the program, it takes part in what all do together, in one order.
        spread = {node: self._spread(node) for node in stages.spread}
        length = self.part.held.length
        where, queries = self._standing()
        before, known = self._evaluation(where, {**self._hollow(length), **spread, **queries}, summaries=self)
        self.graded = {known[node] for node in stages.pooled if node in stages.graded}
        for node in stages.pooled:
            before.value(known[node])
        scans = {node: self._scanned(known[node], before, known) for node in stages.recurrent}
        before.values.update({known[node]: found for node, found in scans.items()})
        if not self.values[tensors.q].shape[2]:
            return self._of_no_rows()
        choices = {node: before.value(known[node]) for node in stages.choices}
        if not stages.late:
            return self._tied(*before.value(known[program.root]))
        units = self._wanted(choices)
        fetched, positions = self._fetched(units)
        where = replace(self.where, keys=positions)
        after, meant = self._evaluation(where, {**self._hollow(positions.numel()), **fetched})
        first = after.domain.q_offset
        place = torch.full((-(-length // self.part.unit) + 1,), -1, dtype=torch.int64, device=units.device)
        place[units] = torch.arange(units.numel(), device=units.device)
        for node, selected in choices.items():
            after.values[meant[node]] = _among_fetched(selected, place, self.part.unit, positions.numel(), first)
        for node in (*stages.recurrent, *stages.early):
            after.values[meant[node]] = before.value(known[node])
        for node in stages.late:
            after.chunk_weights[meant[node]] = chunk_weights(before, known[node])
        return self._tied(*after.value(meant[program.root]))

    def _standing(self) -> tuple[Standing, dict[Input, Tensor]]:
        """Where queries stand. A rank without tokens has a block of zeros for them: no call has fewer, and nobody reads what it gives."""
        if self.values[tensors.q].shape[2]:
            return self.where, {}
        rows, found = min(self.part.whole, self.part.held.length), {}
        for node, value in self.values.items():
            axis = _token_axis(node, "queries")
            if axis is not None:
                shape = list(value.shape)
                shape[axis] = rows_on(node.axes[axis], rows)
                found[node] = value.new_zeros(shape)
        return replace(self.where, queries=torch.arange(rows, device=self.values[tensors.q].device)), found

    def _of_no_rows(self) -> tuple[Tensor, Tensor]:
        """The results of a rank that holds no tokens; what others fetch and send back it takes part in."""
        q, v = (self.values[node] for node in (tensors.q, tensors.v))
        if self.stages.late:
            self._fetched(torch.zeros(0, dtype=torch.int64, device=q.device))
        shape = (q.shape[0], max(q.shape[1], v.shape[1]), 0)
        self.ways += [x for node, x in self.values.items() if node in self.stages.graded]
        out, lse = self._tied(q.new_zeros((*shape, v.shape[3])), q.new_zeros(shape, dtype=accumulated(q.dtype)))
        assert lse is not None
        return out, lse

    def _tied(self, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Results, either of which gradients go back from to all that came from others."""
        return tied(out, *self.ways), None if lse is None else tied(lse, *self.ways)

    def _evaluation(self, where: Standing, values: Values, summaries: Any = None) -> tuple[Any, dict[Node, Any]]:
        """An evaluation of the program that stands there, and its nodes by those of the program."""
        program, words, given = self.calls.program, self.words, {**self.values, **values}
        q, k, v = (given.pop(node) for node in (tensors.q, tensors.k, tensors.v))
        named = {**words.named, **{node.name: x for node, x in given.items()}}
        calls, told, moved = self.calls.elsewhere(q, k, v, words._replace(named=named, where=where))
        checked = check_program_call(calls.program, q, k, v, told.named, q_offset=told.q_offset or 0, scale=words.scale)
        return calls.evaluation(checked, words.return_lse, summaries=summaries), self.part.nodes(program, moved)

    def _scanned(self, node: Any, before: Any, known: Mapping[Node, Any]) -> tuple[Tensor | None, Tensor | None]:
        """What a recurrence gives of the rows of this rank, if it has any."""
        local = {known.get(read, read): value for read, value in self.values.items()}
        call = replace(before.call, inputs={**before.call.inputs, **local}, q_offset=0)
        out, lse, states = scanned(node, call, before.dispatch, self.part.held)
        self.ways.append(states)
        return out, lse

    def _wanted(self, choices: Mapping[Any, SelectedBlocks]) -> Tensor:
        """The numbers of the blocks of keys that the queries of this rank may see."""
        unit, length = self.part.unit, self.part.held.length
        count = -(-length // unit)
        device = self.values[tensors.q].device
        wanted = torch.zeros(count + 1, dtype=torch.bool, device=device)
        wanted[self.part.certain.to(device) // unit] = True
        for selected in choices.values():
            number = selected.indices.long() * selected.kv_block // unit
            wanted[torch.where(selected.indices < 0, count, number).flatten()] = True
        wanted[count] = False
        if self.stages.recurrent:  # all of its own, which cost nothing: a call of a recurrence has no fewer keys than queries
            wanted[self.part.held.blocks(self.part.held.rank, unit).to(device)] = True
        if not bool(wanted.any()):  # one of its own, so that there are keys at all
            wanted[self.part.held.blocks(self.part.held.rank, unit)[:1].to(device)] = True
        return wanted.nonzero()[:, 0]

    def _fetched(self, units: Tensor) -> tuple[dict[Input, Tensor], Tensor]:
        """Rows of these blocks of keys, and where they stand."""
        route, positions = self.part.held.fetched(units, self.part.unit)
        self.part.last_keys = positions
        found: dict[Input, Tensor] = {}
        kinds: dict[torch.dtype, list[Input]] = {}
        for node in self.stages.fetched:
            kinds.setdefault(self.values[node].dtype, []).append(node)
        for nodes in kinds.values():
            lines = [self.values[node].movedim(2, 0) for node in nodes]
            widths = [math.prod(line.shape[1:]) for line in lines]
            rows = sent(torch.cat([line.flatten(1) for line in lines], dim=1), route)
            self.ways.append(rows)
            for node, line, part in zip(nodes, lines, rows.split(widths, dim=1), strict=True):
                found[node] = part.reshape(part.shape[0], *line.shape[1:]).movedim(0, 2)
        return found, positions

    # ---- rows of blocks ---------------------------------------------------------------------------------------------------------------

    def _hollow(self, rows: int) -> dict[Input, Tensor]:
        """In place of inputs whose rows are not all here tensors that say how many there are: nothing reads them, or all that comes of
        it is NaN."""
        found = {}
        for node, value in self.values.items():
            axis = _token_axis(node, "keys")
            if axis is None:
                continue
            shape = list(value.shape)
            shape[axis] = rows_on(node.axes[axis], rows)
            fill = float("nan") if value.is_floating_point() else 0
            one = torch.full([1] * value.ndim, fill, dtype=value.dtype, device=value.device)
            found[node] = one.requires_grad_(value.requires_grad).expand(shape)
        return found

    def rows(self, node: Any, name: str, x: Tensor, pool: Pooling) -> Tensor:
        """One row for every block, made where its keys are and sent to all; of rows that are all here, made here."""
        local = next((self.values[read] for read in self.stages.local if read.name == name), None)
        if local is None:
            return pool(x)
        local = local if node in self.graded else local.detach()
        made = pool(local)
        # Of no rows nothing is made, with no way back: backward, all take part.
        made = made if made.requires_grad or not local.requires_grad else tied(made, local)
        return self._to_all(made, made.ndim - 2, node.block)

    def _spread(self, node: Input) -> Tensor:
        value = self.values[node]
        return self._whole(node, value if node in self.stages.graded else value.detach())

    def _whole(self, node: Input, value: Tensor) -> Tensor:
        axis = _token_axis(node, "keys", "queries")
        assert axis is not None
        return self._to_all(value, axis, block_of(node.axes[axis]))

    def _to_all(self, x: Tensor, axis: int, size: int) -> Tensor:
        found = sent(x.movedim(axis, 0), self.part.held.to_all(size))
        self.ways.append(found)
        return found.movedim(0, axis)


def _token_axis(node: Input, *bases: str) -> int | None:
    """The axis of an input that counts keys, or queries, or blocks of them."""
    return next((number for number, axis in enumerate(node.axes) if base_of(axis) in bases), None)


def _among_fetched(selected: SelectedBlocks, place: Tensor, unit: int, keys: int, first: int) -> SelectedBlocks:
    """The same choice among keys that are here. ``place``: of each unit its number among those."""
    each = unit // selected.kv_block
    numbers = selected.indices.long()
    here = torch.where(numbers < 0, -1, place[numbers // each] * each + numbers % each).to(torch.int32)
    blocks = -(-keys // selected.kv_block)
    return SelectedBlocks(here, selected.counts, selected.q_block, selected.kv_block, blocks, first // selected.q_block)
