"""``python -m sparsedsl build``: the GPU kernels of a pattern, without a GPU; or its C++ for this CPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparsedsl.errors import PatternError
from sparsedsl.working import count, print_json, working, written

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """\
examples:
  python -m sparsedsl build sparsedsl.patterns:causal --target sm_90 --head-dim 128
  python -m sparsedsl build my_patterns.py:packed --target gfx942 --dtype float16 --out kernels/packed
  python -m sparsedsl build my_patterns.py:local --source
  python -m sparsedsl build my_patterns.py:local --target cpu --json

Needs Triton, and no GPU; tables need no values. Compiles the forward, backward and decode kernels and prints what each
takes of an SM; --out also writes the binaries."""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of the command; SPEC is its caller's."""
    command.add_argument(
        "--target", default="sm_90",
        help="a GPU by name (A100, 'RTX 4090', MI300X) or architecture (sm_80, gfx942), or cpu: C++ for this machine (default sm_90)",
    )  # fmt: skip
    command.add_argument("--dtype", default="bfloat16", help="float16, bfloat16 or float32 (default bfloat16)")
    command.add_argument("--head-dim", type=count, default=64, metavar="N", help="width of a head (default 64)")
    command.add_argument("--head-dim-v", type=count, metavar="N", help="width of values (default: as --head-dim)")
    command.add_argument("--group", type=count, default=1, metavar="N", help="query heads a key head (default 1)")
    command.add_argument("--out", type=Path, metavar="FOLDER", help="write binaries, assembly, source and report.json there")
    command.add_argument("--remarks", action="store_true", help="also what NVIDIA's assembler says about speed")
    command.add_argument("--source", action="store_true", help="print the generated source before the report")
    command.add_argument("--json", action="store_true", help="print the report as JSON (docs/reports.md has its keys)")


def run(arguments: argparse.Namespace) -> int:
    """The command; the exit code. ``arguments.pattern`` is set by the caller."""
    return (_for_cpu if arguments.target == "cpu" else _for_gpu)(arguments, arguments.pattern)


def _for_gpu(arguments: argparse.Namespace, pattern: Any) -> int:
    import sparsedsl as sd

    names = ("target", "dtype", "head_dim", "head_dim_v", "group", "remarks")
    with working("compiling"):
        built = sd.build(pattern, **{name: getattr(arguments, name) for name in names})
    folder = written(arguments.out, built.save) if arguments.out else None
    _print(arguments, built, built.source)
    if folder and not arguments.json:
        print(folder)
    return 0


def _for_cpu(arguments: argparse.Namespace, pattern: Any) -> int:
    from sparsedsl.backends.cpp.libraries import build_ahead
    from sparsedsl.codegen.to_cpp import cpp_source

    if arguments.out or arguments.remarks:
        raise PatternError(
            "--target cpu: libraries lie in the cache folder, for this machine alone; leave out --out and --remarks"
        )
    with working("compiling"):
        done = build_ahead(pattern, "float32" if arguments.dtype == "bfloat16" else arguments.dtype)
    _print(arguments, done, cpp_source(pattern).text if arguments.source else "")
    return 0


def _print(arguments: argparse.Namespace, report: Any, source: str) -> None:
    """The source, if it is wanted, and the report."""
    if arguments.json:
        print_json({**report.to_dict(), **({"source": source} if arguments.source else {})})
        return
    if arguments.source:
        print(source)
    print(report)
