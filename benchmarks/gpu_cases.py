"""What ``gpu.py`` measures: patterns, twice as in ``cases.py``; jobs, the most telling first; about how long each takes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from cases import BLOCK, CASES, Case, Tables

import sparsedsl as sd
from sparsedsl import patterns

__all__ = ["HEADS", "PATTERNS", "SYSTEM_NAMES", "Job", "chosen", "job_of", "jobs", "rehearsal", "tuned_first"]

HEADS = 16
CAP = 50.0
DECODE_BATCH, DECODE_HEADS, DECODE_KV_HEADS = 8, 32, 8
# Systems (``gpu_systems.py``), the most telling first; heads of keys for 32 of queries as they have them, 8 the others.
SYSTEM_NAMES = ("pbs", "hsa", "tsa", "ring", "gated_delta", "nha", "tsa_pbs", "nsa", "moba", "moba_cap")
FORWARD_ONLY = ("pbs", "tsa", "tsa_pbs")  # their choices read later queries
SYSTEM_HEADS, SYSTEM_KV_HEADS = 32, {"hsa": 2, "ring": 32, "gated_delta": 32}


# ---- patterns --------------------------------------------------------------------------------------------------------


def _square_block_table(length: int, share: float) -> torch.Tensor:
    """Which pairs of 128-blocks attend, bool: ``share`` of all, at random but the same every run, in each row at least one."""
    blocks = -(-length // BLOCK)
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(blocks)
    table = torch.zeros(blocks, blocks, dtype=torch.bool)
    table[rows, torch.randperm(blocks, generator=generator)] = True
    others = (~table).nonzero()
    more = max(0, round(share * blocks * blocks) - blocks)
    taken = others[torch.randperm(len(others), generator=generator)[:more]]
    table[taken[:, 0], taken[:, 1]] = True
    return table


def _square_blocks(percent: int) -> Case:
    def mask_mod(tables: Tables) -> Any:
        taken = tables["chosen"]
        return lambda b, h, q_idx, kv_idx: taken[q_idx // BLOCK, kv_idx // BLOCK]

    return Case(
        f"block-sparse {percent} %",
        lambda: patterns.blocks("chosen", BLOCK),
        mask_mod,
        lambda length: {"chosen": _square_block_table(length, percent / 100)},
        scattered=True,
    )


def _softcap(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
    return torch.tanh(score / CAP) * CAP


def _alibi(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
    return score + torch.exp2(-((h + 1) * 8.0 / HEADS)) * (kv_idx - q_idx)


def _everything(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> torch.Tensor:
    return q_idx >= 0


_causal_by_hand = CASES["causal"].mask_mod

PATTERNS = {
    "causal": CASES["causal"],
    "window": CASES["window"],
    "blocks10": _square_blocks(10),
    "full": Case("full", patterns.full, lambda t: _everything),
    "causal_documents": CASES["causal_documents"],
    "sinks": CASES["sinks"],
    "window4096": CASES["window4096"],
    "alibi": Case(
        "causal, ALiBi",
        lambda: sd.attend(patterns.causal(), score=patterns.alibi(HEADS)),
        _causal_by_hand,
        score_mod=_alibi,
    ),
    "softcap": Case(
        "causal, soft cap 50",
        lambda: sd.attend(patterns.causal(), score=patterns.softcap(CAP)),
        _causal_by_hand,
        score_mod=_softcap,
    ),
    "dilated": CASES["dilated"],
    "blocks5": _square_blocks(5),
    "blocks25": _square_blocks(25),
    "blocks50": _square_blocks(50),
}
# Share of the square that is computed, roughly: for guesses of time only.
_SHARE = {"full": 1.0, "causal": 0.5, "alibi": 0.5, "softcap": 0.5, "blocks50": 0.5, "blocks25": 0.25, "blocks10": 0.1}
# Patterns that stand for the others where not all are measured.
FEW = ("causal", "window", "blocks10", "causal_documents")


# ---- jobs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One problem on which everything is measured side by side; ``tma``: FlexAttention also with its TMA option.

    ``kind`` "attention": forward and backward of ``length`` queries over as many keys. "decode": one query a batch entry, the last of
    ``length`` positions, forward. "system": as attention, of the system that ``pattern`` names, forward alone if it does not train.
    """

    kind: str
    pattern: str
    length: int
    head_dim: int
    heads: int = HEADS
    kv_heads: int = HEADS
    batch: int = 1
    tma: bool = True

    @property
    def group(self) -> int:
        """Query heads for each key head."""
        return self.heads // self.kv_heads

    @property
    def seconds(self) -> float:
        """About how long it takes on an H100 or H200, kernels compiled: preparation, and as many rounds as are waited for."""
        share = _SHARE.get(self.pattern, 0.05)
        if self.kind == "system":  # with dense attention beside it
            share = 0.15 if self.pattern in FORWARD_ONLY else 0.5
        squares = share * (self.length / 131072) ** 2 * self.heads / HEADS
        return 3.0 + (0.0 if self.kind == "decode" else 25.0 * squares)

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.kind} {self.pattern} {self.length} D{self.head_dim} {self.heads}:{self.kv_heads}"

    def to_json(self) -> dict[str, Any]:
        """As :func:`job_of` takes it."""
        return asdict(self)


def job_of(content: dict[str, Any]) -> Job:
    """A job from its JSON."""
    return Job(**content)


def jobs() -> list[Job]:
    """All jobs, the most telling first: what the time does not suffice for is at the end."""
    attention = functools.partial(Job, "attention")
    found = [attention(name, 16384, 128) for name in PATTERNS]
    found += [attention(name, 32768, 128, tma=name in FEW) for name in PATTERNS]
    found += [_decode(name, length) for length in (32768, 131072) for name in ("causal", "sinks")]
    found += [_system(name, 32768) for name in SYSTEM_NAMES] + [_system(name, 131072) for name in FORWARD_ONLY]
    found += [attention(name, 16384, 64, tma=name in FEW) for name in PATTERNS]
    found += [attention(name, 32768, 64, tma=False) for name in PATTERNS]
    found += [attention(name, 16384, 128, kv_heads=HEADS // group, tma=False) for group in (4, 8) for name in FEW]
    found += [attention(name, length, 128, tma=False) for length in (8192, 65536) for name in FEW]
    found += [_system(name, length) for length in (65536, 8192, 16384) for name in SYSTEM_NAMES]
    # The longest take longest: cheap patterns before the square ones.
    found += [attention(name, 131072, 128, tma=False) for name in ("window", "causal_documents", "blocks10", "causal")]
    return found + [_system(name, 131072) for name in SYSTEM_NAMES if name not in FORWARD_ONLY]


def _decode(pattern: str, length: int) -> Job:
    return Job("decode", pattern, length, 128, heads=DECODE_HEADS, kv_heads=DECODE_KV_HEADS, batch=DECODE_BATCH, tma=False)


def _system(name: str, length: int) -> Job:
    kv_heads = SYSTEM_KV_HEADS.get(name, 8)
    return Job("system", name, length, 128, heads=SYSTEM_HEADS, kv_heads=kv_heads, tma=False)


def rehearsal() -> list[Job]:
    """Every kind of job at sizes that an interpreter can bear."""
    found = [Job("attention", name, 160, 16, heads=2, kv_heads=2) for name in PATTERNS]
    found += [Job("attention", name, 96, 32, heads=4, kv_heads=1, tma=False) for name in ("causal", "blocks10")]
    found += [Job("decode", name, 160, 16, heads=4, kv_heads=2, batch=2, tma=False) for name in ("causal", "sinks")]
    return found + [
        Job("system", name, 160, 16, heads=2, kv_heads=2 if name in ("ring", "gated_delta") else 1, tma=False)
        for name in SYSTEM_NAMES
    ]


def chosen(
    among: Iterable[Job],
    names: Sequence[str] | None,
    lengths: Sequence[int] | None,
    dims: Sequence[int] | None,
    kinds: Sequence[str],
) -> list[Job]:
    """The jobs of these patterns, lengths, head dimensions (None: all) and kinds."""
    return [
        job
        for job in among
        if (names is None or job.pattern in names)
        and (lengths is None or job.length in lengths)
        and (dims is None or job.head_dim in dims)
        and job.kind in kinds
    ]


def tuned_first(wanted: Iterable[Job]) -> list[tuple[Job, str | None]]:
    """What is worth measuring choices for, the most telling first: a job, and one of its kernels.

    Pattern after pattern: the forward pass, dK and dV, dQ, and decoding, at the first shape that is wanted of it; then the other shapes in
    the same order. A choice serves all lengths. Systems come last, with all of their kernels (None) at once.
    """
    wanted = list(wanted)
    names = list(dict.fromkeys(job.pattern for job in wanted if job.kind != "system"))
    rounds: dict[int, list[tuple[Job, str | None]]] = {}
    for name in names:
        for kind, kernels in (("attention", ("forward", "grad_kv", "grad_q")), ("decode", ("decode",))):
            for turn, job in enumerate(_one_a_shape(job for job in wanted if (job.kind, job.pattern) == (kind, name))):
                rounds.setdefault(turn, []).extend((job, kernel) for kernel in kernels)
    systems = _one_a_shape(job for job in wanted if job.kind == "system")
    return [piece for turn in sorted(rounds) for piece in rounds[turn]] + [(job, None) for job in systems]


def _one_a_shape(among: Iterable[Job]) -> list[Job]:
    """The first job of each pattern and shape of heads."""
    found: dict[tuple[str, int, int], Job] = {}
    for job in among:
        found.setdefault((job.pattern, job.head_dim, job.group), job)
    return list(found.values())
