"""Generated Triton source -> binaries for a named target, without a device.

Triton decides when it is imported whether kernels are compiled or interpreted. Where they are interpreted (``TRITON_INTERPRET=1``), a child
process compiles.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
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
    from sparsedsl.codegen.to_triton import Argument, KernelSource, TritonSource

__all__ = ["TABLES", "Binary", "BuildJob", "compile_kernel", "compile_kernels", "is_interpreting", "job_of"]

_DATA = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
TABLES = {"int": "*i32", "bool": "*i1", "float": "*fp32"}
_PLAIN = {"*fp32", "*i32", "*i64", "*i1", "i32", "i64", "fp32", "constexpr"}


@dataclass(frozen=True)
class Binary:
    """One kernel, compiled. ``entry``: its name inside; ``extension``: "cubin" or "hsaco"; ``assembly``: PTX or AMD's."""

    entry: str
    extension: str
    content: bytes
    assembly: str
    resources: Resources


@dataclass(frozen=True)
class BuildJob:
    """One kernel to compile: module and name, type of each parameter, values of the constant ones, how, and for what."""

    text: str
    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    config: Config
    fp_fusion: bool
    target: Target


def job_of(source: TritonSource, kernel: KernelSource, shape: Shape, config: Config, target: Target) -> BuildJob:
    """What there is to compile, types spelled as Triton does.

    Raises:
        UnsupportedError: an argument whose type is known only at a call.

    >>> import sparsedsl as sd
    >>> from sparsedsl.codegen.to_triton import triton_source, variant_of
    >>> from sparsedsl.gpu.targets import TARGETS
    >>> pattern = sd.attend(sd.table("doc")[sd.q_idx] == sd.table("doc")[sd.kv_idx])
    >>> source = triton_source(pattern, variant_of(pattern))
    >>> job = job_of(source, source.kernel("forward"), Shape("bfloat16", 64, 64), Config(128, 64, 4, 3), TARGETS["sm_90"])
    >>> [job.signature[name] for name in ("q_ptr", "lse_ptr", "doc_table", "kv_len")]
    ['*bf16', '*fp32', '*i32', 'i32']
    """
    types = {argument.name: _type(source, kernel, argument, shape, config) for argument in kernel.arguments}
    fixed = constants(kernel, shape, config, target.backend)
    return BuildJob(source.text, kernel.name, types, fixed, config, source.fp_fusion, target)


def _type(source: TritonSource, kernel: KernelSource, argument: Argument, shape: Shape, config: Config) -> str:
    kind, _, detail = argument.type.partition(":")
    if kind == "*data":
        return _DATA[shape.dtype]
    if kind == "*table":
        return TABLES[source.table_kinds[detail]]
    if kind == "*desc":  # of tiles of keys, that many columns wide
        return f"tensordesc<{_DATA[shape.dtype].removeprefix('*')}[1,1,{config.block_n},{detail}]>"
    if argument.type not in _PLAIN:
        raise UnsupportedError(
            f"kernel {kernel.name!r}: argument {argument.name!r} has the type {argument.type!r}, which cannot be built without a call"
        )
    return argument.type


def compile_kernel(job: BuildJob) -> Any:
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
    aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(job.signature.values()) if kind.startswith("*")}
    source = ASTSource(load(job.text)[job.kernel], dict(job.signature), dict(job.constants), aligned)
    options = {"num_warps": job.config.warps, "num_stages": job.config.stages, "enable_fp_fusion": job.fp_fusion}
    device = GPUTarget(job.target.backend, job.target.arch, job.target.warp_size)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints the whole assembly if it cannot be assembled
            return compile_source(source, target=device, options=options)
    except Exception as error:  # of any kind, from any stage of the compiler
        reason = next(iter(str(error).strip().splitlines()[-1:]), "no reason given")
        raise UnsupportedError(
            f"Triton {version} cannot compile kernel {job.kernel!r} for {job.target.name} with {job.config}: "
            f"{type(error).__name__}: {reason}. Pass other tiles as configs={{{job.kernel!r}: Config(...)}}"
        ) from error


def compile_kernels(jobs: Iterable[BuildJob], *, remarks: bool = False) -> list[Binary]:
    """The binary of each job; from a child process if kernels are interpreted in this one.

    ``remarks``: as for :func:`~sparsedsl.gpu.resources.resources_of`.
    """
    if is_interpreting():
        return _in_child(list(jobs), remarks)
    found = []
    for job in jobs:
        compiled = compile_kernel(job)
        extension, assembly = ("hsaco", "amdgcn") if job.target.backend == "hip" else ("cubin", "ptx")
        needs = resources_of(compiled, remarks=remarks)
        found.append(Binary(compiled.metadata.name, extension, compiled.asm[extension], compiled.asm[assembly], needs))
    return found


def is_interpreting() -> bool:
    """Whether Triton runs kernels in Python here: new ones by the environment now, its own since it was imported."""
    return bool(load_triton().knobs.runtime.interpret) or interpreted()


def _in_child(jobs: list[BuildJob], remarks: bool) -> list[Binary]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    with tempfile.TemporaryDirectory(prefix="sparsedsl-build-") as folder:
        asked, answered = Path(folder, "jobs"), Path(folder, "answer")
        asked.write_bytes(pickle.dumps((jobs, remarks)))
        code = f"from sparsedsl.gpu.aot import answer; answer({str(asked)!r})"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        if not answered.exists():
            last = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise UnsupportedError(f"the process that compiles ended with exit status {done.returncode}: {last[0]}")
        found = pickle.loads(answered.read_bytes())
    if isinstance(found, str):
        raise UnsupportedError(found)
    return found


def answer(asked: str) -> None:
    """What the child process does: compile the jobs in a file, and write binaries, or what went wrong, beside it."""
    jobs, remarks = pickle.loads(Path(asked).read_bytes())
    found: Any
    try:
        found = compile_kernels(jobs, remarks=remarks)
    except UnsupportedError as error:
        found = str(error)
    Path(asked).with_name("answer").write_bytes(pickle.dumps(found))
