"""The benchmark scripts from end to end at toy sizes: they run, and write and print what they say. Times are not judged."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
MACHINE = {"cpu", "cores", "memory_gib", "torch_threads", "python", "torch", "commit", "date", "load_average"}


def load(name: str) -> Any:
    """A script of the folder as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
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
def test_attention_cpu(tmp_path):
    content, shown = run(
        "attention_cpu.py", tmp_path / "attention.json",
        "--patterns", "causal_documents", "--lengths", "640", "--rounds", "1", "--keep-cache",
    )  # fmt: skip
    (record,) = content["records"]
    assert record["length"] == 640
    assert record["largest_difference"] < 1e-5
    assert record["seconds"].keys() == {"ours", "ours_total", "by_hand", "by_hand_total", "sdpa"}
    assert record["first_seconds"].keys() == {"ours", "by_hand", "by_hand_mask"}
    assert content["targets"][0]["what"] == "median kernel ratio"
    assert shown.count("| documents, causal |") == 2


@pytest.mark.slow
def test_million(tmp_path):
    content, shown = run("attention_cpu.py", tmp_path / "million.json", "--million", "--lengths", "4500", "--rows", "4")
    found = content["million"]
    assert (found["length"], found["rows_checked"]) == (4500, 4)
    assert found["largest_error_against_float64_reference"] < 1e-5
    assert found["all_finite"]
    assert "| lists and kernel |" in shown


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


@pytest.mark.parametrize(("value", "text"), [(0.0123456, "12.3 ms"), (0.9999, "1 s"), (61.2, "61.2 s"), (1e-5, "0.01 ms")])
def test_times_in_words(value, text):
    assert load("measure").time_text(value) == text
