"""Autograd and ``torch.func`` for lowerings that are no composition of differentiable torch operators.

Such a lowering is a :class:`Kernel`: a forward pass that gives ``out`` and ``lse``, and a backward pass that takes them. What autograd,
``torch.vmap``, ``torch.func.grad`` and activation checkpointing ask for is made of the two, here, once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.pattern import Pattern
from sparsedsl.runtime.call import Call, check_call
from sparsedsl.runtime.places import Places
from sparsedsl.runtime.torch_modes import is_transformed
from sparsedsl.runtime.unseen import Sight, guarded_backward, guarded_forward
from sparsedsl.runtime.vmap import map_call, reads_batch

__all__ = [
    "Kernel",
    "differentiable",
    "known_results",
    "no_forward_mode",
    "no_second_derivatives",
    "only_first_derivatives",
    "transformed",
]

Tensor = torch.Tensor


class Kernel(Protocol):
    """A lowering with its own backward pass. ``schedule`` is whatever it prepares for the lengths and tables of a call."""

    @property
    def pattern(self) -> Pattern:
        """What it computes."""

    def schedule(self, call: Call) -> Any:
        """What both passes of a call of this shape and these tables need; remembered by the kernel, since it is asked for again."""

    def sight(self, call: Call) -> Sight | None:
        """Which queries see which keys, asked for where results are not finite; None where the forward pass has seen to it itself."""

    def forward(self, call: Call, schedule: Any) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, bool]:
        """``out (B, Hq, Sq, Dv)`` in the dtype of q and ``lse (B, Hq, Sq)``, both new tensors; a kernel that has looked on the way also
        says whether ``out`` is finite."""

    def backward(
        self,
        call: Call,
        schedule: Any,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        learned: tuple[str, ...],
    ) -> tuple[Tensor, Tensor, Tensor, Mapping[str, Tensor]]:
        """Gradients of q, k, v and of the tables named in ``learned``, given the results and their gradients; all new tensors."""


def differentiable(kernel: Kernel, call: Call) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of ``kernel``, with gradients from its backward pass.

    Second derivatives and forward-mode derivatives raise :class:`UnsupportedError`. Under ``torch.vmap`` the samples become one batch,
    or are run one by one where the pattern reads ``b`` or the tables differ.
    """
    tensors = (call.q, call.k, call.v, *call.tables.values())
    if not call.needs_grad and not is_transformed(*tensors):
        return _known.get() or _forward(kernel, call)
    known = replace(call.domain, tables={}) if call.made_here else None
    job = _KernelCall(kernel, tuple(call.tables), call.domain.q_offset, call.scale, call.places, known)
    return _Forward.apply(job, *tensors)


def transformed(pattern: Pattern, run: Callable[[Call], Any], call: Call, return_lse: bool) -> Any:
    """``run(call)`` under the transforms of ``torch.func``, for a lowering whose gradients, if any, they cannot reach."""
    out, lse = differentiable(_ForwardOnly(pattern, run, return_lse), call)
    return (out, lse) if return_lse else out


@dataclass(frozen=True, eq=False)
class _ForwardOnly:
    pattern: Pattern
    run: Callable[[Call], Any]
    return_lse: bool

    def schedule(self, call: Call) -> None:
        return None

    def sight(self, call: Call) -> None:
        return None

    def forward(self, call: Call, schedule: None) -> tuple[Tensor, Tensor]:
        result = self.run(call)
        return result if self.return_lse else (result, result.new_empty((*result.shape[:2], 0)))

    def backward(self, *arguments: Any) -> NoReturn:
        raise UnsupportedError(
            "FlexAttention has no gradients under torch.vmap and torch.func here; "
            "use sd.compile(pattern, backend='tiled') or backend='reference', which have"
        )


_known: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("known results", default=None)


@contextmanager
def known_results(out: Tensor, lse: Tensor | None) -> Iterator[None]:
    """Within it :func:`differentiable` runs no forward pass: these are the results of the one call that is made. None: not known."""
    token = _known.set(None if lse is None else (out.detach(), lse.detach()))
    try:
        yield
    finally:
        _known.reset(token)


def _forward(kernel: Kernel, call: Call) -> tuple[Tensor, Tensor]:
    schedule = kernel.schedule(call)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        same = q is call.q and k is call.k and v is call.v
        return kernel.forward(call if same else replace(call, q=q, k=k, v=v), schedule)

    return guarded_forward(call.q, call.k, call.v, call.scale, run, lambda: kernel.sight(call))


def _backward(
    kernel: Kernel, call: Call, results: tuple[Tensor, Tensor, Tensor, Tensor | None], learned: tuple[str, ...]
) -> list[Tensor]:
    """Gradients of q, k, v and the learned tables."""
    schedule = kernel.schedule(call)

    def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Any) -> list[Tensor]:
        changed = replace(call, q=q, k=k, v=v)
        *found, grads = kernel.backward(changed, schedule, out, lse, grad_out, grad_lse, learned)
        return [*found, *(grads[name] for name in learned)]

    places = "qkk" + "*" * len(learned)
    return guarded_backward(call.q, call.k, call.v, call.scale, results, run, places, lambda: kernel.sight(call))


@dataclass(frozen=True, eq=False)
class _KernelCall:
    """A call without its tensors, which autograd keeps. ``known``: its lengths, where its tables are not looked at again."""

    kernel: Kernel
    names: tuple[str, ...]
    q_offset: int
    scale: float
    places: Places | None = None
    known: Domain | None = None

    def call(self, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Call:
        """The call on these tensors, checked again: under vmap the tables are others."""
        named = dict(zip(self.names, tables, strict=True))
        if self.known is not None:
            return Call(q, k, v, replace(self.known, tables=named), self.scale, named, self.places, True)
        return check_call(self.kernel.pattern, q, k, v, named, q_offset=self.q_offset, scale=self.scale, places=self.places)

    @property
    def tells_batch_entries_apart(self) -> bool:
        """Whether it is another attention for other batch entries."""
        return reads_batch(self.kernel.pattern) or (self.places is not None and self.places.batch > 1)


class _Forward(torch.autograd.Function):
    """Forward; inputs: a job, ``q, k, v`` and the tables."""

    @staticmethod
    def forward(job: _KernelCall, *tensors: Tensor) -> Any:
        known = _known.get()
        if known is not None:
            return known
        return _forward(job.kernel, job.call(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.job = inputs[0]
        ctx.save_for_backward(*output, *inputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        wanted = tuple(ctx.needs_input_grad[1:])
        if grad_out is None and grad_lse is None:
            return None, *(None for _ in wanted)
        found = iter(_Backward.apply(ctx.job, wanted, grad_out, grad_lse, *ctx.saved_tensors))
        return None, *(next(found) if want else None for want in wanted)

    @staticmethod
    def vmap(info: Any, in_dims: Any, job: _KernelCall, *tensors: Tensor) -> Any:
        def call(batched: list[Any], tables: list[Any]) -> Sequence[Tensor]:
            return _Forward.apply(job, *batched, *tables)

        fold = not job.tells_batch_entries_apart
        dims = in_dims[1:]
        results, where = map_call(call, info.batch_size, list(tensors[:3]), dims[:3], list(tensors[3:]), dims[3:], fold=fold)
        return tuple(results), tuple(where)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        no_forward_mode()


class _Backward(torch.autograd.Function):
    """Backward; inputs: a job, which gradients are wanted, those of the results, the results, and the inputs of the forward pass."""

    @staticmethod
    def forward(
        job: _KernelCall,
        wanted: tuple[bool, ...],
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        *tensors: Tensor,
    ) -> Any:
        call = job.call(*tensors)
        learned = tuple(name for name, want in zip(job.names, wanted[3:], strict=True) if want)
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        found = _backward(job.kernel, call, (out, lse, grad_out, grad_lse), learned)
        return *(g for g, want in zip(found, wanted[:3], strict=False) if want), *found[3:]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        no_second_derivatives()

    @staticmethod
    def vmap(info: Any, in_dims: Any, job: _KernelCall, wanted: tuple[bool, ...], *tensors: Any) -> Any:
        def call(batched: list[Any], tables: list[Any]) -> Sequence[Tensor]:
            return _Backward.apply(job, wanted, *batched, *tables)

        dims, first = in_dims[2:], 7  # grad_out, grad_lse, out, lse, q, k, v, then tables
        fold = not job.tells_batch_entries_apart and not any(wanted[3:])
        results, where = map_call(
            call, info.batch_size, list(tensors[:first]), dims[:first], list(tensors[first:]), dims[first:], fold=fold
        )
        return tuple(results), tuple(where)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        no_second_derivatives()


def no_second_derivatives(*_: Any) -> NoReturn:
    """The refusal of a derivative of a backward pass."""
    raise UnsupportedError(
        "this lowering has no second derivatives: its backward pass cannot be differentiated again. "
        "Use sd.compile(pattern, backend='reference') outside of torch.compile and torch.export, which has derivatives of every order"
    )


def only_first_derivatives(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``backward`` of a :class:`torch.autograd.Function` whose gradients cannot be differentiated: to try is refused, also where what
    came before it could be differentiated twice and the result would be a part of the truth."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        slopes = iter(
            _Last.apply(sum(x is not None for x in found), *(x for x in found if x is not None), *grads, *ctx.saved_tensors)
        )
        return tuple(None if x is None else next(slopes) for x in found)

    return run


class _Last(torch.autograd.Function):
    """The first so many of some tensors, which depend on all others."""

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        no_second_derivatives()


def no_forward_mode(*_: Any) -> NoReturn:
    """The refusal of forward-mode derivatives."""
    raise UnsupportedError(
        "this lowering has no forward-mode derivatives (jvp, jacfwd, hessian); use torch.func.vjp or torch.func.jacrev, "
        "or sd.compile(pattern, backend='reference'), which has them"
    )
