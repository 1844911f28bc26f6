"""Evaluation whose integers are Python's: slow, and right however large they are. For references and witnesses."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import reduce
from typing import Any

import numpy as np
import sympy
import torch
from sympy.core.relational import Relational

from sparsedsl.lang import functions as fn
from sparsedsl.lang.evaluation import Evaluator, evaluate, read_table
from sparsedsl.lang.tables import TableRead

__all__ = ["evaluate_any", "evaluate_exactly"]

_COMPARE = {
    "<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


def _objects(value: object) -> Any:
    return np.asarray(value, dtype=object)


_MANY = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Min: lambda a, c: np.minimum(_objects(a), _objects(c)),
    sympy.Max: lambda a, c: np.maximum(_objects(a), _objects(c)),
    fn.BitAnd: operator.and_,
}


def evaluate_exactly(expr: sympy.Basic, env: Mapping[str, Any], *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """What :func:`~sparsedsl.lang.evaluation.evaluate` gives, with integers that never wrap around.

    >>> import sparsedsl as sd
    >>> end = torch.tensor([torch.iinfo(torch.int64).min])
    >>> evaluate_exactly((sd.kv_idx < sd.table("end")[0]).expr, {"kv_idx": torch.arange(3), "end": end})
    tensor([False, False, False])
    """
    run = _Exact(env, dtype)
    return torch.as_tensor(run.value(expr), device=run.device)


def evaluate_any(expr: sympy.Basic, env: Mapping[str, Any], *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """:func:`evaluate_exactly` where a table holds values that int32 does not; else the faster evaluation in int64."""
    wide = [t for t in env.values() if isinstance(t, torch.Tensor) and t.dtype == torch.int64 and t.numel()]
    far = any(max(-int(t.min()), int(t.max())) > 1 << 31 for t in wide)
    return (evaluate_exactly if far else evaluate)(expr, env, dtype=dtype)


class _Exact(Evaluator):
    """Whole numbers are arrays of Python's integers until a comparison, a float or an index wants them."""

    def __init__(self, env: Mapping[str, Any], dtype: torch.dtype):
        super().__init__(env, dtype)
        self.device = next((v.device for v in env.values() if isinstance(v, torch.Tensor)), None)
        self._whole: dict[sympy.Basic, Any] = {}

    def compute(self, expr: sympy.Basic) -> Any:
        """The value as a tensor."""
        if isinstance(expr, Relational) and all(side.is_integer for side in expr.args):
            left, right = (self.whole(side) for side in expr.args)
            return torch.as_tensor(np.asarray(_COMPARE[expr.rel_op](left, right), dtype=bool), device=self.device)
        if isinstance(expr, (sympy.Symbol, TableRead)) or not expr.is_integer:
            return super().compute(expr)
        return torch.as_tensor(np.asarray(self.whole(expr)).astype(np.int64), device=self.device)

    def whole(self, expr: sympy.Expr) -> Any:
        """A whole number as an array of Python's integers, or one of them."""
        if expr not in self._whole:
            self._whole[expr] = self._compute_whole(expr)
        return self._whole[expr]

    def _compute_whole(self, expr: sympy.Expr) -> Any:
        for kind, op in _MANY.items():
            if isinstance(expr, kind):
                return reduce(op, map(self.whole, expr.args))
        match expr:
            case sympy.Integer():
                return int(expr)
            case TableRead():
                return self.read(expr).to(torch.int64).cpu().numpy().astype(object)
            case sympy.Pow() if expr.exp.is_Integer:
                return self.whole(expr.base) ** int(expr.exp)
            case sympy.floor() if expr.args[0].is_rational:
                return operator.floordiv(*map(self.whole, expr.args[0].as_numer_denom()))
            case sympy.ceiling():
                return -self.whole(sympy.floor(-expr.args[0]))
            case sympy.Mod():
                return operator.mod(*map(self.whole, expr.args))
            case fn.Abs():
                return abs(self.whole(expr.args[0]))
            case fn.Where():
                arms = (_objects(self.whole(arm)) for arm in expr.args[1:])
                return np.where(np.asarray(torch.as_tensor(self.value(expr.args[0])).cpu()), *arms)
        return np.asarray(torch.as_tensor(super().compute(expr)).to(torch.int64).cpu()).astype(object)

    def read(self, expr: TableRead) -> torch.Tensor:
        """The entries of a table, at indices clamped into it before they become tensors."""
        table, indices = self.env[expr.spec.name], []
        for index, size in zip(expr.args, table.shape, strict=False):
            place = np.asarray(np.clip(_objects(self.whole(index)), 0, max(size - 1, 0))).astype(np.int64)
            indices.append(torch.as_tensor(place, device=table.device))
        return read_table(table, indices, expr.spec.name)
