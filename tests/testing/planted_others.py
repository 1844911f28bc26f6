"""Kernels that part the keys, that remember calls, and that have a backward pass of their own, with one fault or none."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from tests.testing.planted_tiled import Tiled

Tensor = torch.Tensor


@dataclass
class Split:
    """Keys in parts, each attended to alone, merged by their LSE."""

    fault: str = ""
    mask: str = "causal"
    parts: int = 3

    def __post_init__(self) -> None:
        self.__name__ = f"split_{self.fault.replace(' ', '_') or 'right'}"
        self.old: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, q_offset: int = 0) -> tuple[Tensor, Tensor]:
        count, fault = k.shape[2], self.fault
        parts = 1 + q.shape[0] % 3 if fault == "parts from the batch" else self.parts
        size = -(-count // parts)
        outs, levels = [], []
        for start in range(0, size * parts, size):
            begin = max(start - 1, 0) if fault == "part start rounded down" else start
            o, level = _plain(q, k[:, :, begin : start + size], v[:, :, begin : start + size], q_offset - begin, self.mask)
            outs.append(o)
            levels.append(level)
        level = torch.stack(levels)
        if fault == "old LSE":
            # scratch that an empty part does not write
            empty = torch.isinf(level)
            level = torch.where(empty, 0.37, level)
        base = math.log(2) if fault == "merged in base 2" else 1.0
        peak = level.amax(0)
        peak = peak if fault == "NaN where all parts are empty" else torch.where(torch.isinf(peak), 0.0, peak)
        weights = torch.exp((level - peak) * base)
        total = weights.sum(0)
        none = total == 0
        if fault == "unweighted":
            weights, total = torch.ones_like(weights), torch.full_like(total, float(len(outs)))
        out = (weights[..., None] * torch.stack(outs)).sum(0) / torch.where(none, 1.0, total)[..., None]
        lse = torch.where(none, -math.inf, peak + torch.log(torch.where(none, 1.0, total)) / base)
        return out.to(q.dtype), lse


def _plain(q: Tensor, k: Tensor, v: Tensor, q_offset: int, mask: str) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    row, key = torch.arange(q.shape[2])[:, None] + q_offset, torch.arange(k.shape[2])
    ok = (key <= row) & ((row - key < 3) | (mask != "window"))
    s = (q.float() @ k.mT * q.shape[3] ** -0.5).masked_fill(~ok, -math.inf)
    none = ~ok.any(-1)
    lse = torch.logsumexp(s, -1) if k.shape[2] else torch.full(s.shape[:3], -math.inf)
    p = torch.exp(s - lse.masked_fill(none, 0.0)[..., None])
    return p.to(q.dtype).float() @ v, lse


@dataclass
class Remembering:
    """A kernel that keeps what it worked out of a shape: its scale among that, by mistake."""

    fault: str = "cache key without the scale"

    def __post_init__(self) -> None:
        self.__name__ = "remembering"
        self.kept: dict[Any, Any] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, q_offset: int = 0, scale: float | None = None) -> Any:
        scale = q.shape[3] ** -0.5 if scale is None else scale
        key = (q.shape, k.shape, q.dtype, *(() if self.fault else (scale,)))
        scale = self.kept.setdefault(key, scale)
        return Tiled("causal")(q, k, v, q_offset, scale)


class _Attention(torch.autograd.Function):
    """Dense attention whose backward pass is written out; ``how`` says the fault."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, extra: Tensor, q_offset: int, kind: str, fault: str
    ) -> tuple[Tensor, Tensor]:
        s, _, ok, wide = _scores(q, k, v, extra, q_offset, kind)
        none = ~(ok.any(-1)) if kind != "sink" else torch.zeros(s.shape[:3], dtype=torch.bool)
        lse = torch.logsumexp(s, -1)
        level = lse.masked_fill(torch.isinf(lse), 0.0)
        p = torch.exp(s - level[..., None])
        out = (p[..., : k.shape[2]].to(q.dtype).float() @ wide).to(q.dtype)
        ctx.save_for_backward(q, k, v, extra, out, level)
        ctx.words = (q_offset, kind, fault)
        return out, lse.masked_fill(none, -math.inf)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> Any:
        q, k, v, extra, out, level = ctx.saved_tensors
        q_offset, kind, fault = ctx.words
        s, raw, ok, wide = _scores(q, k, v, extra, q_offset, kind)
        if fault == "backward mask is top-left":
            ok = _allowed(q, k, 0, kind)
            s = torch.where(ok, raw, -math.inf)
        group, scale, keys = q.shape[1] // k.shape[1], q.shape[3] ** -0.5, k.shape[2]
        p, d_out = torch.exp(s - level[..., None]), d_out.float()
        mean = (d_out * out.float()).sum(-1, keepdim=True)
        d_p = torch.nn.functional.pad(d_out @ wide.mT, (0, s.shape[3] - keys))
        d_s = p * (
            d_p - (0.0 if fault == "Delta missing" else mean) + (0.0 if fault == "dLSE ignored" else d_lse.float()[..., None])
        )
        d_extra = _of_extra(d_s, extra, kind, fault)
        d_s = d_s[..., :keys]
        if kind == "softcap" and fault != "softcap slope missing":
            d_s = d_s * (1 - (raw / 3).square())
        wide_k = k.float().repeat_interleave(group, 1)
        dq = d_s @ wide_k * (1.0 if fault == "dq unscaled" else scale)
        dk, dv = d_s.mT @ q.float() * scale, p[..., :keys].mT @ d_out
        dk, dv = (x.unflatten(1, (-1, group)) for x in (dk, dv))
        dk = dk[:, :, 0] if fault == "dk of one head" else dk.sum(2)
        return dq.to(q.dtype), dk.to(q.dtype), dv.sum(2).to(q.dtype), d_extra, None, None, None


def _allowed(q: Tensor, k: Tensor, q_offset: int, kind: str) -> Tensor:
    return torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + q_offset


def _scores(q: Tensor, k: Tensor, v: Tensor, extra: Tensor, q_offset: int, kind: str) -> tuple[Tensor, ...]:
    group = q.shape[1] // k.shape[1]
    wide_k, wide = (x.float().repeat_interleave(group, 1) for x in (k, v))
    raw, ok = q.float() @ wide_k.mT * q.shape[3] ** -0.5, _allowed(q, k, q_offset, kind)
    if kind == "softcap":
        raw = 3 * torch.tanh(raw / 3)
    if kind == "bias":
        raw = raw + extra.float()[: q.shape[1], : k.shape[2]][:, None]
    s = torch.where(ok, raw, -math.inf)
    if kind == "sink":
        s = torch.cat([s, extra.float()[: q.shape[1], None, None].expand(*s.shape[:3], 1)], -1)
    return s, raw, ok, wide


def _of_extra(d_s: Tensor, extra: Tensor, kind: str, fault: str) -> Tensor:
    found = torch.zeros_like(extra, dtype=torch.float32)
    if kind == "sink" and fault != "sink gradient missing":
        found[: d_s.shape[1]] = d_s[..., -1].sum((0, 2))
    if kind == "bias":
        summed = d_s[0] if fault == "bias of one entry" else d_s.sum(0)
        found[: d_s.shape[1], : d_s.shape[3]] = summed.sum(1)
    return found.to(extra.dtype)


@dataclass
class Backward:
    """Causal attention with a written backward pass; ``kind``: "", "softcap", "sink" or "bias"."""

    fault: str = ""
    kind: str = ""

    def __post_init__(self) -> None:
        self.__name__ = f"backward_{self.fault.replace(' ', '_') or 'right'}"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, q_offset: int = 0, **tables: Tensor) -> tuple[Tensor, Tensor]:
        extra = next(iter(tables.values()), torch.zeros(1))
        return _Attention.apply(q, k, v, extra, q_offset, self.kind, self.fault)
