"""Compiled patterns inside a graph: the operators ``sparsedsl::attend`` and ``sparsedsl::attend_backward``.

Making tile lists depends on data (tables, lengths), which a traced graph cannot hold. So where a call is being traced, by
``torch.compile``, ``torch.export`` or fake tensors, the graph gets one operator instead; when the graph runs, the operator makes the
ordinary call. Lists, plans and compiled kernels are then the same as outside, and so are the errors. Nothing here looks at a length
while a graph is made, so one graph serves all lengths.

An operator's pattern is named by its *handle*: the backend and the pattern's text form, from which any process can build it again. A
process that loads an exported program needs the operators: ``from sparsedsl import Attention`` registers them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch

from sparsedsl.analysis.caches import Cache
from sparsedsl.errors import ShapeError, TableError
from sparsedsl.execute.call_words import CallWords
from sparsedsl.runtime.autograd import known_results, no_forward_mode, no_second_derivatives
from sparsedsl.runtime.call import check_tensors
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.patience import until_built
from sparsedsl.runtime.standing import Standing
from sparsedsl.runtime.vmap import map_call
from sparsedsl.torch_private import autograd_again, make_transformable

__all__ = ["attend_traced", "made_by", "remember"]

Tensor = torch.Tensor

# ---- handles ---------------------------------------------------------------------------------------------------------------


_maker: list[Callable[[str, str], Any]] = []
_living: WeakValueDictionary[str, Any] = WeakValueDictionary()


def made_by(make: Callable[[str, str], Any]) -> None:
    """Name the function that makes a callable of the first line of a handle and the text below it."""
    _maker[:] = [make]


def remember(handle: str, calls: Any) -> None:
    """Let graphs share this object's tile lists, as long as it lives."""
    _living.setdefault(handle, calls)


_REBUILT: Cache[Any] = Cache()


def _calls(handle: str) -> Any:
    known = _living.get(handle)
    if known is not None:
        return known
    first, _, text = handle.partition("\n")
    return _REBUILT.get(handle, [], lambda: _maker[0](first, text))


# ---- while a graph is made ----------------------------------------------------------------------------------------------------


def attend_traced(
    handle: str, bound: Mapping[str, Tensor], q: Any, k: Any, v: Any, words: CallWords, *, has_lse: bool = True
) -> Any:  # fmt: skip
    """What the ordinary call gives, as one operator of the graph. Checks only that the operator can be given the arguments."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise ShapeError(
                f"{name} must be a torch tensor of shape (batch, heads, length, head_dim); got {type(tensor).__name__}"
            )
    if type(q) is type(k) is type(v) is Tensor and q.is_meta and not torch.compiler.is_compiling():
        check_tensors(q, k, v)  # no graph in which somebody else would: tensors without values, whose shapes are known
    q_offset, return_lse, scale, where = words.q_offset, words.return_lse, words.scale, words.where
    given = {**bound, **words.named}
    for name, table in given.items():
        if not isinstance(table, torch.Tensor):
            raise TableError(f"table {name!r} must be a torch tensor; got {type(table).__name__}. Write torch.as_tensor({name})")
    start = q_offset if isinstance(q_offset, torch.Tensor) else None
    offset = 0 if start is not None else q_offset
    if isinstance(offset, bool) or not isinstance(offset, (int, torch.SymInt)):
        raise ShapeError(f"q_offset must be a whole number of at least 0, the position of the first query; got {q_offset!r}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt, type(None))):
        raise ShapeError(f"scale must be a positive number or None; got {scale!r}")
    names = ",".join(given)
    if where is not None:
        names, more = _told(names, where)
        given |= more
    values = list(given.values())
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in [q, k, v, *values])
    # Exported for inference, parameters still require gradients: the program is no training step until somebody differentiates it.
    grad = grad and not torch.compiler.is_exporting()
    out, lse = torch.ops.sparsedsl.attend(
        handle, names, q, k, v, values, offset, start, scale, return_lse or (grad and has_lse), grad
    )
    return (out, lse) if return_lse else out


# ---- where a call stands, as text and tensors: an operator takes nothing else -------------------------------------------------

# Stands before what is no table, since no name of a table has it.
_SAID = "@"


def _told(names: str, where: Standing) -> tuple[str, dict[str, Tensor]]:
    """The names of an operator's tables, of those that say where the call stands too, and these."""
    tensors = {_SAID + word: t for word, t in (("queries", where.queries), ("keys", where.keys)) if t is not None}
    numbers = {"first_head": where.first_head, "heads": where.heads, "entry": where.entry}
    if where.lengths is not None:
        numbers |= {"q_len": where.lengths[0], "kv_len": where.lengths[1]}
    said = [f"{word}={int(number)}" for word, number in numbers.items() if number is not None]
    return ",".join(filter(None, [names, *tensors])) + _SAID * 2 + ",".join(said), tensors


def _split(names: str, tables: list[Tensor]) -> tuple[dict[str, Tensor], Standing | None]:
    """The tables by name, and where the call stands."""
    names, told, words = names.partition(_SAID * 2)
    named = dict(zip(names.split(","), tables, strict=True)) if tables else {}
    if not told:
        return named, None
    rows = {name.removeprefix(_SAID): named.pop(name) for name in list(named) if name.startswith(_SAID)}
    numbers = {word: int(number) for word, _, number in (part.partition("=") for part in words.split(","))}
    lengths = (numbers.pop("q_len"), numbers.pop("kv_len")) if "q_len" in numbers else None
    return named, Standing(**rows, **numbers, lengths=lengths)  # type: ignore[arg-type]


# ---- when a graph runs ----------------------------------------------------------------------------------------------------------


@contextmanager
def _plain(device: torch.device, grad: bool) -> Iterator[None]:
    """The surroundings of an ordinary call, inside an operator.

    torch's dispatcher has passed autograd by already; here it takes part again, without ``grad`` too: what FlexAttention compiles
    depends on it, and graphs and ordinary calls are to share that. Autocast has cast q, k, v before. What a graph does must not depend on
    how long a compiler takes, nor may its backward pass, which is an operator of its own, take another backend: it waits for both.
    """
    with until_built(), autograd_again(), torch.set_grad_enabled(grad), torch.autocast(device.type, enabled=False):
        yield


def _run(
    handle: str, names: str, q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], q_offset: int, q_start: Tensor | None,
    scale: float | None, lse: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The ordinary call: ``(out, lse)`` or ``(out,)``."""
    named, where = _split(names, tables)
    offset = q_offset if q_start is None else q_start
    result = _calls(handle).attend_now(q, k, v, CallWords(named, offset, lse, scale, where))
    return result if lse else (result,)


@torch.library.custom_op("sparsedsl::attend", mutates_args=())
def _attend(
    handle: str, names: str, q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], q_offset: int, q_start: Tensor | None,
    scale: float | None, lse: bool, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``out, lse``; without ``lse`` that is ``(B, Hq, 0)``. ``grad``: a lowering without gradients refuses."""
    with _plain(q.device, grad):
        if grad:
            q = q.detach().requires_grad_()
        results = [t.detach().contiguous() for t in _run(handle, names, q, k, v, tables, q_offset, q_start, scale, lse)]
    return results[0], results[1] if lse else _no_lse(q)


def _no_lse(q: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:2], 0), dtype=accumulated(q.dtype))


@_attend.register_fake
def _(
    handle: str, names: str, q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], q_offset: int, q_start: Tensor | None,
    scale: float | None, lse: bool, grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # Shapes that make no sense are not refused here, where torch would wrap the error, but when the graph runs.
    rows = tuple(q.shape[:-1])
    if (
        q.ndim == k.ndim == v.ndim == 4 and v.shape[1] > k.shape[1] and v.shape[1] > q.shape[1]
    ):  # values with more heads than keys
        rows = (q.shape[0], v.shape[1], q.shape[2])
    return q.new_empty((*rows, *v.shape[-1:])), q.new_empty(rows, dtype=accumulated(q.dtype)) if lse else _no_lse(q)


@torch.library.custom_op("sparsedsl::attend_backward", mutates_args=())
def _attend_backward(
    handle: str, names: str, grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor,
    v: Tensor, tables: list[Tensor], q_offset: int, q_start: Tensor | None, scale: float | None, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of those of ``q, k, v, *tables`` that are wanted, in order.

    Makes the call again under autograd. A lowering that has a backward pass of its own takes ``out`` and ``lse`` and runs only that.
    """
    calls = _calls(handle)
    # A program makes several calls, of which none has the results of the whole.
    whole = lse.shape == out.shape[:3] and calls.static is not None
    with _plain(q.device, True), known_results(out, lse if whole else None):
        leaves = [t.detach().requires_grad_() if want else t for t, want in zip((q, k, v, *tables), wanted, strict=True)]
        sources = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
        results = _run(handle, names, leaves[0], leaves[1], leaves[2], leaves[3:], q_offset, q_start, scale, calls.has_lse)
        given = [(y, g) for y, g in zip(results, (grad_out, grad_lse), strict=False) if g is not None]
        grads = torch.autograd.grad(
            [y for y, _ in given], sources, [g for _, g in given], allow_unused=True, materialize_grads=True
        )
    return [g.contiguous() for g in grads]


@_attend_backward.register_fake
def _(
    handle: str, names: str, grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor,
    v: Tensor, tables: list[Tensor], q_offset: int, q_start: Tensor | None, scale: float | None, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t, want in zip((q, k, v, *tables), wanted, strict=True) if want]


# ---- autograd and vmap ------------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    handle, names, q, k, v, tables, q_offset, q_start, scale, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, q, k, v, *tables, *(() if q_start is None else (q_start,)))
    ctx.words, ctx.table_count = (handle, names, q_offset, scale), len(tables)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
    out, lse, q, k, v, *rest = ctx.saved_tensors
    handle, names, q_offset, scale = ctx.words
    tables, start = rest[: ctx.table_count], (rest[ctx.table_count :] or [None])[0]
    needs = ctx.needs_input_grad
    # torch hands an empty list over as one leaf
    wanted = [*needs[2:5], *(needs[5] if tables else ())]
    if grad_out is None and grad_lse is None:
        found = iter([None] * sum(wanted))
    else:
        found = iter(
            torch.ops.sparsedsl.attend_backward(
                handle, names, grad_out, grad_lse, out, lse, q, k, v, tables, q_offset, start, scale, wanted
            )
        )
    dq, dk, dv, *dtables = [next(found) if want else None for want in wanted]
    return None, None, dq, dk, dv, dtables, None, None, None, None, None


_attend.register_autograd(_backward, setup_context=_setup_context)


def _refuse(ctx: Any, *grads: Any) -> NoReturn:
    no_second_derivatives()


_attend_backward.register_autograd(_refuse)
# Gradients under torch.func.grad inside torch.compile, where the graph holds the operators.
_library = torch.library.Library("sparsedsl", "FRAGMENT")
make_transformable(_attend, _library, no_forward_mode)
make_transformable(_attend_backward, _library, no_forward_mode)


@_attend.register_vmap
def _(
    info: Any, in_dims: Any, handle: str, names: str, q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], q_offset: int,
    q_start: Tensor | None, scale: float | None, lse: bool, grad: bool,
) -> Any:  # fmt: skip
    def call(batched: list[Any], others: list[Any]) -> Any:
        start, *values = others
        return torch.ops.sparsedsl.attend(handle, names, *batched, values, q_offset, start, scale, lse, grad)

    others, dims = [q_start, *tables], [in_dims[7], *(in_dims[5] if tables else ())]
    fold = not _calls(handle).program.reads_batch and _SAID not in names
    results, where = map_call(call, info.batch_size, [q, k, v], in_dims[2:5], others, dims, fold=fold)
    return tuple(results), tuple(where)


@_attend_backward.register_vmap
def _(
    info: Any, in_dims: Any, handle: str, names: str, grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], q_offset: int, q_start: Tensor | None, scale: float | None,
    wanted: list[bool],
) -> Any:  # fmt: skip
    def call(batched: list[Any], others: list[Any]) -> Any:
        start, *values = others
        return torch.ops.sparsedsl.attend_backward(handle, names, *batched, values, q_offset, start, scale, wanted)

    others, dims = [q_start, *tables], [in_dims[11], *(in_dims[9] if tables else ())]
    fold = not _calls(handle).program.reads_batch and _SAID not in names and not any(wanted[3:])
    results, where = map_call(
        call, info.batch_size, [grad_out, grad_lse, out, lse, q, k, v], in_dims[2:9], others, dims, fold=fold
    )
    return results, where
