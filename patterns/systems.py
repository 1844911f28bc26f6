"""Published systems that no mask can say: they choose, reorder, remember and combine. Exact mathematics: ``docs/programs.md``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sparsedsl import program as sd
from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import kv_idx, q_idx, score
from sparsedsl.lang.numeric import softplus
from sparsedsl.lang.pattern import Pattern
from sparsedsl.patterns.anchors import sinks
from sparsedsl.patterns.checked_arguments import check_choice, check_count, check_head_logit, check_whole
from sparsedsl.patterns.local import causal, sliding_window
from sparsedsl.program.branches import Attend, Branch, Compact, Mix
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.scores import Scores

__all__ = ["hsa", "minference", "moba", "nha", "nsa", "pbs", "ring_linear", "token_sparse"]


def hsa(chunk: int = 64, top_k: int = 16, weights: str = "softmax", *, inner: str = "softmax") -> Attend:
    """Hierarchical sparse attention: a query picks chunks by score, attends within each, and weighs the results by the scores.

    ``out_t = sum_c w_tc softmax_c(q_t K_c / sqrt(D)) V_c`` over the ``top_k`` chunks with the highest
    ``s_tc = retrieval_q_t . landmark_c / sqrt(Dr)`` among those that ended before ``t``; ``w_t = softmax(s_t)`` over the picked
    ones. Rows before the first chunk is over are 0. Scores learn through the weights.

    Args:
        chunk: tokens in a chunk.
        top_k: chunks a query picks; as many as there are: a training mode that picks all.
        weights: ``"softmax"``; ``"softmax1"``, one more logit of 0; ``"stick_breaking"`` (RAMba), recent chunks first; ``"sigmoid"``.
        inner: softmax in a chunk, ``"softmax"`` or ``"softmax1"``.

    Call-time inputs: ``retrieval_q (B, Hr, Sq, Dr)``, ``landmarks (B, Hr, NC, Dr)`` with ``NC = Skv // chunk`` (one more for
    a ragged tail is allowed), ``Hr`` the key/value heads or 1.

    Source: HSA-UltraLong (arXiv 2511.23319); RAMba (arXiv 2504.16795).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.hsa(chunk=8, top_k=2))
    >>> q, k, v, rq, marks = (torch.randn(1, h, n, 16) for h, n in [(4, 48), (2, 48), (2, 48), (2, 48), (2, 6)])
    >>> attn(q, k, v, retrieval_q=rq, landmarks=marks).shape
    torch.Size([1, 4, 48, 16])
    """
    chunk, top_k = check_whole("hsa", "chunk", chunk, 1), check_whole("hsa", "top_k", top_k, 1)
    ended = (kv_idx // chunk + 1) * chunk <= q_idx
    retrieval = sd.input("retrieval_q", "batch retrieval_heads queries retrieval_dim")
    landmarks = sd.input("landmarks", f"batch retrieval_heads keys/{chunk} retrieval_dim")
    selected = sd.top_k(sd.dot(retrieval, landmarks), top_k, among=ended)
    return sd.attend(ended & selected, normaliser=sd.per_chunk(selected, weights, inner=inner))


def nha(
    slots: int = 64, window: int | None = 32, empty: str = "zero_sink", *, temperature: float = 8.0, first: int = 0,
    slot_bias: Any = None, sink: Any = None,
) -> Branch:  # fmt: skip
    """Native hybrid attention: one softmax over the last ``window`` keys and ``slots`` rows that hold what left the window.

    Slot ``m`` fades by ``a = sigmoid(gate) ** (1 / temperature)`` and takes in ``1 - a`` of the key and value of the token
    that leaves.

    Args:
        slots: rows of memory a key/value head, M.
        window: keys seen as they are, the query's own included; 0: gated slot attention; None: all keys, so that the slots stay empty.
            May be set anew after training.
        empty: slots that hold nothing have logit 0 and value 0 (``"zero_sink"``, as published), or are left out (``"masked"``).
        temperature: of the gate.
        first: tokens at the beginning that stay in sight of the softmax, as they are, and never go into a slot.
        slot_bias: is added to the logits of slots, a number or an expression over ``h``; towards -inf the slots have no say, and what is
            left is the window. (It is taken from the window's logits: the softmax is the same, its LSE smaller by ``slot_bias``.)
        sink: one more logit without a value, as in :func:`sparsedsl.attend`.

    Call-time inputs: ``gate (B, Hkv, Skv, M)`` logits; optional ``q_rope (B, Hq, Sq, D)``, ``k_rope (B, Hkv, Skv, D)`` for
    the window and the first tokens, where slots see q and k as they are.

    Source: native hybrid attention (arXiv 2510.07019); gated slot attention (arXiv 2409.07146).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.nha(slots=8, window=4))
    >>> q, k, v, gate = torch.randn(1, 4, 24, 16), torch.randn(1, 2, 24, 16), torch.randn(1, 2, 24, 16), torch.randn(1, 2, 24, 8)
    >>> attn(q, k, v, gate=gate).shape
    torch.Size([1, 4, 24, 16])
    """
    slots, first = check_whole("nha", "slots", slots, 1), check_whole("nha", "first", first, 0)
    check_choice("nha", "empty", empty, ("zero_sink", "masked"))
    slot_bias = None if slot_bias is None else check_head_logit("nha", "slot_bias", slot_bias)
    sink = None if sink is None else check_head_logit("nha", "sink", sink)
    near: dict[str, Any] = {name: sd.input(f"{name}_rope", " ".join(x.axes), default=x) for name, x in (("q", sd.q), ("k", sd.k))}
    if window is None:  # nothing leaves the window: the slots are so many keys of zeros, or nothing at all
        return sd.attend(causal(), sink=sink if empty == "masked" else _with_zeros(sink, slots, slot_bias), **near)
    window = check_whole("nha", "window", window, 0)
    if not window and (first or slot_bias is not None or sink is not None):
        raise PatternError(
            "nha(): window=0 leaves nothing beside the slots; first, slot_bias and sink want a window of 1 or more"
        )
    gate = sd.input("gate", f"batch kv_heads keys {slots}")
    far = sd.recall(sd.slots(gate, delay=window, temperature=temperature, empty=empty, first=first))
    if not window:
        return far
    seen = sliding_window(window) | sinks(first) if first else sliding_window(window)
    if slot_bias is not None:
        near["score"], sink = score - slot_bias, None if sink is None else sink - slot_bias
    return sd.joint(far, sd.attend(seen, sink=sink, **near))


def _with_zeros(sink: Any, slots: int, bias: Any) -> Any:
    """One logit for a sink and so many logits of 0, each with a bias: the logarithm of their sum."""
    zeros = math.log(slots) if bias is None else bias + math.log(slots)
    return zeros if sink is None else sink + softplus(zeros - sink)


def pbs(block: int = 128, segment: int = 256, mass: float = 0.9, share: str = "head") -> Pattern | Attend:
    """Permuted block-sparse attention: keys are sorted by importance within segments, then blocks are picked by pooled scores.

    A block of queries attends to its own segment, causally; to the blocks of earlier segments that hold ``mass`` of the
    pooled softmax; and to the block with the first token. Chooses by the last ``block`` queries: for prefill, not for
    training.

    Args:
        block: tokens in a block; divides ``segment``.
        segment: tokens that are sorted together.
        mass: share of the pooled softmax over earlier segments, above 0, at most 1; 1 means all their blocks.
        share: one order a query ``"head"``, or one a ``"group"`` of query heads, which moves each key once a key/value head.

    Source: PBS-Attn (arXiv 2510.21270).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.pbs(block=16, segment=32))
    >>> q = k = v = torch.randn(1, 2, 128, 16)
    >>> attn(q, k, v).shape
    torch.Size([1, 2, 128, 16])
    """
    if check_whole("pbs", "segment", segment, 1) % check_whole("pbs", "block", block, 1):
        raise PatternError(f"pbs(): block must divide segment, which is {segment}; got {block}")
    seen = sd.probe(sd.q, sd.k, rows=block, complete=segment)
    shared = check_choice("pbs", "share", share, ("head", "group")) == "group"
    order = sd.segment_sort(seen.over_group("mean") if shared else seen, segment)
    keys, values = sd.take(sd.k, order), sd.take(sd.v, order)
    pooled = sd.summary(sd.q, block, pad="zero"), sd.summary(keys, block, pad="zero")
    earlier = kv_idx // segment < q_idx // segment
    own = (kv_idx // segment == q_idx // segment) & (order.origin(kv_idx) <= q_idx)
    first = kv_idx // block == order.place(0) // block
    selected = sd.top_p(sd.dot(*pooled), mass, among=earlier)
    return sd.attend(earlier & (selected | first) | own, k=keys, v=values)


def token_sparse(
    coverage: float = 0.005, probe: int = 128, pool: int = 7, min_tokens: int = 1024, *, inside: Any = None
) -> Compact:
    """Token sparse attention: every head keeps the tokens that recent queries look at, and attends among those alone.

    Tokens with the least attention, ``coverage`` of the mass, are dropped, as many in every head; rows of dropped tokens are
    0. Chooses by the last ``probe`` queries: for prefill, not for training.

    Args:
        coverage: share of the attention mass that is dropped.
        probe: last queries, whose attention to the tokens before decides; they are always kept.
        pool: neighbours that scores are averaged over; odd.
        min_tokens: tokens that are kept in any case, beside the probing ones.
        inside: what runs on the kept tokens, such as ``pbs()``; default causal attention.

    Source: token sparse attention (arXiv 2602.03216).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.token_sparse(coverage=0.2, probe=16, min_tokens=32))
    >>> q = k = v = torch.randn(1, 2, 128, 16)
    >>> attn(q, k, v).shape
    torch.Size([1, 2, 128, 16])
    """
    probe = check_whole("token_sparse", "probe", probe, 1)
    score = sd.smooth(sd.probe(sd.q, sd.k, rows=probe, causal=True, keep="before"), check_whole("token_sparse", "pool", pool, 1))
    least = check_whole("token_sparse", "min_tokens", min_tokens, 0)
    tokens = sd.keep_tokens(score, tail=coverage, least=least, always=probe)
    return sd.compact(tokens, causal() if inside is None else inside)


def minference(
    vertical: int = 1000, slash: int = 6096, probe: int = 64, *, columns: int = 30, diagonals: int = 100
) -> Pattern | Attend:
    """Vertical lines and slashes: the keys, and the distances, that the last queries of a prompt look at most, for all its queries.

    A head attends to the ``vertical`` keys with the greatest mean attention of the last ``probe`` queries, and to keys at the ``slash``
    distances with the greatest; what is forced counts. These pairs exactly: published kernels cover them with blocks, and more with
    these. Chooses by the last queries: for prefill, not for training.

    Args:
        vertical: keys, the forced ones included.
        slash: distances, the forced ones included.
        probe: last queries, whose causal attention decides.
        columns: first keys that are always among them.
        diagonals: least distances that are always among them, 0 first.

    Source: MInference (arXiv 2407.02490).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.minference(vertical=8, slash=16, probe=8, columns=2, diagonals=4))
    >>> q = k = v = torch.randn(1, 2, 128, 16)
    >>> attn(q, k, v).shape
    torch.Size([1, 2, 128, 16])
    """
    vertical, slash = check_whole("minference", "vertical", vertical, 1), check_whole("minference", "slash", slash, 1)
    columns, near = check_whole("minference", "columns", columns, 0), check_whole("minference", "diagonals", diagonals, 0)
    rows = check_whole("minference", "probe", probe, 1)
    lines = sd.top_k(sd.probe(sd.q, sd.k, rows=rows, causal=True), vertical, forced=kv_idx < columns)
    slashes = sd.top_k(sd.diagonals(sd.q, sd.k, rows=rows), slash, forced=q_idx - kv_idx < near)
    return sd.attend(causal() & (lines | slashes))


def ring_linear(decay: Sequence[float]) -> Linear:
    """Linear attention with a constant decay a head: ``o_t = q_t S_t / sqrt(D)``, ``S_t = decay S_(t-1) + k_t^T v_t``.

    Args:
        decay: one factor a query head, from :func:`sparsedsl.decay_table` or your own.

    Source: Ring-linear (arXiv 2510.19338).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.ring_linear(sd.decay_table(heads=4, layer=0, layers=20)))
    >>> q = k = v = torch.randn(1, 4, 100, 16)
    >>> out, state = attn(q, k, v, return_state=True)
    """
    return sd.linear(decay)


def moba(chunk: int = 512, top_k: int = 3) -> Pattern | Attend:
    """Mixture of block attention: a query's own chunk, causally, and the ``top_k - 1`` earlier ones whose mean key it likes best.

    Args:
        chunk: tokens in a chunk.
        top_k: chunks a query sees, its own included.

    Source: MoBA (arXiv 2502.13189).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.moba(chunk=16, top_k=2))
    >>> q = k = v = torch.randn(1, 2, 64, 16)
    >>> attn(q, k, v).shape
    torch.Size([1, 2, 64, 16])
    """
    chunk = check_whole("moba", "chunk", chunk, 1)
    own = q_idx // chunk == kv_idx // chunk
    top_k = check_whole("moba", "top_k", top_k, 1)
    if top_k == 1:
        return sd.attend(causal() & own)
    return sd.attend(causal() & (own | sd.top_k(sd.dot(sd.q, sd.summary(sd.k, chunk)), top_k - 1)))


def nsa(block: int = 32, select: int = 64, top_k: int = 16, window: int = 512) -> Mix:
    """Native sparse attention: means of blocks, picked blocks and a window, each with its own softmax, weighed by gates.

    Blocks of ``select`` tokens are picked by the attention that the group of a key/value head pays the means in them; the
    first and the two latest are always among them. Means are over blocks that do not overlap; the published system learns
    them.

    Args:
        block: tokens in a mean.
        select: tokens in a block that is picked; a multiple of ``block``, or ``block`` itself.
        top_k: blocks picked, the forced ones included.
        window: last keys seen, the query included.

    Call-time input: ``gate (B, Hq, Sq, 3)``, the weights of means, picked blocks and window.

    Source: Native sparse attention (arXiv 2502.11089).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.nsa(block=8, select=16, top_k=4, window=16))
    >>> q, k, v = torch.randn(1, 4, 96, 16), torch.randn(1, 2, 96, 16), torch.randn(1, 2, 96, 16)
    >>> attn(q, k, v, gate=torch.rand(1, 4, 96, 3)).shape
    torch.Size([1, 4, 96, 16])
    """
    block, select = check_whole("nsa", "block", block, 1), check_whole("nsa", "select", select, 1)
    if select % block:
        raise PatternError(f"nsa(): select must be a multiple of block, which is {block}; got {select}")
    means = sd.summary(sd.k, block)
    compressed = sd.attend((kv_idx + 1) * block <= q_idx + 1, k=means, v=sd.summary(sd.v, block))
    over = (kv_idx // block + 1) * block <= q_idx + 1
    seen: Scores = sd.dot(sd.q, means).softmax(over).over_group("sum")
    seen = seen if select == block else seen.regroup(select // block)
    forced = (kv_idx < select) | (q_idx // select - kv_idx // select < 2)
    selected = sd.top_k(seen, check_whole("nsa", "top_k", top_k, 1), forced=forced)
    gate = sd.input("gate", "batch heads queries 3")
    return sd.mix(
        compressed, sd.attend(causal() & selected), sliding_window(check_count("nsa", "window", window, 1)), weights=gate
    )
