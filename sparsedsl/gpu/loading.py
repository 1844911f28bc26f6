"""Generated Triton text -> kernels that can be launched or compiled. Triton reads the text of a kernel back, as a debugger would."""

from __future__ import annotations

import functools
import hashlib
import linecache
import types
from typing import Any

from sparsedsl.errors import MissingPackageError

__all__ = ["interpreted", "load", "triton"]


def triton() -> types.ModuleType:
    """The package, or :class:`UnsupportedError` that says how to get it."""
    try:
        import triton
    except ImportError as error:
        raise MissingPackageError("backend 'triton' (Linux; backend='tiled' runs everywhere)", "triton", "triton") from error
    return triton


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 was set when triton was imported."""
    triton()
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    return not isinstance(tl.sum, JITFunction)


@functools.lru_cache(maxsize=256)
def load(text: str) -> dict[str, Any]:
    """The functions that the module ``text`` defines, by name."""
    triton()
    name = f"<sparsedsl {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    # No time of change: linecache then never looks for a file.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    module = types.ModuleType(name)
    module.__file__ = name
    exec(compile(text, name, "exec"), module.__dict__)
    return {key: value for key, value in vars(module).items() if not key.startswith("__")}
