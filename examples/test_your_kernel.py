"""How do I test an attention kernel that I wrote myself?

Checks a tiled kernel with an online softmax, then the same one with a fault, and prints what the kit finds: the property, the smallest
case, a guess at the fault and a program that shows it.

    python examples/test_your_kernel.py
"""

from __future__ import annotations

from typing import Any

import torch

import sparsedsl as sd

TILE = 16
WINDOW = (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 24)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_offset: int = 0, *, first_tile: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A window of 24 keys, tiles of 16 by 16; ``(out, lse)``."""
    group, (rows, width), keys = q.shape[1] // k.shape[1], q.shape[2:], k.shape[2]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    out, lse = q.new_zeros(*q.shape[:3], v.shape[3]), torch.full(q.shape[:3], -torch.inf)
    for start in range(0, rows, TILE):
        row = torch.arange(start, min(start + TILE, rows))[:, None] + q_offset
        tile = q[:, :, start : start + TILE].float()
        peak, total, acc = torch.full(tile.shape[:3], -1e38), torch.zeros(tile.shape[:3]), torch.zeros(())
        begin = max((int(row[0]) - 23 + first_tile) // TILE, 0) * TILE
        for first in range(begin, min(int(row[-1]) + 1, keys), TILE):
            key = torch.arange(first, min(first + TILE, keys))
            seen = (key <= row) & (row - key < 24)
            score = (tile @ k[:, :, key].mT * width**-0.5).masked_fill(~seen, -1e38)
            higher = torch.maximum(peak, score.amax(-1))
            weight = torch.exp(score - higher[..., None]) * seen
            fade = torch.exp(peak - higher)
            total, acc = total * fade + weight.sum(-1), acc * fade[..., None] + weight.to(q.dtype).float() @ v[:, :, key]
            peak = higher
        safe = torch.where(total == 0, 1.0, total)
        out[:, :, start : start + TILE] = (acc / safe[..., None]).to(q.dtype)
        lse[:, :, start : start + TILE] = torch.where(total == 0, -torch.inf, peak + safe.log())
    return out, lse


def rounded_up(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with its first tile rounded up: the oldest keys of the window are lost in some rows."""
    return attend(q, k, v, q_offset, first_tile=TILE - 1)


def main() -> None:
    """Check the right kernel, then the wrong one."""
    claims: dict[str, Any] = {"implements": WINDOW, "lse": True, "tiles": (TILE, TILE)}
    right = sd.testing.check(sd.testing.Kernel(attend, **claims), examples=12, seed=0)
    print(right)
    assert right.ok

    wrong = sd.testing.check(sd.testing.Kernel(rounded_up, **claims), examples=12, seed=0, stop_at_first=True)
    print(f"\n{wrong}")
    assert not wrong.ok


if __name__ == "__main__":
    main()
