"""Masks and tables whose integers lie at the ends of their types, as Hypothesis strategies, with the answer in Python's integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import reject
from hypothesis import strategies as st

from sparsedsl.errors import PatternError
from sparsedsl.lang.pattern import Pattern, as_pattern
from sparsedsl.lang.text import parse
from sparsedsl.testing.plain import PositionTables, plain_value

__all__ = ["FarCase", "far_cases"]

TABLES = {"t": "table('t')", "s": "table('s')", "m": "table('m', monotone=True)", "i": "table('i')", "c": "table('c')"}
TYPES = {"i": torch.int32, "c": torch.int8}
_POWERS = (1 << 31, 1 << 32, 1 << 53, 1 << 59, 1 << 60, 1 << 61, 1 << 62)
# Whole numbers as people pass them, those at the ends of types, and their neighbours.
EDGES = sorted(
    {sign * power + step for power in _POWERS for sign in (1, -1) for step in (-1, 0, 1)}
    | {-(2**63), -(2**63) + 1, 2**63 - 2, 2**63 - 1, -128, 127, -1, 0, 1, 2, 3, 5, 7}
)
# Positions of the first query.
OFFSETS = (
    *(
        0,
        0,
        0,
        0,
        1,
        2,
        5,
        5,
        17,
        40,
        (1 << 31) - 3,
        1 << 31,
        1 << 36,
        (1 << 40) + 1,
        (1 << 53) + 1,
        (1 << 60) - 40,
        (1 << 60) - 3,
    ),
    *(1 << 62, 2**63 - 1),
)


@dataclass(frozen=True)
class FarCase:
    """One mask over ``q_len x kv_len`` positions, and its tables."""

    text: str
    pattern: Pattern
    tables: dict[str, torch.Tensor]
    q_len: int
    kv_len: int
    q_offset: int

    @property
    def own(self) -> dict[str, torch.Tensor]:
        """The tables that the mask still reads when the language has simplified it."""
        return {name: table for name, table in self.tables.items() if name in self.pattern.tables}

    def allowed(self, text: str | None = None) -> torch.Tensor:
        """Which pairs attend, ``(q_len, kv_len)``: Python's own operators on Python's integers."""
        positions = PositionTables(q_len=self.q_len, kv_len=self.kv_len, q_offset=self.q_offset, exact=True)
        tables = {name: np.asarray(table.tolist(), dtype=object) for name, table in self.tables.items()}
        found = np.asarray(plain_value(text or self.text, positions, tables)).astype(bool)
        return torch.as_tensor(np.broadcast_to(found, positions.shape).copy())[0, 0]


def declared(text: str) -> str:
    """``text`` below the declarations of the tables it reads."""
    return "\n".join([*(f"{name} = {words}" for name, words in TABLES.items() if f"{name}[" in text), text])


def _constant(draw: Any) -> int:
    return draw(st.sampled_from(EDGES) if draw(st.integers(0, 9)) == 0 else st.integers(-9, 9))


def _anchor(draw: Any) -> str:
    name = draw(st.sampled_from("ttssmmic"))
    index = draw(
        st.sampled_from(("q_idx % 8", "q_idx % 8", "kv_idx", "kv_idx", "kv_idx % 3", f"minimum(maximum({name}[kv_idx], 0), 11)"))
    )
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return str(draw(st.sampled_from(("q_idx", "kv_idx", "q_len", "kv_len"))))
    return f"{name}[{index}]"


def _term(draw: Any, depth: int) -> str:
    if depth == 0 or draw(st.booleans()):
        return _anchor(draw)
    a, c = (_term(draw, depth - 1) for _ in range(2))
    number = _constant(draw)
    size = abs(number) or 1
    forms = {
        "sum": f"({a} + {number})", "less": f"({a} - {c})", "times": f"({number} * {a})", "least": f"minimum({a}, {c})",
        "most": f"maximum({a}, {number})", "clamp": f"minimum(maximum({a}, {-size}), {size})", "abs": f"abs({a} - {c})",
        "where": f"where({_compare(draw, 0)}, {a}, {c})", "over": f"({a} // {size})", "rest": f"({a} % {size})",
        "bits": f"({a} & {number})", "minus": f"(-{a})", "read": f"t[minimum(maximum({a}, 0), 11)]", "product": f"({a} * {c})",
    }  # fmt: skip
    if draw(st.booleans()):  # forms that comparisons are made of, which must work wherever the values lie
        return forms[draw(st.sampled_from(("sum", "least", "most", "clamp", "where")))]
    return forms[draw(st.sampled_from(sorted(forms)))]


def _compare(draw: Any, depth: int) -> str:
    op = draw(st.sampled_from(("<", "<=", ">", ">=", "==", "!=")))
    left = _term(draw, depth)
    right = str(_constant(draw)) if draw(st.integers(0, 3)) == 0 else _term(draw, depth)
    return f"({left} {op} {right})"


@st.composite
def far_texts(draw: Any, depth: int = 2) -> str:
    """Masks as text: one to three comparisons, often below the diagonal."""
    text = _compare(draw, depth)
    for _ in range(draw(st.integers(0, 2))):
        join = draw(st.sampled_from("&|"))
        text = f"({text} {join} {'~' if draw(st.booleans()) else ''}{_compare(draw, depth - 1)})"
    try:
        parse(declared(text))
    except PatternError as error:  # `x < -2**63` asks for a number that int64 does not hold, and is refused when it is written
        if "no whole number of 64 bits" not in str(error):
            raise
        reject()
    return f"({text} & (kv_idx <= q_idx))" if draw(st.booleans()) else text


@st.composite
def far_cases(draw: Any, depth: int = 2, places: int = 1) -> list[FarCase]:
    """One mask with several tables and places, whose integers lie at the ends of their types, and ordinary ones beside them."""
    text = draw(far_texts(depth))
    pattern = as_pattern(parse(declared(text)))
    return [_place(draw, text, pattern) for _ in range(places)]


def _place(draw: Any, text: str, pattern: Pattern) -> FarCase:
    q_len, kv_len = draw(st.integers(1, 9)), draw(st.integers(1, 11))
    tables = {}
    for name in TABLES:
        dtype = TYPES.get(name, torch.int64)
        limits = torch.iinfo(dtype)
        some = [edge for edge in EDGES if limits.min <= edge <= limits.max]
        few = draw(st.lists(st.sampled_from(some) | st.integers(-20, 20), min_size=1, max_size=4))
        step, number = draw(st.integers(1, 7)), draw(st.integers(0, 11))
        values = [few[(place * step + number) // 2 % len(few)] for place in range(12)]
        tables[name] = torch.tensor(sorted(values) if name == "m" else values, dtype=dtype)
    return FarCase(text, pattern, tables, q_len, kv_len, draw(st.sampled_from(OFFSETS)))
