"""A program of a few lines in which a kernel fails again."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import torch

from sparsedsl.testing.call_shapes import tensor_code
from sparsedsl.testing.counterexamples import pattern_code
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.kernel_case import KernelCase

__all__ = ["declaring", "kernel_snippet"]


def kernel_snippet(kernel: Kernel, name: str, case: KernelCase, tables: dict[str, Any] | None = None) -> str:
    """Code that runs one property of a kernel on one case; where the kernel cannot be imported, a line to fill in says so."""
    lines = ["import torch", "", "import sparsedsl as sd", *declaring(kernel)]
    drawn = "".join(f", {word}={tensor_code(value)}" for word, value in (tables or {}).items())
    lines.append(f"case = sd.testing.{case!r}")
    lines.append(f"sd.testing.assert_kernel(kernel, case, only={name!r}{drawn})")
    return "\n".join(lines) + "\n"


def declaring(kernel: Kernel) -> list[str]:
    """Lines that bind ``kernel``."""
    lines = [*_function(kernel.fn), ""]
    if kernel.is_program:
        text = f'"""\n{kernel.implements.text}\n"""'
        lines += ["from sparsedsl.program.program_text import read_program", f"pattern = read_program({text})"]
    else:
        lines.append(f"pattern = {pattern_code(kernel.implements)}")
    given = kernel.given.items()
    words = "".join(f", {word}={_code(value)}" for word, value in given if word != "refuses" or _plain(value))
    return [*lines, f"kernel = sd.testing.Kernel(fn, implements=pattern{words})"]


def _code(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_code, value))}{',' * (len(value) == 1)})"
    return repr(value)


def _plain(value: Any) -> bool:
    several = value if isinstance(value, (tuple, list)) else (value,)
    return all(kind.__module__ == "builtins" for kind in several)


def _function(fn: Any) -> list[str]:
    """Lines that bind ``fn``."""
    name, module = getattr(fn, "__qualname__", ""), getattr(fn, "__module__", None) or ""
    found: Any = sys.modules.get(module)
    for part in name.split(".") if name else ():
        found = getattr(found, part, None)
    if found is fn and fn is not None and module != "__main__":
        return _imported(module, name)
    file = _file(fn)
    where = f", of {file}" if file else ""
    plain = re.fullmatch(r"[A-Za-z_]\w*", name)
    if module == "__main__" and plain and found is fn and file:
        return ["import runpy", f"fn = runpy.run_path({file!r}, run_name='kernels')[{name!r}]"]
    return [f"fn = ...  # put your kernel here: {name or type(fn).__name__}{where}"]


def _imported(module: str, name: str) -> list[str]:
    first, *rest = name.split(".")
    lines = [f"from {module} import {first}", f"fn = {'.'.join([first, *rest])}"]
    spec = getattr(sys.modules[module], "__spec__", None)
    file = getattr(sys.modules[module], "__file__", None)
    if "." in module or file is None or (spec is not None and importlib.util.find_spec(module.split(".")[0]) is None):
        return lines
    folder = str(Path(file).resolve().parent)
    if "site-packages" in folder or "lib/python" in folder:
        return lines
    return ["import sys", f"sys.path.insert(0, {folder!r})", *lines]


def _file(fn: Any) -> str:
    try:
        return inspect.getfile(inspect.unwrap(fn))
    except (TypeError, OSError):
        return ""
