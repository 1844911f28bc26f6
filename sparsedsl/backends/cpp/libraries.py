"""What the ``cpp`` backend calls: libraries of the fixed part and of one pattern, and the threads of torch's OpenMP."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsedsl.backends.cpp.background import Build
from sparsedsl.backends.cpp.build import library, start
from sparsedsl.codegen.to_cpp import CppSource, CppVariant, cpp_source, fixed_part
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.advice import check_word
from sparsedsl.lang.pattern import Pattern
from sparsedsl.plain_values import Reported
from sparsedsl.quantities import seconds_text
from sparsedsl.settings import settings

__all__ = [
    "Native",
    "address",
    "begun",
    "build_ahead",
    "fixed_library",
    "fixed_pass",
    "fixed_width",
    "native",
    "parallel",
    "texts_of",
]

# A product and a sum may become one operation in products and softmax. What decides which pairs attend is rounded as torch rounds it.
_FIXED, _EXACT = "-ffp-contract=fast", "-ffp-contract=off"

Pass = Callable[..., int]


@dataclass(frozen=True)
class Native:
    """The compiled functions of a pattern, by name; 0 for those it does not need."""

    functions: Mapping[str, int]


def native(source: CppSource, *, double: bool, fixed: str = "forward") -> Native:
    """The library of a pattern, built if need be; at the same time the ``fixed`` part.

    Raises:
        UnsupportedError: no compiler, or it fails.
    """
    return _native(source.text, source.functions, double, fixed)


@functools.lru_cache(maxsize=512)
def _native(text: str, written: tuple[str, ...], double: bool, fixed: str) -> Native:
    start(*_of_fixed(fixed, double))
    made = library(*_of_pattern(text, double))
    fixed_pass(fixed, double)
    names = ("ends", "mask", "score", "slope", "gains", "sink")
    return Native({name: address(getattr(made, name)) if name in written else 0 for name in names})


def _of_pattern(text: str, double: bool) -> tuple[str, ...]:
    """What the library of a pattern is built of: text and flags."""
    return f"{fixed_part('pattern')}\n{text}", _EXACT, *(["-DDOUBLE"] if double else [])


def _of_fixed(name: str, double: bool) -> tuple[str, ...]:
    return fixed_part(name), _FIXED, *(["-DDOUBLE"] if double else [])


def texts_of(source: CppSource | None, fixed: Iterable[str], *, double: bool) -> list[tuple[str, ...]]:
    """What the libraries of ``fixed`` parts and of a pattern are built of: text and flags of each."""
    wanted = [_of_fixed(name, double) for name in fixed]
    if source is not None:
        wanted.append(_of_pattern(source.text, double))
    return wanted


def begun(libraries: Iterable[tuple[str, ...]]) -> tuple[Build, ...]:
    """Begin to build libraries (:func:`texts_of`), all at once; those that are under way.

    Raises:
        UnsupportedError: no compiler.
    """
    return tuple(build for texts in libraries if (build := start(*texts)) is not None)


@functools.cache
def fixed_library(name: str, double: bool) -> ctypes.CDLL:
    """The library of a part that is the same for all patterns: see :func:`~sparsedsl.codegen.to_cpp.fixed_part`.

    Raises:
        UnsupportedError: no compiler, or it fails; or torch has no OpenMP whose threads it could run on.
    """
    parallel()
    return library(*_of_fixed(name, double))


_PASSES = {
    "forward": "attend", "backward": "attend_backward", "selected": "attend_selected", "selected_backward": "attend_selected_backward",
}  # fmt: skip


@functools.cache
def fixed_pass(name: str, double: bool) -> Pass:
    """The "forward", "backward", "selected" or "selected_backward" pass: a function of a call's bytes (those along lists take those of the
    lists too).

    Raises:
        UnsupportedError: see :func:`fixed_library`.
    """
    function = getattr(fixed_library(name, double), _PASSES[name])
    function.restype = ctypes.c_int
    return function


@dataclass(frozen=True)
class CppBuild(Reported):
    """The C++ of a pattern, forward and backward, compiled into ``folder`` for calls of these ``dtypes`` on this machine; ``seconds``: that
    it took, next to none where it was there."""

    pattern: Pattern
    dtypes: tuple[str, ...]
    folder: Path
    seconds: float

    def __str__(self) -> str:
        what = " and ".join(filter(None, [", ".join(self.dtypes[:-1]), self.dtypes[-1]]))
        return f"C++ for {what}, forward and backward, is ready after {seconds_text(self.seconds)}: {self.folder}"


def build_ahead(pattern: Pattern, dtype: str = "float32") -> CppBuild:
    """Compile all that calls of a static pattern on CPU will want on this machine, forward and backward.

    ``dtype``: float64 has libraries of its own; the others share theirs.

    Raises:
        UnsupportedError: no compiler, or it fails; or the pattern has no C++.
    """
    double = check_word("dtype", dtype, ("float32", "bfloat16", "float16", "float64")) == "float64"
    begin = time.perf_counter()
    source = cpp_source(pattern, CppVariant(double))
    begun(texts_of(source, ("forward", "backward"), double=double))
    native(source, double=double)
    fixed_pass("backward", double)
    parallel()
    dtypes = ("float64",) if double else ("float32", "bfloat16", "float16")
    return CppBuild(pattern, dtypes, settings().cache / "cpp", time.perf_counter() - begin)


@functools.cache
def fixed_width(name: str, double: bool) -> int:
    """Entries of a vector of the processor, to which gradients are padded."""
    return int(fixed_library(name, double).vector_width())


def address(function: object) -> int:
    """Where a function of a library lies."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0  # type: ignore[arg-type]


@functools.cache
def parallel() -> int:
    """``GOMP_parallel`` of the OpenMP that torch runs on, so that there is no second pool of threads.

    Raises:
        UnsupportedError: this torch has none.
    """
    found = sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))
    for path in found:
        try:
            return address(ctypes.CDLL(str(path)).GOMP_parallel)
        except (OSError, AttributeError):
            continue
    raise UnsupportedError("torch has no GNU OpenMP here, whose threads generated C++ runs on")
