"""Along which axis the gradients of a learned table are summed, for each of its reads in a score."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from sparsedsl.analysis.mask_clauses import only_difference
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import KV_IDX, Q_IDX
from sparsedsl.lang.tables import TableRead, table_reads

__all__ = ["LearnedRead", "axis_of", "learned_reads"]


@dataclass(frozen=True)
class LearnedRead:
    """One read of a learned table in the score, and along which axis its gradients are summed.

    ``axis``: "rows" (the index reads no key: summed over keys in the pass over queries), "columns" (it reads no query: summed over queries
    in the pass over keys), "difference" (it reads ``q_idx - kv_idx``: summed along diagonals), "pairs" (any other: not summed at all).
    """

    number: int
    read: TableRead
    axis: str

    @property
    def name(self) -> str:
        """What its gradients are called in the code."""
        return f"grad_{self.read.spec.name}_{self.number}"


@functools.lru_cache(maxsize=1024)
def learned_reads(pattern: Pattern) -> tuple[LearnedRead, ...]:
    """The reads of learned tables in the score, each once."""
    reads = [read for read in table_reads(pattern.score.expr) if read.spec.learned]
    return tuple(LearnedRead(n, read, axis_of(read)) for n, read in enumerate(dict.fromkeys(reads)))


def axis_of(read: TableRead) -> str:
    """Along which axis the gradients of a read are summed; see :class:`LearnedRead`."""
    free = read.free_symbols
    if KV_IDX not in free:
        return "rows"
    if Q_IDX not in free:
        return "columns"
    return "difference" if all(only_difference(index) for index in read.args) else "pairs"
