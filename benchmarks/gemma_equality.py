"""Gemma 3 270M with native patterns against transformers' own attention: all logits of 4,096 tokens, and 64 greedy tokens.

    python benchmarks/gemma_equality.py [tokens] [greedy tokens]

Prints one line of JSON; exits with 1 if logits differ by 1e-3 or more, or any token differs. Takes two minutes on two cores.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import sparsedsl as sd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from parts import gemma


def main(length: int = 4096, new: int = 64) -> int:
    """Run both attentions on the same text; 0 if they agree."""
    model, tokenizer = gemma.load()
    ids = tokenizer(gemma.real_text(), return_tensors="pt").input_ids[:, :length]
    prompt = ids[:, -min(length, 1024) :]  # twice the window, so that the window layers' caches are cropped
    own, own_seconds = gemma.prefill(model, ids, "transformers: prefill")
    own_tokens, own_step = gemma.greedy(model, prompt, new, "transformers: generate")
    with sd.models.apply(model, sd.models.native_patterns(model)):
        same, seconds = gemma.prefill(model, ids, "sparsedsl: prefill")
        tokens, step = gemma.greedy(model, prompt, new, "sparsedsl: generate")
    worst = gemma.largest_difference(model, own, same, 0, "compare logits")
    equal = sum(a == b for a, b in zip(own_tokens, tokens, strict=True))
    result = {
        "tokens": length,
        "largest logit difference": worst,
        "greedy tokens equal": f"{equal} of {new}",
        "prefill s (transformers, sparsedsl with compilation)": [round(own_seconds, 1), round(seconds, 1)],
        "decode ms per token (transformers, sparsedsl)": [round(own_step * 1e3), round(step * 1e3)],
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
    }
    print(json.dumps(result))
    return 0 if worst < 1e-3 and equal == new else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
