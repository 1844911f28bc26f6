"""Rows of different lengths, each alone and all in one batch: padded left, right, on both sides or in between, and packed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.models.families import build, tokens

LENGTHS = (21, 14, 14, 5)
WIDTH = 27


def exact(family: str) -> Any:
    """A model in float64: what is left of differences is what its layers round in float32 by themselves."""
    model = build(family)
    if getattr(model.config, "num_local_experts", 0):
        model.set_experts_implementation("eager")  # others know no float64
    return model.double()


def alone(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    """The rows, (1, length) each."""
    ids = tokens(len(lengths), max(lengths))
    return [row[None, :length] for row, length in zip(ids, lengths, strict=True)]


def real_slots(layout: str, lengths: tuple[int, ...] = LENGTHS, width: int = WIDTH) -> torch.Tensor:
    """(rows, width) bool: where the tokens of each row stand."""
    real = torch.zeros(len(lengths), width, dtype=torch.bool)
    generator = torch.Generator().manual_seed(5)
    for row, length in enumerate(lengths):
        first = {"left": width - length, "right": 0, "both": (width - length) // 2}.get(layout)
        slots = torch.randperm(width, generator=generator)[:length] if first is None else torch.arange(first, first + length)
        real[row, slots] = True
    return real


def padded(rows: list[torch.Tensor], real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Model inputs: the rows in their slots, positions counted as each row alone has them."""
    ids = torch.zeros(real.shape, dtype=torch.long)
    for row, slots, own in zip(ids, real, rows, strict=True):
        row[slots] = own[0]
    position = (real.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": real.long(), "position_ids": position}


def packed(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Model inputs: all rows one after the other in one."""
    position = torch.cat([torch.arange(row.shape[1]) for row in rows])
    return {"input_ids": torch.cat(rows, dim=1), "position_ids": position[None]}


def batch(rows: list[torch.Tensor], layout: str, width: int = WIDTH) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Model inputs of all rows, and (rows, width) bool: where their tokens are."""
    if layout == "packed":
        inputs = packed(rows)
        return inputs, torch.ones_like(inputs["input_ids"]).bool()
    real = real_slots(layout, tuple(row.shape[1] for row in rows), width)
    return padded(rows, real), real


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    cache = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        return model(**{**cache, **inputs}).logits


def named(layout: str) -> Callable[[str], str]:
    """What a failure says: in which of the layouts."""
    return lambda text: f"{layout}: {text}"


def tolerance(model: Any, rows: list[torch.Tensor]) -> float:
    """What the same rows lose in float32, the least precise number that a layer of a model in float64 computes with."""
    plain = copy.deepcopy(model).float()
    return max(2 * float((logits(model, input_ids=row) - logits(plain, input_ids=row)).abs().max()) for row in rows)


def assert_rows_as_if_alone(model: Any, rows: list[torch.Tensor], layouts: Sequence[str]) -> None:
    """Every row of the padded or packed batch gives the logits that it gives alone."""
    wanted, size = torch.cat([logits(model, input_ids=row)[0] for row in rows]), tolerance(model, rows)
    for layout in layouts:
        inputs, real = batch(rows, layout)
        torch.testing.assert_close(logits(model, **inputs)[real], wanted, atol=size, rtol=0, msg=named(layout))


def assert_gradients_as_if_alone(model: Any, rows: list[torch.Tensor], layout: str) -> None:
    """The loss of a batch has the gradients that those of its rows have together, also where activations are computed again."""
    inputs, real = batch(rows, layout)

    def gradients(calls: list[tuple[dict[str, torch.Tensor], Any]]) -> list[torch.Tensor]:
        model.zero_grad()
        sum(model(**given, use_cache=False).logits[which].square().sum() for given, which in calls).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    wanted = gradients([({"input_ids": row}, ...) for row in rows])
    got = gradients([(inputs, real)])
    model.train().gradient_checkpointing_enable()
    again = gradients([(inputs, real)])
    for one, two, right in zip(got, again, wanted, strict=True):
        atol = 2**-20 * float(right.abs().max())  # norms are computed in float32: 16 of its roundings
        torch.testing.assert_close(one, right, atol=atol, rtol=0)
        torch.testing.assert_close(two, right, atol=atol, rtol=0)


def in_parts(model: Any, inputs: dict[str, torch.Tensor], parts: list[int], cache: Any) -> torch.Tensor:
    """Logits of the whole batch, so many slots at a time."""
    found, start = [], 0
    for length in parts:
        stop = start + length
        step = {name: inputs[name][:, start:stop] for name in ("input_ids", "position_ids")}
        mask = inputs["attention_mask"][:, :stop]
        found.append(logits(model, **step, attention_mask=mask, past_key_values=cache, use_cache=True))
        start = stop
    return torch.cat(found, dim=1)


def generated(model: Any, inputs: dict[str, torch.Tensor], new: int, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The new tokens of each row, (rows, new), and the logits they were taken from, (rows, new, vocabulary)."""
    given = {name: value for name, value in inputs.items() if name != "position_ids"}
    words = {"max_new_tokens": new, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(**given, **words, **how)
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


def assert_generates_as_if_alone(model: Any, rows: list[torch.Tensor], new: int, **how: Any) -> None:
    """A left-padded batch goes on with the tokens, and by the logits, that each row alone goes on with."""
    inputs = padded(rows, real_slots("left", tuple(row.shape[1] for row in rows)))
    words, scores = generated(model, inputs, new, **how)
    size, beams = tolerance(model, rows), how.get("num_beams", 1)
    for index, row in enumerate(rows):
        own_words, own_scores = generated(model, {"input_ids": row, "attention_mask": torch.ones_like(row)}, new, **how)
        assert torch.equal(words[index], own_words[0])
        torch.testing.assert_close(scores[index * beams : (index + 1) * beams], own_scores, atol=size, rtol=0)
