"""Part ``first`` of ``cpu.py``: the first call of a new process, from a declared pattern to the result. What declaring and compiling import
(sympy, networkx, the library itself: `imports`, told beside it) is loaded before. Backend `auto`, which waits two seconds for a compiler.

*not built*: the cache folder of sparsedsl is empty, so that C++ is built and the machine measured. *built before*: the same again, once
the builds are done: a process waits for its own before it ends, after its time was taken.
This file is also the script of that process.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cpu_record import Job, Record

WORKS = {"window": "first call: window 1024", "moba": "first call: MoBA, 3 of 512"}
# Goals, in seconds.
GOALS = {"not built": 2.5, "built before": 0.3}  # in the order of the processes


def measure_first(job: Job) -> Iterator[Record]:
    """Two records."""
    import measure
    from cpu_record import judge, new_record

    times: dict[str, list[float]] = {state: [] for state in GOALS}
    imports: list[float] = []
    for _ in range(job.rounds):
        with tempfile.TemporaryDirectory(prefix="first-call-") as cache:
            for state, taken in times.items():
                words = [str(Path(__file__)), job.work, str(job.length), str(job.dim), job.dtype]
                found, death = measure.run_child(words, {"SPARSEDSL_CACHE": cache})
                if death is not None:
                    raise RuntimeError(f"first call, {state}: {death}")
                taken.append(found["s"])
                imports.append(found["imports"])
    for state, taken in times.items():
        record = new_record(job, f"{WORKS[job.work]}, {state}")
        record |= {
            "state": state,
            "median": {"ours": measure.median(taken)},
            "best": {"ours": min(taken)},
            "imports_s": measure.median(imports),
        }
        judge(record, "seconds", record["median"]["ours"], at_most=GOALS[state])
        yield record


def _call(work: str, length: int, dim: int, dtype: str) -> tuple[float, float]:
    """Seconds of the first call of this process, and of what it imports."""
    import torch

    import sparsedsl as sd

    q, k, v = (torch.randn(1, 4, length, dim).to(getattr(torch, dtype)) for _ in range(3))
    with torch.no_grad():
        before = time.perf_counter()
        declared = sd.patterns.sliding_window(1024) if work == "window" else sd.patterns.moba(512, 3)
        compiled = sd.compile
        start = time.perf_counter()
        compiled(declared)(q, k, v)
        seconds = time.perf_counter() - start
        compiled(declared, backend="cpp")(q, k, v)
        return seconds, start - before


if __name__ == "__main__":
    seconds, imports = _call(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    print(f'{{"s": {seconds}, "imports": {imports}}}')
