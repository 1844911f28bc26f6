"""Every name of torch that torch does not promise to keep: what it is for, and what happens where it is missing.

All were checked with torch 2.13 (the tests run on it) and are present in 2.11, the oldest that is supported. A name that another torch
lacks costs nothing until it is needed: what is called then raises :class:`~sparsedsl.UnsupportedError`, which says what for and which
torch has it. Where there is a way without the name, the function says so and takes it. No other file of the project uses such names
(``tests/test_torch_private.py``), but for a tensor's count of writes, ``Tensor._version``, which torch's own documentation explains.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsedsl.errors import UnsupportedError

__all__ = [
    "DispatchMode",
    "autocast_anywhere",
    "autograd_again",
    "batch_dim",
    "compile_failure",
    "flash_for_cpu",
    "has_avx2",
    "has_no_values",
    "in_graph_mode",
    "is_batched",
    "is_wrapped",
    "linear",
    "make_transformable",
    "no_modes",
    "no_torch_function",
    "stand_in",
    "tile_sizes_named",
    "transforms_active",
    "tree_leaves",
    "tree_map",
    "untorched",
    "unwrapped",
    "varying_sizes",
]  # fmt: skip

Tensor = torch.Tensor


def _private(path: str, purpose: str) -> Any:
    """What torch calls ``path``; where it has no such thing, a function that refuses to be called and says what it would be for."""
    module, _, name = path.rpartition(".")
    try:
        # An attribute of torch.Tensor or torch._C, or a module of its own.
        holder = {"torch.Tensor": Tensor, "torch._C": torch._C}.get(module) or importlib.import_module(module)
        return getattr(holder, name)
    except (ImportError, AttributeError):

        def refuse(*_: Any, **__: Any) -> Any:
            raise UnsupportedError(
                f"torch {torch.__version__} has no {path}, which {purpose} needs; use a torch from 2.11 to 2.13, which have it"
            )

        return refuse


# ---- nested arguments -------------------------------------------------------------------------------------------------

# Lists, tuples and dictionaries of arguments, one leaf after the other: operations that are traced come with such arguments.
tree_leaves = _private("torch.utils._pytree.tree_leaves", "tracing")
tree_map = _private("torch.utils._pytree.tree_map", "tracing")

# ---- tensors that are not tensors -------------------------------------------------------------------------------------

# Proxies of tracing: a tensor of a shape and type without memory ..
stand_in = _private("torch.Tensor._make_wrapper_subclass", "tracing")
# .. whose operations reach ``__torch_dispatch__`` in ATen's words: as ``__torch_function__`` of a class it does nothing.
no_torch_function = _private("torch._C._disabled_torch_function_impl", "tracing")
# A context in which ``__torch_function__`` of subclasses is not called: masks that carry a request look at themselves in it.
untorched = _private("torch._C.DisableTorchFunctionSubclass", "a model's mask")

# Base of contexts that see every operation below autograd. The test kit counts roundings with one.
DispatchMode = _private("torch.utils._python_dispatch.TorchDispatchMode", "the test kit")
# A context without any of these: the speed of the machine is measured with plain tensors, whatever the caller is in the middle of.
no_modes = _private("torch.utils._python_dispatch._disable_current_modes", "measuring this machine")

# ---- what surrounds a call --------------------------------------------------------------------------------------------

# Whether ``torch.vmap``, ``torch.func.grad`` or another transform of ``torch.func`` is running; asked by every call, 50 ns.
transforms_active = _private("torch._C._are_functorch_transforms_active", "a call")
# Whether such a transform watches a tensor; whether it is one of ``torch.vmap``; the tensor below, and where its samples lie.
is_wrapped = _private("torch._C._functorch.is_functorch_wrapped_tensor", "a call under torch.func")
is_batched = _private("torch._C._functorch.is_batchedtensor", "a call under torch.vmap")
unwrapped = _private("torch._C._functorch.get_unwrapped", "a call under torch.vmap")
batch_dim = _private("torch._C._functorch.maybe_get_bdim", "a call under torch.vmap")
# Whether autocast is on for any device: cheaper than asking for the device of a tensor, and nearly always false.
autocast_anywhere = _private("torch._C._is_any_autocast_enabled", "a call")

# The innermost functions that pack what autograd saves, None without: activation checkpointing sets some while it runs what it will run
# again.
_saved_hooks = _private("torch._C._autograd._top_saved_tensors_default_hooks", "a call that waits for a compiler")

# How many modes watch every operation below autograd, those of tracing among them.
modes_active = _private("torch._C._len_torch_dispatch_stack", "a call")

_mode = _private("torch._C._get_dispatch_mode", "a call")
_keys = _private("torch._C._TorchDispatchModeKey", "a call")
_GRAPH_MODES = tuple(getattr(_keys, name) for name in ("PROXY", "FAKE", "FUNCTIONAL") if hasattr(_keys, name))
_NO_VALUES = tuple(
    kind
    for kind in (
        _private("torch._subclasses.fake_tensor.FakeTensor", "a call"),
        _private("torch._subclasses.functional_tensor.FunctionalTensor", "a call"),
    )
    if isinstance(kind, type)
)


def in_graph_mode() -> bool:
    """Whether ``make_fx``, ``torch.export`` or a fake mode watches every operation. (``torch.compile`` says so by a public name.)"""
    return any(_mode(mode) is not None for mode in _GRAPH_MODES)


def saved_tensor_hooks() -> bool:
    """Whether hooks for what autograd saves are set, as within activation checkpointing."""
    return _saved_hooks(False) is not None


def has_no_values(tensor: Tensor) -> bool:
    """Whether it is a fake or functional tensor, which stands for values that come later. False in a torch that has no such classes."""
    return isinstance(tensor, _NO_VALUES)


# ---- fast operators ---------------------------------------------------------------------------------------------------


def linear(x: Tensor, weight: Tensor, after: str = "none") -> Tensor:
    """oneDNN's ``x @ weight.T`` of float32 matrices on CPU, with ``after`` ("none", "tanh", ..) in the same pass over the result.

    Twice as fast as ``torch.mm`` on some processors. :func:`sparsedsl.tuning.rates.has_linear` tries it before anything uses it, and
    ``torch.mm`` is taken where it is missing or wrong.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, after, [], "")


def flash_for_cpu() -> Callable[..., Any]:
    """torch's flash attention for CPU, whose speed is measured for comparison. Where it is missing, so is the measurement."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


# ---- operators of our own ---------------------------------------------------------------------------------------------


@contextmanager
def autograd_again() -> Iterator[None]:
    """Inside a custom operator: let autograd take part again, which torch's dispatcher has passed by already."""
    keys = torch._C.DispatchKey
    passed = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor, keys.ADInplaceOrView):
        passed = passed.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), passed):
        yield


def make_transformable(definition: Any, library: torch.library.Library, no_forward_mode: Callable[[], Any]) -> None:
    """Let a ``torch.library.custom_op`` whose autograd is registered be differentiated by ``torch.func.grad`` and its kin as well.

    ``torch.library.register_autograd`` does not give that. It is needed for ``torch.func.grad`` inside ``torch.compile``, where the graph
    holds the operator; outside, a lowering is differentiable by :mod:`runtime.autograd`. ``no_forward_mode`` raises what forward mode
    gets. Where one of the names is missing the operator keeps torch's own kernel, and ``torch.func.grad`` says that it has none.
    """
    try:
        from torch._functorch.utils import enable_single_level_autograd_function
        from torch._library.autograd import make_autograd_impl
        from torch._library.utils import fill_defaults
        from torch.autograd.function import _SingleLevelFunction
        from torch.utils._pytree import tree_flatten, tree_unflatten
    except ImportError:
        return

    class Level(_SingleLevelFunction):
        """One level of ``torch.func.grad``: torch has unwrapped the tensors for it and takes the operator to the levels below."""

        @staticmethod
        def forward(ctx: Any, keys: Any, structure: Any, *leaves: Any) -> Any:
            inputs = tree_unflatten(list(leaves), structure)
            # torch turned gradients off for this level; those below decide for themselves.
            with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
                output = definition._opoverload.redispatch(keys & torch._C._after_autograd_keyset, *inputs)
            if definition._setup_context_fn is not None:
                definition._setup_context_fn(ctx=ctx, inputs=tuple(inputs), output=output)
            ctx.structure = structure
            return tuple(output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            all_needs = ctx.needs_input_grad
            ctx.needs_input_grad = tree_unflatten(list(all_needs[2:]), ctx.structure)
            try:
                found = definition._backward_fn(ctx, *grads)
            finally:
                ctx.needs_input_grad = all_needs
            return None, None, *(g for item in found for g in (item if isinstance(item, list) else [item]))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            no_forward_mode()

    plain = make_autograd_impl(definition._opoverload, definition)
    schema = definition._opoverload._schema
    gives_list = not isinstance(schema.returns[0].type, torch.TensorType)

    def differentiate(keys: Any, *args: Any, **keywords: Any) -> Any:
        if not transforms_active():
            return plain(keys, *args, **keywords)
        inputs, _ = fill_defaults(schema, args, keywords)
        leaves, structure = tree_flatten(list(inputs))
        with enable_single_level_autograd_function():
            results = Level.apply(keys, structure, *leaves)  # type: ignore[attr-defined]
        return list(results) if gives_list else results

    with warnings.catch_warnings():  # the kernel that is replaced is the one that torch has made
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        library.impl(definition._name, differentiate, "Autograd", with_keyset=True, allow_override=True)


# ---- FlexAttention and its compiler -----------------------------------------------------------------------------------


def has_avx2() -> bool:
    """Whether the processor has AVX2, without which FlexAttention has no kernel for CPU. False where torch does not say."""
    return bool(getattr(torch.cpu, "_is_avx2_supported", lambda: False)())


def varying_sizes() -> Any:
    """A context in which ``torch.compile`` takes every size for one that may change: one compile for all lengths.

    No size is taken to be equal to another because they are equal at the first call, and 0 and 1 are sizes like others.
    """
    config: Any = _private("torch.fx.experimental._config", "backend 'flex'")
    return config.patch(use_duck_shape=False, backed_size_oblivious=True) if hasattr(config, "patch") else config()


def compile_failure(error: BaseException) -> bool:
    """Whether an error is that ``torch.compile`` could not compile, and no error of what it has compiled."""
    kinds = torch._dynamo.exc
    return isinstance(error, (kinds.TorchDynamoException, kinds.FailOnRecompileLimitHit))


@contextmanager
def tile_sizes_named() -> Iterator[None]:
    """Work round a fault of torch's C++ template for FlexAttention on CPU (2.11 to 2.13; harmless where it is mended or missing).

    The template names the sizes of a tile ``ks1`` and ``ks2`` (the numbers vary) in the code of the mask, then replaces these texts by
    ``cur_qSplitSize`` and ``cur_kvSplitSize``. A table whose length it has named ``ks27`` becomes ``cur_kvSplitSize7``, which does
    not compile. Here the two sizes get names that nothing else begins with.
    """
    from torch._inductor import lowering  # noqa: F401  (loads the template in an order that works)
    from torch._inductor.codegen.cpp_flex_attention_template import CppFlexAttentionTemplate as Template

    original = getattr(Template, "modification", None)
    if original is None:
        yield
        return

    def modification(self: Any, *arguments: Any, **keywords: Any) -> Any:
        kept = self.extra_sizevars
        self.extra_sizevars = [*kept, *self.block_vars]
        try:
            return original(self, *arguments, **keywords)
        finally:
            self.extra_sizevars = kept

    setattr(Template, "modification", modification)  # noqa: B010
    try:
        yield
    finally:
        setattr(Template, "modification", original)  # noqa: B010  (mypy refuses the plain assignment)
