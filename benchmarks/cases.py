"""The patterns that are measured: as sparsedsl has them, and as one writes them by hand for FlexAttention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import sparsedsl as sd
from sparsedsl import patterns

__all__ = ["BLOCK", "CASES", "Case", "block_table", "document_ids"]

WINDOW, BLOCK = 1024, 128
Tables = Mapping[str, torch.Tensor]
MaskMod = Callable[..., torch.Tensor]


def document_ids(length: int) -> torch.Tensor:
    """Document number of each token, int32: documents of 500 to 1,500 tokens, evenly distributed, the same for every run."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(500, 1501, (length // 500 + 1,), generator=generator)
    return torch.repeat_interleave(torch.arange(sizes.numel(), dtype=torch.int32), sizes)[:length].clone()


def block_table(length: int, share: float) -> torch.Tensor:
    """Which pairs of 128-blocks attend, bool: the diagonal and, at random but the same every run, ``share`` of those below it."""
    blocks = -(-length // BLOCK)
    generator = torch.Generator().manual_seed(0)
    below = torch.ones(blocks, blocks, dtype=torch.bool).tril(-1)
    places = below.nonzero()
    chosen = places[torch.randperm(len(places), generator=generator)[: round(share * len(places))]]
    table = torch.eye(blocks, dtype=torch.bool)
    table[chosen[:, 0], chosen[:, 1]] = True
    return table


def _no_tables(length: int) -> Tables:
    return {}


def _doc(length: int) -> Tables:
    return {"doc": document_ids(length)}


def _selected(share: float, length: int) -> Tables:
    return {"chosen": block_table(length, share)}


def _head_windows(length: int) -> Tables:
    return {"window": torch.tensor([128, 512, 1024, 2048], dtype=torch.int32)}


@dataclass(frozen=True)
class Case:
    """One pattern.

    ``declare`` makes the sparsedsl pattern, ``tables`` what it needs at a length; ``mask_mod`` (given tables) and ``score_mod``
    are the functions a careful user of FlexAttention writes. ``heads`` is the size of the head dimension of the lists.
    ``scattered``: its tiles lie apart, so that less of the machine's speed is asked for.
    """

    title: str
    declare: Callable[[], Any]
    mask_mod: Callable[[Tables], MaskMod]
    tables: Callable[[int], Tables] = _no_tables
    score_mod: Callable[..., torch.Tensor] | None = None
    heads: int = 1
    scattered: bool = False


# ---- by hand -----------------------------------------------------------------------------------------------


def _causal(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
    return q_idx >= kv_idx


def _windowed(window: int) -> MaskMod:
    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < window)

    return mask_mod


_window = _windowed(WINDOW)


def _window_sinks(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
    return (q_idx >= kv_idx) & ((q_idx - kv_idx < WINDOW) | (kv_idx < 4))


def _dilated(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
    return (q_idx >= kv_idx) & (q_idx - kv_idx < WINDOW) & ((q_idx - kv_idx) % 8 == 0)


def _chunked(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
    return (q_idx >= kv_idx) & (q_idx // WINDOW == kv_idx // WINDOW)


def _prefix(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
    return (kv_idx < WINDOW) | (q_idx >= kv_idx)


def _block_sparse(tables: Tables) -> MaskMod:
    chosen = tables["chosen"]

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
        return (q_idx >= kv_idx) & chosen[q_idx // BLOCK, kv_idx // BLOCK]

    return mask_mod


def _documents(tables: Tables) -> MaskMod:
    doc = tables["doc"]

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
        return doc[q_idx] == doc[kv_idx]

    return mask_mod


def _causal_documents(tables: Tables) -> MaskMod:
    doc = tables["doc"]

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
        return (q_idx >= kv_idx) & (doc[q_idx] == doc[kv_idx])

    return mask_mod


def _documents_window(tables: Tables) -> MaskMod:
    doc = tables["doc"]

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < WINDOW) & (doc[q_idx] == doc[kv_idx])

    return mask_mod


def _per_head(tables: Tables) -> MaskMod:
    window = tables["window"]

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
        return (q_idx >= kv_idx) & (q_idx - kv_idx < window[h])

    return mask_mod


def _softcap(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
    return torch.tanh(score / 50) * 50


def _alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
    return score + torch.exp2(-((h + 1) * 8.0 / 4)) * (kv_idx - q_idx)


# ---- all of them -------------------------------------------------------------------------------------------


def _block_sparse_case(percent: int) -> Case:
    return Case(
        f"block-sparse {percent} %, causal",
        lambda: patterns.causal() & patterns.blocks("chosen", BLOCK),
        _block_sparse,
        functools.partial(_selected, percent / 100),
        scattered=True,
    )


CASES = {
    "causal": Case("causal", patterns.causal, lambda t: _causal),
    "window": Case("window 1024", lambda: patterns.sliding_window(WINDOW), lambda t: _window),
    "window256": Case("window 256", lambda: patterns.sliding_window(256), lambda t: _windowed(256)),
    "window512": Case("window 512", lambda: patterns.sliding_window(512), lambda t: _windowed(512)),
    "window4096": Case("window 4096", lambda: patterns.sliding_window(4096), lambda t: _windowed(4096)),
    "sinks": Case(
        "window 1024 + 4 sinks",
        lambda: patterns.causal() & (patterns.sliding_window(WINDOW) | patterns.sinks(4)),
        lambda t: _window_sinks,
    ),
    "dilated": Case("dilated: every 8th of 1024", lambda: patterns.dilated(WINDOW // 8, step=8), lambda t: _dilated),
    "documents": Case("documents", patterns.documents, _documents, _doc),
    "causal_documents": Case("documents, causal", patterns.packed, _causal_documents, _doc),
    "documents_window": Case("documents, window 1024", lambda: patterns.packed(WINDOW), _documents_window, _doc),
    "chunked": Case("chunked 1024", lambda: patterns.chunked(WINDOW), lambda t: _chunked),
    "prefix": Case("prefix 1024, causal", lambda: patterns.prefix(WINDOW), lambda t: _prefix),
    "per_head": Case(
        "4 windows by head: 128 to 2048",
        lambda: patterns.sliding_window(sd.table("window")[sd.h]),
        _per_head,
        _head_windows,
        heads=4,
    ),
    "softcap": Case(
        "window 1024, soft cap 50",
        lambda: sd.attend(patterns.sliding_window(WINDOW), score=patterns.softcap(50)),
        lambda t: _window,
        score_mod=_softcap,
    ),
    "alibi": Case(
        "window 1024, ALiBi",
        lambda: sd.attend(patterns.sliding_window(WINDOW), score=patterns.alibi(4)),
        lambda t: _window,
        score_mod=_alibi,
    ),
    "blocks5": _block_sparse_case(5),
    "blocks10": _block_sparse_case(10),
    "blocks25": _block_sparse_case(25),
}
