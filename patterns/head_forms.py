"""Attentions whose heads are of another form: some that stream, two softmaxes subtracted, keys in a latent, keys that were retained."""

from __future__ import annotations

from sparsedsl import program as sd
from sparsedsl.lang.expressions import Index, Mask, b, h, kv_idx
from sparsedsl.lang.numeric import minimum
from sparsedsl.lang.pattern import Pattern, attend
from sparsedsl.lang.table_reads import table
from sparsedsl.patterns.checked_arguments import check_count, check_whole
from sparsedsl.patterns.local import causal
from sparsedsl.patterns.models import streaming_llm
from sparsedsl.program.branches import Mix

__all__ = ["differential", "duo_attention", "mla", "retained"]


def duo_attention(window: int | Index = 256, sink_count: int = 64, *, name: str = "retrieval") -> Mask:
    """Heads that retrieve see all earlier keys, the others a window and the first keys: ``retrieval[h]`` says which.

    Args:
        window: last keys that a streaming head sees, the query's own included.
        sink_count: first keys that it sees.
        name: name of the boolean table ``(H,)``, true for heads that retrieve.

    Raises:
        PatternError: a window below 1, a negative number of first keys.

    Source: DuoAttention (arXiv 2410.10819).

    >>> import sparsedsl as sd
    >>> sd.patterns.duo_attention(256, 4).tables["retrieval"].declaration()
    "table('retrieval', dtype=bool)"
    """
    return causal() & (table(name, dtype=bool)[h] | streaming_llm(window, sink_count))


def retained(prompt: int | Index, recent: int = 0, *, name: str = "stays") -> Mask:
    """Of a prompt the keys that stay, and all keys after it: causal attention with a cache from which keys were dropped once.

    ``stays[b, h, kv_idx]`` or ``kv_idx >= prompt - recent``, for ``kv_idx <= q_idx``. Positions count all keys, as if none was dropped.

    Args:
        prompt: tokens of the prompt; a whole number or an index expression such as ``table[b]``.
        recent: last keys of the prompt, which stay in any case.
        name: name of the boolean table ``(B, H, prompt)``, as the choices of :func:`snapkv` and :func:`h2o` give it.

    Raises:
        PatternError: a prompt of no token, a negative number of recent keys.

    Source: SnapKV (arXiv 2404.14469).

    >>> import sparsedsl as sd
    >>> print(sd.patterns.retained(64, recent=6))
    (kv_idx <= q_idx) & ((kv_idx >= 58) | stays[b, h, minimum(63, kv_idx)])
    """
    prompt = check_count("retained", "prompt", prompt, 1)
    stays = table(name, dtype=bool)[b, h, minimum(kv_idx, prompt - 1)]
    return causal() & (stays | (kv_idx >= prompt - check_whole("retained", "recent", recent, 0)))


def mla(head_dim: int = 192) -> Pattern:
    """Multi-head latent attention in its absorbed form: causal attention of all heads to one row a token, the latent and a rotated key.

    ``softmax_j(q_t . [c_j ; r_j] / sqrt(head_dim)) c_j``: call it with queries that were multiplied by the keys' up-projection, keys
    ``[c ; r]`` of one head, and values ``c``. The cache is ``[c ; r]``, 576 numbers a token in DeepSeek-V3.

    Args:
        head_dim: width of a query before it was absorbed, whose root the logits are divided by: 128 + 64 in DeepSeek-V3.

    Raises:
        PatternError: ``head_dim`` is below 1.

    Source: DeepSeek-V2 (arXiv 2405.04434).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.mla(head_dim=24))
    >>> absorbed, rows = torch.randn(1, 4, 32, 40), torch.randn(1, 1, 32, 40)  # latents of 32, rotated keys of 8
    >>> attn(absorbed, rows, rows[..., :32]).shape
    torch.Size([1, 4, 32, 32])
    """
    return attend(causal(), scale=check_whole("mla", "head_dim", head_dim, 1) ** -0.5)


def differential() -> Mix:
    """Differential attention: ``g_1 softmax(q k) v + g_2 softmax(q' k') v``, causal, with ``g = (1, -lambda)``: what both see cancels.

    The norm of each head after it is the model's.

    Call-time inputs: ``q_2 (B, Hq, Sq, D)`` and ``k_2 (B, Hkv, Skv, D)``, the second queries and keys; ``gate (B, Hq, Sq, 2)``, 1 and minus
    lambda. Values are as wide as wanted.

    Source: Differential Transformer (arXiv 2410.05258).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.differential())
    >>> q, k, v = torch.randn(1, 4, 32, 16), torch.randn(1, 2, 32, 16), torch.randn(1, 2, 32, 32)
    >>> gate = torch.tensor([1.0, -0.8]).expand(1, 4, 32, 2)
    >>> attn(q, k, v, q_2=q.flip(3), k_2=k, gate=gate).shape
    torch.Size([1, 4, 32, 32])
    """
    second = sd.input("q_2", "batch heads queries head_dim"), sd.input("k_2", "batch kv_heads keys head_dim")
    parts = causal(), sd.attend(causal(), q=second[0], k=second[1])
    return sd.mix(*parts, weights=sd.input("gate", "batch heads queries 2"))
