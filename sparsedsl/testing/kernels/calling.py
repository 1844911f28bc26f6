"""One call of a kernel: its arguments made from a case, its results checked for what they are before anybody looks at numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsedsl.lang.symbols import KV_LEN, Q_LEN
from sparsedsl.program.graph import Program
from sparsedsl.testing.call_shapes import tensor
from sparsedsl.testing.kernels.arena import Placed, place
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.kernel_case import KernelCase
from sparsedsl.testing.kernels.oracle import Problem
from sparsedsl.testing.kernels.packing import (
    VARLEN,
    Misshapen,
    Pages,
    Part,
    cut_pages,
    packed_arguments,
    unpacked,
)
from sparsedsl.testing.kernels.values import fill
from sparsedsl.testing.program_inputs import named_inputs
from sparsedsl.testing.program_numbers import moving
from sparsedsl.testing.strategies import seeded_tables

__all__ = [
    "Backward",
    "Broken",
    "Call",
    "Cotangents",
    "Refused",
    "Results",
    "call_packed",
    "call_paged",
    "changed",
    "cotangents",
    "made",
    "moved",
    "reads",
    "reads_lengths",
    "results",
    "with_gradients",
]

Tensor = torch.Tensor
Results = dict[str, Tensor]
Cotangents = tuple[Tensor, Tensor | None]


class Refused(Exception):
    """The kernel raised an error of a type by which it refuses; the text is its own."""


class Broken(Exception):
    """What came back is no result, or an error that is no refusal. ``kind`` of "shape", "raised"."""

    def __init__(self, kind: str, what: str):
        super().__init__(what)
        self.kind, self.what = kind, what


@dataclass(frozen=True)
class Call:
    """A case made into tensors: ``problem`` holds what the kernel is given, ``placed`` where it lies."""

    kernel: Kernel
    case: KernelCase
    problem: Problem
    placed: Mapping[str, Placed]

    def changed(self, **tensors: Any) -> Problem:
        """The same call with other tensors, ``q_offset`` or ``scale``."""
        return changed(self.problem, **tensors)


def changed(problem: Problem, **words: Any) -> Problem:
    """A call with other tensors, tables (``tables=``), offset or scale."""
    fields = ("pattern", "q", "k", "v", "tables", "q_offset", "scale")
    return Problem(**{name: words.get(name, getattr(problem, name)) for name in fields})


def made(kernel: Kernel, case: KernelCase, *, guard: int | None = None, tables: Mapping[str, Any] | None = None) -> Call:
    """The tensors of a case, each in a guarded buffer of its own.

    ``guard``: what guards hold; None: by the seed. ``tables``: values for some, in place of drawn ones.
    """
    sizes, implements = case.attention, kernel.implements
    words = {name: torch.as_tensor(value) for name, value in {**implements.bound, **(tables or {})}.items()}
    if kernel.is_program:
        drawn = named_inputs(implements, sizes, seed=case.seed, dtype=case.torch_dtype)
        words = {**drawn, **words}
    exprs = implements.exprs
    words |= seeded_tables(exprs, sizes, words, case.seed) if any(name not in words for name in implements.tables) else {}
    scale = case.scale or _scale(kernel, case)
    q, k, v = fill((sizes.q_shape, sizes.k_shape, sizes.v_shape), scale, case.values, case.seed, case.torch_dtype)
    guard = case.seed if guard is None else guard
    turned = kernel.layout == "bshd"
    row = max(case.head_dim, case.head_dim_v) * (case.heads if turned or case.memory == "turned" else 1)
    margin = 2 * max(kernel.tiles or (64,)) * row
    where: dict[str, Any] = {"guard": guard, "device": case.device}
    placed = {name: place(x, case.memory, margin=margin, turned=turned, **where) for name, x in (("q", q), ("k", k), ("v", v))}
    placed |= {name: place(words[name], **where) for name in kernel.passed if isinstance(words[name], Tensor)}
    found = {name: placed[name].tensor if name in placed else value for name, value in words.items()}
    q, k, v = (placed[name].tensor for name in "qkv")
    problem = Problem(implements, q, k, v, found, case.q_offset, case.scale)
    return Call(kernel, case, problem, placed)


def _scale(kernel: Kernel, case: KernelCase) -> float:
    return float(getattr(kernel.implements, "scale", None) or case.head_dim**-0.5)


def moved(problem: Problem, grad: str) -> tuple[str, ...]:
    """The names of what gradients reach."""
    if grad == "none":
        return ()
    if isinstance(problem.pattern, Program):
        named = {name: x for name, x in problem.tables.items() if isinstance(x, Tensor)}
        return ("q", "k", "v", *(moving(problem.pattern, named) if grad == "all" else ()))
    return ("q", "k", "v", *(problem.learned if grad == "all" else ()))


def results(kernel: Kernel, problem: Problem) -> Results:
    """``out``, and ``lse`` (in base e) if the kernel gives it, of one call without gradients.

    Raises:
        Refused: the kernel refuses the call.
        Broken: it raises something else, or what it gives has another shape, dtype or number of parts than declared.
    """
    with torch.no_grad():
        return {name: x.detach() for name, x in _called(kernel, problem, {}).items()}


def _called(kernel: Kernel, problem: Problem, leaves: Mapping[str, Tensor]) -> Results:
    q, k, v = (leaves.get(name, getattr(problem, name)) for name in "qkv")
    if kernel.layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    words: dict[str, Any] = {name: leaves.get(name, problem.tables[name]) for name in kernel.passed}
    if kernel.offset is True:
        words["q_offset"] = problem.q_offset
    if kernel.scale:
        words["scale"] = problem.factor
    given = _run(kernel, lambda: _in_one(kernel, problem, q, k, v, words) if kernel.packing else kernel.fn(q, k, v, **words))
    return _checked(kernel, problem, given)


def _run(kernel: Kernel, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except kernel.refuses as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    except Misshapen as error:
        raise Broken("shape", str(error)) from error
    except Exception as error:
        raise Broken("raised", f"raises {type(error).__name__}: {str(error)[:300]}") from error


# ---- packed sequences and pages ------------------------------------------------------------------------------------------------


def _in_one(kernel: Kernel, problem: Problem, q: Tensor, k: Tensor, v: Tensor, words: dict[str, Any]) -> Any:
    """A call of a packed kernel with entries that are all as long, as an ordinary one; q, k and v as the kernel's layout has them."""
    if kernel.layout == "bshd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    parts = [Part(*entry) for entry in zip(q, k, v, strict=True)]
    if kernel.packing == VARLEN:
        found = _packed(kernel, parts, words, None)
    else:
        size = kernel.page_sizes[q.shape[2] % len(kernel.page_sizes)]
        pages = cut_pages(parts, size, seed=k.shape[2] + q.shape[2], poison=kernel.poison)
        found = _on_pages(kernel, parts, pages, words)
    out = torch.stack([one for one, _ in found])
    out = out.transpose(1, 2) if kernel.layout == "bshd" else out
    return (out, torch.stack([lse for _, lse in found if lse is not None])) if kernel.lse else out


def call_packed(kernel: Kernel, problem: Problem, parts: Sequence[Part], guard: int) -> list[tuple[Tensor, Tensor | None]]:
    """One call with all sequences, packed among guards; the results of each.

    Raises:
        Refused, Broken: as :func:`results`; also where a byte around the inputs is changed.
    """
    return _run(kernel, lambda: _packed(kernel, parts, _words(kernel, problem), guard))


def call_paged(kernel: Kernel, problem: Problem, parts: Sequence[Part], pages: Pages) -> list[tuple[Tensor, Tensor | None]]:
    """One call with keys and values in pages; the results of each entry."""
    return _run(kernel, lambda: _on_pages(kernel, parts, pages, _words(kernel, problem)))


def _words(kernel: Kernel, problem: Problem) -> dict[str, Any]:
    words: dict[str, Any] = {"q_offset": problem.q_offset} if kernel.offset is True else {}
    return words | ({"scale": problem.factor} if kernel.scale else {})


def _packed(
    kernel: Kernel, parts: Sequence[Part], words: dict[str, Any], guard: int | None
) -> list[tuple[Tensor, Tensor | None]]:
    joined = [torch.cat([getattr(part, name).transpose(0, 1) for part in parts]) for name in "qkv"]
    placed = [] if guard is None else [place(x, guard=guard, device=str(x.device)) for x in joined]
    q, k, v = (one.tensor for one in placed) if placed else joined
    given = kernel.fn(q, k, v, **packed_arguments(kernel.takes, parts), **words)
    if not all(one.guards_hold and one.unchanged for one in placed):
        raise Misshapen("the call changes its packed inputs, or the bytes around them")
    return unpacked(*_both(kernel, given), parts)


def _on_pages(kernel: Kernel, parts: Sequence[Part], pages: Pages, words: dict[str, Any]) -> list[tuple[Tensor, Tensor | None]]:
    q = torch.stack([part.q for part in parts])
    q = q.transpose(1, 2) if kernel.layout == "bshd" else q
    given = kernel.fn(q, pages.k_cache, pages.v_cache, block_table=pages.table, seq_lens=pages.lengths, **words)
    out, lse = _both(kernel, given)
    wanted = (*q.shape[:3], parts[0].v.shape[2])
    if tuple(getattr(out, "shape", ())) != wanted:
        raise Misshapen(f"out has shape {tuple(getattr(out, 'shape', ()))}, wanted {wanted}")
    out = out.transpose(1, 2) if kernel.layout == "bshd" else out
    return [(one, None if lse is None else lse[number]) for number, one in enumerate(out)]


def _both(kernel: Kernel, given: Any) -> tuple[Any, Any]:
    if not kernel.lse:
        return given, None
    if not (isinstance(given, (tuple, list)) and len(given) >= 2):
        raise Misshapen(f"gives {_kind(given)}, wanted (out, lse), as lse=True says")
    out, lse = given[:2]
    return out, lse * math.log(2) if kernel.lse_base == "2" and isinstance(lse, Tensor) else lse


def _checked(kernel: Kernel, problem: Problem, given: Any) -> Results:
    if kernel.lse:
        if not (isinstance(given, (tuple, list)) and len(given) >= 2):
            raise Broken("shape", f"gives {_kind(given)}, wanted (out, lse), as lse=True says")
        given = given[:2]
    parts = dict(zip(("out", "lse"), given if kernel.lse else (given,), strict=False))
    (batch, heads, q_len), head_dim_v = problem.q.shape[:3], problem.v.shape[3]
    for name, x in parts.items():
        if not isinstance(x, Tensor):
            pair = isinstance(x, (tuple, list)) and name == "out"
            hint = "; if it gives (out, lse), declare sd.testing.Kernel(..., lse=True)" if pair and not kernel.lse else ""
            raise Broken("shape", f"{name} is {_kind(x)}, wanted a tensor{hint}")
    if kernel.layout == "bshd" and parts["out"].ndim == 4:
        parts["out"] = parts["out"].transpose(1, 2)
    shapes: dict[str, tuple[int, ...]] = {"out": (batch, heads, q_len, head_dim_v), "lse": (batch, heads, q_len)}
    kept = (problem.q.dtype,) if "out" in kernel.rounds else (problem.q.dtype, torch.float32)
    dtypes: dict[str, tuple[torch.dtype, ...]] = {"out": kept, "lse": (torch.float32, torch.float64)}
    for name, x in parts.items():
        if tuple(x.shape) != shapes[name]:
            raise Broken("shape", f"{name} has shape {tuple(x.shape)}, wanted {shapes[name]}")
        if x.dtype not in dtypes[name]:
            raise Broken("shape", f"{name} has dtype {x.dtype}, wanted {' or '.join(map(str, dtypes[name]))}")
        if x.device.type != problem.q.device.type:
            raise Broken("shape", f"{name} lies on {x.device}, the inputs on {problem.q.device}")
    if "lse" in parts and kernel.lse_base == "2" and not kernel.packing:
        parts["lse"] = parts["lse"] * math.log(2)
    return parts


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"one tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def cotangents(kernel: Kernel, problem: Problem, seed: int) -> Cotangents:
    """What gradients are taken with: of out in the dtype of q, and of the LSE in float32 where there is one."""
    shape = (*problem.q.shape[:3], problem.v.shape[3])
    d_out = tensor(*shape, seed=seed + 11, dtype=problem.q.dtype).to(problem.q.device)
    d_lse = tensor(*shape[:3], seed=seed + 12).to(problem.q.device) if kernel.lse else None
    return d_out, d_lse


@dataclass(frozen=True)
class Backward:
    """A call with gradients: its results, dq, dk, .. by name (None where nothing arrives), and the cotangents that it took."""

    results: Results
    gradients: dict[str, Tensor | None]
    asked: Cotangents


def with_gradients(kernel: Kernel, problem: Problem, asked: Cotangents, names: Sequence[str], *, twice: bool = False) -> Backward:
    """One call and its gradients to ``names``.

    An LSE through which no gradient goes (it does not require one) is not asked for any. ``twice``: backward runs again, and its second
    answer is given.
    """
    leaves = {
        name: (getattr(problem, name) if name in ("q", "k", "v") else problem.tables[name]).detach().requires_grad_()
        for name in names
    }
    with torch.enable_grad():
        parts = _called(kernel, problem, leaves)
    slopes = {"out": asked[0].to(parts["out"].dtype)}
    if "lse" in parts and asked[1] is not None and parts["lse"].requires_grad:
        finite = torch.isfinite(parts["lse"].detach())
        slopes["lse"] = torch.where(finite, asked[1].to(parts["lse"].dtype), 0.0)
    found: Any = [None] * len(leaves)
    if not parts["out"].requires_grad:
        raise Broken("shape", f"out requires no gradient, though {', '.join(names)} do{'es' if len(names) == 1 else ''}")
    try:
        for _ in range(2 if twice else 1):
            found = torch.autograd.grad(
                [parts[name] for name in slopes],
                list(leaves.values()),
                list(slopes.values()),
                allow_unused=True,
                retain_graph=twice,
            )
    except kernel.refuses as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    except Exception as error:
        raise Broken("raised", f"its backward pass raises {type(error).__name__}: {str(error)[:300]}") from error
    for name, leaf, x in zip(leaves, leaves.values(), found, strict=True):
        if x is not None and x.shape != leaf.shape:
            raise Broken("shape", f"d{name} has shape {tuple(x.shape)}, wanted {tuple(leaf.shape)}")
    detached = {name: x.detach() for name, x in parts.items()}
    named = {f"d{name}": x for name, x in zip(leaves, found, strict=True)}
    return Backward(detached, named, (asked[0], asked[1] if "lse" in slopes else None))


def reads_lengths(kernel: Kernel) -> bool:
    """Whether what it implements depends on how many queries or keys a call has."""
    return reads(kernel, Q_LEN, KV_LEN)


def reads(kernel: Kernel, *symbols: Any) -> bool:
    """Whether what a kernel implements depends on any of these indices or lengths."""
    return any(symbol in expr.free_symbols for expr in kernel.implements.exprs for symbol in symbols)
