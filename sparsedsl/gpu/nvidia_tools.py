"""The programs for NVIDIA's binaries that Triton brings along: ``cuobjdump``, ``ptxas`` and their like, run on a file of their own."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable

from sparsedsl.errors import UnsupportedError

__all__ = ["run_tool"]


def run_tool(name: str, content: bytes, suffix: str, options: Iterable[str]) -> str:
    """What the program ``name`` prints about a file that holds ``content``.

    Raises:
        UnsupportedError: Triton has no such program, or it fails; says which.
    """
    from triton import knobs

    try:
        with tempfile.NamedTemporaryFile(suffix=suffix) as file:
            file.write(content)
            file.flush()
            done = subprocess.run([getattr(knobs.nvidia, name).path, *options, file.name], capture_output=True, text=True)
    except (AttributeError, OSError, RuntimeError) as error:
        raise UnsupportedError(f"Triton's {name} cannot be run ({error}): it is needed to read what a kernel takes") from error
    if done.returncode:
        raise UnsupportedError(f"Triton's {name} fails with exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout + done.stderr
