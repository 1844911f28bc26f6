"""What attention over picked chunks checks of its lists and weights; nothing here reads what they hold, or waits for a device."""

from __future__ import annotations

import math

import torch

from sparsedsl.errors import PatternError, ShapeError, UnsupportedError
from sparsedsl.selection.selected_blocks import SelectedBlocks
from sparsedsl.selection.selected_call import SelectedCall

__all__ = ["check_selected_blocks", "check_selected_call", "check_softmax1", "check_weights"]

Tensor = torch.Tensor


def check_selected_blocks(selected: SelectedBlocks, q: Tensor, k: Tensor) -> None:
    """That there is a list for each query, over the chunks of ``k``.

    Raises:
        ShapeError: another number of queries, heads or chunks, or another device.
        UnsupportedError: lists are for more than one query each.
    """
    if selected.q_block != 1:
        raise UnsupportedError(
            f"attention along lists wants a list for each query, q_block 1; got q_block {selected.q_block}. "
            "Lists for blocks of queries are a block mask: run them on backend='tiled' or 'flex'"
        )
    shape, blocks = tuple(selected.indices.shape), math.ceil(k.shape[2] / selected.kv_block)
    if len(shape) != 4 or shape[0] not in (1, q.shape[0]) or shape[2] != q.shape[2] or not shape[1] or q.shape[1] % shape[1]:
        raise ShapeError(
            f"selected.indices must be (B or 1, Hs, Sq, W) with Hs a divisor of the query heads; got {shape} for q {tuple(q.shape)}"
        )
    if selected.indices.device != q.device:
        raise ShapeError(f"selected.indices is on {selected.indices.device}, q on {q.device}; move it")
    if selected.blocks != blocks:
        raise ShapeError(
            f"{k.shape[2]} keys are {blocks} chunks of {selected.kv_block}; got selected blocks of {selected.blocks} chunks. "
            "Choose among the keys that are passed"
        )


def check_weights(weights: Tensor, selected: SelectedBlocks, q: Tensor) -> None:
    """That there is a float for each slot of each query, of heads that divide those of q.

    Raises:
        ShapeError: another shape, dtype or device.
    """
    shape, wanted = tuple(weights.shape), (q.shape[0], q.shape[2], selected.indices.shape[3])
    if len(shape) != 4 or (shape[0], *shape[2:]) != wanted or not shape[1] or q.shape[1] % shape[1]:
        raise ShapeError(
            f"weights must be (B, Hw, Sq, W) = ({wanted[0]}, Hw, {wanted[1]}, {wanted[2]}) with Hw a divisor of the "
            f"{q.shape[1]} query heads; got {shape}"
        )
    if not weights.is_floating_point() or weights.device != q.device:
        raise ShapeError(f"weights must be floats on {q.device}; got {weights.dtype} on {weights.device}")


def check_softmax1(value: object) -> None:
    """That ``softmax1`` is True or False; PatternError otherwise."""
    if not isinstance(value, bool):
        raise PatternError(f"softmax1 must be True or False; got {value!r}")


def check_selected_call(selected: SelectedCall, q: torch.Tensor, k: torch.Tensor) -> None:
    """Whether lists, weights and flags fit ``q`` and ``k``, and lists hold blocks that are there, which is read on the host.

    Raises:
        ShapeError: they do not. UnsupportedError: lists are for more than one query each.
    """
    check_selected_blocks(selected.blocks, q, k)
    largest = int(selected.blocks.indices.max()) if selected.blocks.indices.numel() else -1
    if largest >= selected.blocks.blocks:
        raise ShapeError(
            f"selected blocks hold chunk {largest}, and there are {selected.blocks.blocks}. Choose among the keys that are passed"
        )
    if selected.weights is not None:
        check_weights(selected.weights, selected.blocks, q)
    check_softmax1(selected.softmax1)
