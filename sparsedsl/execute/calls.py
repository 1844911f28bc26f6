"""The calls of a program on a backend: the way of one from its arguments to its results, and what later ones are spared. The stages:

1. *again*    (:mod:`runtime.repeated`): of a kind that was checked and run before, nothing is asked anew
2. *where*    (:mod:`execute.sharded_calls`, :mod:`execute.operators`, :mod:`execute.relocated_calls`): the call of a shard, an operator of
   a graph, or a call of another program, where rows or heads stand elsewhere
3. *check*    (:mod:`runtime.call`, :mod:`runtime.program_call`): tensors, inputs, tables, offset
4. *choose*   (:mod:`backends.registry`): pieces of work -> who does each
5. *run*      (:mod:`execute.node_rules`, :mod:`execute.static`): node by node, by the rule of its kind
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.backends.reference.nodes import REFERENCE_RULES, Reference
from sparsedsl.backends.registry import AUTO, check_backend, check_runs
from sparsedsl.errors import PatternError, ShapeError, UnsupportedError
from sparsedsl.execute import operators
from sparsedsl.execute.call_words import CallWords
from sparsedsl.execute.dispatch import Dispatch
from sparsedsl.execute.empty import run_empty
from sparsedsl.execute.kept_summaries import BlockRows, KeptSummaries
from sparsedsl.execute.lowering import Lowering, Shortcut
from sparsedsl.execute.node_rules import LOWERED_RULES, lowered
from sparsedsl.execute.paged_keys import RequestKeys
from sparsedsl.execute.relocated_calls import relocated_call
from sparsedsl.execute.requests import facts_of, requests_of
from sparsedsl.execute.sharded_calls import are_sharded, sharded_call
from sparsedsl.execute.state import advanced, continued
from sparsedsl.execute.static import StaticAttention
from sparsedsl.lang.advice import shown
from sparsedsl.lang.tables import by_kept_name
from sparsedsl.program.effect_rules import KEEPS_STATE, LATER_QUERIES, reasons
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.program_text import read_program
from sparsedsl.program.relocation import Relocation, relocated
from sparsedsl.program.rules import check_rules
from sparsedsl.program.tensors import OWN
from sparsedsl.runtime.arguments import arranged, warn_of_slips
from sparsedsl.runtime.call import check_call
from sparsedsl.runtime.interpreter import Evaluation
from sparsedsl.runtime.program_call import (
    KnownInput,
    ProgramCall,
    check_program_call,
    known_inputs,
    plain_call,
    takes_any_position,
)
from sparsedsl.runtime.repeated import Repeated
from sparsedsl.runtime.request import CallFacts
from sparsedsl.runtime.torch_modes import is_transformed, is_watched
from sparsedsl.selection.scores import ScoreSource
from sparsedsl.torch_private import transforms_active

__all__ = ["Calls"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Kind:
    """What is known of calls of a program that are alike. ``lse``: one gave it."""

    lse: bool
    inputs: tuple[KnownInput, ...]
    shortcuts: dict[Node, Shortcut]


def _kind(call: ProgramCall, run: Lowering, lse: bool) -> _Kind:
    more = (KnownInput.of(node, value) for node, value in call.inputs.items() if node not in OWN)
    return _Kind(lse, tuple(more), run.shortcuts)


class Calls:
    """What makes the calls of a program, on tensors with heads first, and what is remembered of them.

    ``static``: what runs the one attention that the program is; None: it is a program of several nodes.
    ``has_lse``: whether it is a softmax.
    """

    def __init__(self, program: Program, backend: str, allow: Collection[str] = ()):
        check_rules(program, REFERENCE_RULES, LOWERED_RULES)
        self.program, self.backend = program, check_backend(backend)
        known = (LATER_QUERIES, KEEPS_STATE)
        if not isinstance(allow, (tuple, list, frozenset)) or not all(effect in known for effect in allow):
            raise PatternError(f"allow must be a list of effects, of {', '.join(map(repr, known))}; got {allow!r}")
        self.allow = frozenset(allow)
        self.dispatch = Dispatch(self.backend)
        self.static = None if program.static is None else StaticAttention(program.static)
        # Of programs, kinds of calls that were checked.
        self._repeated: Repeated[_Kind] = Repeated()
        # Kinds of calls that are known to run.
        self._runs: set[CallFacts] = set()
        # The same for calls that stand elsewhere.
        self._elsewhere: Cache[Calls] = Cache()
        # What a traced call needs, as plain values: torch.compile follows no sympy.
        self.handle, self.bound = f"{backend} {'; '.join(sorted(allow))}\n{program.text}", program.bound
        self.table_names, self.has_lse = tuple(program.tables), program.root.weighable
        operators.remember(self.handle, self)

    def __call__(self, q: Any, k: Any, v: Any, words: CallWords) -> Any:
        """See :meth:`sparsedsl.Attention.__call__`."""
        given = words.q_offset
        if words.return_lse and not self.has_lse:
            raise UnsupportedError(str(self.refused_use(grad=False, lse=True)))
        compiling = torch.compiler.is_compiling()
        if not compiling and words.state is words.where is None and not words.return_state:
            if self.static is None:
                found = self._again(q, k, v, words)
            elif words.named or words.summaries is not None:
                found = None
            else:
                found = self.static.again(q, k, v, self.backend, given, words.scale)
            if found is not None:
                return found if words.return_lse else found[0]
        if not compiling and are_sharded(q, k, v):
            if words.state is not None or words.return_state or words.summaries is not None:
                raise UnsupportedError(
                    "state=, return_state= and summaries= are of one device: pass local tensors, or leave them out"
                )
            return sharded_call(self.program, self, q, k, v, words)
        q, k, v, offset = arranged(q, k, v, given, compiling=compiling)
        if offset is not given:
            words = words._replace(q_offset=offset)
        if compiling or is_watched(q, k, v) or (self.static is None and is_transformed(q, k, v)):
            return self._in_a_graph(q, k, v, words)
        stands = words.state is not None or (words.where is not None and words.where.queries is not None)
        warn_of_slips(self.program.expressions, q, k, 0 if stands else given, words.layout)
        return self.attend_now(q, k, v, words)

    def _again(self, q: Any, k: Any, v: Any, words: CallWords) -> tuple[Tensor, Tensor | None] | None:
        """``(out, lse)`` of a call of a program, of a kind that was checked before; None: make an ordinary call."""
        found = self._repeated.find(q, k, v, words.q_offset, words.scale)
        if found is None or (words.return_lse and not found[0].lse):
            return None
        kind, position = found
        more = known_inputs(kind.inputs, words.named, k.shape[2])
        if more is None:
            return None
        call, summaries = plain_call(self.program, q, k, v, more, position, words.scale), words.summaries
        # Its patience is that of one call; a backend that was asked for needs none.
        dispatch = Dispatch(AUTO) if self.backend == AUTO else self.dispatch
        if summaries is not None:
            self._check_kept(summaries)
        run = lowered(call, dispatch, lse=words.return_lse, shortcuts=kind.shortcuts, summaries=summaries)
        out, weight = run.value(self.program.root)
        if summaries is not None:
            summaries.tokens = k.shape[2]
        return (out if out.dtype is q.dtype else out.to(q.dtype)), weight

    def attend_now(self, q: Any, k: Any, v: Any, words: CallWords) -> Any:
        """The call on tensors that hold values, with an offset that is a number, or one in a tensor."""
        state, summaries = words.state, words.summaries
        if words.where is not None:
            if summaries is not None or (words.where.queries is not None and (state is not None or words.return_state)):
                raise UnsupportedError(
                    "summaries=, state= and return_state= count tokens from the first one on, and this call is of rows or heads that stand "
                    "elsewhere: leave them out, or call it on all heads, with q_offset= for rows"
                )
            calls, words, _ = self.elsewhere(q, k, v, words)
            return calls.attend_now(q, k, v, words)
        if summaries is not None:
            self._check_kept(summaries)
        if self.static is not None and state is None and not words.return_state:
            # One attention, of which nothing is kept: its rule, without a walk over nodes.
            call = check_call(self.static.pattern, q, k, v, words.named, q_offset=words.q_offset, scale=words.scale)
            found = self.static.attend(call, self.backend, lse=words.return_lse)
            return found if words.return_lse else found[0]
        checked = check_program_call(self.program, q, k, v, words.named, q_offset=words.q_offset, scale=words.scale)
        refused = self.refused_use(grad=checked.needs_grad, lse=words.return_lse)
        if refused is not None:
            raise UnsupportedError(refused)
        if 0 in (q.shape[0], q.shape[2], k.shape[2]):
            if words.return_state and state is None:
                raise ShapeError(f"there are no tokens to make a state of: q {tuple(q.shape)}, k {tuple(k.shape)}")
            (out, lse), after = run_empty(checked), state
        else:
            out, lse, after = self._run(checked if state is None else continued(checked, state), words)
            if summaries is not None:
                summaries.tokens = k.shape[2]
        results = [out, *([lse] if words.return_lse else []), *([after] if words.return_state else [])]
        return results[0] if len(results) == 1 else tuple(results)

    def _run(self, checked: ProgramCall, words: CallWords) -> tuple[Any, ...]:
        """Out, the LSE where it is wanted, and the state after the call where that is."""
        with torch.autocast(checked.q.device.type, enabled=False):
            keeps = (
                words.state is words.in_pages is None
                and not checked.needs_grad
                and takes_any_position(self.program)
                and not transforms_active()
            )
            run = self.evaluation(checked, words.return_lse, keeps and checked.q.is_cpu, words.summaries, words.in_pages)
            out, lse = run.value(self.program.root)
            after = None
            if words.return_state:
                # The reference has no scans of its own: what is carried over is made as `tiled` makes it.
                carrier, made = (run.dispatch, run.after) if isinstance(run, Lowering) else (Dispatch("tiled"), {})
                after = advanced(checked, carrier, made)
            if keeps and isinstance(run, Lowering):
                self._repeated.remember(checked, (words.scale,), _kind(checked, run, words.return_lse))
        return out.to(checked.q.dtype), lse, after

    def elsewhere(self, q: Any, k: Any, v: Any, words: CallWords) -> tuple[Calls, CallWords, Relocation]:
        """A call whose rows or heads stand elsewhere as an ordinary one: who makes it, its words, and what was told the program."""
        assert words.where is not None
        moved, positions, offset = relocated_call(self.program, words.where, q, k, v, words.named)
        calls, offset = self.at(moved), words.q_offset if offset is None else offset
        # A mask may look at positions of keys alone, or at none.
        read = {name: table for name, table in positions.items() if name in calls.table_names}
        return calls, words._replace(named={**words.named, **read}, q_offset=offset, where=None), moved

    def at(self, where: Relocation) -> Calls:
        """What makes calls that stand there."""
        if where == Relocation():
            return self
        return self._elsewhere.get(where, [], lambda: Calls(relocated(self.program, where), self.backend, self.allow))

    def evaluation(
        self, call: ProgramCall, lse: bool, keeps: bool = False, summaries: BlockRows | None = None,
        in_pages: RequestKeys | None = None,
    ) -> Evaluation:  # fmt: skip
        """One evaluation of a checked call, which asks for no node yet."""
        if self.backend == "reference":
            return Reference(call)
        if self.backend != AUTO:
            self._check_runs(facts_of(call, lse))
        return lowered(call, Dispatch(self.backend), lse=lse, keeps=keeps, summaries=summaries, in_pages=in_pages)

    def _check_kept(self, summaries: Any) -> None:
        if not (isinstance(summaries, KeptSummaries) and summaries.program == self.program.key):
            raise ShapeError(f"summaries must be what keep_summaries() of this program made; got {shown(summaries)}")

    def _check_runs(self, facts: CallFacts) -> None:
        """Whether the backend that was asked for does all the work, before it does any of it."""
        # No refusal depends on a length: a step of decoding, each of another length, is not asked about anew.
        kind = replace(facts, batch=1, q_len=1, kv_len=1)
        if kind not in self._runs:
            asked = requests_of(self.program, facts, whole_tables=self.dispatch.whole_tables)
            check_runs([request for requests in asked.values() for request in requests], self.backend)
            self._runs.add(kind)

    def _in_a_graph(self, q: Any, k: Any, v: Any, words: CallWords) -> Any:
        """The call as one operator: lists and choices depend on values, which a graph does not have."""
        if words.summaries is not None:
            raise UnsupportedError(
                "summaries= is not part of a graph (torch.compile, torch.export, torch.func): call the program outside of it, or leave "
                "summaries= out: all blocks are then summed up in every call"
            )
        if words.state is not None or words.return_state:
            raise UnsupportedError(
                "state= and return_state= are not part of a graph (torch.compile, torch.export, torch.func): call the program outside of "
                "it, or pass all keys and values with q_offset="
            )
        named = {name: x for name, x in words.named.items() if x is not None} if self.static is None else words.named
        words = words._replace(named=by_kept_name(named, self.table_names))
        return operators.attend_traced(self.handle, self.bound, q, k, v, words, has_lse=self.has_lse)

    def refused_use(self, *, grad: bool, lse: bool) -> str | None:
        """Why no backend may run a call that wants gradients, or the LSE; or None."""
        if lse and not self.has_lse:
            return f"{self.program.root!r} is no softmax and has no LSE; leave return_lse=False"
        why = reasons(self.program).get(LATER_QUERIES) if grad and LATER_QUERIES not in self.allow else None
        if not why:
            return None
        return (
            f"{LATER_QUERIES} ({'; '.join(why)}): an output depends on tokens after it, so that a model trained on it learns from the "
            f"future. For inference call it under torch.no_grad(); if it is meant, sd.compile(..., allow=[{LATER_QUERIES!r}])"
        )

    def choices(self, q: Any, k: Any, v: Any, words: CallWords) -> dict[str, Any]:
        """What the program chooses in a call, by the label of the node: see :meth:`sparsedsl.Attention.choices`."""
        q, k, v, q_offset = arranged(q, k, v, words.q_offset)
        warn_of_slips(self.program.expressions, q, k, words.q_offset, words.layout)
        call = check_program_call(self.program, q, k, v, words.named, q_offset=q_offset)
        with torch.no_grad():
            run = self.evaluation(call, False)
            values = {self.program.labels[node]: run.value(node) for node in self.program.order if node.chooses}
        return {label: value for label, value in values.items() if not isinstance(value, ScoreSource)}


def _from_handle(first: str, text: str) -> Calls:
    backend, _, allowed = first.partition(" ")
    return Calls(read_program(text), backend, [effect for effect in allowed.split("; ") if effect])


operators.made_by(_from_handle)
