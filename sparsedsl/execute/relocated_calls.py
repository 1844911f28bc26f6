"""Calls that say where their rows and heads stand: each is an ordinary call of a program in which every index is the one it stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.mask_clauses import clauses, only_difference
from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.lang.symbols import KV_LEN, Q_LEN
from sparsedsl.program.graph import Program
from sparsedsl.program.relocation import Relocation, Rows, blocks_kept_whole, position_tables
from sparsedsl.runtime.call import check_tensors
from sparsedsl.runtime.standing import Standing, runs_of

__all__ = ["relocated_call"]

Tensor = torch.Tensor
Runs = tuple[tuple[int, int, int], ...]
# Pairs of a run of queries and one of keys for which a mask is written out; and rows that make it worth to write a mask for them.
MOST_PAIRS, LEAST_ROWS = 4, 64


def relocated_call(
    program: Program, where: Standing, q: Any, k: Any, v: Any, tables: Mapping[str, Any]
) -> tuple[Relocation, dict[str, Tensor], int | None]:
    """What of a program is to be told in a call, the tables of its positions, and the offset of its first query; None: nothing says it.

    Raises:
        ShapeError: positions, heads or lengths do not fit the call. UnsupportedError: the program means nothing for them.
    """
    check_tensors(q, k, v if v.shape[1] <= k.shape[1] else v[:, : k.shape[1]])
    heads = _heads(program, where, max(q.shape[1], v.shape[1]), {**program.bound, **tables})
    given: list[tuple[Tensor | None, Runs]] = []
    for name, positions, rows, side in (
        ("q_positions", where.queries, q.shape[2], 0), ("kv_positions", where.keys, k.shape[2], 1),
    ):  # fmt: skip
        end = None if where.lengths is None else where.lengths[side]
        runs = () if positions is None else runs_of(name, positions, q.shape[0], rows, q.device, end)
        if positions is not None:
            _check_blocks(name, positions, blocks_kept_whole(program)[side], end)
        given.append((positions, runs))
    (q_at, q_runs), (kv_at, kv_runs) = given
    moved = Relocation(heads=heads, entry=where.entry, lengths=where.lengths, scanned=where.scanned)
    # No positions at all, or no pairs that stand anywhere, or from one on: what every call can be told.
    if q_at is None or not (q.shape[2] and k.shape[2]):
        return moved, {}, None
    if (kv_at is None or _from(kv_runs, 0)) and len(q_runs) == 1 and q_runs[0][2] == 1:
        return moved, {}, q_runs[0][1]
    apart = _apart(program, q_runs, kv_runs)
    if apart is not None:
        return moved, {}, apart
    at: dict[str, Tensor] = {}
    written = _written_out(program, q_runs, ((0, 0, 1),) if kv_at is None else kv_runs, q.shape[2])
    sides = []
    for (positions, runs), name in zip(given, position_tables(program), strict=True):
        if positions is None or _from(runs, 0):
            sides.append(Rows())
        elif written:
            sides.append(Rows(runs))
        else:
            # Rows that are alike are told by one table.
            positions = positions if positions.ndim == 1 or not runs else positions[0]
            at[name] = positions.detach()
            sides.append(Rows(rank=positions.ndim))
    return replace(moved, queries=sides[0], keys=sides[1]), at, 0


def _from(runs: Runs, position: int) -> bool:
    """Whether it is one run of neighbours from there on."""
    return len(runs) == 1 and runs[0][1:] == (position, 1)


def _apart(program: Program, q_runs: Runs, kv_runs: Runs) -> int | None:
    """How far the first query stands behind the first key, where that is all that a pattern is about; else None."""
    pattern = program.static
    if pattern is None or len(q_runs) != 1 or len(kv_runs) != 1 or not q_runs[0][2] == kv_runs[0][2] == 1:
        return None
    apart = q_runs[0][1] - kv_runs[0][1]
    lengths = {symbol for expr in pattern.exprs for symbol in expr.free_symbols} & {Q_LEN, KV_LEN}
    return apart if apart >= 0 and not lengths and all(map(only_difference, pattern.exprs)) else None


def _written_out(program: Program, q_runs: Runs, kv_runs: Runs, rows: int) -> bool:
    """Whether runs are to stand in the mask itself. They are of one call, so what is made of the mask serves no other; worth it where a
    mask says more than bounds on rising positions, such as remainders of distances."""
    pattern = program.static
    if pattern is None or not q_runs or not kv_runs or len(q_runs) * len(kv_runs) > MOST_PAIRS or rows < LEAST_ROWS:
        return False
    mask: sympy.Basic = pattern.mask.expr
    return any(clause.rest for clause in clauses(mask))


def _heads(program: Program, where: Standing, count: int, tables: Mapping[str, Any]) -> tuple[int, int] | None:
    """The heads of the call in the whole; None: it has all, or nobody says."""
    declared = next((part.heads for part in program.expressions if part.heads is not None), None)
    if declared is not None and where.heads not in (None, declared):
        raise ShapeError(f"heads={where.heads}, and the pattern is declared for {declared} heads")
    whole = declared if where.heads is None else where.heads
    if where.first_head is None:
        if where.heads is not None and where.heads != count:
            raise ShapeError(
                f"heads={where.heads} says that the whole has so many heads, and this call has {count}: say which, head_offset= is the "
                "position of the first one"
            )
        return None
    last = where.first_head + count
    if whole is not None and last > whole:
        raise ShapeError(f"head_offset={where.first_head} and {count} heads end at head {last}; the whole has {whole}")
    for pattern in program.patterns:
        for name, dim in pattern.head_reads:
            table = tables.get(name)
            if isinstance(table, Tensor) and table.ndim > dim and not last <= table.shape[dim] <= (whole or table.shape[dim]):
                raise ShapeError(
                    f"table {name!r} is read by h and has {table.shape[dim]} heads; with head_offset={where.first_head} it must be that of "
                    f"the whole{f', of {whole}' if whole else ''}: this call has the heads up to {last - 1}"
                )
    return where.first_head, count


def _check_blocks(name: str, positions: Tensor, sizes: tuple[int, ...], end: int | None) -> None:
    """Rows of one block of the program stay together: a block of a call is one of the whole, and nothing is missing in it."""
    if sizes and positions.numel():
        _BLOCKS.get((name, sizes, end), [positions], lambda: _check_blocks_once(name, positions, sizes, end))


_BLOCKS: Cache[None] = Cache()


def _check_blocks_once(name: str, positions: Tensor, sizes: tuple[int, ...], end: int | None) -> None:
    wide = positions.to(torch.int64).reshape(-1, positions.shape[-1])
    row = torch.arange(wide.shape[-1], device=wide.device)
    for size in sizes:
        first = wide[:, row // size * size]
        wrong = (first % size != 0) | (wide - first != row % size)
        # What follows a block that is cut off would be missing in it.
        cut = bool(wide.shape[-1] % size) and end is not None and bool((wide[:, -1] + 1 != end).any())
        if bool(wrong.any()) or cut:
            where = int(wrong.nonzero()[0, 1]) if bool(wrong.any()) else wide.shape[-1] - 1
            raise UnsupportedError(
                f"the program works on blocks of {size} tokens, and {name} has a part of one at row {where}: give it whole blocks, in "
                f"runs that begin and end at multiples of {math.lcm(*sizes)}"
            )
