"""Published systems as compositions of the library. The layer patterns are functions of the layer index first, so that
``sd.models.apply(model, sd.patterns.gemma3)`` works.
"""

from __future__ import annotations

from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import Index, Mask, h, kv_idx, q_idx
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.lang.table_reads import table
from sparsedsl.patterns.anchors import global_tokens, sinks
from sparsedsl.patterns.blockwise import random_blocks
from sparsedsl.patterns.checked_arguments import check_flag, check_positive, check_whole
from sparsedsl.patterns.local import causal, chunked, dilated, full, sliding_window
from sparsedsl.patterns.scores import alibi, softcap, t5_bias

__all__ = [
    "alibi_window", "bigbird", "gemma2", "gemma3", "gpt_oss", "llama4", "longformer", "mistral", "streaming_llm", "t5",
]  # fmt: skip


def longformer(window: int = 512, global_count: int = 1, *, dilation: int = 1) -> Mask:
    """A window of ``window // 2`` keys on each side, and global tokens that see and are seen by everything.

    ``|q_idx - kv_idx| <= window // 2`` or ``q_idx < global_count`` or ``kv_idx < global_count``.

    Args:
        window: the paper's window: keys on both sides together, the query not counted (Hugging Face's ``attention_window``).
        global_count: global tokens at the start of the sequence.
        dilation: distance between neighbouring keys of the window, in tokens.

    Raises:
        PatternError: a negative or odd window, a negative count, a dilation below 1.

    Source: Beltagy et al. 2020, "Longformer" (arXiv 2004.05150).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.longformer(window=256, global_count=2))
    ((kv_idx <= q_idx + 128) & (q_idx - kv_idx <= 128)) | (kv_idx < 2) | (q_idx < 2)
    """
    window = check_whole("longformer", "window", window, 0)
    if window % 2:
        raise PatternError(f"longformer(): window counts keys on both sides together and must be even; got {window}")
    global_count = check_whole("longformer", "global_count", global_count, 0)
    dilation = check_whole("longformer", "dilation", dilation, 1)
    return dilated(window // 2 + 1, dilation, two_sided=True) | global_tokens(global_count)


def bigbird(
    block: int = 64,
    *,
    window_blocks: int = 3,
    global_blocks: int = 2,
    random_count: int = 3,
    seed: int = 0,
    causal: bool = False,
) -> Mask:
    """A window of blocks, global blocks at the start, and random blocks.

    ``|q_idx // block - kv_idx // block| <= window_blocks // 2``, or one of the two is in the first ``global_blocks`` blocks, or
    the key's block is drawn for the query's, see :func:`random_blocks`.

    Args:
        block: tokens in a block.
        window_blocks: blocks in the window, the query's own included; odd.
        global_blocks: blocks at the start that see and are seen by everything. (Hugging Face's port takes first and last.)
        random_count: random blocks for each block of queries.
        seed: which random blocks.
        causal: drop later keys, and draw among earlier blocks.

    Raises:
        PatternError: a negative count, a block below 1, an even window.

    Source: Zaheer et al. 2020, "Big Bird" (arXiv 2007.14062).

    >>> import sparsedsl as sd
    >>> mask = sd.patterns.bigbird(64, random_count=2, seed=7)
    """
    block = check_whole("bigbird", "block", block, 1)
    window_blocks = check_whole("bigbird", "window_blocks", window_blocks, 1)
    if window_blocks % 2 == 0:
        raise PatternError(f"bigbird(): window_blocks must be odd, with equal numbers on both sides; got {window_blocks}")
    global_count = check_whole("bigbird", "global_blocks", global_blocks, 0) * block
    random_count = check_whole("bigbird", "random_count", random_count, 0)
    reach = window_blocks // 2
    apart = q_idx // block - kv_idx // block
    drawn = random_blocks(block, random_count, seed=seed, causal=check_flag("bigbird", "causal", causal))
    mask = ((apart <= reach) & (apart >= -reach)) | global_tokens(global_count) | drawn
    return mask & (kv_idx <= q_idx) if causal else mask


def streaming_llm(window: int | Index = 1024, sink_count: int = 4) -> Mask:
    """The last ``window`` keys and the first ``sink_count``: ``sliding_window(window) | sinks(sink_count)``.

    Args:
        window: number of keys a query sees, itself included; a whole number or an index expression such as ``table[h]``.
        sink_count: keys at the start that stay visible.

    Raises:
        PatternError: a window below 1, a negative number of sinks.

    Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.streaming_llm(512))
    ((kv_idx <= q_idx) & (q_idx - kv_idx < 512)) | ((kv_idx <= q_idx) & (kv_idx < 4))
    """
    return sliding_window(window) | sinks(sink_count)


def alibi_window(heads: int, window: int) -> Pattern:
    """ALiBi's slopes inside a sliding window: far keys, whose weight is small, are not read at all.

    Args:
        heads: number of query heads.
        window: number of keys a query sees, itself included.

    Raises:
        PatternError: ``heads`` or ``window`` below 1.

    Source: Press et al. 2021 (arXiv 2108.12409) with the window of Longformer.

    >>> import sparsedsl as sd
    >>> print(sd.patterns.alibi_window(heads=8, window=256))
    attend((kv_idx <= q_idx) & (q_idx - kv_idx < 256), score=score - 2**(-h - 1)*abs(kv_idx - q_idx), heads=8)
    """
    return attend(sliding_window(window), score=alibi(heads))


def t5(*, decoder: bool = False, buckets: int = 32, max_distance: int = 128) -> Pattern:
    """T5's self-attention: learned bias for each bucket of distances, logits not scaled; causal in the decoder.

    Reads the table ``t5_bias``, shape ``(buckets, H)``: the model's ``relative_attention_bias.weight``.

    Args:
        decoder: causal, with buckets for one direction; else full, with buckets for both.
        buckets: number of buckets.
        max_distance: distance in tokens from which on everything shares the last bucket.

    Raises:
        PatternError: as :func:`t5_bucket`.

    Source: Raffel et al. 2019, "T5" (arXiv 1910.10683).

    >>> import sparsedsl as sd
    >>> sd.patterns.t5(decoder=True).scale
    1.0
    """
    decoder = check_flag("t5", "decoder", decoder)
    bias = t5_bias(buckets, max_distance, bidirectional=not decoder)
    return attend(causal() if decoder else full(), score=bias, scale=1.0)


def mistral(layer: int = 0, *, window: int = 4096) -> Pattern:
    """Mistral 7B: the last ``window`` keys in every layer.

    Args:
        layer: index of the layer, from 0; all are alike.
        window: number of keys a query sees, itself included.

    Raises:
        PatternError: a negative layer, a window below 1.

    Source: Jiang et al. 2023, "Mistral 7B" (arXiv 2310.06825).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.mistral())
    attend((kv_idx <= q_idx) & (q_idx - kv_idx < 4096))
    """
    check_whole("mistral", "layer", layer, 0)
    return attend(sliding_window(window))


def gemma2(layer: int, *, window: int = 4096, cap: float = 50.0, query_scalar: float = 256) -> Pattern:
    """Gemma 2: every second layer local, starting with the first; logits capped at 50.

    Args:
        layer: index of the layer, from 0: even layers see ``window`` keys, odd ones all before them.
        window: number of keys a query sees in a local layer, itself included.
        cap: bound of the logits, see :func:`softcap`.
        query_scalar: logits are scaled with ``query_scalar ** -0.5``: 256 for 2B and 9B, 144 for 27B.

    Raises:
        PatternError: a negative layer, a window below 1, a cap or scalar that is not positive.

    Source: Gemma Team 2024, "Gemma 2" (arXiv 2408.00118).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.gemma2(layer=0))
    attend((kv_idx <= q_idx) & (q_idx - kv_idx < 4096), score=50*tanh(score / 50), scale=0.0625)
    """
    layer = check_whole("gemma2", "layer", layer, 0)
    mask = causal() if layer % 2 else sliding_window(window)
    return attend(mask, score=softcap(cap), scale=check_positive("gemma2", "query_scalar", query_scalar) ** -0.5)


def gemma3(layer: int, *, window: int = 512, period: int = 6, query_scalar: float = 256) -> Pattern:
    """Gemma 3: five local layers, then one that sees all before it.

    Args:
        layer: index of the layer, from 0; those with ``(layer + 1) % period == 0`` are full.
        window: number of keys a query sees in a local layer, itself included: 512 for 270M and 1B, 1024 above.
        period: layers from one full layer to the next.
        query_scalar: logits are scaled with ``query_scalar ** -0.5``: 256 but for 27B, which has 168.

    Raises:
        PatternError: a negative layer, a window or period below 1, a scalar that is not positive.

    Source: Gemma Team 2025, "Gemma 3" (arXiv 2503.19786).

    >>> import sparsedsl as sd
    >>> for layer in (0, 5):
    ...     print(sd.patterns.gemma3(layer))
    attend((kv_idx <= q_idx) & (q_idx - kv_idx < 512), scale=0.0625)
    attend(kv_idx <= q_idx, scale=0.0625)
    """
    scale = check_positive("gemma3", "query_scalar", query_scalar) ** -0.5
    local = _is_local("gemma3", layer, period)
    return attend(sliding_window(window) if local else causal(), scale=scale)


def gpt_oss(layer: int, *, window: int = 128, sink: str = "sinks") -> Pattern:
    """GPT-OSS: every second layer local, starting with the first; a learned sink logit for each head.

    Args:
        layer: index of the layer, from 0: even layers see ``window`` keys, odd ones all before them.
        window: number of keys a query sees in a local layer, itself included.
        sink: name of the learned table of sink logits, shape ``(H,)``; they enter the softmax with a value of zero.

    Raises:
        PatternError: a negative layer, a window below 1.

    Source: OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card" (arXiv 2508.10925).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.gpt_oss(layer=0))
    sinks = table('sinks', learned=True)
    attend((kv_idx <= q_idx) & (q_idx - kv_idx < 128), sink=sinks[h])
    """
    layer = check_whole("gpt_oss", "layer", layer, 0)
    mask = causal() if layer % 2 else sliding_window(window)
    return attend(mask, sink=table(sink, learned=True)[h])


def llama4(layer: int, *, chunk: int = 8192, period: int = 4) -> Pattern:
    """Llama 4: three layers in chunks, then one that sees all before it (and has no rotary embedding).

    Args:
        layer: index of the layer, from 0; those with ``(layer + 1) % period == 0`` are full.
        chunk: tokens in a chunk of a local layer.
        period: layers from one full layer to the next.

    Raises:
        PatternError: a negative layer, a chunk or period below 1.

    Source: Meta 2025, the Llama 4 models (Scout and Maverick) and their published code.

    >>> import sparsedsl as sd
    >>> print(sd.patterns.llama4(layer=0))
    attend((q_idx // 8192 == kv_idx // 8192) & (kv_idx <= q_idx))
    """
    return attend(chunked(chunk) if _is_local("llama4", layer, period) else causal())


def _is_local(function: str, layer: int, period: int) -> bool:
    """Whether the layer is not the last of its period."""
    layer = check_whole(function, "layer", layer, 0)
    return (layer + 1) % check_whole(function, "period", period, 1) != 0
