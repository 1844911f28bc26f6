"""What is exported: a pattern at lengths, offset, batch and heads, checked once for all engines, and the words of refusals."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import sympy
import torch
from sympy.logic.boolalg import Boolean

from sparsedsl.analysis.bounds import check_reads
from sparsedsl.analysis.domain import Domain, check_size
from sparsedsl.analysis.exactness import exact_domain
from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.analysis.report import bind_for_analysis
from sparsedsl.errors import ShapeError, UnsupportedError
from sparsedsl.export.spans import Room, Spans, first_difference, spans_of
from sparsedsl.lang.advice import shown
from sparsedsl.lang.pattern import Pattern, as_pattern, relates_positions
from sparsedsl.lang.symbols import BATCH, HEAD
from sparsedsl.program.graph import as_program
from sparsedsl.quantities import bytes_text

__all__ = ["MAX_BYTES", "Case", "Part", "prepare"]

# What an export may take unless the caller says otherwise.
MAX_BYTES = 1 << 30


@dataclass(frozen=True, eq=False)
class Part:
    """One sequence: its mask over its own domain, all batch entries and heads of it that the mask may tell apart."""

    case: Case
    mask: Boolean
    domain: Domain

    @property
    def q_len(self) -> int:
        """Number of queries."""
        return self.domain.rows

    @property
    def kv_len(self) -> int:
        """Number of keys."""
        return self.domain.kv_len

    @property
    def off(self) -> int:
        """Keys minus queries: where engines that end the queries at the last key put the first query."""
        return self.kv_len - self.q_len

    @functools.cached_property
    def rows(self) -> Spans:
        """The runs of keys of every query."""
        return spans_of(self.mask, self.domain, self._room("the runs of keys of all queries"))

    @functools.cached_property
    def columns(self) -> Spans:
        """The runs of queries of every key."""
        return spans_of(self.mask, self.domain, self._room("the runs of queries of all keys"), of="queries")

    def _room(self, what: str) -> Room:
        return Room(self.case.max_bytes, functools.partial(self.case.too_large, what))

    def alone(self) -> Part:
        """The same of one head, if all heads see the same; else refuse, naming a pair on which two differ."""
        rows = self.rows
        batches, heads, _ = rows.shape
        for b in range(batches):
            for h in range(1, heads):
                if found := first_difference(rows.group(b, 0), rows.group(b, h)):
                    self.case.refuse(
                        f"heads 0 and {h} differ (first at query {found[0]}, key {found[1]}), {self.case.what_holds} have no heads; "
                        "export one head: head=0"
                    )
        return self if heads == 1 else dataclasses.replace(self, mask=self.mask.xreplace({HEAD: sympy.Integer(0)}))


@dataclass(frozen=True, eq=False)
class Case:
    """A checked question to an engine. ``lengths``: queries and keys, once for all of ``batch`` or with ``packed`` of each sequence.

    ``numbers``: the batch entry that each packed sequence is. ``head``: the only head that is asked about, or None.
    """

    engine: str
    what_holds: str
    pattern: Pattern
    tables: Mapping[str, torch.Tensor]
    lengths: tuple[tuple[int, int], ...]
    numbers: tuple[int, ...]
    head: int | None
    packed: bool
    batch: int
    heads: int
    kv_heads: int
    q_offset: int | None
    device: torch.device | None
    max_bytes: int

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """One, or with ``packed`` one for each sequence. The first time it raises what is wrong with tables and offsets."""
        fixed = {} if self.head is None else {HEAD: sympy.Integer(self.head)}
        batch = max(self.numbers) + 1 if self.packed else self.batch
        parts = []
        for number, (q_len, kv_len) in zip(self.numbers, self.lengths, strict=True):
            domain = Domain(q_len, kv_len, _offset(self, q_len, kv_len), batch, self.heads, self.tables)
            domain = exact_domain(self.pattern.exprs, domain)
            check_reads(self.pattern, domain)
            entry = {BATCH: sympy.Integer(number)} if self.packed else {}
            parts.append(Part(self, self.pattern.mask.expr.xreplace(fixed | entry), domain))
        return tuple(parts)

    @property
    def part(self) -> Part:
        """The only part of a case that is not packed."""
        return self.parts[0]

    @property
    def q_lens(self) -> tuple[int, ...]:
        """Queries of every sequence, or of every batch entry."""
        return tuple(part.q_len for part in self.parts) if self.packed else (self.part.q_len,) * self.batch

    @property
    def kv_lens(self) -> tuple[int, ...]:
        """Keys of every sequence, or of every batch entry."""
        return tuple(part.kv_len for part in self.parts) if self.packed else (self.part.kv_len,) * self.batch

    @property
    def lens(self) -> dict[str, Any]:
        """What every export says of lengths."""
        return {"q_lens": self.q_lens, "kv_lens": self.kv_lens, "packed": self.packed}

    def refuse(self, text: str) -> NoReturn:
        """Raise :class:`UnsupportedError`."""
        raise UnsupportedError(f"{self.engine}: {text}")

    def too_large(self, what: str, count: int) -> NoReturn:
        """Refuse for the size."""
        self.refuse(
            f"{what} would take at least {bytes_text(count)}, over max_bytes={self.max_bytes} ({bytes_text(self.max_bytes)}); give more "
            "room by max_bytes=, or sd.compile(pattern) runs it without"
        )

    def check_bytes(self, count: int, what: str) -> None:
        """Refuse what would take more than ``max_bytes``."""
        if count > self.max_bytes:
            self.too_large(what, count)

    def place(self, tensor: torch.Tensor, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """A tensor as it is handed out: contiguous, on the device that was asked for."""
        return tensor.to(device=self.device, dtype=dtype).contiguous()

    def holder(self) -> str:
        """What holds the mask instead: the end of a refusal."""
        if self.engine == "cudnn" or self.pattern.has_score or self.pattern.sink is not None:
            return "sd.compile(pattern) runs it"
        return f"cudnn holds it with nfunc={1 + 2 * max(part.rows.most_away for part in self.parts)}"

    def ends_at_the_last_key(self) -> None:
        """Refuse an offset that an engine which ends the queries at the last key does not have."""
        for part in self.parts:
            if part.domain.q_offset != part.off and relates_positions(self.pattern.mask.expr):
                self.refuse(
                    f"{part.q_len} queries from position {part.domain.q_offset} with {part.kv_len} keys; this engine ends the queries at "
                    f"the last key ({part.off}); {self.holder()}"
                )

    def query(self, number: int, row: int) -> str:
        """How a query is called in a message."""
        return f"query {row} of sequence {number}" if self.packed else f"query {row}"


def _static(engine: str, value: Any) -> Pattern:
    """The static pattern that a value is; a program that chooses is refused."""
    value = getattr(value, "pattern", value) if hasattr(value, "explain") and not isinstance(value, Pattern) else value
    program = as_program(value)
    if program is None:
        return as_pattern(value)
    if program.static is None:
        if any(node.chooses for node in program.order):
            raise UnsupportedError(f"{engine}: choices depend on q and k: run attn.choices(q, k, v), export the bound pattern")
        raise UnsupportedError(
            f"{engine}: a program is no single softmax over a mask, which is all that this engine holds; sd.compile(program) runs it"
        )
    return program.static


def _lengths(engine: str, name: str, lens: Sequence[int]) -> list[int]:
    found = lens.tolist() if isinstance(lens, torch.Tensor) else list(lens)
    if not found:
        raise ShapeError(f"{engine}: {name}= must name at least one sequence; got none")
    return [check_size(f"{name}[{n}]", value, 1) for n, value in enumerate(found)]


def prepare(
    engine: str,
    what_holds: str,
    pattern: Any,
    q_len: int | None,
    kv_len: int | None,
    *,
    q_offset: int | None = None,
    batch: int = 1,
    heads: int | None = None,
    kv_heads: int | None = None,
    q_lens: Sequence[int] | None = None,
    kv_lens: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
    head: int | None = None,
    device: Any = None,
    max_bytes: int = MAX_BYTES,
    tables: Mapping[str, Any],
) -> Case:
    """The checked question; raises ShapeError, TableError, PatternError for what does not fit, UnsupportedError for programs.

    ``what_holds``: what the engine's form is called where it has no heads. ``numbers``: the batch entry that each
    sequence is, default 0, 1, ..
    """
    static = _static(engine, pattern)
    bound = bind_for_analysis(static, dict(tables))
    heads = count_heads((static,), bound, heads)
    kv_heads = heads if kv_heads is None else check_size("kv_heads", kv_heads, 1)
    if heads % kv_heads:
        raise ShapeError(f"{engine}: heads must be a multiple of kv_heads; got {heads} and {kv_heads}")
    check_size("batch", batch, 1)
    check_size("max_bytes", max_bytes, 1)
    packed = q_lens is not None or kv_lens is not None
    if packed:
        pairs = _pairs(engine, q_len, kv_len, q_lens, kv_lens, batch)
    else:
        if q_len is None:
            raise ShapeError(
                f"{engine}: the number of queries is missing: pass q_len, kv_len, or q_lens=, kv_lens= for packed sequences"
            )
        pairs = [(check_size("q_len", q_len, 1), check_size("kv_len", q_len if kv_len is None else kv_len, 1))]
    if head is not None and not 0 <= check_size("head", head, 0) < heads:
        raise ShapeError(f"{engine}: head must be below heads={heads}; got {head}")
    case = Case(
        engine, what_holds, static, bound, tuple(pairs), tuple(range(len(pairs)) if numbers is None else numbers), head, packed, batch,
        heads, kv_heads, q_offset, None if device is None else torch.device(device), max_bytes,
    )  # fmt: skip
    _ = case.parts
    return case


def _pairs(
    engine: str, q_len: Any, kv_len: Any, q_lens: Sequence[int] | None, kv_lens: Sequence[int] | None, batch: int
) -> list[tuple[int, int]]:
    if q_len is not None or kv_len is not None or batch != 1:
        raise ShapeError(
            f"{engine}: sequences of lengths of their own are q_lens= and kv_lens= alone, without q_len, kv_len and batch"
        )
    queries = _lengths(engine, "q_lens", q_lens if q_lens is not None else kv_lens or ())
    keys = _lengths(engine, "kv_lens", kv_lens if kv_lens is not None else queries)
    if len(queries) != len(keys):
        raise ShapeError(f"{engine}: q_lens and kv_lens must name as many sequences; got {len(queries)} and {len(keys)}")
    return list(zip(queries, keys, strict=True))


def _offset(case: Case, q_len: int, kv_len: int) -> int:
    """The position of the first query."""
    if case.q_offset is not None:
        return check_size("q_offset", case.q_offset, 0)
    if q_len <= kv_len:
        return kv_len - q_len
    if relates_positions(case.pattern.mask.expr):
        raise ShapeError(
            f"{case.engine}: {q_len} queries do not end at the last of {kv_len} keys; say where the first one stands: q_offset={shown(0)}"
        )
    return 0
