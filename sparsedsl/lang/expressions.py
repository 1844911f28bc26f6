"""What users write with: :class:`Index`, :class:`Mask` and :class:`Score`, thin frozen wrappers that own Python's operators.

The wrappers exist because sympy's ``==`` compares structure, and because ``and``, ``or``, ``not`` and chained comparisons would
silently drop a side: here ``__bool__`` raises and says what to write.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self, overload

import sympy

from sparsedsl.errors import PatternError
from sparsedsl.lang import functions as fn
from sparsedsl.lang import strict
from sparsedsl.lang.advice import shown, way_in
from sparsedsl.lang.joins import join, join_xor
from sparsedsl.lang.known_facts import HIGHEST
from sparsedsl.lang.refusals import Unread
from sparsedsl.lang.relations import raised, relation_of, unstrict
from sparsedsl.lang.symbols import BATCH, HEAD, INDEX_SYMBOLS, KV_IDX, KV_LEN, Q_IDX, Q_LEN, SCORE
from sparsedsl.lang.wrapped import Expression, merge_carried

__all__ = ["Index", "Mask", "Score", "as_index", "as_mask", "as_score"]


def _written(value: object) -> Any:
    """The expression that stands for ``value`` where it is none itself but says which, as a node of a program does."""
    say = getattr(type(value), "as_expression", None)
    return value if say is None else say(value)


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def as_index(value: object, *, where: str = "operand") -> Index:
    """Coerce an :class:`Index` or a Python integer to an :class:`Index`."""
    value = _written(value)
    if isinstance(value, Index):
        return value
    if isinstance(value, Mask):
        return Index(fn.Where(value.expr, sympy.Integer(1), sympy.Integer(0)), value._bound)
    if isinstance(value, bool):
        return Index(sympy.Integer(int(value)))
    if isinstance(value, numbers.Integral):
        return Index(sympy.Integer(int(value)))
    raise PatternError(f"{where} must be an index expression or a whole number; got {shown(value)}{way_in(value)}")


def as_score(value: object, *, where: str = "operand") -> Score:
    """Coerce a :class:`Score`, :class:`Index` or Python number to a :class:`Score`."""
    value = _written(value)
    if isinstance(value, Score):
        return value
    if isinstance(value, (Index, Mask, bool, numbers.Integral)):
        index = as_index(value)
        return Score(index.expr, index._bound)
    if isinstance(value, numbers.Real):
        number = float(value)
        if number != number:
            raise PatternError(f"{where} must not be NaN; to drop a pair use the mask, or -inf through sd.where")
        infinite = {float("inf"): sympy.oo, float("-inf"): -sympy.oo}
        return Score(infinite[number] if number in infinite else sympy.Float(number))
    raise PatternError(f"{where} must be a score or index expression or a number; got {shown(value)}{way_in(value)}")


def as_mask(value: object, *, where: str = "operand") -> Mask:
    """Coerce a :class:`Mask` or a Python bool to a :class:`Mask`."""
    value = _written(value)
    if isinstance(value, Mask):
        return value
    if isinstance(value, bool):
        return Mask(sympy.true if value else sympy.false)
    hint = ". A comparison makes a mask: write e.g. `x != 0`" if isinstance(value, (Index, Score)) else way_in(value)
    raise PatternError(f"{where} must be a mask; got {shown(value)}{hint}")


class Mask(Expression):
    """A boolean expression: which (query, key) pairs may attend. Combines with ``& | ^ ~``, ``==`` and ``!=``.

    >>> import sparsedsl as sd
    >>> causal = sd.kv_idx <= sd.q_idx
    >>> local = causal & (sd.q_idx - sd.kv_idx < 512)
    >>> print(local)
    (kv_idx <= q_idx) & (q_idx - kv_idx < 512)
    """

    __slots__ = ()

    def __and__(self, other: Any) -> Mask:
        return joined("&", self, other)

    def __or__(self, other: Any) -> Mask:
        return joined("|", self, other)

    def __xor__(self, other: Any) -> Mask:
        return joined("^", self, other)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __invert__(self) -> Mask:
        return Mask(unstrict(sympy.Not(self._expr)), self._bound)

    def __eq__(self, other: Any) -> Mask:  # type: ignore[override]
        return ~(self ^ other)

    def __ne__(self, other: Any) -> Mask:  # type: ignore[override]
        return self ^ other

    __hash__ = Expression.__hash__

    def _number(self, *other: Any) -> Any:
        if other and isinstance(other[0], _Arithmetic):
            return NotImplemented  # the index or score takes it as 0 and 1
        raise PatternError(f"a mask is not a number: {self}. Join masks with & | ^ ~, or make a number with sd.where(mask, 1, 0)")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = __pos__ = __abs__ = (
        _number
    )
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __lt__ = __le__ = __gt__ = __ge__ = _number
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _number


def joined(sign: str, *masks: Any) -> Mask:
    """``a & b & c``, with ``|`` or ``^`` as ``sign`` says."""
    parts = [as_mask(mask) for mask in masks]
    exprs = [part.expr for part in parts]
    if sign == "^":
        return Mask(unstrict(join_xor(exprs)), merge_carried(*parts))
    return Mask(join({"&": sympy.And, "|": sympy.Or}[sign], exprs), merge_carried(*parts))


class _Arithmetic(Expression):
    """Operators shared by indices and scores; ``_lift`` turns an operand into the wider of the two kinds."""

    __slots__ = ()

    def _lift(self, other: Any) -> tuple[Any, Any]:
        other = _written(other)
        if isinstance(other, Unread):
            other._unread()
        if isinstance(self, Index) and (isinstance(other, (Index, Mask, bool)) or _is_number(other, numbers.Integral)):
            return self, as_index(other)
        if not isinstance(other, (Expression, bool, numbers.Real)):
            raise PatternError(
                f"an expression cannot be combined with {type(other).__name__}. Read tensors through a table: "
                "t = sd.table('t'); t[kv_idx], bound as attn(q, k, v, t=tensor)"
            )
        return as_score(self), as_score(other)

    def _arith(self, other: Any, op: Any, *, swap: bool = False) -> Any:
        left, right = self._lift(other)
        if swap:
            left, right = right, left
        return type(left)(op(left._expr, right._expr), merge_carried(left, right))

    def _compare(self, other: Any, relation: Any) -> Mask:
        left, right = self._lift(other)
        if relation in (sympy.Eq, sympy.Ne):
            _check_quotients(left, right)
        return Mask(relation_of(relation, left._expr, right._expr), merge_carried(left, right))

    def __add__(self, other: Any) -> Any:
        return self._arith(other, lambda x, y: x + y)

    def __sub__(self, other: Any) -> Any:
        return self._arith(other, lambda x, y: x - y)

    def __rsub__(self, other: Any) -> Any:
        return self._arith(other, lambda x, y: x - y, swap=True)

    def __mul__(self, other: Any) -> Any:
        return self._arith(other, lambda x, y: x * y)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Any) -> Score:
        return _true_divide(as_score(self), as_score(other, where="divisor"))

    def __rtruediv__(self, other: Any) -> Score:
        return _true_divide(as_score(other), as_score(self))

    def __neg__(self) -> Self:
        return type(self)(-self._expr, self._bound)

    def __pos__(self) -> Self:
        return self

    def __abs__(self) -> Self:
        return type(self)(fn.Abs(self._expr), self._bound)

    def __lt__(self, other: Any) -> Mask:
        return self._compare(other, sympy.Lt)

    def __le__(self, other: Any) -> Mask:
        return self._compare(other, sympy.Le)

    def __gt__(self, other: Any) -> Mask:
        return self._compare(other, sympy.Gt)

    def __ge__(self, other: Any) -> Mask:
        return self._compare(other, sympy.Ge)

    def __eq__(self, other: Any) -> Mask:  # type: ignore[override]
        return self._compare(other, sympy.Eq)

    def __ne__(self, other: Any) -> Mask:  # type: ignore[override]
        return self._compare(other, sympy.Ne)

    __hash__ = Expression.__hash__


def _check_quotients(left: Any, right: Any) -> None:
    """Refuses ``q_idx / 64 == kv_idx / 64``, which is ``q_idx == kv_idx``: who divides positions and asks for equality means blocks."""
    parts = [side._expr for side in (left, right)]
    # sympy is asked about quotients of whole numbers alone: it may take long over others.
    if isinstance(left, Index) or any(SCORE in part.free_symbols or part.atoms(sympy.Float) for part in parts):
        return
    if all(part.is_rational for part in parts) and any(part.is_integer is not True and part.free_symbols for part in parts):
        raise PatternError(
            f"`/` divides exactly, so {left} and {right} are equal at single positions only, not in whole blocks. For blocks of tokens "
            "write `//`: q_idx // 64 == kv_idx // 64"
        )


def _true_divide(left: Score, right: Score) -> Score:
    if right._expr.is_zero:
        raise PatternError(f"division by zero: {left} / {right}")
    return Score(left._expr / right._expr, merge_carried(left, right))


class _GivesScore(Protocol):
    """For type checkers: an operator that gives a score."""

    def __call__(self, other: Any, /) -> Score: ...


class _GivesIndex(Protocol):
    """For type checkers: an operator that gives an index with whole numbers, and a score with anything else."""

    @overload
    def __call__(self, other: Index | int, /) -> Index: ...
    @overload
    def __call__(self, other: Any, /) -> Score: ...


class Index(_Arithmetic):
    """An integer expression over the indices, lengths and integer tables: ``+ - * // % ** abs & | ^ << >>`` and comparisons.

    ``//`` and ``%`` round towards minus infinity, as in Python and torch.

    >>> import sparsedsl as sd
    >>> (sd.q_idx // 64) * 2 + 1
    Index(2*(q_idx // 64) + 1)
    """

    __slots__ = ()
    if TYPE_CHECKING:
        __add__: _GivesIndex
        __radd__: _GivesIndex
        __sub__: _GivesIndex
        __rsub__: _GivesIndex
        __mul__: _GivesIndex
        __rmul__: _GivesIndex

    def _divide(self, other: Any, operation: Any, symbol: str, *, swap: bool = False) -> Index:
        left, right = self, _power_of_two(other)
        other = right
        if isinstance(other, Score) or (not isinstance(other, Expression) and not _is_number(other, numbers.Integral)):
            raise PatternError(f"`{symbol}` wants whole numbers on both sides; got {other!r}. For scores use `/`")
        left, right = (as_index(other), self) if swap else (self, as_index(other))
        if not (right._expr.is_positive or right._expr.is_negative):
            raise PatternError(
                f"the divisor in {left} {symbol} {right} must be known not to be zero; got {right}. Use a constant, a length, "
                "or a table declared with values_in=(1, ...)"
            )
        return Index(operation(left._expr, right._expr), merge_carried(left, right))

    def __floordiv__(self, other: Any) -> Index:
        return self._divide(other, fn.floor_div, "//")

    def __rfloordiv__(self, other: Any) -> Index:
        return self._divide(other, fn.floor_div, "//", swap=True)

    def __mod__(self, other: Any) -> Index:
        return self._divide(other, fn.mod, "%")

    def __rmod__(self, other: Any) -> Index:
        return self._divide(other, fn.mod, "%", swap=True)

    def __pow__(self, power: Any) -> Any:
        if _is_number(power, numbers.Integral) and power >= 0:
            if power > HIGHEST:
                raise PatternError(
                    f"a power of an index above {HIGHEST} leaves the whole numbers of 64 bits; got ({self}) ** {power}"
                )
            return Index(self._expr ** int(power), self._bound)
        return as_score(self) ** power

    def __rpow__(self, base: Any) -> Score:
        return as_score(base, where="base") ** as_score(self)

    def __lshift__(self, bits: Any) -> Index:
        return self * _shifted(bits)

    def __rshift__(self, bits: Any) -> Index:
        return self // _shifted(bits)

    def __rlshift__(self, value: object) -> Index:
        return as_index(value) << self

    def __rrshift__(self, value: object) -> Index:
        return as_index(value) >> self

    def __and__(self, other: Any) -> Index:
        if isinstance(other, (Mask, bool)):
            raise PatternError(
                f"`&` between an index and a mask: {self} & {other}. Put brackets around comparisons: (a < b) & (c == d)"
            )
        return self._arith(as_index(other), fn.BitAnd)

    def __or__(self, other: Any) -> Index:
        if isinstance(other, (Mask, bool)):
            raise PatternError(
                f"`|` between an index and a mask: {self} | {other}. Put brackets around comparisons: (a < b) | (c == d)"
            )
        other = as_index(other)
        return self + other - (self & other)

    def __xor__(self, other: Any) -> Index:
        if isinstance(other, (Mask, bool)):
            raise PatternError(
                f"`^` between an index and a mask: {self} ^ {other}. Put brackets around comparisons: (a < b) ^ (c == d)"
            )
        other = as_index(other)
        return self + other - 2 * (self & other)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __invert__(self) -> Index:
        return -self - 1


def _shifted(bits: Any) -> Any:
    """``2**bits``; of an expression beyond 60 bits 2**60, which is more than any position."""
    if isinstance(bits, Index) and bits._expr.is_nonnegative:
        return Index(strict.strict_class("i64", "shl")(sympy.Integer(1), fn.Min(bits._expr, sympy.Integer(60))), bits._bound)
    if not _is_number(bits, numbers.Integral) or not 0 <= bits < 63:
        raise PatternError(
            f"a shift wants a number of bits from 0 to 62, or an index that cannot be negative; got {bits!r}. "
            "Of a table: declare values_in=(0, ...)"
        )
    return 2 ** int(bits)


def _power_of_two(value: object) -> Any:
    """``2**h`` in the place of a whole number, as ``1 << h``; anything else as it is."""
    if isinstance(value, Score) and value._expr.is_Pow and value._expr.base == 2 and value._expr.exp.is_integer:
        return _shifted(Index(value._expr.exp, value._bound)) if value._expr.exp.is_nonnegative else value
    return value


# What `@sd.score` does; tracing stands above the language, which cannot import it.
_score_decorators: list[Callable[..., Any]] = []


def decorate_by(decorator: Callable[..., Any]) -> None:
    """Name what the bare score does as a decorator."""
    _score_decorators[:] = [decorator]


class Score(_Arithmetic):
    """A float expression: the scaled logit ``score`` modified with indices, tables and float functions.

    >>> import sparsedsl as sd
    >>> sd.tanh(sd.score / 30) * 30
    Score(30*tanh(score / 30))
    """

    __slots__ = ()
    if TYPE_CHECKING:
        __add__: _GivesScore
        __radd__: _GivesScore
        __sub__: _GivesScore
        __rsub__: _GivesScore
        __mul__: _GivesScore
        __rmul__: _GivesScore

    def __pow__(self, power: Any) -> Score:
        other = as_score(power, where="exponent")
        return Score(raised(self._expr, other._expr), merge_carried(self, other))

    def __rpow__(self, base: Any) -> Score:
        other = as_score(base, where="base")
        return Score(raised(other._expr, self._expr), merge_carried(self, other))

    def __floordiv__(self, other: Any) -> NoReturn:
        raise PatternError(f"`//` wants whole numbers; {self} is a score. Use `/`")

    def __mod__(self, other: Any) -> NoReturn:
        raise PatternError(f"`%` wants whole numbers; {self} is a score")

    def __lshift__(self, other: Any) -> NoReturn:
        raise PatternError(f"`<<` and `>>` want whole numbers; {self} is a score. Use * and /")

    def __call__(self, /, *function: Callable[..., Any], rename: Mapping[str, str] | None = None) -> Any:
        """The bare score is a decorator too: the Score of a FlexAttention ``score_mod(score, b, h, q_idx, kv_idx)``.

        The same as :func:`sparsedsl.trace_score`; ``@sd.score(rename={"slopes": "alibi"})`` calls tables otherwise.

        >>> import sparsedsl as sd
        >>> @sd.score
        ... def capped(score, b, h, q_idx, kv_idx):
        ...     return score - (q_idx - kv_idx) * 0.5
        >>> capped
        Score(score + 0.5*kv_idx - 0.5*q_idx)
        """
        bare = self._expr == SCORE and _score_decorators
        if not bare or len(function) > 1 or not all(callable(f) and not isinstance(f, Expression) for f in function):
            raise PatternError(
                f"{self!r} is an expression, not a function of {', '.join(map(shown, function)) or 'nothing'}. Called is sd.score alone, "
                "on a score_mod(score, b, h, q_idx, kv_idx): @sd.score above it. To use the scaled logit write sd.score without brackets"
            )
        return _score_decorators[0](*function, rename=rename)

    __rfloordiv__, __rmod__ = __floordiv__, __mod__
    __rlshift__ = __rshift__ = __rrshift__ = __lshift__

    def __and__(self, other: Any) -> NoReturn:
        raise PatternError(f"`& | ^ ~` join masks; {self} is a score. Put brackets around comparisons, or use sd.where")

    def __invert__(self) -> NoReturn:
        self.__and__(self)

    __or__ = __xor__ = __rand__ = __ror__ = __rxor__ = __and__


b, h, q_idx, kv_idx, q_len, kv_len = (Index(s) for s in (BATCH, HEAD, Q_IDX, KV_IDX, Q_LEN, KV_LEN))
score = Score(SCORE)
assert set(INDEX_SYMBOLS) == {"b", "h", "q_idx", "kv_idx", "q_len", "kv_len"}
