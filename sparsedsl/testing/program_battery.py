"""The properties that :func:`sparsedsl.testing.check` runs on a program, each on cases of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from sparsedsl.errors import PatternError, UnsupportedError
from sparsedsl.execute.compiling import compile as compile_pattern
from sparsedsl.program.effect_rules import LATER_QUERIES
from sparsedsl.program.graph import Program
from sparsedsl.program.program_text import read_program
from sparsedsl.program.recurrences import Linear
from sparsedsl.testing.behaviour import assert_causal, assert_equivariant, assert_prefill_equals_decode
from sparsedsl.testing.call_shapes import AttentionCase, shapes, tensor
from sparsedsl.testing.counterexamples import Counterexample, NotApplicable
from sparsedsl.testing.leaks import ask_about_program
from sparsedsl.testing.matching import assert_matches_reference
from sparsedsl.testing.program_inputs import program_inputs
from sparsedsl.testing.program_matching import program_lines
from sparsedsl.testing.program_properties import assert_unselected_gradients_zero
from sparsedsl.testing.reach_checks import constants_of, edges_of
from sparsedsl.testing.strategies import table_tensors

__all__ = ["PROGRAM_PROOFS", "PROGRAM_PROPERTIES", "ProgramSubject"]

# Lengths that are tried reach past the blocks of the program (chunks of 64), but no further than this; where calls are cut, they reach
# beyond each constant below the other.
_LONGEST = 200
_BESIDE = 140


@dataclass(frozen=True)
class ProgramSubject:
    """A program under test, and where its cases come from."""

    program: Program
    backend: str
    causal: bool | None

    def attention(self) -> Any:
        """The compiled program, its gradients allowed."""
        return compile_pattern(self.program, backend=self.backend, allow=[LATER_QUERIES])

    def draw(self, data: st.DataObject, longest: int = _LONGEST, **words: Any) -> tuple[AttentionCase, dict[str, torch.Tensor]]:
        """A whole sequence that is longer than most blocks, and tables for it."""
        numbers = {int(x) for node in self.program.everything for x in node.arguments.values() if type(x) is int}
        exprs = self.program.exprs
        edges = edges_of(exprs, self.program.bound, numbers)
        reach = min(3 * max([5, *numbers, *constants_of(exprs)]) + 5, max(longest, min(max(edges, default=0) + 3, _BESIDE)))
        case = data.draw(shapes(max_len=reach, max_heads=4, square=True, near=edges, **words))
        for count in {
            len(node.log_decays) for node in self.program.nodes(Linear) if isinstance(node.decay, tuple)
        }:  # linear attention was declared for so many heads
            case = replace(
                case, heads=count, kv_heads=data.draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
            )
        drawn = data.draw(table_tensors(exprs, case, self.program.bound)) if self.program.tables else {}
        return case, {name: value for name, value in drawn.items() if name in self.program.tables}


def _text(subject: ProgramSubject, data: st.DataObject) -> None:
    text = subject.program.text
    if read_program(text) != subject.program:
        lines = program_lines(subject.attention())
        raise Counterexample("the text form is another program", *lines[:-1], "assert read_program(program.text) == program")


def _numbers(subject: ProgramSubject, data: st.DataObject) -> None:
    case, tables = subject.draw(data)
    seed = data.draw(st.integers(0, 99))
    sizes = zip("qkv", (case.q_shape, case.k_shape, case.v_shape), strict=True)
    given: dict[str, Any] = {name: tensor(*shape, seed=seed + n, dtype=torch.float64) for n, (name, shape) in enumerate(sizes)}
    given |= data.draw(program_inputs(subject.program, case)) | tables
    assert_matches_reference(subject.attention(), **given)


def _causal(subject: ProgramSubject, data: st.DataObject) -> None:
    _on_case(subject, data, assert_causal)


def _calls(subject: ProgramSubject, data: st.DataObject) -> None:
    _on_case(subject, data, assert_prefill_equals_decode, longest=40, max_batch=1)


def _order(subject: ProgramSubject, data: st.DataObject) -> None:
    _on_case(subject, data, assert_equivariant)


def _learning(subject: ProgramSubject, data: st.DataObject) -> None:
    _on_case(subject, data, assert_unselected_gradients_zero)


def _on_case(subject: ProgramSubject, data: st.DataObject, assertion: Callable[..., Any], **words: Any) -> None:
    case, tables = subject.draw(data, **words)
    assertion(subject.attention(), case, seed=data.draw(st.integers(0, 99)), **tables)


def _said(body: Callable[[ProgramSubject, st.DataObject], None]) -> Callable[[ProgramSubject, st.DataObject], None]:
    """What the backend or the assertion refuses is no fault."""

    def run(subject: ProgramSubject, data: st.DataObject) -> None:
        try:
            body(subject, data)
        except (UnsupportedError, PatternError) as refusal:
            raise NotApplicable(str(refusal)) from None

    return run


PROGRAM_PROPERTIES: dict[str, tuple[str, Callable[[ProgramSubject, st.DataObject], None]]] = {
    "text": ("the text form read back is the same program", _text),
    "numbers": ("choices, outputs, LSE and gradients are those the nodes mean, in float64", _said(_numbers)),
    "causality": ("results and choices at a position do not move with anything after it", _said(_causal)),
    "calls": ("one call, chunks, token by token, and from state to state give the same", _said(_calls)),
    "order": ("batch entries can be reordered, as far as the program ignores b", _said(_order)),
    "learning": ("what nobody picked or attended to gets a gradient of exactly 0", _said(_learning)),
}
PROGRAM_PROOFS: dict[str, Callable[[ProgramSubject], str]] = {
    "causality": lambda subject: ask_about_program(subject.attention(), subject.causal),
}
