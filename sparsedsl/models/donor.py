"""An attention module as a hybrid layer sees it: its facts, and its queries, keys and values before and after rotation.

Input: a module of transformers with ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, norms of queries and keys where it has them, and the
rotation of its own file. Nothing is told by the name of a class: :func:`check_projections` has the module's own forward run on the first
tokens that come, and compares what it hands to its attention with what is computed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.pattern import Pattern
from sparsedsl.models.carried import calling

__all__ = ["Donor", "Heads", "check_projections", "donor_of", "project"]

_PROBE = "sparsedsl_probe"
_TOKENS = 3  # as many are compared
_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, eq=False)
class Donor:
    """An attention module that a hybrid layer takes the place of.

    ``layer_idx`` of ``layers``. ``hidden_size``: of what goes in. ``heads``, ``kv_heads``: of queries, and of keys and values;
    ``head_dim``, ``value_dim``: their widths. ``scale``: on dot products. ``sinks``: the sink logits (heads,), or None. ``softcap``: of
    logits, or None. ``native``: its own pattern. ``module``: itself; its parameters stay where they are.

    >>> import sparsedsl as sd
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    >>> def layer(donor):  # what convert() is given may be a function of the donor
    ...     print(donor.heads, donor.head_dim, donor.native)
    ...     return sd.models.MoBA(donor, chunk=4 * donor.head_dim)
    >>> handle = sd.models.convert(LlamaForCausalLM(LlamaConfig(**tiny)), {1: layer})
    2 8 attend(kv_idx <= q_idx)
    """

    layer_idx: int
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    sinks: torch.Tensor | None
    softcap: float | None
    native: Pattern
    module: nn.Module


@dataclass(frozen=True, eq=False)
class Heads:
    """Queries ``(B, heads, T, head_dim)``, keys ``(B, kv_heads, T, head_dim)``, values ``(B, kv_heads, T, value_dim)``. ``rotate``: turns
    other rows of these tokens, ``(B, any number of heads, T, head_dim)``, as the module turns its keys."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    rotate: Callable[[torch.Tensor], torch.Tensor]


def donor_of(module: Any, index: int, layers: int, native: Pattern) -> Donor:
    """The facts of an attention module.

    Raises:
        UnsupportedError: it is built in another way than queries, keys and values from a projection each.
    """
    missing = [name for name in _PARTS if not hasattr(getattr(module, name, None), "weight")]
    missing += [name for name in ("head_dim", "scaling") if not isinstance(getattr(module, name, None), (int, float))]
    if missing or _rotation(module) is None:
        lacks = ", ".join(missing) or "an apply_rotary_pos_emb in its file"
        raise _refusal(module, index, f"it has no {lacks}")
    width = int(module.head_dim)
    sizes = {name: int(getattr(module, name).out_features) for name in _PARTS}
    if sizes["q_proj"] % width or sizes["k_proj"] % width or sizes["v_proj"] % (sizes["k_proj"] // width):
        raise _refusal(module, index, f"its projections {sizes} are not made of heads that are {width} wide")
    kv_heads = sizes["k_proj"] // width
    cap, sinks = getattr(module, "attn_logit_softcapping", None), getattr(module, "sinks", None)
    return Donor(
        layer_idx=index, layers=layers, hidden_size=int(module.q_proj.in_features), heads=sizes["q_proj"] // width, kv_heads=kv_heads,
        head_dim=width, value_dim=sizes["v_proj"] // kv_heads, scale=float(module.scaling), sinks=sinks,
        softcap=None if cap is None else float(cap), native=native, module=module,
    )  # fmt: skip


def project(module: Any, x: torch.Tensor, position_embeddings: Any) -> tuple[Heads, Heads]:
    """Queries, keys and values of hidden states ``(B, T, hidden_size)``: before rotation, and after it."""
    q, k = (_headed(module, word, x) for word in ("q", "k"))
    v = module.v_proj(x)
    v = v.view(*x.shape[:-1], k.shape[1], -1).transpose(1, 2)
    rotate = _rotation(module)
    assert rotate is not None
    cos, sin = position_embeddings
    turned_q, turned_k = rotate(q, k, cos, sin)

    def turned(rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = rotate(rows, rows, cos, sin)[1]
        return found

    return Heads(q, k, v, turned), Heads(turned_q, turned_k, v, turned)


def _headed(module: Any, word: str, x: torch.Tensor) -> torch.Tensor:
    rows, norm = getattr(module, f"{word}_proj")(x), getattr(module, f"{word}_norm", None)
    if norm is not None and norm.weight.numel() != module.head_dim:  # over all heads at once, as OLMo 2 has it
        return norm(rows).view(*x.shape[:-1], -1, module.head_dim).transpose(1, 2)
    rows = rows.view(*x.shape[:-1], -1, module.head_dim)
    return (rows if norm is None else norm(rows)).transpose(1, 2)


def _rotation(module: Any) -> Callable[..., Any] | None:
    """The family's own: what the file of the class has by this name, whose forward is the first to speak of it."""
    for kind in type(module).__mro__:
        forward: Any = vars(kind).get("forward")
        if "apply_rotary_pos_emb" in getattr(forward, "__globals__", {}):
            found: Callable[..., Any] = forward.__globals__["apply_rotary_pos_emb"]
            return found
    return None


# ---- is that what the module does? -----------------------------------------------------------------------------------------------


def check_projections(donor: Donor, forward: Callable[..., Any], x: torch.Tensor, position_embeddings: Any) -> None:
    """Run the module's own ``forward`` on the first tokens of ``x``, without its attention.

    Raises:
        UnsupportedError: it hands other queries, keys or values to its attention than :func:`project` gives, another scale, or does more
            with what comes out than ``o_proj``.
    """
    module: Any = donor.module
    few = x[:1, :_TOKENS].detach()
    try:
        places = tuple(part[:1, :_TOKENS] for part in position_embeddings)
        with torch.no_grad():
            own, words, out = _own_heads(module, forward, few, places)
            _, rope = project(module, few, places)
            ours = module.o_proj(_stand_in(rope.q, rope.v).reshape(*few.shape[:-1], -1))
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise _refusal(module, donor.layer_idx, f"its forward cannot be followed ({type(error).__name__}: {error})") from error
    pairs = {"queries": (own[0], rope.q), "keys": (own[1], rope.k), "values": (own[2], rope.v), "output": (out, ours)}
    for what, (theirs, found) in pairs.items():
        if theirs.shape != found.shape or not _close(theirs, found):
            raise _refusal(module, donor.layer_idx, f"its own forward makes other {what} than its projections and rotation do")
    said = float(words.get("scaling") or 0.0), words.get("softcap"), words.get("s_aux") is not None
    facts = donor.scale, donor.softcap, donor.sinks is not None
    if said != facts or words.get("position_bias") is not None:
        raise _refusal(module, donor.layer_idx, f"it calls its attention with scale, soft cap and sinks {said}, but has {facts}")


def _own_heads(
    module: Any, forward: Callable[..., Any], x: torch.Tensor, places: Any
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any], torch.Tensor]:
    """What the module's forward hands to its attention, and what it makes of :func:`_stand_in`."""
    seen: dict[str, Any] = {}

    def probe(module: Any, q: Any, k: Any, v: Any, mask: Any, **words: Any) -> tuple[torch.Tensor, None]:
        seen.update(words, q=q, k=k, v=v)
        return _stand_in(q, v), None

    config = module.config
    AttentionInterface.register(_PROBE, probe)
    module.config = calling(config, _PROBE)
    try:
        out = forward(module, x, position_embeddings=places, attention_mask=None, past_key_values=None)[0]
    finally:
        module.config = config
        AttentionInterface._global_mapping.pop(_PROBE, None)
    return tuple(seen.pop(word) for word in "qkv"), seen, out


def _stand_in(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """In place of the output of an attention, ``(B, T, heads, value_dim)``: anything that no two heads have alike."""
    return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).cumsum(1).transpose(1, 2).contiguous()


def _close(theirs: torch.Tensor, found: torch.Tensor) -> bool:
    """Whether they are the same but for roundings; what is computed otherwise differs by as much as it holds."""
    size = float(theirs.abs().max())
    return float((theirs - found).abs().max()) <= 32 * torch.finfo(theirs.dtype).eps * max(size, torch.finfo(theirs.dtype).tiny)


def _refusal(module: Any, index: int, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"layer {index} ({type(module).__name__}) cannot become a hybrid layer: {why}. Give it a pattern or program by sd.models.apply, "
        "which needs no more than its attention interface, or leave it out"
    )
