"""Requests while ``torch.compile`` or ``torch.export`` makes a graph of a model: noted in the stack, found by the mask they came with.

A graph cannot hold a mask with a request beside it, nor can its maker open transformers' mask functions or look at what padding says. So
here every layer sees transformers' own mask, and a layer with a pattern finds its request by asking whose mask it got: another one than
transformers made for this stack and forward is refused, as without a graph. What the mask says is taken from the other arguments of the
mask function; where these leave something open the call is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sparsedsl.errors import UnsupportedError
from sparsedsl.models.carried import Stack
from sparsedsl.models.native import Facts

__all__ = ["TracedRequest", "note_traced", "traced_request"]


class TracedRequest(NamedTuple):
    """What a graph knows of a :class:`~sparsedsl.models.mask_arguments.MaskRequest`, which the operator makes of it when the graph runs.

    ``padding``: the attention mask that was given. ``positions``: position_ids that may start again, of a batch that may be packed.
    """

    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    padding: torch.Tensor | None
    positions: torch.Tensor | None
    facts: Facts
    overlays: tuple[str, ...] = ()


def note_traced(native: Callable[..., Any], stacks: tuple[Stack, ...], arguments: dict[str, Any]) -> Any:
    """transformers' own mask, whose request is noted in the stack whose forward is running."""
    inside = [stack for stack in stacks if stack.inside]
    if not inside:  # of layers without patterns, as a native decoder behind an encoder; a layer with one that gets it refuses
        return native(**arguments)
    if len(inside) > 1:
        raise UnsupportedError(
            "a mask is made within the forwards of two stacks of layers with patterns, and a graph does not show whose it is; compile or "
            "export each stack by itself, or restore() one of them"
        )
    stack = inside[0]
    if isinstance(arguments["q_offset"], torch.Tensor):
        raise UnsupportedError(
            "a static cache under torch.compile keeps its offset in a tensor, which block lists cannot follow; use the default (dynamic) "
            "cache, or do not compile the model"
        )
    both_ways = "allow_is_bidirectional_skip" in arguments
    may_skip = both_ways or arguments["allow_is_causal_skip"] or arguments["q_length"] == 1
    if arguments["use_vmap"] or (not may_skip and (arguments["attention_mask"] is not None or stack.may_have_blocks)):
        raise UnsupportedError(
            "the model combines its mask with another one (of images, say), which a graph does not show and the pattern would drop. Call "
            "the model without torch.compile or torch.export, or leave its layers native (restore())"
        )
    mask = native(**arguments)
    request = TracedRequest(
        arguments["q_length"],
        arguments["kv_length"],
        arguments["q_offset"],
        arguments["kv_offset"],
        arguments["attention_mask"],
        None if may_skip or stack.positions is None else stack.positions.expand(arguments["batch_size"], -1),
        _facts(arguments, both_ways),
    )
    stack.traced = (*stack.traced, (mask, request))
    return mask


def traced_request(stack: Stack, mask: Any, facts: Facts) -> TracedRequest | None:
    """The request whose mask a layer got; where it got none, one that says ``facts`` if there is one."""
    found = None
    for made, request in stack.traced:
        if made is None and mask is None:
            found = request if found is None or request.facts == facts else found
        elif made is not None and mask is not None and made is mask:
            return request
    return found


def _facts(arguments: dict[str, Any], both_ways: bool) -> Facts:
    size, config = arguments.get("local_size"), arguments["config"]
    if both_ways:
        return frozenset({("bidirectional", None), ("distance", size)}) if size else frozenset({("bidirectional", None)})
    if not size:
        return frozenset({("causal", None)})
    kind = "window" if size == getattr(config, "sliding_window", None) else "chunk"
    return frozenset({("causal", None), (kind, size)})
