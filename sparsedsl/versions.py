"""What a report of a fault should say about the installation: ``sd.show_versions()``, and the data behind it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

__all__ = ["show_versions", "versions"]

# Distributions that have a part in what is computed or tested; of what is not installed None is said.
PACKAGES = (
    "torch", "triton", "sympy", "numpy", "z3-solver", "networkx", "transformers", "accelerate", "safetensors", "hypothesis", "pytest",
    "matplotlib",
)  # fmt: skip
# Instruction sets that generated code and torch's products are written for.
_SETS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
)


def versions() -> dict[str, Any]:
    """The installation as plain data, which ``json.dumps`` takes: versions, processor, threads, compiler, GPUs, settings.

    Loads torch, and nothing else that is heavy. What cannot be found out is None.

    >>> found = versions()
    >>> list(found)
    ['sparsedsl', 'python', 'system', 'packages', 'cpu', 'compiler', 'gpus', 'settings']
    >>> import json
    >>> json.loads(json.dumps(found)) == found
    True
    """
    from sparsedsl.backends.cpp.build import compiler, compiler_version

    path = compiler()
    return {
        "sparsedsl": sys.modules["sparsedsl"].__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "compiler": None if path is None else {"path": path, "version": compiler_version(path)[1] or None},
        "gpus": _gpus(),
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith("SPARSEDSL_")},
    }


def show_versions() -> None:
    """Print the versions of what takes part, the processor, threads, compiler and GPUs: what a report of a fault should begin with.

    >>> import sparsedsl as sd
    >>> sd.show_versions()  # doctest: +ELLIPSIS
    sparsedsl     ...
    python        ...
    """
    print(as_text(versions()))


def as_text(found: dict[str, Any]) -> str:
    """What :func:`versions` gives, a line a fact.

    >>> print(as_text({"sparsedsl": "1", "packages": {"torch": "2", "triton": None}, "gpus": [], "compiler": None}))
    sparsedsl     1
    torch         2
    triton        not installed
    GPU           none
    compiler      none
    """
    lines: list[tuple[str, Any]] = []
    for name, value in found.items():
        match name, value:
            case "packages", dict():
                lines += [(package, version or "not installed") for package, version in value.items()]
            case "cpu", dict():
                lines.append(("CPU", f"{value['model'] or 'unknown'}, {value['cores']} cores"))
                lines.append(
                    ("instructions", f"{' '.join(value['instructions']) or 'unknown'}; torch uses {value['torch_uses']}")
                )
                lines.append(("threads", f"{value['threads']} of torch"))
            case "compiler", dict():
                lines.append(("compiler", f"{value['path']}: {value['version'] or 'version unknown'}"))
            case "gpus", [*some]:
                lines += [("GPU", f"{gpu['name']}, {gpu['memory_gib']} GiB, {gpu['architecture']}") for gpu in some] or [
                    ("GPU", "none")
                ]
            case "settings", dict():
                lines += value.items()
            case _:
                lines.append((name, "none" if value is None else value))
    return "\n".join(f"{name:13} {value}" for name, value in lines)


def _version(package: str) -> str | None:
    if package in sys.modules and hasattr(sys.modules[package], "__version__"):
        return str(sys.modules[package].__version__)  # with what was built in, as "+cpu"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    from sparsedsl.backends.cpp.build import processor

    machine, *facts = processor()
    known = dict(fact.split("=", 1) for fact in facts)
    flags = set(known.get("flags", known.get("Features", "")).split())
    return {
        "model": known.get("model name") or platform.processor() or None,
        "machine": machine,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": [name for name in _SETS if name in flags],
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [
        {
            "name": one.name,
            "architecture": getattr(one, "gcnArchName", None) or f"sm_{one.major}{one.minor}",
            "memory_gib": round(one.total_memory / 2**30, 1),
            "runtime": f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}",
        }
        for one in found
    ]
