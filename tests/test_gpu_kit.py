"""The GPU kit without a GPU: benchmark and tests from end to end, at toy sizes, with generated kernels in Triton's interpreter."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
TESTS = sorted((ROOT / "tests" / "gpu_device").glob("test_*.py"))
INTERPRETED = {"TRITON_INTERPRET": "1"}
NO_TRITON = "generated Triton kernels are interpreted; pip install '.[triton]'"


def load(name: str) -> Any:
    """A script of the benchmarks as a module, found as it would be from the command line."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


def child(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A process of its own; ``more``: of its environment, which says nothing of Triton's interpreter otherwise."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_", "TRITON_"))}
    env |= {"OMP_NUM_THREADS": "1"} | more
    return subprocess.run([sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=1500)


# ---- from end to end -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.stem)
def test_the_gpu_tests_run(file):
    pytest.importorskip("triton", reason=NO_TRITON)
    done = child("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rehearse", str(file), **INTERPRETED)
    assert done.returncode == 0, f"{file.name} in a process of its own:\n{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}"
    assert " passed" in done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    pytest.importorskip("triton", reason=NO_TRITON)
    out = tmp_path / "gpu.json"
    words = ["--dry-run", "--patterns", "causal", "blocks10", "--lengths", "96", "160", "--rounds", "1"]
    done = child(str(BENCHMARKS / "gpu.py"), *words, "--commit", "abc", "--out", str(out))
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.md", "gpu.png"]
    assert (content["lost"], content["dropped"]) == ([], [])
    assert content["machine"]["commit"] == "abc"
    assert content["ceilings"]["product_flop_s"] > 0 < content["ceilings"]["copy_bytes_s"]
    kinds = [(record["job"]["kind"], record["job"]["pattern"]) for record in content["records"]]
    assert kinds == [("attention", name) for name in ("causal", "blocks10", "causal", "blocks10")] + [("decode", "causal")]
    assert len(content["prepared"]) == len(kinds)
    for record in content["records"]:
        methods = record["methods"]
        assert list(methods) == ["ours", "flex", "flex_tma", "sdpa_flash", "sdpa_cudnn"], "a method was dropped silently"
        for name in ("ours", "flex"):
            assert methods[name]["right"], f"{name}: {methods[name]}"
        assert methods["flex_tma"]["status"] == methods["sdpa_cudnn"]["status"] == "not available"
        assert all(found["why"] for found in methods.values() if found["status"] != "measured")
        assert record["tile_pairs"] >= record["allowed_pairs"] > 0
        if record["job"]["kind"] == "attention":
            assert methods["ours"]["errors"].keys() == {"out", "dq", "dk", "dv"}
            assert methods["ours"]["backward"]["s"] > 0
            assert "does not support backward on CPU" in methods["flex"]["no_backward"]
    shown = (tmp_path / "gpu.md").read_text()
    assert shown in done.stdout
    assert all(target["what"] in shown for target in content["targets"])
    assert "TMA is a unit of NVIDIA devices" in shown


@pytest.mark.slow
def test_systems_beside_dense_attention(tmp_path):
    pytest.importorskip("triton", reason=NO_TRITON)
    out = tmp_path / "gpu.json"
    words = ["--dry-run", "--kinds", "system", "--patterns", "hsa", "pbs", "ring", "--rounds", "1", "--prepare-minutes", "0"]
    done = child(str(BENCHMARKS / "gpu.py"), *words, "--out", str(out))
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert (content["lost"], content["dropped"]) == ([], [])
    assert [record["job"]["pattern"] for record in content["records"]] == ["pbs", "hsa", "ring"]
    for record, trains in zip(content["records"], (False, True, True), strict=True):
        ours = record["methods"]["ours"]
        assert ours["right"], ours
        assert ours["errors"].keys() == ({"out", "dq", "dk", "dv"} if trains else {"out"})
        assert ("backward" in ours) == trains
        assert sum(record["parts"].values()) > 0
        assert record["methods"]["flex"]["status"] == "not available"
    shown = (tmp_path / "gpu.md").read_text()
    assert "| pbs | 160 | 2:1 |" in shown
    assert "| PBS: attention, speed-up over dense at 128K | 2.77 x | H100, FlashAttention-2 |" in shown


# ---- what cannot be seen when all goes well --------------------------------------------------------------------------


def run_of(tmp_path, monkeypatch, ask, *words):
    """A run whose measuring process answers what ``ask`` says."""
    gpu = load("gpu")
    monkeypatch.setattr(gpu, "Process", lambda *given: SimpleNamespace(ask=ask, end=lambda: None))
    options = gpu.options_from(["--dry-run", "--prepare-minutes", "0", "--out", str(tmp_path / "gpu.json"), *words])
    return gpu, gpu.Run(options, str(tmp_path))


def toy_answer(request):
    """What a process answers that measures nothing."""
    return {"job": request["job"], "methods": {}} if request["op"] == "measure" else {"device": "toy"}


TUNE = ("--tune", "--patterns", "causal", "blocks10", "sinks", "hsa", "pbs")


def test_choices_are_measured_kernel_by_kernel_and_written_down_after_each(tmp_path, monkeypatch):
    asked, written = [], []

    def ask(request, limit_s):
        if request["op"] != "tune":
            return toy_answer(request)
        job = request["job"]
        asked.append((job["pattern"], job["head_dim"], request["kernel"]))
        written.append(json.loads((tmp_path / "gpu.json").read_text())["tuned"])
        assert 0 < request["budget_s"] <= 15 < limit_s
        if len(asked) == 2:
            raise gpu.ProcessDied("no answer after 60 s", "ours")
        return {request["kernel"] or "all": {"s": 1e-3}}

    gpu, run = run_of(tmp_path, monkeypatch, ask, *TUNE)
    run.all()
    kernels = ("forward", "grad_kv", "grad_q")
    first = [("causal", 16, kernel) for kernel in (*kernels, "decode")] + [("blocks10", 16, kernel) for kernel in kernels]
    first += [("sinks", 16, kernel) for kernel in (*kernels, "decode")]
    second = [(name, 32, kernel) for name in ("causal", "blocks10") for kernel in kernels]
    assert asked == first + second + [("pbs", 16, None), ("hsa", 16, None)]
    assert [sum(map(len, found.values())) for found in written] == list(range(len(asked)))
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["tuned"]["attention causal 160 D16 2:2"] == {
        "forward": {"s": 1e-3}, "grad_kv": "lost: no answer after 60 s at ours", "grad_q": {"s": 1e-3},
    }  # fmt: skip
    assert content["untuned"] == []


def test_what_there_was_no_time_to_tune_is_named(tmp_path, monkeypatch):
    def ask(request, limit_s):
        assert request["op"] != "tune"
        return toy_answer(request)

    _, run = run_of(tmp_path, monkeypatch, ask, *TUNE, "--tune-minutes", "0")
    run.all()
    found = json.loads((tmp_path / "gpu.json").read_text())["untuned"]
    assert found[:2] == ["attention causal 160 D16 2:2: forward", "attention causal 160 D16 2:2: grad_kv"]
    assert found[-1] == "system hsa 160 D16 2:1: all"
    assert len(found) == 19


def test_without_tune_the_default_table_is_measured_and_a_dry_run_interprets(tmp_path, monkeypatch):
    gpu, run = run_of(tmp_path, monkeypatch, lambda request, limit_s: {"device": "toy"})
    assert run.env["SPARSEDSL_TUNE"] == "off"
    assert run.env["TRITON_INTERPRET"] == "1"
    assert "TRITON_INTERPRET" not in gpu.Run(gpu.options_from([]), str(tmp_path)).env
    assert gpu.Run(gpu.options_from(["--tune"]), str(tmp_path)).env["SPARSEDSL_TUNE"] == "cached"


def test_a_method_that_crashes_is_left_out_and_named(tmp_path, monkeypatch):
    asked = []

    def ask(request, limit_s):
        if request["op"] != "measure":
            return {"device": "toy"}
        asked.append(dict(request["skip"]))
        if "flex" not in request["skip"]:
            raise gpu.ProcessDied("ended: illegal memory access", "flex")
        methods = {"flex": {"status": "failed", "why": request["skip"]["flex"]}}
        return {"job": request["job"], "methods": methods}

    gpu, run = run_of(tmp_path, monkeypatch, ask, "--patterns", "window")
    run.all()
    assert asked == [{}, {"flex": "ended: illegal memory access at flex"}]
    (record,) = json.loads((tmp_path / "gpu.json").read_text())["records"]
    assert record["methods"]["flex"]["why"] == "ended: illegal memory access at flex"


def test_a_job_that_kills_every_process_is_lost_and_the_next_one_is_measured(tmp_path, monkeypatch):
    def ask(request, limit_s):
        if request["op"] != "measure":
            return {"device": "toy"}
        if request["job"]["pattern"] == "window":
            raise gpu.ProcessDied("no answer after 90 s", "reference")
        return {"job": request["job"], "methods": {}}

    gpu, run = run_of(tmp_path, monkeypatch, ask, "--patterns", "window", "sinks", "--kinds", "attention")
    run.all()
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [lost["job"]["pattern"] for lost in content["lost"]] == ["window"]
    assert [record["job"]["pattern"] for record in content["records"]] == ["sinks"]


def test_jobs_that_do_not_fit_are_named_and_what_was_measured_is_in_the_file(tmp_path, monkeypatch):
    def ask(request, limit_s):
        if request["op"] == "measure":
            run.deadline -= 1000
            before = json.loads((tmp_path / "gpu.json").read_text())
            assert [job["pattern"] for job in before["waiting"]] == ["window", "sinks"], "a kill now would lose it"
        return {"device": "toy", "job": request.get("job"), "methods": {}}

    _, run = run_of(tmp_path, monkeypatch, ask, "--patterns", "window", "sinks", "--kinds", "attention")
    run.options.dry_run = False
    monkeypatch.setattr("gpu_cases.jobs", load("gpu_cases").rehearsal)
    run.all()
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert len(content["records"]) == 1
    assert [job["pattern"] for job in content["dropped"]] == ["sinks"]
    assert content["waiting"] == []
    assert "left out for lack of time (1: attention sinks" in load("gpu_report").tables(content | {"ceilings": None})


def test_a_process_that_hangs_or_ends_is_noticed_with_its_last_words(tmp_path, monkeypatch):
    module = load("gpu_process")
    script = tmp_path / "worker.py"
    script.write_text(
        'import sys, time\nsys.stdin.readline()\nprint(\'{"at": "ours"}\', flush=True)\n'
        "time.sleep(60) if sys.argv[2] == 'hang' else sys.exit('the device is gone')\n"
    )
    monkeypatch.setattr(module, "WORKER", script)
    for ours, limit_s, words in (
        ("hang", 1.0, "no answer after 1 s at ours"),
        ("die", 30.0, "ended: the device is gone at ours"),
    ):
        with pytest.raises(module.ProcessDied) as death:
            module.Process("cpu", ours, {}, None).ask({"op": "facts"}, limit_s)
        assert (str(death.value), death.value.at) == (words, "ours")
