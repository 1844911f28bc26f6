"""What attention over picked chunks checks of its lists and weights; nothing here reads what they hold, or waits for a device."""

from __future__ import annotations

import math

import torch

from sparsedsl.errors import PatternError, ShapeError, UnsupportedError
from sparsedsl.selection.selected import Picks

__all__ = ["check_one", "check_picks", "check_weights"]

Tensor = torch.Tensor


def check_picks(picks: Picks, q: Tensor, k: Tensor) -> None:
    """That there is a list for each query, over the chunks of ``k``.

    Raises:
        ShapeError: another number of queries, heads or chunks, or another device.
        UnsupportedError: lists are for more than one query each.
    """
    if picks.q_unit != 1:
        raise UnsupportedError(
            f"attention along lists wants a list for each query, q_unit 1; got q_unit {picks.q_unit}. "
            "Lists for blocks of queries are a block mask: run them on backend='tiled' or 'flex'"
        )
    shape, units = tuple(picks.indices.shape), math.ceil(k.shape[2] / picks.kv_unit)
    if len(shape) != 4 or shape[0] not in (1, q.shape[0]) or shape[2] != q.shape[2] or not shape[1] or q.shape[1] % shape[1]:
        raise ShapeError(
            f"picks.indices must be (B or 1, Hs, Sq, W) with Hs a divisor of the query heads; got {shape} for q {tuple(q.shape)}"
        )
    if picks.indices.device != q.device:
        raise ShapeError(f"picks.indices is on {picks.indices.device}, q on {q.device}; move it")
    if picks.units != units:
        raise ShapeError(
            f"{k.shape[2]} keys are {units} chunks of {picks.kv_unit}; got picks of {picks.units} chunks. "
            "Choose among the keys that are passed"
        )


def check_weights(weights: Tensor, picks: Picks, q: Tensor) -> None:
    """That there is a float for each slot of each query, of heads that divide those of q.

    Raises:
        ShapeError: another shape, dtype or device.
    """
    shape, wanted = tuple(weights.shape), (q.shape[0], q.shape[2], picks.indices.shape[3])
    if len(shape) != 4 or (shape[0], *shape[2:]) != wanted or not shape[1] or q.shape[1] % shape[1]:
        raise ShapeError(
            f"weights must be (B, Hw, Sq, W) = ({wanted[0]}, Hw, {wanted[1]}, {wanted[2]}) with Hw a divisor of the "
            f"{q.shape[1]} query heads; got {shape}"
        )
    if not weights.is_floating_point() or weights.device != q.device:
        raise ShapeError(f"weights must be floats on {q.device}; got {weights.dtype} on {weights.device}")


def check_one(one: object) -> None:
    """That ``one`` is True or False; PatternError otherwise."""
    if not isinstance(one, bool):
        raise PatternError(f"one must be True or False; got {one!r}")
