"""The needle task says what it claims: one marked key for each question, its value behind it, no other hint."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from source_tree import ROOT


@pytest.fixture(scope="module")
def task():
    spec = importlib.util.spec_from_file_location("examples_needle_task", ROOT / "examples" / "parts" / "needle_task.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("length", "count"), [(64, 8), (512, 32), (40, 8), (4096, 1), (640, 128)])
def test_each_question_has_one_needle(task, length, count):
    tokens, answers = task.needles(3, length, count, torch.Generator().manual_seed(1))
    assert tokens.shape == (3, length) and answers.shape == (3, count)
    haystack = length - 2 * count
    for row, values in zip(tokens.tolist(), answers.tolist(), strict=True):
        marked = {row[i + 1]: row[i + 2] for i in range(haystack) if row[i] == task.MARK}
        assert row.count(task.MARK) == len(marked) == count, "needles overlap, or two have one key"
        assert row[haystack::2] == [task.ASK] * count
        assert [marked[key] for key in row[haystack + 1 :: 2]] == values
        assert max(row[i] for i in range(haystack) if row[i] != task.MARK) < task.SYMBOLS


def test_needles_lie_everywhere_and_hay_has_the_same_symbols(task):
    tokens, _ = task.needles(400, 256, 4, torch.Generator().manual_seed(2))
    depth = (tokens == task.MARK).nonzero()[:, 1] / 248
    assert torch.allclose(torch.histc(depth.float(), 4, 0, 1) / len(depth), torch.tensor(0.25), atol=0.05)
    assert tokens[:, :248][tokens[:, :248] != task.MARK].unique().numel() == task.SYMBOLS


def test_the_same_seed_gives_the_same_sequences(task):
    one, other = (task.needles(2, 64, 4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_too_many_needles_are_refused(task):
    with pytest.raises(ValueError, match="13 needles and questions do not fit into 64 tokens"):
        task.needles(1, 64, 13, torch.Generator())
