"""What ``aot_vs_flex.py`` compares: patterns as sparsedsl has them, and as Inductor writes them for FlexAttention; the tables that say
which tiles are visited; 32K tokens, 32 query heads, 8 key heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import CASES as BY_HAND
from cases import Tables
from flex_templates import FlexPattern
from gpu_cases import PATTERNS

import sparsedsl as sd
from sparsedsl import patterns as P

__all__ = ["CASES", "HEADS", "KV_HEADS", "LENGTH", "AotCase"]

LENGTH, HEADS, KV_HEADS = 32768, 32, 8
CAP, RADIUS = 50.0, 64


@dataclass(frozen=True)
class AotCase:
    """``declare`` makes our pattern, ``flex`` is the same for FlexAttention; ``tables`` as bound in a call of ``LENGTH`` tokens."""

    declare: Callable[[], Any]
    flex: FlexPattern
    tables: Callable[[], Tables] = dict


def _head_windows() -> Tables:
    return {"window": torch.tensor([128, 512, 1024, 2048] * (HEADS // 4), dtype=torch.int32)}


def _blocks() -> Tables:
    return PATTERNS["blocks10"].tables(LENGTH)


_CAUSAL = "{m} >= {n}"
_TANH = "libdevice.tanh({s} / 50.0)"
CASES = {
    "causal": AotCase(P.causal, FlexPattern(_CAUSAL)),
    "window": AotCase(lambda: P.sliding_window(1024), FlexPattern(f"({_CAUSAL}) & ({{m}} - {{n}} < 1024)")),
    "sinks": AotCase(
        lambda: P.causal() & (P.sliding_window(1024) | P.sinks(4)),
        FlexPattern(f"({_CAUSAL}) & (({{m}} - {{n}} < 1024) | ({{n}} < 4))"),
    ),
    "documents": AotCase(
        P.packed,
        FlexPattern(f"({_CAUSAL}) & (tl.load(doc + {{m}}) == tl.load(doc + {{n}}))", tables={"doc": "*i32"}),
        lambda: BY_HAND["causal_documents"].tables(LENGTH),
    ),
    "blocks": AotCase(
        lambda: P.blocks("chosen", 128),
        FlexPattern("tl.load(chosen + {m} // 128 * 256 + {n} // 128) != 0", tables={"chosen": "*i1"}),
        _blocks,
    ),
    "softcap": AotCase(
        lambda: sd.attend(P.causal(), score=P.softcap(CAP)),
        FlexPattern(_CAUSAL, score=f"{_TANH} * 50.0", grad=f"{{g}} * (1.0 - {_TANH} * {_TANH})"),
    ),
    "alibi": AotCase(
        lambda: sd.attend(P.causal(), score=P.alibi(HEADS)),
        FlexPattern(_CAUSAL, score="{s} + tl.load(slopes + {h}) * ({n} - {m}).to(tl.float32)", tables={"slopes": "*fp32"}),
    ),
    "bias": AotCase(
        lambda: sd.attend(P.causal(), score=P.relative_bias(RADIUS)),
        FlexPattern(
            _CAUSAL,
            score="{s} + tl.load(bias + (tl.minimum(tl.maximum({m} - {n}, -64), 64) + 64) * 32 + {h})",
            scatter="tl.atomic_add(bias_grad + (tl.minimum(tl.maximum({m} - {n}, -64), 64) + 64) * 32 + {h}, {g}, {kept})",
            tables={"bias": "*fp32", "bias_grad": "*fp32"},
        ),
    ),
    "dilated": AotCase(
        lambda: P.dilated(128, step=8),
        FlexPattern(f"({_CAUSAL}) & ({{m}} - {{n}} < 1024) & (({{m}} - {{n}}) % 8 == 0)"),
    ),
    "head_windows": AotCase(
        lambda: P.sliding_window(sd.table("window")[sd.h]),
        FlexPattern(f"({_CAUSAL}) & ({{m}} - {{n}} < tl.load(window + {{h}}))", tables={"window": "*i32"}),
        _head_windows,
    ),
}
