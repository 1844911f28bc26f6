"""Which layer runs what: said once in every process, asked by each layer as it first runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsedsl.errors import PatternError, TableError, UnsupportedError
from sparsedsl.execute.compiled_once import Compiled
from sparsedsl.execute.scheduled import refuse_scheduled
from sparsedsl.lang.advice import meant, shown, way_in
from sparsedsl.lang.expressions import Mask
from sparsedsl.lang.pattern import Pattern, as_pattern
from sparsedsl.program.graph import Program, as_program
from sparsedsl.tracing.decorators import is_traceable, traced

__all__ = ["HANDED_IN", "SCHEDULER", "WAYS", "Registered", "layer_index", "registered", "set_registered"]

# Tables that a pattern may leave unbound: a layer binds what the engine hands to it, per query head.
HANDED_IN = frozenset({"sinks", "slopes"})
SCHEDULER = "vLLM's scheduler"
WAYS = "Leave this layer out of what you register: it then runs plain causal attention"

Given = Mask | Pattern | Program


@dataclass(eq=False)
class Registered:
    """What a user registered. ``patterns``: one for all layers, a mapping by name or number, or a function of the name. ``compiled``: what
    layers share. ``checked``: what was found to be fit for a server."""

    patterns: Any
    backend: str
    compiled: Compiled = field(init=False)
    checked: dict[str, Given | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.compiled = Compiled(self.backend)
        if isinstance(self.patterns, Mapping):
            for key, value in self.patterns.items():
                if not isinstance(key, (str, int)) or isinstance(key, bool):
                    raise PatternError(
                        f"register(): patterns must be by the name of a layer, 'model.layers.0.self_attn.attn', or by its number, 0; got "
                        f"{shown(key)}"
                    )
                _checked(value, f"layer {key}")
        elif not _is_by_name(self.patterns):
            self.patterns = _checked(self.patterns, "every layer")

    def of(self, name: str) -> Given | None:
        """What the layer of this name runs; None: nothing was said of it."""
        if name not in self.checked:
            if isinstance(self.patterns, Mapping):
                value = self.patterns[name] if name in self.patterns else self.patterns.get(_number(name))
            else:
                value = self.patterns(name) if _is_by_name(self.patterns) else self.patterns
            self.checked[name] = _checked(value, f"layer {name}")
        return self.checked[name]

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse what was registered for a layer that a model with these layers does not have.

        Raises:
            PatternError: it names the layers that there are.
        """
        if not isinstance(self.patterns, Mapping):
            return
        names = list(names)
        known: set[Any] = {*names, *(_number(name) for name in names)}
        unknown = [key for key in self.patterns if key not in known]
        if unknown:
            several = f"{', '.join(names[:3])}, .. {names[-1]}" if len(names) > 4 else ", ".join(names)
            raise PatternError(
                f"no layer is called {', '.join(map(repr, unknown))}; the model's attention layers are {several}{meant(unknown[0], names)}"
            )


_current: list[Registered] = []


def set_registered(one: Registered) -> None:
    """From now on layers that are made run this."""
    _current[:] = [one]


def registered() -> Registered:
    """What was registered last in this process.

    Raises:
        UnsupportedError: nothing was.
    """
    if not _current:
        raise UnsupportedError(
            "nothing was registered in this process: every process of vLLM must call sd.serve.vllm.register(patterns), from a function "
            "under the entry point group 'vllm.general_plugins' of an installed package of yours (docs/serving.md shows one)"
        )
    return _current[0]


def layer_index(name: str) -> int:
    """The number in the name of a layer.

    Args:
        name: as vLLM has it.

    Raises:
        PatternError: there is none, or more than one.

    >>> import sparsedsl as sd
    >>> sd.serve.vllm.layer_index("model.layers.17.self_attn.attn")
    17
    """
    found = _numbers(name)
    if len(found) != 1:
        raise PatternError(
            f"layer {name!r} has {len(found) or 'no'} number{'s' * (len(found) != 1)} in its name; wanted one, as in "
            "'model.layers.0.self_attn.attn'. Register it by its name"
        )
    return found[0]


def _numbers(name: str) -> list[int]:
    return [int(part) for part in str(name).split(".") if part.isdecimal()]


def _number(name: str) -> int | None:
    found = _numbers(name)
    return found[0] if len(found) == 1 else None


def _checked(value: Any, where: str) -> Given | None:
    """What was given for a layer, if a server can run it."""
    if value is None:
        return None
    if is_traceable(value):
        value = traced(value, "register()")
    program = as_program(value)
    if program is None and not isinstance(value, (Mask, Pattern)):
        raise PatternError(f"{where} was given {shown(value)}; wanted a mask, a pattern, a program or None{way_in(value)}")
    declared = as_pattern(value) if program is None else program
    refuse_scheduled(declared, where, SCHEDULER, WAYS)
    free = sorted(set(declared.tables) - set(declared.bound) - HANDED_IN)
    if free:
        raise TableError(
            f"{where}: nothing binds the table{'s' if len(free) > 1 else ''} {', '.join(free)}, and vLLM hands none in. Bind before "
            f"registering: pattern.bind({free[0]}=tensor)"
        )
    return value if isinstance(value, Mask) and program is None else declared


def _is_by_name(patterns: Any) -> bool:
    """Whether it is a function of the name of a layer, as opposed to one of FlexAttention's, which is a pattern."""
    if not is_traceable(patterns):
        return False
    try:
        inspect.signature(patterns).bind("name")
    except TypeError:
        return False
    return True
