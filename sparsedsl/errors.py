"""Every error this project raises on purpose. Each message says what was got, what was wanted and what to do instead."""

from __future__ import annotations

from typing import Any

__all__ = [
    "ArgumentError",
    "CallWarning",
    "MissingPackageError",
    "PatternError",
    "SettingsError",
    "ShapeError",
    "SparseDSLError",
    "TableError",
    "TraceError",
    "UnsupportedError",
]


class SparseDSLError(Exception):
    """Base class: ``except sparsedsl.SparseDSLError`` catches everything the project raises on purpose."""


class PatternError(SparseDSLError, ValueError):
    """A declaration that has no meaning: ``and`` between masks, a chained comparison, a negative window, ..."""


class TableError(PatternError):
    """A table is missing, surplus, too short, of the wrong type, or breaks a fact it was declared with."""


class ShapeError(SparseDSLError, ValueError):
    """Tensors whose shapes, dtypes or devices do not fit each other or the pattern."""


class ArgumentError(SparseDSLError, TypeError):
    """A call with an argument that the function does not have, one too many or one too few."""


class TraceError(SparseDSLError, TypeError):
    """A callable that cannot be turned into an expression; names the operation and the line."""


class UnsupportedError(SparseDSLError, NotImplementedError):
    """The pattern has a meaning but the chosen lowering, device or dtype cannot run it; names the way out."""


class MissingPackageError(UnsupportedError, ImportError):
    """An optional package that is not installed; names the extra that brings it."""

    def __init__(self, what: str, package: str, extra: str):
        super().__init__(
            f"{what} needs the package {package}, which is not installed: pip install {package}, or pip install '.[{extra}]' in a checkout "
            "of sparsedsl, which brings what it was tested with (sparsedsl itself is on no package index)"
        )

    def __reduce__(self) -> Any:
        return UnsupportedError, self.args


class SettingsError(SparseDSLError, ValueError):
    """An environment switch with a value that is not one of the valid ones."""


class CallWarning(UserWarning):
    """A call that has a meaning, but rarely the one that is wanted. Each text names what to pass to say that it is meant."""
