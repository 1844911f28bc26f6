"""The systems that are measured: declaration, inputs, shapes, where FlexAttention can say the same, and how much attends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import sparsedsl as sd
from sparsedsl import patterns
from sparsedsl.program.branches import Attend, Joint, Mix, Recall
from sparsedsl.program.recurrences import Linear
from sparsedsl.selection.selected_blocks import SelectedBlocks

__all__ = ["SYSTEMS", "Shape", "System", "attended_pairs", "density", "random_qkv", "topics"]

Tensor = torch.Tensor
Inputs = dict[str, Any]
CHUNK, TOP_K, SLOTS = 64, 16, 64
LEAST = 1024  # tokens; below it sizes are a quarter


@dataclass(frozen=True)
class Shape:
    """Heads of queries, heads of keys and values, and their width."""

    heads: int
    kv_heads: int
    dim: int


GEMMA, SMALL, RING = Shape(4, 1, 256), Shape(8, 1, 64), Shape(4, 4, 128)


def _nothing(q: Tensor, k: Tensor, part: int) -> Inputs:
    return {}


def _hsa(q: Tensor, k: Tensor, part: int) -> Inputs:
    """The first head of each group asks, means of keys answer."""
    size = CHUNK // part
    marks = k[:, :, : k.shape[2] // size * size].unflatten(2, (-1, size)).mean(3)
    return {"retrieval_q": q[:, :: q.shape[1] // k.shape[1]].clone(), "landmarks": marks}


def _gate(q: Tensor, k: Tensor, part: int) -> Inputs:
    generator = torch.Generator(k.device).manual_seed(1)
    return {"gate": torch.randn((*k.shape[:3], SLOTS // part), generator=generator, device=k.device).to(k.dtype)}


def _gates(q: Tensor, k: Tensor, part: int) -> Inputs:
    """Log decays in float32, most of them weak, as trained models have them; and how much of its error a key writes."""
    generator = torch.Generator(k.device).manual_seed(1)
    g, beta = torch.randn((2, *k.shape[:3]), generator=generator, device=k.device)
    return {"g": -0.1 * torch.nn.functional.softplus(g), "beta": torch.sigmoid(beta)}


def _shares(q: Tensor, k: Tensor, part: int) -> Inputs:
    generator = torch.Generator(q.device).manual_seed(1)
    return {"gate": torch.rand((*q.shape[:3], 3), generator=generator, device=q.device).to(q.dtype)}


def _tsa(part: int, inside: Any = None) -> Any:
    return patterns.token_sparse(probe=128 // part, min_tokens=1024 // part, inside=inside)


def _pbs(part: int) -> Any:
    return patterns.pbs(128 // part, 256 // part)


def _flexprefill(part: int) -> Any:
    return patterns.flexprefill(128 // part, 0.9)


def _index(q: Tensor, k: Tensor, part: int) -> Inputs:
    """Of a lightning indexer: 4 heads, 32 wide."""
    generator = torch.Generator(k.device).manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=k.device).to(k.dtype)

    batch, rows, keys = k.shape[0], q.shape[2], k.shape[2]
    return {
        "index_q": random(batch, 4, rows, 32), "index_k": random(batch, 1, keys, 32), "index_weights": random(batch, 4, rows),
    }  # fmt: skip


def _capped(part: int) -> Any:
    """MoBA with the soft cap of Gemma 2 on its logits: a score beside a choice."""
    chunk = 512 // part
    own = sd.q_idx // chunk == sd.kv_idx // chunk
    selected = sd.top_k(sd.dot(sd.q, sd.summary(sd.k, chunk)), 2)
    return sd.attend(patterns.causal() & (own | selected), score=patterns.softcap(50.0))


@dataclass(frozen=True)
class System:
    """``declare(heads, part)`` its program, with sizes divided by ``part``; ``named(q, k, part)`` its inputs beside q, k and v.

    ``captured``: on activations of a model, where its choices depend on their structure. ``trains``: backward is measured too.
    ``flex``: longest sequence at which FlexAttention runs it on CPU, 0 if it cannot say it: choices of single queries go to it as
    tables of queries x chunks, those of HSA in two passes over all keys. ``flex_gpu``: the same on GPU.
    """

    title: str
    declare: Callable[[int, int], Any]
    shape: Shape
    named: Callable[[Tensor, Tensor, int], Inputs] = _nothing
    captured: bool = False
    trains: bool = False
    flex: int = 0
    flex_gpu: int = 0

    def program(self, heads: int, length: int) -> Any:
        """As published, or, for toy lengths, with sizes that leave something to choose."""
        return self.declare(heads, part_of(length))

    def inputs(self, q: Tensor, k: Tensor) -> Inputs:
        """What the program of this length takes beside q, k and v."""
        return self.named(q, k, part_of(k.shape[2]))


def part_of(length: int) -> int:
    """By how much sizes are divided."""
    return 1 if length >= LEAST else 4


SYSTEMS: dict[str, System] = {
    "hsa": System(
        f"HSA, {TOP_K} of {CHUNK}", lambda heads, part: patterns.hsa(CHUNK // part, TOP_K // part), SMALL, _hsa, trains=True,
        flex=2048, flex_gpu=16384,
    ),
    "nha": System(f"NHA, {SLOTS} slots, window 32", lambda heads, part: patterns.nha(SLOTS // part, 32 // part), SMALL, _gate, trains=True),
    "pbs": System("PBS, 0.9 of 128-blocks", lambda heads, part: _pbs(part), GEMMA, captured=True, flex=8192, flex_gpu=131072),
    "tsa": System("TSA, drops 0.005", lambda heads, part: _tsa(part), GEMMA, captured=True, flex=8192, flex_gpu=131072),
    "tsa_pbs": System("TSA with PBS inside", lambda heads, part: _tsa(part, _pbs(part)), GEMMA, captured=True, flex_gpu=131072),
    "flexprefill": System("FlexPrefill, 0.9 of 128-blocks", lambda heads, part: _flexprefill(part), GEMMA, captured=True),
    "tsa_flexprefill": System("TSA with FlexPrefill inside", lambda heads, part: _tsa(part, _flexprefill(part)), GEMMA, captured=True),
    "dsa": System("DSA, 512 keys", lambda heads, part: patterns.dsa(512 // part), SMALL, _index),
    "ring": System(
        "Ring-linear", lambda heads, part: patterns.ring_linear(sd.decay_table(heads=heads, layer=0, layers=20)), RING, trains=True
    ),
    "gated_delta": System("Gated DeltaNet", lambda heads, part: patterns.gated_delta(), RING, _gates, trains=True),
    "moba": System(
        "MoBA, 3 of 512", lambda heads, part: patterns.moba(512 // part, 3), GEMMA, captured=True, trains=True, flex=4096, flex_gpu=32768
    ),
    "moba_cap": System(
        "MoBA, 3 of 512, soft cap", lambda heads, part: _capped(part), GEMMA, captured=True, trains=True, flex=4096, flex_gpu=32768
    ),
    "nsa": System(
        "NSA, 16 of 64", lambda heads, part: patterns.nsa(32 // part, 64 // part, 16 // part, 512 // part), GEMMA, _shares, captured=True,
        trains=True, flex_gpu=32768,
    ),
}  # fmt: skip


# ---- inputs ----------------------------------------------------------------------------------------------------------


def random_qkv(
    shape: Shape, length: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers without structure."""
    generator = torch.Generator(device).manual_seed(seed)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    q, k, v = (torch.randn(1, n, length, shape.dim, generator=generator, device=device, dtype=dtype) for n in heads)
    return q, k, v


def topics(
    shape: Shape, length: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Made-up numbers with some structure, where no activations are at hand: neighbours share one of 64 directions, a query looks for
    one of them, and the first token draws all."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = random_qkv(shape, length, device=device, seed=seed)
    directions = torch.randn(64, shape.dim, generator=generator, device=device)
    of_key, of_query = (
        torch.randint(64, (-(-length // 64),), generator=generator, device=device).repeat_interleave(64)[:length]
        for _ in range(2)
    )
    k, q = 0.5 * k + directions[of_key], 0.5 * q + directions[of_query]
    k[:, :, 0] += 0.2 * directions.sum(0)
    return q.to(dtype), k.to(dtype), v.to(dtype)


# ---- how much attends ------------------------------------------------------------------------------------------------


def density(program: Any, q: Tensor, k: Tensor, v: Tensor, named: Mapping[str, Tensor]) -> float | None:
    """Pairs of a query and a row of keys or slots that attend, of all causal pairs; None for linear attention, which has none."""
    with torch.no_grad():
        pairs = attended_pairs(program, q, k, v, named)
    return None if pairs is None else pairs / (q.shape[0] * q.shape[1] * q.shape[2] * (q.shape[2] + 1) / 2)


def attended_pairs(program: Any, q: Tensor, k: Tensor, v: Tensor, named: Mapping[str, Tensor]) -> float | None:
    """The number of such pairs, over all branches and heads."""
    match program:
        case Linear():
            return None
        case Recall():
            return float(program.memory.gate.axes[3]) * q.shape[1] * q.shape[2]
        case Mix() | Joint():
            parts = [attended_pairs(branch, q, k, v, named) for branch in program.branches]
            return sum(part for part in parts if part is not None)
        case Attend() if program.normaliser is not None:
            attn = sd.compile(program)
            selected = attn.choices(q, k, v, **_wanted(attn, named))[attn.program.labels[program.normaliser.selected]]
            assert isinstance(selected, SelectedBlocks)
            return float(selected.counts.sum()) * selected.kv_block * q.shape[1] / selected.counts.shape[1]
    # Without logits every pair weighs 1, and the LSE of a row is the logarithm of their number. What chooses keeps its own scale.
    attn = sd.compile(program)
    _, lse = attn(q, k, v, return_lse=True, scale=1e-30, **_wanted(attn, named))
    return float(lse.double().exp().sum())


def _wanted(attn: Any, named: Mapping[str, Tensor]) -> Inputs:
    """The inputs that a part of a program takes."""
    inputs = attn.program.inputs if hasattr(attn, "program") else ()
    return {name: x for name, x in named.items() if name in inputs}
