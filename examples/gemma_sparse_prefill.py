"""What does a real model lose, and save, if it reads its prompt sparsely without training?

    python examples/gemma_sparse_prefill.py             a quarter of an hour on two free cores
    python examples/gemma_sparse_prefill.py --quick     half a minute, once the weights are cached

Gemma 3 270M has 15 layers that see 512 tokens and 3 that see everything. These three read the prompt by ``pbs`` (blocks of permuted keys),
by ``token_sparse`` (TSA: every head drops tokens), or by both: ``token_sparse(inside=pbs())``.

All three choose by the prompt's last queries and for blocks of queries at a time, so what a token of the prompt computes depends on
tokens after it: the loss *within* a prompt would be that of a model that has seen the answers. Everything is therefore judged on what comes
after the prompt. The prompt is read sparsely into the KV cache; what follows is read by the model's own attention over that
cache, as in ``generate()``:

- *perplexity* of the text that follows the prompt;
- *asked after*: facts hidden in the prompt and asked for behind it, so that nothing was chosen with the question in view;
- *asked within*: the same with the question at the prompt's end, so that sparse attention itself finds the first digit. An answer is
  right if every digit is the most likely one, as greedy decoding would have it;
- *density*: pairs that attend, of all causal pairs, mean over heads, the three layers and the texts;
- *time* of whole prompts, and of the attention of the three layers. On a machine with other work processor seconds (of all cores) are
  what can be compared; the least of the rounds counts.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sparsedsl as sd
from parts import gemma
from parts.after_prompt import DIGITS, PLACES, Text, density, judged, read, texts, watching
from parts.sparse_prefill_picture import draw

# ---- edit here ------------------------------------------------------------------------------------------

LEAST = 256  # tokens that TSA keeps in any case; published: 1,024, for prompts of 128K


def tsa(coverage: float, inside: Any = None) -> Any:
    """Token sparse attention as published, for shorter prompts."""
    return sd.patterns.token_sparse(coverage, probe=128, pool=7, min_tokens=LEAST, inside=inside)


METHODS: dict[str, dict[str, Any]] = {
    "full": {"": sd.patterns.causal()},
    "PBS": {f"mass {mass}": sd.patterns.pbs(128, 256, mass) for mass in (0.8, 0.9, 0.98)},
    "TSA": {f"coverage {share}": tsa(share) for share in (0.2, 0.05, 0.01)},
    "TSA + PBS": {
        f"coverage {share}, mass {mass}": tsa(share, sd.patterns.pbs(128, 256, mass))
        for share, mass in ((0.2, 0.8), (0.05, 0.9), (0.01, 0.98))
    },
}
TIMED = {
    "PBS": "mass 0.9",
    "TSA": "coverage 0.05",
    "TSA + PBS": "coverage 0.05, mass 0.9",
}  # beside full attention, ours and torch's
FOLLOWING = 512  # tokens after a prompt that perplexity is taken of

# ---------------------------------------------------------------------------------------------------------

TORCH = "full, torch's own"


@dataclass
class Quality:
    """Of one setting. ``loss``: mean over the tokens that follow; ``after``, ``within``: (right answers, right digits, of answers)."""

    method: str
    setting: str
    density: float
    loss: float
    after: tuple[int, int, int]
    within: tuple[int, int, int]


def answers(found: Sequence[int]) -> tuple[int, int, int]:
    """Hits of each answer -> answers without a wrong digit, right digits, answers."""
    return sum(hits == DIGITS for hits in found), sum(found), len(found)


def quality(model: Any, layers: list[int], method: str, setting: str, some: list[Text], within: int) -> Quality:
    """Read all prompts by one setting and judge what follows."""
    program, native = METHODS[method][setting], sd.models.native_patterns(model)
    found: list[float] = []
    what = f"{method} {setting}"
    questions = [text.asked[:: max(1, len(text.asked) // within)][:within] if within else () for text in some]

    def see(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: float) -> None:
        if layer in layers:
            found.append(density(program, q, k, v))

    with sd.models.apply(model, {**native, **dict.fromkeys(layers, program)}):
        with watching(model, see):
            states = [read(model, text.prompt, what) for text in some]
        asking = [
            (read(model, torch.cat([text.prompt, question], dim=1), f"{what}: ask within"), answer)
            for text, asked in zip(some, questions, strict=True)
            for question, answer in asked
        ]
    losses, after = [], []
    for text, state in zip(some, states, strict=True):
        losses += [loss / FOLLOWING for loss, _ in judged(model, state, [text.following], FOLLOWING)]
        after += [hits for _, hits in judged(model, state, [torch.cat(pair, dim=1) for pair in text.asked], DIGITS)]
    inside = [judged(model, state, [answer], DIGITS)[0][1] for state, answer in asking]
    return Quality(method, setting, sum(found) / len(found), sum(losses) / len(losses), answers(after), answers(inside))


def times(model: Any, layers: list[int], ids: torch.Tensor, lengths: list[int], rounds: int) -> dict[str, dict[int, list[float]]]:
    """Method -> length -> [processor seconds of the prompt, of the attention of the full layers, wall seconds of the prompt]."""
    native = sd.models.native_patterns(model)
    windows = {index: pattern for index, pattern in native.items() if index not in layers}
    programs = {TORCH: None, "full": METHODS["full"][""], **{name: METHODS[name][setting] for name, setting in TIMED.items()}}
    models = {}
    for name, program in programs.items():
        shared = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
        models[name] = copy.deepcopy(model, shared)
        sd.models.apply(models[name], windows if program is None else {**windows, **dict.fromkeys(layers, program)})
    found: dict[str, dict[int, list[float]]] = {name: {} for name in models}
    spent: list[float] = []

    def see(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seconds: float) -> None:
        spent.append(seconds if layer in layers else 0.0)

    with tqdm(total=len(lengths) * rounds * len(models), desc="time", unit="prompt", leave=False) as bar:
        for length in lengths:
            for _ in range(rounds):
                for name, one in models.items():
                    spent.clear()
                    with watching(one, see):
                        start = time.process_time()
                        _, wall = gemma.prefill(one, ids[:, :length], f"{name}, {length:,} tokens")
                        now = [time.process_time() - start, sum(spent), wall]
                    found[name][length] = [min(pair) for pair in zip(found[name].get(length, now), now, strict=True)]
                    bar.update()
    return found


HEAD = f"{'method':10} {'setting':25} {'density':>8} {'perplexity':>11} {'to full':>8}  {'asked after':17} asked within"


def line_of(row: Quality, full: Quality) -> str:
    """A line of the table under ``HEAD``."""
    cells = [f"{right:3}/{of} ({digits / of / DIGITS:5.1%})" if of else "-" for right, digits, of in (row.after, row.within)]
    perplexity, more = math.exp(row.loss), math.expm1(row.loss - full.loss)
    return f"{row.method:10} {row.setting:25} {row.density:8.1%} {perplexity:11.3f} {more:+8.2%}  {cells[0]:17} {cells[1]}"


def times_table(found: dict[str, dict[int, list[float]]]) -> str:
    """One line a method: processor seconds of the prompt and of the three layers' attention, each with full attention's share."""
    lengths = list(found["full"])
    lines = [f"{'method':20}" + "".join(f"{f'{length:,} tokens':>38}" for length in lengths)]
    lines.append(f"{'':20}" + f"{'prompt':>14}{'full /':>7}{'3 layers':>10}{'full /':>7}" * len(lengths))
    for name, by_length in found.items():
        cells = ""
        for length, (whole, part, _) in by_length.items():
            full = found["full"][length]
            cells += f"{whole:12.1f} s {full[0] / whole:5.2f}x {part:7.2f} s {full[1] / part:5.2f}x"
        lines.append(f"{name:20}{cells}")
    return "\n".join(lines)


def options_from(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="one setting each, one prompt of 1,024 tokens, times at 1,024 tokens")
    add("--tokens", type=int, help="tokens of a judged prompt (default 4096)")
    add("--texts", type=int, help="judged prompts (default 2; 0: times only)")
    add("--facts", type=int, help=f"facts in each, at most {len(PLACES)} (default 12)")
    add("--within", type=int, help="facts in each that are asked for within the prompt, which is read again for each (default 1)")
    add("--lengths", type=int, nargs="*", help="prompts that are timed (default 2048 4096 8192 16384; nothing: quality only)")
    add("--rounds", type=int, help="of timing (default 1)")
    add("--picture", type=Path, default=Path("out/gemma_sparse_prefill.png"), help="default %(default)s")
    add("--out", type=Path, help="JSON file for the numbers")
    options = parser.parse_args(arguments)
    usual = {"tokens": 4096, "texts": 2, "facts": 12, "within": 1, "lengths": [2048, 4096, 8192, 16384], "rounds": 1}
    quick = {"tokens": 1024, "texts": 1, "facts": 3, "within": 1, "lengths": [1024], "rounds": 1}
    for name in usual:
        if getattr(options, name) is None:
            setattr(options, name, (quick if options.quick else usual)[name])
    if not 1 <= options.facts <= len(PLACES) or options.texts < 0 or options.tokens < 64 * options.facts:
        parser.error(f"--texts must be at least 0, --facts 1 to {len(PLACES)}, --tokens at least 64 for each fact")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Judge every setting, time one of each method, print, draw."""
    options = options_from(arguments)
    begin, load = time.perf_counter(), os.getloadavg()[0]
    model, tokenizer = gemma.load()
    native = sd.models.native_patterns(model)
    layers = [index for index, pattern in native.items() if pattern == sd.attend(sd.patterns.causal())]
    print(f"Layers {layers} of {len(native)} see everything. {options.tokens:,} tokens, {torch.get_num_threads()} threads\n")
    settings = [(method, setting) for method, all_of in METHODS.items() for setting in all_of]
    if options.quick:
        settings = [("full", ""), *TIMED.items()]
    rows: list[Quality] = []
    some = texts(model, tokenizer, options.tokens, options.texts, options.facts, FOLLOWING)
    if some:
        print(HEAD)
        for method, setting in tqdm(settings, desc="settings", unit="setting", leave=False):
            rows.append(quality(model, layers, method, setting, some, options.within))
            print(line_of(rows[-1], rows[0]), flush=True)
        print("(right answers, and digits)\n")
    found: dict[str, dict[int, list[float]]] = {}
    if options.lengths:
        found = times(model, layers, tokenizer(gemma.real_text(), return_tensors="pt").input_ids, options.lengths, options.rounds)
        print(times_table(found), "\n")
        print(
            f"times: processor seconds of all cores; load of the machine {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end"
        )
    if rows and found:
        draw([asdict(row) for row in rows], found, options.tokens, options.picture)
        print(f"picture: {options.picture}")
    print(f"{time.perf_counter() - begin:.0f} s in all")
    if options.out:
        facts = {"threads": torch.get_num_threads(), "torch": torch.__version__, "load": [load, os.getloadavg()[0]]}
        words = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
        result = {"settings": words, "machine": facts, "quality": [asdict(row) for row in rows], "times": found}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in result.items()]
        options.out.write_text("{\n " + ",\n ".join(lines) + "\n}\n")
    return 0


if __name__ == "__main__":
    import sys

    sys.exit(main())
