"""``python -m sparsedsl tune``: what it prints, what it refuses, and that it measures the kernels of the call it makes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util

import pytest
import torch

import sparsedsl as sd
from sparsedsl.errors import ShapeError, SparseDSLError, TableError, UnsupportedError
from sparsedsl.gpu import expected as expected_module
from sparsedsl.gpu.autotune import Chosen, Trial, Tuned
from sparsedsl.gpu.configs import Work, default_config
from sparsedsl.gpu.costs import banded_tiles
from sparsedsl.gpu.expected import HANDFUL, expected_config
from sparsedsl.gpu.kernel_config import Config, Shape
from sparsedsl.gpu.resources import Resources
from sparsedsl.gpu.targets import target_named
from sparsedsl.gpu.tuning_records import Record, records, remember, tuning_key
from sparsedsl.lang.pattern import as_pattern
from sparsedsl.tune_command import _line, add_arguments, run

SM_90 = target_named("sm_90")
SHAPE = Shape("bfloat16", 64, 64)
KEY = tuning_key("0123456789abcdef", "forward", SHAPE, "share 1/4, width 1024", SM_90)
RECORD = Record(Config(64, 64, 4, 2), 1.5e-3, 2e-3, "2026-01-02T03:04:05+00:00", 20, 3)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="compiling kernels needs Triton")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEDSL_CACHE", str(tmp_path / "cache"))


def tune(*words, pattern=None, **tables):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(words)
    arguments.pattern, arguments.tables = None if pattern is None else as_pattern(pattern), tables
    return run(arguments)


def test_what_is_remembered_is_listed_carried_and_deleted(tmp_path, capsys):
    remember(KEY, RECORD)
    assert tune("--list") == 0
    assert capsys.readouterr().out == (
        "H100 SXM, sm_90, 132 SMs: forward of 0123456789ab, bfloat16, head_dim 64, group 1, share 1/4, width 1024: "
        "64x64, 4 warps, 2 stages, 1.5 ms, measured 2026-01-02\n"
    )
    file = str(tmp_path / "results.json")
    assert tune("--export", file) == 0 and tune("--clear") == 0 and records() == []
    assert tune("--import", file, "--list") == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        f"1 records written to {file}", "1 records deleted", f"{file}: 1 taken, 0 older than ours, 0 refused",
    ]  # fmt: skip
    assert tune("--import", file) == 0 and tune("--import", file, "--replace") == 0
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "0 taken, 1 older than ours, 0 refused", "1 taken, 0 older than ours, 0 refused",
    ]  # fmt: skip


def test_nothing_remembered_is_said(capsys):
    assert tune("--list") == 0
    assert capsys.readouterr().out == "nothing is remembered\n"


@pytest.mark.parametrize(
    ("words", "pattern", "error", "problem"),
    [
        ((), None, ShapeError, "nothing to do: name a pattern (SPEC --q-len N), or one of --list, --export"),
        ((), sd.kv_idx <= sd.q_idx, ShapeError, "--q-len is missing"),
        (("--q-len", "64", "--kv-len", "32"), True, ShapeError, "--kv-len must be at least --q-len; got 32 and 64"),
        (
            ("--q-len", "64", "--heads", "3", "--kv-heads", "2"),
            True,
            ShapeError,
            "--heads must be a multiple of --kv-heads; got 3 and 2",
        ),
        (("--q-len", "64", "--target", "sm_70"), True, UnsupportedError, "target must be one of sm_80, sm_86, "),
        (("--import", "/nowhere/results.json"), None, OSError, "/nowhere/results.json"),
        (
            ("--q-len", "64", "--target", "sm_90"),
            sd.table("doc")[sd.q_idx] == sd.table("doc")[sd.kv_idx],
            TableError,
            "the tiles depend on tables: pass values, as in --table doc=doc.pt",
        ),
    ],
)
def test_what_is_refused_says_what_to_do(words, pattern, error, problem):
    with pytest.raises(error) as caught:
        tune(*words, pattern=pattern)
    assert problem in str(caught.value)


@pytest.mark.parametrize("words", [("--budget", "0"), ("--budget", "soon"), ("--q-len", "0"), ("--dtype", "float64")])
def test_values_without_a_meaning(words, capsys):
    with pytest.raises(SystemExit):
        tune(*words)
    assert words[0] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_or_a_target_it_says_what_to_do():
    with pytest.raises(UnsupportedError) as caught:
        tune("--q-len", "64", pattern=True)
    assert "there is no CUDA device" in str(caught.value)
    assert "--target H100" in str(caught.value) and "--import FILE" in str(caught.value)


@needs_triton
def test_a_target_without_a_device_is_compiled_for_and_nothing_is_remembered(capsys):
    words = ("--q-len", "2048", "--heads", "4", "--target", "sm_90", "--backward")
    assert tune(*words, pattern=(sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 256)) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "sm_90 (H100 SXM), not at hand: nothing is measured or remembered. bfloat16, batch 1, heads 4/4, 2,048"
    )
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == ["forward", "delta", "grad_q", "grad_kv"]
    assert all("compiled candidates, not measured); " in line for line in lines if not line.startswith(" "))
    assert records() == []


@pytest.mark.gpu
def test_on_a_device_the_kernels_of_the_call_are_measured(capsys):
    words = ("--q-len", "2048", "--heads", "4", "--backward", "--budget", "5")
    assert tune(*words, pattern=(sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 256)) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert {line.split(":")[0] for line in lines} >= {"forward", "grad_q", "grad_kv"}
    assert all("measured" in line for line in lines)
    assert {key["kernel"] for key, _ in records()} >= {"forward", "grad_q", "grad_kv"}


def test_a_line_says_what_was_gained():
    trials = (
        Trial(Config(128, 64, 4, 3), 2e-3, 7),
        Trial(RECORD.config, 1.5e-3, 7),
        Trial(Config(16, 16, 4, 1), None, 0, "spills"),
    )
    line = _line("forward", Chosen(RECORD.config, "measured 2026-01-02", 1.5e-3), Tuned(RECORD.config, trials, 12.3))
    assert line == (
        "forward: 64x64, 4 warps, 2 stages, measured 2026-01-02, 1.5 ms, 1.33x as fast as the default, 2 of 3 candidates measured in 12.3 s"
    )


# ---- the choice without a device ----------------------------------------------------------------------------


def choice(compiled, width=1024):
    tiles_at = lambda block: banded_tiles(8192, 8192, width, block, copies=16)  # noqa: E731
    kernel = dataclasses.make_dataclass("Kernel", ["name"])("forward")
    return expected_config(None, kernel, SHAPE, SM_90, Work(row_width=width), tiles_at, compiled=compiled)


def took(registers=128, spills=0, shared=65536, warps=4):
    return Resources(registers, spills, spills, shared, 0, 32 * warps, 2, (("wgmma.mma_async", 16),))


def test_a_handful_is_compiled_the_default_among_them():
    asked = []
    choice(lambda config: asked.append(config) or took(warps=config.warps))
    assert len(asked) == 1 + HANDFUL and asked[0] == default_config("forward", SHAPE, SM_90)
    assert len({(config.block_m, config.block_n, config.warps) for config in asked}) == len(asked)


def test_what_the_compiler_says_decides():
    free = choice(lambda config: took(warps=config.warps)).config
    found = choice(lambda config: took(255, 4000, warps=config.warps) if config == free else took(warps=config.warps))
    assert found.config != free and found.resources.spills == 0 and found.refused == ()
    assert found.source == f"cost model and resources of {1 + HANDFUL} compiled candidates, not measured"


def test_candidates_that_do_not_compile_or_fit_are_refused_with_the_reason():
    default = default_config("forward", SHAPE, SM_90)

    def compiled(config):
        if config == default:
            raise UnsupportedError("no such layout")
        return took(shared=300_000 if config.block_m == 64 else 65536, warps=config.warps)

    found = choice(compiled)
    reasons = dict(found.refused)
    assert reasons[default] == "no such layout" and found.config != default
    assert any("300,000 bytes of shared memory" in reason for reason in reasons.values())


def test_nothing_that_can_be_launched_is_an_error():
    def broken(config):
        raise UnsupportedError("no such layout")

    with pytest.raises(SparseDSLError, match="no config of kernel 'forward' can be launched on sm_90: no such layout"):
        choice(broken)


def test_the_module_loads_no_triton():
    assert not hasattr(expected_module, "triton")
