"""Packed sequences: several documents in one row, responses that share a prefix, and trees of continuations."""

from __future__ import annotations

from typing import Any

from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import Index, Mask, b, kv_idx, q_idx
from sparsedsl.lang.table_reads import Table, table
from sparsedsl.patterns.checked_arguments import check_flag
from sparsedsl.patterns.local import causal, sliding_window

__all__ = ["document_prefix", "documents", "packed", "shared_prefix", "tree"]


def _at(values: Table, index: Any, batched: bool) -> Any:
    """``values[index]``, or ``values[b, index]`` where every batch entry has its own row."""
    return values[b, index] if batched else values[index]


def _document_start(function: str, doc: str, offsets: str, batched: bool) -> tuple[Index, Index]:
    """Where the query's document begins and ends, from a table of offsets."""
    document = _at(table(doc, monotone=True), q_idx, batched)
    start = table(offsets, monotone=True)
    if doc == offsets:
        raise PatternError(f"{function}(): doc and offsets are two tables and want two names; got {doc!r} for both")
    return _at(start, document, batched), _at(start, document + 1, batched)


def documents(doc: str = "doc", *, offsets: str | None = None, batched: bool = False) -> Mask:
    """Keys of the query's own document: ``doc[q_idx] == doc[kv_idx]``. Not causal; :func:`packed` is.

    With ``offsets``, the same from where documents begin: ``start[doc[q_idx]] <= kv_idx < start[doc[q_idx] + 1]``.

    Args:
        doc: name of the table of document numbers, one for each token: int, never falling, shape ``(S,)``.
        offsets: name of a table of where each document begins, in tokens: int, rising, shape ``(documents + 1,)``; its last entry
            is where the last document ends (``cu_seqlens``). Keys are then found without reading ``doc`` at the keys.
        batched: the tables have a row for each batch entry: shapes ``(B, S)`` and ``(B, documents + 1)``.

    Raises:
        PatternError: a name that is no identifier, or twice the same.

    Source: Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination" (arXiv 2107.02027).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.documents().text)
    doc = table('doc', monotone=True)
    doc[q_idx] == doc[kv_idx]
    >>> print(sd.patterns.documents(offsets="start"))
    (kv_idx < start[doc[q_idx] + 1]) & (kv_idx >= start[doc[q_idx]])

    (start[doc[q_idx] + 1] > kv_idx) & (start[doc[q_idx]] <= kv_idx)
    """
    batched = check_flag("documents", "batched", batched)
    if offsets is not None:
        start, end = _document_start("documents", doc, offsets, batched)
        return (start <= kv_idx) & (kv_idx < end)
    numbers = table(doc, monotone=True)
    return _at(numbers, q_idx, batched) == _at(numbers, kv_idx, batched)


def packed(window: int | Index | None = None, doc: str = "doc", *, batched: bool = False) -> Mask:
    """Documents packed into one row, each causal, and with a window if wanted: :func:`documents` & :func:`causal`.

    Args:
        window: number of keys a query sees, itself included; None for the whole document up to the query.
        doc: name of the table of document numbers, as in :func:`documents`.
        batched: ``doc`` has a row for each batch entry.

    Raises:
        PatternError: ``window`` is below 1.

    >>> import sparsedsl as sd
    >>> print(sd.patterns.packed(window=128))
    (doc[q_idx] == doc[kv_idx]) & (kv_idx <= q_idx) & (q_idx - kv_idx < 128)
    """
    return documents(doc, batched=batched) & (causal() if window is None else sliding_window(window))


def document_prefix(doc: str = "doc", offsets: str = "start", prefix: str = "prefix", *, batched: bool = False) -> Mask:
    """Packed documents, each with a prefix of its own that all its tokens see; the rest is causal.

    ``kv_idx - start[d] < prefix[d]`` or ``kv_idx <= q_idx``, inside document ``d = doc[q_idx]``.

    Args:
        doc: name of the table of document numbers, shape ``(S,)``.
        offsets: name of the table of where documents begin, shape ``(documents + 1,)``.
        prefix: name of the table of prefix lengths in tokens, shape ``(documents,)``.
        batched: all three have a row for each batch entry.

    Raises:
        PatternError: two tables with the same name.

    Source: the prefix language model of T5 (arXiv 1910.10683), packed.

    >>> import sparsedsl as sd
    >>> sorted(sd.patterns.document_prefix().tables)
    ['doc', 'prefix', 'start']
    """
    batched = check_flag("document_prefix", "batched", batched)
    start, end = _document_start("document_prefix", doc, offsets, batched)
    length = _at(table(prefix), _at(table(doc, monotone=True), q_idx, batched), batched)
    if prefix in (doc, offsets):
        raise PatternError(f"document_prefix(): prefix is a table of its own and wants its own name; got {prefix!r}")
    return (start <= kv_idx) & (kv_idx < end) & ((kv_idx < start + length) | causal())


def shared_prefix(branch: str = "branch", *, batched: bool = False) -> Mask:
    """Several responses after one prompt, in one row: each sees the prompt and itself; causal.

    ``branch[kv_idx] == 0`` or ``branch[q_idx] == branch[kv_idx]``.

    Args:
        branch: name of the table of branch numbers, one for each token: 0 for the prompt, then 1, 2, .. for the responses in
            order; int, never falling, shape ``(S,)``.
        batched: the table has a row for each batch entry, shape ``(B, S)``.

    Source: prefix sharing in preference and group-relative training, e.g. Wang & Hegde 2024, "Accelerating Direct Preference
    Optimization with Prefix Sharing" (arXiv 2410.20305).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.shared_prefix())
    (kv_idx <= q_idx) & ((branch[q_idx] == branch[kv_idx]) | (branch[kv_idx] == 0))
    """
    batched = check_flag("shared_prefix", "batched", batched)
    numbers = table(branch, monotone=True)
    own, other = _at(numbers, q_idx, batched), _at(numbers, kv_idx, batched)
    return causal() & ((other == 0) | (own == other))


def tree(end: str = "subtree_end", *, batched: bool = False) -> Mask:
    """Tokens of a tree in depth-first order: each sees its ancestors and itself: ``kv_idx <= q_idx < subtree_end[kv_idx]``.

    Args:
        end: name of the table of where the subtree below each token ends (the position after its last descendant; for a leaf, the
            token's position plus one): int, shape ``(S,)``.
        batched: the table has a row for each batch entry, shape ``(B, S)``.

    Source: tree attention for speculative decoding, Miao et al. 2023, "SpecInfer" (arXiv 2305.09781).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.tree())
    (kv_idx <= q_idx) & (q_idx < subtree_end[kv_idx])
    """
    batched = check_flag("tree", "batched", batched)
    return causal() & (q_idx < _at(table(end), kv_idx, batched))
