"""Named axes. An axis is a word; ``keys/64`` counts blocks of 64 keys, the last one possibly ragged; ``keys/32+16`` windows of 32 keys, one
every 16, of which all are complete."""

from __future__ import annotations

import functools
import operator
import re

from sparsedsl.errors import PatternError

__all__ = [
    "GATED_HEADS",
    "HEADS",
    "KNOWN",
    "base_of",
    "block_of",
    "check_axes",
    "complete_on",
    "in_blocks",
    "join_heads",
    "rows_on",
    "windows_of",
]

# Axes whose sizes a call knows from q, k and v. Any other word is a size of its own, the same wherever the word stands.
KNOWN = ("batch", "heads", "kv_heads", "value_heads", "queries", "keys", "head_dim", "value_dim")
HEADS = ("heads", "kv_heads", "one")
# Those that decays and write rules may have: values may have heads of their own number.
GATED_HEADS = ("one", "kv_heads", "heads", "value_heads")
_AXIS = re.compile(r"[a-z][a-z0-9_]*(/[1-9][0-9]*(\+[1-9][0-9]*)?)?")


def check_axes(function: str, axes: object) -> tuple[str, ...]:
    """``"batch heads keys/64"`` as a tuple of axes, each written rightly and named once."""
    words = axes.split() if isinstance(axes, str) else None
    if not words or not all(_AXIS.fullmatch(word) or word.isdecimal() for word in words):
        raise PatternError(
            f"{function}: axes must be words such as 'batch kv_heads keys/64 retrieval_dim', where / counts blocks of so many tokens, and "
            f"keys/32+16 windows of 32, one every 16; got {axes!r}"
        )
    for word in words:
        if "/" in word and base_of(word) not in ("queries", "keys"):
            raise PatternError(f"{function}: only queries and keys come in blocks; got {word!r}")
        if "+" in word and (base_of(word) != "keys" or operator.gt(*reversed(windows_of(word) or (1, 1)))):
            raise PatternError(
                f"{function}: windows are of keys, and begin at least once in their length, keys/32+16; got {word!r}"
            )
        if word.isdecimal() and int(word) < 1:
            raise PatternError(f"{function}: an axis must have at least size 1; got {word!r}")
    named = [word for word in words if not word.isdecimal()]
    if len(set(named)) != len(named):
        raise PatternError(f"{function}: an axis is named twice in {axes!r}")
    return tuple(words)


@functools.cache
def base_of(axis: str) -> str:
    """``keys/64`` -> ``keys``."""
    return axis.partition("/")[0]


@functools.cache
def block_of(axis: str) -> int:
    """Tokens in one row of the axis: ``keys/64`` -> 64, ``keys`` -> 1.

    Raises:
        PatternError: it counts windows, which overlap: no token has one row alone.
    """
    if "+" in axis:
        raise PatternError(
            f"{axis!r} counts windows that overlap, and no blocks of tokens: attend to windows themselves, or make scores of blocks of "
            "them, scores.softmax(...).overlap(64)"
        )
    return int(axis.partition("/")[2] or 1)


@functools.cache
def windows_of(axis: str) -> tuple[int, int] | None:
    """``keys/32+16`` -> 32 tokens in a window, 16 from one to the next; None for blocks side by side."""
    length, plus, stride = axis.partition("/")[2].partition("+")
    return (int(length), int(stride)) if plus else None


def rows_on(axis: str, tokens: int) -> int:
    """How many rows an axis has for so many tokens: a ragged last block counts, an incomplete window does not.

    >>> rows_on("keys/16", 70), rows_on("keys/8+4", 70), rows_on("keys/8+4", 7), rows_on("keys", 70)
    (5, 16, 0, 70)
    """
    windows = windows_of(axis)
    if windows is None:
        return -(-tokens // block_of(axis))
    length, stride = windows
    return max(0, (tokens - length) // stride + 1)


def complete_on(axis: str, tokens: int) -> int:
    """How many rows of an axis are complete after so many tokens."""
    return rows_on(axis, tokens) if windows_of(axis) else tokens // block_of(axis)


def in_blocks(axis: str, block: int) -> str:
    """The axis that counts blocks of ``block`` rows of ``axis``: 4 of ``keys/16`` -> ``keys/64``."""
    tokens = block_of(axis) * block
    return base_of(axis) if tokens == 1 else f"{base_of(axis)}/{tokens}"


def join_heads(function: str, first: str, second: str) -> str:
    """The head axis of a product of two tensors: equal ones stay, one head joins anything, groups join query heads."""
    if first == second or second == "one":
        return first
    if first == "one":
        return second
    if {first, second} == {"heads", "kv_heads"}:
        return "heads"
    raise PatternError(
        f"{function}: heads {first!r} and {second!r} do not join; declare both inputs with one of the axes "
        "heads, kv_heads, or one name of your own"
    )
