"""Keys that stay visible from afar, by position: attention sinks, prefixes, and global tokens."""

from __future__ import annotations

from sparsedsl.lang.expressions import Index, Mask, kv_idx, q_idx
from sparsedsl.patterns.checked_arguments import check_count
from sparsedsl.patterns.local import causal

__all__ = ["global_tokens", "prefix", "sinks"]


def sinks(n: int | Index) -> Mask:
    """The first ``n`` keys, for all queries after them: ``kv_idx < n`` and ``kv_idx <= q_idx``.

    The sink *logit* of GPT-OSS, which is no key, is ``sd.attend(mask, sink=...)``, see :func:`gpt_oss`.

    Args:
        n: number of sink keys, in tokens; 0 gives none. A whole number or an index expression such as ``table[h]``.

    Raises:
        PatternError: ``n`` is negative or not a whole number.

    Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.sinks(4))
    (kv_idx <= q_idx) & (kv_idx < 4)
    >>> local = sd.patterns.sliding_window(512) | sd.patterns.sinks(4)
    """
    n = check_count("sinks", "n", n, 0)
    return causal() & (kv_idx < n)


def prefix(n: int | Index) -> Mask:
    """Causal, with ``n`` first keys that every query sees: ``kv_idx < n`` or ``kv_idx <= q_idx``.

    Queries inside the prefix see all of it, later ones as well; the rest is causal. ``prefix(0)`` is :func:`causal`.

    Args:
        n: length of the prefix in tokens: a whole number, or one for each batch entry: ``prefix(sd.table("prefix")[sd.b])``.

    Raises:
        PatternError: ``n`` is negative or not a whole number.

    Source: Raffel et al. 2019, "T5", section 3.2.1, the prefix language model (arXiv 1910.10683).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.prefix(16))
    (kv_idx <= q_idx) | (kv_idx < 16)
    >>> print(sd.patterns.prefix(sd.table("prefix")[sd.b]).text)
    prefix = table('prefix')
    (q_idx >= kv_idx) | (kv_idx < prefix[b])

    prefix = table('prefix')
    (kv_idx <= q_idx) | (kv_idx < prefix[b])
    """
    n = check_count("prefix", "n", n, 0)
    return (kv_idx < n) | causal()


def global_tokens(n: int | Index) -> Mask:
    """The first ``n`` tokens see everything and are seen by everything: ``q_idx < n`` or ``kv_idx < n``.

    Not causal: write ``causal() & global_tokens(n)`` in a decoder.

    Args:
        n: number of global tokens, at the start of the sequence. A whole number or an index expression such as ``table[b]``.

    Raises:
        PatternError: ``n`` is negative or not a whole number.

    Source: Beltagy et al. 2020, "Longformer" (arXiv 2004.05150); Zaheer et al. 2020, "Big Bird", internal transformer
    construction (arXiv 2007.14062).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.global_tokens(2))
    (kv_idx < 2) | (q_idx < 2)
    """
    n = check_count("global_tokens", "n", n, 0)
    return (q_idx < n) | (kv_idx < n)
