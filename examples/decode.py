"""Does my pattern mean the same with a KV cache?

Computes a sequence at once, in chunks, and token by token: ``q_offset`` says where the first query of a call lies.

    python examples/decode.py
"""

from __future__ import annotations

import itertools

import torch

import sparsedsl as sd

TOKENS, CHUNK, DECODED = 96, 40, 8


def main() -> None:
    """Compare prefill, chunked prefill and decode."""
    torch.manual_seed(0)
    attn = sd.compile(sd.attend(sd.patterns.streaming_llm(32, 4), score=sd.patterns.softcap(20)), backend="reference")
    q, k, v = (torch.randn(1, 2, TOKENS, 32) for _ in range(3))
    whole = attn(q, k, v)

    cuts = [*range(0, TOKENS - DECODED, CHUNK), *range(TOKENS - DECODED, TOKENS + 1)]
    steps = []
    for start, end in itertools.pairwise(cuts):
        steps.append(attn(q[:, :, start:end], k[:, :, :end], v[:, :, :end], q_offset=start))
    difference = (whole - torch.cat(steps, dim=2)).abs().max().item()
    print(f"{len(steps)} calls instead of one, {DECODED} of them for a single token")
    print(f"largest difference: {difference:.1e}")
    assert difference < 1e-5


if __name__ == "__main__":
    main()
