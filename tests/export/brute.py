"""Masks in the plainest form: every pair of a pattern evaluated, and what a refusal says of a pair looked up there."""

from __future__ import annotations

import re
from typing import Any

import torch

import sparsedsl as sd
from sparsedsl.export.spans import Spans, merged
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.pattern import as_pattern

# Any mask at all, and one for each head, batch entry or both.
ANY = sd.table("bits")[sd.q_idx, sd.kv_idx] == 1
ANY_OF_HEADS = sd.table("bits")[sd.h, sd.q_idx, sd.kv_idx] == 1
ANY_OF_ALL = sd.table("bits")[sd.b, sd.h, sd.q_idx, sd.kv_idx] == 1


def dense(
    pattern: Any, q_len: int, kv_len: int, q_offset: int = 0, *, batch: int = 1, heads: int = 1, b: int = 0, **tables: Any
) -> Any:
    """Every pair, bool ``(batch, heads, q_len, kv_len)``; batch entries count from ``b``."""
    given = as_pattern(pattern)
    env = {
        "b": torch.arange(b, b + batch)[:, None, None, None], "h": torch.arange(heads)[:, None, None],
        "q_idx": torch.arange(q_len)[:, None] + q_offset, "kv_idx": torch.arange(kv_len), "q_len": q_len + q_offset, "kv_len": kv_len,
    }  # fmt: skip
    values = torch.as_tensor(evaluate(given.mask.expr, env | given.bound | tables))
    return values.broadcast_to(batch, heads, q_len, kv_len)


def random_mask(*shape: int, share: float = 0.5, seed: int = 0) -> torch.Tensor:
    """Int64 zeros and ones."""
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share).long()


def spans(mask: torch.Tensor) -> Spans:
    """The runs of the rows of a dense mask ``(lines, length)``, by a loop."""
    runs = [(n, m, m + 1) for n, row in enumerate(mask.tolist()) for m, one in enumerate(row) if one]
    line, start, stop = torch.tensor(runs, dtype=torch.int64).reshape(-1, 3).unbind(1)
    return merged((1, 1, mask.shape[0]), mask.shape[1], line, start, stop)


def assert_is(exported: Any, wanted: torch.Tensor) -> None:
    """An export decodes to the mask, whose batch and heads may be said once for all."""
    got = exported.to_mask()
    assert got.dtype == torch.bool and got.shape[-2:] == wanted.shape[-2:], (got.shape, wanted.shape)
    wrong = (got.expand_as(wanted) != wanted).nonzero()
    assert not len(wrong), f"{len(wrong)} pairs differ, the first at (b, h, q, kv) = {wrong[0].tolist()}: {exported}"


_SEES = re.compile(r"query (\d+)\b[^;]*? (sees|does not see) (no key|keys? [\d\- and,]+)")
_GAPS = re.compile(r"key (\d+)(?: of key head \d+)? has (\d+) gaps [^(]*\(queries ([\d\-, ]+)")
_ABOVE = re.compile(r"key (\d+) is seen above the diagonal \(query (\d+)\)")


def assert_refusal_is_real(text: str, mask: torch.Tensor, off: int = 0) -> None:
    """What a refusal says of queries and keys holds in the mask ``(q_len, kv_len)``, of which ``off`` keys precede the first query."""
    q_len = mask.shape[0]
    if found := _GAPS.search(text):
        key = int(found[1])
        hidden = [n for part in found[3].strip(", ").split(", ") if part for n in _range(part)]
        first = max(0, key - (mask.shape[1] - q_len)) if "below the diagonal" in text else 0
        assert not mask[hidden, key].any(), text
        column = [bool(value) for value in mask[first:, key]]
        gaps = sum(not one and (n == 0 or column[n - 1]) for n, one in enumerate(column))
        assert gaps == int(found[2]), text
        return
    if found := _ABOVE.search(text):
        assert mask[int(found[2]), int(found[1])] and int(found[1]) > int(found[2]) + off, text
        return
    found = _SEES.search(text)
    assert found, f"names no pair: {text}"
    row = mask[int(found[1])]
    if found[3].startswith("no key"):
        assert not row.any(), text
        return
    keys = [n for part in re.findall(r"\d+(?:-\d+)?", found[3]) for n in _range(part)]
    assert row[keys].all() if found[2] == "sees" else not row[keys].any(), text


def _range(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)
