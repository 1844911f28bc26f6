"""The bounded store of tiles: made once, never more bytes than the limit, the one not asked for longest goes first."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedsl.tiling.tiles_kept import Tiles


def test_a_tile_is_made_once_while_it_is_kept():
    kept, made = Tiles(limit=1000), []

    def make():
        made.append(torch.zeros(10))
        return made[-1]

    assert kept.get("a", make) is kept.get("a", make) and len(made) == 1
    assert kept.get("b", make) is not kept.get("a", make) and len(made) == 2


def test_the_one_not_asked_for_longest_goes_first():
    kept = Tiles(limit=4 * 40)
    for name in "abcd":
        kept.get(name, lambda: torch.zeros(10))
    first = kept.get("a", lambda: torch.ones(10))
    kept.get("e", lambda: torch.zeros(10))  # "b" goes
    assert kept.get("a", lambda: torch.ones(10)) is first
    assert kept.get("b", lambda: torch.ones(10)).sum() == 10


def test_a_tile_of_more_than_a_quarter_is_not_kept_beside_others():
    kept = Tiles(limit=400)
    kept.get("small", lambda: torch.zeros(5))
    kept.get("large", lambda: torch.zeros(50))
    assert len(kept) == 1 and kept.get("large", lambda: torch.ones(50)).sum() == 50


@given(limit=st.integers(1, 4000), asked=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 300)), max_size=40))
@settings(max_examples=100)
def test_never_more_than_the_limit_or_one(limit, asked):
    kept = Tiles(limit)
    for name, size in asked:
        got = kept.get((name, size), lambda name=name, size=size: torch.full((size,), float(name)))
        assert got.shape == (size,) and bool((got == name).all())
        held = list(kept._tiles.values())
        assert sum(t.nbytes for t in held) == kept._bytes
        assert kept._bytes <= limit or len(held) == 1
