"""Where tensors lie: in a buffer of their own, with guards before, behind and between their rows, in one of several layouts.

A kernel that reads past a tensor reads the guard; one that writes past it changes the guard, whose bytes are compared afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["GUARDS", "LAYOUTS", "Placed", "place"]

Tensor = torch.Tensor

LAYOUTS = {
    "packed": "contiguous",
    "turned": "heads and rows swapped in memory",
    "padded": "rows further apart than they are wide",
    "expanded": "every batch entry the same memory (stride 0)",
    "every second": "the last stride is 2",
    "odd": "contiguous, beginning at an odd element",
}
# What guards hold, in turn; of whole numbers the second list.
GUARDS = (float("nan"), float("inf"), 1e30, -1.0)
_WHOLE_GUARDS = (1 << 30, -1, 1 << 30, -1)
_BYTES = 4096


@dataclass(frozen=True)
class Placed:
    """A tensor in a guarded buffer. ``inside``: which elements of the buffer are its own."""

    tensor: Tensor
    buffer: Tensor
    before: Tensor
    inside: Tensor

    @property
    def guards_hold(self) -> bool:
        """Whether no byte outside the tensor was changed."""
        return bool((_bytes(self.buffer) == self.before)[~self.inside].all())

    @property
    def unchanged(self) -> bool:
        """Whether no byte of the tensor itself was changed."""
        return bool((_bytes(self.buffer) == self.before)[self.inside].all())


def place(
    values: Tensor, memory: str = "packed", *, guard: int = 0, margin: int = 0, turned: bool = False, device: str = "cpu"
) -> Placed:
    """A copy of ``values`` among guards.

    Args:
        values: ``(batch, heads, length, width)`` for the layouts; tables of any shape lie packed.
        memory: one of ``LAYOUTS``.
        guard: which of ``GUARDS``.
        margin: how many elements a guard has at least.
        turned: the kernel wants (batch, length, heads, width), so that this is what lies packed.
        device: where the buffer lies in the end.
    """
    four = values.ndim == 4
    if turned and four and memory in ("packed", "turned", "odd"):
        memory = {"packed": "turned", "turned": "packed", "odd": "turned odd"}[memory]
    strides, shift = _strides(values, memory if four else "packed")
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) if values.numel() else 0
    edge = max(_BYTES // values.element_size(), margin)
    edge = (edge * values.element_size() + 255) // 256 * 256 // values.element_size()
    buffer = torch.empty(2 * edge + span + shift, dtype=values.dtype)
    _fill(buffer, guard)
    inside = torch.zeros(len(buffer), dtype=torch.bool)
    if values.numel():
        once = (values[:1] if memory == "expanded" and four else values).detach()
        for target, content in ((buffer, once), (inside, torch.ones_like(once, dtype=torch.bool))):
            target.as_strided(once.shape, strides, edge + shift).copy_(content)
    before = _bytes(buffer).clone()
    buffer = buffer.to(device)
    view = buffer.as_strided(values.shape, strides, edge + shift)
    return Placed(view, buffer, before, inside.repeat_interleave(values.element_size()))


def _strides(values: Tensor, memory: str) -> tuple[tuple[int, ...], int]:
    """Strides, and by how many elements the first is late."""
    shape = values.shape
    if values.ndim != 4:
        return torch.empty(shape, device="meta").stride(), 0
    _, heads, length, width = shape
    packed = (heads * length * width, length * width, width, 1)
    match memory:
        case "turned" | "turned odd":
            return (heads * length * width, width, heads * width, 1), int(memory != "turned")
        case "padded":
            row = width + 5
            return (heads * length * row, length * row, row, 1), 0
        case "expanded":
            return (0, *packed[1:]), 0
        case "every second":
            return (2 * packed[0], 2 * packed[1], 2 * packed[2], 2), 0
    return packed, int(memory == "odd")


def _fill(buffer: Tensor, guard: int) -> None:
    if buffer.is_floating_point():
        info = torch.finfo(buffer.dtype)
        content = GUARDS[guard % len(GUARDS)]
        buffer.fill_(min(content, info.max) if content == 1e30 else content)
    elif buffer.dtype == torch.bool:
        buffer.fill_(True)
    else:
        buffer.fill_(_WHOLE_GUARDS[guard % len(_WHOLE_GUARDS)])


def _bytes(buffer: Tensor) -> Tensor:
    return buffer.cpu().view(torch.uint8)
