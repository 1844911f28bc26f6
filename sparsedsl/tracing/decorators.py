"""FlexAttention's functions by decorator, ``@sd.mask`` and ``@sd.score``; and which of the two a bare function is."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, overload

from sparsedsl.errors import TraceError
from sparsedsl.lang.expressions import Mask, Score
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.wrapped import Expression
from sparsedsl.tracing.trace import trace_mask, trace_score

__all__ = ["is_traceable", "mask", "score_by", "traced"]

_BATCH = frozenset(("b", "batch", "batch_idx", "bs"))
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@overload
def mask(function: Callable[..., Any], /) -> Mask: ...
@overload
def mask(*, rename: Mapping[str, str]) -> Callable[[Callable[..., Any]], Mask]: ...
def mask(function: Any = None, /, *, rename: Mapping[str, str] | None = None) -> Any:
    """Decorator: the :class:`~sparsedsl.Mask` of a FlexAttention ``mask_mod(b, h, q_idx, kv_idx)``; see :func:`sparsedsl.trace_mask`.

    Args:
        function: takes four arguments, by any names, and gives a boolean. It is run once, on stand-ins for int64 scalars.
        rename: table name -> new name: ``@sd.mask(rename={"document": "doc"})``. Tensors that it captures become tables, bound to it.

    Raises:
        TraceError: it does what a mask cannot hold; the message names the line and what to write.

    >>> import torch, sparsedsl as sd
    >>> @sd.mask
    ... def local(b, h, q_idx, kv_idx):
    ...     return (q_idx >= kv_idx) & (q_idx - kv_idx < 4)
    >>> local
    Mask((kv_idx <= q_idx) & (q_idx - kv_idx < 4))
    >>> ids = torch.tensor([0, 0, 1])
    >>> @sd.mask(rename={"ids": "doc"})
    ... def packed(b, h, q_idx, kv_idx):
    ...     return ids[q_idx] == ids[kv_idx]
    >>> print(local & packed)
    (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx) & (q_idx - kv_idx < 4)
    """
    if function is None:
        return lambda given: trace_mask(given, rename=rename)
    return trace_mask(function, rename=rename)


def score_by(function: Any = None, /, *, rename: Mapping[str, str] | None = None) -> Any:
    """What the bare score does as a decorator, ``@sd.score``: see :meth:`sparsedsl.Score.__call__`."""
    if function is None:
        return lambda given: trace_score(given, rename=rename)
    return trace_score(function, rename=rename)


def is_traceable(value: object) -> bool:
    """Whether ``value`` is a function of somebody else's, as opposed to what the language makes, compiles or names.

    >>> is_traceable(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx), is_traceable(Mask), is_traceable(3)
    (True, False, False)
    """
    if isinstance(value, (type, Expression, Pattern)) or hasattr(value, "program") or hasattr(value, "pattern"):
        return False
    module, name = str(getattr(value, "__module__", "")), str(getattr(value, "__name__", ""))
    ours = module.partition(".")[0] == "sparsedsl" and getattr(sys.modules.get(module), name, None) is value
    # A function of ours, or one without arguments, makes a pattern, and wants to be called.
    return callable(value) and not ours and _arguments(value) != []


def traced(function: Callable[..., Any], where: str) -> Mask | Score:
    """The mask of a function of ``(b, h, q_idx, kv_idx)``, the score of one of ``(score, b, h, q_idx, kv_idx)``.

    Raises:
        TraceError: its arguments do not tell which it is. ``where`` names what it was given to.

    >>> traced(lambda b, h, q, k: q >= k, "compile()"), traced(lambda s, b, h, q, k: s + (k - q), "compile()")
    (Mask(kv_idx <= q_idx), Score(score + kv_idx - q_idx))
    """
    name = getattr(function, "__name__", type(function).__name__)
    names = _arguments(function)
    if names is not None and len(names) == 4 and names[0].lower() not in ("score", "scores", "logit", "logits"):
        return trace_mask(function)
    if names is not None and len(names) == 5 and names[0].lower() not in _BATCH:
        return trace_score(function)
    takes = "what cannot be seen" if names is None else f"({', '.join(names)})"
    raise TraceError(
        f"{where}: {name} takes {takes}, which does not tell a mask from a score: a mask_mod takes (b, h, q_idx, kv_idx), a score_mod "
        "(score, b, h, q_idx, kv_idx). Say which it is: sd.trace_mask(function) or sd.trace_score(function)"
    )


def _arguments(function: Callable[..., Any]) -> list[str] | None:
    """The arguments that a call must give; None where they cannot be seen, or any number will do."""
    try:
        parameters = inspect.signature(getattr(function, "forward", function)).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return [p.name for p in parameters if p.default is p.empty and p.kind in _POSITIONAL]
