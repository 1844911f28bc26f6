"""Attention on a CUDA device: ours beside compiled FlexAttention and dense SDPA, forward, backward and decode, in eight minutes.

    python benchmarks/gpu.py                                # everything, in at most eight minutes
    python benchmarks/gpu.py --tune                         # ours with measured choices; two of the minutes go to measuring them
    python benchmarks/gpu.py --patterns causal window       # some of it; also --lengths, --dims, --kinds
    python benchmarks/gpu.py --dry-run                      # the same steps without a GPU, at toy sizes (a minute)
    python benchmarks/gpu.py --picture results/gpu_x.json   # table and picture again, from the numbers in a file

Batch 1, 16 query heads, bf16, random inputs; decode: one query in each of 8 batch entries, 32 query heads, 8 key heads; systems that
choose, reorder and remember: 32 query heads, as ``gpu_systems.py`` says. Methods:

- *ours*: ``attn(q, k, v)`` of ``sd.compile(pattern, backend="triton")`` (``--ours`` for another backend), lists or bounds remembered.
- *flex*: ``torch.compile(flex_attention, dynamic=False)`` with mask and score written by hand; *flex_tma*: with ``USE_TMA``.
- *sdpa_flash*, *sdpa_cudnn*: ``scaled_dot_product_attention``, beside the causal and the full pattern. What torch lacks is said.

The forward pass is that of training (the LSE is kept) but for decoding. Every method is checked in the same run against a
textbook in float32 with the hand-written mask (``gpu_reference.py``); a wrong one is marked, and is in no goal. Methods take turns;
ratios are medians of the ratios within a round. *TFLOP/s* counts the allowed pairs, exactly, and in *tiles* the pairs of the listed
tiles of 128 x 128, the same for all methods: 4 operations an entry of a head forward, 10 backward.

One process has the device, others compile ahead of it while it waits. A crash or a hang costs the method that did it. Results are
written after every job. Jobs that do not fit into what is left of the time are left out, the longest first, and are named.
"""

from __future__ import annotations

import argparse
import datetime
import os
import queue
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import gpu_report
import measure
from gpu_process import Process, ProcessDied
from tqdm import tqdm

# A method that hangs must not take all of the time.
LONGEST_JOB_S, LONGEST_REQUEST_S = 90.0, 180.0  # the first import of torch on a new machine takes a minute
CRASHES_BORNE = 3
# Measuring the choices for one kernel: so long, and so long more for what it must compile before, and for the candidate it is at.
TUNE_KERNEL_S, TUNE_MORE_S = 15.0, 60.0
KINDS = ("attention", "decode", "system")


def options_from(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="for everything (default 8)")
    add("--dry-run", action="store_true", help="toy sizes on CPU, with the wall clock: do all the steps run?")
    add("--ours", default="triton", help="our backend (default triton)")
    add("--patterns", nargs="+", help="default: all")
    add("--lengths", nargs="+", type=int, metavar="TOKENS")
    add("--dims", nargs="+", type=int, metavar="D", help="head dimensions")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS)
    add("--rounds", type=int, default=15, help="at most so many repetitions behind each median (default 15)")
    add("--limit-s", type=float, default=1.0, help="no more rounds of a pass after this, but three (default 1)")
    add("--prepare-minutes", type=float, default=2.0, help="at most so long for compiling ahead (default 2; 0: do not)")
    add("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile ahead (default: cores less two)")
    add("--tune", action="store_true", help="let ours measure its choices first; without it they come from the default table")
    add("--tune-minutes", type=float, default=2.0, help="at most so long for that (default 2)")
    add("--commit", help="what is measured, where this is no git checkout")
    add(
        "--out",
        type=Path,
        help="JSON file (default: benchmarks/results/gpu_<device>_<date>.json); table and picture lie beside it",
    )
    add("--log", type=Path, help="where the measuring processes write what they print (default: nowhere)")
    add("--picture", type=Path, metavar="JSON", help="write table and picture of these results, and nothing else")
    options = parser.parse_args(arguments)
    if options.picture is not None and not options.picture.is_file():
        parser.error(f"--picture wants a file that gpu.py wrote; {options.picture} does not exist")
    return options


class Run:
    """One run: its time, its processes, and what was found so far."""

    def __init__(self, options: argparse.Namespace, cache: str) -> None:
        self.options = options
        self.deadline = time.monotonic() + 60 * options.minutes
        self.device = "cpu" if options.dry_run else "cuda"
        self.env = {
            "SPARSEDSL_TUNE": "cached" if options.tune else "off",
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch",
            "TRITON_CACHE_DIR": f"{cache}/triton",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "SPARSEDSL_CACHE": os.environ.get("SPARSEDSL_CACHE", f"{cache}/sparsedsl"),
        }
        if options.dry_run:  # Triton looks when it is imported, in each process
            self.env["TRITON_INTERPRET"] = "1"
        self.path: Path | None = options.out
        self.content: dict[str, Any] = {"benchmark": "gpu", "machine": {}, "settings": _settings(options)}
        self.content |= {"ceilings": None, "prepared": {}, "tuned": {}, "untuned": [], "records": [], "lost": [], "dropped": []}
        self.content |= {"waiting": [], "targets": []}
        self.process: Process | None = None

    @property
    def left_s(self) -> float:
        """Seconds of the budget that remain."""
        return self.deadline - time.monotonic()

    def start(self, **env: str) -> Process:
        """A process that can be asked."""
        return Process(self.device, self.options.ours, self.env | env, self.options.log)

    def ask(self, request: dict[str, Any], limit_s: float = LONGEST_REQUEST_S) -> dict[str, Any]:
        """Ask the process that measures; after it died, a new one."""
        if self.process is None:
            self.process = self.start()
        try:
            return self.process.ask(request, min(limit_s, max(5.0, self.left_s)))
        except ProcessDied:
            self.process = None
            raise

    def write(self) -> None:
        """Put what was found into the file, whole."""
        if self.path is None:
            facts = self.content["machine"]
            device = re.sub(r"[^a-z0-9]+", "-", str(facts.get("device", "unknown")).lower()).strip("-")
            self.path = measure.RESULTS / f"gpu_{device}_{datetime.datetime.now(datetime.UTC):%Y-%m-%d}.json"
        measure.write_json(self.path, self.content)

    # ---- the stages --------------------------------------------------------------------------------------------------

    def prepare(self, jobs: list[dict[str, Any]]) -> None:
        """Compile ahead of the measurements in processes of their own, the first jobs first."""
        waiting: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        for job in jobs:
            waiting.put(job)
        until = time.monotonic() + min(60 * self.options.prepare_minutes, self.left_s / 3)
        # Ours is compiled with the built-in choices: measuring them here would be measuring beside others.
        threads = [threading.Thread(target=self._prepare_some, args=(waiting, until)) for _ in range(self.options.processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _prepare_some(self, waiting: queue.SimpleQueue[dict[str, Any]], until: float) -> None:
        process = None
        while time.monotonic() < until and not waiting.empty():
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                break
            process = process or self.start(SPARSEDSL_TUNE="off")
            try:
                found = process.ask({"op": "prepare", "job": job}, until - time.monotonic())
                self.content["prepared"][_name(job)] = found
            except ProcessDied as death:
                self.content["prepared"][_name(job)] = f"lost: {death}"
                process = None
        if process is not None:
            process.end()

    def tune(self, pieces: list[tuple[dict[str, Any], str | None]]) -> None:
        """Let ours measure its choices, kernel by kernel; written down after each, so that whatever ends this costs one kernel."""
        until = time.monotonic() + min(60 * self.options.tune_minutes, self.left_s / 2)
        process = None
        for job, kernel in pieces:
            budget_s = min(TUNE_KERNEL_S, until - time.monotonic())
            if budget_s <= 0:
                self.content["untuned"].append(f"{_name(job)}: {kernel or 'all'}")
                continue
            process = process or self.start()
            request = {"op": "tune", "job": job, "kernel": kernel, "budget_s": budget_s}
            found = self.content["tuned"].setdefault(_name(job), {})
            try:
                found |= process.ask(request, min(budget_s + TUNE_MORE_S, max(5.0, self.left_s)))
            except ProcessDied as death:
                found[kernel or "all"] = f"lost: {death}"
                process = None
            self.write()
        if process is not None:
            process.end()

    def measure(self, job: dict[str, Any]) -> None:
        """Measure one job; a method in which the process died is left out the next time."""
        skip: dict[str, str] = {}
        for _ in range(1 + CRASHES_BORNE):
            request = {"op": "measure", "job": job, "skip": skip}
            request |= {"rounds": self.options.rounds, "limit_s": self.options.limit_s}
            try:
                self.content["records"].append(self.ask(request, LONGEST_JOB_S))
                return
            except ProcessDied as death:
                if death.at not in gpu_report.METHODS or death.at in skip or self.left_s < 20:
                    self.content["lost"].append({"job": job, "why": str(death)})
                    return
                skip[death.at] = str(death)

    def all(self) -> None:
        """Stage after stage, written down after each."""
        self.process = self.start()  # it loads torch while this process does
        from gpu_cases import chosen, jobs, rehearsal, tuned_first

        options = self.options
        among = rehearsal() if options.dry_run else jobs()
        wanted = chosen(among, options.patterns, options.lengths, options.dims, options.kinds)
        if not wanted:
            raise SystemExit("no job has these patterns, lengths, head dimensions and kinds; python benchmarks/gpu.py --help")
        self.content["machine"] = self.ask({"op": "facts"}) | ({"commit": options.commit} if options.commit else {})
        self.write()
        if options.prepare_minutes > 0:
            self.prepare([job.to_json() for job in wanted])
            self.write()
        sizes = {"size": 64, "copy_bytes": 1 << 16} if options.dry_run else {"size": 8192, "copy_bytes": 4 << 30}
        self.content["ceilings"] = self.ask({"op": "ceilings"} | sizes)
        if options.tune:
            self.tune([(job.to_json(), kernel) for job, kernel in tuned_first(wanted)])
        waiting = self.content["waiting"] = [job.to_json() for job in wanted]
        self.write()
        for job in tqdm(wanted, desc="gpu", unit="job"):
            if self.left_s < (0.0 if options.dry_run else job.seconds):
                self.content["dropped"].append(job.to_json())
            else:
                self.measure(job.to_json())
                self.content["targets"] = gpu_report.targets(self.content)
            waiting.pop(0)
            self.write()
        if self.process is not None:
            self.process.end()


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def _name(job: dict[str, Any]) -> str:
    return f"{job['kind']} {job['pattern']} {job['length']} D{job['head_dim']} {job['heads']}:{job['kv_heads']}"


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results, print the tables and how the goals were met; 0 however they were met."""
    options = options_from(arguments)
    if options.picture is not None:
        print(gpu_report.write_beside(options.picture))
        return 0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as cache:
        run = Run(options, cache)
        try:
            run.all()
        finally:
            run.content["benchmark_s"] = round(time.perf_counter() - began, 1)
            if run.content["machine"]:
                run.write()
    assert run.path is not None
    print(gpu_report.write_beside(run.path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
