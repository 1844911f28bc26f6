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
    - Each operation makes the type of its tile anew, shape, size and name, and each tile its shape: here equal ones share them.
    """
    from triton.language import core
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in _NAMES):
        yield
        return
    builder, language, numbers = interpreter.interpreter_builder, interpreter._patch_lang, interpreter._get_np_dtype
    options = builder.options
    types, tiles = core.block_type.__init__, core.tensor.__init__
    core.block_type.__init__, core.tensor.__init__ = _shared_types(types), _shared_shapes(tiles)
    interpreter._patch_lang, interpreter._get_np_dtype = _once(language), _remembered(numbers)
    if not options.debug:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        interpreter._patch_lang, interpreter._get_np_dtype, builder.options = language, numbers, options
        core.block_type.__init__, core.tensor.__init__ = types, tiles


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


def _shared_types(make: Callable[..., None]) -> Callable[..., None]:
    """``block_type.__init__``: what it makes of an element's type and a shape is made once a launch."""
    from triton.language.core import block_type, constexpr

    known: dict[tuple[Any, ...], block_type] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sides = getattr(shape, "values", shape)  # a tuple of the language, or of Python
        key = (id(element_ty), *[side.value if type(side) is constexpr else side for side in sides])
        one = known.get(key)
        if one is None:
            make(self, element_ty, shape)
            known[key] = self  # it holds the element's type, so that no other gets its id
        else:
            self.__dict__.update(one.__dict__)

    return init


def _shared_shapes(make: Callable[..., None]) -> Callable[..., None]:
    """``tensor.__init__``: the shape and size of a tile are made once for each object that is its type."""

    def init(self: Any, handle: Any, type: Any) -> None:
        parts = type.__dict__.get("_parts_of_tiles")
        if parts is None:
            make(self, handle, type)
            type._parts_of_tiles = {name: value for name, value in self.__dict__.items() if name != "handle"}
        else:
            self.__dict__.update(parts)
            self.handle = handle

    return init
