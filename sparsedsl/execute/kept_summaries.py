"""Summaries of blocks that are over, kept from call to call: a step of decoding then reads no key for them but those of the last block.

A summary, or the bounds, of a block whose last token has come are what they are for ever, and so are those of a window. They stand in a
buffer that grows; each call adds the blocks that were finished since, and what the unfinished one makes of its tokens so far; of windows,
which overlap, those that were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.program.axes import base_of
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.scores import Bound
from sparsedsl.program.tensors import Input, Summary
from sparsedsl.runtime.call import wants_grad
from sparsedsl.torch_private import transforms_active

__all__ = ["BlockRows", "KeptSummaries", "finished_blocks", "stride_of", "summarised"]

Tensor = torch.Tensor
# Rows of which the unfinished block is none -> one row for every block of them; of bounds both stacked, the least first.
Pooling = Callable[[Tensor], Tensor]


class BlockRows(Protocol):
    """What an evaluation asks for one row of every block of an input of keys."""

    def rows(self, node: Any, name: str, x: Tensor, pool: Pooling) -> Tensor:
        """What ``node`` gives of the input ``name``, which is ``x``, and which ``pool`` sums up."""


def summarised(program: Program) -> dict[Node, Input]:
    """The nodes whose blocks can be kept -> the input of keys whose rows they sum up."""
    found: dict[Node, Input] = {}
    for kind, rows in ((Summary, "x"), (Bound, "y")):
        for node in program.nodes(kind):
            of = getattr(node, rows)
            if isinstance(of, Input) and base_of(of.axes[2]) == "keys":
                found[node] = of
    return found


def finished_blocks(node: Any, tokens: int) -> int:
    """How many blocks, or windows, of a node that sums them up are over after so many tokens."""
    return _finished(node.block, stride_of(node), tokens)


def stride_of(node: Any) -> int:
    """Tokens from the first of one block, or window, to that of the next."""
    return int(node.stride) if isinstance(node, Summary) and node.stride is not None else int(node.block)


@dataclass
class _Rows:
    """Finished blocks of one node, of ``block`` tokens, one every ``stride``. ``buffer``: ``(.., B, H, room, D)``; ``blocks``: how many
    are finished; ``last``: the last token of the last one, by which another sequence is told; None: not known."""

    block: int
    stride: int
    buffer: Tensor
    blocks: int
    last: Tensor | None

    @property
    def end(self) -> int:
        """Tokens up to the end of the last one."""
        return (self.blocks - 1) * self.stride + self.block if self.blocks else 0


def _finished(block: int, stride: int, tokens: int) -> int:
    return max(0, (tokens - block) // stride + 1)


class KeptSummaries:
    """What calls of one program have made of blocks of keys; made by :meth:`sparsedsl.Attention.keep_summaries`.

    Each call is given all keys so far: those of the call before, and what came since. ``tokens``: keys of the last call. ``max_length``:
    so many tokens have memory from the beginning; None: it grows with them.

    >>> import torch, sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.moba(chunk=16, top_k=2))
    >>> q, k, v = torch.randn(3, 1, 2, 64, 8).unbind(0)
    >>> kept = attn.keep_summaries()
    >>> _ = attn(q[:, :, :63], k[:, :, :63], v[:, :, :63], summaries=kept)
    >>> step = attn(q[:, :, 63:], k, v, q_offset=63, summaries=kept)
    >>> torch.allclose(step, attn(q, k, v)[:, :, 63:], atol=1e-5), kept.tokens, kept.nbytes
    (True, 64, 1024)
    """

    def __init__(self, program: Program, max_length: int | None = None) -> None:
        self.program, self.max_length = program.key, max_length
        self.tokens = 0
        self._rows: dict[str, _Rows] = {}

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(rows.buffer.numel() * rows.buffer.element_size() for rows in self._rows.values())

    def rows(self, node: Any, name: str, x: Tensor, pool: Pooling) -> Tensor:
        """One row for every block of ``x (B, H, N, D)``, the unfinished one included; of windows there is none of that kind."""
        if wants_grad(x) or transforms_active():
            raise UnsupportedError(
                "summaries= keeps numbers, through which no gradient and no torch.func transform goes; call under torch.no_grad(), or "
                "without summaries="
            )
        overlaps = isinstance(node, Summary) and node.stride is not None
        block, tokens = node.block, x.shape[2]
        stride = stride_of(node)
        known, done = self._rows.get(node.key), _finished(block, stride, tokens)
        if known is not None:
            self._check(known, name, x)
        before = 0 if known is None else known.blocks
        end = (done - 1) * stride + block
        parts = [pool(x[:, :, before * stride : end])] if before < done else []
        if not overlaps and done * block < tokens:
            parts.append(pool(x[:, :, done * block :]))
        if not parts:
            return pool(x) if known is None else known.buffer[..., :done, :]
        made = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
        if known is None or known.buffer.shape[-2] < before + made.shape[-2]:
            blocks = before + made.shape[-2]
            most = 0 if self.max_length is None else -(-self.max_length // stride)
            room = made.new_empty((*made.shape[:-2], most if most >= blocks else max(16, 2 * blocks), made.shape[-1]))
            if known is not None:
                room[..., :before, :] = known.buffer[..., :before, :]
            known = self._rows[node.key] = _Rows(block, stride, room, before, None if known is None else known.last)
        known.buffer[..., before : before + made.shape[-2], :] = made
        if done > before:
            known.blocks, known.last = done, x[:, :, end - 1].clone()
        return known.buffer[..., : before + made.shape[-2], :]

    def _check(self, known: _Rows, name: str, x: Tensor) -> None:
        """The keys go on where those before ended."""
        sizes = (*x.shape[:2], x.shape[3])
        kept = (*known.buffer.shape[-4:-2], known.buffer.shape[-1])
        if sizes != kept or x.device != known.buffer.device:
            raise ShapeError(
                f"summaries= was filled by calls whose {name!r} had (batch, heads, dim) {kept} on {known.buffer.device}; got {sizes} on "
                f"{x.device}. Begin with attn.keep_summaries()"
            )
        if x.shape[2] < known.end:
            raise ShapeError(
                f"summaries= holds {known.blocks} blocks of {known.block} tokens, and {name!r} has {x.shape[2]} tokens: give all keys so "
                f"far, or take back what is not to count: crop({x.shape[2]})"
            )
        if known.blocks and known.last is not None:
            now = x[:, :, known.end - 1]
            same = now.dtype == known.last.dtype and torch.equal(now, known.last)
            if not same and not torch.equal(now.nan_to_num(), known.last.nan_to_num()):  # NaN is not equal to itself
                raise ShapeError(
                    f"summaries= was filled by other keys: token {known.end - 1} of {name!r} is not what it was. Begin each "
                    "sequence with attn.keep_summaries(), or reset() these; reorder(index) follows batch entries"
                )

    def reset(self) -> None:
        """Forget everything, for another sequence."""
        self._rows.clear()
        self.tokens = 0

    def crop(self, tokens: int) -> None:
        """Forget all but the first ``tokens``."""
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            raise ShapeError(f"tokens must be a whole number of at least 0; got {tokens!r}")
        self.tokens = min(tokens, self.tokens)
        for rows in self._rows.values():
            rows.blocks, rows.last = min(rows.blocks, _finished(rows.block, rows.stride, tokens)), None

    def each(self, change: Callable[[Tensor], Tensor]) -> KeptSummaries:
        """The same of finished blocks, with every tensor, its first axis the batch, replaced by what ``change`` makes of it."""
        made = copy.copy(self)
        made._rows = {
            key: replace(rows, buffer=change(rows.buffer[..., : rows.blocks, :].movedim(-4, 0)).movedim(0, -4), last=None)
            for key, rows in self._rows.items()
        }
        return made

    def most_bytes(self, tokens: int) -> int:
        """Memory that the summaries of so many tokens take; of what calls have summed up so far, any one token."""
        sizes = [(rows.stride, rows.buffer[..., :1, :].numel() * rows.buffer.element_size()) for rows in self._rows.values()]
        return sum(-(-tokens // stride) * row for stride, row in sizes)

    def reorder(self, index: Tensor) -> None:
        """Take the batch entries ``index``, as beams do; an entry may stand there more than once, or not at all."""
        for rows in self._rows.values():
            at = index.to(rows.buffer.device)
            rows.buffer = rows.buffer.index_select(rows.buffer.ndim - 4, at)
            rows.last = None if rows.last is None else rows.last.index_select(0, at)
