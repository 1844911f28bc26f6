"""Patterns around the diagonal: causal, sliding and dilated windows, chunks, and the strided patterns of Sparse Transformer."""

from __future__ import annotations

from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import Index, Mask, as_mask, kv_idx, q_idx
from sparsedsl.patterns.checked_arguments import check_count, check_flag, check_whole

__all__ = ["causal", "chunked", "dilated", "full", "sliding_window", "strided", "strided_fixed"]

_ITSELF = "the window counts the query itself"


def full() -> Mask:
    """Every query sees every key: ``True``.

    Source: Vaswani et al. 2017, "Attention Is All You Need" (the encoder).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.full())
    True
    """
    return as_mask(True)


def causal() -> Mask:
    """No query sees a later key: ``kv_idx <= q_idx``.

    Source: Vaswani et al. 2017, "Attention Is All You Need" (the decoder).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.causal())
    kv_idx <= q_idx
    """
    return kv_idx <= q_idx


def sliding_window(w: int | Index, *, two_sided: bool = False) -> Mask:
    """The last ``w`` keys: ``0 <= q_idx - kv_idx < w``; two-sided: ``|q_idx - kv_idx| < w``.

    Args:
        w: number of keys a query sees, **itself included**: keys ``q-w+1 .. q``, so ``w=1`` is the query alone. A whole number,
            or an index expression: ``sliding_window(sd.table("window")[sd.h])`` gives every head its own window.
        two_sided: also the ``w - 1`` keys after the query, hence ``2*w - 1`` keys, for encoders.

    Raises:
        PatternError: ``w`` is below 1 or not a whole number.

    Source: Beltagy et al. 2020, "Longformer" (arXiv 2004.05150); Jiang et al. 2023, "Mistral 7B" (arXiv 2310.06825).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.sliding_window(512))
    (kv_idx <= q_idx) & (q_idx - kv_idx < 512)
    >>> print(sd.patterns.sliding_window(sd.table("window")[sd.h]).text)
    window = table('window')
    (q_idx >= kv_idx) & (q_idx - kv_idx < window[h])
    """
    w = check_count("sliding_window", "w", w, 1, _ITSELF)
    two_sided = check_flag("sliding_window", "two_sided", two_sided)
    recent = q_idx - kv_idx < w
    return recent & (kv_idx - q_idx < w if two_sided else causal())


def dilated(w: int | Index, step: int, *, two_sided: bool = False) -> Mask:
    """``w`` keys, ``step`` apart, back from the query: keys ``q, q-step, .., q-(w-1)*step``.

    ``(q_idx - kv_idx) % step == 0`` and ``0 <= q_idx - kv_idx < w*step``; two-sided with ``|q_idx - kv_idx|``.

    Args:
        w: number of keys a query sees, itself included; a whole number or an index expression such as ``table[h]``.
        step: distance between neighbouring keys, in tokens; 1 is :func:`sliding_window`.
        two_sided: also the ``w - 1`` keys after the query, at the same distances.

    Raises:
        PatternError: ``w`` or ``step`` is below 1 or not a whole number.

    Source: Beltagy et al. 2020, "Longformer", section 3.1 (arXiv 2004.05150).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.dilated(4, step=3))
    ((q_idx - kv_idx) % 3 == 0) & (kv_idx <= q_idx) & (q_idx - kv_idx < 12)
    """
    w = check_count("dilated", "w", w, 1, _ITSELF)
    step = check_whole("dilated", "step", step, 1)
    window = sliding_window(w * step, two_sided=check_flag("dilated", "two_sided", two_sided))
    return window if step == 1 else window & ((q_idx - kv_idx) % step == 0)


def strided(step: int, *, local: int | None = None) -> Mask:
    """The ``local`` last keys, and of the earlier ones every ``step``-th: ``(q_idx - kv_idx) % step == 0``; causal.

    The paper's local head sees ``step + 1`` keys; here ``local`` counts them.

    Args:
        step: distance in tokens between the keys seen far back, counted from the query.
        local: number of keys seen without gaps, the query included; default ``step``. With ``local=1`` only the strided keys are
            left, which is the second head of the paper.

    Raises:
        PatternError: ``step`` or ``local`` is below 1 or not a whole number.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers", section 4.3, strided attention with its two
    heads merged (arXiv 1904.10509).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.strided(8))
    (kv_idx <= q_idx) & (((q_idx - kv_idx) % 8 == 0) | (q_idx - kv_idx < 8))
    """
    step = check_whole("strided", "step", step, 1)
    local = step if local is None else check_whole("strided", "local", local, 1, _ITSELF)
    regular = (q_idx - kv_idx) % step == 0
    return causal() & ((q_idx - kv_idx < local) | regular if local > 1 else regular)


def strided_fixed(step: int, *, summary: int = 1) -> Mask:
    """The query's own block of ``step`` keys, and the last ``summary`` keys of every earlier block; causal.

    ``q_idx // step == kv_idx // step`` or ``kv_idx % step >= step - summary``.

    Args:
        step: block length in tokens.
        summary: keys at the end of each block that all later queries see, at most ``step``.

    Raises:
        PatternError: ``step`` or ``summary`` is below 1, or ``summary`` is larger than ``step``.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers", section 4.3, fixed attention with its two
    heads merged (arXiv 1904.10509).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.strided_fixed(8, summary=2))
    (kv_idx <= q_idx) & ((q_idx // 8 == kv_idx // 8) | (kv_idx % 8 >= 6))
    """
    step = check_whole("strided_fixed", "step", step, 1)
    summary = check_whole("strided_fixed", "summary", summary, 1)
    if summary > step:
        raise PatternError(f"strided_fixed(): summary must be at most step, which is {step}; got {summary}")
    return causal() & ((q_idx // step == kv_idx // step) | (kv_idx % step >= step - summary))


def chunked(size: int | Index) -> Mask:
    """Keys of the query's own chunk, up to the query: ``q_idx // size == kv_idx // size``; causal.

    Args:
        size: chunk length in tokens; a whole number, or an index expression with values known to be positive, such as
            ``sd.table("size", values_in=(1, 8192))[sd.h]``.

    Raises:
        PatternError: ``size`` is below 1 or not a whole number, or an expression that may be zero.

    Source: Llama 4's local layers (chunks of 8192 tokens).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.chunked(8192))
    (q_idx // 8192 == kv_idx // 8192) & (kv_idx <= q_idx)
    """
    size = check_count("chunked", "size", size, 1)
    return causal() & (q_idx // size == kv_idx // size)
