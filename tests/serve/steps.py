"""What a server asks of layers in the stand-in of vLLM: patterns, what they are to give, and steps of every make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import sparsedsl as sd
from tests.serve import stand_in
from tests.serve.stand_in import Engine, Request, dense

__all__ = [
    "CAUSAL", "FIRST", "SECOND", "STREAM", "THIRD", "THIRDS", "by_mask", "causal", "prompts", "serve", "streams", "thirds", "windowed",
]  # fmt: skip

Tensor = torch.Tensor
CAUSAL = sd.kv_idx <= sd.q_idx
FIRST, SECOND, THIRD = (f"model.layers.{n}.self_attn.attn" for n in range(3))
Allowed = Callable[[Tensor, Tensor], Tensor]

# Patterns, and the same by a formula of positions.
STREAM = sd.patterns.streaming_llm(6, sink_count=2)
THIRDS = CAUSAL & ((sd.kv_idx % 3 == 0) | (sd.q_idx - sd.kv_idx < 2))


def causal(q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def streams(q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & ((q - k < 6) | (k < 2))


def thirds(q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & ((k % 3 == 0) | (q - k < 2))


def windowed(window: int) -> Allowed:
    return lambda q, k: (k <= q) & (q - k < window)


def by_mask(
    engine: Engine, masks: dict[str, Allowed], *, element: torch.dtype | None = None, **words: Any
) -> Callable[..., Tensor]:  # fmt: skip
    """What each layer is to give, of a cache that holds numbers as ``element``."""

    def wanted(name: str, request: Request, more: int) -> Tensor:
        tokens = request.tokens[: request.seen + more]
        q, k, v = (engine.rows(name, what, tokens) for what in "qkv")
        if element is not None:
            k, v = (stored(x.float(), scale, element) for x, scale in ((k, 0.5), (v, 0.25)))
        at = torch.arange(len(tokens))
        allowed = masks[name](at[request.seen :, None], at)
        return dense(q[request.seen :], k, v, engine.scale, allowed[None] if allowed.ndim == 2 else allowed, **words)

    return wanted


def stored(x: Tensor, scale: float, element: torch.dtype) -> Tensor:
    most = torch.finfo(element).max
    return (x / scale).clamp(-most, most).to(element).double() * scale


def prompts(*lens: int) -> list[Request]:
    made = torch.Generator().manual_seed(3)
    return [Request(torch.randint(stand_in.VOCAB, (n,), generator=made).tolist()) for n in lens]


def serve(engine: Engine, wanted: Callable[..., Tensor], *, share: bool) -> None:
    """Prompts, pieces of them, decoding with padding, a shared prefix, a preemption, a request that is done, pages used again."""
    a, b, c, d, e = prompts(60, 50, 40, 30, 30)
    engine.step([(a, 7), (b, 16), (c, 9)], wanted)
    engine.step([(a, 1), (b, 13), (c, 3)], wanted, padding=3)
    engine.step([(a, 1), (b, 1), (c, 1)], wanted, padding=5, empty=2)
    d.tokens[:22] = b.tokens[:22]
    if share:
        engine.share(d, b)
    engine.step([(d, 25 - d.seen), (a, 12), (b, 1)], wanted, padding=1)
    engine.drop(b)  # preempted
    engine.step([(a, 1), (c, 20), (d, 1)], wanted)
    engine.drop(a)  # done
    engine.step([(b, 33), (e, 20), (d, 1)], wanted)
    for _ in range(3):
        engine.step([(b, 1), (c, 1), (d, 1), (e, 2)], wanted, padding=2, empty=1)
