"""The parts of the GPU benchmark: its clock, the textbook that kernels are checked against, its patterns, jobs, goals and tables."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load(name: str) -> Any:
    """A script of the benchmarks as a module, found as it would be from the command line."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    return importlib.import_module(name)


# ---- the clock, with a device that is made up ------------------------------------------------------------------------


class ToyEvent:
    """A CUDA event on a device that does everything at once, in the time that is noted in ``now``."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = ToyEvent.now

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.fixture
def toy_cuda(monkeypatch):
    """A device of 2 GHz."""

    def sleep(cycles):
        assert isinstance(cycles, int)
        ToyEvent.now += cycles / 2e9

    facts = SimpleNamespace(name="Toy 1", major=9, minor=0, multi_processor_count=4, total_memory=2**30)
    for name, value in (("Event", ToyEvent), ("_sleep", sleep), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)


def test_a_time_on_the_device_is_that_between_two_events(toy_cuda, monkeypatch):
    module = load("gpu_clock")
    monkeypatch.setattr(module, "FLUSH_BYTES", 64)
    clock = module.CudaClock("cpu")

    def takes(seconds):
        def action():
            ToyEvent.now += seconds

        return action

    found = clock.take_turns({"a": takes(0.001), "b": takes(0.003)}, 5, limit_s=60.0)
    assert [pytest.approx(0.001)] * 5 == found["a"].device_s
    assert found["b"].to_json()["s"] == pytest.approx(0.003), "spinning, so that the host is ahead, was counted"
    assert len(found["a"].host_s) == 5
    assert len(clock.take_turns({"a": takes(0.001)}, 50, limit_s=0.0)["a"].device_s) == 3


def test_facts_of_a_device(toy_cuda, tmp_path, monkeypatch):
    module = load("gpu_clock")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '580.1, 2, 3, 4, 5, 6' | cut -d, -f1-$(echo $3 | tr , '\\n' | wc -l)\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    facts = module.device_facts("cuda")
    assert (facts["device"], facts["capability"], facts["driver"]) == ("Toy 1", "9.0", "580.1")
    assert module.clock_state() == dict(zip(module.CLOCK_FIELDS, ("580.1", "2", "3", "4", "5", "6"), strict=True))
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert "not available: " in module.device_facts("cuda")["driver"]


# ---- the textbook that kernels are checked against -------------------------------------------------------------------


@pytest.fixture
def problem():
    """A causal problem with random tensors, four query heads on two key heads."""
    module = load("gpu_reference")
    q, k, v, d_out = (torch.randn(1, heads, 300, 32).to(torch.bfloat16) for heads in (4, 2, 2, 4))
    return module.Problem(
        q, k, v, d_out, lambda b, h, i, j: i >= j, lambda score, b, h, i, j: torch.tanh(score / 3) * 3 + (j - i) / 900
    )


def results(problem, mask_mod):
    """Results in float64, of the whole tensors, rounded to their dtype."""
    q, k, v = (x.double().requires_grad_() for x in (problem.q, problem.k, problem.v))
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    logits = q @ k.repeat_interleave(2, dim=1).mT * q.shape[3] ** -0.5
    scores = problem.score_mod(logits, 0, 0, i, j).masked_fill(~mask_mod(0, 0, i, j), float("-inf"))
    out = scores.softmax(dim=-1) @ v.repeat_interleave(2, dim=1)
    grads = torch.autograd.grad(out, (q, k, v), problem.d_out.double())
    return {name: x.detach().to(torch.bfloat16) for name, x in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True)}


def test_right_results_are_right(problem):
    errors = load("gpu_reference").reference(problem).errors(results(problem, problem.mask_mod))
    assert errors.keys() == {"out", "dq", "dk", "dv"}
    assert all(error["right"] and error["of_allowed"] < 0.5 for error in errors.values()), errors


@pytest.mark.parametrize("hole", [0, 100, 298], ids=lambda key: f"key {key} left out")
def test_one_key_left_out_of_the_last_rows_is_noticed(problem, hole):
    wrong = results(problem, lambda b, h, i, j: (i >= j) & ~((j == hole) & (i >= 290)))
    errors = load("gpu_reference").reference(problem).errors(wrong)
    assert not all(error["right"] for error in errors.values()), errors


def test_nan_is_not_right(problem):
    found = results(problem, problem.mask_mod)
    found["dv"][0, -1, 5, 5] = float("nan")
    assert not load("gpu_reference").reference(problem).errors(found)["dv"]["right"]


def test_some_rows_of_what_is_too_large_are_checked(problem, monkeypatch):
    module = load("gpu_reference")
    for name, value in (("MOST_PAIRS", 1000), ("SOME_ROWS", 16), ("CHUNK_PAIRS", 4000)):
        monkeypatch.setattr(module, name, value)
    checked = module.reference(problem)
    assert checked.values.keys() == {"out", "dq"}
    assert (len(checked.rows), int(checked.rows[0]), int(checked.rows[-1])) == (16, 0, 299)
    found = results(problem, problem.mask_mod)
    assert all(error["right"] for error in checked.errors(found).values())
    found["out"][0, -1, -1] += 0.1
    assert not checked.errors(found)["out"]["right"]


# ---- numbers ---------------------------------------------------------------------------------------------------------


def record(pattern, kind="attention", right=True, **times):
    """A record in which methods took these seconds, forward and backward."""
    passes = ("forward",) if kind == "decode" else ("forward", "backward")
    methods = {
        name: {"status": "measured", "right": right or name != "ours", "errors": {}}
        | {which: {"s": s, "host_s": s} for which in passes}
        for name, s in times.items()
    }
    over = {f"{which}_over_ours": {name: s / times["ours"] for name, s in times.items() if name != "ours"} for which in passes}
    job = {
        "kind": kind,
        "pattern": pattern,
        "length": 16384,
        "head_dim": 128,
        "heads": 16,
        "kv_heads": 16,
        "batch": 1,
        "tma": True,
    }
    counts = {"allowed_pairs": 1000, "tile_pairs": 2000, "density": 0.5, "least_bytes": {"forward": 64, "backward": 128}}
    return {"job": job, "methods": methods} | over | counts


def test_goals():
    report = load("gpu_report")
    records = [
        record("full", ours=8.0, flex=16.0, sdpa_flash=6.0),
        record("causal", ours=4.0, flex=8.0, flex_tma=6.0, sdpa_flash=5.0, sdpa_cudnn=3.0),
        record("blocks10", ours=10.0, flex=20.0),
        record("window", right=False, ours=1.0, flex=100.0),
        record("causal", kind="decode", ours=2.0, flex=3.0, sdpa_flash=1.0),
    ]
    found = [(target["what"], round(target["got"], 3), target["pass"]) for target in report.targets({"records": records})]
    where = "D 128, 16K, 16:16 heads"
    assert found == [
        ("forward, the better of flex and flex TMA / ours, geometric mean of 3", round((2 * 1.5 * 2) ** (1 / 3), 3), True),
        ("forward, flex / ours, geometric mean of 3", 2.0, True),
        ("backward, the better of flex and flex TMA / ours, geometric mean of 3", round((2 * 1.5 * 2) ** (1 / 3), 3), True),
        ("backward, flex / ours, geometric mean of 3", 2.0, True),
        (f"forward, our rate / the best dense rate, {where}", 0.75, False),
        (f"forward, our rate on 128-blocks at 10 % / our dense rate, {where}", 0.8, False),
        (f"decode, the best other / ours, causal, {where}", 0.5, False),
    ]


def test_wrong_results_are_shown_as_wrong_and_have_no_rate():
    report = load("gpu_report")
    wrong = record("window", right=False, ours=1.0, flex=2.0)
    assert report.rate(wrong, "ours", "forward") is None
    assert report.rate(wrong, "flex", "forward") == 4 * 128 * 1000 / 2.0
    assert report.rate(wrong, "flex", "backward", "tile_pairs") == 10 * 128 * 2000 / 2.0
    content = {"machine": {}, "ceilings": None, "settings": {"ours": "triton", "tune": False}, "records": [wrong]}
    shown = report.tables(content | {"lost": [], "dropped": [], "waiting": [wrong["job"]], "targets": []})
    assert "1e+03 WRONG" in shown
    assert "ours: WRONG results, times not used" in shown
    assert "not reached: the run was ended (1: attention window 16K" in shown


def test_jobs_cover_what_was_asked_and_the_longest_come_last():
    cases = load("gpu_cases")
    jobs = cases.jobs()
    assert len({job.name for job in jobs}) == len(jobs)
    assert {job.length for job in jobs} == {8192, 16384, 32768, 65536, 131072}
    assert {(job.group, job.head_dim) for job in jobs} >= {(1, 64), (1, 128), (4, 128), (8, 128)}
    assert {job.pattern for job in jobs[:13]} == set(cases.PATTERNS), "not all patterns come first"
    assert jobs[-1].seconds == max(job.seconds for job in jobs)
    assert all(cases.job_of(json.loads(json.dumps(job.to_json()))) == job for job in jobs)


def test_both_forms_of_every_pattern_allow_and_score_the_same():
    from sparsedsl.lang.evaluation import evaluate
    from sparsedsl.lang.pattern import as_pattern

    cases, length = load("gpu_cases"), 300
    i, j, head = torch.arange(length)[:, None], torch.arange(length), torch.arange(16)[:, None, None]
    logits = torch.randn(16, length, length)
    for name, case in cases.PATTERNS.items():
        tables = dict(case.tables(length))
        env = {
            "b": torch.tensor(0),
            "h": head,
            "q_idx": i,
            "kv_idx": j,
            "q_len": length,
            "kv_len": length,
            "score": logits,
        } | tables
        pattern = as_pattern(case.declare())
        by_hand = case.mask_mod(tables)(torch.tensor(0), head, i, j).expand(16, length, length)
        assert torch.equal(by_hand, evaluate(pattern.mask.expr, env).expand(16, length, length)), name
        if case.score_mod is not None:
            forms = case.score_mod(logits, torch.tensor(0), head, i, j), evaluate(pattern.score.expr, env, dtype=torch.float32)
            torch.testing.assert_close(*(form.masked_fill(~by_hand, 0.0) for form in forms), msg=name)


def test_shares_of_square_block_tables():
    table = load("gpu_cases")._square_block_table(128 * 40, 0.10)
    assert table.sum() == 160
    assert table.any(dim=1).all(), "a row without keys"


def test_a_picture_of_a_file_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        load("gpu").options_from(["--picture", "no.json"])
    assert "no.json does not exist" in capsys.readouterr().err


# ---- systems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hsa", "ring"])
def test_a_wrong_result_of_a_system_is_noticed(name):
    systems, cases = load("gpu_systems"), load("gpu_cases")
    job = next(job for job in cases.rehearsal() if (job.kind, job.pattern) == ("system", name))
    problem, named = systems.system_problem(job, "cpu")
    known = systems.system_reference(job, problem, named)
    results = {which: x.to(problem.q.dtype) for which, x in known.values.items()}
    assert results.keys() == {"out", "dq", "dk", "dv"}
    assert all(error["right"] and float(error["of_allowed"]) < 0.2 for error in known.errors(results).values())
    results["out"][0, 0, -1] *= 0.5
    results["dv"][0, 0, 3] = float("nan")
    errors = known.errors(results)
    assert {which: error["right"] for which, error in errors.items()} == {"out": False, "dq": True, "dk": True, "dv": False}


def test_systems_in_the_report():
    report = load("gpu_report")
    job = {
        "kind": "system",
        "pattern": "pbs",
        "length": 131072,
        "head_dim": 128,
        "heads": 32,
        "kv_heads": 8,
        "batch": 1,
        "tma": False,
    }
    times = {"ours": 0.1, "sdpa_flash": 0.3, "sdpa_cudnn": 0.25}
    record = {
        "job": job, "density": 0.22, "parts": {"choosing": 0.01, "moving": 0.02, "attending": 0.07},
        "methods": {name: {"status": "measured", "right": True, "errors": {}, "forward": {"s": s}} for name, s in times.items()},
        "forward_over_ours": {"sdpa_flash": 3.0, "sdpa_cudnn": 2.5},
    }  # fmt: skip
    content = {"machine": {}, "settings": {"tune": False, "ours": "triton"}, "ceilings": None, "records": [record], "targets": []}
    shown = report.tables(content | {"lost": [], "dropped": [], "waiting": []})
    assert "| pbs | 128K | 32:8 | 0.220 | 10% | 20% | 70% | 100 | not tried | 300 | 250 |  | 2.50 |" in shown
    assert "| 2.77 x | H100, FlashAttention-2 | 2.50 x at 128K, density 0.22 |" in shown
