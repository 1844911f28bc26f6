"""Which backend ``auto`` takes on CUDA: what was measured for calls like this one, if it was; measured now under ``SPARSEDSL_TUNE=full``.

The records lie beside those of the kernels' configs and are as safe: nothing that is damaged, foreign or impossible is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from sparsedsl.backends.triton.config_choice import median_seconds, target_of
from sparsedsl.gpu.configs import Shape
from sparsedsl.gpu.tuning_records import tuning_key
from sparsedsl.quantities import seconds_text
from sparsedsl.runtime.call import Call
from sparsedsl.settings import settings, tune_mode
from sparsedsl.tuning.store import Store

__all__ = ["fastest_backend"]

KIND = "backend"

logger = logging.getLogger("sparsedsl")

_known: dict[Any, tuple[str, str] | None] = {}


def fastest_backend(
    pattern_key: str, density: str, call: Call, backends: Sequence[str], run: Callable[[str], Callable[[], Any]]
) -> tuple[str, str] | None:
    """The fastest of ``backends`` for calls like this one, and where that is known from; None if it is not known.

    ``run(backend)``: a function that makes the call on that backend, with gradients if the call wants them.
    """
    mode = tune_mode()
    if mode == "off":
        return None
    target = target_of(call.q.device)
    shape = Shape(str(call.q.dtype).removeprefix("torch."), call.q.shape[3], call.v.shape[3], call.group)
    place = tuning_key(pattern_key, "training" if call.needs_grad else "inference", shape, density, target)
    key = {**place.to_json(), "kind": KIND, "backends": sorted(backends)}
    known = (mode, place, tuple(backends))
    if known not in _known:
        _known[known] = _recalled(key, backends)
        if _known[known] is None and mode == "full":
            if torch.cuda.is_current_stream_capturing():
                del _known[known]
                return None
            _known[known] = _measured(key, backends, run, call.q.device)
    return _known[known]


def _store() -> Store:
    return Store(settings().cache / "tuning")


def _recalled(key: dict[str, Any], backends: Sequence[str]) -> tuple[str, str] | None:
    record = _store().get(key)
    if not isinstance(record, dict) or record.get("fastest") not in backends or not isinstance(record.get("date"), str):
        return None
    return record["fastest"], f"measured to be the fastest on {record['date']}"


def _measured(
    key: dict[str, Any], backends: Sequence[str], run: Callable[[str], Callable[[], Any]], device: torch.device
) -> tuple[str, str] | None:
    took: dict[str, float] = {}
    for backend in backends:
        try:
            took[backend] = median_seconds(run(backend), device)
        except Exception as error:  # a compiler, memory: a candidate may fail in any way, the call goes on with another
            logger.info("backend %s was not measured: %s: %s", backend, type(error).__name__, error)
    if not took:
        return None
    best = min(took, key=took.__getitem__)
    date = datetime.now(UTC).isoformat(timespec="seconds")[:10]
    _store().put(key, {"fastest": best, "date": date, "seconds": took})
    return best, "measured just now: " + ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in took.items())
