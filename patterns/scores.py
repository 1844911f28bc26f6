"""Score functions: soft capping and position biases. Each takes the logit it is applied to: ``softcap(50, alibi(8))``."""

from __future__ import annotations

import functools
import math
import operator
import struct

from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import Index, Score, as_index, as_score, b, h, kv_idx, q_idx, score
from sparsedsl.lang.numeric import clamp, log, maximum, minimum, relu, tanh, where
from sparsedsl.lang.table_reads import table
from sparsedsl.patterns.checked_arguments import check_choice, check_flag, check_logit, check_positive, check_whole

__all__ = [
    "alibi", "alibi_slope", "fire", "fox", "kerple", "relative_bias", "softcap", "ssmax", "t5_bias", "t5_bucket",
]  # fmt: skip


def softcap(cap: float, logit: Score = score) -> Score:
    """Logits squeezed into ``-cap .. cap``: ``tanh(logit / cap) * cap``.

    Args:
        cap: the bound, in units of the scaled logit; positive.
        logit: what it is applied to; default the scaled dot product.

    Raises:
        PatternError: ``cap`` is not a positive number.

    Source: Gemma 2 (arXiv 2408.00118) with 50; Grok-1 with 30.

    >>> import sparsedsl as sd
    >>> print(sd.patterns.softcap(50))
    50*tanh(score / 50)
    """
    cap = check_positive("softcap", "cap", cap)
    return tanh(check_logit("softcap", logit) / cap) * cap


def alibi_slope(heads: int) -> Score:
    """The slope of head ``h`` among ``heads``, published for powers of two as ``2 ** (-8 * (h + 1) / heads)``.

    For other counts, with ``n`` the largest power of two below: the first ``n`` heads have the slopes for ``n``, the others every
    second slope for ``2*n``.

    Args:
        heads: number of query heads; a call with another number raises, as slopes would then be those of other heads.

    Raises:
        PatternError: ``heads`` is below 1.

    Source: Press et al. 2021, "Train Short, Test Long" (arXiv 2108.12409), and its published code.

    >>> import sparsedsl as sd
    >>> print(sd.patterns.alibi_slope(8))
    2**(-h - 1)
    """
    heads = check_whole("alibi_slope", "heads", heads, 1)
    n = 2 ** (heads.bit_length() - 1)
    slopes = _two_to(-8 * (h + 1) / n)
    if n != heads:
        slopes = where(h < n, slopes, _two_to(-4 * (2 * (h - n) + 1) / n))
    return slopes.for_heads(heads)


def _two_to(power: Score) -> Score:
    return as_score(2) ** power


def alibi(heads: int | None = None, logit: Score = score, *, slopes: str = "slopes") -> Score:
    """Logits fall with distance, faster in some heads than in others: ``logit - slope[h] * |q_idx - kv_idx|``.

    Args:
        heads: number of query heads, which gives the published slopes, see :func:`alibi_slope`; None reads them from a table.
        logit: what it is applied to; default the scaled dot product.
        slopes: name of the float table of slopes, shape ``(H,)``; read only if ``heads`` is None.

    Raises:
        PatternError: ``heads`` is below 1.

    Source: Press et al. 2021, "Train Short, Test Long" (arXiv 2108.12409).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.alibi(8))
    score - 2**(-h - 1)*abs(kv_idx - q_idx)
    >>> print(sd.patterns.alibi().text)
    slopes = table('slopes', dtype=float)
    score - abs(kv_idx - q_idx)*slopes[h]
    """
    slope = table(slopes, dtype=float)[h] if heads is None else alibi_slope(check_whole("alibi", "heads", heads, 1))
    return check_logit("alibi", logit) - slope * abs(q_idx - kv_idx)


def relative_bias(max_distance: int, logit: Score = score, *, bidirectional: bool = True, name: str = "relative_bias") -> Score:
    """A learned bias for each distance and head, distances clipped: ``logit + relative_bias[clip(q_idx - kv_idx) + offset, h]``.

    Bidirectional: distances ``-D .. D``, ``offset = D``. Else ``0 .. D``, ``offset = 0``; later keys count as distance 0.

    Args:
        max_distance: ``D`` in tokens; all pairs further apart share its bias.
        logit: what it is applied to; default the scaled dot product.
        bidirectional: whether keys after the query have biases of their own.
        name: name of the learned table, shape ``(2*D + 1, H)`` or ``(D + 1, H)``: the weight of an ``nn.Embedding``.

    Raises:
        PatternError: ``max_distance`` is negative or not a whole number.

    Source: Shaw et al. 2018, "Self-Attention with Relative Position Representations" (arXiv 1803.02155), as a bias on the logit.

    >>> import sparsedsl as sd
    >>> print(sd.patterns.relative_bias(64).text)
    relative_bias = table('relative_bias', learned=True)
    score + relative_bias[minimum(64, maximum(-64, q_idx - kv_idx)) + 64, h]
    """
    far = check_whole("relative_bias", "max_distance", max_distance, 0)
    both = check_flag("relative_bias", "bidirectional", bidirectional)
    entry = clamp(q_idx - kv_idx, -far if both else 0, far) + (far if both else 0)
    return check_logit("relative_bias", logit) + table(name, learned=True)[entry, h]


def t5_bias(
    buckets: int = 32,
    max_distance: int = 128,
    logit: Score = score,
    *,
    bidirectional: bool = True,
    name: str = "t5_bias",
) -> Score:
    """A learned bias for each bucket of distances and head: ``logit + t5_bias[bucket, h]``, see :func:`t5_bucket`.

    T5 does not scale its logits: ``sd.attend(mask, score=t5_bias(), scale=1.0)``.

    Args:
        buckets: number of buckets.
        max_distance: distance in tokens from which on everything shares the last bucket.
        logit: what it is applied to; default the scaled dot product.
        bidirectional: keys after the query have buckets of their own (encoders); else they fall into the bucket of distance 0.
        name: name of the learned table, shape ``(buckets, H)``: the model's ``relative_attention_bias.weight``.

    Raises:
        PatternError: too few buckets, or a maximum distance within the exact ones.

    Source: Raffel et al. 2019, "T5" (arXiv 1910.10683), section 2.1, and its published code.

    >>> import sparsedsl as sd
    >>> sd.patterns.t5_bias().tables["t5_bias"].declaration()
    "table('t5_bias', learned=True)"
    """
    bucket = t5_bucket(buckets, max_distance, bidirectional=bidirectional)
    return check_logit("t5_bias", logit) + table(name, learned=True)[bucket, h]


def t5_bucket(buckets: int = 32, max_distance: int = 128, *, bidirectional: bool = True) -> Index:
    """T5's bucket of the distance ``d`` between query and key, as integer thresholds.

    ``e = buckets // 2`` buckets hold one distance each, the others grow: ``e + floor(log(d / e) / log(max_distance / e) * e)``
    for ``d >= e``. Bidirectional: half of the buckets for each direction, those for later keys second.

    The published formula is evaluated here once per bucket, in its own fp32 arithmetic with a correctly rounded logarithm, and
    what is left is comparisons of whole numbers. For the published models the buckets are exactly those of their code. (Elsewhere
    a boundary may fall on a whole distance; there fp32 libraries, whose logarithms err in the last place, disagree among
    themselves.)

    Args:
        buckets: number of buckets; even if bidirectional.
        max_distance: distance in tokens from which on everything shares the last bucket.
        bidirectional: keys after the query have buckets of their own; else they fall into bucket 0.

    Raises:
        PatternError: too few buckets, or a maximum distance within the exact ones.

    >>> import sparsedsl as sd
    >>> print(sd.patterns.t5_bucket(4, 16, bidirectional=False))
    minimum(2, maximum(0, q_idx - kv_idx)) + where(maximum(0, q_idx - kv_idx) >= 6, 1, 0)
    """
    two = check_flag("t5_bucket", "bidirectional", bidirectional)
    buckets = check_whole("t5_bucket", "buckets", buckets, 4 if two else 2)
    if two and buckets % 2:
        raise PatternError(f"t5_bucket(): buckets must be even if bidirectional, half for each direction; got {buckets}")
    one_way = buckets // 2 if two else buckets
    exact = one_way // 2
    max_distance = check_whole(
        "t5_bucket", "max_distance", max_distance, exact + 1, f"{exact} distances have a bucket of their own"
    )
    distance = abs(q_idx - kv_idx) if two else maximum(q_idx - kv_idx, 0)
    steps = [as_index(distance >= start) for start in _t5_starts(one_way, exact, max_distance)]
    bucket = functools.reduce(operator.add, steps, minimum(distance, exact))
    return bucket + where(kv_idx > q_idx, one_way, 0) if two else bucket


@functools.lru_cache(maxsize=64)
def _t5_starts(buckets: int, exact: int, max_distance: int) -> tuple[int, ...]:
    """For each bucket after ``exact``, the first distance that lies in it or a later one."""
    starts = []
    for bucket in range(exact + 1, buckets):
        low, high = exact, 2 * max_distance  # the bucket never falls with the distance: bisect
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if _t5_published(middle, buckets, exact, max_distance) >= bucket else (middle + 1, high)
        starts.append(low)
    return tuple(starts)


def _t5_published(distance: int, buckets: int, exact: int, max_distance: int) -> int:
    """The published formula for ``distance >= exact``, every step rounded to fp32 as there."""
    logarithm = _fp32(math.log(_fp32(distance / exact)))
    share = _fp32(logarithm / _fp32(math.log(max_distance / exact)))
    return min(exact + int(_fp32(share * (buckets - exact))), buckets - 1)


def _fp32(x: float) -> float:
    return struct.unpack("<f", struct.pack("<f", x))[0]


def kerple(logit: Score = score, *, kernel: str = "log", names: tuple[str, str] = ("kerple_1", "kerple_2")) -> Score:
    """A learned kernel of the distance ``d = |q_idx - kv_idx|``: ``logit - r1[h] log(1 + r2[h] d)``, or ``logit - r1[h] d ** r2[h]``.

    Args:
        logit: what it is applied to; default the scaled dot product.
        kernel: ``"log"``, or ``"power"``.
        names: of the learned tables of r1 and r2, each ``(H,)`` and above 0; as an exponent r2 is at most 2.

    Raises:
        PatternError: another kernel.

    Source: Chi et al. 2022, "KERPLE" (arXiv 2205.09921).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.kerple().text.splitlines()[-1])
    score - kerple_1[h]*log(abs(kv_idx - q_idx)*kerple_2[h] + 1)
    """
    r1, r2 = (table(name, learned=True)[h] for name in names)
    logarithmic = check_choice("kerple", "kernel", kernel, ("log", "power")) == "log"
    apart = abs(q_idx - kv_idx)
    return check_logit("kerple", logit) - r1 * (log(1 + r2 * apart) if logarithmic else as_score(apart) ** r2)


def fire(width: int = 32, logit: Score = score, *, name: str = "fire") -> Score:
    """A bias from a small network of how far back a key lies, in parts of how far back one could look: ``logit + f_h(x)``.

    ``x = log(c d + 1) / log(c max(L, q_idx) + 1)`` of ``d = |q_idx - kv_idx|``; ``f_h(x) = out_bias[h] + sum_j out[h, j] relu(hidden[j] x +
    hidden_bias[j])``.

    Args:
        width: hidden units of the network, published 32. GPU kernels run them as a loop; over chosen blocks (a program's choices) they are
            written out for every pair of a thread, which compiles for minutes with 32.
        logit: what it is applied to; default the scaled dot product.
        name: what names of the learned tables begin with: ``fire_c (1,)`` and ``fire_length (1,)``, both above 0; ``fire_hidden`` and
            ``fire_hidden_bias``, ``(width,)``; ``fire_out (H, width)``, ``fire_out_bias (H,)``.

    Raises:
        PatternError: ``width`` is below 1.

    Source: Li et al. 2023, "Functional Interpolation for Relative Positions" (arXiv 2310.04418).

    >>> import sparsedsl as sd
    >>> sorted(sd.patterns.fire(2).tables)
    ['fire_c', 'fire_hidden', 'fire_hidden_bias', 'fire_length', 'fire_out', 'fire_out_bias']
    """
    width = check_whole("fire", "width", width, 1)
    parts = ("c", "length", "hidden", "hidden_bias", "out", "out_bias")
    c, length, hidden, bias, out, last = (table(f"{name}_{part}", learned=True) for part in parts)
    x = log(c[0] * abs(q_idx - kv_idx) + 1) / log(c[0] * maximum(length[0], q_idx) + 1)
    units = [out[h, j] * relu(hidden[j] * x + bias[j]) for j in range(width)]
    return check_logit("fire", logit) + functools.reduce(operator.add, units, last[h])


def ssmax(logit: Score = score, *, name: str = "ssmax") -> Score:
    """Scalable softmax: logits grow with the logarithm of how many keys a query sees, ``logit * s[h] * log(q_idx + 1)``.

    For causal attention, in which query ``q_idx`` sees ``q_idx + 1`` keys: sums over more of them stay as sharp.

    Args:
        logit: what it is applied to; default the scaled dot product.
        name: name of the learned table of ``s``, shape ``(H,)``.

    Source: Nakanishi 2025, "Scalable-Softmax Is Superior for Attention" (arXiv 2501.19399).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.ssmax().text.splitlines()[-1])
    score*log(q_idx + 1)*ssmax[h]
    """
    return check_logit("ssmax", logit) * table(name, learned=True)[h] * log(q_idx + 1)


def fox(logit: Score = score, *, name: str = "forget") -> Score:
    """Forgetting attention: logits fall by what was forgotten from the key to the query, ``logit + forget[q_idx] - forget[kv_idx]``.

    ``forget`` holds sums of ``log f``, ``0 < f <= 1`` the gate of a token: ``logsigmoid(x).cumsum(-1)``. Gradients reach it.

    Args:
        logit: what it is applied to; default the scaled dot product.
        name: name of the learned table of the sums, shape ``(B, H, S)``; float64 sums keep their digits over long sequences.

    Source: Lin et al. 2025, "Forgetting Transformer" (arXiv 2503.02130).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.fox().text.splitlines()[-1])
    score + forget[b, h, q_idx] - forget[b, h, kv_idx]
    """
    forget = table(name, learned=True)
    return check_logit("fox", logit) + forget[b, h, q_idx] - forget[b, h, kv_idx]
