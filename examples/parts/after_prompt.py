"""What comes after a prompt: texts with facts hidden in them, and how a model that has read one goes on."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

import sparsedsl as sd
from parts import gemma

__all__ = ["DIGITS", "PLACES", "Text", "density", "judged", "read", "texts", "watching"]

PLACES = (
    *("Paris", "London", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Lisbon"),
    *("Athens", "Dublin", "Warsaw", "Prague", "Cairo", "Tokyo", "Delhi", "Lima"),
)
DIGITS = 5  # of a hidden number


@dataclass(frozen=True)
class Text:
    """A prompt of real text with facts in it (1, N), the text that follows (1, n), and (question, answer) as token ids (1, ..)."""

    prompt: torch.Tensor
    following: torch.Tensor
    asked: tuple[tuple[torch.Tensor, torch.Tensor], ...]


def texts(model: Any, tokenizer: Any, tokens: int, count: int, facts: int, following: int) -> list[Text]:
    """``count`` prompts of ``tokens`` tokens from different places of Python's reference.

    Each holds ``facts`` facts at even distances, and is followed by ``following`` tokens of the same text.
    """
    begin = torch.tensor([model.config.bos_token_id])

    def encode(text: str) -> torch.Tensor:
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
        return ids[1:] if ids[0] == begin[0] else ids

    source, chance, made = encode(gemma.real_text()), random.Random(0), []
    for number in range(count):
        at, parts, asked = number * (len(source) - tokens - following) // max(count, 2), [begin], []
        keys = [f"{chance.randrange(10 ** (DIGITS - 1), 10**DIGITS)}" for _ in range(facts)]
        lines = [
            encode(f"\n\nRemember: the pass key for {place} is {key}. The pass key for {place} is {key}.\n\n")
            for place, key in zip(PLACES[:facts], keys, strict=True)
        ]
        free = tokens - 1 - sum(map(len, lines))
        edges = [at + free * (2 * i + 1) // (2 * facts) for i in range(facts)]
        for first, last, line in zip([at, *edges], edges, lines, strict=False):
            parts += [source[first:last], line]
        parts.append(source[edges[-1] : at + free])
        for place, key in zip(PLACES, keys, strict=False):
            asked.append((encode(f"\n\nThe pass key for {place} is ")[None], encode(key)[None]))
        made.append(Text(torch.cat(parts)[None], source[None, at + free : at + free + following], tuple(asked)))
    return made


@contextlib.contextmanager
def watching(model: Any, see: Callable[..., None]) -> Iterator[None]:
    """``see(layer, q, k, v, processor seconds)`` after the attention of every layer in forwards inside."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # Layers with a pattern call a function of their own, by a name that only they have.
    names = {layer.self_attn.config._attn_implementation for layer in model.model.layers}
    functions = {name: ALL_ATTENTION_FUNCTIONS[name] for name in names}

    def watched(
        run: Callable[..., Any], module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: Any, **words: Any
    ) -> Any:
        start = time.process_time()
        result = run(module, q, k, v, *mask, **words)
        see(module.layer_idx, q, k, v, time.process_time() - start)
        return result

    for name, run in functions.items():
        AttentionInterface.register(name, functools.partial(watched, run))
    try:
        yield
    finally:
        for name, run in functions.items():
            AttentionInterface.register(name, run)


def density(program: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Share of the causal pairs that attend under ``program``, mean over heads.

    Without logits every pair weighs 1 and the LSE of a row is the logarithm of their number; what chooses keeps its own scale.
    """
    _, lse = sd.compile(program)(q, k, v, return_lse=True, scale=1e-30)
    return float(lse.double().exp().sum() / (lse.numel() * (q.shape[2] + 1) / 2))


def read(model: Any, ids: torch.Tensor, what: str) -> tuple[Any, torch.Tensor]:
    """The KV cache after a prompt, and the hidden state of its last token (1, 1, 640)."""
    with torch.no_grad(), gemma.layer_bar(model, what):
        out = model.model(ids, use_cache=True)
    return out.past_key_values, out.last_hidden_state[:, -1:]


def judged(model: Any, after: tuple[Any, torch.Tensor], several: Sequence[torch.Tensor], count: int) -> list[tuple[float, int]]:
    """For each of several token ids (1, n) that could follow what was read: its last ``count`` tokens' summed loss, and how many were the
    most likely ones."""
    hidden, wanted = [], torch.cat([ids[0, -count:] for ids in several])
    with torch.no_grad():
        for ids in tqdm(several, desc="read on", unit="text", leave=False):
            cache = copy.deepcopy(after[0])
            following = model.model(ids, past_key_values=cache).last_hidden_state
            hidden.append(torch.cat([after[1], following[:, :-1]], dim=1)[:, -count:])
    losses, hits = [], []
    for place, logits in gemma.logit_chunks(model, torch.cat(hidden, dim=1), 0, "judge"):
        losses.append(torch.nn.functional.cross_entropy(logits, wanted[place], reduction="none"))
        hits.append(logits.argmax(-1) == wanted[place])
    parts = zip(torch.cat(losses).split(count), torch.cat(hits).split(count), strict=True)
    return [(loss.sum().item(), int(hit.sum())) for loss, hit in parts]
