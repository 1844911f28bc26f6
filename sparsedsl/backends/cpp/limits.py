"""How the work of the `cpp` backend is shared out, and from where on another way is worth it."""

from __future__ import annotations

from dataclasses import dataclass

from sparsedsl.adjustable import Adjustable

__all__ = ["LIMITS", "Limits"]


@dataclass(frozen=True)
class Limits:
    """Of builds, of gradients, of attention along lists, of scans.

    - ``wait_s``: seconds that a call with backend ``auto`` waits for compilers, all its pieces of work together, before it is answered by
      something else.
    - ``worth_compiling``: logits of a call from which on its time is worth that of a compiler, unless the pattern is compiled already.
    - ``parts``: those that the gradients of keys and values of all heads, or of learned tables, are added up in, about; their number is
      no matter of threads, so that sums have one order. ``part_rows``: queries in each, of all heads, at least.
    - ``sums_bytes``: gradients of learned tables that all parts may hold together; beyond it one part works after the other.
    - ``worth_turning``: blocks that queries look at, for each block there is, from which on all keys are turned before; a few queries
      turn what they meet.
    - ``scan_steps``: tokens of a call without gradients, up to which a scan with decays from the data takes them one by one; 64 at most.
    - ``states_bytes``: what the states before all chunks of a scan may take, for the backward pass; where it is more, torch makes them
      again.
    """

    wait_s: float = 2.0
    worth_compiling: int = 1 << 18
    parts: int = 16
    part_rows: int = 1024
    sums_bytes: int = 1 << 28
    worth_turning: int = 2
    scan_steps: int = 8
    states_bytes: int = 1 << 29


LIMITS = Adjustable(Limits())
