"""Callables -> expressions: :func:`trace_mask`, :func:`trace_score`. Stages: watch (proxies) -> graph of nodes -> language."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sparsedsl.errors import TraceError
from sparsedsl.lang.advice import shown
from sparsedsl.lang.expressions import Mask, Score, as_score
from sparsedsl.tracing.capture import sanitise
from sparsedsl.tracing.convert import Converter
from sparsedsl.tracing.operations import record
from sparsedsl.tracing.proxy import Proxy, Tracer
from sparsedsl.tracing.trace_graph import Captured, Refused, TraceNode, constant
from sparsedsl.tracing.watcher import Watcher

__all__ = ["trace_mask", "trace_score"]

_INDICES = ("b", "h", "q_idx", "kv_idx")


def trace_mask(mask_mod: Callable[..., Any], *, rename: Mapping[str, str] | None = None) -> Mask:
    """A FlexAttention ``mask_mod`` as a :class:`~sparsedsl.Mask` with the same value for every ``(b, h, q_idx, kv_idx)``.

    Args:
        mask_mod: any callable of four arguments, run once with stand-ins for four scalar int64 tensors: a function, lambda,
            closure, ``functools.partial``, bound method, callable object or ``nn.Module``. It must return a boolean tensor or a
            Python bool.
        rename: table name -> new name, for two callables that capture different tensors under one name.

    Captured Python numbers become constants. Captured tensors become tables named after the variable that holds them, kept in
    ``.bound``; one without dimensions becomes a table of one entry read at 0, so that other values can be bound later. Only what
    Python itself takes from a captured tensor (``if flag``, ``int(window)``, ``offsets.sum()``) is a constant of the trace. A
    table that is *computed* inside the callable is named after its source and content.

    Facts declared about a table, part of its identity, are measured: ``monotone`` where an integer table never falls along its
    last dimension, and ``values_in=(0 or 1, 2**31 - 1)`` only where the table is read as an index or a divisor. Float arithmetic
    that ends in a comparison or a cast to integer is kept bit by bit (``f32_log(...)`` in the text form). An index that may be
    negative counts from the end of its table, as in torch (``i64_wrap(index, size)``). Whole numbers of
    32 and 64 bits are exact: arithmetic that would wrap around is refused, here with the values of the captured tables, and by calls.

    Raises:
        TraceError: for what depends on a value that is not known yet (``if``, ``and``, ``int()``, ``.item()``), and for
            operations that a mask cannot hold (reductions, matrix products, writes, random numbers); names the operation, the
            line and the way out.

    >>> import torch
    >>> document = torch.tensor([0, 0, 0, 1, 1, 2])
    >>> def packed(b, h, q_idx, kv_idx):
    ...     return (q_idx >= kv_idx) & (document[q_idx] == document[kv_idx])
    >>> mask = trace_mask(packed)
    >>> print(mask)
    (document[q_idx] == document[kv_idx]) & (kv_idx <= q_idx)
    >>> mask.tables["document"].declaration(), mask.bound["document"] is document
    ("table('document', monotone=True)", True)
    """
    if isinstance(mask_mod, Mask):
        return mask_mod
    return _trace(mask_mod, "mask_mod", [_symbol(name) for name in _INDICES], _as_mask, rename)


def trace_score(score_mod: Callable[..., Any], *, rename: Mapping[str, str] | None = None) -> Score:
    """A FlexAttention ``score_mod`` as a :class:`~sparsedsl.Score`.

    Args:
        score_mod: any callable of five arguments ``(score, b, h, q_idx, kv_idx)``; see :func:`trace_mask` for what it may be
        and do.
            ``score`` stands for a float32 scalar. It must return a tensor of one element or a number.
        rename: table name -> new name.

    Float arithmetic becomes real arithmetic, equal up to rounding, with casts between float types left out; floats that
    decide something (a T5 bucket) are kept bit by bit. Captured tensors that require gradients, such as an ``nn.Parameter``,
    become learned tables.

    Raises:
        TraceError: as :func:`trace_mask`.

    >>> def alibi(score, b, h, q_idx, kv_idx):
    ...     return score + (kv_idx - q_idx) * 2.0 ** (-(h + 1))
    >>> print(trace_score(alibi))
    score + 2.0**(-h - 1)*(kv_idx - q_idx)
    """
    if isinstance(score_mod, Score):
        return score_mod
    symbols = [_symbol("score", torch.float32), *(_symbol(name) for name in _INDICES)]
    return _trace(score_mod, "score_mod", symbols, _as_score, rename)


def _symbol(name: str, dtype: torch.dtype = torch.int64) -> TraceNode:
    return TraceNode("symbol", (name,), dtype, dtype, None)


def _trace(
    function: Any, kind: str, symbols: list[TraceNode], convert: Callable[..., Any], rename: Mapping[str, str] | None
) -> Any:
    _check_signature(function, kind, [str(s.args[0]) for s in symbols])
    if rename is not None and not isinstance(rename, Mapping):
        raise TraceError(f"rename must be a dict, table name -> new name; got {shown(rename)}")
    tracer, described = Tracer(record), f"{kind} {_name_of(function)}"
    try:
        with Watcher(tracer):
            result = _run_callable(function, [Proxy(symbol, tracer) for symbol in symbols])
        node = _result_node(tracer.lift(result), tracer, described)
        _rename(tracer, rename or {})
        expression = _converted(node, lambda converter: convert(converter, node, described), learned=kind == "score_mod")
    except Refused as refused:
        raise TraceError(str(refused)) from None
    bound = {captured.name: captured.tensor for _, captured in tracer.captured.values()}
    return type(expression)(expression.expr, {name: bound[name] for name in expression.tables})


def _run_callable(function: Any, proxies: list[Proxy]) -> Any:
    """The user's code runs below this frame; see :mod:`sparsedsl.tracing.locate`."""
    return function(*proxies)


def _converted(node: TraceNode, convert: Callable[[Converter], Any], learned: bool) -> Any:
    """Convert; once more with the claims about tables that the first time found useful, as long as they grow."""
    claims: dict[Captured, int] = {}
    while True:
        converter = Converter(claims, learned)
        result = None
        try:
            result = convert(converter)
        except Refused:
            if converter.wanted == claims:
                raise
        if converter.wanted == claims:
            return result
        claims = converter.wanted


def _check_signature(function: Any, kind: str, names: list[str]) -> None:
    wanted = f"{kind} must take ({', '.join(names)})"
    if isinstance(function, type):
        raise TraceError(f"{wanted}; got the class {function.__name__}, which is no function of them")
    if not callable(function):
        way = ". A BlockMask was made of its block_mask.mask_mod" if type(function).__name__ == "BlockMask" else ""
        raise TraceError(f"{wanted}; got {type(function).__name__}, which cannot be called{way}")
    target = function.forward if isinstance(function, torch.nn.Module) else function
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*names)
    except TypeError:
        other = "trace_score" if kind == "mask_mod" else "trace_mask"
        required = [
            p for p in signature.parameters.values() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        hint = f". With {len(required)} arguments it is one for sd.{other}" if len(required) == 9 - len(names) else ""
        raise TraceError(f"{wanted}; {_name_of(function)} takes {signature}{hint}") from None


def _name_of(function: Any) -> str:
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None)
    return str(name) if name else type(function).__name__


def _result_node(result: Any, tracer: Tracer, described: str) -> TraceNode:
    """The node of what the callable returned."""
    if isinstance(result, (bool, int, float)):
        return constant(result)
    if not isinstance(result, torch.Tensor):
        raise TraceError(
            f"{described} must return a tensor; it returned {type(result).__name__}. Does every path `return` a value?"
        )
    if result.ndim:
        raise TraceError(
            f"{described} must return a single value; it returned shape {tuple(result.shape)}. "
            "Read tables down to one element: table[q_idx]"
        )
    return tracer.node(result)


def _as_mask(converter: Converter, node: TraceNode, described: str) -> Mask:
    if node.dtype != torch.bool:
        raise TraceError(f"{described} must return a boolean; it returned {node.dtype}. Write `!= 0` at the end, or a comparison")
    return converter.mask(node)


def _as_score(converter: Converter, node: TraceNode, described: str) -> Score:
    if node.dtype.is_complex:
        raise TraceError(f"{described} must return a real number; it returned {node.dtype}")
    return as_score(converter.score(node))


def _rename(tracer: Tracer, rename: Mapping[str, str]) -> None:
    tables = {captured.name: captured for _, captured in tracer.captured.values()}
    unknown = sorted(set(rename) - set(tables))
    if unknown:
        raise TraceError(f"rename names {', '.join(unknown)}; the callable reads {', '.join(tables) or 'no table'}")
    for old, new in rename.items():
        tables[old].name = sanitise(new)
    if len({captured.name for captured in tables.values()}) < len(tables):
        raise TraceError(f"rename gives two tables one name: {dict(rename)}")
