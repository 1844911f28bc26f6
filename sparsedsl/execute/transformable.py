"""Gradients of registered operators under ``torch.func.grad`` and its kin, which ``torch.library.register_autograd`` does not give.

Outside of our own tracing a lowering is made differentiable by :mod:`runtime.autograd`; this is for ``torch.func.grad`` inside
``torch.compile``, where the graph holds the operator.
"""

from __future__ import annotations

import warnings
from typing import Any, NoReturn

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.autograd import make_autograd_impl
from torch._library.utils import fill_defaults
from torch.autograd.function import _SingleLevelFunction

from sparsedsl.runtime.autograd import no_forward_mode

__all__ = ["make_transformable"]

_library = torch.library.Library("sparsedsl", "FRAGMENT")


class _Level(_SingleLevelFunction):
    """One level of ``torch.func.grad``: torch has unwrapped the tensors for it and takes the operator to the levels below."""

    @staticmethod
    def forward(ctx: Any, definition: Any, keys: Any, structure: Any, *leaves: Any) -> Any:
        inputs = torch.utils._pytree.tree_unflatten(list(leaves), structure)
        # torch turned gradients off for this level; those below decide for themselves.
        with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
            output = definition._opoverload.redispatch(keys & torch._C._after_autograd_keyset, *inputs)
        if definition._setup_context_fn is not None:
            definition._setup_context_fn(ctx=ctx, inputs=tuple(inputs), output=output)
        ctx.definition, ctx.structure = definition, structure
        return tuple(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        all_needs = ctx.needs_input_grad
        ctx.needs_input_grad = torch.utils._pytree.tree_unflatten(list(all_needs[3:]), ctx.structure)
        try:
            found = ctx.definition._backward_fn(ctx, *grads)
        finally:
            ctx.needs_input_grad = all_needs
        return None, None, None, *(g for item in found for g in (item if isinstance(item, list) else [item]))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        no_forward_mode()


def make_transformable(definition: Any) -> None:
    """Let a ``torch.library.custom_op`` whose autograd is registered be differentiated by ``torch.func`` as well."""
    plain = make_autograd_impl(definition._opoverload, definition)
    schema = definition._opoverload._schema
    gives_list = not isinstance(schema.returns[0].type, torch.TensorType)

    def differentiate(keys: Any, *args: Any, **keywords: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return plain(keys, *args, **keywords)
        inputs, _ = fill_defaults(schema, args, keywords)
        leaves, structure = torch.utils._pytree.tree_flatten(list(inputs))
        with enable_single_level_autograd_function():
            results = _Level.apply(definition, keys, structure, *leaves)  # type: ignore[attr-defined]
        return list(results) if gives_list else results

    with warnings.catch_warnings():  # the kernel that is replaced is the one that torch has made
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        _library.impl(definition._name, differentiate, "Autograd", with_keyset=True, allow_override=True)
