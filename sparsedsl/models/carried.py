"""How a request reaches the layers with a pattern, while all else in the model sees transformers' own mask.

transformers makes a mask once per forward and layer type, and models do with it what they like: slice it for layers that share keys, join
it with a mask of their own, ask whether it is None. So the mask of a patched model is the native one, to the last bit, with the request
beside it; only where no native layer can want it, it is a tensor of the mask's shape without storage. Any operation on that makes the
native mask first. Of what is made of a mask, copies and slices of its queries still carry the request, and nothing else does: layers with
a pattern refuse such a mask.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.errors import UnsupportedError
from sparsedsl.models.native import Facts
from sparsedsl.torch_private import untorched

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "Patched",
    "Stack",
    "between_graphs",
    "calling",
    "carrying",
    "put_stacks",
    "request_of",
    "stacks_of",
    "take_stack",
    "without_data",
]

_REQUEST = "_sparsedsl_request"


def calling(config: PreTrainedConfig, name: str) -> Any:
    """The same configuration, attributes shared, for the modules that are to call the attention function ``name``."""
    kind: Any = type(config)
    view = object.__new__(_view_of(kind, name))
    object.__setattr__(view, "__dict__", vars(config))
    object.__setattr__(view, "viewed", config)
    return view


@functools.cache
def _view_of(kind: Any, name: str) -> Any:
    # A slot is no part of the attributes that view and configuration share; pickles and copies of the view are views again.
    changes = {"__slots__": ("viewed",), "_attn_implementation": property(lambda self: name)}
    return type(kind.__name__, (kind,), changes | {"__reduce__": lambda self: (calling, (self.viewed, name))})


@dataclass(eq=False)
class Stack:
    """One patched stack of layers, as its masks and its bound layers know it.

    ``owners``: index of each attention layer -> that of the layer whose keys it reads. ``native``: what the masks of its native layers say;
    None where the configuration does not tell. ``inside``: how many forwards around it are running. ``seen``: tokens that its cache
    holds, where transformers asks a layer without keys for that. ``omitted``: keys announced and facts -> the last request without a
    mask. ``step``: of continuous batching, the ``continuous.PagedStep`` that is running. ``notes``: what a saved configuration says of
    its patterns. While a graph is made, see ``traced``: ``traced``, this forward's masks and requests; ``positions``, the position_ids
    that it was given; ``may_have_blocks``, whether the model may join blocks to a mask. ``converts``: its layers are converted ones, which
    run between graphs; ``between_graphs``: so does all that these stacks and those beside them do.
    """

    owners: dict[int, int]
    native: frozenset[Facts] | None
    inside: int = 0
    seen: int | None = None
    omitted: OrderedDict[tuple[int, Facts | None], Any] = field(default_factory=OrderedDict)
    notes: list[dict[str, Any]] = field(default_factory=list)
    traced: tuple[Any, ...] = ()
    positions: torch.Tensor | None = None
    may_have_blocks: bool = False
    converts: bool = False
    between_graphs: bool = False
    step: Any = None

    def asks_for(self, facts: Facts | None) -> bool:
        """Whether a native layer may read a mask that says this."""
        return self.native is None or (bool(self.native) and (facts is None or facts in self.native))

    def omit(self, request: Any) -> None:
        """Remember a request for which there is no mask; a layer checkpointed in training asks again after the forward."""
        key = request.kv_length, request.facts
        self.omitted[key] = request
        self.omitted.move_to_end(key)
        if len(self.omitted) > 64:
            self.omitted.popitem(last=False)

    def omitted_request(self, rows: int, keys: int, facts: Facts | None) -> Any:
        """The request behind a missing mask, for a layer with so many queries and keys; None if there was none.

        transformers omits masks of whole prompts and of single queries that see every key: the lengths say the offset. Such requests differ
        in what the masks would have said; the one that says ``facts`` is taken, if there is one.
        """
        others = [request for (length, _), request in self.omitted.items() if length == keys]
        request = self.omitted.get((keys, facts), others[-1] if others else None)
        if request is None or rows == request.q_length:
            return request
        return request.part(request.q_length - 1, request.q_length, keys) if rows == 1 else None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "inside": 0, "omitted": OrderedDict(), "traced": (), "positions": None, "step": None}


class Patched(str):
    """The name of the implementation that a model had before, in the configuration of a patched one: equal to it for all who read it."""

    stacks: tuple[Stack, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        # Whisper's forward makes a cache by a copy of its configuration, and no graph follows what a stack is.
        if torch.compiler.is_compiling():
            return str(self)
        made = memo[id(self)] = Patched(self)
        made.stacks = copy.deepcopy(self.stacks, memo)
        return made


def between_graphs(function: Any) -> Any:
    """``function``, run as it is where ``torch.compile`` makes graphs of what is around it: of models with converted layers, whose calls
    depend on padding and on what a cache holds."""
    return torch.compiler.disable(
        function, reason="layers that sd.models.convert has put in run between graphs: leave fullgraph out"
    )


def stacks_of(config: PreTrainedConfig) -> tuple[Stack, ...]:
    """The patched stacks of layers that run by this configuration."""
    name = config._attn_implementation
    return name.stacks if isinstance(name, Patched) else ()


def put_stacks(config: PreTrainedConfig, name: str, stacks: tuple[Stack, ...]) -> None:
    """Note in the configuration which patched stacks of layers run by it."""
    patched = Patched(name)
    patched.stacks = stacks
    for stack in stacks:
        stack.between_graphs = any(one.converts for one in stacks)
    config._attn_implementation_internal = patched if stacks else str(name)


def take_stack(config: PreTrainedConfig, stack: Stack) -> tuple[Stack, ...]:
    """Note that a stack of layers is no longer patched; those that are left. (Others may share the configuration, or its name was set
    anew.)"""
    left = tuple(one for one in stacks_of(config) if one is not stack)
    if left != stacks_of(config):
        put_stacks(config, config._attn_implementation, left)
    return left


def carrying(request: Any, mask: Any) -> Any:
    """``mask``, a tensor or a BlockMask, with the request."""
    if isinstance(mask, torch.Tensor):
        return _mark(mask, request, has_data=True)
    setattr(mask, _REQUEST, request)
    return mask


def without_data(request: Any, batch: int, dtype: torch.dtype, device: Any) -> torch.Tensor:
    """A tensor of the mask's shape that holds nothing but the request."""
    shaped = torch.zeros((), dtype=dtype, device=device).expand(batch, 1, request.q_length, request.kv_length)
    return _mark(shaped, request, has_data=False)


def request_of(mask: Any) -> Any:
    """The request that a mask carries, or None."""
    return getattr(mask, _REQUEST, None)


def _mark(tensor: torch.Tensor, request: Any, has_data: bool) -> torch.Tensor:
    carrier: Any = tensor.as_subclass(_Carrier)
    setattr(carrier, _REQUEST, request)
    carrier.has_data = has_data
    return carrier


class _Carrier(torch.Tensor):
    """A mask with a request beside it; ``has_data`` says whether it is more than its shape."""

    has_data: bool

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with untorched():
            if _reads_no_values(function, args):
                return function(*args, **kwargs)
            if args and isinstance(args[0], _Carrier):
                mask, request = args[0], request_of(args[0])
                if _changes_in_place(function, kwargs):
                    if not mask.has_data:
                        raise _no_mask_for(function)
                    setattr(mask, _REQUEST, None)
                    return function(*args, **kwargs)
                if request is not None and function in _COPIES:
                    made = function(*args, **kwargs)
                    if made.dtype == mask.dtype or (made.is_floating_point() and mask.is_floating_point()):
                        return _mark(made, request, mask.has_data)
                if request is not None and function is torch.Tensor.__getitem__:
                    part = _part(args[1], *mask.shape[2:])
                    if part is not None:
                        return _mark(function(*args), request.part(*part), mask.has_data)
            return function(*_with_native(args, function), **_with_native(kwargs, function))


def _reads_no_values(function: Any, args: Any) -> bool:
    """Whether an operation asks for shape, type or place only. (torch.compile asks for many.)"""
    name = function.__name__
    if name == "__get__":
        return function == _BASE or not isinstance(function(*args), torch.Tensor)
    return name in _LOOKS or (name.lstrip("_").startswith("is_") and name != "is_nonzero")


def _changes_in_place(function: Any, kwargs: dict[str, Any]) -> bool:
    name = function.__name__
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE or "out" in kwargs


def _part(key: Any, rows: int, keys: int) -> tuple[int, int, int] | None:
    """First row, end of rows and number of keys that an index takes; None where it takes something else."""
    key = key if isinstance(key, tuple) else (key,)
    if any(part is ... for part in key):
        at = [part is ... for part in key].index(True)
        key = (*key[:at], *[slice(None)] * (5 - len(key)), *key[at + 1 :])
    key = (*key, *[slice(None)] * (4 - len(key)))
    if len(key) != 4 or not all(isinstance(part, slice) and part.step in (None, 1) for part in key):
        return None
    first, end, _ = key[2].indices(rows)
    start, stop, _ = key[3].indices(keys)
    whole = key[0] == key[1] == slice(None)
    return (first, end, stop) if whole and start == 0 and first < end and stop > 0 else None


def _with_native(value: Any, function: Any) -> Any:
    """The arguments of an operation with masks that transformers would have made in place of those without data."""
    if isinstance(value, _Carrier):
        if value.has_data:
            return value
        native = request_of(value).native_mask()
        if not isinstance(native, torch.Tensor):
            raise _no_mask_for(function)
        return native
    if isinstance(value, dict):
        return {name: _with_native(part, function) for name, part in value.items()}
    return type(value)(_with_native(part, function) for part in value) if type(value) in (tuple, list) else value


def _no_mask_for(function: Any) -> UnsupportedError:
    return UnsupportedError(
        f"the model computes {function.__name__}() with its attention mask, where transformers itself would have made no mask, or one that "
        "is no tensor; what the layers would see then is not known. Leave one layer of each type native (a mapping without it), or call "
        "sd.compile(pattern) in a forward of your own"
    )


_IN_PLACE = {
    "__setitem__",
    "__set__",
    *(name for name in dir(operator) if name.startswith("__i") and hasattr(operator, f"__{name[3:]}")),
}
_LOOKS = {
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "element_size",
    "stride",
    "storage_offset",
    "untyped_storage",
    "get_device",
}
_LOOKS |= {"__len__", "__hash__", "dense_dim", "sparse_dim"}
_PLAIN: Any = torch.Tensor
_BASE = _PLAIN._base.__get__  # (torch.compile asks whose view a mask is)
_COPIES = {
    torch.Tensor.clone,
    torch.clone,
    torch.Tensor.contiguous,
    torch.Tensor.detach,
    torch.detach,
    torch.Tensor.to,
    torch.Tensor.cuda,
    torch.Tensor.cpu,
}
