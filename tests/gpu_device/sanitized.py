"""What ``test_memory.py`` runs under compute-sanitizer: a few small calls of the generated kernels, forward, backward and decode."""

from __future__ import annotations

import os
import sys

# The caching allocator hides reads beside a tensor: they fall into the same large piece of memory.
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
os.environ.setdefault("SPARSEDSL_TUNE", "off")

import torch

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx

LENGTH = 150


def main(device: str) -> None:
    """Run, and say so."""
    causal = kv_idx <= q_idx
    doc, bias = sd.table("doc", monotone=True), sd.table("bias", learned=True)
    length, dtype = (LENGTH, torch.bfloat16) if device == "cuda" else (40, torch.float16)
    tables = {"doc": torch.arange(length, device=device) // 37, "bias": torch.randn(70, device=device).requires_grad_()}
    window = causal & (q_idx - kv_idx < 70)
    for pattern in (
        sd.attend(window | (causal & (kv_idx < 4))),
        sd.attend(causal & (doc[q_idx] == doc[kv_idx])),
        sd.attend(window, score=sd.score + bias[q_idx - kv_idx]),
    ):
        attn = sd.compile(pattern, backend="triton")
        q = torch.randn(1, 2, length, 32, device=device, dtype=dtype).requires_grad_()
        k, v = (torch.randn(1, 1, length, 32, device=device, dtype=dtype).requires_grad_() for _ in range(2))
        used = {name: tables[name] for name in pattern.tables}
        attn(q, k, v, **used).sum().backward()
        with torch.no_grad():
            attn(q[:, :, -1:], k, v, q_offset=length - 1, **used)
    if device == "cuda":
        torch.cuda.synchronize()
    print("ran")


if __name__ == "__main__":
    main(sys.argv[1])
