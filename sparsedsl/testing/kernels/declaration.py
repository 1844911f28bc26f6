"""What a kernel claims: what it implements, what it gives, and what it may be called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from sparsedsl.errors import ArgumentError, PatternError, UnsupportedError
from sparsedsl.execute.layouts import LAYOUTS
from sparsedsl.lang.advice import meant, shown
from sparsedsl.lang.pattern import Pattern, as_pattern
from sparsedsl.program.graph import Program, as_program
from sparsedsl.testing.kernels.kernel_case import DTYPES
from sparsedsl.testing.kernels.packing import PAGED, VARLEN, packing_of

__all__ = ["REFUSALS", "Kernel"]

REFUSALS: tuple[type[BaseException], ...] = (NotImplementedError, ValueError, AssertionError)
_ROUNDS = ("p", "out", "q", "s", "tf32")
_WORDS = {
    "grad": ("none", "qkv", "all"),
    "layout": LAYOUTS,
    "empty": ("zero", "nan", "refuse"),
    "lse_base": ("e", "2"),
}


@dataclass(frozen=True, eq=False, repr=False)
class Kernel:
    """A function on q, k and v, and what it claims. Declared limits restrict what it is tested with; inside them nothing is excused.

    Args:
        fn: ``fn(q, k, v, **tables)`` gives ``out``, or ``(out, lse)``; q is ``(B, H, M, D)``, k ``(B, Hk, N, D)``, v ``(B, Hk, N, Dv)``,
            out ``(B, H, M, Dv)`` in the dtype of q, lse ``(B, H, M)`` in float32 or float64. ``q_offset=`` and ``scale=`` are given where
            its signature names them. Tables of the pattern that are bound are given where the signature names them; others always.
        implements: a mask, a pattern or a program.
        lse: whether it gives the LSE, the log of the sum of exp of the scores (sink included), minus infinity for rows without keys.
        grad: ``"qkv"``: gradients reach q, k and v; ``"all"``: learned tables (and inputs of a program) too; ``"none"``.
        group: query heads a key head: ``"any"``, a number or several.
        offset: None: whether the signature names ``q_offset``. Without it rows stand at 0, 1, ...; ``"last"``: they are the last of the
            positions of the keys.
        scale: None: whether the signature names ``scale``.
        dtypes: of q, k and v; None: float32 and bfloat16.
        layout: ``"bshd"``: heads stand behind the rows, in out too.
        head_dims: widths, or pairs (of q and k, of v); None: any.
        lengths: numbers that M and N may be, or pairs (M, N), or ``"square"`` (M = N); None: any.
        tiles: how many queries, keys and, if it tiles them, channels the kernel takes at once: so the edges are tried.
        poison: whether a row bears NaN and infinity in keys and values that it does not see.
        empty: what a row without keys gives: 0 and an LSE of minus infinity, NaN, or an error.
        deterministic: whether the same call gives the same bits.
        batch_invariant: whether an entry gives the same bits whatever stands beside it.
        rounds: what is rounded to the inputs' dtype on the way: weights ``"p"``, ``"out"``; also ``"q"`` (scaled), ``"s"``; ``"tf32"``.
        lse_base: ``"2"`` if it gives the LSE in base 2.
        devices: where it runs.
        refuses: types of errors by which it refuses what it cannot do.
        page_size: rows of a page, a number or several, of a kernel on pages; None: 4 and 16.
        name: for reports; None: that of ``fn``.

    A kernel that names ``cu_seqlens`` is given packed sequences, one that names ``block_table`` pages: see
    :mod:`sparsedsl.testing.kernels.packing` for what they are called with.

    Raises:
        ArgumentError, PatternError: a claim that has no meaning, by name.

    >>> import torch, sparsedsl as sd
    >>> def mine(q, k, v):
    ...     return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
    >>> Kernel(mine, implements=sd.kv_idx >= 0, group=1)
    Kernel(mine, implements=Mask(True), group=1)
    """

    fn: Callable[..., Any]
    implements: Any
    lse: bool = False
    grad: str = "none"
    group: Any = "any"
    offset: Any = None
    scale: Any = None
    dtypes: Any = None
    layout: str = "bhsd"
    head_dims: Any = None
    lengths: Any = None
    tiles: Any = None
    poison: bool = False
    empty: str = "zero"
    deterministic: bool = True
    batch_invariant: bool = False
    rounds: Any = ("p", "out")
    lse_base: str = "e"
    devices: Any = ("cpu",)
    refuses: Any = REFUSALS
    page_size: Any = None
    name: str | None = None
    # what was written down, what implements was, and the tables that calls are given
    given: dict[str, Any] = field(init=False)
    given_implements: Any = field(init=False)
    passed: tuple[str, ...] = field(init=False)
    # how it wants its tensors, the arguments it names, and the sizes of pages
    packing: str = field(init=False)
    takes: tuple[str, ...] = field(init=False)
    page_sizes: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        claims = [f for f in fields(self)[2:] if f.init]
        given = {f.name: getattr(self, f.name) for f in claims if _differs(getattr(self, f.name), f.default)}
        self._set(given=given, given_implements=self.implements, passed=(), packing="", takes=(), page_sizes=())
        if not callable(self.fn):
            raise ArgumentError(f"Kernel: fn must be a function fn(q, k, v); got {shown(self.fn)}")
        for word, known in _WORDS.items():
            if getattr(self, word) not in known:
                raise ArgumentError(f"Kernel: {word} must be one of {', '.join(known)}; got {getattr(self, word)!r}")
        for word in ("lse", "poison", "deterministic", "batch_invariant"):
            if not isinstance(getattr(self, word), bool):
                raise ArgumentError(f"Kernel: {word} must be True or False; got {getattr(self, word)!r}")
        if self.name is not None and not isinstance(self.name, str):
            raise ArgumentError(f"Kernel: name must be text; got {self.name!r}")
        program = as_program(self.implements)
        found: Any = program if program is not None and program.static is None else None
        if found is None:
            found = as_pattern(self.implements if program is None else program.static, where="Kernel(implements=...)")
            if not found.has_lse:  # the oracle of patterns weighs by a softmax, that of programs by what the reference does
                found = Program(found)
        self._set(implements=found, name=self.name or getattr(self.fn, "__name__", type(self.fn).__name__))
        self._set(group=_numbers("group", self.group, 1) if self.group != "any" else None)
        self._set(tiles=_tiles(self.tiles), head_dims=_widths(self.head_dims), lengths=_lengths(self.lengths))
        self._set(
            dtypes=_dtypes(self.dtypes),
            rounds=_rounds(self.rounds),
            refuses=_refusals(self.refuses),
            devices=_devices(self.devices),
        )
        self._check_signature()

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _check_signature(self) -> None:
        names, anything = _names(self.fn)
        self._check_packing(names)
        for word, values in (("offset", (True, False, "last")), ("scale", (True, False))):
            value, argument = getattr(self, word), "q_offset" if word == "offset" else word
            if value is None:
                self._set(**{word: argument in names})
            elif value not in values or (isinstance(value, int) and not isinstance(value, bool)):
                raise ArgumentError(f"Kernel: {word} must be None or one of {', '.join(map(repr, values))}; got {value!r}")
            elif value is True and argument not in names and not anything:
                raise ArgumentError(f"Kernel: {word}=True, but {self.name}({', '.join(names)}) has no argument {argument}")
        known = self.needed
        lacking = [name for name in known if name not in names and not anything]
        if lacking:
            raise PatternError(
                f"Kernel: {self.name}({', '.join(names)}) has no argument {lacking[0]!r}, which the pattern reads"
                f"{meant(lacking[0], names)}. Add it, or bind its values: pattern.bind({lacking[0]}=...)"
            )
        taken = [name for name in self.tables if name not in known and name in names]
        self._set(passed=(*known, *taken))

    def _check_packing(self, names: list[str]) -> None:
        packing = packing_of(names)
        if self.page_size is not None and packing != PAGED:
            raise ArgumentError(
                f"Kernel: page_size={self.page_size!r} is for kernels on pages, and {self.name} takes no block_table"
            )
        self._set(packing=packing, takes=tuple(names))
        if packing == PAGED:
            if self.grad != "none":
                raise ArgumentError(
                    f"Kernel: grad={self.grad!r}: no gradients reach pages; leave it out, or test a function on k and v"
                )
            if "seq_lens" not in names:
                raise ArgumentError(
                    f"Kernel: {self.name} takes block_table, and no seq_lens, which says how many keys an entry has"
                )
            self._set(page_sizes=(4, 16) if self.page_size is None else _numbers("page_size", self.page_size, 1))
        if packing == VARLEN:
            if self.layout != "bhsd":
                raise ArgumentError(
                    f"Kernel: layout={self.layout!r}: packed tensors are (rows, heads, width) in any case; leave it out"
                )
            if "cu_seqlens" in names and self.lengths is None:
                self._set(lengths="square")

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables that the pattern reads, and a program's inputs."""
        return (*self.implements.tables, *getattr(self.implements, "inputs", ()))

    @property
    def needed(self) -> tuple[str, ...]:
        """Those that are not bound, so that every call brings them."""
        return tuple(name for name in self.tables if name not in self.implements.bound)

    @property
    def is_program(self) -> bool:
        """Whether it implements a program, which chooses by what it sees."""
        return isinstance(self.implements, Program)

    @property
    def pattern(self) -> Pattern:
        """The pattern that it implements."""
        if self.is_program:
            raise UnsupportedError(f"{self.name} implements a program; wanted a kernel of a mask or a pattern")
        return self.implements

    def __repr__(self) -> str:
        words = "".join(f", {name}={value!r}" for name, value in self.given.items() if name != "name")
        return f"Kernel({self.name}, implements={self.given_implements!r}{words})"


def _differs(value: Any, default: Any) -> bool:
    return value is not default and not (type(value) is type(default) and value == default)


def _names(fn: Callable[..., Any]) -> tuple[list[str], bool]:
    """Arguments of a function by name, and whether it takes any other."""
    try:
        found = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):
        return ["q", "k", "v"], False
    names = [p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return names, any(p.kind == p.VAR_KEYWORD for p in found)


def _numbers(word: str, value: Any, least: int) -> tuple[int, ...]:
    several = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    if not several or any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in several):
        raise ArgumentError(f"Kernel: {word} must be whole numbers of at least {least}; got {value!r}")
    return tuple(sorted(set(several)))


def _pairs(word: str, value: Any) -> tuple[tuple[int, int], ...] | None:
    """Pairs of numbers, or None if they are no pairs."""
    several = tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, range)) else ()
    if not several or not all(isinstance(x, (tuple, list)) for x in several):
        return None
    if any(len(x) != 2 for x in several):
        raise ArgumentError(f"Kernel: {word} must be numbers or pairs of them; got {value!r}")
    for pair in several:
        _numbers(word, pair, 1)
    return tuple(sorted((int(a), int(b)) for a, b in several))


def _widths(value: Any) -> tuple[Any, ...] | None:
    return None if value is None else _pairs("head_dims", value) or _numbers("head_dims", value, 1)


def _lengths(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value == "square"):
        return value
    if isinstance(value, str):
        raise ArgumentError(f"Kernel: lengths must be 'square', numbers or pairs (q_len, kv_len); got {value!r}")
    return _pairs("lengths", value) or _numbers("lengths", value, 1)


def _tiles(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    several = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(several) not in (2, 3):
        raise ArgumentError(f"Kernel: tiles must be (queries, keys) or (queries, keys, channels); got {value!r}")
    _numbers("tiles", several, 1)
    return several


def _dtypes(value: Any) -> tuple[str, ...]:
    several = ("float32", "bfloat16") if value is None else tuple(value) if isinstance(value, (tuple, list)) else (value,)
    names = tuple(str(x).removeprefix("torch.") if isinstance(x, (str, torch.dtype)) else x for x in several)
    for name in names:
        if name not in DTYPES:
            raise ArgumentError(f"Kernel: dtypes must be of {', '.join(DTYPES)}; got {name!r}")
    if not names:
        raise ArgumentError("Kernel: dtypes must name at least one dtype; got ()")
    return names


def _rounds(value: Any) -> tuple[str, ...]:
    several = (value,) if isinstance(value, str) else tuple(value)
    for word in several:
        if word not in _ROUNDS:
            raise ArgumentError(f"Kernel: rounds must be of {', '.join(_ROUNDS)}; got {word!r}")
    return several


def _refusals(value: Any) -> tuple[type[BaseException], ...]:
    several = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    for kind in several:
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise ArgumentError(f"Kernel: refuses must be types of exceptions; got {kind!r}")
    return several


def _devices(value: Any) -> tuple[str, ...]:
    several = (value,) if isinstance(value, str) else tuple(value)
    for name in several:
        try:
            torch.device(name)
        except (RuntimeError, TypeError):
            raise ArgumentError(f"Kernel: devices must be names of devices, as 'cpu' or 'cuda'; got {name!r}") from None
    if not several:
        raise ArgumentError("Kernel: devices must name at least one device; got ()")
    return several
