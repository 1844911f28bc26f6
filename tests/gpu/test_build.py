"""``sd.build``: what it returns for every target, what it writes, what it refuses, and where compiling is not possible."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsedsl as sd
from source_tree import ROOT
from sparsedsl.cli import main
from sparsedsl.errors import PatternError, ShapeError, UnsupportedError
from sparsedsl.gpu.configs import default_config
from sparsedsl.gpu.kernel_config import Config, Shape
from sparsedsl.gpu.targets import TARGETS
from sparsedsl.plain_values import keys_of
from tests.gpu.built_for import BUILT_FOR

KERNELS = ["forward", "decode", "merge", "delta", "grad_q", "grad_kv"]
WITH_PRODUCTS = {"forward", "decode", "grad_q", "grad_kv"}
WINDOW = (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 512)

needs_triton = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('triton')", reason="Triton is not installed")


@pytest.fixture(scope="module")
def built():
    """One build for all tests that only look at it."""
    pytest.importorskip("triton")
    return sd.build(WINDOW, "sm_90", torch.bfloat16, 64)


@needs_triton
@pytest.mark.parametrize("target", BUILT_FOR)
def test_every_target(target):
    built = sd.build(WINDOW, target, torch.bfloat16, 64)
    assert list(built.kernels) == KERNELS
    assert built.problems == []
    assert not any(kernel.resources.slowed for kernel in built.kernels.values()), "a loop of a default config spills"
    for name, kernel in built.kernels.items():
        assert kernel.binary.content.startswith(b"\x7fELF")
        assert kernel.binary.entry == name in kernel.binary.assembly
        assert kernel.binary.extension == ("hsaco" if target == "gfx942" else "cubin")
        assert bool(built.tensor_core[name]) == (name in WITH_PRODUCTS)
        assert 0 < built.registers[name] <= TARGETS[target].registers_per_thread
        assert 0 <= built.shared_bytes[name] <= TARGETS[target].shared_per_block
        assert built.occupancy[name].blocks >= 1


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "dtype", "head_dim"),
    [
        ("sm_90", "bfloat16", 64),
        *(
            pytest.param(*case, marks=pytest.mark.campaign)
            for case in (
                ("sm_90", "bfloat16", 128),
                ("sm_90", "bfloat16", 256),
                ("sm_90", "float32", 64),
                ("gfx942", "bfloat16", 64),
            )
        ),
    ],
)
def test_sticks(target, dtype, head_dim):
    """A tile of logits lies in registers several times; and what kernels tell each other of tiles of keys has one width."""
    built = sd.build(sd.patterns.stick_breaking(), target, dtype, head_dim, group=2)
    assert list(built.kernels) == ["left" if name == "delta" else name for name in KERNELS]
    assert not any(kernel.resources.slowed for kernel in built.kernels.values())
    assert len({built.kernels[name].config.block_n for name in ("left", "grad_q", "grad_kv")}) == 1


# Cards with 99 KiB of shared memory a block, on the defaults of sm_80: of intervals, of lists, and with both heads of a group.
@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "head_dim"),
    [
        ("RTX 4090", 128),
        ("RTX 5090", 128),
        pytest.param("A10", 64, marks=pytest.mark.campaign),
        pytest.param("GB10", 64, marks=pytest.mark.campaign),
    ],
)
def test_cards_with_little_shared_memory(target, head_dim):
    blocks = (sd.kv_idx // 64 * (sd.q_idx // 64)) % 3 < 2
    for pattern in (sd.patterns.causal(), blocks):
        built = sd.build(pattern, target, "bfloat16", head_dim, group=4)
        assert built.problems == []
        assert not any(kernel.resources.slowed for kernel in built.kernels.values())
        assert max(built.shared_bytes.values()) <= 98304
        assert f"({built.target.device})" in str(built)


@needs_triton
def test_warp_group_products_on_hopper(built):
    for name in ("forward", "grad_q", "grad_kv"):
        assert list(built.tensor_core[name]) == ["wgmma.mma_async"]


@needs_triton
def test_the_report_is_plain_data(built):
    found = built.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [*found] == ["report", *keys_of(type(built))] and found["report"] == "Build"
    forward = found["kernels"]["forward"]
    assert forward["resources"]["registers"] == built.registers["forward"] and forward["binary"] == "forward.cubin"
    assert forward["occupancy"]["share"] == built.occupancy["forward"].share
    assert built.occupancy["forward"].to_dict()["limit"] == forward["occupancy"]["limit"]


def test_the_report(built):
    lines = str(built).splitlines()
    assert lines[: len(WINDOW.text.splitlines())] == str(sd.attend(WINDOW)).splitlines()
    assert "sm_90 (H100 SXM), bfloat16, head_dim 64, one query head a key head, Triton " in str(built)
    (forward,) = (line.split() for line in lines if line.strip().startswith("forward"))
    config = built.kernels["forward"].config
    assert forward[1:5] == [
        f"{config.block_m}x{config.block_n}",
        str(config.warps),
        str(config.stages),
        str(built.registers["forward"]),
    ]
    assert f"{built.tensor_core['forward']['wgmma.mma_async']} wgmma.mma_async" in str(built)
    assert int(forward[-1]) == built.kernels["forward"].resources.async_copies > 0
    shown = built._repr_html_()
    assert "wgmma.mma_async" in shown and "<svg" in shown and shown.count("<tr") >= len(built.kernels)


@needs_triton
def test_configs_of_ones_own_and_what_is_wrong_with_them():
    configs = {"forward": Config(128, 128, 4, 6), "grad_q": Config(32, 32, 4, 1)}
    built = sd.build(WINDOW, "sm_90", head_dim=128, configs=configs)
    assert built.kernels["forward"].config == configs["forward"]
    assert built.kernels["grad_q"].config == configs["grad_q"]
    needs = built.shared_bytes["forward"]
    assert f"forward: cannot be launched: needs {needs:,} bytes of shared memory a block, sm_90 has 232,448" in built.problems
    assert any(problem.startswith(f"forward: {built.spills['forward']} bytes of each thread's") for problem in built.problems)
    assert built.occupancy["forward"].blocks == 0
    assert all(f"  ! {problem}" in str(built) for problem in built.problems)


@needs_triton
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_tensor_descriptors(target, tmp_path):
    configs = {"forward": Config(128, 64, 8, 3, descriptors=True)}
    built = sd.build(WINDOW, target, head_dim=64, configs=configs)
    assert [name for name, kernel in built.kernels.items() if kernel.config.descriptors] == ["forward"]
    assert "cp.async.bulk.tensor" in built.kernels["forward"].binary.assembly
    assert "cp.async.bulk.tensor" not in built.kernels["grad_q"].binary.assembly
    folder = built.save(tmp_path / "kernels")
    assert "\n\n".join((folder / name).read_text() for name in ("kernels.py", "kernels_descriptors.py")) == built.source
    assert "tensordesc<bf16[1,1,64,64]>" in (folder / "report.json").read_text()


@needs_triton
def test_a_table_that_needs_more_than_the_estimates_know_gets_smaller_tiles():
    built = sd.build(sd.attend(sd.patterns.causal(), score=sd.patterns.relative_bias(64)), "sm_90", head_dim=64)
    assert built.problems == []
    assert built.kernels["forward"].config != default_config("forward", built.shape, built.target)


def test_what_is_a_problem_and_for_whom():
    from sparsedsl.gpu.aot import BuildJob
    from sparsedsl.gpu.builds import _problems
    from sparsedsl.gpu.resources import Resources

    poor = Resources(64, 0, 0, 0, 0, 128, 2, ())
    good = Resources(64, 0, 0, 0, 0, 128, 2, (("mma.sync", 4),), async_copies=3)

    def found(resources, target="sm_90", dtype="bfloat16", stages=3):
        job = BuildJob("", "forward", {}, {}, Config(64, 64, 4, stages), True, TARGETS[target])
        return _problems(resources, Shape(dtype, 64, 64), job)

    without = "2 matrix products without a matrix instruction of "
    waits = "3 stages, but no load runs beside the arithmetic: widths of heads that 8 divides allow it"
    assert found(poor) == [f"{without}sm_90", waits]
    assert found(poor, stages=1) == [f"{without}sm_90"]
    assert found(poor, "gfx942") == [f"{without}gfx942"]
    assert found(poor, dtype="float32") == found(good) == []
    assert found(dataclasses.replace(good, products=0, instructions=(), async_copies=0)) == []
    assert found(dataclasses.replace(good, remarks=("slow",))) == ["slow"]


@needs_triton
def test_save_writes_all_of_it_and_replaces_an_earlier_build(built, tmp_path):
    folder = tmp_path / "deep" / "kernels"
    for _ in range(2):
        assert built.save(folder) == folder
    names = {f"{name}.{kind}" for name in KERNELS for kind in ("cubin", "ptx")}
    assert {path.name for path in folder.iterdir()} == names | {"kernels.py", "report.json", "report.txt"}
    assert list(folder.parent.iterdir()) == [folder], "something half-written was left behind"
    assert (folder / "kernels.py").read_text() == built.source
    report = json.loads((folder / "report.json").read_text())
    assert report == built.to_json()
    assert report["target"] == "sm_90"
    assert report["pattern"] == sd.attend(WINDOW).text
    for name, kernel in report["kernels"].items():
        assert (folder / kernel["binary"]).read_bytes() == built.kernels[name].binary.content
        assert kernel["resources"]["registers"] == built.registers[name]
        # parameters of the binary: those of the source but for constants, and two scratch pointers of Triton's
        parameters = [word for word in kernel["signature"] if word not in kernel["constants"]]
        assert built.kernels[name].binary.assembly.count(".param .") == len(parameters) + 2


@needs_triton
def test_save_leaves_what_is_not_ours(built, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"is no earlier build \(it has no report.json\): name another folder"):
        built.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@needs_triton
def test_save_that_fails_leaves_the_earlier_build(built, tmp_path, monkeypatch):
    folder = built.save(tmp_path / "kernels")
    before = (folder / "report.json").read_bytes()

    def full_disk(*arguments, **words):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        built.save(folder)
    assert (folder / "report.json").read_bytes() == before
    assert list(tmp_path.iterdir()) == [folder]


@needs_triton
def test_where_kernels_are_interpreted_a_child_compiles(built):
    code = (
        "import sparsedsl as sd; w = (sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 512)\n"
        "print(sd.build(w, 'sm_90').registers)\n"
        "try: sd.build(w, 'sm_90', configs={'forward': sd.gpu_config})\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    ).replace("sd.gpu_config", "__import__('sparsedsl.gpu.kernel_config', fromlist=['Config']).Config(128, 96, 4, 1)")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    registers, error = done.stdout.splitlines()
    assert registers == str(built.registers)
    assert error.startswith("UnsupportedError Triton ")
    assert "cannot compile kernel 'forward' for sm_90 with 128x96, 4 warps, 1 stages" in error


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UnsupportedError, match=r"pip install '.\[triton\]'"):
        sd.build(WINDOW)


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        ({"target": "sm_75"}, UnsupportedError, "; got 'sm_75'"),
        ({"dtype": "int8"}, ShapeError, "dtype must be one of float16, bfloat16, float32 for GPU kernels; got 'int8'"),
        ({"dtype": torch.float64}, UnsupportedError, "for GPU kernels; got torch.float64"),
        ({"head_dim": 0}, ShapeError, "head_dim must be a whole number of at least 1; got 0"),
        ({"head_dim_v": 64.0}, ShapeError, "head_dim_v must be a whole number of at least 1; got 64.0"),
        ({"group": True}, ShapeError, "group must be a whole number of at least 1; got True"),
        ({"precision": "half"}, PatternError, "precision must be one of ieee, tf32; got 'half'"),
    ],
)
def test_what_has_no_meaning_is_refused(words, error, text):
    with pytest.raises(error) as caught:
        sd.build(WINDOW, **words)
    assert text in str(caught.value)


@needs_triton
@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        ({"head_dim": 257}, UnsupportedError, "256"),
        ({"configs": {"sideways": Config(64, 64, 4, 1)}}, PatternError,
         "configs names sideways; the kernels of this pattern are forward, decode, merge, delta, grad_q, grad_kv"),
    ],
)  # fmt: skip
def test_what_the_kernels_do_not_have(words, error, text):
    with pytest.raises(error) as caught:
        sd.build(WINDOW, **words)
    assert text in str(caught.value)


def test_only_a_pattern_can_be_built():
    with pytest.raises(PatternError, match=r"pattern must be a Mask or a Pattern; got 3"):
        sd.build(3)


# ---- the command -------------------------------------------------------------------------------------------


@needs_triton
def test_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import sparsedsl as sd\ndoc = sd.table('doc', monotone=True)\n"
        "packed = (sd.kv_idx <= sd.q_idx) & (doc[sd.q_idx] == doc[sd.kv_idx])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    arguments = ["build", "mine.py:packed", "--target", "gfx942", "--dtype", "float16", "--head-dim", "96", "--head-dim-v", "64"]
    assert main([*arguments, "--group", "4", "--out", "kernels", "--source"]) == 0
    shown = capsys.readouterr().out
    assert "gfx942 (MI300X), float16, head_dim 96/64, 4 query heads a key head" in shown
    assert "@triton.jit" in shown
    report = json.loads((tmp_path / "kernels" / "report.json").read_text())
    assert report["shape"] == {"dtype": "float16", "head_dim": 96, "head_dim_v": 64, "group": 4, "precision": "ieee"}
    assert shown.splitlines()[-1] == str(tmp_path / "kernels")


def test_command_with_a_mistake(capsys):
    assert main(["build", "sparsedsl.patterns:causal", "--target", "sm_1000"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sparsedsl: target must be one of sm_80, ")
    assert said.endswith("; got 'sm_1000'. Did you mean 'sm_100'?\n")


def test_tune_command_is_wired(capsys):
    assert main(["tune"]) == 2
    assert "nothing to do: name a pattern (SPEC --q-len N)" in capsys.readouterr().err
