"""Shapes of tensors that broadcast against each other."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["joined_shape"]


def joined_shape(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape that tensors of these shapes broadcast to; they are known to fit.

    ``torch.broadcast_shapes`` says the same at the price of about eighty Python calls, since it also serves shapes that are symbols.

    >>> joined_shape((4, 1, 3), (2, 1), ())
    (4, 2, 3)
    """
    joined: list[int] = []
    for shape in shapes:
        missing = len(shape) - len(joined)
        if missing > 0:
            joined[:0] = [1] * missing
        for place, size in enumerate(shape, len(joined) - len(shape)):
            if size != 1:
                joined[place] = size
    return tuple(joined)
