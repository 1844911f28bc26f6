"""What does a hybrid of my own save in a real model, and what does it cost in quality?

    python examples/gemma_hybrid.py             (`make demo` sets everything up and runs this)

Gemma 3 has 15 layers that see 512 tokens and 3 that see everything. The script checks that sparsedsl computes what the model
computes, then gives the 3 full layers the pattern written here. Edit it and run again.
"""

from __future__ import annotations

import sparsedsl as sd
from sparsedsl import kv_idx, q_idx

# ---- edit here ------------------------------------------------------------------------------------------

TOKENS = 4096  # context length, at most 32,768 (--tokens)

causal = kv_idx <= q_idx
near = q_idx - kv_idx < 512  # the last 512 tokens
first = kv_idx < 64  # the first 64 tokens: attention sinks
blocks = (q_idx // 128 - kv_idx // 128) % 4 == 0  # every fourth block of 128 tokens, counted back from the query's own

HYBRID = causal & (near | first | blocks)

# ---------------------------------------------------------------------------------------------------------

JUDGED = 512  # perplexity and logits are taken over the last tokens, where the patterns differ most
PROMPT, GREEDY = 1024, 16  # tokens to generate from, and to generate
PICTURE = "out/gemma_hybrid.png"


def main() -> None:
    """Report, then measure: transformers' own attention, the same patterns through sparsedsl, the hybrid."""
    import argparse
    import time
    from pathlib import Path

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"context length, {JUDGED + 1} to 32768; default %(default)s")
    length = parser.parse_args().tokens
    if not JUDGED < length <= 32768:
        parser.error(f"--tokens must be between {JUDGED + 1} and 32768; got {length}")

    import torch

    from parts import gemma

    begin = time.perf_counter()
    print(f"The hybrid for the full layers, {length:,} tokens, before anything runs:\n")
    print(sd.analyse(HYBRID, length, heads=4, head_dim=256, dtype="float32"), "\n")
    Path(PICTURE).parent.mkdir(exist_ok=True)
    sd.plot(HYBRID, length).savefig(PICTURE, dpi=120)
    print(f"picture: {PICTURE}\n")

    model, tokenizer = gemma.load()
    ids = tokenizer(gemma.real_text(), return_tensors="pt").input_ids[:, :length]
    judged = length - 1 - JUDGED
    native = sd.models.native_patterns(model)
    full = [index for index, pattern in native.items() if pattern == sd.attend(causal)]
    print(f"Gemma 3 270M on {torch.get_num_threads()} threads. Layers {full} see everything, the other {len(native) - len(full)}")
    print(f"  {native[0]}\n")
    print(f"{'attention':32} {'prefill':>9} {'first one':>10} {'perplexity':>11} {'per new token':>14}")

    def measure(name: str, warm_up: int) -> tuple[torch.Tensor, list[int]]:
        _, first = gemma.prefill(model, ids[:, :warm_up], f"{name}: first prefill")
        hidden, seconds = gemma.prefill(model, ids, f"{name}: prefill")
        perplexity = gemma.perplexity(model, hidden, ids, judged, f"{name}: perplexity")
        tokens, step = gemma.greedy(model, ids[:, -PROMPT:], GREEDY, f"{name}: generate")
        first_one = f"{first:8.1f} s" if warm_up == length else f"{'-':>10}"
        print(f"{name:32} {seconds:7.1f} s {first_one} {perplexity:11.3f} {step * 1e3:11.0f} ms", flush=True)
        return hidden, tokens

    own, own_tokens = measure("transformers sdpa", min(length, 512))
    with sd.models.apply(model, native):
        same, same_tokens = measure("sparsedsl, native patterns", length)
    with sd.models.apply(model, {**native, **dict.fromkeys(full, HYBRID)}):
        _, hybrid_tokens = measure("sparsedsl, hybrid in full layers", length)
    print(f"(the first prefill cuts the patterns; perplexity of the last {JUDGED} tokens; tokens after a prompt of {PROMPT:,})\n")

    worst = gemma.largest_difference(model, own, same, judged, "compare logits")
    equal = sum(a == b for a, b in zip(own_tokens, same_tokens, strict=True))
    print("native patterns against transformers' own attention:")
    print(f"  logits of the last {JUDGED} tokens: largest difference {worst:.1e}")
    print(f"  greedy tokens: {equal} of {GREEDY} the same")
    print(f"  own:    {tokenizer.decode(own_tokens)!r}\n  hybrid: {tokenizer.decode(hybrid_tokens)!r}\n")
    print(f"{time.perf_counter() - begin:.0f} s in all. Edit HYBRID in {Path(__file__).name} and run it again.")


if __name__ == "__main__":
    main()
