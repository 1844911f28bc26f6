"""What the passes of both recurrent kernels share: tile sizes, one launch, and the state from chunk to chunk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.backends.triton.attention import missing
from sparsedsl.backends.triton.launching import ALIGN, in_tiles, is_aligned, on, strided, tiles_contiguous
from sparsedsl.errors import UnsupportedError
from sparsedsl.gpu.loading import triton

__all__ = ["ScanTiles", "carried", "filled", "launch", "operands", "plain", "precision_of", "refuse"]

Tensor = torch.Tensor
# Numbers of a state that a program takes from chunk to chunk.
CARRIED = 1024
MOST = {"head_dim": 256, "the head_dim of v": 256, "the number of slots": 128}


@dataclass(frozen=True)
class ScanTiles:
    """How a scan is cut and launched: ``chunk`` positions between two states that are kept in memory, a multiple of ``block``, the rows
    that a program has at a time; ``columns`` of a state that a program holds; ``warps``."""

    chunk: int
    block: int
    columns: int
    warps: int


def refuse(what: str, q: Tensor, widths: Mapping[str, int], instead: str) -> None:
    """Raise for calls that the kernels cannot run.

    Raises:
        UnsupportedError: no Triton, a device without kernels, float64, or a width beyond what fits on a processor.
    """
    if q.dtype == torch.float64:
        raise UnsupportedError(f"{what}: states are float32, too coarse for float64 inputs; use {instead}")
    triton()
    lacking = missing(q.device.type)
    if lacking:
        raise UnsupportedError(f"{what}: {lacking}; use {instead}")
    for name, width in widths.items():
        if width > MOST[name]:
            raise UnsupportedError(f"{what}: {name} is {width}, the kernels hold at most {MOST[name]}; use {instead}")


def filled(width: int) -> int:
    """The number of columns of a tile that holds ``width``: the next power of two, 16 at least.

    >>> filled(3), filled(80)
    (16, 128)
    """
    return max(16, 1 << (width - 1).bit_length())


def precision_of(t: Tensor) -> str:
    """float16 and bfloat16 are exact in TF32; float32 is multiplied as it is, unless torch may use TF32."""
    tf32 = t.dtype != torch.float32 or (t.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32)
    return "tf32" if tf32 else "ieee"


def operands(**tensors: Tensor) -> dict[str, Any]:
    """Pointers and strides of tensors ``(B, H, S, width)`` as arguments, and what is known of their rows."""
    values: dict[str, Any] = {"ALIGN": ALIGN if is_aligned(*tensors.values()) else 1}
    for name, tensor in tensors.items():
        values |= strided(name, tensor)
    return values


def launch(kernel: Any, programs: int, values: Mapping[str, Any], *, warps: int) -> None:
    """Run a kernel on the current stream of the device of its tensors; of ``values`` it takes those that it names."""
    if not programs:
        return
    taken = {name: values[name] for name in kernel.arg_names}
    device = next(value.device for value in taken.values() if isinstance(value, Tensor))
    with on(device):
        kernel[(programs,)](**taken, num_warps=warps, num_stages=1)


def carried(kernel: Any, states: Tensor, factors: Tensor, initial: Tensor | None) -> Tensor:
    """Sums of chunks -> the states before them, in place; ``states`` (lines, chunks + 1, rows, width), the last at the end."""
    lines, chunks, elements = states.shape[0], states.shape[1] - 1, states.shape[2] * states.shape[3]
    per_chunk = factors.shape[2]
    values = {
        "states_ptr": states, "factors_ptr": factors, "initial_ptr": states if initial is None else initial.contiguous(),
        "chunks": chunks, "elements": elements, "FACTORS": per_chunk, "WIDTH": elements // per_chunk,
        "HAS_INITIAL": initial is not None, "BLOCK": CARRIED,
    }  # fmt: skip
    launch(kernel, lines * in_tiles(elements, CARRIED), values, warps=4)
    return states


def plain(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Detached, last dimension contiguous."""
    return tuple(tiles_contiguous(t.detach()) for t in tensors)
