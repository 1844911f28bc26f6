"""What a call is given, checked: q, k, v, tables, offset, scale. Every refusal names the argument, what it got, what it wanted."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from sparsedsl.analysis.bounds import check_reads
from sparsedsl.analysis.caches import Cache
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.exactness import exact_domain
from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.errors import ShapeError, TableError, UnsupportedError
from sparsedsl.lang.advice import shown, surplus
from sparsedsl.lang.pattern import Pattern, attend, how_read
from sparsedsl.lang.symbols import CALL_WORDS
from sparsedsl.lang.tables import TableSpec, by_kept_name, to_pass
from sparsedsl.runtime.places import Places
from sparsedsl.runtime.torch_modes import is_transformed
from sparsedsl.runtime.vmap import samples, stacked

__all__ = [
    "FLOATS",
    "Call",
    "bind_tables",
    "check_call",
    "check_shapes",
    "check_table",
    "check_tensors",
    "exactly",
    "inner_call",
    "wants_grad",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Call:
    """One checked call. ``given`` holds every table of the pattern as it was passed; ``domain`` the index ranges, and the tables for
    computing in int64 (:func:`~sparsedsl.analysis.exactness.exact_domain`); ``scale`` is a number; ``places``: where rows lie, if not in
    their order, which only those backends follow that say so. ``made_here``: its tables are checked, or made of checked ones, and are not
    looked at again; ``run``: so many neighbouring queries see keys of one sequence, those behind them of another; 0: all may.

    A domain has no empty ranges: that of an empty call says 1 where the tensors have 0.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    domain: Domain
    scale: float
    given: Mapping[str, torch.Tensor]
    places: Places | None = None
    made_here: bool = False
    run: int = 0

    @property
    def tables(self) -> Mapping[str, torch.Tensor]:
        """Name -> tensor, for computing in int64."""
        return self.domain.tables

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def is_empty(self) -> bool:
        """Whether there are no batch entries, no queries or no keys."""
        return _is_empty(self.q, self.k)

    @property
    def needs_grad(self) -> bool:
        """Whether autograd wants gradients of this call."""
        return wants_grad(self.q, self.k, self.v, *self.domain.tables.values())


def wants_grad(*tensors: torch.Tensor) -> bool:
    """Whether autograd wants gradients by one of these."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t.requires_grad:
                return True
    return False


def check_call(
    pattern: Pattern, q: Any, k: Any, v: Any, tables: Mapping[str, Any], *, q_offset: Any = 0, scale: Any = None,
    places: Places | None = None,
) -> Call:  # fmt: skip
    """Check everything once and bind the tables.

    Raises:
        ShapeError: q, k, v do not fit each other.
        TableError: a table is missing, surplus, too short, of the wrong type or device, breaks a declared fact, or holds values that
            arithmetic would take beyond 2**60. UnsupportedError: constants or positions would.
    """
    check_tensors(q, k, v)
    if isinstance(q_offset, torch.Tensor) and q_offset.ndim == 0 and not q_offset.is_floating_point():
        q_offset = int(q_offset)
    whole = type(q_offset) is int or (isinstance(q_offset, numbers.Integral) and not isinstance(q_offset, bool))
    if not whole or q_offset < 0:
        raise ShapeError(
            f"q_offset must be a whole number of at least 0, the position of the first query, or 'end'; got {shown(q_offset)}"
            + _of_this_name("q_offset", pattern)
        )
    if scale is None:
        scale = pattern.scale if pattern.scale is not None else q.shape[-1] ** -0.5
    real = type(scale) is float or (isinstance(scale, numbers.Real) and not isinstance(scale, bool))
    if not real or not 0 < float(scale) < float("inf"):
        raise ShapeError(f"scale must be a positive number or None; got {shown(scale)}" + _of_this_name("scale", pattern))
    empty = _is_empty(q, k)
    bound = bind_tables(pattern, tables, device=q.device, may_be_empty=empty)
    rows, kv_len = (q.shape[2], k.shape[2]) if places is None else places.lengths(q, k)
    domain = Domain(max(rows, 1), max(kv_len, 1), int(q_offset), max(q.shape[0], 1), q.shape[1], bound)
    if not empty:
        domain = _admitted(pattern, domain)
    else:
        count_heads((pattern,), bound, q.shape[1])
        if pattern.sink is not None and q.shape[0] and q.shape[2]:  # there are no keys, but rows whose sinks are read
            domain = _admitted(attend(False, sink=pattern.sink), domain)
    return Call(q, k, v, domain, float(scale), bound, places)


def _of_this_name(word: str, pattern: Pattern) -> str:
    """What to do with a table that has the name of a word of the call."""
    return f". The pattern has a table of this name: {to_pass(word)}" if word in pattern.tables else ""


def inner_call(
    pattern: Pattern, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: Mapping[str, Any], *, q_offset: int, scale: float,
    places: Places | None = None,
) -> Call:  # fmt: skip
    """A call that is part of a checked one: only tables are looked at again."""
    if pattern.tables or places is not None or _is_empty(q, k):
        return check_call(pattern, q, k, v, tables, q_offset=q_offset, scale=scale, places=places)
    return Call(q, k, v, Domain(q.shape[2], k.shape[2], q_offset, q.shape[0], q.shape[1]), scale, {})


def check_tensors(q: Any, k: Any, v: Any) -> None:
    """Whether q, k and v are tensors of the right ranks and dtypes that fit each other.

    Raises :class:`~sparsedsl.ShapeError`.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise ShapeError(
                f"{name} must be a torch tensor of shape (batch, heads, length, head_dim); got {type(tensor).__name__}"
            )
        if tensor.ndim != 4:
            raise ShapeError(
                f"{name} must have 4 dimensions (batch, heads, length, head_dim); got shape {tuple(tensor.shape)}. "
                f"Unbatched or packed tensors: {name}.unsqueeze(0); (B, S, H, D) layouts: layout='bshd', or {name}.transpose(1, 2)"
            )
        if tensor.dtype not in FLOATS:
            raise ShapeError(f"{name} must be float16, bfloat16, float32 or float64; got {tensor.dtype}")
        if 0 in (tensor.shape[1], tensor.shape[3]):
            raise ShapeError(
                f"{name} has no heads or no head_dim: shape {tuple(tensor.shape)}; both must be at least 1 (batch and length may be 0)"
            )
    check_shapes(q, k, v)


def exactly(exprs: tuple[sympy.Basic, ...], domain: Domain) -> Domain:
    """:func:`~sparsedsl.analysis.exactness.exact_domain`, also of tables that differ from sample to sample of a vmap."""
    if not is_transformed(*domain.tables.values()):
        return exact_domain(exprs, domain)
    for values in samples(domain.tables):
        one = replace(domain, tables=values)
        if exact_domain(exprs, one) is not one:
            raise UnsupportedError(
                "a table under torch.vmap holds values beyond 2**60, which are told apart for one table at a time. "
                "Pass smaller values, or loop over the samples"
            )
    return domain


def _is_empty(q: torch.Tensor, k: torch.Tensor) -> bool:
    return 0 in (q.shape[0], q.shape[2], k.shape[2])


def check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Whether q, k and v fit each other.

    Raises :class:`~sparsedsl.ShapeError`.
    """

    def wrong(what: str) -> ShapeError:
        return ShapeError(
            f"{what}. q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "wanted q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv)"
        )

    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise wrong("q, k and v must have one batch size")
    if k.shape[1] != v.shape[1]:
        raise wrong("k and v must have the same number of heads")
    if q.shape[1] % k.shape[1]:
        raise wrong(f"the query heads must be a multiple of the key/value heads; {q.shape[1]} is not a multiple of {k.shape[1]}")
    if k.shape[2] != v.shape[2]:
        raise wrong("k and v must have the same length")
    if q.shape[3] != k.shape[3]:
        raise wrong("q and k must have the same head_dim")
    if not q.dtype == k.dtype == v.dtype:
        raise ShapeError(
            f"q, k and v must have one dtype; got {q.dtype}, {k.dtype}, {v.dtype}. Cast them, or use torch.autocast around the projections"
        )
    if not q.device == k.device == v.device:
        raise ShapeError(f"q, k and v must be on one device; got {q.device}, {k.device}, {v.device}")


def bind_tables(
    pattern: Pattern, tables: Mapping[str, Any], *, device: torch.device | None = None, may_be_empty: bool = False,
    words: Iterable[str] = CALL_WORDS,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """All tables of ``pattern`` by name: those given, else those bound at declaration; checked against their declarations.

    ``words``: what else the caller takes by keyword, of which one may have been meant.

    ``device`` None takes the device of the first table. ``may_be_empty``: nothing will be read, so tables may have no entries.
    """
    wanted = pattern.tables
    if not wanted and not tables:
        return {}
    tables = by_kept_name(tables, wanted)
    unknown = set(tables) - set(wanted)
    if unknown:
        reads = "the tables " + ", ".join(wanted) if wanted else "no table"
        raise TableError(surplus(unknown, [*wanted, *words], f"the pattern reads {reads}"))
    given = pattern.bound | dict(tables)
    missing = [name for name in wanted if name not in given]
    if missing:
        raise TableError(
            f"missing table{'s' * (len(missing) > 1)} {', '.join(missing)}: {to_pass(*missing)}. {how_read(pattern.exprs, missing)}"
        )
    bound = {}
    for name, spec in wanted.items():
        bound[name] = check_table(spec, given[name], pattern.table_ranks[name], device, may_be_empty)
        device = device or bound[name].device
    return bound


def check_table(spec: TableSpec, value: Any, rank: int, device: torch.device | None, may_be_empty: bool = False) -> torch.Tensor:
    """A tensor for a declared table, checked against its declaration. ``rank``: indices it is read with; ``device`` None: any."""
    name = spec.name
    if not isinstance(value, torch.Tensor):
        raise TableError(f"table {name!r} must be a torch tensor; got {type(value).__name__}. Write torch.as_tensor({name})")
    kind = (
        "float"
        if value.is_floating_point()
        else "bool"
        if value.dtype == torch.bool
        else "complex"
        if value.is_complex()
        else "int"
    )
    if kind != spec.dtype:
        raise TableError(
            f"table {name!r} is declared as {spec.dtype} but got {value.dtype}; pass {spec.dtype} values or declare dtype={kind}"
        )
    if value.dtype in (torch.uint16, torch.uint32, torch.uint64):
        raise TableError(
            f"table {name!r} has the type {value.dtype}, whose values torch neither compares nor adds; pass {name}.to(torch.int64)"
        )
    if value.ndim != rank:
        raise TableError(
            f"table {name!r} is read with {rank} ind{'ex' if rank == 1 else 'ices'} but has shape {tuple(value.shape)}"
        )
    if device is not None and value.device != device:
        raise TableError(
            f"table {name!r} is on {value.device} but the call runs on {device}; move it: {name}.to({str(device)!r})"
        )
    if 0 in value.shape and not may_be_empty:
        raise TableError(f"table {name!r} is empty: shape {tuple(value.shape)}")
    if value.requires_grad and not spec.learned:
        raise TableError(
            f"table {name!r} requires gradients but is not declared as learned; write sd.table({name!r}, learned=True), "
            f"or pass {name}.detach()"
        )
    if value.numel():
        _check_facts_once(spec, value)
    return value


# Facts are checked once per tensor and version, not per call: a check reads the whole table and, on GPU, waits for it.
_CHECKED: Cache[None] = Cache()


def _check_facts_once(spec: TableSpec, value: torch.Tensor) -> None:
    if spec.monotone or spec.bijective or spec.values_in:
        _CHECKED.get(spec, [value], lambda: _check_facts(spec, stacked(value)))


def _check_facts(spec: TableSpec, value: torch.Tensor) -> None:
    if spec.monotone:
        falls = (value[..., 1:] < value[..., :-1]).nonzero()
        if falls.numel():
            place = falls[0].tolist()
            raise TableError(
                f"table {spec.name!r} is declared monotone but falls after index {place}; sort it or drop monotone=True"
            )
    if spec.bijective:
        size = value.shape[-1]
        expected = torch.arange(size, device=value.device, dtype=value.dtype).expand(value.shape)
        if not torch.equal(value.sort(dim=-1).values, expected):
            raise TableError(
                f"table {spec.name!r} is declared bijective but its last dimension is no permutation of 0..{size - 1}"
            )
    if spec.values_in:
        low, high = (int(x) for x in torch.aminmax(value))
        if low < spec.values_in[0] or high > spec.values_in[1]:
            raise TableError(
                f"table {spec.name!r} is declared with values_in={spec.values_in} but holds values from {low} to {high}"
            )


# Tables that are exchanged for computing in int64, by name, for calls that passed the checks of tables and lengths together.
_ADMITTED: Cache[dict[str, torch.Tensor]] = Cache()


def _admitted(pattern: Pattern, domain: Domain) -> Domain:
    """The domain for computing in int64, checked once for lengths and tables: heads, how far integers reach, what is read of tables."""
    count, tables = domain.heads, list(domain.tables.values())
    if not tables:
        count_heads((pattern,), {}, count)
        return exactly(pattern.exprs, domain)
    if is_transformed(*tables):
        count_heads((pattern,), domain.tables, count)
        exact = exactly(pattern.exprs, domain)
        for values in samples(domain.tables):
            check_reads(pattern, replace(domain, tables=values))
        return exact

    def check() -> dict[str, torch.Tensor]:
        count_heads((pattern,), domain.tables, count)
        exact = exactly(pattern.exprs, domain)
        check_reads(pattern, domain)
        return {name: table for name, table in exact.tables.items() if table is not domain.tables[name]}

    # Of a float table only the shape matters, and its values change at every step of a training.
    whole = [t for t in tables if not t.is_floating_point()]
    key = (pattern.key, domain.rows, domain.kv_len, domain.q_offset, domain.batch, count, *(t.shape for t in tables))
    changed = _ADMITTED.get(key, whole, check)
    return replace(domain, tables={**domain.tables, **changed}) if changed else domain
