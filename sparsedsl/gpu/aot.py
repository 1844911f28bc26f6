"""Generated Triton source -> binaries for a named target, without a device.

Triton decides when it is imported whether kernels are compiled or interpreted. Where they are interpreted (``TRITON_INTERPRET=1``), a child
process compiles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsedsl.errors import UnsupportedError
from sparsedsl.gpu.configs import constants
from sparsedsl.gpu.kernel_config import Config, Shape
from sparsedsl.gpu.loading import interpreted, load
from sparsedsl.gpu.loading import triton as load_triton
from sparsedsl.gpu.resources import Resources, resources_of
from sparsedsl.gpu.targets import Target

if TYPE_CHECKING:
    from sparsedsl.codegen.to_triton import KernelSource, TritonSource

__all__ = ["Binary", "compile_kernel", "compile_kernels", "is_interpreting", "signature"]

_DATA = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
_TABLES = {"int": "*i32", "bool": "*i1", "float": "*fp32"}
_PLAIN = {"*fp32", "*i32", "*i64", "*i1", "i32", "i64", "fp32", "constexpr"}


@dataclass(frozen=True)
class Binary:
    """One kernel, compiled. ``entry``: its name inside; ``extension``: "cubin" or "hsaco"; ``assembly``: PTX or AMD's."""

    entry: str
    extension: str
    content: bytes
    assembly: str
    resources: Resources


def signature(source: TritonSource, kernel: KernelSource, dtype: str) -> dict[str, str]:
    """Parameter -> type as Triton spells it, for data of ``dtype``.

    >>> from sparsedsl.codegen.to_triton import Argument, KernelSource, TritonSource
    >>> arguments = (Argument("q", "*data"), Argument("doc", "*table:doc"), Argument("q_len", "i32"), Argument("BLOCK_M", "constexpr"))
    >>> kernel = KernelSource("forward", arguments, "an example")
    >>> signature(TritonSource("", (kernel,), {"doc": "int"}), kernel, "bfloat16")
    {'q': '*bf16', 'doc': '*i32', 'q_len': 'i32', 'BLOCK_M': 'constexpr'}
    """
    return {argument.name: _type(source, kernel, argument.name, argument.type, dtype) for argument in kernel.arguments}


def _type(source: TritonSource, kernel: KernelSource, name: str, kind: str, dtype: str) -> str:
    if kind == "*data":
        return _DATA[dtype]
    if kind.startswith("*table:"):
        return _TABLES[source.table_kinds[kind.removeprefix("*table:")]]
    if kind not in _PLAIN:
        raise UnsupportedError(
            f"kernel {kernel.name!r}: argument {name!r} has the type {kind!r}, which cannot be built without a call"
        )
    return kind


def compile_kernel(source: TritonSource, kernel: KernelSource, shape: Shape, config: Config, target: Target) -> Any:
    """Triton's ``CompiledKernel``, compiled in this process. Pointers are taken to be multiples of 16 bytes, as torch's are.

    Raises:
        UnsupportedError: no Triton, kernels are interpreted in this process, or Triton cannot compile this one; says why.
    """
    version = load_triton().__version__
    from triton import compile as compile_source
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if is_interpreting():
        raise UnsupportedError(
            "kernels are interpreted in this process (TRITON_INTERPRET=1): compile in one without that variable"
        )
    types = signature(source, kernel, shape.dtype)
    aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(types.values()) if kind.startswith("*")}
    job = ASTSource(load(source.text)[kernel.name], types, constants(kernel, shape, config), aligned)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": source.fp_fusion}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints the whole assembly if it cannot be assembled
            return compile_source(job, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options)
    except Exception as error:  # of any kind, from any stage of the compiler
        reason = next(iter(str(error).strip().splitlines()[-1:]), "no reason given")
        raise UnsupportedError(
            f"Triton {version} cannot compile kernel {kernel.name!r} for {target.name} with {config}: "
            f"{type(error).__name__}: {reason}. Pass other tiles as configs={{{kernel.name!r}: Config(...)}}"
        ) from error


def compile_kernels(
    source: TritonSource, configs: Mapping[str, Config], shape: Shape, target: Target, *, remarks: bool = False
) -> dict[str, Binary]:
    """Every kernel of ``source``, by name; in a child process if kernels are interpreted in this one.

    ``configs``: one for each kernel. ``remarks``: as for :func:`~sparsedsl.gpu.resources.resources_of`.
    """
    if is_interpreting():
        return _in_child(source, dict(configs), shape, target, remarks)
    found = {}
    for kernel in source.kernels:
        compiled = compile_kernel(source, kernel, shape, configs[kernel.name], target)
        extension, assembly = ("hsaco", "amdgcn") if target.backend == "hip" else ("cubin", "ptx")
        found[kernel.name] = Binary(
            compiled.metadata.name,
            extension,
            compiled.asm[extension],
            compiled.asm[assembly],
            resources_of(compiled, remarks=remarks),
        )
    return found


def is_interpreting() -> bool:
    """Whether Triton runs kernels in Python here: new ones by the environment now, its own since it was imported."""
    return bool(load_triton().knobs.runtime.interpret) or interpreted()


def _in_child(source: TritonSource, configs: dict[str, Config], shape: Shape, target: Target, remarks: bool) -> dict[str, Binary]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    plain = dataclasses.replace(
        source, table_kinds=dict(source.table_kinds), prepared=()
    )  # what compiling needs, and pickle can write
    with tempfile.TemporaryDirectory(prefix="sparsedsl-build-") as folder:
        job = Path(folder, "job")
        job.write_bytes(pickle.dumps((plain, configs, shape, target, remarks)))
        code = f"from sparsedsl.gpu.aot import answer; answer({str(job)!r})"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        answered = Path(folder, "answer")
        if not answered.exists():
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise UnsupportedError(f"the process that compiles ended with exit status {done.returncode}: {last[0]}")
        found = pickle.loads(answered.read_bytes())
    if isinstance(found, UnsupportedError):
        raise found
    return found


def answer(job: str) -> None:
    """What the child process does: compile the job in a file, and write binaries, or the error, beside it."""
    source, configs, shape, target, remarks = pickle.loads(Path(job).read_bytes())
    found: Any
    try:
        found = compile_kernels(source, configs, shape, target, remarks=remarks)
    except UnsupportedError as error:
        found = UnsupportedError(str(error))
    Path(job).with_name("answer").write_bytes(pickle.dumps(found))
