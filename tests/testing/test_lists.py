"""Tile lists of random patterns against brute force; and the brute force notices wrong lists."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsedsl as sd
from sparsedsl import testing as kit
from sparsedsl.analysis.lists import BlockLists, TileRows
from sparsedsl.testing import list_checks as module

CAUSAL = sd.kv_idx <= sd.q_idx
blocks = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16, 32])


@given(data=st.data())
@settings(max_examples=250)
def test_lists_of_random_patterns(data: st.DataObject) -> None:
    pattern = data.draw(kit.patterns(scores=False))
    case = data.draw(kit.shapes(max_len=40))
    tables = data.draw(kit.tables_for(pattern, case))
    block = (data.draw(blocks), data.draw(blocks))
    words = {"batch": case.batch, "heads": case.heads, "q_offset": case.q_offset, **tables}
    kit.assert_lists_sound(pattern, case.q_len, case.kv_len, block, **words)


def test_tile_classes_by_hand() -> None:
    allowed = kit.allowed_pairs(CAUSAL, kit.AttentionCase(q_len=5, kv_len=5))
    assert module.tile_classes(allowed, (2, 2)).tolist() == [[[[1, 0, 0], [2, 1, 0], [2, 2, 2]]]]


def rows(*columns: list[int]) -> TileRows:
    counts = torch.tensor([[[len(c) for c in columns]]], dtype=torch.int32)
    return TileRows(counts, torch.tensor([x for c in columns for x in c], dtype=torch.int32))


WRONG: dict[str, tuple[Callable[[BlockLists], dict[str, Any]], str]] = {
    "left out": (
        lambda _: {"partial": rows([0], [], [])},
        r"row 1, column 1\) of batch 0, head 0 is partial but listed as empty",
    ),
    "too full": (lambda _: {"full": rows([], [0, 1], [0, 1, 2]), "partial": rows([0], [], [])}, "is partial but listed as full"),
    "empty one": (lambda _: {"partial": rows([0, 2], [1], [])}, "is empty but listed as partial"),
    "not full": (lambda _: {"full": rows([], [], [0, 1, 2]), "partial": rows([0], [0, 1], [])}, "is full but listed as partial"),
    "unordered": (lambda _: {"full": rows([], [0], [1, 0, 2])}, "not in rising order"),
    "repeated": (lambda _: {"full": rows([], [0], [0, 0, 1])}, "not in rising order"),
    "twice": (lambda _: {"partial": rows([0], [0, 1], [])}, "both as full and as partial"),
    "outside": (lambda _: {"full": rows([], [0], [0, 1, 3])}, "outside the 3 tile columns"),
    "miscounted": (lambda x: {"full": TileRows(x.full.counts + 1, x.full.columns)}, "add up to 7 but 4 are listed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_lists_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = WRONG[name]
    classify = module.classify
    right = {"full": rows([], [0], [0, 1, 2]), "partial": rows([0], [1], [])}

    def wrong(*arguments: Any) -> BlockLists:
        found = classify(*arguments)
        return dataclasses.replace(found, **{**right, **change(found)})

    monkeypatch.setattr(module, "classify", wrong)
    with pytest.raises(kit.Counterexample, match=message) as failure:
        kit.assert_lists_sound(CAUSAL, 5, 5, 2)
    assert "sd.testing.assert_lists_sound(pattern, 5, 5, 2, batch=1, heads=1, q_offset=0)" in failure.value.snippet


@pytest.mark.parametrize(
    ("name", "value"),
    [("density", 0.5), ("flops", 1), ("flops_backward", 1), ("flops_dense", 1), ("partial_share", 0.1), ("imbalance", 9.0)]
    + [("empty_rows", 3), ("empty_row", (0, 0, 1)), ("causal", sd.REFUTED)],
)
def test_wrong_numbers_are_noticed(name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.assert_lists_sound(CAUSAL, 5, 5, 2)
    analyse = module.analyse
    monkeypatch.setattr(module, "analyse", lambda *a, **w: dataclasses.replace(analyse(*a, **w), **{name: value}))
    with pytest.raises(kit.Counterexample, match=rf"analyse\(\.\.\.\)\.{name} is "):
        kit.assert_lists_sound(CAUSAL, 5, 5, 2)
