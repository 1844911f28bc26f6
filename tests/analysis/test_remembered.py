"""Results kept as long as the tables they were made of live unchanged."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsedsl.analysis.remembered import Remembered


class Counter:
    """Makes a new number each time."""

    def __init__(self):
        self.made = 0

    def __call__(self):
        self.made += 1
        return self.made


def test_a_result_is_made_once_for_a_key_and_its_tables():
    known, make, table = Remembered(), Counter(), torch.zeros(3)
    assert [known.get("a", [table], make) for _ in range(3)] == [1, 1, 1]
    assert known.get("b", [table], make) == 2
    assert known.get("a", [], make) == 3
    assert known.get("a", [table, table], make) == 4
    assert known.get("a", [table], make) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_(1),
        lambda t: t.__setitem__(0, 5),
        lambda t: t[1:].zero_(),
        lambda t: torch.add(t, 1, out=t),
        lambda t: t.copy_(t),
    ],
    ids=["in place", "item", "through a view", "out=", "copy"],
)
def test_a_table_that_was_written_to_makes_it_anew(change):
    known, make, table = Remembered(), Counter(), torch.zeros(3)
    known.get("a", [table], make)
    change(table)
    assert known.get("a", [table], make) == 2 and known.get("a", [table], make) == 2


def test_another_table_with_the_same_values_makes_it_anew():
    known, make, table = Remembered(), Counter(), torch.zeros(3)
    assert [known.get("a", [t], make) for t in (table, table.clone(), table)] == [1, 2, 1]


def test_tables_in_another_order_are_other_tables():
    known, make, one, two = Remembered(), Counter(), torch.zeros(1), torch.ones(1)
    assert [known.get("a", tables, make) for tables in ([one, two], [two, one], [one, two])] == [1, 2, 1]


def test_it_keeps_no_table_alive_and_takes_no_new_one_for_it():
    known, make = Remembered(), Counter()
    for _ in range(8):
        table = torch.zeros(1000)
        seen = weakref.ref(table)
        count = known.get("a", [table], make)
        del table
        gc.collect()
        assert seen() is None
    assert count == 8, "a new tensor at the address of an old one is not the old one"


def test_a_failure_is_not_remembered():
    known, make = Remembered(), Counter()
    with pytest.raises(ZeroDivisionError):
        known.get("a", [], lambda: 1 // 0)
    assert known.get("a", [], make) == 1


@given(size=st.integers(1, 5), asked=st.lists(st.integers(0, 7), max_size=30))
@settings(max_examples=100)
def test_it_keeps_those_asked_for_last(size, asked):
    known: Remembered[int] = Remembered(size)
    kept: list[int] = []
    for key in asked:
        made = Counter()
        known.get(key, [], made)
        assert (made.made == 0) == (key in kept)
        kept = [*(k for k in kept if k != key), key][-size:]
    assert len(known._known) == len(kept)
