"""What a failed assertion raises: what went wrong, and a program that shows it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsedsl.errors import SparseDSLError
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.printing import to_text
from sparsedsl.lang.wrapped import Expression
from sparsedsl.testing.call_shapes import AttentionCase, tensor_code

__all__ = ["Counterexample", "NotApplicable", "arguments_code", "expression_code", "pattern_code", "showing"]


class NotApplicable(Exception):
    """Raised by a property that has nothing to say about a pattern; says why."""


class Counterexample(AssertionError):
    """A property that does not hold. ``snippet`` is a Python program that fails in the same way."""

    def __init__(self, what: str, *lines: str):
        self.what = what
        self.snippet = "\n".join(["import math", "", "import torch", "", "import sparsedsl as sd", "", *lines, ""])
        super().__init__(f"{what}\n\nTo see it again, run:\n\n{self.snippet}")

    def __reduce__(self) -> Any:
        return AssertionError, (str(self),)  # also when a test runner ships it between processes


class showing:
    """Turns an error of ours in the body into a counterexample with the call that raised it: an assertion of the kit."""

    def __init__(self, declaration: str, assertion: str, *values: object, **words: Any):
        self.declaration, self.assertion, self.values, self.words = declaration, assertion, values, words

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, SparseDSLError):
            call = f"sd.testing.{self.assertion}({arguments_code(*self.values, **self.words)})"
            raise Counterexample(f"{type(error).__name__}: {error}", self.declaration, call) from None


def expression_code(expression: Expression) -> str:
    """Code that makes an expression again, its bound tensors included.

    >>> import sparsedsl as sd
    >>> expression_code(sd.kv_idx <= sd.q_idx)
    "sd.parse('q_idx >= kv_idx')"
    """
    return _parse_code(expression.text) + _bind_code(expression.bound)


def _parse_code(text: str) -> str:
    return f'sd.parse("""\n{text}\n""")' if "\n" in text else f"sd.parse({text!r})"


def _bind_code(bound: Mapping[str, Any]) -> str:
    return f".bind({_words(bound)})" if bound else ""


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={tensor_code(value)}" for name, value in values.items())


def pattern_code(pattern: Pattern) -> str:
    """Code that makes a pattern again, its bound tensors included."""
    words = [_parse_code(to_text(pattern.mask.expr))]
    if pattern.has_score:
        words.append(f"score={_parse_code(to_text(pattern.score.expr))}")
    if pattern.sink is not None:
        words.append(f"sink={_parse_code(to_text(pattern.sink.expr))}")
    if pattern.scale is not None:
        words.append(f"scale={pattern.scale!r}")
    if not pattern.has_lse:
        words.append(f"normaliser={pattern.normaliser!r}")
    return f"sd.attend({', '.join(words)})" + _bind_code(pattern.bound)


def arguments_code(*values: object, **words: Any) -> str:
    """The arguments of a call: names of variables as they are, cases and tensors as code.

    >>> arguments_code("pattern", AttentionCase(q_len=3), block_size=(2, 2))
    'pattern, sd.testing.AttentionCase(q_len=3), block_size=(2, 2)'
    """
    return ", ".join([_value_code(v) for v in values] + [f"{n}={_value_code(v)}" for n, v in words.items()])


def _value_code(value: object) -> str:
    if isinstance(value, AttentionCase):
        return f"sd.testing.{value!r}"
    return value if isinstance(value, str) else tensor_code(value)
