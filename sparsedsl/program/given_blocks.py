"""Choices that were made elsewhere: lists of blocks, or bitmaps, that a call is given."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

from sparsedsl.errors import PatternError
from sparsedsl.lang.advice import shown
from sparsedsl.program.axes import base_of, block_of, in_blocks
from sparsedsl.program.node import Node, one_of
from sparsedsl.program.select import Choice
from sparsedsl.program.tensors import check_block

__all__ = ["Given", "given"]


@dataclass(frozen=True, eq=False, repr=False)
class Given(Choice):
    """Blocks that a call is given, as lists or as a bitmap."""

    x: Node
    unit: int
    name: str = field(default="", kw_only=True)
    function: ClassVar[str] = "given"

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Blocks of keys for the rows of the input."""
        return *self.x.axes[:3], in_blocks("keys", self.unit)

    @property
    def is_bitmap(self) -> bool:
        """Whether the input says of every block whether it is chosen; else it lists blocks."""
        return base_of(self.x.axes[3]) == "keys"

    @property
    def most(self) -> int | None:
        """As many as a list has room for, where that is known."""
        return int(self.x.axes[3]) if self.x.axes[3].isdecimal() else None


def given(x: Node, unit: int | None = None, *, name: str = "") -> Given:
    """Blocks of ``unit`` keys for every query, or block of queries, that were chosen elsewhere: by a kernel, an earlier layer, a table.

    Args:
        x: an input ``(batch, heads, queries or blocks of them, width)`` of whole numbers: of each row the numbers of its blocks, in any
            order, each once; -1 is no block. Or one of booleans ``(batch, heads, queries or blocks of them, keys/unit)``: whether a block
            is chosen; a call may leave an incomplete last block out.
        unit: keys in a block; of a bitmap its axis says so.
        name: what reports, choices and text forms call it.

    It is an operand of masks as :func:`top_k` is. Which tokens the lists were made from is not known here: the report takes them for known
    to their queries. Pairs that the rest of the mask excludes do not attend: under a causal mask later blocks fall away.

    At the call a number outside of the blocks that there are, or one that stands twice in a row, is a :class:`~sparsedsl.TableError`.

    Source: QSA and indexers of cuDNN's front end; reuse of lists by later layers.

    >>> import torch
    >>> import sparsedsl as sd
    >>> blocks = sd.given(sd.input("blocks", "batch one queries width"), unit=4)
    >>> attn = sd.compile(sd.attend((sd.kv_idx <= sd.q_idx) & blocks))
    >>> q = k = v = torch.randn(1, 2, 8, 16)
    >>> attn(q, k, v, blocks=torch.tensor([[0, -1], [1, 0]]).repeat_interleave(4, 0)[None, None]).shape
    torch.Size([1, 2, 8, 16])
    """
    axes = x.axes if isinstance(x, Node) and x.gives == "tensor" else ()
    if len(axes) != 4 or axes[0] != "batch" or base_of(axes[2]) != "queries" or base_of(axes[3]) == "queries":
        raise PatternError(
            "given(): x must be an input with the axes 'batch', heads, queries or blocks of them, and the width of lists or blocks of "
            f"keys; got {shown(x)}" + (f" with {' '.join(axes)!r}" if axes else "")
        )
    own = block_of(axes[3]) if base_of(axes[3]) == "keys" else None
    if own is not None and unit not in (None, own):
        raise PatternError(f"given(): the bitmap {x!r} says blocks of {own} keys; unit must be that or None, got {unit!r}")
    if own is None and unit is None:
        raise PatternError(f"given(): {x!r} lists blocks; say of how many keys, unit=")
    if not isinstance(name, str) or (name and not name.isidentifier()):
        raise PatternError(f"given(): name must be a Python identifier; got {name!r}")
    return one_of(Given(x, check_block("given", "unit", own if unit is None else unit), name=name))
