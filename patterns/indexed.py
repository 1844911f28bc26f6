"""Published systems that choose by an index of their own, within compressed keys, or from lists: DSA, CSA, QSA, NSA and their kin."""

from __future__ import annotations

from typing import Any

from sparsedsl import program as sd
from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import kv_idx, q_idx
from sparsedsl.lang.pattern import Pattern
from sparsedsl.patterns.checked_arguments import check_choice, check_count, check_head_logit, check_whole
from sparsedsl.patterns.local import causal, sliding_window
from sparsedsl.program.branches import Attend, Joint, Mix
from sparsedsl.program.node import Node
from sparsedsl.program.score_values import Scores

__all__ = ["csa", "dsa", "hca", "hisa", "infllm_v2", "nsa_published", "qsa"]


def _index(keys: Node) -> Scores:
    """``I_ts = sum_h w_th relu(q_th . k_s)``: one score for all heads. Hi^-1/2 is left out: no positive factor changes a choice."""
    queries = sd.input("index_q", "batch index_heads queries index_dim")
    weights = sd.input("index_weights", "batch index_heads queries")
    scores: Scores = (weights * sd.dot(queries, keys).relu()).over_heads("sum")
    return scores


def dsa(top_k: int = 2048) -> Pattern | Attend:
    """DeepSeek sparse attention: a query attends to the ``top_k`` keys that its lightning indexer likes best, the same in all heads.

    ``I_ts = sum_h w_th relu(index_q_th . index_k_s / sqrt(Di))`` for ``s <= t``; nothing is forced, not even the query's own key. The
    weights have any sign, so that a key whose products are all below 0 has 0, and comes before keys with less.

    Args:
        top_k: keys a query attends to, fewer where there are fewer.

    Call-time inputs: ``index_q (B, Hi, Sq, Di)``, ``index_k (B, 1, Skv, Di)``, ``index_weights (B, Hi, Sq)``. No gradient reaches them:
    the published indexer learns from a loss of its own.

    Source: DeepSeek-V3.2 (arXiv 2512.02556).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.dsa(top_k=8))
    >>> q = k = v = torch.randn(1, 2, 48, 16)
    >>> iq, ik, w = torch.randn(1, 4, 48, 8), torch.randn(1, 1, 48, 8), torch.randn(1, 4, 48)
    >>> attn(q, k, v, index_q=iq, index_k=ik, index_weights=w).shape
    torch.Size([1, 2, 48, 16])
    """
    top_k = check_whole("dsa", "top_k", top_k, 1)
    return sd.attend(causal() & sd.top_k(_index(sd.input("index_k", "batch one keys index_dim")), top_k, among=causal()))


def hisa(block: int = 128, blocks: int = 64, top_k: int = 2048) -> Pattern | Attend:
    """Hierarchical indexing for sparse attention: :func:`dsa` among the keys of the ``blocks`` blocks whose mean index key scores highest.

    Blocks that are over, and the query's own, are candidates; the first and the own one are always among them. (The own block's mean is of
    keys after the query too, so that the choice of blocks is not causal; its keys after the query are not attended to.)

    Args:
        block: keys in a block.
        blocks: blocks that keys are chosen from, the two forced ones included.
        top_k: keys a query attends to.

    Call-time inputs: as of :func:`dsa`.

    Source: HISA (arXiv 2603.28458); which blocks are forced, and the mean as what stands for a block, are choices made here.

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.hisa(block=8, blocks=3, top_k=8))
    >>> q = k = v = torch.randn(1, 2, 48, 16)
    >>> iq, ik, w = torch.randn(1, 4, 48, 8), torch.randn(1, 1, 48, 8), torch.randn(1, 4, 48)
    >>> attn(q, k, v, index_q=iq, index_k=ik, index_weights=w).shape
    torch.Size([1, 2, 48, 16])
    """
    block, blocks = check_whole("hisa", "block", block, 1), check_whole("hisa", "blocks", blocks, 1)
    keys = sd.input("index_k", "batch one keys index_dim")
    first, own = kv_idx < block, q_idx // block == kv_idx // block
    over = (kv_idx // block + 1) * block <= q_idx
    coarse = sd.top_k(_index(sd.summary(keys, block)), blocks, among=over | own, forced=first | own)
    top_k = check_whole("hisa", "top_k", top_k, 1)
    return sd.attend(causal() & sd.top_k(_index(keys), top_k, among=causal() & coarse))


def csa(block: int = 4, top_k: int = 512, window: int = 128, *, sink: Any = None, compressed: str = "given") -> Joint:
    """Compressed sparse attention: one softmax over the last ``window`` keys and the ``top_k`` best entries, each of ``block`` keys.

    An entry is a candidate once its block is over, ``(w + 1) block <= t + 1``; it is picked by the lightning indexer on index entries of
    its own. Keys of the window whose entry is picked count twice, as published.

    Args:
        block: keys in an entry.
        top_k: entries a query picks.
        window: last keys seen, the query's own included.
        sink: one more logit without a value, as in :func:`sparsedsl.attend`.
        compressed: ``"given"``, as published: the model's compressor and indexer make entries and what picks them, which the call
            brings. Or ``"mean"``: entries are the means of keys and of values, and those are picked whose mean key has the largest sum of
            ``relu(q . key)`` over the query heads of a key/value head; such a program runs inside of :func:`token_sparse` too, on the
            tokens that are kept.

    Call-time inputs, of ``"given"``: ``entries (B, Hkv, Skv // block, D)``, keys and values at once; ``index_entries (B, 1, Skv // block,
    Di)``; ``index_q (B, Hi, Sq, Di)``, ``index_weights (B, Hi, Sq)``.

    Source: DeepSeek-V4 in transformers (models/deepseek_v4).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.csa(block=4, top_k=3, window=8))
    >>> q, k, e, i = torch.randn(1, 2, 48, 16), torch.randn(1, 1, 48, 16), torch.randn(1, 1, 12, 16), torch.randn(1, 1, 12, 8)
    >>> attn(q, k, k, entries=e, index_entries=i, index_q=torch.randn(1, 4, 48, 8), index_weights=torch.randn(1, 4, 48)).shape
    torch.Size([1, 2, 48, 16])
    """
    block, top_k = check_whole("csa", "block", block, 1), check_whole("csa", "top_k", top_k, 1)
    if check_choice("csa", "compressed", compressed, ("given", "mean")) == "mean":
        keys = sd.summary(sd.k, block)
        picked = sd.top_k(sd.dot(sd.q, keys).relu().over_group("sum"), top_k)
        return _entries("csa", block, window, sink, picked, (keys, sd.summary(sd.v, block)))
    picked = sd.top_k(_index(sd.input("index_entries", f"batch one keys/{block} index_dim")), top_k)
    return _entries("csa", block, window, sink, picked)


def hca(block: int = 128, window: int = 128, *, sink: Any = None) -> Joint:
    """Heavily compressed attention: one softmax over the last ``window`` keys and all entries whose ``block`` keys are over.

    Args:
        block: keys in an entry.
        window: last keys seen, the query's own included.
        sink: one more logit without a value, as in :func:`sparsedsl.attend`.

    Call-time input: ``entries (B, Hkv, Skv // block, D)``, keys and values at once.

    Source: DeepSeek-V4 in transformers (models/deepseek_v4).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.hca(block=8, window=8))
    >>> q, k, e = torch.randn(1, 2, 48, 16), torch.randn(1, 1, 48, 16), torch.randn(1, 1, 6, 16)
    >>> attn(q, k, k, entries=e).shape
    torch.Size([1, 2, 48, 16])
    """
    return _entries("hca", check_whole("hca", "block", block, 1), window, sink, True)


def _entries(function: str, block: int, window: int, sink: Any, picked: Any, made: tuple[Node, Node] | None = None) -> Joint:
    """A window and the entries that are picked, under one softmax. ``made``: keys and values of entries, if the call gives none."""
    sink = None if sink is None else check_head_logit(function, "sink", sink)
    given = sd.input("entries", f"batch kv_heads keys/{block} head_dim")
    keys, values = made or (given, given)
    near = sd.attend(sliding_window(check_whole(function, "window", window, 1)), sink=sink)
    return sd.joint(near, sd.attend(((kv_idx + 1) * block <= q_idx + 1) & picked, k=keys, v=values))


def qsa(unit: int = 4) -> Pattern | Attend:
    """Query-selected attention: causal attention to the blocks of ``unit`` keys that the call lists for every query.

    Args:
        unit: keys in a block.

    Call-time input: ``blocks (B, 1, Sq, W)``, whole numbers: of each query the numbers of its blocks, in any order, -1 for none.

    Source: NVIDIA cuDNN front end, QSA.

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.qsa(unit=4))
    >>> q = k = v = torch.randn(1, 2, 16, 16)
    >>> own = torch.arange(16) // 4
    >>> attn(q, k, v, blocks=torch.stack([own, (own - 1)], -1)[None, None]).shape
    torch.Size([1, 2, 16, 16])
    """
    return sd.attend(causal() & sd.given(sd.input("blocks", "batch one queries width"), check_whole("qsa", "unit", unit, 1)))


def _windows(function: str, length: int, stride: int, select: int) -> tuple[Any, Any]:
    """Which windows of so many keys are over, for the rows of windows; and what stands for their keys: means, unless the call says."""
    length, stride = check_whole(function, "length", length, 1), check_whole(function, "stride", stride, 1)
    if length % stride or check_whole(function, "select", select, 1) % stride:
        raise PatternError(f"{function}(): stride must divide length and select, which are {length} and {select}; got {stride}")
    keys = sd.summary(sd.k, length, stride=stride)
    return kv_idx * stride + length <= q_idx + 1, sd.input("compressed_k", " ".join(keys.axes), default=keys)


def nsa_published(length: int = 32, stride: int = 16, select: int = 64, top_k: int = 16, window: int = 512) -> Mix:
    """Native sparse attention as published: windows that overlap, picked blocks and a sliding window, weighed by gates.

    A row stands for ``length`` keys, one every ``stride``. Blocks of ``select`` keys are picked by the attention that the group of a
    key/value head pays those rows: each counts as often as it shares ``stride`` keys with the block. The first block and the two latest are
    always among the ``top_k``.

    Args:
        length: keys in a window.
        stride: keys from one window to the next; divides ``length`` and ``select``.
        select: keys in a block that is picked.
        top_k: blocks picked, the forced ones included.
        window: last keys seen, the query included.

    Call-time inputs: ``gate (B, Hq, Sq, 3)``, the weights of windows, picked blocks and sliding window; optional ``compressed_k (B, Hkv,
    NW, D)`` and ``compressed_v (B, Hkv, NW, Dv)``, ``NW = max(0, (Skv - length) // stride + 1)``: what was learned; default means.

    Source: Native sparse attention (arXiv 2502.11089).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.nsa_published(length=8, stride=4, select=16, top_k=4, window=16))
    >>> q, k, v = torch.randn(1, 4, 96, 16), torch.randn(1, 2, 96, 16), torch.randn(1, 2, 96, 16)
    >>> attn(q, k, v, gate=torch.rand(1, 4, 96, 3)).shape
    torch.Size([1, 4, 96, 16])
    """
    over, keys = _windows("nsa_published", length, stride, select)
    means = sd.summary(sd.v, length, stride=stride)
    values = sd.input("compressed_v", " ".join(means.axes), default=means)
    paid = sd.dot(sd.q, keys).softmax(over).over_group("sum").overlap(select)
    forced = (kv_idx < select) | (q_idx // select - kv_idx // select < 2)
    picked = sd.top_k(paid, check_whole("nsa_published", "top_k", top_k, 1), forced=forced)
    near = sliding_window(check_count("nsa_published", "window", window, 1))
    gate = sd.input("gate", "batch heads queries 3")
    return sd.mix(sd.attend(over, k=keys, v=values), sd.attend(causal() & picked), near, weights=gate)


def infllm_v2(length: int = 32, stride: int = 16, select: int = 64, top_k: int = 64, local: int = 32) -> Pattern | Attend:
    """InfLLM v2: causal attention to ``top_k`` blocks, picked by the greatest attention that a window in them is paid.

    As :func:`nsa_published` picks, but by the greatest of the windows that touch a block, summed over the heads of a group. The first
    block, the query's own and the ``local`` before it are always among them.

    Args:
        length: keys in a window.
        stride: keys from one window to the next; divides ``length`` and ``select``.
        select: keys in a block that is picked.
        top_k: blocks picked, the forced ones included.
        local: blocks before the query's own that are forced.

    Call-time input: optional ``compressed_k (B, Hkv, NW, D)``, ``NW = max(0, (Skv - length) // stride + 1)``; default means.

    Source: InfLLM v2 (github.com/OpenBMB/infllmv2_cuda_impl).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.infllm_v2(length=8, stride=4, select=16, top_k=4, local=1))
    >>> q, k, v = torch.randn(1, 4, 96, 16), torch.randn(1, 2, 96, 16), torch.randn(1, 2, 96, 16)
    >>> attn(q, k, v).shape
    torch.Size([1, 4, 96, 16])
    """
    over, keys = _windows("infllm_v2", length, stride, select)
    paid = sd.dot(sd.q, keys).softmax(over).over_group("sum").overlap(select, "max")
    near = q_idx // select - kv_idx // select <= check_whole("infllm_v2", "local", local, 0)
    return sd.attend(causal() & sd.top_k(paid, check_whole("infllm_v2", "top_k", top_k, 1), forced=(kv_idx < select) | near))
