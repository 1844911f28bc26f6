"""How far off a result may be, element by element: every operation of the dense computation is moved by what it may round.

The dense computation runs in float64, and runs again with the result of every operation moved at random, independently, by

- an elementwise result: two roundings of it; of a sum of two, one of each term and one of the result; of ``exp``, four and two of its
  argument;
- a sum of n terms, products of matrices too: (sqrt(n) + 3) roundings of the sum of their absolute values;
- an operand of a product that was itself computed (weights, their gradients): one rounding in the dtype of the inputs;
- what is written to memory between passes (outputs of branches, the output in a backward pass): one rounding in the dtype of the inputs.

Other roundings are those of the dtype of accumulation: float64 for float64, else float32. The *sigma* of an element is the root of the mean
square of how far it moved. A result may be off by 4 sigma, plus two roundings of the exact value in the dtype it is given in, plus four in
that of accumulation of what was added up last (an LSE: of 1 + its size). Nothing is taken over a whole tensor, so that an outlier widens
nothing but what it reaches; and nothing was fitted to a backend. Six runs are made; before an element is called wrong, forty.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch

from sparsedsl.torch_private import DispatchMode

__all__ = ["Roundings", "stored"]

Tensor = torch.Tensor

# Operations that move numbers and change none. One that is missing here costs a rounding too many; views are known to torch.
_MOVES = frozenset((
    "_to_copy", "_unsafe_view", "abs", "amax", "amin", "arange", "cat", "clamp", "clamp_max", "clamp_min", "clone",
    "constant_pad_nd", "copy_", "detach_", "empty", "empty_like", "empty_strided", "fill", "fill_", "flip", "full", "full_like",
    "gather", "index", "index_put", "index_put_", "index_select", "lift_fresh", "masked_fill", "masked_fill_", "max", "maximum",
    "min", "minimum", "nan_to_num", "neg", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_zeros", "ones",
    "ones_like", "relu", "repeat", "resize_", "roll", "scalar_tensor", "scatter", "scatter_", "select_backward",
    "select_scatter", "set_", "sign", "slice_backward", "slice_scatter", "sort", "split", "stack", "take", "threshold_backward",
    "topk", "tril", "triu", "unbind", "unfold", "value_selecting_reduction_backward", "where", "zero_", "zeros", "zeros_like",
))  # fmt: skip
_PRODUCTS = frozenset(("mm", "bmm"))
_SCATTERS = frozenset(("scatter_add", "index_add"))
_SUMS = frozenset(("sum", "mean", "cumsum", "prod"))
_POOL: list[Tensor] = []
_ACTIVE: list[Roundings] = []


def stored(x: Tensor) -> Tensor:
    """``x``; where roundings are counted, one more in the dtype of the inputs, as of what is written to memory."""
    return _ACTIVE[-1].stored(x) if _ACTIVE else x


class Roundings(DispatchMode):
    """A context in which float64 operations are moved by what they may round.

    Args:
        seed: of the moves.
        accumulated: the dtype in which sums and functions are worked out.
        kept: the dtype of inputs and outputs.
        given: tensors that are exact: as operands of products they are not rounded.
        summed: the dtype in which gradients of tables are added up, if it is coarser than ``accumulated``.
    """

    def __init__(
        self, seed: int, accumulated: torch.dtype, kept: torch.dtype, given: Iterable[Tensor], summed: torch.dtype | None = None
    ):
        super().__init__()
        self.draw = random.Random(seed)
        self.unit = torch.finfo(accumulated).eps / 2
        self.coarse = max(self.unit, torch.finfo(summed or accumulated).eps / 2)
        info = torch.finfo(kept)
        self.kept, self.step = info.eps / 2, info.smallest_normal * info.eps
        self.exact = {x.untyped_storage().data_ptr(): x for x in given}  # held, so that no other tensor takes the address

    def __enter__(self) -> Roundings:
        _ACTIVE.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.pop()
        super().__exit__(*error)

    def stored(self, x: Tensor) -> Tensor:
        """``x`` rounded once in the dtype of inputs; to a backward pass it is ``x``."""
        with torch.no_grad():
            move = self._move(self.kept * x.abs() + self.step * (x != 0))
        return x + move

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.dtype != torch.float64 or not result.numel() or function.is_view:
            return result
        name = function.overloadpacket.__name__
        tensors = [x for x in _flat(args) if isinstance(x, Tensor) and x.is_floating_point()]
        adds_up = name in ("scatter_add", "index_add") or (
            name.lstrip("_").startswith("index_put") and any(x is True for x in args)
        )
        if name in _MOVES and not adds_up:
            if tensors and all(self._given(x) for x in tensors):
                self.exact[result.untyped_storage().data_ptr()] = result
            return result
        size = self._size(name, function, args, kwargs or {}, tensors, result, adds_up)
        if name.endswith("_") and name != "_softmax_":
            return result.add_(self._move(size)) if adds_up else result
        return result + self._move(size)

    def _given(self, x: Tensor) -> bool:
        return x.untyped_storage().data_ptr() in self.exact

    def _move(self, size: Tensor) -> Tensor:
        """Random numbers of this standard deviation; 0 where it is not finite."""
        return torch.nan_to_num(size, 0.0, 0.0, 0.0) * self._noise(size.numel()).view(size.shape)

    def _noise(self, count: int) -> Tensor:
        if not _POOL:
            _POOL.append((torch.rand(1 << 19, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1) * 3**0.5)
        pool = _POOL[0]
        if count * 2 > pool.numel():
            return torch.cat([self._noise(pool.numel() // 4) for _ in range(-(-count // (pool.numel() // 4)))])[:count]
        start = self.draw.randrange(pool.numel() - count)
        return pool[start : start + count]

    def _size(
        self, name: str, function: Any, args: Any, kwargs: Any, tensors: list[Tensor], result: Tensor, adds_up: bool
    ) -> Tensor:
        """The standard deviation of what one operation rounds."""
        unit = self.unit
        if name in _PRODUCTS:
            x, y = tensors
            size = unit * (x.shape[-1] ** 0.5 + 3) * (x.abs() @ y.abs())
            parts = []
            if self.kept > unit:
                parts += [] if self._given(x) else [(self.kept * x.abs() + self.step * (x != 0)).square() @ y.square()]
                parts += [] if self._given(y) else [x.square() @ (self.kept * y.abs() + self.step * (y != 0)).square()]
            return (size.square() + sum(parts)).sqrt() if parts else size
        if adds_up:
            given = [x.abs() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
            given[0] = torch.zeros_like(result)
            total = getattr(torch.ops.aten, name.strip("_").removesuffix("_impl"))(*given[:4])
            return self.coarse * ((tensors[-1].numel() / result.numel()) ** 0.5 + 3) * total
        if name in _SUMS:
            x = tensors[0]
            terms = max(x.numel() // result.numel(), 1) if name != "cumsum" else x.shape[args[1]]
            return self.coarse * (terms**0.5 + 3) * function(x.abs(), *args[1:], **kwargs)
        if name == "logsumexp":
            x = tensors[0]
            if not x.numel():
                return torch.zeros_like(result)
            largest = torch.where(torch.isfinite(x), x, 0.0).abs().amax(args[1], args[2] if len(args) > 2 else False)
            return unit * (x.shape[args[1][0]] ** 0.5 + 4 + 2 * result.abs() + 2 * largest)
        if name in ("exp", "exp2", "_softmax", "expm1"):
            largest = (
                tensors[0].abs() if name != "_softmax" else tensors[0].nan_to_num(0.0, 0.0, 0.0).abs().amax(-1, keepdim=True)
            )
            return unit * (4 + 2 * largest) * (result.abs() if name != "expm1" else result.abs() + 0.0)
        if name in ("log", "log1p"):  # of what is known up to two roundings
            return unit * (2 * result.abs() + 2)
        if name in ("add", "sub", "rsub"):
            terms = [x.abs() for x in (*args[:2],) if isinstance(x, Tensor)] + [
                abs(x) for x in args[:2] if isinstance(x, (int, float))
            ]
            return unit * (sum(terms) + result.abs())
        return 2 * unit * result.abs()


def _flat(values: Any) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value
