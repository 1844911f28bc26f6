"""Rows from rank to rank, in one all-to-all, with gradients back by its transpose, summed in float32 at least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sparsedsl.runtime.dtypes import accumulated

__all__ = ["Arriving", "Route", "all_to_all", "begun", "dealt", "sent", "tied"]

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Route:
    """What one rank sends and gets: ``rows`` of its own tensor in the order of the ranks that they go to, of which ``counts[0]`` says how
    many go to each, and ``counts[1]`` how many come from each. ``own``: rows of its own that it keeps; ``places``: where in the result
    these go, and then what comes."""

    rows: Tensor
    counts: tuple[list[int], list[int]]
    own: Tensor
    places: Tensor
    group: Any

    def to(self, device: torch.device) -> Route:
        """The same with numbers of rows on a device."""
        rows, own, places = (x.to(device) for x in (self.rows, self.own, self.places))
        return Route(rows, self.counts, own, places, self.group)


def sent(x: Tensor, route: Route) -> Tensor:
    """What a rank gets of rows ``x (rows, ..)``, with its own, in order. All ranks call it at once."""
    found: Tensor = _Placed.apply(x, route.to(x.device))
    return found


def dealt(x: Tensor, to_each: Sequence[int], from_each: Sequence[int], group: Any) -> Tensor:
    """Rows of ``x``, so many to each rank, this one too, in order; what comes, in the order of the ranks that it comes from."""
    none = torch.zeros(0, dtype=torch.int64)
    route = Route(torch.arange(x.shape[0]), (list(to_each), list(from_each)), none, none, group)
    received: Tensor = _Sent.apply(x, route.to(x.device), None)
    return received


@dataclass
class Arriving:
    """Rows on their way: :meth:`wait` before they are read."""

    rows: Tensor
    work: Any

    def wait(self) -> Tensor:
        """The rows of others, in the order of the ranks that they come from."""
        self.work.wait()
        return self.rows


def begun(x: Tensor, route: Route) -> Arriving:
    """The rows of others, on their way while this rank does something else."""
    started: list[Any] = []
    rows = _Sent.apply(x, route.to(x.device), started)
    return Arriving(rows, started[0])


class _Placed(torch.autograd.Function):
    """Rows of this rank and of others, each in its place; nothing is held twice but what is on its way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route) -> Tensor:
        ctx.route, ctx.shape, ctx.dtype = route, x.shape, x.dtype
        count = route.own.numel()
        received = all_to_all(x.index_select(0, route.rows), *route.counts, route.group)
        found = x.new_empty((route.places.numel(), *x.shape[1:]))
        found.index_copy_(0, route.places[:count], x.index_select(0, route.own))
        return found.index_copy_(0, route.places[count:], received)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        route, count = ctx.route, ctx.route.own.numel()
        total = _returned(grads[0].index_select(0, route.places[count:]), route, ctx.shape, ctx.dtype)
        kept = grads[0].index_select(0, route.places[:count])
        return total.index_add_(0, route.own, kept.to(total.dtype)).to(ctx.dtype), None


class _Sent(torch.autograd.Function):
    """Rows to the ranks that see them; backward, their gradients, summed where several ranks see a row. ``started``: takes what has to be
    waited for; None: it is waited for here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Route, started: list[Any] | None) -> Tensor:
        ctx.route, ctx.shape, ctx.dtype = route, x.shape, x.dtype
        found, work = _all_to_all(x.index_select(0, route.rows), *route.counts, route.group, later=started is not None)
        if started is not None:
            started.append(work)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _returned(grads[0], ctx.route, ctx.shape, ctx.dtype).to(ctx.dtype), None, None


def _returned(grad: Tensor, route: Route, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Gradients of what came from others, back where it came from, summed there in float32 at least."""
    back = all_to_all(grad.to(accumulated(dtype)), route.counts[1], route.counts[0], route.group)
    return back.new_zeros(shape).index_add_(0, route.rows, back)


def all_to_all(x: Tensor, to_each: Sequence[int], from_each: Sequence[int], group: Any) -> Tensor:
    """Rows of ``x``, so many to each rank, in order; what comes, in the order of the ranks that it comes from."""
    found, _ = _all_to_all(x, to_each, from_each, group, later=False)
    return found


def _all_to_all(x: Tensor, to_each: Sequence[int], from_each: Sequence[int], group: Any, *, later: bool) -> tuple[Tensor, Any]:
    found = x.new_empty((sum(from_each), *x.shape[1:]))
    work = dist.all_to_all_single(found, x.contiguous(), list(from_each), list(to_each), group=group, async_op=later)
    return found, work


def tied(out: Tensor, *others: Tensor) -> Tensor:
    """``out``, whose backward pass also reaches ``others``, with zeros: what ranks do together backward, none of them may leave out, and a
    rank that chose nothing of others has no other way to them."""
    others = tuple(x for x in others if x.requires_grad)
    if not (others and torch.is_grad_enabled()):
        return out
    # The gradient of a leaf is kept, and may be changed in place: it has memory of its own.
    tied_out: Tensor = _Tied.apply(out, [x.is_leaf for x in others], *others)
    return tied_out


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, leaves: list[bool], *others: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype, x.device, leaf) for x, leaf in zip(others, leaves, strict=True)]
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        nothing = []
        for shape, dtype, device, leaf in ctx.like:
            nothing.append(torch.zeros(shape if leaf else (), dtype=dtype, device=device).expand(shape))
        return grads[0], None, *nothing
