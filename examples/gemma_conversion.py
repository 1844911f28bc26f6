"""Which hybrid layers can stand in for a real model's full attention, after minutes of training?

    python examples/gemma_conversion.py             a quarter of an hour on two free cores; prints tables, writes gemma_conversion.json
    python examples/gemma_conversion.py --quick     few steps, short rows: shows that it works

Gemma 3 270M has 15 layers that see 512 tokens and 3 that see everything; those three become something else: a window, with and without the
first token; native hybrid attention (a window, the first token, 64 slots for all others), linear attention in a schedule (one layer of the
three stays full), picked chunks (MoBA, HSA). Training is short: *stage 1* fits each new layer to the donor's, whose inputs and outputs are
made once; *stage 2* trains new parameters and q, k, v, o of the three layers on the donor's predictions.

Judged on text that was not trained on, at tokens that see more than the window layers do:

- *perplexity*, and *KL*, the mean divergence of the donor's prediction from the model's, which tells what is lost where perplexity
  gains from the text (a trained donor would gain, too);
- *error* of each layer: relative squared error of its output, on the donor's inputs.

Windows are then set anew in the trained model; and what a cache holds is counted while a batch of two prompts generates.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gemma_finetune import batches
from tqdm import tqdm

import sparsedsl as sd
from parts import gemma

# ---- edit here ------------------------------------------------------------------------------------------

WINDOW, SLOTS, CHUNK, CHUNKS = 256, 64, 64, 4
TRAINING = ("argparse", "turtle", "tarfile", "inspect", "typing", "pathlib", "subprocess", "doctest")
HELD_OUT = ("statistics", "zipfile", "calendar", "shelve", "difflib")
LATE = 512  # predictions count from here on: the other layers' window is full


@dataclass
class Sizes:
    """Of a run. ``judged``: positions of each held-out row; ``taught``: of each row in a step of stage 2."""

    tokens: int = 1024
    training: int = 16
    held_out: int = 4
    first: int = 96
    second: int = 24
    judged: int = 192
    taught: int = 96
    contexts: tuple[int, ...] = (2048, 8192)


QUICK = Sizes(tokens=640, training=2, held_out=1, first=2, second=1, judged=32, taught=16, contexts=(640,))

# ---------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """Tokens, the places that are judged, and what the donor makes of them: hidden states ``(places, hidden_size)``."""

    ids: torch.Tensor
    places: torch.Tensor
    donor: torch.Tensor


@dataclass
class Outcome:
    """A row of the table."""

    name: str
    stage: str
    perplexity: float
    kl: float
    errors: list[float]
    seconds: float


def rows_of(model: Any, tokenizer: Any, modules: Sequence[str], tokens: int, count: int, places: int) -> list[Row]:
    """Rows spread over the text, with the donor's last hidden states at random places."""
    some = list(batches(tokenizer, tuple(modules), tokens))
    generator, found = torch.Generator().manual_seed(0), []
    for ids in tqdm([some[n * len(some) // count] for n in range(count)], desc="the donor reads", unit="row", leave=False):
        late = min(LATE, tokens // 2)
        at = (late + torch.randperm(tokens - late, generator=generator)[:places]).sort().values
        found.append(Row(ids, at, hidden(model, ids, at).detach()))
    return found


def hidden(model: Any, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The last hidden states at some places."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())):
        states: torch.Tensor = model.model(ids[:, :-1], use_cache=False).last_hidden_state[0, places]
    return states


def divergence(model: Any, donor: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Mean KL of the donor's predictions from the student's, over places."""
    with torch.no_grad():
        wanted = model.lm_head(donor).log_softmax(-1)
    return torch.nn.functional.kl_div(model.lm_head(student).log_softmax(-1), wanted, log_target=True, reduction="sum") / len(
        donor
    )


@torch.no_grad()
def judged(model: Any, held_out: Sequence[Row]) -> tuple[float, float]:
    """Perplexity and KL."""
    losses, kls = [], []
    for row in held_out:
        states = hidden(model, row.ids, row.places)
        for part, donor, at in zip(states.split(64), row.donor.split(64), row.places.split(64), strict=True):
            kls += [divergence(model, donor, part).item() * len(part)]
            losses += [torch.nn.functional.cross_entropy(model.lm_head(part), row.ids[0, at + 1], reduction="sum").item()]
    count = sum(len(row.places) for row in held_out)
    return math.exp(sum(losses) / count), sum(kls) / count


class Study:
    """The model, its texts, and the table so far."""

    def __init__(self, model: Any, tokenizer: Any, sizes: Sizes) -> None:
        self.model, self.tokenizer, self.sizes = model, tokenizer, sizes
        native = sd.models.native_patterns(model)
        self.full = [index for index, pattern in native.items() if pattern == sd.attend(sd.patterns.causal())]
        self.training = rows_of(model, tokenizer, TRAINING, sizes.tokens, sizes.training, sizes.taught)
        self.held_out = rows_of(model, tokenizer, HELD_OUT, sizes.tokens, sizes.held_out, sizes.judged)
        self.weights = {name: weight.detach().clone() for name, weight in model.named_parameters() if self.is_projection(name)}
        self.outcomes: list[Outcome] = []

    def is_projection(self, name: str) -> bool:
        """Whether a parameter is one of q, k, v, o of the full layers."""
        return any(f".{index}.self_attn.{part}_proj" in name for index in self.full for part in "qkvo")

    def back(self) -> None:
        """The donor's weights again."""
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if name in self.weights:
                    weight.copy_(self.weights[name])

    def note(self, name: str, stage: str, begin: float, errors: Iterable[float] = ()) -> None:
        """Judge the model as it is, and print the outcome."""
        perplexity, kl = judged(self.model, self.held_out)
        self.outcomes.append(Outcome(name, stage, perplexity, kl, [*errors], time.perf_counter() - begin))
        print(line(self.outcomes[-1]), flush=True)

    def errors(self, handle: Any) -> list[float]:
        """Of each converted layer, on the first held-out row."""
        with torch.no_grad():
            return [lesson.loss().item() for lesson in handle.lessons(self.held_out[0].ids[:, :-1]).values()]

    def first_stage(self, handle: Any) -> None:
        """Fit new parameters to the donor's outputs, layer by layer."""
        rows, steps = self.training[: max(1, self.sizes.training // 2)], self.sizes.first
        handle.freeze()
        lessons = [handle.lessons(row.ids[:, :-1]) for row in tqdm(rows, desc="lessons", unit="row", leave=False)]
        self.descend(
            handle.parameter_groups(lr=1e-2), steps, lambda step: sum(one.loss() for one in lessons[step % len(rows)].values())
        )

    def second_stage(self, groups: list[dict[str, Any]]) -> None:
        """Train on the donor's predictions at some places of each row."""

        def loss(step: int) -> Any:
            row = self.training[step % len(self.training)]
            return divergence(self.model, row.donor, hidden(self.model, row.ids, row.places))

        self.descend(groups, self.sizes.second, loss)

    def descend(self, groups: list[dict[str, Any]], steps: int, loss: Callable[[int], Any]) -> None:
        """AdamW, rates falling to a tenth, gradients clipped."""
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 ** (step / steps))
        with tqdm(range(steps), desc="training", unit="step", leave=False) as bar:
            for step in bar:
                found = loss(step)
                found.backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.set_postfix(loss=f"{found.item():.4f}")

    # ---- what is compared ----------------------------------------------------------------------------------------------------------

    def masks(self) -> None:
        """The full layers cut to a window, with the first token and without; with it, q, k, v, o trained as those of NHA are."""
        causal = sd.kv_idx <= sd.q_idx
        near = causal & (sd.q_idx - sd.kv_idx < WINDOW)
        for name, mask in (("window", near), ("window + first token", near | (causal & (sd.kv_idx < 1)))):
            begin = time.perf_counter()
            with sd.models.apply(self.model, dict.fromkeys(self.full, mask)):
                self.note(name, "untrained", begin)
                if "first" in name:
                    self.model.requires_grad_(False)
                    chosen = [weight for part, weight in self.model.named_parameters() if self.is_projection(part)]
                    for weight in chosen:
                        weight.requires_grad_(True)
                    self.second_stage([{"params": chosen, "lr": 5e-5}])
                    self.note(name, "q, k, v, o", begin)
            self.back()

    def converted(
        self, name: str, layers: dict[int, Any], *, trains: bool = True, init: str = "calibrated", more: Any = None
    ) -> None:
        """Convert, judge, train in two stages, judge; ``more(handle)`` looks at what came of it."""
        begin = time.perf_counter()
        with sd.models.convert(self.model, layers, init=init) as handle:
            self.note(name, "untrained", begin, self.errors(handle))
            if trains and handle.new_parameters():
                self.first_stage(handle)
                self.note(name, "stage 1", begin, self.errors(handle))
            if trains:
                handle.freeze(also=("q_proj", "k_proj", "v_proj", "o_proj"))
                self.second_stage(handle.parameter_groups(lr=2e-3, donor_lr=5e-5, weight_decay=0.0))
                self.note(name, "stage 2", begin, self.errors(handle))
            if more is not None:
                more(handle)
        self.back()

    def windows(self, handle: Any) -> None:
        """Trained NHA with other windows."""
        states = {index: layer.state_dict() for index, layer in handle.layers.items()}
        handle.restore()
        for window in (64, 128, WINDOW, 512, self.sizes.tokens):
            begin = time.perf_counter()
            with sd.models.convert(self.model, dict.fromkeys(self.full, nha(window=window))) as again:
                for index, layer in again.layers.items():
                    layer.load_state_dict(states[index])
                self.note("NHA, trained at window 256", f"window {window}", begin)

    def caches(self) -> list[dict[str, Any]]:
        """Bytes of caches while two prompts of different lengths generate, and seconds a token, the donor's beside NHA's."""
        text, found = torch.cat([row.ids for row in self.training], dim=1), []
        for tokens in self.sizes.contexts:
            ids = text[:, : tokens // 2].repeat(2, 2)[:, :tokens]
            mask = torch.ones_like(ids)
            mask[1, : tokens // 4] = 0  # the second prompt is shorter
            for name in ("donor", "NHA"):
                with sd.models.convert(self.model, dict.fromkeys(self.full, nha()) if name == "NHA" else {}) as handle:
                    found.append({"name": name, "tokens": tokens, **self.generation(handle, ids, mask)})
                print(found[-1], flush=True)
        return found

    @torch.no_grad()
    def generation(self, handle: Any, ids: torch.Tensor, mask: torch.Tensor, new: int = 16) -> dict[str, Any]:
        """Prompts in pieces, then tokens one at a time."""
        words = {"attention_mask": mask, "do_sample": False, "prefill_chunk_size": 2048}
        cache, times = handle.cache(), []
        self.model.generate(ids, past_key_values=cache, max_new_tokens=1, min_new_tokens=1, **words)
        position = mask.sum(-1, keepdim=True)
        token = ids[:, -1:]
        for _ in range(new):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            begin = time.perf_counter()
            out = self.model(token, attention_mask=mask, position_ids=position, past_key_values=cache)
            times.append(time.perf_counter() - begin)
            token, position = out.logits[:, -1:].argmax(-1), position + 1
        held = {index: held_bytes(layer) for index, layer in enumerate(cache.layers)}
        return {
            "full_layers_bytes": sum(held[index] for index in self.full),
            "other_layers_bytes": sum(size for index, size in held.items() if index not in self.full),
            "seconds_a_token": sorted(times)[len(times) // 2],
        }


def held_bytes(layer: Any) -> int:
    """What a layer of a cache holds."""
    if hasattr(layer, "nbytes"):
        return int(layer.nbytes)
    return sum(t.numel() * t.element_size() for t in (layer.keys, layer.values) if t is not None)


def nha(**changes: Any) -> Any:
    """The layer as it is compared here."""
    return functools.partial(sd.models.NHA, **({"slots": SLOTS, "window": WINDOW} | changes))


def line(one: Outcome) -> str:
    """A row of the table in Markdown."""
    errors = " / ".join(f"{error:.3f}" for error in one.errors)
    return f"| {one.name} | {one.stage} | {one.perplexity:.2f} | {one.kl:.3f} | {errors} | {one.seconds:.0f} s |"


def main(arguments: list[str] | None = None) -> int:
    """All of it."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few steps, short rows")
    parser.add_argument("--parts", nargs="+", default=["masks", "nha", "ring", "chunks", "caches"], help="which (default: all)")
    parser.add_argument(
        "--contexts", nargs="+", type=int, metavar="TOKENS", help="lengths that caches are counted at (default: 2048 8192)"
    )
    parser.add_argument("--out", type=Path, default=Path("gemma_conversion.json"), metavar="FILE")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    sizes = QUICK if options.quick else Sizes()
    study = Study(*gemma.load(), replace(sizes, contexts=tuple(options.contexts or sizes.contexts)))
    full, first, middle = study.full, study.full[0], study.full[1:-1]
    print("| full layers become | | perplexity | KL to the donor | error of each layer | time |\n|---|---|---|---|---|---|")
    study.note("(the donor)", "", time.perf_counter())
    if "masks" in options.parts:
        study.masks()
    if "nha" in options.parts:
        published = nha(first=0, slot_bias=None)
        study.converted("NHA as published", dict.fromkeys(full, published), trains=False, init="published")
        study.converted("NHA", dict.fromkeys(full, nha()), more=study.windows)
    if "ring" in options.parts:
        study.converted("linear, the last one full", dict.fromkeys([first, *middle], sd.models.RingLinear))
    if "chunks" in options.parts:
        moba = sd.patterns.moba(chunk=CHUNK, top_k=CHUNKS)
        study.converted("MoBA, 4 of 64", dict.fromkeys(full, moba), trains=False)
        study.converted(
            "HSA, 4 of 64", dict.fromkeys(full, functools.partial(sd.models.HSA, chunk=CHUNK, top_k=CHUNKS, window=WINDOW))
        )
    caches = study.caches() if "caches" in options.parts else []
    record = {
        "machine": platform.processor() or platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "sizes": asdict(study.sizes), "outcomes": [asdict(one) for one in study.outcomes], "caches": caches,
    }  # fmt: skip
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
