"""How do I fine-tune a real model through a sparse pattern, on a CPU?

    python examples/gemma_finetune.py               (about three minutes on two cores; --quick: one)

Training goes through attention backwards, and so through the pattern: no mask tensor, no S x S matrix, memory that grows with
the tokens. Eight steps on the sources of Python's standard library, and the loss on sources the model was not trained on,
before and after.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gemma_hybrid import HYBRID
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import sparsedsl as sd
from parts import gemma

# ---- edit here ------------------------------------------------------------------------------------------

PATTERN = HYBRID  # for the three layers that saw everything; the other fifteen keep their window of 512
STEPS, TOKENS = 8, 2048  # optimiser steps, and tokens in each
LEARNING_RATE = 3e-5

# ---------------------------------------------------------------------------------------------------------

HELD_OUT = 2  # texts the model is judged by, each as long as a step
CHUNK = 256  # positions whose logits exist at a time: 262,144 numbers each
TRAINING_SOURCES = ("argparse", "turtle", "tarfile", "inspect", "typing", "pathlib", "subprocess", "doctest")
HELD_OUT_SOURCES = ("statistics", "zipfile", "calendar")


def source_text(modules: tuple[str, ...]) -> str:
    """The sources of some modules of the standard library, one after the other."""
    import importlib.util

    found = (importlib.util.find_spec(name) for name in modules)
    return "\n\n".join(Path(spec.origin).read_text(encoding="utf-8") for spec in found if spec is not None and spec.origin)


def batches(tokenizer: Any, modules: tuple[str, ...], tokens: int) -> Iterator[torch.Tensor]:
    """Token ids ``(1, tokens + 1)``, one after the other through the text: what is read, and one more to be predicted."""
    ids = tokenizer(source_text(modules), return_tensors="pt").input_ids
    for start in range(0, ids.shape[1] - tokens, tokens):
        yield ids[:, start : start + tokens + 1]


def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of every token after the first.

    All logits at once would take 1 MB a token, and as much again for their gradients: they are made in chunks, twice.
    """

    def chunk_loss(hidden: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model.lm_head(hidden), wanted, reduction="sum")

    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state[0]
    wanted = ids[0, 1:]
    chunks = zip(hidden.split(CHUNK), wanted.split(CHUNK), strict=True)
    total = sum(checkpoint(chunk_loss, part, right, use_reentrant=False) for part, right in chunks)
    return torch.as_tensor(total) / wanted.numel()


def held_out_loss(model: Any, held_out: list[torch.Tensor], what: str) -> float:
    """The mean loss over ``held_out``, without gradients."""
    with torch.no_grad():
        return sum(loss(model, ids).item() for ids in tqdm(held_out, desc=what, unit="text", leave=False)) / len(held_out)


def trained_weights(model: Any, layers: int) -> list[torch.nn.Parameter]:
    """The weights of the last ``layers`` layers (0: all). They alone get gradients; embeddings, 60 % of the model, stay as they are."""
    model.requires_grad_(False)
    chosen = model.model.layers[-layers:] if layers else model.model.layers
    chosen.requires_grad_(True)
    return list(chosen.parameters())


def options_from(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="4 steps of 512 tokens on the last 6 layers: about a minute")
    add("--steps", type=int, help=f"optimiser steps (default {STEPS})")
    add("--tokens", type=int, help=f"tokens in a step (default {TOKENS})")
    add("--layers", type=int, help="train the last so many layers; 0: all (default)")
    add("--learning-rate", type=float, default=LEARNING_RATE, help="of AdamW (default %(default)s)")
    add("--checkpointing", action="store_true", help="keep no activations inside layers: less memory, a third more time")
    add("--native", action="store_true", help="the model's own patterns instead of the hybrid")
    options = parser.parse_args(arguments)
    for name, usual, quick in (("steps", STEPS, 4), ("tokens", TOKENS, 512), ("layers", 0, 6)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    if options.steps < 1 or options.tokens < 1 or options.layers < 0:
        parser.error(
            f"--steps and --tokens must be at least 1, --layers at least 0; got {options.steps}, {options.tokens} and {options.layers}"
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    """Loss on unseen text, some steps, loss on unseen text; 0 if it went down."""
    options = options_from(arguments)
    begin = time.perf_counter()
    torch.manual_seed(0)
    model, tokenizer = gemma.load()
    native = sd.models.native_patterns(model)
    full = [index for index, pattern in native.items() if pattern == sd.attend(sd.patterns.causal())]
    patterns = native if options.native else native | dict.fromkeys(full, PATTERN)

    held_out = list(batches(tokenizer, HELD_OUT_SOURCES, options.tokens))[:HELD_OUT]
    training = list(batches(tokenizer, TRAINING_SOURCES, options.tokens))
    weights = trained_weights(model, options.layers)
    optimizer = torch.optim.AdamW(weights, lr=options.learning_rate, weight_decay=0.0)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    with sd.models.apply(model, patterns) as applied:
        print(applied)
        count = sum(weight.numel() for weight in weights)
        print(f"training {count / 1e6:.0f} million weights, {options.steps} steps of {options.tokens:,} tokens\n")
        before = held_out_loss(model, held_out, "held-out loss before")
        print(f"held-out loss before: {before:.4f}", flush=True)
        model.train()
        with tqdm(range(options.steps), desc="fine-tuning", unit="step", leave=False) as steps:
            for step in steps:
                start = time.perf_counter()
                # Spread over the text, so that few steps see many of its files.
                found = loss(model, training[step * len(training) // options.steps % len(training)])
                found.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                steps.write(f"step {step + 1}: loss {found.item():.4f}, {time.perf_counter() - start:.1f} s")
        model.eval()
        after = held_out_loss(model, held_out, "held-out loss after")
    print(f"held-out loss after:  {after:.4f}, {'down' if after < before else 'UP'} by {abs(before - after):.4f}\n")
    print(f"{time.perf_counter() - begin:.0f} s in all. Edit PATTERN in {Path(__file__).name} and run it again.")
    return 0 if after < before else 1


if __name__ == "__main__":
    import sys

    sys.exit(main())
