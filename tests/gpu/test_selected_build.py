"""The kernels over picked chunks, compiled for all targets without a device: what they take of an SM."""

from __future__ import annotations

import dataclasses

import pytest
import sympy
import torch

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, q_idx, score, table
from sparsedsl.codegen.to_triton_selected import member_symbols, selected_source
from sparsedsl.gpu.kernel_config import Shape
from sparsedsl.gpu.resources import misfits, resources_of
from sparsedsl.gpu.targets import TARGETS
from tests.gpu.built_for import BUILT_FOR, KINDS

pytest.importorskip("triton")

from sparsedsl.backends.triton.selected_configs import (
    SelectedShape,
    config_of,
    function,
    job_of,
    largest_tile,
    most_rows,
    pack_of,
    rows_of,
)
from sparsedsl.gpu.aot import compile_kernel, is_interpreting

pytestmark = pytest.mark.skipif(is_interpreting(), reason="kernels are interpreted in this process")

KERNELS = ("selected_forward", "selected_grad_q", "selected_grad_kv")
PRODUCTS = {"selected_forward": 2, "selected_grad_q": 3, "selected_grad_kv": 4}
USUAL = SelectedShape(Shape("bfloat16", 64, 64), chunk=64, pack=4)


FIRST, SECOND = member_symbols(2)
CAUSAL = (kv_idx <= q_idx).expr
doc, gate, bias = table("doc"), table("gate", dtype=float, learned=True), table("bias", dtype=float, learned=True)
# Masks and scores that are printed into the kernels, and tables that want gradients.
WRITTEN = {
    "two choices": (sympy.And(CAUSAL, (doc[q_idx] == doc[kv_idx]).expr, sympy.Or(FIRST, sympy.Not(SECOND))), score.expr, ()),
    "soft cap": (CAUSAL, (sd.tanh(score / 30) * 30).expr, ()),
    "ALiBi": (CAUSAL, (score - table("slope", dtype=float)[h] * (q_idx - kv_idx)).expr, ()),
    "gates": (CAUSAL, (score + gate[b, h, q_idx] - gate[b, h, kv_idx]).expr, ("gate",)),
    "bias": (CAUSAL, (score + bias[h, q_idx - kv_idx]).expr, ("bias",)),
}


def compiled(kernel, chosen, target, source=None, **flags):
    """Triton's kernel, as a launch on ``target`` would take it."""
    return compile_kernel(job_of(kernel, chosen, config_of(kernel, chosen, target), target, source, **flags))


def assert_fits(kernel, chosen, target, source=None, **flags):
    """Builds, fits, spills nothing in its loops, and multiplies on matrix units; what it takes."""
    found = resources_of(compiled(kernel, chosen, target, source, **flags))
    assert misfits(found, target) == ()
    assert not found.slowed
    assert found.products == PRODUCTS[kernel]
    assert found.tensor_core
    return found


@pytest.mark.parametrize("target", BUILT_FOR)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weighted", [False, True], ids=["joint", "weighted"])
def test_usual_shapes_build_for_every_target(kernel, target, weighted):
    chosen = dataclasses.replace(USUAL, weighted=weighted, interval=weighted)
    found = assert_fits(kernel, chosen, TARGETS[target], **({"SPLIT": False} if kernel == "selected_forward" else {}))
    assert (found.async_copies > 0) == (target != "gfx942")


# Joint on one kind of target and weighted on the other, in turns; the others are a campaign.
PRINTED = [
    pytest.param(
        name, weighted, target, id=f"{'weighted' if weighted else 'joint'}-{name}-{target}",
        marks=() if (place + weighted + turn) % 2 else pytest.mark.campaign,
    )
    for place, name in enumerate(WRITTEN)
    for weighted in (False, True)
    for turn, target in enumerate(("sm_90", "gfx942"))
]  # fmt: skip


@pytest.mark.parametrize(("name", "weighted", "target"), PRINTED)
def test_masks_and_scores_build_without_spilling(name, weighted, target):
    mask, logit, learned = WRITTEN[name]
    source = selected_source(mask, logit, learned=frozenset(learned))
    for kernel in KERNELS:
        by_head = kernel == "selected_grad_kv" and any(one.axis == "columns" for one in source.learned)
        chosen = dataclasses.replace(USUAL, weighted=weighted, learned=bool(learned), pack=1 if by_head else USUAL.pack)
        assert_fits(kernel, chosen, TARGETS[target], source)


# head dims, tokens of a chunk, heads side by side
SHAPES = [(128, 64, 8), (256, 64, 4), (128, 128, 4), (64, 128, 16), (96, 48, 1)]


# Two kinds of target for each shape, in turns; the others are a campaign.
EVERY = [
    pytest.param(
        sizes, target, id=f"{'x'.join(map(str, sizes))}-{target}",
        marks=() if target in KINDS and (place + KINDS.index(target)) % 3 == 0 else pytest.mark.campaign,
    )
    for place, sizes in enumerate(SHAPES)
    for target in TARGETS
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "target"), EVERY)
def test_other_shapes_build_for_every_target(sizes, target):
    width, chunk, pack = sizes
    for kernel in KERNELS:
        assert_fits(kernel, SelectedShape(Shape("float16", width, width), chunk, pack, weighted=True), TARGETS[target])


# The largest tiles of keys that a card with 99 KiB of shared memory a block is given; more is cut into such, or refused.
LARGEST = [("bfloat16", 256, 64), ("bfloat16", 128, 128), ("float32", 256, 32), ("float32", 128, 64), ("float32", 64, 128)]
# Weighted on the one and joint on the other, in turns; the others are a campaign.
ON_SMALL_CARDS = [
    pytest.param(
        *tile, weighted, target, id=f"{'x'.join(map(str, tile))}-{'weighted' if weighted else 'joint'}-{target}",
        marks=() if (place + weighted + turn) % 2 else pytest.mark.campaign,
    )
    for place, tile in enumerate(LARGEST)
    for weighted in (False, True)
    for turn, target in enumerate(("sm_86", "sm_121"))
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "width", "chunk", "weighted", "target"), ON_SMALL_CARDS)
def test_the_largest_tiles_fit_cards_with_little_shared_memory(dtype, width, chunk, weighted, target):
    shape, found = Shape(dtype, width, width), TARGETS[target]
    assert chunk * width * shape.itemsize == largest_tile(found)
    for kernel in KERNELS:
        needs = resources_of(compiled(kernel, SelectedShape(shape, chunk, 4, weighted=weighted), found))
        assert misfits(needs, found) == ()
        assert needs.shared_bytes <= 98304
        assert not needs.slowed or dtype == "float32"


def test_what_is_refused_and_what_is_cut_depends_on_the_gpu():
    from sparsedsl.backends.triton.selected import refusal

    card, server = TARGETS["sm_89"], TARGETS["sm_90"]
    assert refusal(torch.bfloat16, 256, 128, server, weighted=True) is None
    said = (
        "128 keys of 256 numbers in bfloat16 take 65,536 bytes, more than fits an SM beside as many of V: declare shorter blocks"
    )
    assert refusal(torch.bfloat16, 256, 128, card, weighted=True) == said
    assert refusal(torch.bfloat16, 256, 128, card, weighted=False) is None
    assert refusal(torch.bfloat16, 128, 128, card, weighted=True) is None
    assert str(refusal(torch.float32, 256, 64, card, weighted=True)).endswith("beside as many of V: pass bfloat16 or float16")


@pytest.mark.parametrize("target", BUILT_FOR)
def test_decode_and_merge(target):
    few = dataclasses.replace(USUAL, weighted=True, merged=False)
    assert config_of("selected_forward", few, TARGETS[target]).block_m == 16
    assert_fits("selected_forward", few, TARGETS[target], SAVE=False)
    found = resources_of(compiled("selected_merge", few, TARGETS[target]))
    assert (found.spills, misfits(found, TARGETS[target])) == (0, ())


def test_full_tiles_of_rows_use_the_instructions_of_warp_groups():
    wide = SelectedShape(Shape("bfloat16", 128, 128), chunk=64, pack=16, weighted=True)
    for kernel in KERNELS:
        assert list(assert_fits(kernel, wide, TARGETS["sm_90"]).tensor_core) == ["wgmma.mma_async"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weighted", [False, True], ids=["joint", "weighted"])
def test_tiles_are_on_their_way_before_they_are_needed(kernel, weighted):
    chosen = dataclasses.replace(USUAL, weighted=weighted, interval=True)
    code = compiled(kernel, chosen, TARGETS["sm_90"]).asm["ttgir"]
    before, loop = code.rsplit("scf.for", 1)
    assert "async_copy_global_to_local" in before
    assert loop.index("warp_group_dot " if "warp_group_dot " in loop else "tt.dot ") < loop.index("async_copy_global_to_local")


@pytest.mark.parametrize("kernel", (*KERNELS, "selected_merge"))
@pytest.mark.parametrize("name", [None, *WRITTEN])
def test_nothing_is_compiled_again_for_a_length(kernel, name):
    source = None if name is None else selected_source(*WRITTEN[name][:2], learned=frozenset(WRITTEN[name][2]))
    parameters = [one for one in function(kernel, source).params if not one.is_constexpr]
    numbers = [one for one in parameters if not one.name.endswith(("_ptr", "_table"))]
    assert len(numbers) >= 7
    assert [one.name for one in numbers if not one.do_not_specialize] == []


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_atomics(kernel):
    assert "atom" not in compiled(kernel, USUAL, TARGETS["sm_90"]).asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize("target", BUILT_FOR)
def test_single_precision_fits(target):
    chosen = SelectedShape(Shape("float32", 64, 64), chunk=64, pack=1, weighted=True)
    for kernel in KERNELS:
        assert misfits(resources_of(compiled(kernel, chosen, TARGETS[target])), TARGETS[target]) == ()


@pytest.mark.parametrize("target", TARGETS)
def test_tiles_hold_the_rows_that_they_are_made_of(target):
    for chunk, width, dtype in ((64, 64, "bfloat16"), (64, 256, "bfloat16"), (128, 256, "bfloat16"), (128, 256, "float32")):
        shape = Shape(dtype, width, width)
        most = most_rows("selected_forward", chunk, shape, TARGETS[target])
        for heads in range(1, 130):
            pack = pack_of(heads, 1, 1, most)
            assert heads % pack == 0
            for merged in (False, True):
                chosen = SelectedShape(shape, chunk, pack, merged=merged)
                rows = config_of("selected_forward", chosen, TARGETS[target]).block_m
                queries = rows_of(pack, most) // pack if merged else 1
                assert pack * queries <= rows <= 64
                assert queries <= 32
