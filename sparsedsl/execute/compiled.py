"""A compiled program. A static pattern is a program of one attention. The stages of a call, in order:

1. *check*    (:mod:`runtime.call`, :mod:`runtime.program_call`): tensors, inputs, tables, offset
2. *choose*   (:mod:`backends.registry`): pieces of work -> who does each
3. *run*      (:mod:`execute.node_rules`, :mod:`execute.static`): node by node, by the rule of its kind
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.analysis.lists import BlockLists
from sparsedsl.analysis.tiles import block_pair
from sparsedsl.backends.flex import attention as flex
from sparsedsl.backends.reference.nodes import REFERENCE_RULES, Reference
from sparsedsl.backends.registry import AUTO, check_backend, check_runs, named
from sparsedsl.errors import PatternError, ShapeError, UnsupportedError
from sparsedsl.execute import operators
from sparsedsl.execute.dispatch import Dispatch
from sparsedsl.execute.empty import run_empty
from sparsedsl.execute.explanation import Explanation, explain
from sparsedsl.execute.kept_summaries import KeptSummaries, summarised
from sparsedsl.execute.layouts import LAYOUTS, in_bshd, swapped
from sparsedsl.execute.lowering import Lowering, Shortcut
from sparsedsl.execute.node_rules import LOWERED_RULES, lowered
from sparsedsl.execute.requests import facts_of, requests_of
from sparsedsl.execute.state import ProgramState, advanced, continued
from sparsedsl.execute.static import StaticAttention
from sparsedsl.html_card import card
from sparsedsl.lang.advice import check_word, shown
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.tables import by_kept_name
from sparsedsl.lang.thumbnail import thumbnail
from sparsedsl.program.effect_rules import KEEPS_STATE, LATER_QUERIES, reasons
from sparsedsl.program.glance import picture_of
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.program_text import read_program
from sparsedsl.program.rules import check_rules
from sparsedsl.program.tensors import OWN
from sparsedsl.runtime.arguments import arranged, joined_tables, warn_of_slips
from sparsedsl.runtime.call import bind_tables, check_call, exactly
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

__all__ = ["Attention"]

Tensor = torch.Tensor
# Positions, batch entries and heads that functions for FlexAttention reckon with where nobody says how many there are.
UNTOLD = 1 << 24


@dataclass(frozen=True)
class _Kind:
    """What is known of calls of a program that are alike. ``lse``: one gave it."""

    lse: bool
    inputs: tuple[KnownInput, ...]
    shortcuts: dict[Node, Shortcut]


def _kind(call: ProgramCall, run: Lowering, lse: bool) -> _Kind:
    more = (KnownInput.of(node, value) for node, value in call.inputs.items() if node not in OWN)
    return _Kind(lse, tuple(more), run.shortcuts)


class Attention:
    """A compiled pattern or program; call it on tensors. Made by :func:`sparsedsl.compile`.

    The same program at a new length compiles nothing new. Tile lists and schedules are kept for the lengths and tables seen
    last, as many as ``SPARSEDSL_MEMORY_BYTES`` holds; :func:`sparsedsl.clear_caches` lets go of them.
    """

    def __init__(self, program: Program | Pattern, backend: str, allow: Sequence[str] = (), layout: str = "bhsd"):
        program = program if isinstance(program, Program) else Program(program)
        check_rules(program, REFERENCE_RULES, LOWERED_RULES)
        self.program, self.backend = program, check_backend(backend)
        known = (LATER_QUERIES, KEEPS_STATE)
        if not isinstance(allow, (tuple, list, frozenset)) or not all(effect in known for effect in allow):
            raise PatternError(f"allow must be a list of effects, of {', '.join(map(repr, known))}; got {allow!r}")
        self.allow = frozenset(allow)
        self.layout = check_word("layout", layout, LAYOUTS)
        self.dispatch = Dispatch(self.backend)
        self._static = None if program.static is None else StaticAttention(program.static)
        # Of programs, kinds of calls that were checked.
        self._repeated: Repeated[_Kind] = Repeated()
        # Kinds of calls that are known to run.
        self._runs: set[CallFacts] = set()
        # What a traced call needs, as plain values: torch.compile follows no sympy.
        self._handle, self._bound = f"{backend} {'; '.join(sorted(allow))}\n{program.text}", program.bound
        self._table_names = tuple(program.tables)
        operators.remember(self._handle, self)

    @property
    def static(self) -> StaticAttention:
        """What runs the one attention that this is.

        Raises:
            UnsupportedError: it is a program of several nodes.
        """
        if self._static is None:
            raise UnsupportedError(
                f"{self.program!r} chooses from q and k as it is called: it has no pattern, tile lists or FlexAttention functions before. "
                "Use attn.choices(q, k, v) for what it chooses, attn.explain(...) for how it runs"
            )
        return self._static

    @property
    def pattern(self) -> Pattern:
        """The pattern of a single attention over a static mask; of other programs see :attr:`program`.

        Raises:
            UnsupportedError: it is a program of several nodes.
        """
        return self.static.pattern

    def __call__(
        self,
        /,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_offset: int | Tensor | Literal["end"] | None = None,
        return_lse: bool = False,
        scale: float | None = None,
        state: ProgramState | None = None,
        return_state: bool = False,
        summaries: KeptSummaries | None = None,
        tables: Mapping[str, Tensor] | None = None,
        **named: Any,
    ) -> Any:
        """Attention of ``q (B, Hq, Sq, D)`` over ``k (B, Hkv, Skv, D)``, ``v (B, Hkv, Skv, Dv)``; ``Hq % Hkv == 0``.

        With ``layout="bshd"`` they are ``(B, Sq, Hq, D)``, ``(B, Skv, Hkv, D)`` and ``(B, Skv, Hkv, Dv)``, and out ``(B, Sq, Hq, Dv)``;
        the LSE is ``(B, Hq, Sq)`` as ever, and inputs of programs and tables are as they were declared. Nothing is copied for it: the
        same memory is read by other strides, and out is a view too.

        Args:
            q_offset: position of the first query (decode and chunked prefill); a number or a 0-d integer tensor. ``"end"``: the last
                query stands at the last key. None is 0, and warns once where there are fewer queries than keys.
            return_lse: also return the natural-log-sum-exp of the modified logits, ``(B, Hq, Sq)`` in float32 or float64.
            scale: factor on the dot products of attention; default the program's, else ``D ** -0.5``.
            state: what an earlier call returned: q, k, v and inputs then are those of the tokens after it.
            return_state: also return the state after the last key, for programs that keep one.
            summaries: what :meth:`keep_summaries` made, for calls that each are given all keys so far: blocks that were over in an earlier
                call are not summed up again. The call adds to it.
            tables: tables and inputs by name, for names that are also words of this call: ``tables={"scale": tensor}``.
            named: one tensor for each other input, and for each table that is not bound to the pattern.

        Returns:
            ``out (B, Hq, Sq, Dv)``; then the LSE and the state, if asked for. A row that may attend to nothing has out 0 and lse -inf.
            Under ``torch.autocast`` float32 inputs are cast as for torch's ``scaled_dot_product_attention``.

        Raises:
            ShapeError, TableError: q, k, v, an input or a table is missing or does not fit.
            UnsupportedError: the backend cannot run this call, or it is a training step of a program whose choices read later queries;
                the message names the way out.
        """
        if tables is not None:
            named = joined_tables(named, tables)
        if self.layout == "bhsd":
            return self._called(q, k, v, q_offset, return_lse, scale, state, return_state, summaries, named)
        q, k, v = swapped(q), swapped(k), swapped(v)
        try:
            result = self._called(q, k, v, q_offset, return_lse, scale, state, return_state, summaries, named)
        except ShapeError as error:
            raise in_bshd(error) from None
        return (swapped(result[0]), *result[1:]) if isinstance(result, tuple) else swapped(result)

    def _called(
        self, q: Any, k: Any, v: Any, q_offset: Any, return_lse: bool, scale: float | None, state: ProgramState | None,
        return_state: bool, summaries: KeptSummaries | None, named: dict[str, Any],
    ) -> Any:  # fmt: skip
        """The call with heads first."""
        given = q_offset
        if return_lse and not self.has_lse:
            raise UnsupportedError(str(self.refused_use(grad=False, lse=True)))
        compiling = torch.compiler.is_compiling()
        if not compiling and state is None and not return_state:
            found = self._again(q, k, v, named, q_offset, return_lse, scale, summaries)
            if found is not None:
                return found if return_lse else found[0]
        q, k, v, q_offset = arranged(q, k, v, q_offset, compiling=compiling)
        if compiling or is_watched(q, k, v) or (self._static is None and is_transformed(q, k, v)):
            return self._in_a_graph(q, k, v, named, q_offset, return_lse, scale, state is not None or return_state, summaries)
        warn_of_slips(self.program.expressions, q, k, given if state is None else 0, self.layout)
        return self.attend_now(
            q, k, v, named, q_offset=q_offset, return_lse=return_lse, scale=scale, state=state, return_state=return_state,
            summaries=summaries,
        )  # fmt: skip

    def _again(
        self, q: Any, k: Any, v: Any, named: Mapping[str, Any], q_offset: Any, lse: bool, scale: Any,
        summaries: KeptSummaries | None,
    ) -> tuple[Tensor, Tensor | None] | None:  # fmt: skip
        """``(out, lse)`` of a call of a kind that was checked before; None: make an ordinary call."""
        if self._static is not None:
            return None if named or summaries is not None else self._static.again(q, k, v, self.backend, q_offset, scale)
        found = self._repeated.find(q, k, v, q_offset, scale)
        if found is None or (lse and not found[0].lse):
            return None
        kind, position = found
        more = known_inputs(kind.inputs, named, k.shape[2])
        if more is None:
            return None
        call = plain_call(self.program, q, k, v, more, position, scale)
        # Its patience is that of one call; a backend that was asked for needs none.
        dispatch = Dispatch(AUTO) if self.backend == AUTO else self.dispatch
        self._check_kept(summaries)
        out, weight = lowered(call, dispatch, lse=lse, shortcuts=kind.shortcuts, summaries=summaries).value(self.program.root)
        if summaries is not None:
            summaries.tokens = k.shape[2]
        return (out if out.dtype is q.dtype else out.to(q.dtype)), weight

    def attend_now(
        self, q: Any, k: Any, v: Any, named: Mapping[str, Any], *, q_offset: Any, return_lse: bool, scale: float | None,
        state: ProgramState | None = None, return_state: bool = False, summaries: KeptSummaries | None = None,
    ) -> Any:  # fmt: skip
        """The call on tensors that hold values; :meth:`__call__` says what it takes and gives."""
        self._check_kept(summaries)
        if self._static is not None and state is None and not return_state:
            # One attention, of which nothing is kept: its rule, without a walk over nodes.
            call = check_call(self._static.pattern, q, k, v, named, q_offset=q_offset, scale=scale)
            out, lse = self._static.attend(call, self.backend, lse=return_lse)
            return (out, lse) if return_lse else out
        checked = check_program_call(self.program, q, k, v, named, q_offset=q_offset, scale=scale)
        refused = self.refused_use(grad=checked.needs_grad, lse=return_lse)
        if refused is not None:
            raise UnsupportedError(refused)
        if 0 in (q.shape[0], q.shape[2], k.shape[2]):
            return self._empty(checked, return_lse, state, return_state)
        if state is not None:
            checked = continued(checked, state)
        with torch.autocast(checked.q.device.type, enabled=False):
            keeps = state is None and not checked.needs_grad and takes_any_position(self.program) and not transforms_active()
            run = self._evaluation(checked, return_lse, keeps and checked.q.is_cpu, summaries)
            out, lse = run.value(self.program.root)
            if summaries is not None:
                summaries.tokens = k.shape[2]
            # The reference has no scans of its own: what is carried over is made as `tiled` makes it.
            carrier = run.dispatch if isinstance(run, Lowering) else Dispatch("tiled")
            after = advanced(checked, carrier, run.after if isinstance(run, Lowering) else {}) if return_state else None
            if keeps and isinstance(run, Lowering):
                self._repeated.remember(checked, (scale,), _kind(checked, run, return_lse))
        results = [out.to(checked.q.dtype), *([lse] if return_lse else []), *([after] if return_state else [])]
        return results[0] if len(results) == 1 else tuple(results)

    def _evaluation(
        self, call: ProgramCall, lse: bool, keeps: bool = False, summaries: KeptSummaries | None = None
    ) -> Evaluation:  # fmt: skip
        if self.backend == "reference":
            return Reference(call)
        if self.backend != "auto":
            self._check_runs(facts_of(call, lse))
        return lowered(call, Dispatch(self.backend), lse=lse, keeps=keeps, summaries=summaries)

    def keep_summaries(self) -> KeptSummaries:
        """An empty place for summaries of blocks of keys; pass it to all calls of one sequence as ``summaries=``.

        A step of decoding then reads the keys that it attends to, one row for each block, and the keys of the block that is not over:
        see :class:`~sparsedsl.execute.kept_summaries.KeptSummaries`.

        Raises:
            UnsupportedError: the program sums up no keys.
        """
        if not summarised(self.program):
            raise UnsupportedError(
                f"{self.program!r} makes no summaries or bounds of keys that could be kept; call it without summaries="
            )
        return KeptSummaries(self.program)

    def _check_kept(self, summaries: Any) -> None:
        if summaries is not None and not (isinstance(summaries, KeptSummaries) and summaries.program == self.program.key):
            raise ShapeError(f"summaries must be what keep_summaries() of this program made; got {shown(summaries)}")

    def _check_runs(self, facts: CallFacts) -> None:
        """Whether the backend that was asked for does all the work, before it does any of it."""
        # No refusal depends on a length: a step of decoding, each of another length, is not asked about anew.
        kind = replace(facts, batch=1, q_len=1, kv_len=1)
        if kind not in self._runs:
            asked = requests_of(self.program, facts, whole_tables=self.dispatch.whole_tables)
            check_runs([request for requests in asked.values() for request in requests], self.backend)
            self._runs.add(kind)

    def _in_a_graph(
        self, q: Any, k: Any, v: Any, named: Mapping[str, Any], q_offset: Any, return_lse: bool, scale: float | None, keeps: bool,
        summaries: KeptSummaries | None,
    ) -> Any:  # fmt: skip
        """The call as one operator: lists and choices depend on values, which a graph does not have."""
        if summaries is not None:
            raise UnsupportedError(
                "summaries= is not part of a graph (torch.compile, torch.export, torch.func): call the program outside of it, or leave "
                "summaries= out: all blocks are then summed up in every call"
            )
        if keeps:
            raise UnsupportedError(
                "state= and return_state= are not part of a graph (torch.compile, torch.export, torch.func): call the program outside of "
                "it, or pass all keys and values with q_offset="
            )
        given = {name: x for name, x in named.items() if x is not None} if self._static is None else named
        given = by_kept_name(given, self._table_names)
        return operators.attend_traced(
            self._handle, self._bound, q, k, v, given, q_offset=q_offset, return_lse=return_lse, scale=scale, has_lse=self.has_lse
        )

    def _empty(self, call: ProgramCall, return_lse: bool, state: ProgramState | None, return_state: bool) -> Any:
        if return_state and state is None:
            raise ShapeError(f"there are no tokens to make a state of: q {tuple(call.q.shape)}, k {tuple(call.k.shape)}")
        out, lse = run_empty(call)
        results = [out, *([lse] if return_lse else []), *([state] if return_state else [])]
        return results[0] if len(results) == 1 else tuple(results)

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

    # ---- what operators of a graph ask -----------------------------------------------------------------------------------------

    @property
    def has_lse(self) -> bool:
        """Whether it is a softmax."""
        return self.program.root.weighable

    @property
    def reads_batch(self) -> bool:
        """Whether batch entries are told apart."""
        return self.program.reads_batch

    @property
    def one_call(self) -> bool:
        """Whether its results are those of one call of one backend."""
        return self._static is not None

    # ---- before anything runs --------------------------------------------------------------------------------------------------

    def explain(
        self,
        q_len: int,
        kv_len: int | None = None,
        *,
        batch: int = 1,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int = 64,
        head_dim_v: int | None = None,
        dtype: Any = "float32",
        device: Any = "cpu",
        q_offset: int = 0,
        grad: bool = False,
        return_lse: bool = False,
        sizes: Mapping[str, int] | None = None,
        **tables: Any,
    ) -> Explanation:
        """What a call of this shape would do and cost, before anything runs; ``print`` it. Lengths in tokens.

        Args:
            grad: the call wants gradients. return_lse: and the LSE.
            sizes: of axes of inputs with names of their own, as ``{"retrieval_heads": 2}``.
            tables: those that the analysis is to look into.

        >>> import sparsedsl as sd
        >>> print(str(sd.compile(sd.patterns.moba()).explain(8192, heads=4)).splitlines()[0])
        backend: cpp (compiled for the pattern: nothing that it leaves empty is looked at)
        """
        return explain(
            self, q_len, q_len if kv_len is None else kv_len, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
            head_dim_v=head_dim_v or head_dim, dtype=dtype, device=device, q_offset=q_offset, grad=grad, lse=return_lse, sizes=sizes,
            tables=tables,
        )  # fmt: skip

    def choices(
        self, q: Tensor, k: Tensor, v: Tensor, *, q_offset: int | Tensor | Literal["end"] | None = None, **named: Any
    ) -> dict[str, Any]:
        """What the program chooses for these inputs, by the label of the node: :class:`SelectedBlocks`, positions of an order, kept tokens.

        On ``reference`` choices are boolean tables. A static pattern chooses nothing.

        >>> import sparsedsl as sd
        >>> attn = sd.compile(sd.patterns.moba(chunk=16, top_k=2), backend="tiled")
        >>> q = k = v = torch.randn(1, 2, 64, 16)
        >>> [selected.indices.shape for selected in attn.choices(q, k, v).values()]
        [torch.Size([1, 2, 64, 1])]
        """
        given = q_offset
        if self.layout == "bshd":
            q, k, v = swapped(q), swapped(k), swapped(v)
        q, k, v, q_offset = arranged(q, k, v, q_offset)
        warn_of_slips(self.program.expressions, q, k, given, self.layout)
        call = check_program_call(self.program, q, k, v, named, q_offset=q_offset)
        with torch.no_grad():
            run = self._evaluation(call, False)
            values = {self.program.labels[node]: run.value(node) for node in self.program.order if node.chooses}
        return {label: value for label, value in values.items() if not isinstance(value, ScoreSource)}

    @property
    def effects(self) -> frozenset[str]:
        """What it does beside computing from the past."""
        return frozenset(reasons(self.program))

    @property
    def source(self) -> str:
        """The generated code of a static pattern, readable; where it is interpreted, the pattern.

        Of ``"auto"`` the C++ for CPU, of ``"triton"`` the kernels for heads 64 wide; of a program its text form, and on ``"triton"`` the
        kernels along lists of selected blocks.
        """
        if self._static is None:
            if self.backend == "auto":
                return self.program.text
            facts = CallFacts("cuda", "float32", 1, 1, 1, 1024, 1024, 64, 64)
            asked = requests_of(self.program, facts, whole_tables=self.dispatch.whole_tables)
            written = (named(self.backend).source(request) for requests in asked.values() for request in requests)
            return "\n\n".join([self.program.text, *dict.fromkeys(filter(None, written))])
        return self._static.runner("cpp" if self.backend == "auto" else self.backend).source

    def lists(self, domain: Domain, block: tuple[int, int]) -> BlockLists:
        """The tile lists of a static mask over ``domain``, remembered while the tables live unchanged."""
        return self.static.lists(domain, block)

    # ---- for plain FlexAttention -------------------------------------------------------------------------------------------------

    def block_mask(
        self,
        q_len: int,
        kv_len: int,
        *,
        batch: int = 1,
        heads: int | None = None,
        q_offset: int = 0,
        block_size: Any = 128,
        device: Any = None,
        backward: bool = True,
        **tables: Any,
    ) -> Any:
        """A torch ``BlockMask`` with compact storage for plain ``flex_attention``; its ``mask_mod`` takes local query indices.

        ``batch`` and ``heads`` (query heads; by default as many as the pattern is written for, else 1) matter only if the pattern
        reads ``b`` or ``h``: a dimension it does not read has
        size 1 in the lists and broadcasts. Lengths in tokens. Modified scores and sinks are not part of a BlockMask:
        see :meth:`score_mod`. ``backward=False`` leaves out the tiles by key, which only gradients need: with a column that all
        queries see (a sink) they grow with the square of the length.

        Raises :class:`~sparsedsl.UnsupportedError`, with the bytes, where the lists do not fit into memory.

        >>> import sparsedsl as sd
        >>> attn = sd.compile((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 512))
        >>> attn.block_mask(4096, 4096).kv_indices.shape
        torch.Size([1, 1, 32, 32])
        """
        bound = bind_tables(self.pattern, tables, device=None if device is None else torch.device(device))
        domain = Domain(q_len, kv_len, q_offset, batch, count_heads((self.pattern,), bound, heads), bound)
        domain = exactly((self.pattern.mask.expr,), domain)
        lists = self.lists(domain, block_pair(block_size))
        where = torch.device(device) if device is not None else domain.device
        return flex.block_mask(self.pattern, lists, domain, where, backward=backward)

    def _bound_exactly(
        self, expr: Any, tables: Mapping[str, Any], q_offset: int, q_len: int | None, kv_len: int | None
    ) -> Mapping[str, Tensor]:
        """The tables for a function of positions, of which ``UNTOLD`` at most are reckoned with where lengths are not given."""
        rows = UNTOLD if q_len is None else max(1, q_len - q_offset)
        domain = Domain(rows, kv_len or UNTOLD, q_offset, UNTOLD, UNTOLD, bind_tables(self.pattern, tables))
        return exactly((expr,), domain).tables

    def mask_mod(self, *, q_offset: int = 0, q_len: int | None = None, kv_len: int | None = None, **tables: Any) -> Any:
        """The mask as a FlexAttention ``mask_mod(b, h, q_idx, kv_idx)`` of local query indices. Lengths only if the pattern reads them."""
        bound = self._bound_exactly(self.pattern.mask.expr, tables, q_offset, q_len, kv_len)
        return flex.mask_mod(self.pattern, bound, q_offset=q_offset, q_len=q_len, kv_len=kv_len)

    def score_mod(self, *, q_offset: int = 0, q_len: int | None = None, kv_len: int | None = None, **tables: Any) -> Any:
        """The score as a FlexAttention ``score_mod(score, b, h, q_idx, kv_idx)``; None if the pattern does not modify scores."""
        bound = self._bound_exactly(self.pattern.score.expr, tables, q_offset, q_len, kv_len)
        return flex.score_mod(self.pattern, bound, q_offset=q_offset, q_len=q_len, kv_len=kv_len)

    def _repr_html_(self) -> str:
        told = self.program if self._static is None else self._static.pattern
        picture = picture_of(self.program) if self._static is None else thumbnail(self._static.pattern.mask.expr, told.bound)
        facts = [("backend", self.backend), *told.html_facts()]
        return card("Attention", str(told), facts, picture, () if self._static is None else self._static.pattern.warnings)

    def __repr__(self) -> str:
        what = self.program if self._static is None else self._static.pattern
        layout = "" if self.layout == "bhsd" else f" layout={self.layout!r}"
        return f"<Attention backend={self.backend!r}{layout} {what!r}>"

    def __reduce__(self) -> Any:
        return Attention, (self.program, self.backend, tuple(sorted(self.allow)), self.layout)

    @property
    def heads_first(self) -> Attention:
        """The same on tensors ``(B, H, S, D)``: itself, if that is its layout."""
        return self if self.layout == "bhsd" else Attention(self.program, self.backend, tuple(sorted(self.allow)))


def _again(first: str, text: str) -> Attention:
    backend, _, allowed = first.partition(" ")
    return Attention(read_program(text), backend, [effect for effect in allowed.split("; ") if effect])


operators.made_by(_again)
