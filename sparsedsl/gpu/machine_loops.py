"""Loops in machine code of any maker, and what one turn of them does: the work that decides speed, without a GPU.

A loop is what a compiler calls a natural one: a jump to an instruction that every way to the jump goes through, and all from where the
jump can be reached without going through it again. Where things stand says little: NVIDIA's assembler puts code that waits for a
barrier behind everything else, from where it jumps back, and LLVM puts the end of a loop before its beginning.

:mod:`sparsedsl.gpu.sass` and :mod:`sparsedsl.gpu.amdgcn` read the text of the two makers, :mod:`sparsedsl.gpu.loop_cycles` makes cycles
of counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from sparsedsl.errors import UnsupportedError

__all__ = ["LoopCounts", "MatrixCounts", "Step", "inner_loops"]


@dataclass(frozen=True)
class MatrixCounts:
    """Matrix instructions of one kind in a turn. ``shape``: rows, columns and inner length of one, zeros where the code does not say;
    ``warps`` that execute it together (4: a warp group; 0: one thread starts it for the whole block); ``from_shared``: whether its
    left operand lies in shared memory; ``count``: how many."""

    shape: tuple[int, int, int]
    warps: int
    from_shared: bool
    count: int

    def times(self, warps: int) -> int:
        """How many of them a block of ``warps`` warps executes."""
        return self.count * (warps // self.warps if self.warps else 1)

    def products(self, warps: int) -> int:
        """Multiplications that such a block executes; those done twice count twice.

        Raises:
            UnsupportedError: the code does not say what shape they have.
        """
        rows, columns, inner = self.shape
        if not rows:
            raise UnsupportedError(
                "the shape of a matrix instruction is not known where it stands in the machine code: another release of Triton "
                "must be looked at before its loops are compared; the counts of all other instructions are right"
            )
        return self.times(warps) * rows * columns * inner


@dataclass(frozen=True)
class LoopCounts:
    """Instructions that one warp issues in one turn of a loop.

    ``issued`` all of them; ``exponentials`` EX2 and ``special`` all of the special function units; ``multiply_add`` of the FMA units,
    those that do two numbers a lane twice; ``integer`` of the integer and compare units; ``local`` loads and stores of local memory;
    ``matrix`` instructions by kind.
    """

    issued: int
    exponentials: int
    special: int
    multiply_add: int
    integer: int
    local: int
    matrix: tuple[MatrixCounts, ...]

    @property
    def matrix_issued(self) -> int:
        """Matrix instructions of any kind."""
        return sum(kind.count for kind in self.matrix)

    def products(self, warps: int) -> int:
        """Multiplications that a block of ``warps`` warps executes on matrix units in a turn; those done twice count twice."""
        return sum(kind.products(warps) for kind in self.matrix)

    @property
    def local_share(self) -> float:
        """The part of what is issued that reads or writes local memory."""
        return self.local / max(1, self.issued)


@dataclass(frozen=True)
class Step:
    """One instruction: its ``words``; ``to``: the number of the one that it may jump to; ``goes_on``: whether the next one may follow."""

    words: str
    to: int | None = None
    goes_on: bool = True


def inner_loops(code: Sequence[Step], count: Callable[[Sequence[int]], LoopCounts]) -> tuple[LoopCounts, ...]:
    """What ``count`` says of every innermost loop that multiplies matrices, given the numbers of its steps; in the order of the code.

    A loop around others has their instructions too, and is left out. One inside that waits for a barrier multiplies nothing: its
    instructions count once.
    """
    counts = {frozenset(places): count(places) for places in _loops(code)}
    found = {places: counted for places, counted in counts.items() if counted.matrix_issued}
    return tuple(counted for places, counted in found.items() if not any(other < places for other in found))


def _loops(code: Sequence[Step]) -> list[list[int]]:
    """The steps of every natural loop."""
    jumps = {number for number, step in enumerate(code) if step.to is not None or not step.goes_on}
    starts = sorted({0, *(number + 1 for number in jumps), *(step.to for step in code if step.to is not None)} - {len(code)})
    blocks = {begin: range(begin, end) for begin, end in zip(starts, [*starts[1:], len(code)], strict=True)}
    graph = nx.DiGraph()
    graph.add_nodes_from(blocks)
    for begin, places in blocks.items():
        last = code[places[-1]]
        graph.add_edges_from((begin, then) for then in (places[-1] + 1 if last.goes_on else None, last.to) if then in blocks)
    above = nx.immediate_dominators(graph, 0)
    loops: dict[int, set[int]] = {}
    for latch, header in graph.edges:
        if latch in above and header in _dominators(above, latch):
            before = nx.ancestors(nx.restricted_view(graph, [header], []), latch) if latch != header else set()
            loops.setdefault(header, set()).update({header, latch} | before & above.keys())
    return [sorted(place for block in members for place in blocks[block]) for _, members in sorted(loops.items())]


def _dominators(above: Mapping[int, int | None], block: int) -> set[int]:
    """The blocks that every way to ``block`` goes through, itself included."""
    found = {block}
    while (over := above.get(block)) is not None and over not in found:
        found.add(over)
        block = over
    return found
