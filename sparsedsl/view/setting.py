"""What the controls of the page say, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsedsl.analysis.domain import check_size
from sparsedsl.errors import PatternError, ShapeError
from sparsedsl.lang.advice import meant

__all__ = ["Setting"]


@dataclass(frozen=True)
class Setting:
    """Lengths, place and parameters of one look at a pattern. ``kv_len`` None: up to the last query.

    >>> Setting.read({"q_len": 64, "values": {"window": 8}}).values
    (('window', 8),)
    """

    q_len: int = 4096
    kv_len: int | None = None
    q_offset: int = 0
    head: int = 0
    batch: int = 0
    q_block: int = 128
    kv_block: int = 128
    seed: int = 0
    values: tuple[tuple[str, Any], ...] = field(default=())

    @classmethod
    def read(cls, words: Any) -> Setting:
        """Of what the page sends: a mapping of names to numbers, and ``values`` of parameters. Raises ShapeError and PatternError."""
        if not isinstance(words, Mapping):
            raise PatternError(f"a setting is a mapping of names to values; got {words!r}")
        unknown = sorted(set(words) - set(cls.__dataclass_fields__))
        if unknown:
            raise PatternError(f"there is no setting {unknown[0]}{meant(unknown[0], list(cls.__dataclass_fields__))}")
        numbers = {name: value for name, value in words.items() if name != "values" and not (name == "kv_len" and value is None)}
        for name, value in numbers.items():
            check_size(name, value, 1 if name.endswith(("_len", "_block")) else 0)
        values = words.get("values", {})
        if not isinstance(values, Mapping):
            raise PatternError(f"values of parameters are a mapping; got {values!r}")
        return cls(**numbers, values=tuple(sorted(values.items())))

    @property
    def keys(self) -> int:
        """How many keys there are."""
        return self.q_offset + self.q_len if self.kv_len is None else self.kv_len

    @property
    def queries(self) -> range:
        """Positions of the queries."""
        return range(self.q_offset, self.q_offset + self.q_len)

    def inside(self, q_idx: int, kv_idx: int) -> None:
        """Raise :class:`~sparsedsl.ShapeError` for a pair that there is not."""
        if q_idx not in self.queries or kv_idx not in range(self.keys):
            raise ShapeError(f"the pair ({q_idx}, {kv_idx}) lies outside of queries {self.queries} and keys {range(self.keys)}")
