"""What ``gpu.py`` measures beside each other: ours, compiled FlexAttention with and without TMA, dense SDPA with flash and with cuDNN.

A builder makes the forward call of one method for a job, or raises :class:`Unavailable` with the reason. Everything around the call
(block masks, tables on the device) is made beforehand and not measured, except where the record says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_cases import PATTERNS, Job
from gpu_clock import Clock
from gpu_reference import Problem
from gpu_systems import compiled, system_problem
from systems_cases import SYSTEMS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import sparsedsl as sd

__all__ = ["COMPILED", "METHODS", "Call", "Setting", "Unavailable", "problem_of"]

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # q, k, v -> out
BLOCK = 128
# From here on create_block_mask would hold several int64 squares; it is compiled then.
MOST_EAGER_MASK = 32768


class Unavailable(Exception):
    """A method does not exist on this device, or has no answer to the job."""


@dataclass
class Setting:
    """A job with its tensors. ``dry``: lists are left empty and nothing is computed by FlexAttention: for compiling alone."""

    job: Job
    problem: Problem
    tables: dict[str, Any]
    clock: Clock
    ours: str
    dry: bool = False
    block_mask_s: float | None = None

    @property
    def device(self) -> str:
        """Type of the device."""
        return self.problem.q.device.type


def problem_of(job: Job, device: str, *, dry: bool = False) -> tuple[Problem, dict[str, torch.Tensor]]:
    """Tensors of a job, and the tables of its pattern or inputs of its system, on the device."""
    if job.kind == "system":
        return system_problem(job, device, dry=dry)
    case = PATTERNS[job.pattern]
    tables = {name: table.to(device) for name, table in case.tables(job.length).items()}
    generator = torch.Generator(device).manual_seed(0)
    decode = job.kind == "decode"
    rows = 1 if decode else job.length
    dtype = torch.bfloat16 if device == "cuda" else torch.float16  # Triton's interpreter takes bf16 for integers

    def draw(heads: int, length: int) -> torch.Tensor:
        shape = (job.batch, heads, length, job.head_dim)
        if dry:
            return torch.zeros(shape, device=device, dtype=dtype)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    q, k, v = draw(job.heads, rows), draw(job.kv_heads, job.length), draw(job.kv_heads, job.length)
    d_out = None if decode else draw(job.heads, rows)
    problem = Problem(q, k, v, d_out, case.mask_mod(tables), case.score_mod, q_offset=job.length - rows)
    return problem, tables


# ---- ours ------------------------------------------------------------------------------------------------------------


def _ours(setting: Setting) -> Call:
    problem, tables = setting.problem, setting.tables
    if setting.job.kind == "system":
        attn = compiled(setting.job, setting.ours)
        return lambda q, k, v: attn(q, k, v, **tables)
    attn = sd.compile(PATTERNS[setting.job.pattern].declare(), backend=setting.ours)
    return lambda q, k, v: attn(q, k, v, q_offset=problem.q_offset, **tables)


# ---- FlexAttention ---------------------------------------------------------------------------------------------------


def _flex(setting: Setting, *, tma: bool = False) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    problem, cuda = setting.problem, setting.device == "cuda"
    if tma and not setting.job.tma:
        raise Unavailable("not in this job, to save time")
    if tma and not (cuda and torch.cuda.get_device_capability() >= (9, 0)):
        raise Unavailable("TMA is a unit of NVIDIA devices from sm_90 on")
    if setting.job.kind == "system":
        return _flex_system(setting)
    mask = _block_mask(setting)
    # On CPU a compile takes half a minute of C++: there the call is only rehearsed.
    flex = torch.compile(flex_attention, dynamic=False, backend="inductor" if cuda else "eager")
    options: Any = {"USE_TMA": True} if tma else None
    score_mod = _shifted_score(problem)
    return lambda q, k, v: flex(
        q,
        k,
        v,
        score_mod=score_mod,
        block_mask=mask,
        enable_gqa=problem.group > 1,
        kernel_options=options,
    )


def _flex_system(setting: Setting) -> Call:
    job, named = setting.job, setting.tables
    if job.length > SYSTEMS[job.pattern].flex_gpu:
        raise Unavailable(f"FlexAttention cannot say {job.pattern}, or only with tables of queries x chunks, at this length")
    if setting.device != "cuda":
        raise Unavailable("rehearsal: on CPU it is compiled for half a minute")
    attn = compiled(job, "flex")
    return lambda q, k, v: attn(q, k, v, **named)


def _shifted(problem: Problem) -> Callable[..., torch.Tensor]:
    """FlexAttention counts queries from 0: the mask for queries that begin elsewhere."""
    if problem.q_offset == 0:
        return problem.mask_mod
    offset = torch.tensor(problem.q_offset, device=problem.q.device)
    return lambda b, h, q_idx, kv_idx: problem.mask_mod(b, h, q_idx + offset, kv_idx)


def _shifted_score(problem: Problem) -> Callable[..., torch.Tensor] | None:
    score_mod = problem.score_mod
    if score_mod is None or problem.q_offset == 0:
        return score_mod
    offset = torch.tensor(problem.q_offset, device=problem.q.device)
    return lambda score, b, h, q_idx, kv_idx: score_mod(score, b, h, q_idx + offset, kv_idx)


def _block_mask(setting: Setting) -> Any:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    problem, length = setting.problem, setting.job.length
    mask_mod, rows, is_compiled = _shifted(problem), problem.q.shape[2], _compiles_mask(setting)
    if setting.dry and not is_compiled:  # as torch makes them, but empty
        blocks = -(-rows // BLOCK), -(-length // BLOCK)
        counts, columns = (torch.zeros(1, 1, *n, dtype=torch.int32, device=problem.q.device) for n in (blocks[:1], blocks))
        return BlockMask.from_kv_blocks(
            counts, columns, counts.clone(), columns.clone(), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(rows, length)
        )
    made: dict[str, Any] = {}

    def make() -> None:
        made.clear()  # two of them may not fit
        made["mask"] = create_block_mask(
            mask_mod, None, None, rows, length, device=setting.device, BLOCK_SIZE=BLOCK, _compile=is_compiled
        )

    samples = setting.clock.take_turns({"make": make}, 2, limit_s=0.0)
    setting.block_mask_s = samples["make"].device_s[-1]
    return made["mask"]


def _compiles_mask(setting: Setting) -> bool:
    return setting.device == "cuda" and setting.job.kind != "decode" and setting.job.length > MOST_EAGER_MASK


# ---- dense -----------------------------------------------------------------------------------------------------------


def _sdpa(setting: Setting, backend: SDPBackend) -> Call:
    problem, pattern = setting.problem, setting.job.pattern
    if pattern not in ("causal", "full") and setting.job.kind != "system":
        raise Unavailable("dense attention: beside the causal and the full pattern only")
    is_causal = pattern != "full" and setting.job.kind != "decode"  # a last query sees every key

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=problem.group > 1)

    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        try:
            with torch.no_grad():
                call(problem.q, problem.k, problem.v)
        except RuntimeError as error:
            if not ("No available kernel" in str(error) or "No viable backend" in str(error)):
                raise
            why = "; ".join(dict.fromkeys(str(reason.message).splitlines()[0] for reason in reasons))
            raise Unavailable(f"{str(error).splitlines()[0]} {why}".strip()) from error
    return call


METHODS: dict[str, Callable[[Setting], Call]] = {
    "ours": _ours,
    "flex": _flex,
    "flex_tma": lambda setting: _flex(setting, tma=True),
    "sdpa_flash": lambda setting: _sdpa(setting, SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": lambda setting: _sdpa(setting, SDPBackend.CUDNN_ATTENTION),
}
# What is compiled, and so worth doing ahead of time.
COMPILED = ("ours", "flex", "flex_tma")
