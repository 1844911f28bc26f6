"""Programs of a query's neighbourhood, and of chunks or pages far back that it picks by what stands for them."""

from __future__ import annotations

from sparsedsl import program as sd
from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import kv_idx, q_idx
from sparsedsl.lang.pattern import Pattern
from sparsedsl.patterns.checked_arguments import check_flag, check_whole
from sparsedsl.patterns.local import causal, sliding_window
from sparsedsl.patterns.systems import hsa
from sparsedsl.program.branches import Attend, Joint

__all__ = ["hils", "hsa_ultralong", "landmark", "quest"]


def quest(page: int = 16, pages: int = 64, *, own: bool = True) -> Pattern | Attend:
    """Pages of keys with the highest bound of what a query could find in them.

    The bound of a page is ``sum_d max(q_d low_d, q_d high_d) / sqrt(D)``, from the least and greatest of its keys in every channel: no key
    of the page has a higher logit. One choice a query head.

    Args:
        page: keys in a page.
        pages: pages that a query sees; its own included if that is ranked as others are.
        own: the query's own page is seen in any case, and not counted, so that only pages that are over are compared. False ranks it
            too, as published for decoding: causal for the last query of a call alone, since others would compare it by later keys.

    Source: Quest (arXiv 2406.10774).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.quest(page=8, pages=2))
    >>> q = k = v = torch.randn(1, 2, 64, 16)
    >>> attn(q, k, v).shape
    torch.Size([1, 2, 64, 16])
    """
    page = check_whole("quest", "page", page, 1)
    here = q_idx // page == kv_idx // page
    picked = sd.top_k(sd.bound(sd.q, sd.k, page), check_whole("quest", "pages", pages, 1))
    return sd.attend(causal() & (here | picked if check_flag("quest", "own", own) else picked))


def hsa_ultralong(chunk: int = 64, top_k: int = 16, window: int = 512) -> Joint:
    """A sliding window and hierarchical sparse attention (:func:`hsa`) under one softmax, where chunks weigh by their scores.

    ``o_t`` is ``sum_(j in window) e^(q_t . k_j / sqrt(D)) v_j + sum_(c picked) e^(s_tc) softmax_c(..) V_c``, over the sum of all weights.

    Args:
        chunk: tokens in a chunk.
        top_k: chunks a query picks.
        window: last keys seen, the query's own included.

    Call-time inputs: as of :func:`hsa`.

    Source: HSA-UltraLong (arXiv 2511.23319), whose layers have both; that one softmax weighs them is as in HiLS (arXiv 2607.02980).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.hsa_ultralong(chunk=8, top_k=2, window=16))
    >>> q, k, v, rq, marks = (torch.randn(1, h, n, 16) for h, n in [(4, 48), (2, 48), (2, 48), (2, 48), (2, 6)])
    >>> attn(q, k, v, retrieval_q=rq, landmarks=marks).shape
    torch.Size([1, 4, 48, 16])
    """
    return sd.joint(sliding_window(check_whole("hsa_ultralong", "window", window, 1)), hsa(chunk, top_k))


def landmark(block: int = 64, top_k: int = 4) -> Joint:
    """Landmark attention: keys of the own block and landmarks of earlier blocks share a softmax; what a landmark gets goes to its block.

    ``o_t`` is ``sum_(own block, j <= t) e^(q_t . k_j / sqrt(D)) v_j + sum_(c picked) e^(q_t . m_c / sqrt(D)) softmax_c(..) V_c``, over the
    sum of all weights.

    Args:
        block: tokens in a block.
        top_k: earlier blocks that a query reads, those with the highest landmarks; as many as there are in training.

    Call-time input: ``landmarks (B, Hkv, NC, D)``, the keys of the landmark tokens, ``NC = Skv // block`` (one more for a ragged tail is
    allowed).

    Source: Landmark attention (arXiv 2305.16300).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.landmark(block=8, top_k=2))
    >>> q, k, marks = torch.randn(1, 4, 48, 16), torch.randn(1, 2, 48, 16), torch.randn(1, 2, 6, 16)
    >>> attn(q, k, k, landmarks=marks).shape
    torch.Size([1, 4, 48, 16])
    """
    block, top_k = check_whole("landmark", "block", block, 1), check_whole("landmark", "top_k", top_k, 1)
    earlier = kv_idx // block < q_idx // block
    marks = sd.input("landmarks", f"batch kv_heads keys/{block} head_dim")
    picked = sd.top_k(sd.dot(sd.q, marks), top_k, among=earlier)
    own = causal() & (q_idx // block == kv_idx // block)
    return sd.joint(own, sd.attend(earlier & picked, normaliser=sd.per_chunk(picked)))


def hils(chunk: int = 64, top_k: int = 32, window: int = 512) -> Joint:
    """Chunks weighed by an estimate of their own LSE, and a window, under one softmax; the last token of a chunk is its landmark.

    ``s_tc = retrieval_q_t . landmark_c``; the group of a key/value head picks the ``top_k`` chunks with the greatest
    ``max_h softmax_c(s_h)`` before the window, whose far edge lies at a chunk: both share no key. ``o_t`` is the sum over the window of
    ``e^logit v_j`` and over picked chunks of ``e^(s_tc) softmax_c(..) V_c``, over the sum of all weights. Landmark tokens are in no
    softmax.

    (Published heads of a group are compared after dividing by the window's weight too; this differs where they disagree.)

    Args:
        chunk: tokens in a chunk, the landmark token at its end included.
        top_k: chunks that a group picks.
        window: last keys seen, lengthened to the beginning of a chunk.

    Call-time inputs: ``retrieval_q (B, Hq, Sq, Dr)``, q with a correction, times ``D ** -0.5``, and a last channel of 1;
    ``landmarks (B, Hq, NC, Dr)``, what a landmark's query attends to of its chunk's keys, and as the last channel the entropy of that
    attention.

    Source: HiLS (arXiv 2607.02980).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.hils(chunk=8, top_k=2, window=16))
    >>> q, k, rq, marks = (torch.randn(1, h, n, d) for h, n, d in [(4, 48, 16), (2, 48, 16), (4, 48, 17), (4, 6, 17)])
    >>> attn(q, k, k, retrieval_q=rq, landmarks=marks).shape
    torch.Size([1, 4, 48, 16])
    """
    chunk, top_k = check_whole("hils", "chunk", chunk, 2), check_whole("hils", "top_k", top_k, 1)
    if check_whole("hils", "window", window, 1) % chunk:
        raise PatternError(f"hils(): window must be a multiple of chunk, which is {chunk}; got {window}")
    near = kv_idx // chunk >= (q_idx - window + 1) // chunk
    token = kv_idx % chunk != chunk - 1
    queries = sd.input("retrieval_q", "batch heads queries retrieval_dim")
    scores = sd.dot(queries, sd.input("landmarks", f"batch heads keys/{chunk} retrieval_dim"), scale=1.0)
    picked = sd.top_k(scores.softmax(~near).over_group("max"), top_k, among=~near)
    far = sd.attend(~near & token & picked, normaliser=sd.per_chunk(picked, scores=scores))
    return sd.joint(causal() & near & token, far)
