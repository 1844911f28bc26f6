"""Bit operations, kept apart by bit position so that they end as sums of ``(x // 2**i) % 2**n * 2**j``.

A value is held as an OR of pieces ``(atom & mask) << shift``. And-ing with a constant, shifting and or-ing stay in this form;
interleaving and de-interleaving of coordinates (Morton order) then come out as sums of single bits instead of nested bit
operations.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator

import sympy
import torch

from sparsedsl.lang.expressions import Index
from sparsedsl.tracing.conversion import Conversion
from sparsedsl.tracing.trace_graph import TraceNode

__all__ = ["Bits"]

# (atom, shift) -> mask: the OR of all (atom & mask) << shift; mask -1 means every bit, a negative shift goes to the right
Pieces = dict[tuple[sympy.Expr, int], int]
_WIDE = (torch.int32, torch.int64)
_MOST_RUNS = 4  # a mask of more runs of ones stays an `&`


class Bits(Conversion):
    """The part of :class:`~sparsedsl.tracing.convert.Converter` for ``& | ^ << >>`` of integers."""

    def __init__(self) -> None:
        super().__init__()
        self._pieces: dict[TraceNode, Pieces] = {}
        self._known: dict[sympy.Expr, int] = {}  # atom -> the bits it may have, where that is not all

    def bitwise(self, node: TraceNode) -> Index:
        """The integer expression of a bit operation."""
        if node.op in ("shl", "shr"):
            bits, x = _shift(node), self.index(node.args[0])
            if bits is None:
                return self.opaque(node)
            if node.dtype not in _WIDE:
                return x << bits if bits >= 0 else x >> -bits
        return self._joined(self.pieces(node))

    def pieces(self, node: TraceNode) -> Pieces:
        """A node as pieces."""
        if node not in self._pieces:
            pieces = self._split(node)
            self._pieces[node] = self._atom(self.index(node), _reach_of(node)) if pieces is None else pieces
        return self._pieces[node]

    def _atom(self, index: Index, reach: int) -> Pieces:
        """A value as one piece; ``reach`` holds every bit it may have."""
        if reach != -1:
            self._known[index.expr] = reach
        return {(index.expr, 0): self._known.get(index.expr, -1)}

    def _split(self, node: TraceNode) -> Pieces | None:
        """The pieces of a bit operation; None for everything else."""
        if node.dtype == torch.bool:
            return None
        wide = node.dtype in _WIDE
        match node.op:
            case "cast" if wide and node.args[0].dtype in _WIDE:
                return self.pieces(node.args[0])
            case "shl" | "shr" if wide and (bits := _shift(node)) is not None:
                return _shifted(self.pieces(node.args[0]), bits)
            case "bitwise_and":
                for x, c in (node.args, node.args[::-1]):
                    if c.is_const:
                        return _masked(self.pieces(x), int(c.args[0]))
                return self._atom(self.index(node.args[0]) & self.index(node.args[1]), -1)
            case "bitwise_or":
                return _either(self.pieces(node.args[0]), self.pieces(node.args[1]))
            case "bitwise_xor":
                left, right = (self.pieces(a) for a in node.args)
                if not _reach(left) & _reach(right):
                    return _either(left, right)
                return self._atom(self._joined(left) ^ self._joined(right), _reach(left) | _reach(right))
        return None

    def _joined(self, pieces: Pieces) -> Index:
        """The value of the OR: a sum where no two pieces share a bit."""
        total, reached = Index(sympy.Integer(0)), 0
        for (atom, shift), mask in pieces.items():
            piece, reach = _piece(Index(atom), mask, shift, self._known.get(atom, -1)), _moved(mask, shift)
            total = total | piece if reached & reach else total + piece
            reached |= reach
        return total


def _reach_of(node: TraceNode) -> int:
    """The bits that a value which is no bit operation may have; -1 for all."""
    if node.dtype == torch.bool or (node.op == "cast" and node.args[0].dtype == torch.bool):
        return 1
    if node.is_const:
        return int(node.args[0])
    if node.op == "remainder" and node.args[1].is_const and node.args[1].args[0] > 0:
        return (1 << (int(node.args[1].args[0]) - 1).bit_length()) - 1
    return -1


def _shift(node: TraceNode) -> int | None:
    """By how many bits to the left a shift goes; None when that is not a usable constant."""
    bits = node.args[1].args[0] if node.args[1].is_const else -1
    return None if not 0 <= bits < 63 else int(bits) if node.op == "shl" else -int(bits)


def _moved(mask: int, shift: int) -> int:
    return mask << shift if shift >= 0 else mask >> -shift


def _shifted(pieces: Pieces, bits: int) -> Pieces:
    """Every piece moved; bits that fall off the right end leave its mask."""
    moved: Pieces = {}
    for (atom, shift), mask in pieces.items():
        kept = mask & (-1 << max(0, -(shift + bits)))
        if kept:
            moved[atom, shift + bits] = kept
    return moved


def _masked(pieces: Pieces, constant: int) -> Pieces:
    kept = {(atom, shift): mask & _moved(constant, -shift) for (atom, shift), mask in pieces.items()}
    return {key: mask for key, mask in kept.items() if mask}


def _either(left: Pieces, right: Pieces) -> Pieces:
    return {key: left.get(key, 0) | right.get(key, 0) for key in {**left, **right}}


def _reach(pieces: Pieces) -> int:
    """The bits that the value may have."""
    return functools.reduce(operator.or_, (_moved(mask, shift) for (_, shift), mask in pieces.items()), 0)


def _piece(atom: Index, mask: int, shift: int, known: int) -> Index:
    """``(atom & mask) << shift`` of an atom that has only the bits ``known``."""
    if atom.expr.is_Integer:
        return Index(sympy.Integer(_moved(int(atom.expr) & mask, shift)))
    runs = list(_runs(mask))
    if len(runs) > _MOST_RUNS:
        masked = atom & mask
        return masked << shift if shift >= 0 else masked >> -shift
    total = Index(sympy.Integer(0))
    for low, high in runs:
        part = atom >> low if low else atom
        if high is not None and (known == -1 or known >> high):  # the atom has higher bits
            part = part % 2 ** (high - low)
        total = total + part * 2 ** (low + shift)
    return total


def _runs(mask: int) -> Iterator[tuple[int, int | None]]:
    """The runs of ones of ``mask``, low end first; None as the end of one that never ends."""
    low = 0
    while mask:
        while not mask & 1:
            mask, low = mask >> 1, low + 1
        if mask == -1:
            yield low, None
            return
        high = low
        while mask & 1:
            mask, high = mask >> 1, high + 1
        yield low, high
        low = high
