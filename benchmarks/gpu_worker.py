"""The process of ``gpu.py`` that has the device: it answers requests, one JSON object a line, until its input ends.

A kernel that fails in earnest takes the device's context, and with it the process: ``gpu.py`` then starts another one and leaves out the
method that was last announced (``at``). Answers go out by the file descriptor that was standard output; whatever libraries print
goes to standard error.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import measure
import torch
import torch._dynamo
import torch._functorch.config
from gpu_cases import PATTERNS, Job, job_of
from gpu_clock import Clock, ceilings, clock_for, clock_state, device_facts
from gpu_peers import COMPILED, METHODS, Call, Setting, Unavailable, problem_of
from gpu_reference import reference
from gpu_systems import CHECKED, system_facts, system_problem, system_reference

import sparsedsl as sd
from sparsedsl.gpu.autotune import Chosen, Session, Tuned, session

Forward = Callable[[], torch.Tensor]


@dataclass
class Ready:
    """A method that has run once: its calls, its results, and what the first calls took, compilation included."""

    forward: Forward
    backward: Callable[[], Any] | None
    results: dict[str, torch.Tensor]
    first_s: float
    no_backward: str | None = None


@dataclass
class Worker:
    """What stays between requests."""

    device: str
    ours: str
    answer: Callable[[dict[str, Any]], None]
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = clock_for(self.device)
        # Backward passes are measured many times over one forward pass; torch's default gives buffers away at the first.
        torch._functorch.config.donated_buffer = False
        # What does not fit into the compile cache would run uncompiled, silently.
        torch._dynamo.config.fail_on_recompile_limit_hit = True

    # ---- requests ----------------------------------------------------------------------------------------------------

    def facts(self, request: dict[str, Any]) -> dict[str, Any]:
        """The machine."""
        return measure.machine() | device_facts(self.device)

    def ceilings(self, request: dict[str, Any]) -> dict[str, Any]:
        """Rates of a product and of a copy."""
        return ceilings(self.clock, self.device, request["size"], request["copy_bytes"]) | {"clocks": clock_state()}

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        """Compile what a job needs into the caches on disk, computing as little as possible."""
        found = {}
        for name, ready in self._ready(job_of(request["job"]), {}, COMPILED, dry=True)[1].items():
            found[name] = ready.first_s if isinstance(ready, Ready) else str(ready)
        return found

    def tune(self, request: dict[str, Any]) -> dict[str, Any]:
        """Call ours on real tensors and structure while it measures the choices for one kernel, or, where none is named, for all.

        What is measured is in the store on disk before the answer: choice, seconds, and the seconds of the default, by kernel."""
        found: dict[str, Any] = {}

        def note(kernel: str, chosen: Chosen, tuned: Tuned | None) -> None:
            if tuned is not None:
                measured = sum(trial.seconds is not None for trial in tuned.trials)
                found[kernel] = {
                    "config": str(chosen.config), "s": chosen.seconds, "default_s": tuned.trials[0].seconds, "measured": measured,
                    "candidates": len(tuned.trials), "took_s": tuned.took_s,
                }  # fmt: skip

        kernels = None if request["kernel"] is None else frozenset({request["kernel"]})
        with session(Session(budget_s=request["budget_s"], kernels=kernels, chosen=note)):
            ready = self._ready(job_of(request["job"]), {}, ("ours",))[1]["ours"]
        return found if isinstance(ready, Ready) else found | {"ours": ready}

    def measure(self, request: dict[str, Any]) -> dict[str, Any]:
        """Everything about one job: check every method, then measure them in turns, forward and then backward."""
        job = job_of(request["job"])
        before = clock_state()
        setting, methods = self._ready(job, request["skip"], tuple(METHODS))
        record: dict[str, Any] = {"job": job.to_json(), "methods": {}, "block_mask_s": setting.block_mask_s}
        record |= (
            system_facts(job, setting.problem, setting.tables, self.ours, self.clock) if job.kind == "system" else counts(job)
        )
        ready = {name: one for name, one in methods.items() if isinstance(one, Ready)}
        self.answer({"at": "reference"})
        errors_of = self._errors_of(setting)
        for name, one in methods.items():
            if not isinstance(one, Ready):
                record["methods"][name] = one
                continue
            errors = errors_of(name, one.results)
            one.results.clear()
            right = all(error["right"] for error in errors.values())
            record["methods"][name] = {"status": "measured", "first_s": one.first_s, "right": right, "errors": errors}
            if one.no_backward is not None:
                record["methods"][name]["no_backward"] = one.no_backward
        del errors_of
        passes = {"forward": {name: one.forward for name, one in ready.items()}}
        passes["backward"] = {name: one.backward for name, one in ready.items() if one.backward is not None}
        for which, actions in passes.items():
            self.answer({"at": which})
            samples = self.clock.take_turns(actions, request["rounds"], request["limit_s"])
            for name, found in samples.items():
                record["methods"][name][which] = found.to_json()
            record[f"{which}_over_ours"] = {
                name: median(b / a for a, b in zip(samples["ours"].device_s, found.device_s, strict=True))
                for name, found in samples.items()
                if "ours" in samples and name != "ours"
            }
        return record | {"clocks": [before, clock_state()]}

    def _errors_of(self, setting: Setting) -> Callable[[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """What is wrong with the results of a method; dense attention beside a system computes something else."""
        job = setting.job
        if job.kind != "system":
            checked = reference(setting.problem)
            return lambda name, results: checked.errors(results)
        here = setting
        if job.length > CHECKED:
            shorter = replace(job, length=CHECKED)
            here = Setting(shorter, *system_problem(shorter, self.device), self.clock, self.ours)
        known = system_reference(here.job, here.problem, here.tables)

        def errors(name: str, results: dict[str, torch.Tensor]) -> dict[str, Any]:
            if name.startswith("sdpa"):
                return {}
            return known.errors(results if here is setting else self._first_calls(here, METHODS[name](here)).results)

        return errors

    # ---- methods -----------------------------------------------------------------------------------------------------

    def _ready(
        self, job: Job, skip: dict[str, str], names: tuple[str, ...], *, dry: bool = False
    ) -> tuple[Setting, dict[str, Ready | dict[str, Any]]]:
        """Each method after its first calls, or why there is none."""
        torch._dynamo.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        self.answer({"at": "inputs"})
        problem, tables = problem_of(job, self.device, dry=dry)
        setting = Setting(job, problem, tables, self.clock, self.ours, dry)
        found: dict[str, Ready | dict[str, Any]] = {}
        for name in names:
            self.answer({"at": name})
            if name in skip:
                found[name] = {"status": "failed", "why": skip[name]}
                continue
            try:
                found[name] = self._first_calls(setting, METHODS[name](setting))
            except Unavailable as reason:
                found[name] = {"status": "not available", "why": str(reason)}
            except Exception as error:
                self.clock.wait()  # raises again if the device's context is gone, which ends this process
                found[name] = {"status": "failed", "why": _short(error), "trace": traceback.format_exc()[-4000:]}
        return setting, found

    def _first_calls(self, setting: Setting, call: Call) -> Ready:
        problem, began = setting.problem, time.perf_counter()
        inputs = (problem.q, problem.k, problem.v)
        plain = torch.no_grad()(functools.partial(call, *inputs))
        if problem.d_out is None:
            return self._ran(began, plain, None, {"out": plain()})
        leaves = tuple(x.detach().requires_grad_() for x in inputs)
        forward = functools.partial(call, *leaves)
        try:
            out = forward()
        except NotImplementedError as error:  # FlexAttention on CPU
            return self._ran(began, plain, None, {"out": plain()}, f"not available: {error}")

        def backward() -> Any:
            return torch.autograd.grad(out, leaves, problem.d_out, retain_graph=True)

        return self._ran(began, forward, backward, {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), backward(), strict=True)))

    def _ran(
        self, began: float, forward: Forward, backward: Any, results: dict[str, torch.Tensor], why: str | None = None
    ) -> Ready:
        self.clock.wait()
        return Ready(forward, backward, results, time.perf_counter() - began, why)


def counts(job: Job) -> dict[str, Any]:
    """Pairs over batch and query heads, allowed and in listed 128 x 128 tiles; and the bytes that must move, forward and backward."""
    case = PATTERNS[job.pattern]
    rows = 1 if job.kind == "decode" else job.length
    tables: dict[str, Any] = dict(case.tables(job.length))
    began = time.perf_counter()
    found = sd.analyse(case.declare(), rows, job.length, q_offset=job.length - rows, heads=job.heads, batch=job.batch, **tables)
    all_pairs = job.batch * job.heads * rows * job.length
    queries, keys = (2 * job.batch * heads * n * job.head_dim for heads, n in ((job.heads, rows), (job.kv_heads, job.length)))
    return {
        "allowed_pairs": round(found.density * all_pairs),
        "density": found.density,
        "density_exact": found.density_exact,
        "tile_pairs": found.flops // (4 * found.head_dim),
        # read q, k, v, write out; backward: read these and out, d_out, write the three gradients
        "least_bytes": {"forward": 2 * queries + 2 * keys, "backward": 4 * queries + 4 * keys},
        "analysis_s": time.perf_counter() - began,
    }


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' / '.join(lines[:3])}"[:500]


def main(device: str, ours: str) -> int:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    worker = Worker(device, ours, answer)
    operations = {
        "facts": worker.facts,
        "ceilings": worker.ceilings,
        "prepare": worker.prepare,
        "tune": worker.tune,
        "measure": worker.measure,
    }
    for line in sys.stdin:
        request = json.loads(line)
        answer({"result": operations[request["op"]](request)})
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
