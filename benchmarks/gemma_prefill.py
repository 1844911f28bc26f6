"""Gemma 3 270M on real text: prefill and decode with transformers' own SDPA, with native patterns, and with a hybrid.

    python benchmarks/gemma_prefill.py              # prefill of 8K tokens, 64 tokens after 4K: about 10 minutes on two cores
    python benchmarks/gemma_prefill.py --quick      # 1K tokens, few rounds: about a minute

Three models that share their weights (float32, batch 1):

- *sdpa*: transformers' own attention, ``scaled_dot_product_attention`` with the model's native masks.
- *native*: the same patterns through ``sd.models.apply``, backend ``auto``.
- *hybrid*: the pattern of ``examples/gemma_hybrid.py`` in the three full layers, the others native.

They take turns; times are medians, ratios medians within a round. *Prefill* is a forward pass without cache and without the
vocabulary head; the first one of each, which cuts the patterns into strips, stands apart. *Decode* is the mean time of a token
of greedy generation after the prompt's prefill. The weights come with the extra ``demo``; see ``examples/parts/gemma.py``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import time
from pathlib import Path
from typing import Any

import measure
import torch
from measure import length_text, median, time_text
from tqdm import tqdm

import sparsedsl as sd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from gemma_hybrid import HYBRID

from parts import gemma

METHODS = ("sdpa", "native", "hybrid")
TITLES = {"sdpa": "transformers sdpa", "native": "sparsedsl, native patterns", "hybrid": "sparsedsl, hybrid in full layers"}
JUDGED = 512  # logits are compared over the last tokens
# Targets: native no slower than SDPA; the hybrid faster. Equal within 3 % counts as equal.
NATIVE_SPEEDUP, HYBRID_SPEEDUP, LOGITS = 0.97, 1.0, 1e-3


def three_models(model: Any) -> dict[str, Any]:
    """The model and two that share its weights, with patterns in their attention layers."""
    models = {"sdpa": model}
    for name in METHODS[1:]:
        shared = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
        models[name] = copy.deepcopy(model, shared)
    native = sd.models.native_patterns(model)
    full = [index for index, pattern in native.items() if pattern == sd.attend(sd.patterns.causal())]
    sd.models.apply(models["native"], native)
    sd.models.apply(models["hybrid"], {**native, **dict.fromkeys(full, HYBRID)})
    return models


def measure_prefill(models: dict[str, Any], ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    """First and steady times of all three, and the largest difference between logits."""
    hidden, first = {}, {}
    for name, model in models.items():
        hidden[name], first[name] = gemma.prefill(model, ids, f"{TITLES[name]}: first prefill")
    start = max(0, ids.shape[1] - JUDGED)
    differences = {
        name: gemma.largest_difference(models["sdpa"], hidden["sdpa"], hidden[name], start, "compare logits")
        for name in METHODS[1:]
    }
    hidden.clear()
    with tqdm(total=rounds * len(models), desc=f"prefill, {length_text(ids.shape[1])} tokens", unit="prefill") as bar:
        actions = {name: functools.partial(gemma.prefill, model, ids, TITLES[name]) for name, model in models.items()}
        found = measure.alternate(actions, rounds, done=bar.update)
    return {
        "tokens": ids.shape[1],
        "first_s": first,
        "seconds": {name: median(values) for name, values in found.items()},
        "all_seconds": found,
        "speedup": {name: median(a / b for a, b in zip(found["sdpa"], found[name], strict=True)) for name in METHODS[1:]},
        "largest_logit_difference": differences,
    }


def measure_decode(models: dict[str, Any], prompt: torch.Tensor, new: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of all three, and how many tokens are those of transformers' own attention."""
    steps: dict[str, list[float]] = {name: [] for name in models}
    tokens: dict[str, list[int]] = {}
    with tqdm(total=rounds * len(models), desc=f"decode after {length_text(prompt.shape[1])} tokens", unit="generation") as bar:
        for number in range(rounds):
            for name in METHODS if number % 2 == 0 else METHODS[::-1]:
                tokens[name], step = gemma.greedy(models[name], prompt, new, TITLES[name])
                steps[name].append(step)
                bar.update()
    return {
        "prompt_tokens": prompt.shape[1],
        "new_tokens": new,
        "tokens_per_s": {name: 1 / median(values) for name, values in steps.items()},
        "speedup": {name: median(a / b for a, b in zip(steps["sdpa"], steps[name], strict=True)) for name in METHODS[1:]},
        "same_tokens": {name: sum(a == b for a, b in zip(tokens["sdpa"], tokens[name], strict=True)) for name in METHODS[1:]},
    }


def checks(prefill: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets with what was measured for them."""
    where = f"prefill, {length_text(prefill['tokens'])}"
    return [
        measure.target(f"sdpa / native, {where}", prefill["speedup"]["native"], at_least=NATIVE_SPEEDUP),
        measure.target(f"sdpa / hybrid, {where}", prefill["speedup"]["hybrid"], at_least=HYBRID_SPEEDUP),
        measure.target("largest logit difference, native", prefill["largest_logit_difference"]["native"], at_most=LOGITS),
    ]


def text(prefill: dict[str, Any], decode: dict[str, Any], targets: list[dict[str, Any]]) -> str:
    """The table, and how the targets were met."""
    header = ["attention", f"prefill {length_text(prefill['tokens'])}", "sdpa /", "first prefill", "logits differ by"]
    header += [f"tokens/s after {length_text(decode['prompt_tokens'])}", "/ sdpa", f"same of {decode['new_tokens']} tokens"]
    rows = []
    for name in METHODS:
        own = name == "sdpa"
        row = [TITLES[name], time_text(prefill["seconds"][name]), "1" if own else f"{prefill['speedup'][name]:.2f}"]
        row += [time_text(prefill["first_s"][name]), "-" if own else f"{prefill['largest_logit_difference'][name]:.1e}"]
        row += [f"{decode['tokens_per_s'][name]:.1f}", "1" if own else f"{decode['speedup'][name]:.2f}"]
        rows.append([*row, "-" if own else str(decode["same_tokens"][name])])
    return measure.markdown(header, rows) + "\n\n" + measure.verdicts(targets)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results, print the table and how the targets were met; 0 however they were met."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="1K tokens, few rounds: about a minute")
    add("--tokens", type=int, help="length of the prefill (default 8192, quick 1024)")
    add("--prompt", type=int, help="tokens before the generated ones (default 4096, quick 1024)")
    add("--new", type=int, help="tokens to generate (default 64, quick 8)")
    add("--rounds", type=int, help="prefills behind each median (default 3, quick 1)")
    add("--decode-rounds", type=int, help="generations behind each median (default 3, quick 1)")
    add("--out", type=Path, help="JSON file (default: benchmarks/results/gemma_prefill_<machine>.json)")
    options = parser.parse_args(arguments)
    for name, usual, quick in (
        ("tokens", 8192, 1024), ("prompt", 4096, 1024), ("new", 64, 8), ("rounds", 3, 1), ("decode_rounds", 3, 1),
    ):  # fmt: skip
        setattr(options, name, getattr(options, name) or (quick if options.quick else usual))

    facts = measure.machine()
    start = time.perf_counter()
    model, tokenizer = gemma.load()
    ids = tokenizer(gemma.real_text(), return_tensors="pt").input_ids[:, : max(options.tokens, options.prompt)]
    models = three_models(model)
    prefill = measure_prefill(models, ids[:, : options.tokens], options.rounds)
    decode = measure_decode(models, ids[:, : options.prompt], options.new, options.decode_rounds)
    targets = checks(prefill)
    facts |= {"load_average_end": measure.load(), "benchmark_s": round(time.perf_counter() - start)}
    path = options.out or measure.result_path("gemma_prefill", facts)
    settings = {key: getattr(options, key) for key in ("quick", "rounds", "decode_rounds")} | {"dtype": "float32", "batch": 1}
    result = {"rates": measure.rates(), "prefill": prefill, "decode": decode, "targets": targets}
    measure.write_json(path, {"benchmark": "gemma_prefill", "machine": facts, "settings": settings} | result)
    print(f"Gemma 3 270M. {measure.describe(facts)}\n")
    print(text(prefill, decode, targets))
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
