"""How each kernel of a call is compiled and launched: what was measured, what the cost model expects, or the stopwatch itself."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sparsedsl.backends.triton.limits import LIMITS
from sparsedsl.backends.triton.prepared import Prepared
from sparsedsl.gpu.autotune import Chosen, Unusable, choose
from sparsedsl.gpu.configs import Config, Shape, Work
from sparsedsl.gpu.loading import interpreted
from sparsedsl.gpu.resources import misfits, resources_of
from sparsedsl.gpu.settling import settled
from sparsedsl.gpu.targets import Target, device_target, target_named
from sparsedsl.gpu.tuning_records import TuningKey, tuning_key

__all__ = ["chosen", "median_seconds", "target_of"]

# What a GPU without one at hand is taken to be.
ASSUMED = "sm_90"
SAMPLES = 5
# More than any second-level cache holds.
FLUSHED_BYTES = 1 << 28


def chosen(kernel: str, shape: Shape, prepared: Prepared, run: Callable[[Config, bool], Any] | None) -> Chosen:
    """The config of a kernel. ``run(config, dry)`` launches it, or with ``dry`` only compiles it and gives Triton's kernel."""
    if interpreted():
        return Chosen(LIMITS.now.interpreted, "interpreted")
    device, variant = prepared.device, prepared.variant
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    measure = None
    if run is not None and device.type == "cuda" and not capturing:
        measure = functools.partial(_seconds, run, device)
    written = f"{prepared.pattern.key} {variant.keys} {variant.queries} {variant.decode_keys} {variant.step} {variant.wide}"
    written += " placed" if variant.placed else ""
    target = target_of(device)
    # Decode meets another length at every step, so nothing is counted for it.
    few = kernel in ("decode", "merge")
    key = tuning_key(written, kernel, shape, "few queries" if few else prepared.density, target)
    found = choose(kernel, shape, target, key, measure, work=Work() if few else prepared.work)
    if found.seconds is None and kernel in ("forward", "left", "grad_q", "grad_kv"):
        heavy = prepared.heavy_last[kernel == "grad_kv"]
        # What loads through descriptors gain differs from GPU to GPU: they are taken where they were measured.
        found = replace(found, config=replace(found.config, heavy_first=heavy, descriptors=False))
    if found.seconds is None and run is not None and device.type == "cuda":
        return _settled(kernel, found, target, key, run)
    return found


# Configs that were not measured, as they were found to fit: what a pattern reads takes room that no estimate knows of.
_fitting: dict[tuple[TuningKey, Config], Config] = {}


def _settled(kernel: str, found: Chosen, target: Target, key: TuningKey, run: Callable[[Config, bool], Any]) -> Chosen:
    """The same choice if its kernel fits and spills nothing, else the nearest lighter one; compiled once, not launched."""
    known = _fitting.get((key, found.config))
    if known is None:
        known = settled(kernel, found.config, target, lambda config: run(config, True), resources_of)[0]
        _fitting[key, found.config] = known
    if known == found.config:
        return found
    return replace(found, config=known, source=f"{found.source}, lighter: {found.config} did not fit")


def _seconds(run: Callable[[Config, bool], Any], device: torch.device, config: Config) -> float | Unusable:
    """Median seconds of a launch; nothing is launched that does not fit. What spills may still be the fastest: the clock decides."""
    found = resources_of(run(config, True))
    reasons = misfits(found, target_of(device))
    if reasons:
        return Unusable("; ".join(reasons))
    return median_seconds(lambda: run(config, False), device)


def median_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median seconds of a few calls with cold caches, after one that compiles and prepares."""
    with torch.cuda.device(device):
        call()
        scratch = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
        took = []
        for _ in range(SAMPLES):
            scratch.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            took.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(took)


@functools.cache
def _device_target(index: int) -> Target:
    return device_target(index)


def target_of(device: torch.device) -> Target:
    """The facts of a device; of a Hopper GPU where there is none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return target_named(ASSUMED)
    return _device_target(torch.cuda.current_device() if device.index is None else device.index)
