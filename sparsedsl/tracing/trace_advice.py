"""What cannot be traced, and what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from sparsedsl.tracing.locate import control_flow
from sparsedsl.tracing.trace_graph import fail

__all__ = [
    "HARMLESS", "IN_PLACE", "RANDOM", "check_table", "moves_only", "refuse", "refuse_operation", "refuse_shape", "refuse_truth",
]  # fmt: skip


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


HARMLESS = frozenset({"requires_grad_", "share_memory_"})
IN_PLACE = _words("add sub mul div truediv floordiv mod pow and or xor lshift rshift")
RANDOM = _words(
    "rand randn randint randperm bernoulli multinomial normal poisson rand_like randn_like randint_like rrelu dropout "
    "alpha_dropout feature_dropout feature_alpha_dropout gumbel_softmax uniform_ normal_ bernoulli_ random_ exponential_ "
    "geometric_ cauchy_ log_normal_"
)

_TRUTH = {
    "if": ("`if`", "The branch depends on the index: write torch.where(condition, a, b), or join masks as (c & a) | (~c & b)"),
    "while": (
        "`while`",
        "The number of steps must not depend on an index: loop over a Python number and select with torch.where",
    ),
    "assert": ("`assert`", "An index has no value while tracing; check the tables outside of the function"),
    "and": ("`and`", "Write a & b, with brackets round comparisons: (x >= 0) & (x < 5)"),
    "or": ("`or`", "Write a | b, with brackets round comparisons: (x < 0) | (x > 5)"),
    "not": ("`not`", "Write ~a"),
    "chain": ("a chained comparison", "Python joins it with `and`: write (a <= x) & (x < b)"),
    "in": ("`in`", "Write (x == a) | (x == b), or read a boolean table: table[x]"),
    "min": ("Python's min()", "Write torch.minimum(a, b), or torch.clamp(x, max=n)"),
    "max": ("Python's max()", "Write torch.maximum(a, b), or torch.clamp(x, min=n)"),
    "any": ("Python's any()", "Join with |"),
    "all": ("Python's all()", "Join with &"),
    "sorted": ("Python's sorted()", "Use torch.minimum and torch.maximum"),
    "bool": ("bool()", "It decides with a traced value: use & | ~ and torch.where, or x.to(torch.bool)"),
}

_METHODS = {
    "len": ("len()", "Indices and scores are single values; a captured tensor's size is tensor.shape[0]"),
    "iter": ("iteration over a traced value", "Indices and scores are single values; unpack tables before the function"),
    "in": ("`in`", "Write (x == a) | (x == b), or read a boolean table: table[x]"),
    "__int__": ("int()", "Write x.to(torch.int64); whole numbers need no conversion"),
    "__float__": (
        "float(), or a function of Python's math",
        "Write x.to(torch.float32), and torch.log, torch.sqrt, ... for math.log",
    ),
    "__index__": (
        "use as a Python index, range() or hex()",
        "Turn the Python list into a tensor outside of the function and read that: table = torch.tensor(values); table[q_idx]",
    ),
    "__complex__": ("complex()", "There are no complex scores"),
    "numpy": ("conversion to numpy", "Use the torch function of the same name"),
    "item": (".item(), .tolist() or a conversion to a Python number", "The value is not known while tracing; keep it a tensor"),
    "write": ("a write in place ({0})", "Make a new value: x = x + 1, torch.where(condition, a, b)"),
}

_GROUPS: dict[str, tuple[frozenset[str], str]] = {
    "a reduction": (
        _words(
            "sum prod mean amax amin max min aminmax any all argmax argmin std var var_mean median mode norm linalg_vector_norm "
            "logsumexp cumsum cumprod cummax cummin logcumsumexp count_nonzero nansum topk sort argsort kthvalue nonzero "
            "unique_dim _unique2 searchsorted bucketize histc bincount softmax _softmax _log_softmax"
        ),
        "A mask or score is computed for one pair at a time; reduce outside of the function and read the result as a table: "
        "table[q_idx]",
    ),
    "a matrix product": (
        _words("mm bmm addmm matmul dot mv einsum linear addmv baddbmm convolution outer"),
        "A mask or score sees no vectors; multiply outside of the function and read the result as a table: table[b, q_idx]",
    ),
    "a new sequence": (
        _words("arange linspace logspace eye tril triu tril_indices triu_indices"),
        "Its size or bounds must not depend on an index; make it outside of the function",
    ),
    "a random number": (RANDOM, "Every call would differ; draw outside of the function and read the numbers as a table"),
    "a change of shape": (
        _words(
            "view reshape unsqueeze expand squeeze permute transpose stack cat flatten repeat roll flip unfold split chunk "
            "narrow slice as_strided index_put scatter gather index_select select unbind tile t"
        ),
        "Indices and scores are single values here and must stay so; read tables one element at a time: table[b, q_idx]",
    ),
    "uninitialised memory": (
        _words("empty empty_like new_empty empty_strided new_empty_strided"),
        "Use torch.zeros_like(x)",
    ),
}


def refuse(kind: str, *details: str) -> NoReturn:
    """Raise for a Python protocol, a write or a random number."""
    if kind in RANDOM:
        fail(f"a random number ({details[0]})", _GROUPS["a random number"][1])
    what, instead = _METHODS[kind]
    fail(what.format(*details), instead)


def refuse_truth() -> NoReturn:
    """Raise for a request for a traced value's truth, naming the construct that asks."""
    what, instead = _TRUTH[control_flow()]
    fail(f"{what} on a traced value", instead)


def refuse_operation(name: str, shown: str) -> NoReturn:
    """Raise for ATen's operation ``name``, which the user wrote as ``shown``."""
    for group, (names, instead) in _GROUPS.items():
        if name in names:
            fail(f"{shown}(), {group}", instead)
    fail(
        f"{shown}()",
        f"sparsedsl does not know the operation aten::{name}. Compute it outside of the function and read it as a table, "
        "or say it with arithmetic, comparisons and torch.where",
    )


def refuse_shape(name: str, shape: tuple[int, ...]) -> NoReturn:
    """Raise for a tensor that is used whole where a single value is wanted."""
    commas = ", ".join("?" for _ in shape)
    fail(
        f"arithmetic with {name}, a tensor of shape {shape}",
        f"A mask or score is computed for one pair at a time: read one element, {name}[{commas}]; rows of up to 32 numbers can be taken "
        "whole, where something joins them: (row == kv_idx).any()",
    )


def check_table(tensor: torch.Tensor) -> None:
    """Raise unless ``tensor`` can become a table."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        fail(f"a tensor of layout {tensor.layout}", "Tables are dense tensors; write tensor.to_dense()")
    if tensor.is_complex():
        fail(f"a tensor of type {tensor.dtype}", "Tables hold integers, booleans or floats")


def moves_only(args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether ``Tensor.to``, ``cpu`` or ``cuda`` leaves the type as it is; where tables live is decided by each call."""
    return all(isinstance(a, (str, torch.device, int)) for a in args[1:]) and not {"dtype", "other"} & kwargs.keys()
