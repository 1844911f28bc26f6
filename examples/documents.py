"""How do I pack several documents into one row without one seeing the other?

Computes packed documents in one call, and each document alone: the outputs are equal.

    python examples/documents.py
"""

from __future__ import annotations

import torch

import sparsedsl as sd

LENGTHS = [70, 25, 130]
HEADS, HEAD_DIM = 4, 32


def main() -> None:
    """Compare one packed call with a call for each document."""
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    doc = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    q, k, v = (torch.randn(1, HEADS, tokens, HEAD_DIM) for _ in range(3))

    pattern = sd.patterns.packed(window=64)
    print(pattern.text)
    packed = sd.compile(pattern, backend="reference")(q, k, v, doc=doc)

    alone = sd.compile(sd.patterns.sliding_window(64), backend="reference")
    pieces = [alone(*part) for part in zip(*(t.split(LENGTHS, dim=2) for t in (q, k, v)), strict=True)]
    difference = (packed - torch.cat(pieces, dim=2)).abs().max().item()
    print(f"largest difference between packed and separate documents: {difference:.1e}")
    assert difference < 1e-5

    report = sd.analyse(pattern, tokens, doc=doc, block_size=16)
    print(f"{report.density:.1%} of all pairs are computed")


if __name__ == "__main__":
    main()
