"""What a call of a program is given, checked: q, k, v, inputs by name, static tables, offset. Errors name the argument."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.head_counts import count_heads
from sparsedsl.errors import ShapeError, TableError, UnsupportedError
from sparsedsl.lang.advice import surplus
from sparsedsl.lang.pattern import attend, how_read
from sparsedsl.lang.symbols import CALL_WORDS
from sparsedsl.lang.tables import by_kept_name, table_reads, to_pass
from sparsedsl.program import tensors
from sparsedsl.program.axes import base_of, complete_on, rows_on
from sparsedsl.program.branches import Attend, Branch, Recall
from sparsedsl.program.given_blocks import Given
from sparsedsl.program.graph import Program
from sparsedsl.program.node import Node
from sparsedsl.program.recurrences import Linear
from sparsedsl.program.scores import GivenKeyScores, GivenScores
from sparsedsl.program.tensors import Input
from sparsedsl.runtime.call import FLOATS, Call, check_call, check_table, exactly, wants_grad
from sparsedsl.runtime.dtypes import accumulated

__all__ = [
    "KnownInput",
    "ProgramCall",
    "check_program_call",
    "known_inputs",
    "plain_call",
    "refused_positions",
    "takes_any_position",
]

Tensor = torch.Tensor
_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class ProgramCall:
    """One checked call. ``inputs``: input node -> tensor; q, k and v are among them whether or not the program reads them, since lengths
    and heads are theirs. ``tables``: static tables by name.
    """

    program: Program
    inputs: Mapping[Input, Tensor]
    tables: Mapping[str, Tensor]
    q_offset: int
    scale: float | None
    state: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def q(self) -> Tensor:
        """``(B, Hq, Sq, D)``."""
        return self.inputs[tensors.q]

    @functools.cached_property
    def k(self) -> Tensor:
        """``(B, Hkv, Skv, D)``."""
        return self.inputs[tensors.k]

    @functools.cached_property
    def v(self) -> Tensor:
        """``(B, Hkv, Skv, Dv)``."""
        return self.inputs[tensors.v]

    @functools.cached_property
    def domain(self) -> Domain:
        """Index ranges, with the static tables."""
        return Domain(self.q.shape[2], self.k.shape[2], self.q_offset, self.q.shape[0], self.q.shape[1], self.tables)

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """What is computed in: float64 for float64, else float32."""
        return accumulated(self.q.dtype)

    @functools.cached_property
    def is_empty(self) -> bool:
        """Whether there are no batch entries, no queries or no keys."""
        return 0 in (self.q.shape[0], self.q.shape[2], self.k.shape[2])

    @functools.cached_property
    def needs_grad(self) -> bool:
        """Whether autograd wants gradients of this call."""
        return wants_grad(*self.inputs.values(), *self.tables.values())

    def state_of(self, node: Node) -> Any:
        """What a recurrent node has made of the tokens of earlier calls; None where there were none."""
        return self.state.get(self.program.labels[node]) if self.state else None

    def inside(self, branch: Branch, q: Tensor, k: Tensor, v: Tensor) -> ProgramCall:
        """The call of ``branch``, which reads q, k and v alone, on these in place of the call's own."""
        inputs = {tensors.q: q, tensors.k: k, tensors.v: v}
        return replace(self, program=Program(branch, inside=self.program), inputs=inputs, q_offset=0, state={})

    def check_heads(self, node: Node, heads: int) -> int:
        """The heads of scores, which choose for as many query heads each."""
        if self.q.shape[1] % heads:
            raise ShapeError(
                f"{self.program.worded(repr(node))} has {heads} heads, and q has {self.q.shape[1]}: each must choose for as many query "
                "heads. Give inputs with a number of heads that divides that of q"
            )
        return heads

    def check_scores(self, node: GivenScores, scores: Tensor) -> None:
        """No score is -inf, and there is a row for all queries. On a GPU this waits for the numbers."""
        rows = rows_on(node.axes[2], self.q.shape[2])
        name = node.x.given_name or self.program.labels[node.x]
        if scores.shape[2] != rows:
            raise ShapeError(f"input {name!r} has scores of {scores.shape[2]} rows for {self.q.shape[2]} queries; wanted {rows}")
        if bool((scores == float("-inf")).any()):
            raise TableError(
                f"input {name!r} holds -inf; which blocks are candidates is said by masks: sd.top_k(scores, n, among=mask)"
            )

    def check_key_scores(self, node: GivenKeyScores, scores: Tensor) -> None:
        """No score is below 0. On a GPU this waits for the numbers."""
        if bool((scores < 0).any()):
            name = node.x.given_name or self.program.labels[node.x]
            raise TableError(
                f"input {name!r} holds scores below 0; scores of keys are at least 0: pass their softmax, sigmoid or exp"
            )

    def check_lists(self, node: Given, lists: Tensor) -> None:
        """Every number is that of a block, or -1, and stands once in its row. On a GPU this waits for the numbers."""
        rows, name = rows_on(node.axes[2], self.q.shape[2]), node.x.given_name or self.program.labels[node.x]
        if lists.shape[2] != rows or lists.dtype not in (torch.int16, torch.int32, torch.int64):
            raise TableError(
                f"input {name!r} must list blocks for {rows} rows as int32 or int64; got {lists.dtype} {tuple(lists.shape)}. A bitmap is "
                f"declared with the axis keys/{node.unit} in place of {node.x.axes[3]!r}"
            )
        if not lists.numel():
            return
        blocks = rows_on(node.axes[3], self.k.shape[2])
        low, high = lists.min(), lists.max()
        ordered = lists.sort(dim=-1).values
        again = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()
        least, most, twice = torch.stack([low.long(), high.long(), again.long()]).tolist()
        if least < -1 or most >= blocks:
            raise TableError(
                f"input {name!r} lists blocks of {node.unit} keys by number, 0 to {blocks - 1} here, and -1 for none; got "
                f"{least if least < -1 else most}"
            )
        if twice:
            row = ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any(-1).nonzero()[0].tolist()
            raise TableError(
                f"input {name!r} names a block twice in the list of (batch entry, head, row) {tuple(row)}: a block is chosen or not. Leave "
                "the second out, as -1"
            )

    def check_bitmap(self, node: Given, bits: Tensor) -> None:
        """There is a row for all queries, of booleans."""
        rows, name = rows_on(node.axes[2], self.q.shape[2]), node.x.given_name or self.program.labels[node.x]
        if bits.dtype != torch.bool or bits.shape[2] != rows:
            raise TableError(f"input {name!r} must be a bitmap of {rows} rows, torch.bool; got {bits.dtype} {tuple(bits.shape)}")

    @property
    def out_heads(self) -> int:
        """Heads of the output: those of q, but for values with more heads than keys."""
        heads: int = self.v.shape[1]
        return max(self.q.shape[1], heads)


# What of a call has nothing to do with a program.
_ANY = attend(True)


def refused_positions(program: Program, q_offset: int, q_len: int, kv_len: int) -> str | None:
    """Why no backend can run a call with queries and keys at these positions, or None."""
    for node in program.order:
        what, block = f"{node.function}()", node.whole_queries
        if q_offset % block:
            return f"{what} works on whole blocks of {block} queries: q_offset must be a multiple of {block}; got {q_offset}"
        if node.whole_sequence and (q_offset or q_len != kv_len):
            return (
                f"{what} chooses among the tokens of one whole sequence: it needs as many queries as keys and q_offset=0; got "
                f"{q_len} queries at {q_offset} and {kv_len} keys. Use it for prefill, and another pattern to decode"
            )
    return None


@functools.lru_cache(maxsize=256)
def takes_any_position(program: Program) -> bool:
    """Whether calls without tables that differ in the number of keys and the position alone are all refused, or none."""
    positions = any(node.whole_sequence or node.whole_queries > 1 for node in program.order)
    recurrent = any(isinstance(node, (Recall, Linear)) for node in program.everything)
    return not (positions or recurrent or program.tables)


def plain_call(
    program: Program, q: Tensor, k: Tensor, v: Tensor, more: Mapping[Input, Tensor], q_offset: int, scale: float | None
) -> ProgramCall:  # fmt: skip
    """A call that needs no check, of which nobody wants gradients, without tables. ``more``: its further inputs."""
    (batch, heads, rows, _), keys = q.shape, k.shape[2]
    domain, call = object.__new__(Domain), object.__new__(ProgramCall)
    vars(domain).update(rows=rows, kv_len=keys, q_offset=q_offset, batch=batch, heads=heads, tables=_NONE)
    # With what would be worked out when it is asked for.
    vars(call).update(
        program=program, inputs={tensors.q: q, tensors.k: k, tensors.v: v, **more}, tables=_NONE, q_offset=q_offset, scale=scale,
        state=_NONE, q=q, k=k, v=v, domain=domain, dtype=accumulated(q.dtype), is_empty=False, needs_grad=False,
    )  # fmt: skip
    return call


@dataclass(frozen=True)
class KnownInput:
    """What an input of a call was, as far as it is that of the next: ``sizes`` of its axes; ``by_keys``: those that count keys."""

    node: Input
    dtype: torch.dtype
    sizes: tuple[int, ...]
    by_keys: tuple[str, ...]

    @staticmethod
    def of(node: Input, value: Tensor) -> KnownInput:
        """What is known of an input that was checked."""
        by_keys = tuple(axis if base_of(axis) == "keys" else "" for axis in node.axes)
        return KnownInput(node, value.dtype, tuple(value.shape), by_keys)

    def fits(self, value: Any, keys: int) -> bool:
        """Whether it fits a call with so many keys, and nobody wants its gradient."""
        if type(value) is not Tensor or value.dtype is not self.dtype or not value.is_cpu:
            return False
        if value.requires_grad and torch.is_grad_enabled():
            return False
        shape = tuple(value.shape)
        if shape == self.sizes and not any(self.by_keys):
            return True
        return len(shape) == len(self.sizes) and all(
            [
                n in _rows_wanted(axis, keys) if axis else n == size
                for n, size, axis in zip(shape, self.sizes, self.by_keys, strict=True)
            ]
        )


def known_inputs(known: tuple[KnownInput, ...], named: Mapping[str, Any], keys: int) -> dict[Input, Tensor] | None:
    """The inputs of a call beside q, k and v, if they are like those that are known."""
    if len(named) != len(known):
        return None
    found: dict[Input, Tensor] = {}
    for one in known:
        value = named.get(one.node.name)
        if value is None or not one.fits(value, keys):
            return None
        found[one.node] = value
    return found


def check_program_call(
    program: Program, q: Any, k: Any, v: Any, named: Mapping[str, Any], *, q_offset: Any = 0, scale: Any = None, state: Any = None
) -> ProgramCall:
    """Check everything once.

    Raises:
        ShapeError: q, k, v or an input do not fit each other.
        TableError: an input or a table is missing, surplus, of the wrong type or device, or a table's values leave 2**60 by arithmetic.
    """
    values = _own_value_heads(program, q, k, v)
    plain: Call = check_call(_ANY, q, k, values, {}, q_offset=q_offset, scale=1.0 if scale is None else scale)
    known = program.inputs, program.tables
    named = by_kept_name(named, known[1])
    unknown = set(named) - set(known[0]) - set(known[1])
    if unknown:
        own = [*known[0], *known[1]]
        words = f"beside q, k, v the program takes {', '.join(own) or 'nothing'}"
        raise TableError(surplus(unknown, [*own, *CALL_WORDS], words))
    sizes = {
        "batch": q.shape[0], "heads": q.shape[1], "kv_heads": k.shape[1], "queries": q.shape[2], "keys": k.shape[2],
        "value_heads": v.shape[1], "head_dim": q.shape[3], "value_dim": v.shape[3],
    }  # fmt: skip
    _check_recurrent(program, plain)
    if not plain.is_empty:
        why = refused_positions(program, plain.domain.q_offset, q.shape[2], k.shape[2])
        if why is not None:
            raise UnsupportedError(why)
    inputs: dict[Input, Tensor] = {tensors.q: q, tensors.k: k, tensors.v: v}
    for node in program.everything:
        if not isinstance(node, Input) or node in inputs:
            continue
        if node.name in named and named[node.name] is not None:
            inputs[node] = _check_input(node, named[node.name], sizes, q.device)
        elif node.default is None:
            raise TableError(f"missing input {node.name!r}: pass {node.name}=tensor with the axes {' '.join(node.axes)!r}")
    tables = {}
    given = program.bound | {name: value for name, value in named.items() if name in known[1]}
    ranks = _ranks(program) if known[1] else {}
    for name, spec in known[1].items():
        if name not in given:
            raise TableError(f"missing table {name}: {to_pass(name)}. {how_read(program.exprs, [name])}")
        tables[name] = check_table(spec, given[name], ranks[name], q.device)
    count_heads((node.pattern for node in program.everything if isinstance(node, Attend)), tables, q.shape[1])
    exact = exactly(program.exprs, replace(plain.domain, tables=tables))
    return ProgramCall(program, inputs, exact.tables, plain.domain.q_offset, None if scale is None else plain.scale, state or {})


def _own_value_heads(program: Program, q: Any, k: Any, v: Any) -> Any:
    """The values as far as all calls are checked alike: where a linear attention alone reads them they may have more heads than keys."""
    if not all(isinstance(t, Tensor) and t.ndim == 4 for t in (q, k, v)) or v.shape[1] <= k.shape[1] or v.is_nested:
        return v
    if not isinstance(program.root, Linear):
        raise ShapeError(
            f"v has {v.shape[1]} heads and k {k.shape[1]}: only a program that is one linear() may have more values than keys. Repeat k: "
            f"k.repeat_interleave({v.shape[1]} // {k.shape[1]}, 1), and q alike"
        )
    return v[:, : k.shape[1]]


def _check_recurrent(program: Program, plain: Call) -> None:
    """A recurrence says nothing of queries that stand beyond its last key."""
    last, keys = plain.domain.q_offset + plain.q.shape[2], plain.k.shape[2]
    for node in program.everything:
        delay = node.memory.delay if isinstance(node, Recall) else 0 if isinstance(node, Linear) else None
        if delay is not None and last - delay > keys and not plain.is_empty:
            raise ShapeError(
                f"{program.labels[node]} runs along the keys: the query at position {last - 1} wants keys up to position "
                f"{last - 1 - delay}, but k and v hold {keys}. Pass all keys up to the last query, or the state of those before"
            )


@functools.lru_cache(maxsize=256)
def _ranks(program: Program) -> dict[str, int]:
    """Table name -> number of indices it is read with."""
    return {read.spec.name: len(read.args) for expr in program.exprs for read in table_reads(expr)}


def _check_input(node: Input, value: Any, sizes: dict[str, int], device: torch.device) -> Tensor:
    name, axes = node.name, " ".join(node.axes)
    if not isinstance(value, torch.Tensor):
        raise TableError(f"input {name!r} must be a torch tensor with the axes {axes!r}; got {type(value).__name__}")
    if node.axes[0] == "batch" and value.ndim == len(node.axes) - 1:
        value = value[None]
    if value.ndim != len(node.axes):
        raise ShapeError(f"input {name!r} must have the axes {axes!r}; got shape {tuple(value.shape)}")
    if value.device != device:
        raise ShapeError(f"input {name!r} is on {value.device} but q on {device}; move it: {name}.to({str(device)!r})")
    if value.is_floating_point() and value.dtype not in FLOATS:
        raise ShapeError(f"input {name!r} must be float16, bfloat16, float32 or float64, or integers; got {value.dtype}")
    for axis, size in zip(node.axes, value.shape, strict=True):
        low, high = _wanted(axis, sizes)
        if axis == "batch" and size == 1:
            continue
        if low is None:
            sizes[axis] = size
        elif not low <= size <= high:
            wanted = str(low) if low == high else f"{low} to {high}"
            raise ShapeError(f"input {name!r} with the axes {axes!r} has size {size} for {axis!r}; wanted {wanted}")
    return value


def _wanted(axis: str, sizes: Mapping[str, int]) -> tuple[int | None, int]:
    """Smallest and largest size of an axis; None: not known yet."""
    if axis.isdecimal():
        return int(axis), int(axis)
    tokens = sizes.get(base_of(axis))
    if tokens is None:
        return None, 0
    wanted = _rows_wanted(axis, tokens)
    return wanted.start, wanted.stop - 1


@functools.lru_cache(maxsize=1024)
def _rows_wanted(axis: str, tokens: int) -> range:
    """How many rows an axis may have: an incomplete last block may be left out, windows are all complete."""
    return range(complete_on(axis, tokens), rows_on(axis, tokens) + 1)
