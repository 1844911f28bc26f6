"""A compiled program: what can be asked of it, and what its calls may say. A static pattern is a program of one attention."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from sparsedsl.analysis.domain import Domain, check_size
from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.analysis.lists import BlockLists
from sparsedsl.analysis.tiles import block_pair
from sparsedsl.backends.flex import attention as flex
from sparsedsl.backends.registry import named
from sparsedsl.errors import ArgumentError, ShapeError, UnsupportedError
from sparsedsl.execute.call_words import CallWords
from sparsedsl.execute.calls import Calls
from sparsedsl.execute.explanation import Explanation, explain
from sparsedsl.execute.kept_summaries import KeptSummaries, summarised
from sparsedsl.execute.layouts import LAYOUTS, in_bshd, swapped
from sparsedsl.execute.packed_face import PackedFace
from sparsedsl.execute.requests import requests_of
from sparsedsl.execute.sharded_calls import are_sharded, sharded_call
from sparsedsl.execute.state import ProgramState
from sparsedsl.execute.static import StaticAttention
from sparsedsl.html_card import card
from sparsedsl.lang.advice import check_word, shown
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.thumbnail import thumbnail
from sparsedsl.program.effect_rules import reasons
from sparsedsl.program.glance import picture_of
from sparsedsl.program.graph import Program
from sparsedsl.runtime.arguments import joined_tables
from sparsedsl.runtime.call import bind_tables, exactly
from sparsedsl.runtime.request import CallFacts
from sparsedsl.runtime.standing import said_standing

__all__ = ["Attention"]

Tensor = torch.Tensor
# Positions, batch entries and heads that functions for FlexAttention reckon with where nobody says how many there are.
UNTOLD = 1 << 24


class Attention(PackedFace):
    """A compiled pattern or program; call it on tensors. Made by :func:`sparsedsl.compile`.

    The same program at a new length compiles nothing new. Tile lists and schedules are kept for the lengths and tables seen
    last, as many as ``SPARSEDSL_MEMORY_BYTES`` holds; :func:`sparsedsl.clear_caches` lets go of them.
    """

    def __init__(self, program: Program | Pattern, backend: str, allow: Sequence[str] = (), layout: str = "bhsd"):
        program = program if isinstance(program, Program) else Program(program)
        self._calls = calls = Calls(program, backend, allow)
        self.program, self.backend, self.allow = program, calls.backend, calls.allow
        self.layout = check_word("layout", layout, LAYOUTS)

    @property
    def static(self) -> StaticAttention:
        """What runs the one attention that this is.

        Raises:
            UnsupportedError: it is a program of several nodes.
        """
        if self._calls.static is None:
            raise UnsupportedError(
                f"{self.program!r} chooses from q and k as it is called: it has no pattern, tile lists or FlexAttention functions before. "
                "Use attn.choices(q, k, v) for what it chooses, attn.explain(...) for how it runs"
            )
        return self._calls.static

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
        q_positions: Tensor | None = None,
        kv_positions: Tensor | None = None,
        head_offset: int | None = None,
        heads: int | None = None,
        whole: tuple[int, int] | None = None,
        cp: Any = None,
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
            q_positions, kv_positions: where rows stand, whole numbers ``(Sq,)`` or ``(B, Sq)``, and ``(Skv,)`` or ``(B, Skv)``, rising from
                row to row; not with ``q_offset``. ``q_idx`` and ``kv_idx`` are then these, and so are the numbers by which tables are
                read. Keys may have gaps: a key that is not there is as if masked. Programs that work on blocks of tokens want whole ones.
            head_offset: of a part of the heads the number of its first head, which then is the first ``h``. heads: how many the whole has.
            cp: ``plan.on(mesh)`` of :func:`sparsedsl.parallel.plan`: q, k and v are the rows of this rank, and keys of others are sent.
                Inputs of programs that have a row a query, a key or a block of keys are this rank's, too. Tables are those of the whole;
                gradients of learned ones are this rank's part. ``torch.compile`` ends its graph before the call and begins another behind.
            whole: ``(q_len, kv_len)`` of the whole, for what reads these lengths where positions are given.
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
        where = None
        if not (q_positions is kv_positions is head_offset is heads is whole is None):
            where = said_standing(q_positions, kv_positions, head_offset, heads, whole, q_offset=q_offset)
        words = CallWords(named, q_offset, return_lse, scale, where, state, return_state, summaries, self.layout)
        if cp is not None:
            # What ranks do together is no part of a graph: it ends before the call, and another begins behind.
            if torch.compiler.is_compiling():
                return torch.compiler.disable(self._planned)(cp, q, k, v, words)
            return self._planned(cp, q, k, v, words)
        if self.layout == "bhsd":
            return self._calls(q, k, v, words)
        try:
            result = self._calls(swapped(q), swapped(k), swapped(v), words)
        except ShapeError as error:
            raise in_bshd(error) from None
        return (swapped(result[0]), *result[1:]) if isinstance(result, tuple) else swapped(result)

    def _planned(self, cp: Any, q: Any, k: Any, v: Any, words: CallWords) -> Any:
        """The call on this rank's rows, with the keys of others that they see."""
        if not hasattr(cp, "attend"):
            raise ArgumentError(f"cp must be what plan.on(mesh) of sd.parallel.plan gives; got {shown(cp)}")
        stands = words.where is not None and not (words.where.queries is words.where.keys is words.where.lengths is None)
        if stands or words.return_state or not words.q_offset is words.state is words.summaries is None:
            raise UnsupportedError(
                "cp= knows where rows stand: it takes no q_offset, positions, whole, state or summaries. Leave them out"
            )
        if self.layout == "bshd":
            q, k, v = swapped(q), swapped(k), swapped(v)
        run = functools.partial(cp.attend, self._calls)
        try:
            result = sharded_call(self.program, run, q, k, v, words) if are_sharded(q, k, v) else run(q, k, v, words)
        except ShapeError as error:
            raise (error if self.layout == "bhsd" else in_bshd(error)) from None
        if self.layout == "bhsd":
            return result
        return (swapped(result[0]), *result[1:]) if isinstance(result, tuple) else swapped(result)

    def keep_summaries(self, max_length: int | None = None) -> KeptSummaries:
        """An empty place for summaries of blocks of keys; pass it to all calls of one sequence as ``summaries=``.

        A step of decoding then reads the keys that it attends to, one row for each block, and the keys of the block that is not over:
        see :class:`~sparsedsl.execute.kept_summaries.KeptSummaries`.

        Args:
            max_length: take memory for so many tokens at once, which more tokens move; None: as they come.

        Raises:
            ShapeError: ``max_length`` is no length.
            UnsupportedError: the program sums up no keys.
        """
        if not summarised(self.program):
            raise UnsupportedError(
                f"{self.program!r} makes no summaries or bounds of keys that could be kept; call it without summaries="
            )
        return KeptSummaries(self.program, None if max_length is None else check_size("max_length", max_length, 1))

    @property
    def has_lse(self) -> bool:
        """Whether it is a softmax."""
        return self._calls.has_lse

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
            self._calls, q_len, q_len if kv_len is None else kv_len, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
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
        if self.layout == "bshd":
            q, k, v = swapped(q), swapped(k), swapped(v)
        return self._calls.choices(q, k, v, CallWords(named, q_offset, layout=self.layout))

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
        if self._calls.static is None:
            if self.backend == "auto":
                return self.program.text
            facts = CallFacts("cuda", "float32", 1, 1, 1, 1024, 1024, 64, 64)
            asked = requests_of(self.program, facts, whole_tables=self._calls.dispatch.whole_tables)
            written = (named(self.backend).source(request) for requests in asked.values() for request in requests)
            return "\n\n".join([self.program.text, *dict.fromkeys(filter(None, written))])
        return self.static.runner("cpp" if self.backend == "auto" else self.backend).source

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
        told = self.program if self._calls.static is None else self.pattern
        picture = picture_of(self.program) if self._calls.static is None else thumbnail(self.pattern.mask.expr, told.bound)
        facts = [("backend", self.backend), *told.html_facts()]
        return card("Attention", str(told), facts, picture, () if self._calls.static is None else self.pattern.warnings)

    def __repr__(self) -> str:
        what = self.program if self._calls.static is None else self.pattern
        layout = "" if self.layout == "bhsd" else f" layout={self.layout!r}"
        return f"<Attention backend={self.backend!r}{layout} {what!r}>"

    def __reduce__(self) -> Any:
        return Attention, (self.program, self.backend, tuple(sorted(self.allow)), self.layout)

    @property
    def heads_first(self) -> Attention:
        """The same on tensors ``(B, H, S, D)``: itself, if that is its layout."""
        return self if self.layout == "bhsd" else Attention(self.program, self.backend, tuple(sorted(self.allow)))
