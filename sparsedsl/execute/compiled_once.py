"""Compiled patterns and programs that several layers share."""

from __future__ import annotations

from typing import Any

from sparsedsl.execute.compiling import compile
from sparsedsl.lang.pattern import Pattern
from sparsedsl.program.graph import Program

__all__ = ["Compiled"]


class Compiled:
    """Compiled patterns and programs, shared by the layers of a model: the same one, bound to the same tensors, is compiled once."""

    def __init__(self, backend: str, allow: tuple[str, ...] = ()) -> None:
        self.backend, self.allow = backend, allow
        self.made: dict[Any, Any] = {}

    def __call__(self, pattern: Pattern | Program) -> Any:
        key = (pattern.key, tuple(sorted((name, id(tensor)) for name, tensor in pattern.bound.items())))
        if key not in self.made:
            allow = self.allow if isinstance(pattern, Program) else ()
            self.made[key] = compile(pattern, backend=self.backend, allow=allow)
        return self.made[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "made": {}}  # a model saved whole compiles again

    def __deepcopy__(self, memo: Any) -> Compiled:
        return self
