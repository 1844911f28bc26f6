"""Nodes that give tensors: the inputs of a call, and one row for each block of tokens."""

from __future__ import annotations

import functools
import keyword
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import sympy

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import check_word, shown
from sparsedsl.lang.printing import expression_text
from sparsedsl.lang.symbols import CALL_WORDS, RESERVED_NAMES
from sparsedsl.program.axes import base_of, block_of, check_axes, in_blocks
from sparsedsl.program.node import Node, one_of

__all__ = ["OWN", "Input", "Summary", "check_block", "check_tensor", "input", "k", "q", "summary", "v"]

# Call-time keywords of compiled programs, beside those that no table may be called by.
_TAKEN = RESERVED_NAMES | CALL_WORDS | {"allow"}


@dataclass(frozen=True, eq=False, repr=False)
class Input(Node):
    """A tensor of the call, by name; ``default`` stands for it where the call does not give it."""

    name: str
    dims: tuple[str, ...]
    default: Node | None = None
    function: ClassVar[str] = "input"
    gives: ClassVar[str] = "tensor"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """As declared."""
        return self.dims

    def code(self, write: Callable[[sympy.Basic], str] = expression_text) -> str:
        """As :func:`input` takes it."""
        if self in OWN:
            return self.name
        default = "" if self.default is None else f", default={self.default.label}"
        return f"input({self.name!r}, {' '.join(self.axes)!r}{default})"

    def note(self) -> str:
        """What stands in for it; its name and axes are said beside."""
        return "" if self.default is None else f"default {self.default.label}"


q = one_of(Input("q", ("batch", "heads", "queries", "head_dim")))
k = one_of(Input("k", ("batch", "kv_heads", "keys", "head_dim")))
v = one_of(Input("v", ("batch", "kv_heads", "keys", "value_dim")))
# What every call gives, and first.
OWN = frozenset((q, k, v))


def input(name: str, axes: str, *, default: Node | None = None) -> Input:
    """A tensor beside q, k and v that a call is given by name: ``attn(q, k, v, gate=tensor)``.

    Args:
        name: the keyword.
        axes: its axes, in words: ``batch, heads, kv_heads, value_heads, queries, keys, head_dim, value_dim`` have the sizes of q, k, v;
            ``keys/64`` has one row for 64 keys (a call may leave an incomplete last one out), ``keys/32+16`` one for every complete window
            of 32 keys, one every 16; a number is that size; any other word is a size of its own, the same wherever it stands.
        default: the node that stands in where the call gives nothing, with the same axes.

    Raises:
        PatternError: a name that is no keyword of its own, axes that cannot be read, a default of other axes.

    >>> import sparsedsl as sd
    >>> sd.input("landmarks", "batch kv_heads keys/64 retrieval_dim").axes
    ('batch', 'kv_heads', 'keys/64', 'retrieval_dim')
    """
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name in _TAKEN or name[0] == "_":
        raise PatternError(f"input(): name must be a keyword that calls can pass and that is not taken; got {name!r}")
    words = check_axes(f"input({name!r})", axes)
    if default is not None and (not isinstance(default, Node) or default.axes != words):
        raise PatternError(
            f"input({name!r}): the default must be a node with the axes {' '.join(words)!r}; got "
            f"{default!r}" + (f" with {' '.join(default.axes)!r}" if isinstance(default, Node) else "")
        )
    return one_of(Input(name, words, default))


def check_tensor(function: str, name: str, value: object, rows: str | None = None) -> Node:
    """A node that gives a tensor ``(batch, some heads, rows, dim)``, its rows counting ``rows`` (queries, keys)."""
    if not isinstance(value, Node) or value.gives != "tensor":
        raise PatternError(
            f"{function}(): {name} must be sd.q, sd.k, sd.v, an input, a summary or reordered rows; got {shown(value)}. Nodes stand for "
            "the tensors of a call; other tensors come in by name: sd.input(name, axes)"
        )
    axes = value.axes
    if len(axes) != 4 or axes[0] != "batch" or (rows is not None and base_of(axes[2]) != rows):
        raise PatternError(
            f"{function}(): {name} must have the axes batch, heads, {rows or 'queries or keys'}, a dimension; got {' '.join(axes)!r}"
        )
    return value


def check_block(function: str, name: str, value: object, least: int = 1) -> int:
    """A whole number of tokens or rows."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PatternError(f"{function}(): {name} must be a whole number of at least {least}; got {value!r}")
    return value


HOW = ("mean", "max", "min", "sum", "first", "last")


@dataclass(frozen=True, eq=False, repr=False)
class Summary(Node):
    """One row for each block of tokens of ``x``."""

    x: Node
    block: int
    how: str = "mean"
    pad: str = "valid"
    stride: int | None = None
    function: ClassVar[str] = "summary"
    gives: ClassVar[str] = "tensor"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """``keys`` becomes ``keys/block``, or ``keys/block+stride``."""
        batch, heads, rows, dim = self.x.axes
        if self.stride is not None:
            return batch, heads, f"{rows}/{self.block}+{self.stride}", dim
        return batch, heads, in_blocks(rows, self.block), dim


def summary(x: Node, block: int, how: str = "mean", *, pad: str = "valid", stride: int | None = None) -> Summary:
    """One row for each ``block`` rows of ``x``: ``(B, H, N, D)`` -> ``(B, H, ceil(N / block), D)``.

    Args:
        x: q, k, v, an input, or another summary.
        block: rows in a block. The last block may be ragged.
        how: ``"mean"``, ``"max"``, ``"min"``, ``"sum"``, ``"first"`` or ``"last"`` row.
        pad: what a ragged last block is divided by in a mean: the rows it has (``"valid"``), or ``block``, as if zeros followed
            (``"zero"``).
        stride: tokens from one row's first to the next one's: windows of ``block`` keys that overlap, of which all are complete,
            ``max(0, (N - block) // stride + 1)`` of them. None: blocks side by side.

    >>> import sparsedsl as sd
    >>> sd.summary(sd.k, 64).axes, sd.summary(sd.k, 32, stride=16).axes
    (('batch', 'kv_heads', 'keys/64', 'head_dim'), ('batch', 'kv_heads', 'keys/32+16', 'head_dim'))
    """
    x = check_tensor("summary", "x", x)
    check_word("summary(): how", how, HOW)
    check_word("summary(): pad", pad, ("valid", "zero"))
    block = check_block("summary", "block", block)
    if stride is None:
        block_of(x.axes[2])  # of windows nothing is summed up
    elif check_block("summary", "stride", stride) > block or x.axes[2] != "keys" or pad != "valid":
        raise PatternError(
            f"summary(): stride makes windows of keys that are complete and leave no key out: at most block, which is {block}, of x with "
            f"one row a key, with pad='valid'; got stride={stride} of {x.axes[2]!r} with pad={pad!r}"
        )
    return one_of(Summary(x, block, how, pad, stride))
