"""Programs: any backend against the dense meaning of the nodes: choices, outputs, LSE and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparsedsl.errors import UnsupportedError
from sparsedsl.execute.compiled import Attention
from sparsedsl.execute.compiling import compile as compile_pattern
from sparsedsl.program.graph import Program, as_program
from sparsedsl.testing.counterexamples import Counterexample, arguments_code
from sparsedsl.testing.program_numbers import ProgramRun, choice_tables, expect_program, run_program

__all__ = ["assert_program_matches", "compiled_program", "is_program", "program_lines"]


def is_program(value: Any) -> bool:
    """Whether a value is a program, a node, or a compiled program."""
    found = as_program(getattr(value, "program", value))
    return found is not None and found.static is None


def compiled_program(value: Any) -> Attention:
    """A compiled program, on tensors with heads first; anything else run by the reference."""
    return value.heads_first if isinstance(value, Attention) else compile_pattern(value, backend="reference")


def program_lines(attn: Attention) -> list[str]:
    """Code that compiles the program of ``attn`` again."""
    allow = f", allow={sorted(attn.allow)}" if attn.allow else ""
    return [
        "from sparsedsl.program.program_text import read_program",
        f'program = read_program("""\n{attn.program.text}\n""")',
        f"attn = sd.compile(program, backend={attn.backend!r}{allow})",
    ]


def assert_program_matches(
    attn: Attention, tensors: Mapping[str, torch.Tensor], *, q_offset: int = 0, scale: float | None = None
) -> tuple[str, ...]:
    """:func:`~sparsedsl.testing.assert_matches_reference` for programs; ``tensors``: q, k, v, inputs and tables by name."""
    run = ProgramRun(q_offset, scale)

    def failure(what: str) -> Counterexample:
        named = {name: value for name, value in tensors.items() if name not in ("q", "k", "v")}
        call = arguments_code("attn", "q", "k", "v", q_offset=q_offset, scale=scale, **named)
        return Counterexample(
            what, *program_lines(attn), *(f"{name} = {arguments_code(tensors[name])}" for name in "qkv"),
            f"sd.testing.assert_matches_reference({call})",
        )  # fmt: skip

    got, cotangents = run_program(attn, tensors, run)
    named = {name: value for name, value in tensors.items() if name not in ("q", "k", "v")}
    batch = tensors["q"].shape[0]
    choices = choice_tables(attn.choices(*(tensors[name] for name in "qkv"), q_offset=q_offset, **named), batch)
    known = {**attn.program.bound, **tensors}
    if tensors["q"].dtype == torch.float64:
        fault = _other_choice(attn.program, choices, tensors, named, q_offset)
        if fault:
            raise failure(f"backend {attn.backend!r} {fault}")
    try:
        wanted = expect_program(attn.program, known, run, choices=choices, cotangents=cotangents)
    except UnsupportedError as error:
        raise failure(f"backend {attn.backend!r} runs what has no dense meaning: {error}") from None
    for name, value in got.items():
        fault = wanted.fault(name, value) if name in wanted.values else f"it has a result {name}, and the dense meaning has none"
        if fault:
            raise failure(f"backend {attn.backend!r} differs from the dense meaning: {fault}")
    return (*(["choices"] if choices else []), *got)


def _other_choice(
    program: Program, choices: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], named: Mapping[str, Any], q_offset: int
) -> str | None:
    """How a choice differs from that of the dense meaning, in words, or None."""
    dense = compile_pattern(program, backend="reference")
    wanted = choice_tables(
        dense.choices(*(tensors[name].cpu() for name in "qkv"), q_offset=q_offset, **named), tensors["q"].shape[0]
    )
    for label, value in wanted.items():
        pairs = zip(choices[label], value, strict=True) if isinstance(value, list) else [(choices[label], value)]
        for entry, (got, one) in enumerate(pairs):
            if got.shape != one.shape:
                return f"chooses otherwise: {label}[{entry}] has shape {tuple(got.shape)}, wanted {tuple(one.shape)}"
            if not torch.equal(got.cpu(), one):
                place = tuple((got.cpu() != one).nonzero()[0].tolist())
                return f"chooses otherwise: {label}{list(place)} is {got[place].item()}, wanted {one[place].item()}"
    return None
