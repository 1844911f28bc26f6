"""The benchmark scripts from end to end at toy sizes: they run, and write and print what they say. Times are not judged."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
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


def test_aot_resources_counts_what_goes_wrong():
    script = load("aot_resources")
    good = {"products": 2, "instructions": {"wgmma.mma_async": 8}, "spills": 0, "blocks": 1}
    kernels = {
        "forward": good | {"spills": 40}, "grad_q": good | {"instructions": {}}, "grad_kv": good | {"blocks": 0},
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


def test_aot_resources_covers_the_library():
    script = load("aot_resources")
    names = {name.split(" ")[0].rstrip(",") for name in script.PATTERNS}
    assert names == {*patterns.__all__} - script.NO_PATTERNS
    for declare in script.PATTERNS.values():
        as_pattern(declare())


@pytest.mark.slow
def test_attention_flex(tmp_path):
    content, shown = run(
        "attention_cpu.py", tmp_path / "attention.json", "--backend", "flex",
        "--patterns", "causal_documents", "--lengths", "640", "--rounds", "1", "--keep-cache",
    )  # fmt: skip
    (record,) = content["records"]
    assert content["benchmark"] == "attention_flex_640"
    assert record["length"] == 640
    assert record["largest_difference"] < 1e-5
    assert record["seconds"].keys() == {"ours", "ours_total", "by_hand", "by_hand_total", "sdpa"}
    assert record["first_seconds"].keys() == {"ours", "by_hand", "by_hand_mask"}
    assert content["targets"][0]["what"] == "median kernel ratio"
    assert shown.count("| documents, causal |") == 2


@pytest.mark.slow
def test_attention_tiled(tmp_path):
    content, shown = run(
        "attention_cpu.py", tmp_path / "attention.json",
        "--patterns", "chunked", "blocks25", "--lengths", "640", "--dims", "16", "--rounds", "1", "--keep-cache",
    )  # fmt: skip
    assert content["benchmark"] == "attention_tiled_640"
    assert [record["pattern"] for record in content["records"]] == ["chunked", "blocks25"]
    for record in content["records"]:
        assert (record["length"], record["head_dim"]) == (640, 16)
        assert record["largest_difference"] < 1e-5
        assert record["seconds"].keys() == record["first_seconds"].keys() == {"tiled", "flex", "sdpa"}
        assert record["computed_over_allowed"] >= 1, "less computed than the pattern allows"
        rate = 4 * 16 * record["pairs_computed"] / record["seconds"]["tiled"] / 1e9
        assert math.isclose(rate, record["gflops"]["tiled"], rel_tol=1e-6)
    first = content["first_calls"]
    assert all(first[f"{method}_{state}_s"] > 0 for method in ("tiled", "flex") for state in ("empty", "filled"))
    assert len(content["targets"]) == 4
    assert all(target["what"] in shown for target in content["targets"])
    assert content["rates"]["linear_gflops"]


@pytest.mark.slow
def test_attention_cpp(tmp_path):
    content, shown = run(
        "attention_cpu.py", tmp_path / "attention.json", "--backend", "cpp",
        "--patterns", "blocks10", "--lengths", "640", "--dims", "64", "--rounds", "1", "--keep-cache",
    )  # fmt: skip
    (record,) = content["records"]
    assert content["benchmark"] == "attention_cpp_640" and record["largest_difference"] < 1e-5
    assert record["seconds"].keys() == {"cpp", "tiled", "flex", "sdpa", "product"}
    rate = record["useful_gflops"] / record["product_gflops"]
    assert math.isclose(rate, record["rate_ratio"], rel_tol=1e-6)
    assert len(content["targets"]) == 3 and all(target["what"] in shown for target in content["targets"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tiled", "flex"])
def test_million(tmp_path, backend):
    content, shown = run(
        "attention_cpu.py", tmp_path / "million.json", "--backend", backend, "--million", "--lengths", "4500", "--rows", "4",
    )  # fmt: skip
    found = content["million"]
    assert (found["length"], found["rows_checked"]) == (4500, 4)
    assert found["largest_error_against_float64_reference"] < 1e-5
    assert found["all_finite"]
    assert "| lists or schedule, and kernel |" in shown


def test_command_lines_that_contradict_themselves(capsys):
    script = load("attention_cpu")
    for arguments, words in (
        (["--backend", "flex", "--dims", "128"], "head dimension 64 only; got --dims [128]"),
        (["--million", "--lengths", "10", "20"], "--million takes one length; got [10, 20]"),
    ):
        with pytest.raises(SystemExit):
            script.options_from(arguments)
        assert words in capsys.readouterr().err


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


@pytest.mark.slow
def test_training_cpu(tmp_path):
    content, shown = run(
        "training_cpu.py", tmp_path / "training.json",
        "--patterns", "window512", "alibi", "--lengths", "640", "--memory-lengths", "4096", "8192", "--rounds", "1",
    )  # fmt: skip
    assert [record["pattern"] for record in content["records"]] == ["window512", "alibi"]
    for record in content["records"]:
        rate = 14 * 64 * record["pairs_computed"] / record["seconds"]["tiled"] / 1e9
        assert math.isclose(rate, record["gflops"]["tiled"], rel_tol=1e-6)
    (gradients,) = content["gradients"]
    assert gradients["pattern"] == "window512"
    assert gradients["tiled"].keys() == {"out", "dq", "dk", "dv"}
    assert max(gradients["tiled"].values()) < 1e-5
    less, more = content["memory"]
    assert less["peak_bytes"] >= less["result_bytes"] == 4 * 4 * 4096 * 64 * 4 + 4 * 4 * 4096
    assert more["peak_bytes"] < 3 * less["peak_bytes"], "memory does not grow with the length, but faster"
    assert [target["limit"] for target in content["targets"]] == [0.7, 3.0, 2.2]
    assert all(target["what"] in shown for target in content["targets"])


@pytest.mark.slow
def test_training_million(tmp_path):
    content, shown = run("training_cpu.py", tmp_path / "million.json", "--million", "--lengths", "4500", "--rows", "4")
    found = content["million"]
    assert (found["length"], found["rows_checked"]) == (4500, 4)
    assert all(error < 1e-5 for error in found["largest_error"].values())
    assert found["largest_entry"]["dq"] > 1e-3
    assert found["all_finite"]
    assert "| forward and backward (median of 3) |" in shown


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


@pytest.mark.slow
def test_systems(tmp_path):
    content, shown = run(
        "systems_cpu.py", tmp_path / "systems.json", "--systems", "hsa", "tsa", "ring", "--made-up", "--no-flex", "--lengths", "256", "512",
        "--train-to", "256", "--rounds", "1",
    )  # fmt: skip
    assert content["lost"] == []
    records = {(record["system"], record["length"]): record for record in content["records"]}
    assert list(records) == [(name, length) for name in ("hsa", "tsa", "ring") for length in (256, 512)]
    for (name, length), record in records.items():
        assert ("training" in record) == (name != "tsa" and length == 256)
        assert record["inputs"] == ("made up" if name == "tsa" else "random")
        assert record["seconds"].keys() == record["processor_seconds"].keys() == {"ours", "sdpa"}
        assert 0 < sum(record["parts"].values()) <= record["seconds"]["ours"] * 1.001
        assert record["parts"]["choosing"] > 0 or name == "ring"
        assert (record["parts"]["moving"] > 0) == (name == "tsa")
    assert records["hsa", 256]["training"]["all_finite"]
    assert records["ring", 512]["density"] is None
    assert 0 < records["tsa", 512]["density"] <= 1
    assert "| TSA: choosing and moving, of attention time, 128K | below 11 % |" in shown
    assert "| Ring: state a layer, 16 heads of 128 x 128 | 1 MiB | float32 | 1 MiB |" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "size", "words"),
    [
        ("decode-16m", 128, "| tokens (chunks of 64), heads of q : of k, D | 8,192 (128), 16:1, 64 |"),
        ("selection-memory", 2048, "pass: memory over inputs and outputs, MiB"),
        ("scaling", 2048, "HSA, 16 chunks of 64 a query"),
        ("ring-decode", 512, "State of one layer, 16 heads of 128 x 128 in float32: 1 MiB at any length"),
    ],
)
def test_questions_of_size(tmp_path, question, size, words):
    content, shown = run("systems_cpu.py", tmp_path / "sizes.json", f"--{question}", "--size", str(size))
    assert content["benchmark"] == f"systems_{question.replace('-', '_')}"
    assert words in shown
    if question == "decode-16m":
        assert content["tokens"] == 8192
        assert content["largest_error_against_float64"] < 2e-3, "wrong chunks: bf16 rounds at 2**-9 of what is at most about 0.5"


def test_systems_command_lines_that_contradict_themselves(capsys):
    script = load("systems_cpu")
    for arguments, words in (
        (["--scaling", "--ring-decode"], "one question at a time; got --scaling and --ring-decode"),
        (["--size", "5"], "--size goes with --decode-16m, --selection-memory, --scaling, --ring-decode"),
    ):
        with pytest.raises(SystemExit):
            script.options_from(arguments)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hsa", "nha", "pbs", "tsa", "tsa_pbs", "ring", "moba", "moba_cap", "nsa"])
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
