"""Calls on DTensors: each device runs the shard that it holds, told where its batch entries and heads stand.

Nothing is sent for shards of the batch and of the heads: no row looks at another entry or head. Shards of the rows would need keys of
other devices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.execute.call_words import CallWords
from sparsedsl.program.graph import Program
from sparsedsl.runtime.standing import Standing

__all__ = ["are_sharded", "sharded_call"]

Tensor = torch.Tensor
HEAD_AXES = ("heads", "kv_heads", "value_heads")


def are_sharded(*tensors: Any) -> bool:
    """Whether any of these is a DTensor."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and any([isinstance(t, module.DTensor) for t in tensors])


@dataclass(frozen=True)
class _Shard:
    """What a device holds of a call. ``kinds``: of each dimension of the mesh what it cuts, batch, heads or nothing; ``entries`` and
    ``heads``: the first one and how many; ``shared``: dimensions of the mesh whose devices all read the same keys."""

    mesh: Any
    kinds: tuple[str, ...]
    entries: tuple[int, int]
    heads: tuple[int, int]
    shared: tuple[int, ...]


def sharded_call(program: Program, run: Callable[..., Any], q: Any, k: Any, v: Any, words: CallWords) -> Any:
    """``run(q, k, v, words)`` on this device's shards, its results as DTensors again. Gradients of keys that several devices
    read are summed by DTensor; those of tables that are plain tensors are this device's part.

    Raises:
        UnsupportedError: tensors are cut so that a device would need what others hold. ShapeError: heads are said twice.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    shard, where = _shard(q, k, v), words.where
    if where is not None and where.first_head is not None:
        raise ShapeError("head_offset is known of DTensors: leave it out, or pass local tensors with it")
    own = where or Standing()
    if "batch" in shard.kinds and program.reads_batch:
        own = replace(own, entry=shard.entries[0])
    if "heads" in shard.kinds:
        own = replace(own, first_head=shard.heads[0], heads=own.heads or q.shape[1])
    own = replace(own, queries=_positions(own.queries, shard), keys=_positions(own.keys, shard))
    partial = [Partial() if i in shard.shared else placement for i, placement in enumerate(k.placements)]
    local = q.to_local(), k.to_local(grad_placements=partial), v.to_local(grad_placements=partial)
    inside: dict[str, Any] = {}
    for name, value in words.named.items():
        node = program.inputs.get(name)
        if value is None:
            inside[name] = value
        elif node is not None:
            inside[name] = _input(name, node.axes, value, shard)
        elif isinstance(value, DTensor):
            cut = [Partial() if kind else Replicate() for kind in shard.kinds]
            inside[name] = value.redistribute(placements=[Replicate()] * len(cut)).to_local(grad_placements=cut)
        else:
            inside[name] = value
    found = run(*local, words._replace(named=inside, where=None if _says_nothing(own) else own))
    results = found if isinstance(found, tuple) else (found,)
    whole = tuple(DTensor.from_local(x, shard.mesh, q.placements, run_check=False) for x in results)
    return whole if isinstance(found, tuple) else whole[0]


def _says_nothing(where: Standing) -> bool:
    words = where.queries, where.keys, where.first_head, where.heads, where.lengths
    return all(word is None for word in words) and not where.entry


def _shard(q: Any, k: Any, v: Any) -> _Shard:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not all(isinstance(t, DTensor) for t in (q, k, v)) or not q.device_mesh == k.device_mesh == v.device_mesh:
        raise UnsupportedError(
            "q, k and v must be DTensors on one mesh, or plain tensors all three; got "
            + ", ".join(
                f"{name} {'a DTensor' if isinstance(t, DTensor) else 'plain'}" for name, t in (("q", q), ("k", k), ("v", v))
            )
        )
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ShapeError(f"q, k and v must have 4 dimensions; got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    mesh, coordinate = q.device_mesh, q.device_mesh.get_coordinate()
    sizes, starts = [q.shape[0], q.shape[1]], [0, 0]
    kinds, shared, kv_heads = [], [], k.shape[1]
    for i, placements in enumerate(zip(q.placements, k.placements, v.placements, strict=True)):
        of_q, of_k, of_v = placements
        alone = of_k == of_v == Replicate()
        if any(type(p) is Shard and p.dim == 2 for p in placements):
            raise UnsupportedError(
                f"the rows of {_named(placements)} are cut along dimension {i} of the mesh: a row may see keys that other devices hold. "
                "Plan where the tokens go, sd.parallel.plan(...), and pass the local rows with cp=plan.on(mesh); or gather the rows, "
                "q.full_tensor() and so on"
            )
        if all(p == Replicate() for p in placements):
            kinds.append("")
            continue
        dim = of_q.dim if type(of_q) is Shard and of_q.dim in (0, 1) else None
        fits = dim is not None and (of_k == of_v == of_q or (alone and k.shape[dim] == v.shape[dim] == 1))
        if dim is None or not fits:
            raise UnsupportedError(
                f"q, k and v are placed as {_named(placements)} along dimension {i} of the mesh; wanted Shard(0), the batch, or Shard(1), "
                "the heads, of all three, or Replicate(). q.redistribute(mesh, ...) brings them there"
            )
        parts = mesh.size(i)
        if sizes[dim] % parts or (dim == 1 and not alone and kv_heads % parts):
            raise UnsupportedError(
                f"{'heads' if dim else 'batch entries'} must be cut into equal parts, of queries and of keys; got {sizes[dim]} and "
                f"{kv_heads if dim else sizes[dim]} on {parts} devices"
            )
        sizes[dim] //= parts
        starts[dim] += coordinate[i] * sizes[dim]
        kv_heads = kv_heads // parts if dim == 1 and not alone else kv_heads
        kinds.append("heads" if dim else "batch")
        shared += [i] if alone else []
    return _Shard(mesh, tuple(kinds), (starts[0], sizes[0]), (starts[1], sizes[1]), tuple(shared))


def _named(placements: tuple[Any, ...]) -> str:
    return ", ".join(f"{name} {placement}" for name, placement in zip("qkv", placements, strict=True))


def _positions(positions: Any, shard: _Shard) -> Any:
    if positions is None:
        return None
    positions = positions.full_tensor() if are_sharded(positions) else positions
    return positions.narrow(0, *shard.entries) if positions.ndim == 2 and positions.shape[0] > 1 else positions


def _input(name: str, axes: tuple[str, ...], value: Any, shard: _Shard) -> Any:
    """This device's part of an input of a program."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    cuts: list[int | None] = []
    for kind in shard.kinds:
        found = [i for i, axis in enumerate(axes) if (axis == "batch" if kind == "batch" else kind and axis in HEAD_AXES)]
        cuts.append(found[0] if found and value.ndim == len(axes) and value.shape[found[0]] > 1 else None)
    if not are_sharded(value):
        wanted = [kind for kind, cut in zip(shard.kinds, cuts, strict=True) if cut is not None]
        if wanted:
            raise UnsupportedError(
                f"input {name!r} is a plain tensor, and q, k, v are DTensors cut along the {' and the '.join(wanted)}: distribute it, too, "
                "distribute_tensor(x, mesh, placements)"
            )
        return value
    placements = [Replicate() if cut is None else Shard(cut) for cut in cuts]
    grads = [Partial() if kind and cut is None else p for kind, cut, p in zip(shard.kinds, cuts, placements, strict=True)]
    return value.redistribute(placements=placements).to_local(grad_placements=grads)
