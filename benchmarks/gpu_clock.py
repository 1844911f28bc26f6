"""How ``gpu.py`` measures: a clock for the device, its ceilings, and what is known about it.

On CUDA a time is what passes on the device between two events around a call, all inputs out of the L2 cache. The device is kept
busy until the host has queued the call, so that the host's own time does not count; that stands beside it as ``host_s``. Elsewhere
(``--dry-run``) it is the wall clock.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

__all__ = ["Clock", "Samples", "ceilings", "clock_for", "clock_state", "device_facts"]

Action = Callable[[], Any]
FLUSH_BYTES = 256 << 20  # several times the L2 of any device so far
LONGEST_SPIN_S = 0.02


@dataclass
class Samples:
    """Seconds of every call of one action: on the device, and on the host until the call had returned."""

    device_s: list[float] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Medians, the fastest, and every time on the device."""
        return {
            "s": median(self.device_s),
            "best_s": min(self.device_s),
            "host_s": median(self.host_s),
            "all_s": [float(f"{s:.4g}") for s in self.device_s],
        }


class Clock:
    """The wall clock, for calls that are over when they return."""

    def wait(self) -> None:
        """Until the device has done everything."""

    def round(self, actions: Mapping[str, Action], order: list[str], found: dict[str, Samples]) -> None:
        """Run each action once, in this order, and add its times."""
        for name in order:
            start = time.perf_counter()
            actions[name]()
            elapsed = time.perf_counter() - start
            found[name].device_s.append(elapsed)
            found[name].host_s.append(elapsed)

    def take_turns(self, actions: Mapping[str, Action], rounds: int, limit_s: float) -> dict[str, Samples]:
        """Rounds of all actions in turn, their order reversed in every second; after three they end once ``limit_s`` is spent."""
        found = {name: Samples() for name in actions}
        began = time.perf_counter()
        for number in range(rounds):
            if number >= 3 and time.perf_counter() - began > limit_s:
                break
            self.round(actions, list(actions) if number % 2 == 0 else list(actions)[::-1], found)
        return found


class CudaClock(Clock):
    """CUDA events."""

    def __init__(self, device: str = "cuda") -> None:
        self._flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
        self._cycles_a_second = self._measure_spin()

    def _measure_spin(self) -> float:
        cycles = 2_000_000
        torch.cuda._sleep(cycles)
        self.wait()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        self.wait()
        return cycles / (start.elapsed_time(end) / 1e3)

    def wait(self) -> None:
        """Until the device has done everything."""
        torch.cuda.synchronize()

    def round(self, actions: Mapping[str, Action], order: list[str], found: dict[str, Samples]) -> None:
        """Run each action once, in this order, and add its times."""
        for name in order:
            # Twice what the host took in the last round; in the first round a guess, which is why medians are taken.
            ahead_s = min(LONGEST_SPIN_S, 2 * found[name].host_s[-1] if found[name].host_s else 0.002)
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._flush.zero_()
            torch.cuda._sleep(int(ahead_s * self._cycles_a_second))
            start = time.perf_counter()
            events[0].record()
            kept = actions[name]()
            events[1].record()
            host_s = time.perf_counter() - start
            self.wait()
            del kept
            found[name].device_s.append(events[0].elapsed_time(events[1]) / 1e3)
            found[name].host_s.append(host_s)


def clock_for(device: str) -> Clock:
    """The clock of a device, by its type."""
    return CudaClock() if device == "cuda" else Clock()


# ---- what the device can do ------------------------------------------------------------------------------------------


def ceilings(clock: Clock, device: str, size: int, copy_bytes: int) -> dict[str, float]:
    """The device's own best: a bf16 product of ``size`` cubed on random numbers (FLOP/s), and a copy, bytes read and written a second."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(0, 255, (copy_bytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    actions: dict[str, Action] = {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    for action in actions.values():
        action()
    found = clock.take_turns(actions, 15, limit_s=5.0)
    return {
        "product_size": size,
        "product_flop_s": 2 * size**3 / median(found["product"].device_s),
        "copy_bytes_s": 2 * copy_bytes / median(found["copy"].device_s),
    }


def device_facts(device: str) -> dict[str, Any]:
    """Name, driver and versions."""
    found: dict[str, Any] = {"device": device, "cuda": torch.version.cuda, "triton": _triton_version()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "device_memory_gib": round(properties.total_memory / 2**30, 1),
            "cudnn": torch.backends.cudnn.version(),
        }
    return found | {"driver": _nvidia_smi("driver_version")[0]}


def _triton_version() -> str:
    try:
        import triton
    except ImportError as error:
        return f"not available: {error}"
    return str(triton.__version__)


CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu", "utilization.gpu")


def clock_state() -> dict[str, str]:
    """Clocks, power and temperature as the driver reports them now."""
    return dict(zip(CLOCK_FIELDS, _nvidia_smi(*CLOCK_FIELDS), strict=True))


def _nvidia_smi(*fields: str) -> list[str]:
    """Values of these fields for the first device; if they cannot be had, the reason in each place."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ["not available: no nvidia-smi"] * len(fields)
    command = [tool, "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"not available: {error}"] * len(fields)
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return values if len(values) == len(fields) else ["not available: unexpected answer of nvidia-smi"] * len(fields)
