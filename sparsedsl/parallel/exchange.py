"""Calls on ranks: keys to those whose queries see them, and their gradients back, in one all-to-all each way, of what a plan says and no
more. Every row of queries stays whole on its rank, so that results are those of one process.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sparsedsl.errors import ArgumentError, ShapeError, UnsupportedError
from sparsedsl.execute.call_words import CallWords
from sparsedsl.execute.calls import Calls
from sparsedsl.lang.advice import shown
from sparsedsl.lang.tables import by_kept_name
from sparsedsl.parallel.choosing import ChoosingCalls
from sparsedsl.parallel.fingerprints import digests
from sparsedsl.parallel.holding import Held
from sparsedsl.parallel.sending import Route, begun, sent, tied
from sparsedsl.program.branches import as_branch
from sparsedsl.program.graph import Program
from sparsedsl.runtime.arguments import arranged
from sparsedsl.runtime.merging import merge
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
    once, which compare their plans.

    rank: this one. rows: positions of the tokens that it holds. key_positions: of the keys that its queries see, of programs those that
    they see whatever is chosen. last_keys: of the keys that the last call had, chosen ones included.
    """

    def __init__(
        self, plan: Planned, mesh: Any, name: str, mask_key: str, tables: Mapping[str, str], overlap: bool = False
    ) -> None:  # fmt: skip
        self.plan, self.name, self.overlap = plan, name, overlap
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
        self.key_positions = self.last_keys = wanted = plan.keys(self.rank, name)
        mine = torch.isin(wanted, self.rows)
        to_each = [plan.sent(self.rank, other, name) for other in range(plan.world)]
        from_each = [plan.sent(other, self.rank, name) for other in range(plan.world)]
        self._counts = [part.numel() for part in to_each], [part.numel() for part in from_each]
        # Rows as they come, own ones first, to where their positions are in order.
        places = torch.searchsorted(wanted, torch.cat([wanted[mine], *from_each]))
        rows, own = torch.searchsorted(self.rows, torch.cat(to_each)), torch.searchsorted(self.rows, wanted[mine])
        self._route = Route(rows, self._counts, own, places, self.group)
        self._held = Held([plan.rows(rank) for rank in range(plan.world)], self.rank, self.group)
        self._choosing: weakref.WeakKeyDictionary[Calls, ChoosingCalls] = weakref.WeakKeyDictionary()
        self._positions = wanted[mine], torch.cat(from_each).sort()
        self._sinkless: weakref.WeakKeyDictionary[Calls, Calls] = weakref.WeakKeyDictionary()

    def attend(self, calls: Calls, q: Tensor, k: Tensor, v: Tensor, words: CallWords) -> Any:
        """The call on this rank's rows ``(B, H, S, D)``, with keys of others; see :meth:`sparsedsl.Attention.__call__`.

        Raises:
            UnsupportedError: it is not of what was planned. ShapeError: q, k and v are not the rows of this rank.
        """
        self.check(calls.program, by_kept_name(words.named, calls.table_names))
        q, k, v, _ = arranged(q, k, v, None)
        local = self.rows.numel()
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.ndim != 4 or x.shape[2] != local:
                raise ShapeError(
                    f"{name} must hold the {local} rows of rank {self.rank}, plan.shard(x, 2, mesh); got {tuple(x.shape)}"
                )
        # Of heads and batch entries the call itself says where they stand.
        rows = self.rows.to(k.device)
        where = replace(words.where or Standing(), queries=rows, lengths=(self.plan.q_len, self.plan.q_len))
        words = words._replace(where=where)
        if calls.static is None:
            if calls not in self._choosing:
                self._choosing[calls] = ChoosingCalls(calls.program, self._held, self.key_positions)
            part = self._choosing[calls]
            result = part.attend(calls, q, k, v, words)
            self.last_keys = part.last_keys
            return result
        width, both = k.shape[3], torch.cat([k, v], dim=3).permute(2, 0, 1, 3)

        def seen(calls: Calls, rows: Tensor, positions: Tensor, words: CallWords) -> Any:
            keys, at = rows.permute(1, 2, 0, 3), replace(where, keys=positions.to(k.device))
            return calls(q, keys[..., :width], keys[..., width:], words._replace(where=at))

        if self.overlap:
            return self._in_two_parts(calls, both, seen, words)
        rows = sent(both, self._route)
        found = seen(calls, rows, self.key_positions, words)
        return found if rows.shape[0] else _tied(found, rows)

    def _in_two_parts(self, calls: Calls, both: Tensor, seen: Callable[..., Any], words: CallWords) -> Any:
        """Own keys while those of others are on their way, then these; one softmax over both."""
        if not calls.has_lse:
            raise UnsupportedError(
                f"overlap=True merges two parts of the keys by their LSE, and {calls.program!r} has none: plan.on(mesh, name) without it"
            )
        arriving = begun(both, self._route)
        own, (others, order) = self._positions
        words, wanted, parts = words._replace(return_lse=True), words.return_lse, []
        if own.numel():
            parts.append(seen(calls, both.index_select(0, self._route.own.to(both.device)), own, words))
        rows = arriving.wait()
        if others.numel() or not parts:
            # A sink is one logit of the whole: it goes with the first part.
            rest = self._without_sink(calls) if parts else calls
            parts.append(seen(rest, rows.index_select(0, order.to(rows.device)), others, words))
        out, lse = merge(*parts)
        found = (out, lse) if wanted else out
        return found if others.numel() else _tied(found, rows)

    def _without_sink(self, calls: Calls) -> Calls:
        pattern = calls.program.static
        if pattern is None or pattern.sink is None:
            return calls
        if calls not in self._sinkless:
            self._sinkless[calls] = Calls(Program(as_branch("cp=", replace(pattern, sink=None))), calls.backend, calls.allow)
        return self._sinkless[calls]

    def check(self, program: Program, tables: Mapping[str, Any]) -> None:
        """Whether a call is of what was planned.

        Raises:
            UnsupportedError: its mask, or its program, or its tables are others, so that keys might be missing.
        """
        static = program.static
        if (program.key if static is None else static.mask.key) != self._mask_key:
            raise UnsupportedError(
                f"the plan is for another mask or program than {program if static is None else static.mask}: its queries would miss keys. "
                "Name the pattern, plan.on(mesh, name), or make a plan for it"
            )
        given = {**program.bound, **tables}
        found = digests({name: given[name] for name in self._tables if name in given})
        wrong = sorted(name for name, digest in self._tables.items() if found.get(name) != digest)
        if wrong:
            raise UnsupportedError(
                f"the plan was made of another table {wrong[0]!r}: its queries would miss keys. Make a plan of the tables of this call"
            )

    def __repr__(self) -> str:
        sent, got = map(sum, self._counts)
        return f"<Exchange {self.name!r} rank {self.rank} of {self.plan.world}: sends {sent} keys, gets {got}>"


def _tied(found: Any, rows: Tensor) -> Any:
    return (tied(found[0], rows), *found[1:]) if isinstance(found, tuple) else tied(found, rows)
