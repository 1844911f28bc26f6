"""Launching generated kernels: arguments by name, constants of a compile, one grid axis."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from sparsedsl.codegen.to_triton import TritonSource
from sparsedsl.gpu.configs import Config, Shape, constants
from sparsedsl.gpu.interpreter import quick_interpreter
from sparsedsl.gpu.loading import interpreted, load

__all__ = [
    "described",
    "has_descriptors",
    "in_tiles",
    "is_aligned",
    "launch",
    "like",
    "on",
    "row_offsets_end",
    "rows_contiguous",
    "strided",
    "tensor_arguments",
    "tiles_contiguous",
]

# Elements that strides must be a multiple of for 16-byte loads of the smallest type.
ALIGN = 8
# Rows of the tallest tile of a kernel that no pattern changes.
MOST_TILE_ROWS = 256


def launch(
    source: TritonSource,
    name: str,
    programs: int,
    values: Mapping[str, Any],
    shape: Shape,
    config: Config,
    *,
    dry: bool = False,
    **more: Any,
) -> Any:
    """Run one kernel on the current stream of the device of its tensors; Triton's compiled kernel.

    ``dry``: only compile it. ``more``: constants beyond those of the config.
    """
    kernel = source.kernel(name)
    fixed = constants(kernel, shape, config, "hip" if torch.version.hip else "cuda") | more
    if kernel.blocks is not None and values.get("q_offset", 0) % kernel.blocks[0] and "BLOCK_WISE" in fixed:
        fixed["BLOCK_WISE"] = False
    arguments = [values[argument.name] for argument in kernel.arguments if argument.type != "constexpr"]
    options: dict[str, Any] = {"num_warps": config.warps, "num_stages": config.stages}
    if not source.fp_fusion:
        options["enable_fp_fusion"] = False
    device = next(value.device for value in arguments if isinstance(value, torch.Tensor))
    with on(device):
        kernel_function = load(source.text)[name]
        if dry:
            return kernel_function.warmup(*arguments, **fixed, **options, grid=(programs,))
        return kernel_function[(programs,)](*arguments, **fixed, **options)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Where a kernel is launched: Triton takes the current device, whichever the tensors are on. Those on CPU are for its interpreter."""
    return torch.cuda.device(device) if device.type == "cuda" else quick_interpreter()


def has_descriptors(t: torch.Tensor) -> bool:
    """Whether a tensor descriptor can describe ``t (B, H, S, D)``: aligned, and no number stands for several."""
    return is_aligned(t) and t.stride(-1) == 1 and 0 not in t.stride()


def described(source: TritonSource, name: str, values: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Tensor descriptors of k and v as the kernel's arguments: tiles of ``block_n`` rows."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    found = {}
    for argument in source.kernel(name).arguments:
        kind, _, width = argument.type.partition(":")
        if kind == "*desc":
            t = values[f"{argument.name[0]}_ptr"]
            found[argument.name] = TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, config.block_n, int(width)])
    return found


def strided(name: str, t: torch.Tensor) -> dict[str, Any]:
    """Pointer and strides of a tensor ``(B, H, S, D)`` as arguments."""
    return {
        f"{name}_ptr": t, f"{name}_stride_b": t.stride(0), f"{name}_stride_h": t.stride(1), f"{name}_stride_row": t.stride(2),
    }  # fmt: skip


def row_offsets_end(arguments: Mapping[str, Any]) -> int:
    """What no offset of a row reaches, in numbers from the row 0 of its head: the most over all tensors that :func:`strided` gave.

    >>> row_offsets_end(strided("q", torch.zeros(1, 2, 40, 16)) | {"rows": 40})
    640
    """
    of_rows = "_stride_row"
    names = [name.removesuffix(of_rows) for name in arguments if name.endswith(of_rows)]
    return max((arguments[f"{name}_ptr"].shape[-2] * arguments[name + of_rows] for name in names), default=0)


def rows_contiguous(t: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy whose last dimension is contiguous."""
    return t if t.stride(-1) == 1 else t.contiguous()


def tiles_contiguous(t: torch.Tensor) -> torch.Tensor:
    """:func:`rows_contiguous`, or a copy whose rows lie so close that kernels may count the numbers of one tile in 32 bits."""
    t = rows_contiguous(t)
    return t if t.stride(2) * MOST_TILE_ROWS < 1 << 31 else t.contiguous()


def in_tiles(length: int, side: int) -> int:
    """How many tiles of ``side`` a length has; the last may be ragged."""
    return -(-length // side)


def is_aligned(*tensors: torch.Tensor) -> bool:
    """Whether all rows of all tensors begin at multiples of 16 bytes."""
    return all(
        t.data_ptr() % 16 == 0 and all(s % ALIGN == 0 for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1)
        for t in tensors
    )


def tensor_arguments(tables: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Tables as arguments: contiguous, with their sizes."""
    values: dict[str, Any] = {}
    for name, table in tables.items():
        table = table.detach().contiguous()
        # Triton's interpreter has no booleans in memory.
        values[f"{name}_table"] = table.to(torch.int8) if table.dtype == torch.bool and interpreted() else table
        values |= {f"{name}_size_{i}": size for i, size in enumerate(table.shape)}
    return values


def like(t: torch.Tensor, width: int | None = None) -> torch.Tensor:
    """A new tensor whose dimensions lie in memory in the order of ``t``'s, of another width if one is given."""
    strides = t.stride()
    order = sorted(range(3), key=lambda dim: -strides[dim])
    made = t.new_empty([t.shape[dim] for dim in order] + [t.shape[3] if width is None else width])
    return made.permute(*(order.index(dim) for dim in range(3)), 3)
