"""The systems that are measured, with the inputs each takes, what FlexAttention can say of it, and what its paper claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import sparsedsl as sd
from sparsedsl import patterns
from sparsedsl.program.branches import Attend, Joint, Linear, Mix, Recall
from sparsedsl.run.picked.picks import Picks

__all__ = ["CLAIMS", "SYSTEMS", "Claim", "Shape", "System", "attended_pairs", "density", "random_qkv", "topics"]

Tensor = torch.Tensor
Inputs = dict[str, Tensor]
CHUNK, TOP_K = 64, 16  # of HSA, here and where its cost by length is measured


@dataclass(frozen=True)
class Shape:
    """Heads of queries, heads of keys and values, and their width."""

    heads: int
    kv_heads: int
    dim: int


GEMMA, SMALL, RING = Shape(4, 1, 256), Shape(8, 1, 64), Shape(4, 4, 128)


def _nothing(q: Tensor, k: Tensor) -> Inputs:
    return {}


def _hsa(q: Tensor, k: Tensor) -> Inputs:
    """The first head of each group asks, means of keys answer."""
    chunks = k.shape[2] // CHUNK
    marks = k[:, :, : chunks * CHUNK].unflatten(2, (chunks, CHUNK)).mean(3)
    return {"retrieval_q": q[:, :: q.shape[1] // k.shape[1]].clone(), "landmarks": marks}


def _gates(width: int) -> Callable[[Tensor, Tensor], Inputs]:
    def made(q: Tensor, k: Tensor) -> Inputs:
        generator = torch.Generator(k.device).manual_seed(1)
        shape = (*k.shape[:3], width)
        return {"gate": torch.randn(shape, generator=generator, device=k.device, dtype=k.dtype)}

    return made


def _shares(q: Tensor, k: Tensor) -> Inputs:
    generator = torch.Generator(q.device).manual_seed(1)
    return {"gate": torch.rand((*q.shape[:3], 3), generator=generator, device=q.device, dtype=q.dtype)}


@dataclass(frozen=True)
class System:
    """``declare(heads)`` its program, ``named(q, k)`` its inputs beside q, k and v.

    ``captured``: on activations of a model, where its choices depend on their structure. ``trains``: backward is measured too.
    ``flex``: longest sequence at which FlexAttention runs it on CPU, 0 if it cannot say it: choices of single queries go to it as
    tables of queries x chunks, those of HSA in two passes over all keys.
    """

    title: str
    declare: Callable[[int], Any]
    shape: Shape
    named: Callable[[Tensor, Tensor], Inputs] = _nothing
    captured: bool = False
    trains: bool = False
    flex: int = 0


SYSTEMS: dict[str, System] = {
    "hsa": System(f"HSA, {TOP_K} of {CHUNK}", lambda heads: patterns.hsa(CHUNK, TOP_K), SMALL, _hsa, trains=True, flex=2048),
    "nha": System("NHA, 64 slots, window 32", lambda heads: patterns.nha(64, 32), SMALL, _gates(64), trains=True),
    "pbs": System("PBS, 0.9 of 128-blocks", lambda heads: patterns.pbs(), GEMMA, captured=True, flex=8192),
    "tsa": System("TSA, drops 0.005", lambda heads: patterns.token_sparse(), GEMMA, captured=True, flex=8192),
    "tsa_pbs": System("TSA with PBS inside", lambda heads: patterns.token_sparse(inside=patterns.pbs()), GEMMA, captured=True),
    "ring": System(
        "Ring-linear", lambda heads: patterns.ring_linear(sd.decay_table(heads=heads, layer=0, layers=20)), RING, trains=True
    ),
    "moba": System("MoBA, 3 of 512", lambda heads: patterns.moba(), GEMMA, captured=True, trains=True, flex=4096),
    "nsa": System("NSA, 16 of 64", lambda heads: patterns.nsa(), GEMMA, _shares, captured=True, trains=True),
}


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
            picks = attn.choices(q, k, v, **_wanted(attn, named))[program.normaliser.picks.label]
            assert isinstance(picks, Picks)
            return float(picks.counts.sum()) * picks.kv_unit * q.shape[1] / picks.counts.shape[1]
    # Without logits every pair weighs 1, and the LSE of a row is the logarithm of their number. What chooses keeps its own scale.
    attn = sd.compile(program)
    _, lse = attn(q, k, v, return_lse=True, scale=1e-30, **_wanted(attn, named))
    return float(lse.double().exp().sum())


def _wanted(attn: Any, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs that a part of a program takes."""
    return {name: x for name, x in named.items() if name in getattr(attn, "program", sd.Program(sd.q)).inputs}


# ---- what the papers say ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A headline figure and its hardware; ``of``: the system and the kind of number that stands beside it here (``systems_cpu.py``)."""

    system: str
    what: str
    figure: str
    hardware: str
    of: tuple[str, str]


CLAIMS = (
    Claim("TSA", "choosing and moving, of attention time, 128K", "below 11 %", "A100, with FlashAttention-2", ("tsa", "overhead")),
    Claim("TSA", "attention, speed-up over dense at 128K", "up to 3.23 x", "A100, inside a sparse kernel", ("tsa_pbs", "speed")),
    Claim("TSA", "the same with dense attention inside", "1.36 x", "A100, FlashAttention-2", ("tsa", "speed")),
    Claim("PBS", "attention, speed-up over dense at 128K", "2.77 x", "H100, FlashAttention-2", ("pbs", "speed")),
    Claim("PBS", "the same at 512K", "3.41 x", "H100, FlashAttention-2", ("pbs", "speed")),
    Claim("NHA", "time by length", "near-linear", "GPU not said", ("nha", "growth")),
    Claim("HSA", "time by length, beside FlashAttention-3", "faster at long lengths only", "H800", ("hsa", "growth")),
    Claim("Ring", "prefill, speed-up over dense at 128K (model)", "about 8 x", "GPU not said", ("ring", "speed")),
    Claim("Ring", "state a layer, 16 heads of 128 x 128", "1 MiB", "float32", ("ring", "state")),
)
