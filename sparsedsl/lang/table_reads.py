"""Declared tables, and what is read of them: an index, a mask or a score."""

from __future__ import annotations

from typing import Any, Generic, Literal, NoReturn, TypeVar, cast, overload
from weakref import WeakValueDictionary

import sympy

from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import Index, Mask, Score, as_index
from sparsedsl.lang.refusals import Unread
from sparsedsl.lang.tables import TableSpec, read_class
from sparsedsl.lang.wrapped import merge_carried

__all__ = ["Table", "table"]

Read = TypeVar("Read")  # what a table is read as: an index, a mask or a score


class Table(Unread, Generic[Read]):
    """A declared table; ``t[index]`` or ``t[i, j]`` reads it. Made by :func:`sparsedsl.table`.

    One object a declaration: as a key of a dict it is found by identity, and ``==``, like every operator, is for what was read.
    """

    __slots__ = ("__weakref__", "spec")
    spec: TableSpec

    def __new__(cls, spec: TableSpec) -> Table[Any]:
        table = object.__new__(cls)
        object.__setattr__(table, "spec", spec)
        return _declared.setdefault(spec, table)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a table is frozen; declare another instead of setting {name!r}")

    def __reduce__(self) -> Any:
        return Table, (self.spec,)

    def __getitem__(self, indices: Any) -> Read:
        parts = indices if isinstance(indices, tuple) else (indices,)
        if not parts:
            raise PatternError(f"table {self.spec.name!r} must be read with at least one index")
        for part in parts:
            if isinstance(part, slice) or part is None or part is Ellipsis:
                raise PatternError(f"table {self.spec.name!r} is read one element at a time; got {part!r} as an index")
            if isinstance(part, (Mask, bool)):
                raise PatternError(f"table {self.spec.name!r}: an index must be an integer expression; got the mask {part!r}")
        wrapped = [as_index(part, where=f"index of table {self.spec.name!r}") for part in parts]
        read = read_class(self.spec)(*(part.expr for part in wrapped))
        bound = merge_carried(*wrapped)
        if self.spec.dtype == "bool":
            return cast(Read, Mask(sympy.Ne(read, 0), bound))
        return cast(Read, (Index if self.spec.dtype == "int" else Score)(read, bound))

    def __bool__(self) -> NoReturn:
        raise PatternError(f"table {self.spec.name!r} has no truth value; read it: {self.spec.name}[q_idx]")

    def __iter__(self) -> NoReturn:
        raise PatternError(f"table {self.spec.name!r} cannot be iterated; read it: {self.spec.name}[q_idx]")

    def _unread(self) -> NoReturn:
        name = self.spec.name
        raise PatternError(f"a table must be read with indices before it is used: {name}[q_idx]; got the bare table {name!r}")

    def __hash__(self) -> int:
        return hash(self.spec)

    def __repr__(self) -> str:
        return self.spec.declaration()


_declared: WeakValueDictionary[TableSpec, Table[Any]] = WeakValueDictionary()


@overload
def table(name: str, *, dtype: type[bool]) -> Table[Mask]: ...  # type: ignore[overload-overlap]  # a bool is an int to Python
@overload
def table(
    name: str, *, dtype: type[int] | None = None, monotone: bool = False, bijective: bool = False,
    values_in: tuple[int, int] | None = None,
) -> Table[Index]: ...  # fmt: skip
@overload
def table(name: str, *, dtype: type[float] | Literal["float"], learned: bool = False) -> Table[Score]: ...
@overload
def table(name: str, *, learned: Literal[True]) -> Table[Score]: ...
@overload
def table(
    name: str, *, dtype: Any, monotone: bool = False, bijective: bool = False, learned: bool = False,
    values_in: tuple[int, int] | None = None,
) -> Table[Any]: ...  # fmt: skip
def table(
    name: str,
    *,
    dtype: Any = None,
    monotone: bool = False,
    bijective: bool = False,
    learned: bool = False,
    values_in: tuple[int, int] | None = None,
) -> Table[Any]:
    """Declare a table: a tensor that a pattern reads, passed at call time as ``attn(q, k, v, name=tensor)``.

    ``name`` is a Python identifier. A table called as an index, ``h``, is kept as ``h_table`` and passed by either name; one called as a
    word of the call, ``scale``, is passed as ``tables={"scale": tensor}``.

    ``dtype`` is int (default), bool or float, or a torch dtype of these kinds (``learned=True`` makes it float). The other words
    are facts that analysis relies on and calls check: ``monotone`` (never falls along its last index, as document ids),
    ``bijective`` (a permutation along its last index), ``values_in=(low, high)`` (inclusive). A learned table gets gradients.

    Integers are exact. Values may lie anywhere in int64 where they are compared (``kv_idx < end[q_idx]`` with ``iinfo(int64).max`` for
    "no end", also through ``minimum``, ``where`` or a bounded sum); a call whose arithmetic would take them beyond 2**60 raises TableError.

    What was worked out of a table (tile lists, checked facts) is kept while the tensor lives unchanged. Torch counts writes such as
    ``doc[5] = 1`` or ``doc.copy_(ids)``, and they are seen; it does not count writes through ``doc.data`` or through an array that shares
    the memory (``doc.numpy()``, ``torch.from_numpy(ids)``): after such a write pass ``doc.clone()``.

    >>> import sparsedsl as sd
    >>> doc = sd.table("doc", monotone=True)
    >>> print(doc[sd.q_idx] == doc[sd.kv_idx])
    doc[q_idx] == doc[kv_idx]
    """
    return Table(
        TableSpec.declare(name, dtype=dtype, monotone=monotone, bijective=bijective, learned=learned, values_in=values_in)
    )
