"""I have FlexAttention functions already. What do I gain, and how do I get back?

Traces a mask function and a score function, proves that the mask is a pattern of the library, and gives functions back.

    python examples/trace_flex.py
"""

from __future__ import annotations

import torch

import sparsedsl as sd

WINDOW = 256
slopes = 2.0 ** -torch.arange(1, 9)


def mask_mod(b, h, q_idx, kv_idx):
    """Written for torch.nn.attention.flex_attention."""
    near = (q_idx - kv_idx) < WINDOW
    return (q_idx >= kv_idx) & near


def score_mod(score, b, h, q_idx, kv_idx):
    """Written for torch.nn.attention.flex_attention; ``slopes`` is captured."""
    return score - slopes[h] * (q_idx - kv_idx)


def main() -> None:
    """Trace, prove, analyse, and return."""
    mask, score = sd.trace_mask(mask_mod), sd.trace_score(score_mod)
    print("mask: ", mask)
    print("score:", score, "with the captured table", ", ".join(score.tables))
    print("the library's sliding_window?", sd.equivalent(mask, sd.patterns.sliding_window(WINDOW)))

    pattern = sd.attend(mask, score=score)
    report = sd.analyse(pattern, 4096)
    print(f"causal: {report.causal}; {report.density:.1%} of all pairs")

    attn = sd.compile(pattern, backend="reference")
    q, kv = torch.arange(512)[:, None], torch.arange(512)[None]
    assert torch.equal(attn.mask_mod()(0, 0, q, kv), mask_mod(0, 0, q, kv))
    print("the mask function given back has the same values")
    print("and its BlockMask, made without visiting all pairs:", attn.block_mask(4096, 4096).shape)


if __name__ == "__main__":
    main()
