"""Keys to those whose queries see them, and their gradients back: one all-to-all each way, of what a plan says and no more.

Every row of queries stays whole on its rank, so that nothing is merged and results are those of one process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sparsedsl.errors import ArgumentError, ShapeError, UnsupportedError
from sparsedsl.lang.advice import shown
from sparsedsl.lang.pattern import Pattern
from sparsedsl.parallel.fingerprints import digests
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.standing import Standing

__all__ = ["Exchange", "group_of", "shard", "unshard"]

Tensor = torch.Tensor


class Planned(Protocol):
    """What is asked of a plan."""

    @property
    def q_len(self) -> int:
        """Tokens."""

    @property
    def world(self) -> int:
        """Ranks."""

    @property
    def hash(self) -> str:
        """Of all that it says."""

    def rows(self, rank: int) -> Tensor:
        """Positions that a rank holds."""

    def keys(self, rank: int, name: str | None = None) -> Tensor:
        """Positions that its queries see."""

    def sent(self, source: int, target: int, name: str | None = None) -> Tensor:
        """Positions that one rank sends another."""


def group_of(mesh: Any, world: int) -> Any:
    """The process group of a mesh with one dimension, or of a process group itself.

    Raises:
        ArgumentError: it is neither, or torch.distributed is not begun. ShapeError: it has another number of ranks than the plan.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ArgumentError(
            f"mesh must be a DeviceMesh or a process group, and no process group has begun: call torch.distributed.init_process_group() or "
            f"init_device_mesh() on every rank first; got {shown(mesh)}"
        )
    group = mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(
            "mesh must be a DeviceMesh with one dimension or a process group, as init_device_mesh('cuda', (4,)) or "
            f"torch.distributed.group.WORLD; got {shown(mesh)}"
        )
    size = dist.get_world_size(group)
    if size != world:
        raise ShapeError(
            f"the plan is for {world} ranks, and the mesh has {size}; of a mesh with several dimensions give one: mesh['cp']"
        )
    return group


def shard(plan: Planned, x: Tensor, dim: int, mesh: Any) -> Tensor:
    """The rows of ``x`` that this rank holds; ``x`` is the whole, along ``dim``."""
    _check_length(plan, x, dim, plan.q_len)
    rows = plan.rows(dist.get_rank(group_of(mesh, plan.world)))
    return x.index_select(dim, rows.to(x.device))


def unshard(plan: Planned, x: Tensor, dim: int, mesh: Any) -> Tensor:
    """The whole of what each rank holds the rows of, on all of them."""
    group = group_of(mesh, plan.world)
    rank = dist.get_rank(group)
    rows = [plan.rows(i) for i in range(plan.world)]
    _check_length(plan, x, dim, rows[rank].numel())
    if x.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            "unshard() gives no gradients: every rank would have that of the whole loss, several times over. Compute the loss on the rows "
            "of each rank and sum it, or call unshard() under torch.no_grad()"
        )
    longest = max(part.numel() for part in rows)
    front = x.movedim(dim, 0)
    padded = torch.cat([front, front.new_zeros((longest - front.shape[0], *front.shape[1:]))]).contiguous()
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded, group=group)
    whole = front.new_empty((plan.q_len, *front.shape[1:]))
    for part, places in zip(parts, rows, strict=True):
        whole[places.to(x.device)] = part[: places.numel()]
    return whole.movedim(0, dim)


def _check_length(plan: Planned, x: Tensor, dim: int, length: int) -> None:
    if not isinstance(x, Tensor):
        raise ArgumentError(f"x must be a tensor of which rows are tokens; got {shown(x)}")
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        raise ArgumentError(f"dim must be the dimension of x along which tokens lie, from 0 to {x.ndim - 1}; got {shown(dim)}")
    if x.shape[dim] != length:
        raise ShapeError(f"dimension {dim} has {x.shape[dim]} rows; wanted {length} of {plan.q_len}: got shape {tuple(x.shape)}")


class Exchange:
    """One rank's part of a plan for the layers of one pattern: give it to calls as ``cp=``. Made by :meth:`TokenPlan.on`, on all ranks at
    once, which compare their plans."""

    def __init__(self, plan: Planned, mesh: Any, name: str, mask_key: str, tables: Mapping[str, str]) -> None:
        self.plan, self.name = plan, name
        self._mask_key, self._tables = mask_key, tables
        self.group = group_of(mesh, plan.world)
        self.rank = dist.get_rank(self.group)
        hashes: list[Any] = [None] * plan.world
        dist.all_gather_object(hashes, plan.hash, group=self.group)
        if len(set(hashes)) > 1:
            others = [rank for rank, one in enumerate(hashes) if one != plan.hash]
            raise UnsupportedError(
                f"ranks have different plans: rank {self.rank} has {plan.hash[:8]}, ranks {others} have others. Make it of the same "
                "arguments and tables everywhere"
            )
        self.rows = plan.rows(self.rank)
        wanted = plan.keys(self.rank, name)
        mine = torch.isin(wanted, self.rows)
        sent = [plan.sent(self.rank, other, name) for other in range(plan.world)]
        got = [plan.sent(other, self.rank, name) for other in range(plan.world)]
        self._own = torch.searchsorted(self.rows, wanted[mine])
        self._send = torch.searchsorted(self.rows, torch.cat(sent))
        self._counts = [part.numel() for part in sent], [part.numel() for part in got]
        # Rows as they come, own ones first, in the order of their positions.
        self._order = torch.cat([wanted[mine], *got]).argsort()
        self.key_positions = wanted

    def check(self, pattern: Pattern, tables: Mapping[str, Any]) -> None:
        """Whether a call is of what was planned.

        Raises:
            UnsupportedError: its mask or its tables are others, so that keys might be missing.
        """
        if pattern.mask.key != self._mask_key:
            raise UnsupportedError(
                f"the plan is for another mask than {pattern.mask}: its queries would miss keys. Name the pattern, plan.on(mesh, name), or "
                "make a plan for it"
            )
        given = {**pattern.bound, **tables}
        found = digests({name: given[name] for name in self._tables if name in given})
        wrong = sorted(name for name, digest in self._tables.items() if found.get(name) != digest)
        if wrong:
            raise UnsupportedError(
                f"the plan was made of another table {wrong[0]!r}: its queries would miss keys. Make a plan of the tables of this call"
            )

    def gathered(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Standing]:
        """The keys and values that this rank's queries see, of local ones ``(B, Hkv, S, D)``, and where all rows stand.

        Raises:
            ShapeError: q, k and v are not the rows of this rank.
        """
        local = self.rows.numel()
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.ndim != 4 or x.shape[2] != local:
                raise ShapeError(
                    f"{name} must hold the {local} rows of rank {self.rank}, plan.shard(x, 2, mesh); got {tuple(x.shape)}"
                )
        width = k.shape[3]
        both = torch.cat([k, v], dim=3).permute(2, 0, 1, 3)
        device = k.device
        received = _Sent.apply(both, self._send.to(device), self._counts, self.group)
        rows = torch.cat([both.index_select(0, self._own.to(device)), received]).index_select(0, self._order.to(device))
        keys = rows.permute(1, 2, 0, 3)
        where = Standing(self.rows.to(device), self.key_positions.to(device), lengths=(self.plan.q_len, self.plan.q_len))
        return keys[..., :width], keys[..., width:], where

    def __repr__(self) -> str:
        sent, got = map(sum, self._counts)
        return f"<Exchange {self.name!r} rank {self.rank} of {self.plan.world}: sends {sent} keys, gets {got}>"


class _Sent(torch.autograd.Function):
    """Rows that other ranks see, sent; backward, their gradients, summed in float32 at least where several ranks see a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, counts: tuple[list[int], list[int]], group: Any) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.counts, ctx.group, ctx.shape, ctx.dtype = counts, group, x.shape, x.dtype
        return _all_to_all(x.index_select(0, rows), counts[0], counts[1], group)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (rows,) = ctx.saved_tensors
        wide = accumulated(ctx.dtype)
        back = _all_to_all(grads[0].to(wide), ctx.counts[1], ctx.counts[0], ctx.group)
        total = back.new_zeros(ctx.shape).index_add_(0, rows, back)
        return total.to(ctx.dtype), None, None, None


def _all_to_all(x: Tensor, sent: Sequence[int], got: Sequence[int], group: Any) -> Tensor:
    found = x.new_empty((sum(got), *x.shape[1:]))
    dist.all_to_all_single(found, x.contiguous(), list(got), list(sent), group=group)
    return found
