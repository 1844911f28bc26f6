"""What the benchmarks share: clocks, memory, the machine, and how results are written. Linux only (memory is read from /proc)."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
MIB = 2**20


# ---- time --------------------------------------------------------------------------------------------------


def seconds(action: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call; what it returns is dropped outside the measurement."""
    start = time.perf_counter()
    kept = action()
    elapsed = time.perf_counter() - start
    del kept
    return elapsed


def alternate(
    actions: Mapping[str, Callable[[], Any]],
    rounds: int,
    limit_s: float = math.inf,
    done: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of every call, the actions in turn, their order reversed in every second round.

    Rounds end early once all actions have run three times and ``limit_s`` is spent. ``done`` is called after every call.
    """
    found: dict[str, list[float]] = {name: [] for name in actions}
    began = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - began > limit_s:
            break
        order = list(actions) if number % 2 == 0 else list(actions)[::-1]
        for name in order:
            found[name].append(seconds(actions[name]))
            done()
    return found


def median(values: Iterable[float]) -> float:
    """The median."""
    return statistics.median(values)


# ---- memory ------------------------------------------------------------------------------------------------


def _status(field: str) -> int:
    """Bytes of one ``Vm...`` line of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {field}: these benchmarks need Linux")
    return int(found.group(1)) * 1024


def _give_back() -> None:
    """Return freed heap to the system, so that memory used again counts as growth again."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc has it, others need not
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(action: Callable[[], Any]) -> int:
    """Growth of the resident memory of this process at its highest during one call, results included."""
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = _status("VmRSS")
    kept = action()
    peak = _status("VmHWM")
    del kept
    return max(0, peak - before)


def limit_memory(more_bytes: int) -> int:
    """Let this process map at most ``more_bytes`` beyond what it has mapped; allocations past that raise. Returns the limit set.

    Never more than the machine has free, less 2 GiB for others.
    """
    import resource

    free = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if free is not None:
        more_bytes = min(more_bytes, max(MIB, int(free.group(1)) * 1024 - 2 * 2**30))
    top = _status("VmSize") + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (top, resource.getrlimit(resource.RLIMIT_AS)[1]))
    return more_bytes


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what it came from, says that memory was refused."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or re.search(r"alloc.*memory|bad_alloc|out of memory", str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


# ---- targets -----------------------------------------------------------------------------------------------


def target(what: str, got: float, *, at_least: float | None = None, at_most: float | None = None) -> dict[str, Any]:
    """What was wanted, what was measured, and whether it will do: a record for the JSON file and :func:`verdicts`."""
    if at_least is not None and at_most is None:
        return {"what": what, "got": got, "wanted": "at least", "limit": at_least, "pass": bool(got >= at_least)}
    if at_most is not None and at_least is None:
        return {"what": what, "got": got, "wanted": "at most", "limit": at_most, "pass": bool(got <= at_most)}
    raise ValueError(f"{what}: give at_least or at_most")


def verdicts(targets: Iterable[Mapping[str, Any]]) -> str:
    """One line a target."""
    return "\n".join(
        f"{'pass' if t['pass'] else 'MISS'}: {t['what']}: {t['got']:.3g}, target {t['wanted']} {t['limit']:g}" for t in targets
    )


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean: of ratios, the mean that has no favourite side."""
    return statistics.geometric_mean(values)


# ---- the machine and the results ---------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and when."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "avx512": torch.cpu._is_avx512_supported(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "load_average": load(),
    }


def load() -> float:
    """Runnable processes over the last minute; above 1 others were at work when the run began."""
    return round(os.getloadavg()[0], 2)


def _cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _commit() -> str:
    """Hash of the checkout, with ``-dirty`` if the measured code differs from it; ``unknown`` outside git."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(facts: Mapping[str, Any]) -> str:
    """The machine in one line."""
    return (
        f"{facts['cpu']}, {facts['cores']} cores ({facts['torch_threads']} torch threads), {facts['memory_gib']} GiB, "
        f"{facts['system']}, Python {facts['python']}, torch {facts['torch']}, commit {facts['commit']}, {facts['date']}, "
        f"load average at the start {facts['load_average']}"
    )


def rates() -> dict[str, Any]:
    """What sparsedsl believes about this machine, and where from: schedules and the choice of backend follow it."""
    from sparsedsl.tuning.rates import machine as rates_of_machine

    return rates_of_machine().to_json()


def result_path(benchmark: str, facts: Mapping[str, Any]) -> Path:
    """``results/<benchmark>_<cpu>-<cores>.json``."""
    cpu = re.sub(r"[^a-z0-9]+", "-", str(facts["cpu"]).lower()).strip("-")
    return RESULTS / f"{benchmark}_{cpu}-{facts['cores']}cores.json"


def one_line_a_record(content: Mapping[str, Any]) -> str:
    """JSON with a line for every key, and for every record of a list of records: a change of a number changes a line.

    >>> print(one_line_a_record({"benchmark": "x", "records": [{"a": 1, "b": [2]}, {"a": 3}]}), end="")
    {
     "benchmark": "x",
     "records": [
      {"a": 1, "b": [2]},
      {"a": 3}
     ]
    }
    """
    lines = []
    for key, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list) and any(isinstance(record, dict) for record in value):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        lines.append(f"{json.dumps(key)}: {text}")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write the whole file or nothing of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(one_line_a_record(content))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def run_child(arguments: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[dict[str, Any], str | None]:
    """Run a script of this folder in a process of its own; it prints one JSON object a line, which are merged.

    Also how it died, if it did: what was printed before counts.
    """
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **(env or {})})
    found: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found.update(json.loads(line))
    if done.returncode == 0:
        return found, None
    last = done.stderr.strip().splitlines()[-1:] or ["no message"]
    return found, f"exit status {done.returncode}: {last[0]}"


# ---- text --------------------------------------------------------------------------------------------------


def length_text(tokens: int) -> str:
    """4096 -> 4K."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return f"{tokens:,}"


def time_text(value: float) -> str:
    """Seconds with a fitting unit and about three digits."""
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def bytes_text(value: float) -> str:
    """Bytes in MiB, or GiB from one on."""
    if value >= 2**30:
        return f"{value / 2**30:.3g} GiB"
    return f"{value / MIB:.2g} MiB" if value < 10 * MIB else f"{value / MIB:.0f} MiB"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are aligned to the right."""
    lines = [list(header), ["---", *("---:" for _ in header[1:])], *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
