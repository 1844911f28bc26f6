"""Triton's interpreter without what it works out and throws away: kernels take less than half the time, and give the same bits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["quick_interpreter"]

# Of Triton's module: they are no part of what it promises.
_NAMES = ("_get_np_dtype", "_patch_lang", "interpreter_builder")


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """One launch of a kernel, interpreted. Where Triton has not the names that this needs, it runs as it is.

    - Sums and products of integers are made a second time in 64 bits, to see whether they overflow; what that says is dropped unless the
      interpreter's option ``debug`` is on. Here it is not asked.
    - Functions that a kernel calls each replace all of the language by interpreted functions again: here only the first does.
    - numpy's type for a type of the language is looked up in a new dictionary each time: here it is remembered.
    """
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in _NAMES):
        yield
        return
    builder, language, numbers = interpreter.interpreter_builder, interpreter._patch_lang, interpreter._get_np_dtype
    options = builder.options
    interpreter._patch_lang, interpreter._get_np_dtype = _once(language), _remembered(numbers)
    if not options.debug:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        interpreter._patch_lang, interpreter._get_np_dtype, builder.options = language, numbers, options


def _once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``patch`` for the first function of those that see the same modules of the language; the kernel itself is the first of all."""
    import triton.language as tl

    seen: set[frozenset[int]] = set()

    def patched(function: Any) -> Any:
        modules = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
        if modules in seen:
            return None
        seen.add(modules)
        return patch(function)

    return patched


@functools.cache
def _remembered(numpy_type: Callable[[Any], Any]) -> Callable[[Any], Any]:
    import triton.language as tl

    known = functools.cache(numpy_type)
    return lambda kind: known(kind) if type(kind) is tl.dtype else numpy_type(kind)
