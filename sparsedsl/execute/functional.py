"""Attention as one function call, ``sd.attention(q, k, v, pattern)``: what it compiles is remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.errors import ArgumentError, UnsupportedError
from sparsedsl.execute.compiled import Attention
from sparsedsl.execute.compiling import as_declared
from sparsedsl.execute.compiling import compile as compile_pattern
from sparsedsl.execute.kept_summaries import KeptSummaries
from sparsedsl.execute.state import ProgramState
from sparsedsl.lang.advice import shown
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.tables import by_kept_name
from sparsedsl.lang.wrapped import Carried
from sparsedsl.program.program_text import read_program
from sparsedsl.runtime.arguments import joined_tables
from sparsedsl.tracing.decorators import is_traceable

__all__ = ["attention", "without_values"]

Tensor = torch.Tensor
# Bytes of keys and places: some hundreds of compiled patterns. What these hold for themselves is bounded with all other caches.
_COMPILED: Cache[Attention] = Cache(most=1 << 19)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Any,
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
    backend: str | None = None,
    allow: Sequence[str] | None = None,
    layout: str | None = None,
    tables: Mapping[str, Tensor] | None = None,
    **named: Any,
) -> Any:
    """Attention of ``q (B, Hq, Sq, D)`` over ``k (B, Hkv, Skv, D)``, ``v (B, Hkv, Skv, Dv)`` along a pattern; ``Hq % Hkv == 0``.

    The same as ``sd.compile(pattern, ...)(q, k, v, ...)``, and as fast from the second call on: what was compiled is remembered by what
    the pattern says and by the options, whichever object says it, until :func:`sparsedsl.clear_caches`. Tensors that are bound to the
    pattern are passed along with the call, and not kept.

    Args:
        pattern: a :class:`~sparsedsl.Mask`, :class:`~sparsedsl.Pattern`, :class:`~sparsedsl.Program` or node, a compiled
            :class:`~sparsedsl.Attention`, or a FlexAttention function, which is traced at every call: what it captures may have changed
            (about a millisecond; ``@sd.mask`` above it traces once).
        q_offset, return_lse, scale, q_positions, kv_positions, head_offset, heads, whole, cp, state, return_state, summaries: as a call of
            :class:`~sparsedsl.Attention` takes them.
        backend, allow, layout: as :func:`sparsedsl.compile` takes them; a compiled pattern has its own. With ``layout="bshd"`` tensors
            are ``(B, S, H, D)``, out too; the LSE stays ``(B, Hq, Sq)``.
        tables: tables and inputs by name, for names that are also words of this call: ``tables={"scale": tensor}``.
        named: the other tables and inputs that are not bound to the pattern, by their names.

    Returns:
        ``out (B, Hq, Sq, Dv)``; then the LSE ``(B, Hq, Sq)`` and the state, if asked for.

    Raises:
        ShapeError, TableError, PatternError: as :func:`sparsedsl.compile` and its call. ArgumentError: a compiled pattern together with
            options of compiling. UnsupportedError: a bare function within ``torch.compile``.

    >>> import torch, sparsedsl as sd
    >>> q = k = v = torch.randn(1, 2, 8, 16)
    >>> local = (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 4)
    >>> sd.attention(q, k, v, local).shape
    torch.Size([1, 2, 8, 16])
    >>> doc = sd.table("doc", monotone=True)
    >>> packed = local & (doc[sd.q_idx] == doc[sd.kv_idx])
    >>> out, lse = sd.attention(q, k, v, packed, backend="tiled", return_lse=True, doc=torch.arange(8) // 3)
    >>> lse.shape
    torch.Size([1, 2, 8])
    """
    bound: Mapping[str, Any] = {}
    if torch.compiler.is_compiling():
        attn = getattr(_IN_GRAPHS, _name_in_graphs(pattern, backend, None if allow is None else tuple(allow), layout))
    else:
        attn, bound = _compiled(pattern, backend, allow, layout)
    if bound:
        given = by_kept_name(joined_tables(named, tables), bound)
        named, tables = {}, {**bound, **given}
    return attn(
        q, k, v, q_offset=q_offset, return_lse=return_lse, scale=scale, q_positions=q_positions, kv_positions=kv_positions,
        head_offset=head_offset, heads=heads, whole=whole, cp=cp, state=state, return_state=return_state, summaries=summaries,
        tables=tables, **named,
    )  # fmt: skip


def _compiled(pattern: Any, backend: Any, allow: Any, layout: Any) -> tuple[Attention, Mapping[str, Any]]:
    """What runs a pattern, and the tensors that are bound to it."""
    if isinstance(pattern, Attention):
        _refuse_options(pattern, backend, allow, layout)
        return pattern, {}
    declared = as_declared(pattern, "attention()")
    options: dict[str, Any] = {
        "backend": "auto" if backend is None else backend,
        "allow": () if allow is None else allow,
        "layout": "bhsd" if layout is None else layout,
    }
    if not all(isinstance(value, (str, tuple, list)) for value in options.values()):
        return compile_pattern(declared, **options), {}  # says what is wrong with it
    told = options["backend"], tuple(options["allow"]), options["layout"]
    if isinstance(declared, Pattern):
        key = (declared.exprs, declared.scale, declared.heads, *told)
        return _COMPILED.get(key, [], lambda: compile_pattern(without_values(declared), **options)), declared.bound
    if not declared.root.tensors:
        return _COMPILED.get((declared.root, *told), [], lambda: compile_pattern(declared, **options)), {}
    # Nodes with tensors bound in them are told apart by these, which nothing here is to keep.
    return _COMPILED.get(
        (declared.text, *told), [], lambda: compile_pattern(read_program(declared.text), **options)
    ), declared.bound


def without_values(pattern: Pattern) -> Pattern:
    """The same pattern with no tensor bound to its tables.

    >>> import sparsedsl as sd
    >>> doc = sd.table("doc")
    >>> without_values(sd.attend((doc[sd.q_idx] == 1).bind(doc=torch.zeros(4)))).bound
    {}
    """

    def bare(part: Any) -> Any:
        return None if part is None else type(part)(part.expr, Carried(heads=part.heads))

    return replace(pattern, mask=bare(pattern.mask), score=bare(pattern.score), sink=bare(pattern.sink))


def _refuse_options(attn: Attention, backend: Any, allow: Any, layout: Any) -> None:
    own = {"backend": attn.backend, "allow": tuple(sorted(attn.allow)), "layout": attn.layout}
    for name, value in (("backend", backend), ("allow", allow if allow is None else tuple(sorted(allow))), ("layout", layout)):
        if value is not None and value != own[name]:
            raise ArgumentError(
                f"attention(): {name}={value!r} is for a pattern; got a compiled one, whose {name} is {own[name]!r}. Give its .pattern or "
                ".program, or leave it out"
            )


# ---- within torch.compile ----------------------------------------------------------------------------------------------------


class _InGraphs:
    """What graphs run, as attributes: ``torch.compile`` reads an object that has a place, and no dictionary that grows."""


_IN_GRAPHS = _InGraphs()
# Patterns that a graph was made of. Graphs know them by their id, which nothing else may get.
_KEPT: list[Any] = []


@torch.compiler.assume_constant_result
def _name_in_graphs(pattern: Any, backend: str | None, allow: tuple[str, ...] | None, layout: str | None) -> str:
    """Compile ``pattern`` while a graph is made, which is for this very object; the attribute that holds the result."""
    if is_traceable(pattern):
        raise UnsupportedError(
            f"attention(): a function within torch.compile could change unseen; got {shown(pattern)}. Trace it outside, by @sd.mask or "
            "@sd.score above it, and give what that makes"
        )
    if isinstance(pattern, Attention):
        _refuse_options(pattern, backend, allow, layout)
    name = f"p{id(pattern)}_" + "_".join("" if word is None else str(word) for word in (backend, allow, layout))
    if not hasattr(_IN_GRAPHS, name):
        _KEPT.append(pattern)
        compiled = isinstance(pattern, Attention)
        words: dict[str, Any] = {"backend": backend or "auto", "allow": allow or (), "layout": layout or "bhsd"}
        setattr(_IN_GRAPHS, name, pattern if compiled else compile_pattern(pattern, **words))
    return name
