"""Attention in tiles of 4 queries, 4 keys and 4 channels, as GPU kernels compute it, with one fault or none.

Loads go through flat memory by strides, so that what lies behind a tensor is really read where a fault does not mask it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

Tensor = torch.Tensor
TILE = 4
LOWEST = -1e38
MASKS = ("causal", "full", "window", "padded")


def load(
    x: Tensor, rows: Tensor, channels: Tensor, heads: Tensor, valid: Tensor, *, packed: bool = False, bits: int = 0
) -> Tensor:
    """``(batch, heads, rows, channels)`` of a tensor, from flat memory; 0 where not ``valid`` (rows, channels)."""
    batch = torch.arange(x.shape[0])
    strides = torch.empty(x.shape, device="meta").stride() if packed else x.stride()
    inner = rows[:, None] * strides[2] + channels * strides[3]
    if bits:
        inner = inner % (1 << bits)
    offsets = x.storage_offset() + batch[:, None, None, None] * strides[0] + heads[:, None, None] * strides[1] + inner
    flat = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return torch.where(valid, flat[offsets.clamp(0, len(flat) - 1)], 0.0)


@dataclass
class Tiled:
    """``(out, lse)`` of a mask of ``MASKS`` with ``fault``; slopes, sinks, scales of heads and starts of entries where they are given."""

    mask: str = "causal"
    fault: str = ""
    lse: bool = False

    def __post_init__(self) -> None:
        self.__name__ = f"tiled_{self.fault.replace(' ', '_') or 'right'}"
        self.calls = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, q_offset: int = 0, scale: float | None = None, **tables: Tensor) -> Any:
        self.calls += 1
        if q.shape[1] % k.shape[1]:
            raise ValueError("query heads must be a multiple of key heads")
        scale = self.scale(q, v, scale)
        if self.fault == "q scaled in place":
            q *= scale
            scale = 1.0
        if self.fault == "offset ignored":
            q_offset = 0
        tables = {name: x.detach() for name, x in tables.items()}
        (batch, heads, rows, _), width_v = q.shape, v.shape[3]
        out = torch.empty(batch, heads, rows, width_v, dtype=q.dtype)
        lse = torch.empty(batch, heads, rows)
        count = max(rows // TILE, 1) if self.fault == "last rows unwritten" else -(-rows // TILE)
        for number in range(count):
            part = slice(number * TILE, min((number + 1) * TILE, rows))
            o, level = self.rows(q, k, v, part.start, q_offset, scale, tables)
            out[:, :, part], lse[:, :, part] = (x[:, :, : part.stop - part.start] for x in (o, level))
        return (out, lse) if self.lse else out

    def scale(self, q: Tensor, v: Tensor, scale: float | None) -> float:
        width = q.shape[3]
        if self.fault == "scale from Dv":
            width = v.shape[3]
        if self.fault == "scale from padded D":
            width = -(-width // TILE) * TILE
        return width**-0.5 if scale is None or self.fault.startswith("scale from") else scale

    def heads_read(self, heads: int, kv_heads: int) -> Tensor:
        h = torch.arange(heads)
        if self.fault == "h % Hk":
            return h % kv_heads
        return h.clamp_max(kv_heads - 1) if self.fault == "min(h, Hk - 1)" else h // (heads // kv_heads)

    def tiles(self, first: int, last: int, keys: int) -> list[int]:
        """Where the tiles of keys begin that rows at positions ``first`` to ``last`` need."""
        begin, end = 0, -(-keys // TILE)
        if self.mask == "window":
            start = first - 2
            begin = max(-(-start // TILE) if self.fault == "window start rounded up" else start // TILE, 0)
        if self.mask != "full":
            end = min(end, last // TILE + 1)
        if self.fault == "tail dropped":
            end = min(end, max(keys // TILE, 1))
        found = list(range(begin, max(end, begin)))
        if self.fault == "every fifth call loses a tile" and self.calls % 5 == 0:
            found = found[:-1]
        return found[::-1] if self.fault == "order by call" and self.calls % 2 else found

    def seen(self, position: Tensor, keys: Tensor, count: int, first: int, tables: dict[str, Tensor]) -> Tensor:
        """Who sees whom: ``(batch or 1, 1, rows, keys)``."""
        row, key = position[:, None], keys[None, :]
        ok = torch.ones(len(position), len(keys), dtype=torch.bool)
        if self.mask != "full":
            ok = key < row if self.fault == "own key missing" else key <= row
            if self.fault == "diagonal by its first row" and int(keys[-1]) <= first + int((position >= first).sum()) - 1:
                ok = torch.ones_like(ok)
        if self.mask == "window":
            ok = ok & (row - key < (4 if self.fault == "window + 1" else 3))
        if self.fault != "kv tail not masked":
            ok = ok & (key < count)
        if self.mask == "padded":
            start = (
                tables["start"][:1].expand(len(tables["start"])) if self.fault == "left padding of entry 0" else tables["start"]
            )
            return ok & (key >= start[:, None, None, None])
        return ok[None, None]

    def logits(self, s: Tensor, position: Tensor, keys: Tensor, q_offset: int, tables: dict[str, Tensor]) -> Tensor:
        if "factor" in tables and self.fault != "k_scale ignored":
            factor = tables["factor"].float()
            s = s * (factor[:1].expand(s.shape[1]) if self.fault == "k_scale of head 0" else factor)[: s.shape[1], None, None]
        if "slope" in tables:
            row = position - q_offset if self.fault == "ALiBi from the row number" else position
            s = s - tables["slope"].float()[: s.shape[1], None, None] * (row[:, None] - keys)
        return s

    def rows(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, q_offset: int, scale: float, tables: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """One tile of rows: outputs and LSE."""
        fault, dtype = self.fault, q.dtype
        (_, heads, count_q, width), (kv_heads, count), width_v = q.shape, k.shape[1:3], v.shape[3]
        packed, bits = fault == "packed strides", 11 if fault == "offsets of 11 bits" else 0
        lanes, lanes_v = (torch.arange(-(-n // TILE) * TILE) for n in (width, width_v))
        rows, own = start + torch.arange(TILE), torch.arange(heads)
        read = self.heads_read(heads, kv_heads)
        inside = (lanes < width) | (fault == "lanes past D")
        qt = load(q, rows, lanes, own, (rows < count_q)[:, None] & inside, packed=packed).float()
        position = rows + q_offset
        last = q_offset + min(start + TILE, count_q) - 1
        zero = 0.0 if fault == "max floored at 0" else LOWEST
        peak = torch.full((*q.shape[:2], TILE), zero)
        total, acc = torch.zeros_like(peak), torch.zeros(*peak.shape, len(lanes_v))
        for tile in self.tiles(q_offset + start, last, count):
            keys = tile * TILE + torch.arange(TILE)
            there = torch.ones(TILE, dtype=torch.bool) if fault == "kv tail not masked" else keys < count
            there_v = torch.ones(TILE, dtype=torch.bool) if fault in ("kv tail not masked", "v tail") else there
            kt = load(k, keys, lanes, read, there[:, None] & inside, packed=packed, bits=bits).float()
            valid_v = there_v[:, None] & (lanes_v < (width if fault == "Dv taken for D" else width_v))
            vt = load(v, keys, lanes_v, read, valid_v, packed=packed).float()
            ok = self.seen(position, keys, count, q_offset + start, tables)
            s = self.logits(qt @ kt.mT * scale, position, keys, q_offset, tables)
            s = torch.where(ok, s, -1e4 if fault == "sentinel of -1e4" else LOWEST)
            peak, total, acc = self.step(s, vt, ok, peak, total, acc, dtype)
        return self.finished(peak, total, acc[..., :width_v], tables, scale, v, dtype)

    def step(
        self, s: Tensor, v: Tensor, ok: Tensor, peak: Tensor, total: Tensor, acc: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        fault = self.fault
        higher = torch.zeros_like(peak) if fault == "no maximum" else torch.maximum(peak, s.amax(-1))
        p = torch.exp(s - higher[..., None])
        p = p if fault == "sentinel of -1e4" else torch.where(ok, p, 0.0)
        fade = torch.ones_like(peak) if fault == "no maximum" else torch.exp(peak - higher)
        total = total * (1.0 if fault == "l not rescaled" else fade) + p.sum(-1)
        if fault == "l in bfloat16":
            total = total.bfloat16().float()
        # a row's weights are 0 where it sees nothing, and so must be what they are multiplied by, if that is NaN
        if fault in ("masked v multiplied", "v tail", "kv tail not masked"):
            added = p.to(dtype).float() @ v
        else:
            bad = ~torch.isfinite(v)
            added = p.to(dtype).float() @ v.masked_fill(bad, 0.0)
            if bool(bad.any()):
                hit = (ok.expand(p.shape).float() @ bad.float()) > 0
                added = added.masked_fill(hit, math.nan)
        acc = acc * (1.0 if fault == "acc not rescaled" else fade[..., None]) + added
        return higher, total, acc.bfloat16().float() if fault == "acc in bfloat16" else acc

    def finished(
        self, peak: Tensor, total: Tensor, acc: Tensor, tables: dict[str, Tensor], scale: float, v: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        fault, bare = self.fault, total
        if "sink" in tables:
            sink = tables["sink"].float()[: peak.shape[1], None] * (scale if fault == "sink scaled" else 1.0)
            higher = torch.maximum(peak, sink)
            fade = torch.exp(peak - higher)
            total, acc = total * fade + torch.exp(sink - higher), acc * fade[..., None]
            peak = higher
        none = total == 0
        out = acc / (total if fault == "empty row is NaN" else torch.where(none, 1.0, total))[..., None]
        if fault == "empty row is the mean":
            out = torch.where(none[..., None], v.float().mean(2)[:, :1, None], out)
        level = torch.where(none, -math.inf, peak + torch.log(torch.where(none, 1.0, total)))
        if fault == "LSE in base 2":
            level = level / math.log(2)
        if fault == "LSE without the maximum":
            level = torch.log(total)
        if fault == "LSE without the sink":
            level = torch.where(bare == 0, -math.inf, peak + torch.log(total - torch.exp(sink - peak)))
        return out.to(dtype), level
