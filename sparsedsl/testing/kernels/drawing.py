"""Which cases a kernel is tested with: small ones first, every axis through all of its edges, tiles and windows among them.

Each axis is a deck that is shuffled and dealt to its end before it is shuffled again, so that few cases already hold every value of every
axis, in ever other combinations.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparsedsl.testing.kernels.arena import LAYOUTS
from sparsedsl.testing.kernels.declaration import Kernel
from sparsedsl.testing.kernels.findings import KernelProperty
from sparsedsl.testing.kernels.kernel_case import KernelCase
from sparsedsl.testing.kernels.limits import near
from sparsedsl.testing.kernels.values import VALUES
from sparsedsl.testing.reach_checks import edges_of

__all__ = ["cases"]

_HEADS = ((1, 1), (2, 1), (4, 2), (2, 2), (3, 1), (6, 2), (5, 5), (12, 4), (6, 3), (2, 1))
_WIDTHS = (1, 2, 3, 4, 5, 8, 16, 24)
_WIDE = (32, 40, 64, 72, 96, 128)
_DRAWN_VALUES = tuple(name for name in VALUES if name not in ("zero q", "integers"))
# Where tiles are not declared, these are tried.
_USUAL = (16, 32, 64, 128)
_LONG = 70
# What tiles are taken to be in the one early case that has several of them: 65 rows and 129 keys are one more than whole tiles of all.
_TAKEN = (32, 64)
# Long cases without which some sums and offsets of 12 bits hold.
_FAR: tuple[Mapping[str, Any], ...] = (
    {"kv_len": 600, "head_dim": 4, "offset_at_end": True},
    {"kv_len": 1100, "head_dim": 2, "values": "all equal", "dtype": "bfloat16", "offset_at_end": True},
    {"kv_len": 64, "values": "all equal", "dtype": "bfloat16", "offset_at_end": True},
)


class _Deck:
    """Values dealt in random order, all of them before any comes again."""

    def __init__(self, values: Sequence[Any], drawn: random.Random):
        self.values, self.drawn = list(values), drawn
        self.left: list[Any] = []

    def deal(self) -> Any:
        if not self.left:
            self.left = self.drawn.sample(self.values, len(self.values))
        return self.left.pop()


def cases(kernel: Kernel, of: KernelProperty, count: int, seed: int) -> Iterator[KernelCase]:
    """So many cases for a property of a kernel, none twice; fewer if its limits leave fewer."""
    drawn = random.Random(f"{seed} {of.name}")
    known: set[KernelCase] = set()
    wishes = _wishes(kernel, of, drawn)
    for _ in range(20 * count + 40):
        if len(known) >= count:
            return
        wish = next(wishes)
        case = near(kernel, wish)
        if case is not None and case not in known:
            known.add(case)
            yield case


def _wishes(kernel: Kernel, of: KernelProperty, drawn: random.Random) -> Iterator[dict[str, Any]]:
    yield from (dict(wish) for wish in of.first)
    early = _early(kernel)
    yield from (dict(wish) | dict(of.wish(kernel, drawn)) for wish in (early if not of.first else early[1:3]))
    if of.name == "NUM":
        yield from (dict(wish) for wish in _FAR)
    axes = _axes(kernel, drawn)
    while True:
        wish = {name: deck.deal() for name, deck in axes.items()}
        wish["heads"], wish["kv_heads"] = wish["heads"]
        wish["head_dim"], wish["head_dim_v"] = wish.pop("widths")
        wish |= _positions(kernel, drawn, wish.pop("where"), wish)
        wish["seed"] = drawn.randrange(1000)
        if wish["kv_len"] * wish["q_len"] > 1500:
            wish["batch"], wish["heads"], wish["kv_heads"] = 1, min(wish["heads"], 2), 1
        asked = dict(of.wish(kernel, drawn))
        if "q_offset" in asked:
            wish.pop("offset_from_end", None)
        yield wish | asked


def _early(kernel: Kernel) -> tuple[Mapping[str, Any], ...]:
    """The cases that come first: as small as can be, then one with rows and keys behind two whole tiles, whose windows begin within one."""
    rows, keys, channels = (*(kernel.tiles or _TAKEN), 2)[:3]
    window = max((n for n in _constants(kernel) if n <= 2 * _LONG), default=0)
    several = {"heads": 2, "q_len": 2 * rows + 1, "head_dim": channels + 1, "head_dim_v": 2}
    several["kv_len"] = keys + max(keys + 1, window + 3)
    return (
        {},
        {"q_len": 2, "kv_len": 2},
        several | {"offset_at_end": True},
        {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 3, "kv_len": 5, "head_dim": 3, "head_dim_v": 2, "values": "heads"},
        {"kv_len": 2, "head_dim": 2},
        {"q_len": 2, "kv_len": 5, "head_dim": 3, "head_dim_v": 2, "offset_at_end": True},
    )


def _constants(kernel: Kernel) -> list[int]:
    """Numbers of the pattern at which it may change: lengths of windows and chunks."""
    return [n for n in edges_of(kernel.implements.exprs, {}) if n <= 260]


def _axes(kernel: Kernel, drawn: random.Random) -> dict[str, _Deck]:
    rows, keys, channels = ((*(kernel.tiles or (0, 0)), 0)[:3]) if kernel.tiles else (0, 0, 0)
    windows = [n + d for n in _constants(kernel) for d in (-1, 0, 1, keys or 16)]
    widths = sorted({*_WIDTHS, *(_near(channels) if channels else ())})
    pairs = [(d, d if drawn.random() < 0.5 else drawn.choice(widths)) for d in (*widths, drawn.choice(_WIDE))]
    values = [*_DRAWN_VALUES, "normal", "normal", "three"]
    layouts = [*LAYOUTS, *["packed"] * (2 * len(LAYOUTS))]
    scales = (None, None, None, 1.0, 0.3) if kernel.scale else (None,)

    def deck(values: Sequence[Any]) -> _Deck:
        return _Deck(values, drawn)

    return {
        "q_len": deck([n for n in (1, 2, 3, *_edges(rows), *_uniform(drawn, 2)) if n > 0]),
        "kv_len": deck([n for n in (1, 2, 3, *_edges(keys), *windows, *_uniform(drawn, 3)) if n > 0]),
        "batch": deck((1, 1, 2, 3)),
        "heads": deck(_HEADS),
        "widths": deck(pairs),
        "where": deck(("end", "end", "end", "start", "end+1", "end-1", "tile", "before", "2N")),
        "dtype": deck(kernel.dtypes),
        "values": deck(values),
        # expanded, padded, .. are a kernel's right to refuse, so that STRIDE alone tries them all
        "memory": deck([name for name in layouts if name in ("packed", "turned")]),
        "scale": deck(scales),
    }


def _edges(tile: int) -> tuple[int, ...]:
    if tile:
        return _near(tile)
    return tuple(n + d for n in _USUAL for d in (-1, 0, 1))


def _near(tile: int) -> tuple[int, ...]:
    return tuple(n for n in (tile - 1, tile, tile + 1, 2 * tile - 1, 2 * tile, 2 * tile + 1) if n > 0)


def _uniform(drawn: random.Random, count: int) -> list[int]:
    return [drawn.randint(1, _LONG) for _ in range(count)]


def _positions(kernel: Kernel, drawn: random.Random, where: str, wish: Mapping[str, Any]) -> dict[str, Any]:
    match where:
        case "end":
            return {"offset_from_end": 0}
        case "end+1":
            return {"offset_from_end": 1}
        case "end-1":
            return {"offset_from_end": -1}
        case "tile":
            return {"q_offset": max((kernel.tiles or (16, 16))[1] - 1, 0)}
        case "before":
            return {"q_offset": -1}
        case "2N":
            return {"q_offset": "2N"}
    return {}
