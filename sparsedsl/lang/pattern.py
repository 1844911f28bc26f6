"""An attention pattern: which pairs attend, what their logits become, and what else the softmax holds."""

from __future__ import annotations

import functools
import hashlib
import numbers
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import sympy

from sparsedsl.errors import PatternError, TableError
from sparsedsl.lang.advice import meant, shown, way_in
from sparsedsl.lang.expressions import Mask, Score, _written, as_mask, as_score
from sparsedsl.lang.normalisers import SOFTMAX, check_normaliser
from sparsedsl.lang.printing import expression_text, reading_text, to_text
from sparsedsl.lang.refusals import Unread, Unvalued
from sparsedsl.lang.symbols import BATCH, HEAD, KV_IDX, Q_IDX, SCORE
from sparsedsl.lang.tables import TableSpec, by_kept_name, table_reads, table_specs, values_text
from sparsedsl.lang.wrapped import Carried, merge_carried

__all__ = ["Pattern", "as_pattern", "attend", "how_read", "relates_positions"]


@dataclass(frozen=True, eq=False, repr=False)
class Pattern(Unread):
    """One attention over one source; made by :func:`attend`.

    ``mask``: pairs that attend. ``score``: the modified logit, an expression in ``score`` (the scaled dot product); its plain
    form is ``score`` itself. ``sink``: a logit over ``b, h`` that enters the softmax denominator with value zero, or None.
    ``scale``: factor on the dot product; None means ``head_dim ** -0.5``. ``causal``: whether it is claimed that no query sees a later
    position; a claim changes nothing that is computed, and :func:`sparsedsl.testing.check` holds the pattern to it. ``normaliser``: how
    scores become weights, one of :data:`~sparsedsl.lang.normalisers.NORMALISERS`.

    >>> import sparsedsl as sd
    >>> pattern = sd.attend(sd.kv_idx <= sd.q_idx, sink=0.0)
    >>> pattern.mask, pattern.has_score, pattern.sink
    (Mask(kv_idx <= q_idx), False, Score(0.0))
    """

    mask: Mask
    score: Score
    sink: Score | None = None
    scale: float | None = None
    causal: bool = False
    normaliser: str = SOFTMAX

    @functools.cached_property
    def tables(self) -> Mapping[str, TableSpec]:
        """Table name -> declaration, for everything the pattern reads, by name."""
        return types.MappingProxyType(table_specs(*self.exprs))

    @functools.cached_property
    def table_ranks(self) -> Mapping[str, int]:
        """Table name -> number of indices it is read with."""
        reads = [read for expr in self.exprs for read in table_reads(expr)]
        return types.MappingProxyType({read.spec.name: len(read.args) for read in reads})

    @functools.cached_property
    def exprs(self) -> tuple[sympy.Basic, ...]:
        """The sympy expressions: mask, score and, if there is one, sink."""
        return (self.mask.expr, self.score.expr) + (() if self.sink is None else (self.sink.expr,))

    @property
    def bound(self) -> dict[str, Any]:
        """Tables bound at declaration or captured by tracing (a copy)."""
        return Carried(self._carried)

    @functools.cached_property
    def _carried(self) -> Carried:
        return merge_carried(self.mask, self.score, self.sink)

    @property
    def heads(self) -> int | None:
        """How many query heads it is declared for, by ``attend(..., heads=)`` or a part such as ``alibi(8)``; None: any number."""
        return self._carried.heads

    @functools.cached_property
    def head_reads(self) -> frozenset[tuple[str, int]]:
        """Tables that are read by the head: the name and which dimension. Their length says how many heads there are, so that those that
        are also read by something else in that dimension are left out.
        """
        reads = {read for expr in self.exprs for read in table_reads(expr)}
        places = {(read.spec.name, dim, index == HEAD) for read in reads for dim, index in enumerate(read.args)}
        return frozenset((name, dim) for name, dim, by_head in places if by_head and (name, dim, False) not in places)

    @functools.cached_property
    def tells_heads_apart(self) -> bool:
        """Whether the mask or the score depends on ``h``."""
        return any(HEAD in expr.free_symbols for expr in (self.mask.expr, self.score.expr))

    @property
    def has_lse(self) -> bool:
        """Whether its weights are divided by a sum, whose logarithm is the LSE."""
        return self.normaliser == SOFTMAX

    @property
    def has_score(self) -> bool:
        """Whether the logit is modified at all."""
        return self.score.expr != SCORE

    @functools.cached_property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed, but seldom meant; reports show it."""
        if SCORE in self.score.expr.free_symbols:
            return ()
        return (
            f"the score {self.score} does not read sd.score: queries and keys have no effect on the logits. To add to them write "
            f"sd.score + {self.score}",
        )

    @functools.cached_property
    def text(self) -> str:
        """The pattern as Python code with ``attend(...)``. ``str`` says the same as one writes it."""
        return self.written(expression_text)

    def written(self, write: Callable[[sympy.Basic], str]) -> str:
        """:attr:`text` with its expressions as ``write`` writes them."""
        return self._meaning(write)[:-1] + (", causal=True)" if self.causal else ")")

    def _meaning(self, write: Callable[[sympy.Basic], str]) -> str:
        """The text without what is only claimed."""
        *declarations, mask = to_text(*self.exprs, write=write).split("\n")[: len(self.tables) + 1]
        words = [mask]
        if self.has_score:
            words.append(f"score={write(self.score.expr)}")
        if self.sink is not None:
            words.append(f"sink={write(self.sink.expr)}")
        if self.scale is not None:
            words.append(f"scale={self.scale!r}")
        if self.heads is not None:
            words.append(f"heads={self.heads}")
        if self.normaliser != SOFTMAX:
            words.append(f"normaliser={self.normaliser!r}")
        return "\n".join([*declarations, f"attend({', '.join(words)})"])

    @functools.cached_property
    def key(self) -> str:
        """A hash of the text form without claims (32 hex digits), the same in every process."""
        return hashlib.sha256(self._meaning(expression_text).encode()).hexdigest()[:32]

    def bind(self, /, **tables: Any) -> Pattern:
        """The same pattern with tensors bound to some of its tables."""
        tables = dict(by_kept_name(tables, self.tables))
        unknown = sorted(set(tables) - set(self.tables))
        if unknown:
            near = "".join(meant(name, self.tables) for name in unknown)
            raise TableError(f"cannot bind {', '.join(unknown)}: the pattern reads {', '.join(self.tables) or 'no table'}{near}")

        def part(expression: Any) -> Any:
            names = expression.tables
            return expression.bind(**{n: t for n, t in tables.items() if n in names})

        sink = None if self.sink is None else part(self.sink)
        return replace(self, mask=part(self.mask), score=part(self.score), sink=sink)

    def __reduce__(self) -> Any:
        return Pattern, (self.mask, self.score, self.sink, self.scale, self.causal, self.normaliser)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Unvalued) and not isinstance(other, Pattern):
            self._unread()  # True or False would stand in a mask as if it were one
        return isinstance(other, Pattern) and self._compared == other._compared

    def __ne__(self, other: object) -> bool:
        return not self == other

    @property
    def _compared(self) -> tuple[Any, ...]:
        return self.exprs, self.scale, self.heads, self.normaliser

    def _unread(self) -> NoReturn:
        raise PatternError(
            f"{self!r} is a whole attention, a mask with a score: operators join masks. Write sd.attend(pattern.mask & other, "
            "score=pattern.score), or sd.joint() and sd.mix() for several attentions"
        )

    def __hash__(self) -> int:
        return hash((self.exprs, self.scale, self.normaliser))

    def _plain_(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        from sparsedsl.html_card import card
        from sparsedsl.lang.thumbnail import thumbnail

        return card("Pattern", str(self), self.html_facts(), thumbnail(self.mask.expr, self.bound), self.warnings)

    def html_facts(self) -> list[tuple[str, str]]:
        """What a notebook says of it beside its text: names and words."""
        missing = [name for name in self.tables if name not in self.bound]
        facts = [("tables to pass", ", ".join(missing))] if missing else []
        facts += [
            ("tables bound", ", ".join(f"{name} {values_text(self.bound[name])}" for name in self.tables if name in self.bound))
        ]
        facts += [("query heads", "any number" if self.heads is None else str(self.heads))]
        return [(name, words) for name, words in facts if words]

    def __str__(self) -> str:
        return self.written(reading_text)

    def __repr__(self) -> str:
        return f"<Pattern {str(self).splitlines()[-1]}>"


def attend(
    mask: Any, score: Any = None, *, sink: Any = None, scale: float | None = None, heads: int | None = None, causal: bool = False,
    normaliser: str = SOFTMAX,
) -> Pattern:  # fmt: skip
    """Attention over the pairs that ``mask`` allows, by default with a softmax.

    Args:
        mask: a :class:`Mask`, or ``True`` for full attention.
        score: the logit after modification, an expression in ``sd.score`` over indices, lengths and tables.
        sink: an extra logit over ``b`` and ``h`` (number, expression, or learned table read) that takes part in the softmax with a
            value of zero, as in GPT-OSS; ``0.0`` gives softmax-plus-one.
        scale: factor on ``q @ k``; default ``head_dim ** -0.5``.
        heads: the number of query heads it is written for: a call with another number, as a shard of the heads has, raises. None
            takes what its parts say, as ``alibi(8)`` does, else any number will do.
        causal: claims that no query sees a later position; nothing is computed otherwise for it. The test kit holds the pattern to it.
        normaliser: how scores become weights: see :func:`sparsedsl.attend`.

    Raises:
        PatternError: when the mask depends on ``score``, the sink on a position, the scale is not a positive number, parts are
            written for different numbers of heads, or the normaliser is none or has no place for a sink.
        UnsupportedError: the normaliser is one that nothing can work out tile by tile.

    >>> import sparsedsl as sd
    >>> sd.attend(sd.kv_idx <= sd.q_idx, score=sd.tanh(sd.score / 30) * 30)
    <Pattern attend(kv_idx <= q_idx, score=30*tanh(score / 30))>
    """
    mask = as_mask(mask, where="the mask of attend()")
    if heads is not None:
        mask = mask.for_heads(heads)
    if SCORE in mask.expr.free_symbols:
        raise PatternError(
            f"the mask {mask} depends on `score`; drop pairs by score inside the score: sd.where(condition, score, -inf)"
        )
    for word, value in (("score", score), ("sink", sink)):
        if isinstance(_written(value), (Mask, bool)):
            raise PatternError(
                f"the {word} of attend() must be a logit, not a condition; got {shown(value)}. Pairs are dropped by the mask; to add a "
                "number where a condition holds write sd.where(condition, number, 0)"
            )
    logit = Score(SCORE) if score is None else as_score(score, where="the score of attend()")
    if sink is not None:
        sink = as_score(sink, where="the sink of attend()")
        foreign = sink.expr.free_symbols - {BATCH, HEAD}
        if foreign:
            raise PatternError(
                f"a sink is one logit per batch entry and head; {sink} also depends on {sorted(map(str, foreign))}"
            )
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, numbers.Real) or not 0 < float(scale) < float("inf"):
            raise PatternError(f"scale must be a positive number or None for head_dim ** -0.5; got {scale!r}")
        scale = float(scale)
    if not isinstance(causal, bool):
        raise PatternError(f"causal must be True or False, what is claimed of the pattern; got {shown(causal)}")
    check_normaliser(normaliser, has_sink=sink is not None)
    pattern = Pattern(mask, logit, sink, scale, causal, normaliser)
    for name, spec in pattern.tables.items():
        if spec.learned and name in mask.tables:
            raise PatternError(
                f"table {name!r} is learned but read in the mask, through which no gradient flows; use it in the score"
            )
    _ = pattern.bound  # refuses two tensors under one name
    return pattern


def as_pattern(value: Any, *, where: str = "pattern") -> Pattern:
    """Coerce a pattern, a mask or ``True`` to a :class:`Pattern`."""
    if isinstance(value, Pattern):
        return value
    if isinstance(value, (Mask, bool)):
        return attend(value)
    if isinstance(value, Score):
        return attend(True, score=value)
    raise PatternError(f"{where} must be a Mask or a Pattern; got {shown(value)}{way_in(value)}")


@functools.lru_cache(maxsize=1024)
def relates_positions(expr: Any) -> bool:
    """Whether an expression counts queries and keys on one axis: where the first query stands then matters.

    It does where it uses ``q_idx`` as a number, looks up anything by both, or looks one table up by either.

    >>> import sparsedsl as sd
    >>> ours, theirs = sd.table("ours"), sd.table("theirs")
    >>> [relates_positions(mask.expr) for mask in (sd.kv_idx <= sd.q_idx, ours[sd.q_idx] == ours[sd.kv_idx])]
    [True, True]
    >>> [relates_positions(mask.expr) for mask in (sd.kv_idx < 9, ours[sd.q_idx] == theirs[sd.kv_idx])]
    [False, False]
    """
    by_query, by_key = set(), set()
    for read in table_reads(expr):
        free = read.free_symbols
        by_query |= {read.spec.name} if Q_IDX in free else set()
        by_key |= {read.spec.name} if KV_IDX in free else set()
        if {Q_IDX, KV_IDX} <= free:
            return True
    # A stand-in is a number of the read's own kind: sympy refuses to compare what it does not know to be real.
    kinds = {read: {"real": True} if read.spec.dtype == "float" else {"integer": True} for read in table_reads(expr)}
    plain = expr.xreplace({read: sympy.Dummy(**kind) for read, kind in kinds.items()})
    return bool(by_query & by_key) or Q_IDX in plain.free_symbols


def how_read(exprs: Iterable[sympy.Basic], names: Iterable[str]) -> str:
    """How the tables ``names`` are read in ``exprs``, in words: what tensor to give follows from it.

    >>> from sparsedsl import h, kv_idx, q_idx, table
    >>> doc = table("doc")
    >>> how_read([(doc[h, q_idx] == doc[h, kv_idx]).expr], ["doc"])
    'doc (int) is read as doc[h, kv_idx], doc[h, q_idx]'
    """
    reads = {read for expr in exprs for read in table_reads(expr)}
    words = []
    for name in names:
        own = [read for read in reads if read.spec.name == name]
        if own:
            words.append(f"{name} ({own[0].spec.dtype}) is read as {', '.join(sorted(map(expression_text, own)))}")
    return "; ".join(words)
