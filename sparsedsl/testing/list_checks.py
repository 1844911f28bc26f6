"""Tile lists and counts against brute force: every pair of a small problem, looked at one by one."""

from __future__ import annotations

from typing import Any

import torch

from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.exactness import exact_domain
from sparsedsl.analysis.lists import BlockLists
from sparsedsl.analysis.proofs import PROVED
from sparsedsl.analysis.report import analyse
from sparsedsl.analysis.tiles import classify
from sparsedsl.lang.exact import evaluate_any
from sparsedsl.lang.pattern import Pattern, as_pattern
from sparsedsl.testing.call_shapes import AttentionCase
from sparsedsl.testing.counterexamples import Counterexample, arguments_code, pattern_code

__all__ = ["allowed_pairs", "assert_lists_sound"]

_NAMES = ("empty", "partial", "full")


def allowed_pairs(pattern: Any, case: AttentionCase, **tables: Any) -> torch.Tensor:
    """The mask on every index of ``case``: bool ``(batch, heads, q_len, kv_len)``. For small problems.

    >>> import sparsedsl as sd
    >>> allowed_pairs(sd.kv_idx <= sd.q_idx, AttentionCase(q_len=2, kv_len=3)).int().tolist()
    [[[[1, 0, 0], [1, 1, 0]]]]
    """
    mask = as_pattern(pattern).mask
    return evaluate_any(mask.expr, {**case.env, **mask.bound, **tables}).expand(case.positions.shape)


def assert_lists_sound(
    pattern: Any,
    q_len: int,
    kv_len: int,
    block_size: int | tuple[int, int] = 16,
    *,
    batch: int = 1,
    heads: int = 1,
    q_offset: int = 0,
    **tables: Any,
) -> None:
    """The tile lists of ``pattern`` are sound and minimal, and the numbers that :func:`sparsedsl.analyse` gives are right.

    Sound: every allowed pair lies in a listed tile, and a tile listed as full has no masked pair. Minimal: no tile without
    an allowed pair is listed, and every tile that is full is listed as full. Lists are in order, without repetition, and
    counted right.
    All pairs are looked at: keep ``batch * heads * q_len * kv_len`` below some millions.

    >>> import sparsedsl as sd
    >>> assert_lists_sound((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 7), 50, 50, block_size=(8, 16))
    """
    pattern = as_pattern(pattern)
    block = block_size if isinstance(block_size, tuple) else (block_size, block_size)
    case = AttentionCase(batch=batch, heads=heads, kv_heads=heads, q_len=q_len, kv_len=kv_len, q_offset=q_offset)
    allowed = allowed_pairs(pattern, case, **tables)
    bound = {name: t for name, t in {**pattern.bound, **tables}.items() if name in pattern.mask.tables}
    domain = exact_domain((pattern.mask.expr,), Domain(q_len, kv_len, q_offset, batch, heads, bound))
    lists = classify(pattern.mask.expr, domain, block)
    wrong = _wrong_lists(lists, allowed, block) or _wrong_numbers(pattern, case, block, allowed, tables)
    if wrong:
        raise Counterexample(
            wrong,
            f"pattern = {pattern_code(pattern)}",
            "sd.testing.assert_lists_sound("
            + arguments_code("pattern", q_len, kv_len, block_size, batch=batch, heads=heads, q_offset=q_offset, **tables)
            + ")",
        )


def tile_classes(allowed: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Classes ``(batch, heads, rows, columns)`` of the tiles of a dense mask, ragged ones too: 0 empty, 1 partial, 2 full."""
    rows = []
    for band in allowed.split(block[0], dim=2):
        tiles = band.split(block[1], dim=3)
        rows.append(torch.stack([t.any(3).any(2).int() + t.all(3).all(2).int() for t in tiles], dim=-1))
    return torch.stack(rows, dim=2)


def _wrong_lists(lists: BlockLists, allowed: torch.Tensor, block: tuple[int, int]) -> str | None:
    """What is wrong with the lists, in words, or None."""
    for kind, part in (("full", lists.full), ("partial", lists.partial)):
        if int(part.counts.sum()) != part.columns.numel():
            return f"the counts of {kind} tiles add up to {int(part.counts.sum())} but {part.columns.numel()} are listed"
        if part.columns.numel() and not 0 <= int(part.columns.min()) <= int(part.columns.max()) < lists.shape[3]:
            return f"{kind} tiles outside the {lists.shape[3]} tile columns are listed: {part.columns.tolist()}"
        keys = part.owners() * lists.shape[3] + part.columns
        if bool((keys.diff() <= 0).any()):
            lists_of = f"counts {part.counts.tolist()}, columns {part.columns.tolist()}"
            return f"the {kind} tiles of a row are not in rising order: {lists_of}"
    wanted = tile_classes(allowed, block)
    got = lists.classes()
    if lists.full.total + lists.partial.total != int((got > 0).sum()):
        return "a tile is listed both as full and as partial"
    differ = (got.expand(wanted.shape) != wanted).nonzero()
    if not differ.numel():
        return None
    b, h, row, column = differ[0].tolist()
    return (
        f"tile (row {row}, column {column}) of batch {b}, head {h} is {_NAMES[int(wanted[b, h, row, column])]} but listed as "
        f"{_NAMES[int(got.expand(wanted.shape)[b, h, row, column])]} (empty means not listed); {len(differ)} tiles are wrong"
    )


def _wrong_numbers(
    pattern: Pattern, case: AttentionCase, block: tuple[int, int], allowed: torch.Tensor, tables: dict[str, Any]
) -> str | None:
    """What is wrong with the numbers of the analysis, in words, or None."""
    words: dict[str, Any] = {"q_offset": case.q_offset, "batch": case.batch, "heads": case.heads}
    found = analyse(pattern, case.q_len, case.kv_len, block, head_dim=3, head_dim_v=5, **words, **tables)
    classes = tile_classes(allowed, block)
    listed, per_row = classes > 0, (classes > 0).sum(dim=3).double()
    heights, widths = (
        torch.tensor([len(x) for x in torch.arange(n).split(b)]) for n, b in zip(allowed.shape[2:], block, strict=True)
    )
    pairs = int((listed * torch.outer(heights, widths)).sum())
    wanted = {
        "flops": 2 * (3 + 5) * pairs,
        "flops_backward": 2 * (3 * 3 + 2 * 5) * pairs,
        "flops_dense": 2 * (3 + 5) * allowed.numel(),
        "partial_share": float((classes == 1).sum()) / max(1, int(listed.sum())),
        "imbalance": float(per_row.max() / per_row.mean()) if pairs else 1.0,
    }
    if found.density_exact:
        wanted |= {"density": float(allowed.double().mean()), "empty_rows": int((~allowed.any(dim=3)).sum())}
    for name, value in wanted.items():
        got = getattr(found, name)
        if abs(got - value) > 1e-9 * max(1.0, abs(value)):
            return f"analyse(...).{name} is {got}, counted one by one it is {value}"
    if found.empty_row is not None:
        b, h, q = found.empty_row
        if bool(allowed[b, h, q - case.q_offset].any()):
            return f"analyse(...).empty_row is (b, h, q_idx) = {found.empty_row}, which may attend"
    later = allowed & (case.env["kv_idx"] > case.env["q_idx"])
    if (found.causal == PROVED) != (not bool(later.any())):
        return f"analyse(...).causal is {found.causal}, but {int(later.sum())} allowed pairs lie in the future"
    return None
