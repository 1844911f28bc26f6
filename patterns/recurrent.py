"""Linear attention with constant decays, and with decays and write rules that come from the data: each layer as one recurrence."""

from __future__ import annotations

import math

from sparsedsl import program as sd
from sparsedsl.patterns.checked_arguments import check_whole
from sparsedsl.program.recurrences import Linear

__all__ = ["based", "delta_net", "gated_delta", "gla", "kda", "lightning", "retnet", "rwkv6", "rwkv7", "ssd"]


def gated_delta() -> Linear:
    """Gated delta rule: a state that decays, then takes in what it got wrong about a key: the linear layers of Qwen3-Next.

    ``S = e^g_t S_(t-1)``, ``S_t = S + beta_t k_t^T (v_t - k_t S)``, ``o_t = q_t S_t / sqrt(D)``; q and k of length 1.

    Call-time inputs: ``g (B, Hv, Skv)``, at most 0, as ``-exp(A) softplus(a + dt)``; ``beta (B, Hv, Skv)``, as a sigmoid, or twice that for
    negative eigenvalues. ``Hv`` are the heads of v, a multiple of those of q and k. The short convolution before and the gated norm after
    are the model's.

    Source: Gated DeltaNet (arXiv 2412.06464).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.gated_delta())
    >>> q, k, v = torch.randn(1, 2, 100, 16), torch.randn(1, 2, 100, 16), torch.randn(1, 4, 100, 16)
    >>> g, beta = -torch.rand(1, 4, 100), torch.rand(1, 4, 100)
    >>> out, state = attn(q, k, v, g=g, beta=beta, return_state=True)
    >>> out.shape, state.nbytes  # 4 heads of 16 x 16, float32
    (torch.Size([1, 4, 100, 16]), 4096)
    """
    g, beta = (sd.input(name, "batch value_heads keys") for name in ("g", "beta"))
    return sd.linear(log_decay=g, beta=beta, features="l2")


def kda() -> Linear:
    """Kimi delta attention: the gated delta rule with a decay for every channel of a key.

    ``S = diag(e^g_t) S_(t-1)``, ``S_t = S + beta_t k_t^T (v_t - k_t S)``, ``o_t = q_t S_t / sqrt(D)``; q and k of length 1.

    Call-time inputs: ``g (B, Hv, Skv, D)``, at most 0; ``beta (B, Hv, Skv)``.

    Source: Kimi Linear (arXiv 2510.26692).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.kda())
    >>> q = k = v = torch.randn(1, 2, 100, 16)
    >>> attn(q, k, v, g=-torch.rand(1, 2, 100, 16), beta=torch.rand(1, 2, 100)).shape
    torch.Size([1, 2, 100, 16])
    """
    g, beta = sd.input("g", "batch value_heads keys head_dim"), sd.input("beta", "batch value_heads keys")
    return sd.linear(log_decay=g, beta=beta, features="l2")


def delta_net() -> Linear:
    """The delta rule without a decay: ``S_t = S_(t-1) + beta_t k_t^T (v_t - k_t S_(t-1))``, q and k of length 1.

    Call-time input: ``beta (B, H, Skv)``, from 0 to 1, or to 2 for negative eigenvalues.

    Source: DeltaNet (arXiv 2406.06484).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.delta_net())
    >>> q = k = v = torch.randn(1, 2, 100, 16)
    >>> attn(q, k, v, beta=torch.rand(1, 2, 100)).shape
    torch.Size([1, 2, 100, 16])
    """
    return sd.linear(1.0, beta=sd.input("beta", "batch value_heads keys"), features="l2")


def gla() -> Linear:
    """Gated linear attention: every channel of a key decays by itself, ``S_t = diag(e^g_t) S_(t-1) + k_t^T v_t``.

    Call-time input: ``g (B, H, Skv, D)``, at most 0, as ``logsigmoid(x) / 16``.

    Source: GLA (arXiv 2312.06635).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.gla())
    >>> q = k = v = torch.randn(1, 2, 100, 16)
    >>> attn(q, k, v, g=torch.nn.functional.logsigmoid(torch.randn(1, 2, 100, 16)) / 16).shape
    torch.Size([1, 2, 100, 16])
    """
    return sd.linear(log_decay=sd.input("g", "batch value_heads keys head_dim"))


def rwkv6() -> Linear:
    """RWKV-6: every channel of a key decays by itself, and a token reads before it writes, its own key by a bonus a channel.

    ``o_t = q_t (S_(t-1) + (bonus k_t)^T v_t)``, ``S_t = diag(e^g_t) S_(t-1) + k_t^T v_t``; q is the receptance. The token shift, the
    norm of heads and the gate are the model's.

    Call-time inputs: ``g (B, H, Skv, D)``, ``-exp(w)``; ``bonus (H, D)``, of query heads.

    Source: RWKV-6 (arXiv 2404.05892).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.rwkv6())
    >>> q = k = v = torch.randn(1, 2, 100, 16)
    >>> attn(q, k, v, g=-torch.rand(1, 2, 100, 16), bonus=torch.randn(2, 16)).shape
    torch.Size([1, 2, 100, 16])
    """
    g, bonus = sd.input("g", "batch value_heads keys head_dim"), sd.input("bonus", "heads head_dim")
    return sd.linear(log_decay=g, reads="before", bonus=bonus, scale=1.0)


def rwkv7() -> Linear:
    """RWKV-7: what a removal key reads of the state is taken off along another key, then the token writes.

    ``S_t = diag(e^g_t) S_(t-1) - (a n)_t^T (n_t S_(t-1)) + k_t^T v_t``, ``o_t = q_t S_t``; q is the receptance, k the replacement
    key, ``n`` the removal key of length 1, ``a`` its rate a channel, in [0, 1]. As ``linear`` reads the state when it has decayed,
    ``erase`` is ``n e^-g``: g is at least ``-e^-0.5``, as published. The token shift, the norm of heads, the bonus and the gate are the
    model's.

    Call-time inputs: ``g``, ``-e^-0.5 sigmoid(w)``; ``erase``, ``n e^-g``; ``along``, ``n a``; all ``(B, H, Skv, D)``.

    Source: RWKV-7 (arXiv 2503.14456).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.rwkv7())
    >>> q = k = v = torch.randn(1, 2, 100, 16)
    >>> n, a = torch.nn.functional.normalize(torch.randn(1, 2, 100, 16), dim=-1), torch.rand(1, 2, 100, 16)
    >>> g = -0.6 * torch.rand(1, 2, 100, 16)
    >>> attn(q, k, v, g=g, erase=n * (-g).exp(), along=n * a).shape
    torch.Size([1, 2, 100, 16])
    """
    g, erase, along = (sd.input(name, "batch value_heads keys head_dim") for name in ("g", "erase", "along"))
    return sd.linear(log_decay=g, erase=erase, along=along, scale=1.0)


def ssd() -> Linear:
    """State space duality: the core of Mamba-2, ``S_t = e^g_t S_(t-1) + B_t^T (dt_t x_t)``, ``y_t = C_t S_t``.

    Called with ``q = C`` and ``k = B`` (their groups are heads), and ``v = dt x`` (its heads are the model's). The convolution, ``D x``
    and the gated norm are the model's.

    Call-time input: ``g (B, Hv, Skv)``, ``-exp(A_log) dt``.

    Source: Mamba-2 (arXiv 2405.21060).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.ssd())
    >>> c, b, x, dt = torch.randn(1, 1, 100, 16), torch.randn(1, 1, 100, 16), torch.randn(1, 4, 100, 8), torch.rand(1, 4, 100)
    >>> attn(c, b, x * dt[..., None], g=-0.5 * dt).shape
    torch.Size([1, 4, 100, 8])
    """
    return sd.linear(log_decay=sd.input("g", "batch value_heads keys"), scale=1.0)


def based() -> Linear:
    """Linear attention by a second-order Taylor series of softmax: a pair weighs ``1 + s + s^2 / 2``, ``s = q k / sqrt(D)``; nothing fades.

    Rows of q and k are short (16 channels as published): the state has ``1 + D + D (D + 1) / 2`` rows. The sum of the weights is known, so
    that :func:`sparsedsl.joint` puts it under one softmax with a window.

    Source: BASED (arXiv 2402.18668).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.joint(sd.patterns.based(), sd.patterns.sliding_window(16)))
    >>> q = k = v = torch.randn(1, 2, 100, 16)
    >>> attn(q, k, v).shape
    torch.Size([1, 2, 100, 16])
    """
    return sd.linear(1.0, features="taylor", normalised="sum")


def retnet(heads: int) -> Linear:
    """Retention: ``o_t = q_t S_t / sqrt(D)``, ``S_t = (1 - 2 ** (-5 - h)) S_(t-1) + k_t^T v_t``: later heads forget more slowly.

    The rotation of q and k before, and the norm of each head after, are the model's. (The norm also undoes the published division by
    what decays add up to.)

    Args:
        heads: query heads.

    Source: Sun et al. 2023, "Retentive Network" (arXiv 2307.08621).

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.retnet(heads=4))
    >>> q = k = v = torch.randn(1, 4, 100, 16)
    >>> attn(q, k, v).shape
    torch.Size([1, 4, 100, 16])
    """
    return sd.linear(log_decay=[math.log1p(-(2.0 ** (-5 - head))) for head in range(check_whole("retnet", "heads", heads, 1))])


def lightning(heads: int, layer: int, layers: int) -> Linear:
    """Lightning attention: ``o_t = q_t S_t / sqrt(D)``, ``S_t = e^(-s) S_(t-1) + k_t^T v_t``, ``s = (8 h / heads) (1 - layer / layers)``.

    Head 0 never fades. Models that take ALiBi's slopes instead (MiniMax) have
    ``sd.linear(sd.decay_table(heads, layer, layers, depth="serve"))``.

    Args:
        heads: query heads.
        layer: this layer, from 0.
        layers: all layers of the model.

    Source: Lightning Attention-2 (arXiv 2401.04658), with the decays of flash-linear-attention.

    >>> import torch
    >>> import sparsedsl as sd
    >>> attn = sd.compile(sd.patterns.lightning(heads=4, layer=0, layers=20))
    >>> q = k = v = torch.randn(1, 4, 100, 16)
    >>> attn(q, k, v).shape
    torch.Size([1, 4, 100, 16])
    """
    return sd.linear(sd.decay_table(heads, layer, layers, rule="linear"))
