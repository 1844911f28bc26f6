"""What is looked at: a pattern or program, or a function that makes one of numbers, whose parameters become sliders."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import meant
from sparsedsl.lang.pattern import Pattern
from sparsedsl.program.graph import Program
from sparsedsl.specs import CannotLoad, called, load_object, pattern_of

__all__ = ["Parameter", "Subject"]

KINDS: dict[str, type] = {"bool": bool, "int": int, "float": float}
# What a parameter begins with that has no default.
STARTS: dict[str, Any] = {"bool": False, "int": 8, "float": 1.0}


@dataclass(frozen=True)
class Parameter:
    """One slider: ``kind`` is ``"int"``, ``"float"`` or ``"bool"``. Values beyond ``low .. high`` may be typed."""

    name: str
    kind: str
    default: Any
    low: float
    high: float
    step: float

    def check(self, value: Any) -> Any:
        """``value`` as this kind; raises :class:`~sparsedsl.PatternError` for another."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if self.kind == "bool" and isinstance(value, bool):
            return value
        if self.kind == "float" and number:
            return float(value)
        if self.kind == "int" and number and value == int(value):
            return int(value)
        raise PatternError(f"parameter {self.name} is a {self.kind}; got {value!r}")


class Subject:
    """What ``spec`` names, as it is now: a file is read again with every Subject. Raises :class:`CannotLoad`, or what the file raises.

    >>> subject = Subject("sparsedsl.patterns:streaming_llm")
    >>> [parameter.name for parameter in subject.parameters]
    ['window', 'sink_count']
    >>> print(subject.make({"window": 16, "sink_count": 2}).mask)
    ((kv_idx <= q_idx) & (q_idx - kv_idx < 16)) | ((kv_idx <= q_idx) & (kv_idx < 2))
    """

    def __init__(self, spec: str):
        self.spec = spec
        self.value = load_object(spec)
        self.parameters: tuple[Parameter, ...] = _parameters(self.value, spec)

    @property
    def defaults(self) -> dict[str, Any]:
        """Parameter -> its first value."""
        return {parameter.name: parameter.default for parameter in self.parameters}

    def make(self, values: Mapping[str, Any]) -> Pattern | Program:
        """The pattern or program for these values of parameters; others have their defaults."""
        known = {parameter.name: parameter for parameter in self.parameters}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise PatternError(
                f"{self.spec} has no parameter {unknown[0]}; it has {', '.join(known) or 'none'}{meant(unknown[0], list(known))}"
            )
        if not self.parameters:
            return pattern_of(self.value, self.spec)
        words = {name: parameter.check(values.get(name, parameter.default)) for name, parameter in known.items()}
        made = called(lambda: self.value(**words), self.spec)
        return pattern_of(made, f"{self.spec}({', '.join(f'{name}={value!r}' for name, value in words.items())})")

    def described(self) -> list[dict[str, Any]]:
        """The parameters as the page reads them."""
        return [asdict(parameter) for parameter in self.parameters]


def _parameters(value: Any, spec: str) -> tuple[Parameter, ...]:
    if not inspect.isfunction(inspect.unwrap(value)) if callable(value) else True:
        return ()
    found, stuck, required = [], [], 0
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        kind = _kind(parameter)
        bare = parameter.default is parameter.empty
        required += bare
        if kind is None or parameter.kind is parameter.POSITIONAL_ONLY:
            stuck += [parameter.name] if bare else []
        else:
            found.append(_slider(parameter.name, kind, STARTS[kind] if bare else parameter.default))
    if stuck and required in (4, 5) and len(stuck) == required:
        return ()  # a mask_mod or score_mod, which is traced
    if stuck:
        raise CannotLoad(
            f"{spec} wants {', '.join(stuck)}, which is no number with a slider: give it a default, or write a function of numbers "
            "(annotated int, float or bool) that calls it"
        )
    return tuple(found)


def _kind(parameter: inspect.Parameter) -> str | None:
    """``int | None = None`` has no slider: its default says that nothing is meant."""
    if parameter.default is parameter.empty:
        named = parameter.annotation if isinstance(parameter.annotation, str) else getattr(parameter.annotation, "__name__", "")
        return named if named in KINDS else next((kind for kind in KINDS if kind in named.split(" | ")), None)
    return next((kind for kind, type_ in KINDS.items() if type(parameter.default) is type_), None)


def _slider(name: str, kind: str, default: Any) -> Parameter:
    """A range around a value: to four times as much, or so far that there is something to move."""
    if kind == "bool":
        return Parameter(name, kind, default, 0, 1, 1)
    if kind == "int":
        return Parameter(name, kind, default, min(0, 2 * default), max(16, 4 * default), 1)
    reach = 4 * abs(default) or 1.0
    return Parameter(name, kind, default, -reach if default < 0 else 0.0, reach, reach / 200)
