"""What chunks of queries see of the keys, from the tile lists of a pattern; nothing of the size queries x keys is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.analysis.mask_clauses import clauses
from sparsedsl.analysis.rows import row_counts
from sparsedsl.analysis.tiles import classify
from sparsedsl.errors import UnsupportedError
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import BATCH
from sparsedsl.runtime.call import bind_tables, exactly

__all__ = ["Seen", "seen_by", "static_pattern"]

Tensor = torch.Tensor
# Rows of the tiles of masks that no bounds say: larger ones would be decided pair by pair where a table says blocks.
FINE = 128


@dataclass(frozen=True, eq=False)
class Seen:
    """``work``: pairs of query and key that chunks of queries compute, mean over heads, float64 ``(chunks,)``; ``chunk`` and ``granule``,
    int64 ``(listed,)``: pairs of a chunk and a granule of keys of which some head sees a key, each once."""

    work: Tensor
    chunk: Tensor
    granule: Tensor


def seen_by(pattern: Pattern, q_len: int, chunk: int, granule: int, heads: int | None, tables: Mapping[str, Any]) -> Seen:
    """What each chunk of queries sees of as many keys, and what that costs."""
    bound = bind_tables(pattern, tables)
    domain = Domain(q_len, q_len, 0, 1, count_heads((pattern,), bound, heads), bound)
    domain = exactly((pattern.mask.expr,), domain)
    mask = pattern.mask.expr
    closed = all(not clause.rest for clause in clauses(mask))
    rows = chunk if closed or chunk % FINE else FINE
    with torch.no_grad():
        lists = classify(mask, domain, (rows, granule))
    _, groups, lines, columns = lists.shape
    chunks = -(-q_len // chunk)
    counts = row_counts(mask, domain, lists) if closed else None
    work = torch.zeros(chunks, dtype=torch.float64, device=domain.device)
    if counts is not None:
        position = torch.arange(counts.numel(), device=domain.device) % q_len
        work.index_add_(0, position // chunk, counts.to(torch.float64))
    found = torch.zeros(chunks * columns, dtype=torch.bool, device=domain.device)
    for part, share in ((lists.full, 1.0), (lists.partial, 0.5)):
        first, column = part.owners() % lines * rows, part.columns.to(torch.int64)
        if counts is None:
            pairs = (first + rows).clamp(max=q_len).sub(first) * (column * granule + granule).clamp(max=q_len).sub(
                column * granule
            )
            work.index_add_(0, first // chunk, pairs.to(torch.float64) * share)
        found[first // chunk * columns + column] = True
    listed = found.nonzero()[:, 0]
    return Seen((work / groups).cpu(), (listed // columns).cpu(), (listed % columns).cpu())


def static_pattern(name: str, pattern: Any) -> Pattern:
    """The pattern of what is to be planned.

    Raises:
        UnsupportedError: what it sees is not known before the call, or differs by batch entry.
    """
    if not isinstance(pattern, Pattern):
        raise UnsupportedError(
            f"pattern {name or repr(pattern)} chooses from q and k as it is called: whom its queries see is not known before, and no "
            "plan can say what to send. Plan the mask that its candidates lie in, or keep such layers on whole sequences, with shards of "
            "the heads"
        )
    if BATCH in pattern.mask.expr.free_symbols:
        raise UnsupportedError(
            f"pattern {name or repr(pattern)} reads b: batch entries see different keys, and have one placement of tokens. Plan each by "
            "itself, or put them behind each other, as documents of one sequence"
        )
    return pattern
