"""Masks in vLLM's own FlexAttention back end: the two attributes of a layer that it reads, without a back end of ours.

Input: a mask of positions. Output: :class:`FlexHooks`, a function of logical positions and one of tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sparsedsl.analysis.key_intervals import KeyInterval
from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.errors import PatternError, UnsupportedError
from sparsedsl.execute.compiling import compile
from sparsedsl.lang.expressions import Mask, kv_idx, q_idx
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.lang.steps import evaluate
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.lang.tables import table_reads
from sparsedsl.program.graph import Program
from sparsedsl.serve.layer_patterns import Registered

__all__ = ["FlexHooks", "attach_flex"]

Tensor = torch.Tensor
# Intervals that are worked out for each query; tiles of a mask of more are those of its past.
MOST_INTERVALS = 32
# No position is as large.
FAR = 1 << 40


class BlockHint(NamedTuple):
    """As vLLM's ``BlockSparsityHint``: ``hint_fn(q_block (T, 1), kv_block (1, N), size)`` is where a pair of the tile may be allowed."""

    hint_fn: Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class FlexHooks:
    """What a layer of vLLM's FlexAttention back end reads. vLLM compares these objects by identity: make them once.

    ``logical_mask_mod(b, h, q, kv)``: of positions in a request, in the place of the causal mask. ``block_sparsity_hint.hint_fn(q_block,
    kv_block, size)``: numbers of blocks ``(T, 1)`` and ``(1, N)`` of so many positions -> bool ``(T, N)``, true wherever a pair of the tile
    is allowed.

    >>> import types, torch, sparsedsl as sd
    >>> hooks = sd.serve.vllm.attach_flex({"layers.0.attn": types.SimpleNamespace()}, sd.patterns.causal())["layers.0.attn"]
    >>> hooks.logical_mask_mod(None, None, torch.tensor(3), torch.arange(6))
    tensor([ True,  True,  True,  True, False, False])
    """

    logical_mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    block_sparsity_hint: BlockHint


def attach_flex(
    layers: Mapping[str, Any], patterns: Any | Mapping[str | int, Any] | Callable[[str], Any], *, device: Any = None
) -> dict[str, FlexHooks]:
    """Let layers of a model that runs vLLM's FlexAttention back end (``--attention-backend FLEX_ATTENTION``) have masks.

    Every layer is told something, the causal mask if it is given nothing: vLLM keeps what it read of one layer for those behind it in the
    same step. A window that the model has itself is added by vLLM.

    Args:
        layers: name -> layer, as ``vllm_config.compilation_config.static_forward_context`` has them; of one model, on one device.
        patterns: as :func:`register`.
        device: of the model; tables are moved there. None leaves them where they are.

    Returns:
        Name -> :class:`FlexHooks`, set as ``logical_mask_mod`` and ``block_sparsity_hint`` of each layer.

    Raises:
        UnsupportedError: a program, a score, a sink, a scale or a normaliser, which vLLM's back end has no place for; a mask that reads
            ``h``, whose lists it makes for one head. And all that :func:`register` raises.

    >>> import types, torch, sparsedsl as sd
    >>> layer = types.SimpleNamespace()
    >>> hooks = sd.serve.vllm.attach_flex({"layers.0.attn": layer}, sd.patterns.sliding_window(32))
    >>> at = torch.arange(100)
    >>> layer.logical_mask_mod(None, None, at[99], at).sum()
    tensor(32)
    >>> layer.block_sparsity_hint.hint_fn(torch.tensor([[6]]), torch.arange(8)[None], 16)
    tensor([[False, False, False, False,  True,  True,  True, False]])
    """
    given = Registered(patterns, "auto")
    given.check_names(layers)
    made: dict[Any, FlexHooks] = {}
    found = {}
    for name in layers:
        mask = _mask_of(given.of(name), name)
        key = (attend(mask).key, tuple(sorted((table, id(tensor)) for table, tensor in mask.bound.items())))
        if key not in made:
            made[key] = _hooks(mask, device)
        found[name] = made[key]
    for name, layer in layers.items():
        layer.logical_mask_mod, layer.block_sparsity_hint = found[name].logical_mask_mod, found[name].block_sparsity_hint
    return found


def _mask_of(given: Mask | Pattern | Program | None, name: str) -> Mask:
    if isinstance(given, Program):
        raise UnsupportedError(
            f"layer {name}: a program chooses from q and k, and vLLM's FlexAttention back end takes a mask of positions. Run it by this "
            "library's own back end: sd.serve.vllm.register()"
        )
    pattern = attend(kv_idx <= q_idx) if given is None else attend(given) if isinstance(given, Mask) else given
    says = {"a score": pattern.has_score, "a sink": pattern.sink is not None, "a scale": pattern.scale is not None}
    says["a normaliser"] = not pattern.has_lse
    if lost := [what for what, there in says.items() if there]:
        raise UnsupportedError(
            f"layer {name}: the pattern has {' and '.join(lost)}, which vLLM's FlexAttention back end has no place for. Give its mask "
            "alone, pattern.mask, or run it by this library's own back end: sd.serve.vllm.register()"
        )
    if {HEAD, BATCH} & pattern.mask.expr.free_symbols:
        raise UnsupportedError(
            f"layer {name}: the mask differs by head, and vLLM's FlexAttention back end may make its lists for the first head alone. Run "
            "it by this library's own back end: sd.serve.vllm.register()"
        )
    unbound = sorted(set(pattern.tables) - set(pattern.bound))
    if unbound:
        raise PatternError(
            f"layer {name}: nothing binds the table {unbound[0]}, and vLLM's FlexAttention back end hands none in: "
            f"mask.bind({unbound[0]}=tensor)"
        )
    return pattern.mask


def _hooks(mask: Mask, device: Any) -> FlexHooks:
    if device is not None and mask.bound:
        mask = mask.bind(**{name: tensor.to(device) for name, tensor in mask.bound.items()})
    return FlexHooks(compile(mask).mask_mod(), BlockHint(_hint(mask)))


def _hint(mask: Mask) -> Callable[[Tensor, Tensor, int], Tensor]:
    """By the bounds of each clause that say where its keys begin and end. All else, of tables or remainders, only takes pairs away."""
    outer = [
        KeyInterval(
            tuple(
                bound
                for bound in clause.bounds
                if bound.kv_part != 0 and not any(map(_reads_tables, (bound.q_part, bound.kv_part, bound.low, bound.high)))
            ),
            (),
        )
        for clause in clauses(mask.expr)
    ]
    usable = [] if len(outer) > MOST_INTERVALS else [interval for interval in outer if not interval.searched]
    whole = len(usable) < len(outer)

    def hint(q_block: Tensor, kv_block: Tensor, size: int) -> Tensor:
        at = q_block * size + torch.arange(size, device=q_block.device)
        begin, end = kv_block * size, kv_block * size + size - 1
        seen = (kv_block <= q_block) & whole
        for interval in usable:
            ends = (evaluate(part, {"q_idx": at, "q_len": FAR, "kv_len": FAR}) for part in interval.ends)
            first, last = (torch.as_tensor(part, device=at.device).expand(at.shape) for part in ends)
            some = first <= last
            first = torch.where(some, first, FAR).amin(-1, keepdim=True)
            last = torch.where(some, last, -1).amax(-1, keepdim=True)
            seen = seen | ((first <= end) & (last >= begin))
        return seen & (kv_block <= q_block)

    return hint


def _reads_tables(expr: Any) -> bool:
    return expr is not None and bool(table_reads(expr))
