"""How much the analysis of a mask looks at: at once, and at most."""

from __future__ import annotations

from dataclasses import dataclass

from sparsedsl.adjustable import Adjustable

__all__ = ["EFFORT", "Effort"]


@dataclass(frozen=True)
class Effort:
    """Numbers of tiles, boxes, points and rows.

    - ``tiles``: listed at once by runs. Memory stays below 4 MiB at a million tokens, and torch does not split work so small over
      threads, which costs more than it gains. ``boxes`` of the descent at once: they need more work each, and most of them fall.
    - ``fine``: undecided tiles longer than this many tokens are split before points are looked at.
    - ``points`` evaluated at once. ``kinds`` of tiles that may be told apart by number; more are told apart by sorting.
    - ``counted_points``: the most that are evaluated to count pairs; beyond, ``sampled_rows`` rows are counted.
    - ``placed_rows``: the most, over all heads, that are counted to place tokens on ranks; beyond, evenly spaced ones of every chunk.
    - ``listed``: tiles of a whole grid from which on they are counted without lists where the mask allows it.
    - ``proof_ms``: milliseconds that a solver gets for a question.
    """

    tiles: int = 1 << 14
    boxes: int = 1 << 17
    fine: int = 128
    points: int = 1 << 20
    kinds: int = 1 << 22
    counted_points: int = 1 << 27
    sampled_rows: int = 256
    placed_rows: int = 1 << 22
    listed: int = 1 << 26
    proof_ms: int = 3000


EFFORT = Adjustable(Effort())
