"""The text form of a program, run by plain torch: every word of it is a function here, which shares no line with the library.

Dense, differentiable, and slow: tensors are cut and joined row by row, choices are made by sorting lists of numbers. So it is an oracle for
any program that is drawn, the dense meaning (backend ``reference``) included.
"""

from __future__ import annotations

import ast
from typing import Any

import torch

from tests.programs.plain_branches import BRANCHES
from tests.programs.plain_choices import CHOICES
from tests.programs.plain_grid import FUNCTIONS, INDICES
from tests.programs.plain_scores import SCORES, Part, PlainCall

__all__ = ["WORDS", "PlainCall", "plain"]

Tensor = torch.Tensor
WORDS = {**FUNCTIONS, **SCORES, **CHOICES, **BRANCHES}


def plain(text: str, call: PlainCall) -> tuple[Tensor, Tensor | None]:
    """``(out, lse)`` of a program in its text form."""
    found: dict[str, Any] = {name: Part(lambda c, name=name: getattr(c, name)) for name in ("q", "k", "v")}
    scope = {**INDICES, **found, "inf": float("inf"), "float": float, "int": int, "bool": bool}
    last = ""
    for line in ast.parse(text).body:
        assert isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name)
        last = line.targets[0].id
        code = ast.fix_missing_locations(ast.Expression(_Called().visit(line.value)))
        scope[last] = eval(compile(code, "<text form>", "eval"), {"__builtins__": {}, "function": WORDS}, scope)
    return scope[last].at(call)  # type: ignore[no-any-return]


class _Called(ast.NodeTransformer):
    """A node may have the name of the function that made it: what is called is a function."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = ast.Constant(node.func.id)  # type: ignore[attr-defined]
        node.func = ast.Subscript(ast.Name("function", ast.Load()), name, ast.Load())
        return node
