"""What q, k and v hold: classes of values, each of which shows faults that others hide. By seed, never element by element."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["VALUES", "fill"]

Tensor = torch.Tensor

# Every class and what it is for.
VALUES = {
    "normal": "N(0, 1)",
    "three": "N(0, 1) times 3: gradients of weights near 0 and 1",
    "equal": "all keys the same: every weight is 1 / n",
    "levels": "two values of logits: maxima tie",
    "rising": "logits rise along the keys: the maximum grows in every tile",
    "falling": "logits fall along the keys",
    "low": "all logits near -200: a maximum that begins at 0 is wrong",
    "very low": "all logits below -5e4: a finite stand-in for minus infinity is too large",
    "huge": "logits of +-300: exp without a maximum overflows",
    "peak": "one logit far above all others",
    "ones": "every v is 1: outputs are 1",
    "all equal": "all keys the same and every v 1: sums of many equal terms",
    "positive": "v far from 0 with a small spread: errors of sums do not cancel",
    "outlier": "one v times 1000, in the last key head: measures of whole tensors see nothing else",
    "denormal": "v below the smallest normal number",
    "negative zero": "half of all numbers are -0.0",
    "heads": "every head of its own size: a head that reads another shows",
    "one-hot": "v says which key it is: outputs are weights",
    "zero q": "all logits 0",
    "integers": "whole numbers from -2 to 2",
}


def fill(sizes: tuple[tuple[int, ...], ...], scale: float, values: str, seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v of these sizes, ``(batch, heads, length, width)``, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (drawn(*shape) for shape in sizes)
    keys = k.shape[2]
    along = torch.arange(keys, dtype=torch.float64)
    match values:
        case "three":
            q, k, v = 3 * q, 3 * k, 3 * v
        case "equal" | "all equal":
            k = k[:, :, :1].expand(k.shape).clone()
        case "levels":
            q, k = _levels(q, k, 4 * (drawn(keys) > 0), scale, noise=0.0)
        case "rising" | "falling":
            steps = (1.5 * along).clamp_max(80)
            q, k = _levels(q, k, steps if values == "rising" else -steps, scale)
        case "low":
            q, k = _levels(q, k, -200 + drawn(keys), scale)
        case "very low":
            q, k = _levels(q, k, -6e4 + 2 * drawn(keys), scale)
        case "huge":
            q, k = _levels(q, k, 300 * drawn(keys).sign(), scale)
        case "peak":
            q, k = _levels(q, k, 200.0 * (along == seed % keys), scale)
        case "positive":
            v = 4 + 0.1 * v
        case "outlier":
            v[:, -1, 0] *= 1000
        case "denormal":
            v = v * torch.finfo(dtype).smallest_normal / 8
        case "negative zero":
            q, k, v = (torch.where(drawn(*x.shape) > 0, -0.0, x) for x in (q, k, v))
        case "heads":
            k, v = (x * (0.3 + 1.7 * torch.arange(x.shape[1], dtype=torch.float64))[None, :, None, None] for x in (k, v))
        case "one-hot":
            v = (along[:, None] % v.shape[3] == torch.arange(v.shape[3])).double().expand(v.shape).clone()
        case "zero q":
            q = torch.zeros_like(q)
        case "integers":
            q, k, v = (x.round().clamp(-2, 2) for x in (q, k, v))
    if values in ("ones", "all equal"):
        v = torch.ones_like(v)
    largest = torch.finfo(dtype).max
    return tuple(x.clamp(-largest, largest).to(dtype) for x in (q, k, v))


def _levels(q: Tensor, k: Tensor, levels: Any, scale: float, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """q and k whose logits are about ``levels``, one a key; the first channel carries them."""
    size = max(float(levels.abs().max()), 1.0)
    root = (size / abs(scale or 1.0)) ** 0.5
    q, k = q * noise, k * noise
    q[..., 0] = root
    k[..., 0] = levels / (scale or 1.0) / root
    return q, k
