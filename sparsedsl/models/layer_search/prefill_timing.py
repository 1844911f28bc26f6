"""How long a layer's attention takes over a text, with each candidate and by itself: measured."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.models.layer_search.candidates import NATIVE, Candidate, put_in
from sparsedsl.models.layer_search.costs import Costs
from sparsedsl.models.layer_search.partial_forward import Body
from sparsedsl.models.layer_search.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["prefill_times"]

ROUNDS = 3  # after one that compiles; the least counts, since other work on the machine only adds


class _Enough(Exception):
    """The layer that is timed has run; those above it need not."""


def prefill_times(
    model: PreTrainedModel, body: Body, ids: torch.Tensor, layers: Mapping[int, Any], candidates: Mapping[str, Candidate],
    backend: str, progress: Progress,
) -> Costs:  # fmt: skip
    """Seconds of the attention module of each layer over token ids ``(1, S)``: projections (the same for all), choosing, attention.

    Options take turns, ``ROUNDS`` times.
    """
    found: Costs = {layer: {} for layer in layers}
    with progress.stage("prefill times", (ROUNDS + 1) * len(layers) * (len(candidates) + 1)), torch.no_grad():
        for layer, module in layers.items():
            _, recorded = body.recorded(ids, [layer])
            for number in range(ROUNDS + 1):
                for name in (NATIVE, *candidates):
                    chosen = {} if name == NATIVE else {layer: candidates[name]}
                    seconds = _seconds(model, body, ids, layer, module, recorded, chosen, backend)
                    if number > 0:
                        found[layer][name] = min(seconds, found[layer].get(name, seconds))
                    progress.step()
    return found


def _seconds(
    model: PreTrainedModel, body: Body, ids: torch.Tensor, layer: int, module: Any, recorded: Mapping[int, Any],
    chosen: Mapping[int, Candidate], backend: str,
) -> float:  # fmt: skip
    began: list[float] = []

    def begin(*_: Any) -> None:
        began.append(_now(ids.device))

    def end(*_: Any) -> None:
        began.append(_now(ids.device))
        raise _Enough

    put = put_in(model, chosen, backend=backend) if chosen else None
    hooks = module.register_forward_pre_hook(begin), module.register_forward_hook(end)
    try:
        body.hidden_from(ids, layer, recorded)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
        if put is not None:
            put.restore()
    first, last = began
    return last - first


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
