"""What stands in a declaration has no value before the call: whatever asks Python for one is refused here, with the way out."""

from __future__ import annotations

from typing import Any, NoReturn

from sparsedsl.errors import PatternError

__all__ = ["Unread", "Unvalued"]


class Unvalued:
    """Base of expressions, tables and nodes: Python's conversions and protocols that would need a value now."""

    __slots__ = ()
    __array_ufunc__ = None  # numpy hands its operators to us in place of going through its elements one by one

    def _no(self, what: str, instead: str) -> NoReturn:
        raise PatternError(f"{what} is not possible on {self!r}: its value is not known while it is being declared. {instead}")

    def __int__(self) -> NoReturn:
        self._no("int()", "Keep it symbolic; integer arithmetic is + - * // % min max abs clamp where")

    def __index__(self) -> NoReturn:
        self._no("use as a Python index", "To look a value up by position declare a table: t = sd.table('t'); t[expression]")

    def __float__(self) -> NoReturn:
        self._no("float()", "Use the expression itself; integers become floats in a score by themselves")

    def __complex__(self) -> NoReturn:
        self._no("complex()", "Patterns are made of whole and real numbers")

    def _rounded(self, *_: Any) -> NoReturn:
        self._no("rounding", "Whole numbers: x // n rounds down, (x + n // 2) // n to the nearest")

    __round__ = __floor__ = __ceil__ = __trunc__ = _rounded

    def __len__(self) -> NoReturn:
        self._no("len()", "Use sd.q_len or sd.kv_len for lengths")

    def __contains__(self, item: Any) -> NoReturn:
        self._no("`in`", "Compare instead: (x == 1) | (x == 2)")

    def __iter__(self) -> NoReturn:
        self._no("iteration", "Write the terms out, or join them with functools.reduce over a Python list of expressions")

    def __getitem__(self, indices: Any) -> Any:
        self._no("`[...]`", "Tables are read by position: t = sd.table('t'); t[sd.q_idx]")

    def __divmod__(self, other: Any) -> NoReturn:
        self._no("divmod()", "Write x // n and x % n")

    def __matmul__(self, other: Any) -> NoReturn:
        self._no("`@`", "Dot products of queries and keys are sd.score; of other rows sd.dot(x, y)")

    __rdivmod__, __rmatmul__ = __divmod__, __matmul__


class Unread(Unvalued):
    """Base of what is no operand itself, but gives one when it is read: every operator is refused by ``_unread``."""

    __slots__ = ()

    def _unread(self) -> NoReturn:
        raise NotImplementedError

    def _refused(self, *_: Any) -> Any:
        self._unread()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refused
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __neg__ = __pos__ = __abs__ = _refused
    __lt__ = __le__ = __gt__ = __ge__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = _refused
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = _refused

    # `==` too, between two of a kind as well: what it gave, True or False, would stand in a mask as if it were one.
    def __eq__(self, other: object) -> Any:
        self._unread()

    def __ne__(self, other: object) -> Any:
        self._unread()

    def __hash__(self) -> int:
        raise NotImplementedError
