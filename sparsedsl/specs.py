"""What the command line is pointed at: ``module:name`` or ``file.py:name`` -> a pattern or program, ``--table`` words -> tensors."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sparsedsl.errors import PatternError, SparseDSLError, TableError
from sparsedsl.lang.advice import meant

if TYPE_CHECKING:
    from sparsedsl.lang.pattern import Pattern
    from sparsedsl.program.graph import Program

__all__ = ["CannotLoad", "called", "given_tables", "load_object", "load_pattern", "load_tables", "pattern_of"]


class CannotLoad(Exception):
    """A SPEC that names nothing usable."""


def load_pattern(spec: str) -> Pattern | Program:
    """The pattern, or program, that ``module:name`` or ``file.py:name`` stands for."""
    return pattern_of(load_object(spec), spec)


def pattern_of(value: Any, spec: str) -> Pattern | Program:
    """The pattern, or program, that a value stands for; ``spec`` is what messages call it."""
    from sparsedsl.lang.pattern import Pattern, as_pattern
    from sparsedsl.lang.wrapped import Expression
    from sparsedsl.program.graph import as_program
    from sparsedsl.tracing.decorators import traced

    compiled = hasattr(value, "program") or hasattr(value, "pattern")
    if callable(value) and not isinstance(value, (Expression, Pattern)) and not compiled:
        wanted = _required(value, spec)
        if wanted == 0:
            value = called(value, spec)
        elif wanted in (4, 5):
            value = traced(value, spec)
        else:
            raise CannotLoad(
                f"{spec} takes {wanted} arguments; wanted a mask_mod(b, h, q_idx, kv_idx), "
                "a score_mod(score, b, h, q_idx, kv_idx), or a function without arguments that returns a pattern"
            )
    program = as_program(getattr(value, "program", value))
    if program is not None:
        return program if program.static is None else program.static
    try:
        return as_pattern(getattr(value, "pattern", value), where=spec)
    except PatternError as error:
        raise CannotLoad(str(error)) from None


def load_object(spec: str) -> Any:
    """What ``module:name`` or ``file.py:name`` names, as it is."""
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        near = f". Did you mean '{spec}:NAME', for a name in that file?" if Path(spec).is_file() else ""
        raise CannotLoad(f"SPEC must be module:name or file.py:name; got {spec!r}{near}")
    value: Any = _load_module(place)
    for part in name.split("."):
        if not hasattr(value, part):
            public = sorted(n for n in vars(value) if not n.startswith("_") and not inspect.ismodule(getattr(value, n)))
            raise CannotLoad(f"{place} has no {name!r}; it has {', '.join(public) or 'no public names'}{meant(part, public)}")
        value = getattr(value, part)
    return value


def _required(value: Callable[..., Any], spec: str) -> int:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError) as error:
        raise CannotLoad(f"{spec} is a {type(value).__name__} whose arguments cannot be seen: {error}") from None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is p.empty and p.kind in kinds for p in signature.parameters.values())


def called(value: Callable[[], Any], spec: str) -> Any:
    """What a function of the user's gives; what it raises that is not ours becomes :class:`CannotLoad`."""
    try:
        return value()
    except SparseDSLError:
        raise
    except Exception as error:
        raise CannotLoad(f"{spec}() raises {type(error).__name__}: {error}") from error


def _load_module(place: str) -> ModuleType:
    folder = str(Path(place).resolve().parent) if place.endswith(".py") else str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        if not Path(place).is_file():
            raise CannotLoad(f"there is no file {place}{_meant_file(place)}")
        found = importlib.util.spec_from_file_location(Path(place).stem, place)
        if found is None or found.loader is None:
            raise CannotLoad(f"{place} cannot be imported")
        module = importlib.util.module_from_spec(found)
        sys.modules[found.name] = module  # so that classes of the file can be found by their name
        found.loader.exec_module(module)
        return module
    except CannotLoad:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not (place == error.name or place.startswith(f"{error.name}.")):
            raise CannotLoad(f"importing {place} raises ModuleNotFoundError: {error}") from error
        raise CannotLoad(f"there is no module {error.name}{_meant_module(error.name)}") from None
    except SparseDSLError as error:
        raise type(error)(f"while importing {place}: {error}") from error
    except Exception as error:
        raise CannotLoad(f"importing {place} raises {type(error).__name__}: {error}") from error


def _meant_file(place: str) -> str:
    """The file beside it whose name is nearest."""
    folder = Path(place).parent
    known = [str(path) for path in folder.glob("*.py")] if folder.is_dir() else []
    return meant(place, known) or (f"; there is no folder {folder} either" if not folder.is_dir() else "")


def _meant_module(name: str) -> str:
    """The module beside it whose name is nearest; of those at the top, the files here and what is loaded or comes with this package."""
    above, _, _ = name.rpartition(".")
    path = importlib.import_module(above).__path__ if above else [str(Path.cwd())]
    known = [f"{above}.{module.name}".lstrip(".") for module in pkgutil.iter_modules(path)]
    return meant(name, known if above else [*known, "sparsedsl.patterns", "sparsedsl"])


def load_tables(pattern: Any, given: list[str], *, all_of_them: bool = True) -> dict[str, Any]:
    """The tensors of ``--table``; complains about those that are missing, if all are needed."""
    tables = given_tables(given)
    needed = {name: spec for name, spec in pattern.tables.items() if name not in pattern.bound}
    missing = [name for name in needed if name not in tables]
    if missing and all_of_them:
        lines = [f"the pattern reads tables that need values: {', '.join(missing)}. Declared as"]
        lines += [f"  {name} = {needed[name].declaration()}" for name in missing]
        words = " ".join(f"--table {name}={name}.pt" for name in missing)
        lines.append(f"Save each as a tensor, torch.save(tensor, 'NAME.pt'), and pass {words}")
        raise TableError("\n".join(lines))
    return tables


def given_tables(words: list[str]) -> dict[str, Any]:
    """The tensors of ``--table NAME=FILE`` words, whatever they are for."""
    return dict(_table(word) for word in words)


def _table(word: str) -> tuple[str, Any]:
    import numpy
    import torch

    name, equals, value = word.partition("=")
    if not equals or not name or not value:
        raise TableError(f"--table wants NAME=FILE, as in --table doc=doc.pt; got {word!r}")
    try:
        if value.startswith("["):
            return name, torch.tensor(json.loads(value))
        found = torch.from_numpy(numpy.load(value)) if value.endswith(".npy") else torch.load(value, map_location="cpu")
    except OSError as error:
        raise TableError(f"--table {name}: cannot read {value}: {error.strerror or error}") from None
    except Exception as error:
        raise TableError(f"--table {name}: {value} does not hold a tensor: {type(error).__name__}: {error}") from None
    if not isinstance(found, torch.Tensor):
        raise TableError(f"--table {name}: {value} holds a {type(found).__name__}; wanted one tensor")
    return name, found
