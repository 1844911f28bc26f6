"""The benchmark scripts from end to end at toy sizes: they run, and write and print what they say. Times are not judged."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import patterns
from sparsedsl.lang.pattern import as_pattern

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
MACHINE = {"cpu", "cores", "memory_gib", "torch_threads", "python", "torch", "commit", "date", "load_average"}


def load(name: str) -> Any:
    """A script of the folder as a module. What it imports from its folder is found as it would be from the command line."""
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(script: str, out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What the script wrote and what it printed."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments, "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert content["machine"].keys() >= MACHINE
    assert list(out.parent.iterdir()) == [out], "something half-written was left behind"
    assert str(out) in done.stdout
    return content, done.stdout


@pytest.mark.slow
def test_block_lists(tmp_path):
    content, shown = run(
        "block_lists.py", tmp_path / "lists.json",
        "--patterns", "per_head", "--lengths", "1024", "3072", "--rounds", "1", "--limit-s", "1e-9", "--keep-cache",
    )  # fmt: skip
    first, second = content["records"]
    assert (first["pattern"], first["length"], second["length"]) == ("per_head", 1024, 3072)
    assert first["same_tiles"] == {"compiled": True, "eager": True}
    assert first["compiled"]["status"] == first["eager"]["status"] == "measured"
    assert first["ours"]["block_mask"]["status"] == "measured"
    assert second["compiled"]["status"].startswith("not measured: too slow (about ")
    assert "again_s" not in second["compiled"]
    assert second["ours"]["full"] + second["ours"]["partial"] > 0
    assert content["targets"] == [], "targets are for 1M and 16M tokens"
    assert shown.count("| 4 windows by head: 128 to 2048 |") == 2
    assert "| not measured |" in shown


def test_parallel_plans(tmp_path, capsys):
    script, out = load("parallel_plans"), tmp_path / "plans.json"
    sizes = ["--tokens", "16384", "--worlds", "2", "4", "--chunk", "512", "--granule", "64", "--rounds", "1"]
    assert script.main([*sizes, "--out", str(out)]) == 0
    content, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert content["machine"].keys() >= MACHINE and str(out) in shown
    assert [(r["pattern"], r["world"]) for r in content["records"]] == [(name, w) for name in script.CASES for w in (2, 4)]
    causal, window = content["records"][0], content["records"][3]
    assert causal["ways"]["contiguous"]["imbalance"] == pytest.approx(1.5, abs=0.01)
    assert causal["ways"]["zigzag"]["imbalance"] == pytest.approx(1.0, abs=0.01)
    assert window["ways"]["contiguous"]["received"] == pytest.approx(1 / 3)
    assert {target["what"] for target in content["targets"]} == {"imbalance", "received"}, (
        "seconds are judged at 1M and 16M tokens"
    )
    assert shown.count("| causal |") == 2


def test_parallel_memory(tmp_path, capsys):
    script, out = load("parallel_memory"), tmp_path / "memory.json"
    sizes = ["--lengths", "2048", "--worlds", "2", "--patterns", "window", "moba"]
    assert script.main([*sizes, "--out", str(out)]) == 0
    content, shown = json.loads(out.read_text()), capsys.readouterr().out
    window, moba = content["records"]
    # Its own 1024 keys, and the window before them, which the one rank sends the other.
    assert window["came"] == window["planned"] == 1024 * 2 * 2 * 64 * 4 and window["keys"] == 2 * window["came"]
    assert moba["planned"] == 0 <= moba["came"] <= moba["all"] / 2
    assert content["targets"][0]["pass"] and len(content["targets"]) == 1 and shown.count("| window |") == 1


@pytest.mark.slow
def test_aot_resources(tmp_path):
    pytest.importorskip("triton")
    content, shown = run(
        "aot_resources.py", tmp_path / "resources.json",
        "--patterns", "causal", "--targets", "sm_90", "gfx942", "--dims", "64", "--workers", "1",
    )  # fmt: skip
    hopper, amd = content["records"]
    assert (hopper["target"], amd["target"], hopper["error"], amd["error"]) == ("sm_90", "gfx942", None, None)
    assert hopper["kernels"].keys() == amd["kernels"].keys() >= {"forward", "decode", "grad_q", "grad_kv"}
    assert "wgmma.mma_async" in hopper["kernels"]["forward"]["instructions"]
    assert "v_mfma" in amd["kernels"]["grad_kv"]["instructions"]
    assert [target["pass"] for target in content["targets"]] == [True] * 5
    assert shown.count("| sm_90 | 64 |") == 1 + len(hopper["kernels"])
    assert "Nothing to report." in shown


def test_aot_vs_flex_compares_what_was_counted():
    """Ratios are of cycles of the whole case, FlexAttention's over ours, of all kernels of a pass together."""
    script = load("aot_vs_flex")

    def record(side: str, kernel: str, serial: float) -> dict[str, Any]:
        about = {"case": "causal", "target": "sm_90", "head_dim": 64, "kernel": kernel, "side": side}
        return about | {
            "serial": serial,
            "overlapped": serial / 2,
            "issue_of_case": 3 * serial,
            "loops": {"full": {"serial": 2112}},
        }

    kernels = {"forward": (110.0, 100.0), "grad_q": (90.0, 100.0), "grad_kv": (310.0, 200.0)}
    records = [record(side, kernel, both[n]) for kernel, both in kernels.items() for n, side in enumerate(("flex", "ours"))]
    assert "1.10 ... 1.10 (1.10) | 0.90 ... 0.90 (0.90) | 1.55 ... 1.55 (1.55)" in script.table(records, "sm_90")
    found = {target["what"]: (target["got"], target["pass"]) for target in script.checks(records)}
    assert found["forward, serial: lowest ratio"] == (pytest.approx(1.1), True)
    assert found["backward, serial: lowest ratio"] == (pytest.approx(400 / 300), True)
    assert found["forward, overlapped: geometric mean"] == (pytest.approx(1.1), False)
    assert found["causal forward D 64: serial over what is longest"] == (pytest.approx(2112 / 1024), False)


def test_aot_tiles_ranks_what_may_run():
    script = load("aot_tiles")
    found = [
        script.Candidate("32x64", 9.0, 3.0, "", 128, 2, True),
        script.Candidate("128x128", 4.0, 2.0, "9% of a loop reads or writes spills", 255, 1, False),
        script.Candidate("64x64", 7.0, 3.0, "", 168, 1, False),
        script.Candidate("64x32", 8.0, 3.0, "", 128, 2, False),
    ]
    assert [one.config for one in script.best_first(found)] == ["64x64", "64x32", "32x64", "128x128"]
    shown = script.table("forward, sm_90 D 64", found, most=1).splitlines()[2:]
    assert [line.split(" | ")[:2] for line in shown] == [["| 64x64", "1.000"], ["| 32x64 (default)", "1.200"]]


def test_aot_resources_counts_what_goes_wrong():
    script = load("aot_resources")
    good = {"products": 2, "instructions": {"wgmma.mma_async": 8}, "spills": 0, "local_share": 0.0, "blocks": 1}
    kernels = {
        "forward": good | {"spills": 40, "local_share": 0.2}, "grad_q": good | {"instructions": {}}, "grad_kv": good | {"blocks": 0},
        "decode": good | {"instructions": {"mma.sync": 4}}, "delta": good | {"products": 0, "instructions": {}},
    }  # fmt: skip
    common = {"pattern": "causal", "target": "sm_90", "head_dim": 64}
    records = [
        common | {"kernels": kernels, "error": None, "problems": ["forward: 40 bytes"]},
        common | {"kernels": {}, "error": "no such thing", "problems": []},
    ]
    assert script.counts(records) == {
        "builds": 2, "failed": 1, "kernels": 5, "spill": 1, "most_spilled_bytes": 40, "without_matrix": 1, "not_launchable": 1,
        "best_matrix": 2 / 3,
    }  # fmt: skip
    assert [(target["got"], target["pass"]) for target in script.checks(records)] == [
        (1, False), (1, False), (1, False), (1, False), (2 / 3, False),
    ]  # fmt: skip
    assert script.flags(records).splitlines() == [
        "- causal, sm_90, D 64: forward: 40 bytes",
        "- causal, sm_90, D 64: grad_q: none, not wgmma.mma_async",
        "- causal, sm_90, D 64: cannot be built: no such thing",
    ]
    assert script.flags(records[:0]) == "Nothing to report."


def test_aot_resources_keeps_what_it_does_not_build(tmp_path):
    script, path = load("aot_resources"), tmp_path / "x.json"
    about = {"kernels": {}, "error": None, "problems": []}

    def record(pattern: str, target: str, dim: int, commit: str) -> dict[str, Any]:
        return about | {"pattern": pattern, "target": target, "head_dim": dim, "commit": commit}

    new = [record("causal", "sm_90", 64, "new"), record("alibi", "sm_90", 64, "new")]
    assert script.kept(path, new) == new[::-1], "in the order of the script"
    path.write_text(json.dumps({"records": [record("causal", "sm_80", 64, "old"), record("causal", "sm_90", 64, "old")]}))
    assert script.kept(path, new) == [new[1], record("causal", "sm_80", 64, "old"), new[0]]


def test_aot_resources_covers_the_library():
    script = load("aot_resources")
    names = {name.split(" ")[0].rstrip(",") for name in script.PATTERNS}
    assert names == {*patterns.__all__} - script.NO_PATTERNS
    for declare in script.PATTERNS.values():
        as_pattern(declare())


# ---- cpu.py ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cpu_patterns(tmp_path):
    content, shown = run(
        "cpu.py", tmp_path / "patterns.json", "patterns", "--works", "blocks10", "--lengths", "640", "--dims", "64", "--rounds", "1",
        "--threads", "1",
    )  # fmt: skip
    assert (content["benchmark"], content["lost"]) == ("cpu_patterns", [])
    single, half = content["records"]
    assert (single["dtype"], half["dtype"], single["length"], single["threads"]) == ("float32", "bfloat16", 640, 1)
    assert single["largest_difference"] < 1e-5 < half["largest_difference"] < 0.1
    assert single["median"].keys() == {"ours", "tiled", "flex", "sdpa", "product"}
    assert half["median"].keys() == single["median"].keys() | {"own_float32"}
    for record in content["records"]:
        assert math.isclose(record["rate_ratio"], record["useful_gflops"] / record["product_gflops"], rel_tol=1e-6)
        assert record["over_ours"]["flex"] == record["median"]["flex"] / record["median"]["ours"]
        assert record.keys() >= {"commit", "date", "load_average"}
    pairs = single["useful_gflops"] * 1e9 * single["median"]["ours"] / (4 * 64 * 4)
    triangles = 5 * 128 * 129 / 2  # blocks on the diagonal; of the 10 below, one is chosen
    assert round(pairs) == triangles + 128 * 128
    assert [goal["what"] for goal in single["goals"]] == ["flex / ours", "useful / product"]
    assert [goal["what"] for goal in half["goals"]] == ["flex / ours", "own float32 / ours"]
    assert len(content["targets"]) == 4 and all(target["what"] in shown for target in content["targets"])
    assert shown.count("| block-sparse 10 %, causal | 640 | 64 |") == 2


@pytest.mark.slow
def test_cpu_training(tmp_path):
    content, _ = run("cpu.py", tmp_path / "training.json", "training", "--works", "causal", "--lengths", "640", "--rounds", "1")
    (record,) = content["records"]
    assert record["median"].keys() == {"ours", "tiled", "sdpa", "product"}
    operations = record["useful_gflops"] * 1e9 * record["median"]["ours"]
    assert math.isclose(operations, 14 * 64 * 4 * 640 * 641 / 2, rel_tol=1e-6)


@pytest.mark.slow
def test_cpu_systems(tmp_path):
    out, sizes = tmp_path / "systems.json", ("--lengths", "256", "--rounds", "1")
    content, shown = run("cpu.py", out, "systems", "--works", "hsa", "tsa", *sizes)
    assert [record["work"] for record in content["records"]] == ["hsa", "tsa"]
    for record in content["records"]:
        assert record["median"].keys() == {"ours", "tiled", "sdpa", "product"}
        assert record["ideal"] > 0 and record["parts"]["attending"] > 0
        assert (record["parts"]["moving"] > 0) == (record["work"] == "tsa")
        assert record["density"] is not None
    assert "| HSA, 16 of 64 | 256 | 64 | float32 |" in shown
    out.unlink()
    content, shown = run("cpu.py", out, "systems", "--train", "--works", "ring", *sizes)
    assert [record["train"] for record in content["records"]] == [True]
    assert "| Ring-linear, forward and backward | 256 | 64 | float32 |" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "works", "length", "rows", "limits"),
    [
        ("decode", ("window", "quest", "ring"), 2048, 3, []),
        ("calls", ("pattern", "program_step"), 16, 2, [60.0, 150.0]),
        ("linear", ("gdn", "mamba2"), 256, 4, [1.0] * 4),
        pytest.param("first", ("moba",), 1024, 2, [2.5, 0.3], marks=pytest.mark.campaign),
        pytest.param("memory", ("causal", "quest"), 4096, 4, [], marks=pytest.mark.campaign),
    ],
)
def test_cpu_parts(tmp_path, part, works, length, rows, limits):
    content, shown = run("cpu.py", tmp_path / "part.json", part, "--works", *works, "--lengths", str(length), "--rounds", "1")
    assert content["lost"] == []
    records = content["records"]
    assert len(records) == rows and {record["work"] for record in records} == set(works)
    assert [goal["limit"] for record in records for goal in record["goals"]] == limits
    assert all(record["median"]["ours"] > 0 and f"| {record['title']}" in shown for record in records)
    if part == "calls":
        assert all(0 < record["passes_s"] < record["median"]["ours"] for record in records)
    if part == "first":
        not_built, ready = (record["median"]["ours"] for record in records)
        assert ready < not_built, "nothing was built, or nothing was kept"
    if part == "memory":
        assert [record["train"] for record in records] == [False, True] * 2
        assert all(record["median"]["ours"] >= 0.9 * record["result"] for record in records), "less than the results take"
        assert ["sdpa" in record["median"] for record in records] == [True, True, False, False]


def test_dense_attention_of_long_texts_is_estimated_and_says_so(monkeypatch):
    systems = load("cpu_systems")
    seen: list[int] = []
    monkeypatch.setattr(sys.modules["measure"], "seconds", lambda action: (action(), 0.5)[1])
    dense = systems.dense
    monkeypatch.setattr(systems, "dense", lambda q, k, v: seen.append(q.shape[2]) or dense(q, k, v))
    with systems.LIMITS.using(dense_to=128):
        (record,) = systems.measure_system(systems.Job("systems", "hsa", 512, 16, "float32", 1))
    assert set(seen) == {128}
    assert record["estimated"].keys() == {"sdpa"} and "128" in record["estimated"]["sdpa"]
    assert record["median"] == {"ours": 0.5, "tiled": 0.5, "sdpa": 8.0, "product": 0.5}, "not times the square of the ratio, 4"
    assert record["over_ours"]["sdpa"] == 16.0
    assert "| 500 ms | 500 ms |  | ~8 s |  | 1.00 |  | 16.00 |" in load("cpu_record").table([record])


def test_goals_of_systems():
    goal = load("cpu_systems").goal
    assert (goal("hsa", 8192, 4.0), goal("nsa", 8192, 2.0)) == (2.8, 1.2)
    assert (goal("quest", 8192, 2.0), goal("quest", 2048, 1.5)) == (1.0, 0.75), "half of the ideal"
    assert (goal("quest", 4096, 2.1), goal("pbs", 8192, 2.1), goal("pbs", 8192, 1.9)) == (1.05, 1.0, 0.0)
    assert (goal("nha", 8192, 36.0), goal("nha", 32768, 36.0), goal("ring", 8192, 64.0)) == (8.0, 1.0, 15.0)


def test_slow_dense_attention_is_measured_once():
    record_of = load("cpu_record")
    calls: list[str] = []
    actions = {"ours": lambda: calls.append("ours"), "sdpa": lambda: calls.append("sdpa") or time.sleep(0.03)}
    with record_of.LIMITS.using(slow_s=0.02):
        record = record_of.measured({}, actions, 4, scale={"ours": 0.5})
    assert (calls.count("ours"), calls.count("sdpa"), record["rounds"]) == (5, 1, {"ours": 4, "sdpa": 1})
    assert record["over_ours"] == {"sdpa": record["median"]["sdpa"] / record["median"]["ours"]}
    assert record["best"]["ours"] <= record["median"]["ours"]


def test_records_of_the_same_commit_stay(tmp_path):
    cpu, path = load("cpu"), tmp_path / "x.json"
    facts = {"commit": "abc", "torch": "2.13", "torch_threads": 2}
    records = [{"work": "a", "commit": "abc", "threads": 2}, {"work": "b", "commit": "abc", "threads": 1},
               {"work": "c", "commit": "abd", "threads": 2}, {"work": "d", "commit": "abc-dirty", "threads": 2}]  # fmt: skip
    assert cpu.kept(path, facts) == []
    path.write_text(json.dumps({"machine": facts, "records": records}))
    assert cpu.kept(path, facts) == records[:1]
    assert cpu.kept(path, facts | {"torch": "2.14"}) == cpu.kept(path, facts | {"commit": "abc-dirty"}) == []
    one = {"work": "a", "title": "A", "length": 8, "head_dim": 64, "dtype": "float32", "train": False}
    assert cpu.same(one, one | {"date": "today"}) and not cpu.same(one, one | {"train": True})


def test_what_a_part_measures():
    cpu = load("cpu")

    def works(*arguments: str) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for job, *_ in cpu.jobs_of(arguments[0], cpu.options_from(list(arguments))):
            found.setdefault(job.length, []).append(job.work)
        return found

    suite = set(works("patterns", "--lengths", "8192")[8192])
    assert len(suite) == 14 and "causal" in suite
    assert works("decode")[1048576] == ["window", "hsa", "ring"]
    assert works("decode", "--works", "causal") == {8192: ["causal"], 32768: ["causal"], 1048576: ["causal"]}
    assert "pbs" in works("systems")[131072] and "pbs" not in works("systems", "--train")[8192]
    assert works("training", "--quick") == {2048: ["window512"]}
    (group,) = cpu.jobs_of("patterns", cpu.options_from(["patterns", "--works", "window", "--lengths", "8192", "--rounds", "2"]))
    assert [(job.dim, job.dtype, job.rounds) for job in group] == [
        (64, "float32", 2), (64, "bfloat16", 2), (128, "float32", 2), (128, "bfloat16", 2),
    ]  # fmt: skip
    assert all(set(part.quick) <= set(part.works) for part in cpu.PARTS.values())


def test_command_lines_that_contradict_themselves(capsys):
    script = load("cpu")
    for arguments, words in (
        (["pattern"], "parts are patterns, training, systems, linear, decode, calls, first, memory; got pattern"),
        (["calls", "first", "--out", "x.json"], "--out is the file of one part; got calls first"),
        (["decode", "--train"], "--train and --activations go with the part systems alone; got decode"),
        (["first", "--works", "hsa"], "--works of first are moba, window; got hsa"),
    ):
        with pytest.raises(SystemExit):
            script.options_from(arguments)
        assert words in capsys.readouterr().err


# ---- what the scripts share ------------------------------------------------------------------------------------------


def test_block_tables_have_the_share_they_promise():
    cases = load("cases")
    table = cases.block_table(128 * 40, 0.25)
    assert table.diagonal().all()
    assert not table.triu(1).any()
    assert table.tril(-1).sum() == 40 * 39 / 2 * 0.25
    assert torch.equal(table, cases.block_table(128 * 40, 0.25)), "not the same in every run"


def test_both_forms_of_every_case_allow_the_same():
    from sparsedsl.lang.evaluation import evaluate

    cases, length = load("cases"), 4700  # beyond the widest window
    positions = torch.arange(length)
    for name, case in cases.CASES.items():
        tables = dict(case.tables(length))
        head = case.heads - 1
        by_hand = case.mask_mod(tables)(0, head, positions[:, None], positions)
        env = {"b": 0, "h": head, "q_idx": positions[:, None], "kv_idx": positions, "q_len": length, "kv_len": length}
        mask = as_pattern(case.declare()).mask
        assert torch.equal(by_hand, evaluate(mask.expr, env | tables).expand(length, length)), name


def test_gemma_prefill(tmp_path, monkeypatch, capsys, tiny_gemma):
    script = load("gemma_prefill")
    monkeypatch.setattr(script.gemma, "load", tiny_gemma)
    out = tmp_path / "gemma.json"
    arguments = ["--tokens", "700", "--prompt", "300", "--new", "4", "--rounds", "2", "--decode-rounds", "1", "--out", str(out)]
    assert script.main(arguments) == 0
    content = json.loads(out.read_text())
    prefill, decode = content["prefill"], content["decode"]
    assert prefill["tokens"] == 700
    assert prefill["largest_logit_difference"]["native"] < 1e-4 < prefill["largest_logit_difference"]["hybrid"]
    assert [len(times) for times in prefill["all_seconds"].values()] == [2, 2, 2]
    assert decode["same_tokens"]["native"] == 4
    assert [target["pass"] for target in content["targets"]][2] is True
    shown = capsys.readouterr().out
    assert "| sparsedsl, hybrid in full layers |" in shown
    assert str(out) in shown


def test_gemma_models_share_their_weights(tiny_gemma):
    script = load("gemma_prefill")
    model, _ = tiny_gemma()
    models = script.three_models(model)
    places = [[weight.data_ptr() for weight in one.parameters()] for one in models.values()]
    assert places[0] == places[1] == places[2]
    assert models["sdpa"].config._attn_implementation == "sdpa"
    assert models["hybrid"].config is not models["sdpa"].config


def test_peak_bytes_sees_what_is_freed_again():
    measure = load("measure")
    peak = measure.peak_bytes(lambda: len(b"x" * (64 << 20)))
    assert 60 << 20 < peak < 100 << 20


def test_alternate_takes_turns_and_turns_round():
    calls: list[str] = []
    found = load("measure").alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b", "b", "a"]
    assert [len(values) for values in found.values()] == [2, 2]


def test_out_of_memory_is_told_from_other_errors():
    measure = load("measure")
    try:
        try:
            raise MemoryError
        except MemoryError as cause:
            raise RuntimeError("compiling failed") from cause
    except RuntimeError as error:
        assert measure.is_out_of_memory(error)
    assert measure.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not measure.is_out_of_memory(RuntimeError("shapes do not match"))


def test_results_are_written_whole_or_not_at_all(tmp_path):
    measure = load("measure")
    path = tmp_path / "results" / "x.json"
    measure.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        measure.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_results_have_a_line_for_every_record(tmp_path):
    measure = load("measure")
    path = tmp_path / "x.json"
    content = {
        "benchmark": "x",
        "machine": {"cores": 2},
        "records": [{"a": 1, "b": [2, None]}, {"a": 3}],
        "lost": [],
        "tokens": 4,
    }
    measure.write_json(path, content)
    assert json.loads(path.read_text()) == content
    lines = path.read_text().splitlines()
    assert [line for line in lines if '"a"' in line] == ['  {"a": 1, "b": [2, null]},', '  {"a": 3}'] and len(lines) == 10
    measure.write_json(path, {})
    assert json.loads(path.read_text()) == {}


@pytest.mark.parametrize(("value", "text"), [(0.0123456, "12.3 ms"), (0.9999, "1 s"), (61.2, "61.2 s"), (1e-5, "0.01 ms")])
def test_times_in_words(value, text):
    assert load("measure").time_text(value) == text


def test_targets_say_what_was_wanted():
    measure = load("measure")
    met, missed = measure.target("speed", 2.5, at_least=2.0), measure.target("error", 3.5, at_most=3.0)
    assert (met["pass"], missed["pass"]) == (True, False)
    assert measure.verdicts([met, missed]) == "pass: speed: 2.5, target at least 2\nMISS: error: 3.5, target at most 3"
    with pytest.raises(ValueError, match="give at_least or at_most"):
        measure.target("both", 1.0, at_least=1.0, at_most=1.0)


# ---- systems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hsa", "nha", "pbs", "tsa", "tsa_pbs", "ring", "gated_delta", "moba", "moba_cap", "nsa"])
def test_parts_of_a_system_are_the_whole(name):
    cases, split = load("systems_cases"), load("systems_split")
    system = cases.SYSTEMS[name]
    q, k, v = cases.topics(system.shape, 300)
    program, named = system.program(q.shape[1], 300), system.inputs(q, k)
    attn = sd.compile(program, backend="tiled")
    with torch.no_grad():
        out, parts = split.split_call(attn, q, k, v, named)
        assert torch.equal(out, attn(q, k, v, **named))
    assert list(parts) == ["choosing", "moving", "attending"]
    assert parts["attending"] > 0
    assert (parts["moving"] > 0) == (name in ("pbs", "tsa", "tsa_pbs"))


def test_density_counts_pairs():
    cases, length = load("systems_cases"), 300
    q, k, v = cases.topics(cases.SMALL, length)
    causal = length * (length + 1) / 2
    assert cases.density(sd.attend(patterns.causal()), q, k, v, {}) == pytest.approx(1.0)
    assert cases.density(sd.patterns.ring_linear([0.5] * 8), q, k, v, {}) is None
    hsa = cases.SYSTEMS["hsa"]
    chosen = sum(min(4, t // 16) * 16 for t in range(length))  # chunks of 16 that are over, at most 4
    assert cases.density(hsa.program(8, length), q, k, v, hsa.inputs(q, k)) == pytest.approx(chosen / causal)
    nha = cases.SYSTEMS["nha"]
    seen = sum(min(8, t + 1) + 16 for t in range(length))
    assert cases.density(nha.program(8, length), q, k, v, nha.inputs(q, k)) == pytest.approx(seen / causal)


def test_activations_are_those_of_the_layer_and_kept(tmp_path, monkeypatch, tiny_gemma):
    module = load("activations")
    monkeypatch.setenv("SPARSEDSL_CACHE", str(tmp_path))
    monkeypatch.setattr(module.gemma, "load", tiny_gemma)
    model, _ = tiny_gemma()
    layer = next(number for number, kind in enumerate(model.config.layer_types) if kind == "full_attention")
    monkeypatch.setattr(module, "LAYER", layer)
    q, k, v = module.captured(40)
    config = model.config
    assert q.shape == (1, config.num_attention_heads, 40, config.head_dim)
    assert k.shape == v.shape == (1, config.num_key_value_heads, 40, config.head_dim)
    assert len(list((tmp_path / "activations").iterdir())) == 1
    monkeypatch.setattr(module, "capture", lambda length: pytest.fail("a shorter text is a prefix of what is kept"))
    for short, whole in zip(module.captured(25), (q, k, v), strict=True):
        assert torch.equal(short, whole[:, :, :25])


def test_model_families(tmp_path):
    """Two families, one of which has no layers for patterns; what is measured later is added to what is there."""
    pytest.importorskip("transformers")
    script = load("model_families")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- families -->\nold\n<!-- /families -->\nafter\n")
    results = tmp_path / "families.json"
    script.measure(["olmo", "mpt"], ["forward", "left padding"], results)
    script.measure(["olmo"], ["chunks"], results)
    script.write_page(results, page)
    olmo = {record["family"]: record for record in json.loads(results.read_text())["records"]}["olmo"]
    assert {olmo[column] for column in ("forward", "left padding", "one layer", "restore", "chunks")} == {"same"}
    text = page.read_text()
    assert text.startswith("before\n<!-- families -->\n1 families of") and text.endswith("<!-- /families -->\nafter\n")
    assert "| olmo | all | yes | yes |  |  |  |  |  |  | yes | yes | yes |  |" in text
    assert "- [1]: mpt" in text and "1. it has no layer that calls transformers' attention interface" in text


def test_a_difference_of_a_family_is_seen():
    script = load("model_families")
    assert script.differs(torch.ones(3), torch.ones(3) + 1e-5) == "same"
    assert script.differs(torch.ones(3), torch.ones(3) + 1e-2) == "off by 0.01"
    assert script.differs(torch.tensor([1, 2]), torch.tensor([1, 3])) == "other tokens"
    assert script.table([{"family": "x", "layers": "all", "forward": "off by 0.01"}]).count("**1**") == 1


def test_the_time_of_a_family_is_its_own():
    """Waiting, as on a machine that others use, takes none of it."""
    script = load("model_families")
    with script.at_most(0.3):
        time.sleep(0.6)
    with pytest.raises(TimeoutError, match=r"more than 0[.]3 s of CPU time"), script.at_most(0.3):
        while time.process_time() < 1e9:
            pass
    begin = time.process_time()
    while time.process_time() < begin + 0.4:  # over: nothing is stopped any more
        pass
