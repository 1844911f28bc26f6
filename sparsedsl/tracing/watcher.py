"""Sees what ATen does not show: indexing of real tensors, writes, random numbers, and which real tensors the callable reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name

from sparsedsl.torch_private import tree_leaves, tree_map
from sparsedsl.tracing import indexing, trace_advice
from sparsedsl.tracing.proxy import Proxy, Tracer
from sparsedsl.tracing.trace_graph import Refused, fail

__all__ = ["Watcher"]


class Watcher(TorchFunctionMode):
    """Sees every torch function the callable calls, before torch does."""

    def __init__(self, tracer: Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tracer, kwargs = self.tracer, kwargs or {}
        name = getattr(func, "__name__", str(func))
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        reals = [leaf for leaf in leaves if not isinstance(leaf, Proxy)]
        for leaf in reals:
            tracer.seen.setdefault(id(leaf), leaf)
        tracer.current.append((resolve_name(func) or name).removeprefix("torch._C._nn.").removeprefix("torch._C."))
        try:
            return self._call(func, name, args, kwargs, leaves, reals)
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
            if len(leaves) == len(reals):
                raise
            message = str(error).split("\n")[0]
            fail(f"{tracer.current[-1]}()", f"torch refuses it: {message}")
        finally:
            tracer.current.pop()

    def _call(self, func: Any, name: str, args: Any, kwargs: Mapping[str, Any], leaves: list[Any], reals: list[Any]) -> Any:
        tracer = self.tracer
        proxies = len(leaves) > len(reals)
        if name in trace_advice.RANDOM:
            trace_advice.refuse(name, tracer.current[-1])
        writes = (
            name == "__setitem__"
            or (name.startswith("__i") and name[3:-2] in trace_advice.IN_PLACE)
            or kwargs.get("out") is not None
        )
        writes = writes or (name.endswith("_") and not name.endswith("__") and name not in trace_advice.HARMLESS)
        if writes and (proxies or any(tracer.is_captured(t) for t in tree_leaves((args[:1], kwargs.get("out"))))):
            trace_advice.refuse("write", tracer.current[-1])
        if func is torch.Tensor.__getitem__:
            return indexing.getitem(tracer, args[0], args[1], lambda: func(*args))
        if proxies:
            result = func(*tree_map(tracer.lift, args), **tree_map(tracer.lift, dict(kwargs)))
            tracer.note(result)
            if isinstance(result, Proxy) and all(leaf.known is not None for leaf in leaves if isinstance(leaf, Proxy)):
                result.known = func(*tree_map(_known, args), **tree_map(_known, dict(kwargs)))
            return result
        if name in ("to", "cpu", "cuda") and tracer.is_captured(args[0]) and trace_advice.moves_only(args, kwargs):
            return args[0]
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.ndim == 0 and any(t.ndim == 0 and tracer.is_captured(t) for t in reals):
            # Keep the captured scalar an operand, so that another value can be bound later.
            with contextlib.suppress(Refused, RuntimeError, TypeError, ValueError):
                lifted = func(*tree_map(tracer.lift, args), **tree_map(tracer.lift, dict(kwargs)))
                if isinstance(lifted, Proxy):
                    lifted.known = result.detach()
                    return lifted
        tracer.note(result, origin=next((self._origin(t) for t in reals if t.ndim), None))
        return result

    def _origin(self, tensor: torch.Tensor) -> torch.Tensor:
        fresh = self.tracer.fresh.get(id(tensor))
        return tensor if fresh is None or fresh.origin is None else fresh.origin


def _known(value: object) -> Any:
    return value.known if isinstance(value, Proxy) else value
