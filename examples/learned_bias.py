"""How do I train a position bias?

A learned table is an ordinary tensor with gradients; here T5's buckets, which the library computes without a logarithm.

    python examples/learned_bias.py
"""

from __future__ import annotations

import torch

import sparsedsl as sd

HEADS, BUCKETS = 4, 32


def main() -> None:
    """One gradient step, and which buckets it moved."""
    torch.manual_seed(0)
    pattern = sd.patterns.t5(buckets=BUCKETS, max_distance=128)
    attn = sd.compile(pattern, backend="reference")
    bias = torch.nn.Embedding(BUCKETS, HEADS).weight  # T5's relative_attention_bias.weight has this shape
    q, k, v = (torch.randn(1, HEADS, 40, 16) for _ in range(3))

    attn(q, k, v, t5_bias=bias).square().mean().backward()
    assert bias.grad is not None
    moved = bias.grad.abs().sum(1).nonzero()[:, 0].tolist()
    print(f"{len(moved)} of {BUCKETS} buckets got a gradient at 40 tokens: {moved}")
    bucket = sd.patterns.t5_bucket(BUCKETS, 128)
    print("because the bucket is\n ", bucket)


if __name__ == "__main__":
    main()
