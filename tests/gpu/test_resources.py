"""What kernels take of an SM, read from real binaries for all targets; and occupancy against cases worked out by hand."""

from __future__ import annotations

import re

import pytest

from sparsedsl.errors import UnsupportedError
from sparsedsl.gpu.resources import Resources, misfits, occupancy, resources_of
from sparsedsl.gpu.targets import TARGETS


def taking(**fields):
    nothing = {"registers": 32, "spills": 0, "local_bytes": 0, "shared_bytes": 0, "tensor_columns": 0, "threads": 128}
    return Resources(**{**nothing, "products": 0, "instructions": (), **fields})


@pytest.fixture(scope="session")
def compiled(by_hand):
    """Compiles one of the kernels written by hand; skips where there is no Triton, or one that interprets."""
    pytest.importorskip("triton")
    from sparsedsl.gpu.aot import compile_kernel, is_interpreting, job_of
    from sparsedsl.gpu.kernel_config import Config, Shape

    if is_interpreting():
        pytest.skip("kernels are interpreted in this process")

    def compile_it(name, target, config=(128, 64, 8, 2), head_dim=64, dtype="bfloat16"):
        shape = Shape(dtype, head_dim, head_dim)
        source = by_hand(head_dim)
        return compile_kernel(job_of(source, source.kernel(name), shape, Config(*config), TARGETS[target]))

    return compile_it


@pytest.mark.parametrize("target", TARGETS)
def test_two_products_on_matrix_units(compiled, target):
    found = resources_of(compiled("forward", target))
    assert found.products == 2
    assert list(found.tensor_core) == [TARGETS[target].matrix[0]]
    assert found.tensor_core[TARGETS[target].matrix[0]] >= 2
    assert found.threads == 8 * TARGETS[target].warp_size
    assert (found.spills, found.local_bytes) == (0, 0)
    assert 64 < found.registers <= TARGETS[target].registers_per_thread
    assert 0 < found.shared_bytes <= TARGETS[target].shared_per_block
    assert (found.tensor_columns > 0) == (target == "sm_100")
    assert (found.async_copies > 0) == (target != "gfx942")
    assert misfits(found, TARGETS[target]) == ()
    assert occupancy(found, TARGETS[target]).blocks >= 1


TOO_LARGE = {target: (64, 64, 2, 1) for target in ("sm_80", "sm_86", "sm_89", "sm_120", "sm_121")}
TOO_LARGE |= {"sm_90": (128, 128, 4, 1), "sm_100": (128, 128, 4, 1), "gfx942": (128, 128, 2, 1)}


@pytest.mark.parametrize("target", TARGETS)
def test_spills_are_counted(compiled, target):
    found = resources_of(compiled("forward", target, TOO_LARGE[target], head_dim=128))
    assert found.registers == TARGETS[target].registers_per_thread
    assert found.local_bytes >= found.spills > 100


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_an_array_of_its_own_is_not_a_spill(compiled, target):
    found = resources_of(compiled("delta", target))
    assert found.local_bytes > 0, "sin needs no array here: the test says nothing"
    assert (found.spills, found.products, found.tensor_core) == (0, 0, {})


def test_what_the_assembler_does_not_confirm_counts_as_spills(compiled, monkeypatch):
    monkeypatch.setattr("sparsedsl.gpu.resources._assembler_log", lambda *arguments: None)
    found = resources_of(compiled("delta", "sm_90"))
    assert found.spills == found.local_bytes > 0


def test_remarks_of_the_assembler(compiled):
    kernel = compiled("forward", "sm_90", TOO_LARGE["sm_90"], head_dim=128)
    (remark,) = resources_of(kernel, remarks=True).remarks
    assert "wgmma.mma_async instructions are serialized" in remark
    assert resources_of(compiled("forward", "sm_90"), remarks=True).remarks == ()


def test_fp32_products_in_full_precision_have_no_matrix_instruction(compiled):
    found = resources_of(compiled("forward", "sm_90", (32, 32, 4, 1), dtype="float32"))
    assert (found.products, found.tensor_core) == (2, {})


def test_registers_limit_amd_as_its_compiler_says(compiled):
    """The assembly of AMD's compiler states how many warps a quarter of a CU holds by registers."""
    for config in ((128, 64, 8, 2), (64, 64, 4, 1), (128, 64, 4, 1), (32, 32, 4, 1)):
        kernel = compiled("forward", "gfx942", config)
        (said,) = re.findall(r"^; Occupancy: (\d+)$", kernel.asm["amdgcn"], re.MULTILINE)
        one_warp_a_part = taking(registers=resources_of(kernel).registers, threads=4 * 64)
        assert occupancy(one_warp_a_part, TARGETS["gfx942"]).blocks == int(said)


def test_a_tool_that_is_missing_is_named(compiled, monkeypatch):
    kernel = compiled("forward", "sm_90")
    monkeypatch.setattr("subprocess.run", lambda *arguments, **words: (_ for _ in ()).throw(OSError("no such file")))
    with pytest.raises(UnsupportedError, match="Triton's cuobjdump cannot be run"):
        resources_of(kernel)


@pytest.mark.parametrize(
    ("target", "needs", "blocks", "share", "limit"),
    [
        ("sm_90", {"threads": 256, "registers": 32}, 8, 1.0, "warps"),
        ("sm_90", {"threads": 256, "registers": 33}, 6, 0.75, "registers"),  # rounded up to 40
        ("sm_90", {"threads": 256, "registers": 64}, 4, 0.5, "registers"),
        ("sm_90", {"threads": 128, "registers": 255}, 2, 0.125, "registers"),
        ("sm_90", {"threads": 32, "registers": 16}, 32, 0.5, "blocks"),
        ("sm_90", {"threads": 128, "shared_bytes": 100 * 1024}, 2, 0.125, "shared memory"),
        ("sm_90", {"threads": 128, "shared_bytes": 114 * 1024}, 1, 0.0625, "shared memory"),  # 1 KiB each is the driver's
        ("sm_90", {"threads": 128, "shared_bytes": 113 * 1024}, 2, 0.125, "shared memory"),
        ("sm_80", {"threads": 128, "shared_bytes": 81 * 1024}, 2, 0.125, "shared memory"),
        ("sm_100", {"threads": 128, "tensor_columns": 256}, 2, 0.125, "tensor memory"),
        ("gfx942", {"threads": 256, "registers": 128}, 4, 0.5, "registers"),
        ("gfx942", {"threads": 256, "registers": 512}, 1, 0.125, "registers"),
        ("gfx942", {"threads": 256, "shared_bytes": 20 * 1024}, 3, 0.375, "shared memory"),
    ],
)
def test_occupancy_by_hand(target, needs, blocks, share, limit):
    found = occupancy(taking(**needs), TARGETS[target])
    assert (found.blocks, found.share, found.limit) == (blocks, share, limit)
    assert found.warps == found.share * TARGETS[target].warps


@pytest.mark.parametrize(
    ("target", "needs", "reason"),
    [
        ("sm_90", {"shared_bytes": 232449}, "needs 232,449 bytes of shared memory a block, sm_90 has 232,448"),
        ("sm_80", {"shared_bytes": 200000}, "needs 200,000 bytes of shared memory a block, sm_80 has 166,912"),
        ("sm_90", {"registers": 168, "threads": 512}, "needs 86,016 registers a block, sm_90 has 65,536"),
        ("sm_100", {"tensor_columns": 1024}, "needs 1,024 columns of tensor memory a block, sm_100 has 512"),
        ("gfx942", {"threads": 2048}, "needs 2,048 threads a block, gfx942 has 1,024"),
    ],
)
def test_what_cannot_be_launched(target, needs, reason):
    assert misfits(taking(**needs), TARGETS[target]) == (reason,)
    assert occupancy(taking(**needs), TARGETS[target]).blocks == 0


def test_what_just_fits():
    assert misfits(taking(shared_bytes=232448, registers=255, threads=256), TARGETS["sm_90"]) == ()
