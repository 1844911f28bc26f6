"""On a CUDA device: every backend against plain attention in float64: outputs, LSE, gradients of inputs and learned tables."""

from __future__ import annotations

import pytest
import torch

import sparsedsl as sd
from sparsedsl.analysis.domain import Domain
from sparsedsl.analysis.tiles import classify
from sparsedsl.testing import assert_matches_reference

pytestmark = pytest.mark.gpu

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EVERYTHING = {"out", "lse", "dq", "dk", "dv"}
# Compiling is what takes time: the others run everything in these.
FEW_DTYPES = {"flex": ("bf16",)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_patterns(kit, named_pattern, backend, dtype):
    if dtype not in FEW_DTYPES.get(backend, DTYPES):
        pytest.skip(f"{backend} in bf16 only, to save time")
    if kit.rehearsing and dtype != "bf16":
        pytest.skip("rehearsal: fp16 stands for bf16, one type is enough")
    pattern, length = kit.patterns[named_pattern], kit.length(500)
    q, k, v = kit.inputs(length=length, dtype=DTYPES[dtype])
    tables = kit.tables(pattern, length)
    compared = assert_matches_reference(sd.compile(pattern, backend=backend), q, k, v, **tables)
    assert set(compared) == EVERYTHING | {f"d{name}" for name, spec in pattern.tables.items() if spec.learned}


@pytest.mark.parametrize(
    "dims", [(16, 16), (72, 72), (96, 96), (128, 128), (192, 192), (256, 256), (64, 128), (192, 128)], ids=str
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_head_dims(kit, triton_backend, dtype, dims):
    if kit.rehearsing and (dtype == "fp32" or dims not in ((16, 16), (72, 72), (64, 128), (192, 128))):
        pytest.skip("rehearsal: widths are divided by four and have tests of their own, one type and a few are enough")
    if dtype == "fp32" and dims not in ((72, 72), (256, 256), (192, 128)):
        pytest.skip("fp32 at the sizes that need the most memory and padding only, to save time")
    q, k, v = kit.inputs(length=kit.length(300), dims=dims, dtype=DTYPES[dtype])
    assert_matches_reference(sd.compile(kit.patterns["window and sinks"], backend=triton_backend), q, k, v)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 2), (8, 1)], ids=str)
def test_query_heads_that_share_key_heads(kit, backend, heads):
    pattern, length = kit.patterns["windows by head"], kit.length(400)
    q, k, v = kit.inputs(heads, length)
    assert_matches_reference(sd.compile(pattern, backend=backend), q, k, v)


@pytest.mark.parametrize("lengths", [(1, 1), (17, 17), (127, 127), (129, 129), (200, 777), (777, 200), (1025, 1025)], ids=str)
def test_ragged_lengths(kit, backend, lengths):
    q_len, kv_len = (min(n, kit.length(n) + 17) for n in lengths)
    q, k, v = kit.inputs(length=q_len, kv_length=kv_len)
    assert_matches_reference(sd.compile(kit.patterns["window and sinks"], backend=backend), q, k, v)


@pytest.mark.parametrize(
    "name", ["causal", "window and sinks", "documents", "blocks", "learned bias", "learned sink", "empty rows"]
)
@pytest.mark.parametrize("rows", [1, 5])
def test_decode(kit, backend, name, rows):
    pattern, length = kit.patterns[name], kit.length(1500)
    q, k, v = kit.inputs((8, 2), rows, length)
    tables = kit.tables(pattern, length, (8, 2))
    assert_matches_reference(sd.compile(pattern, backend=backend), q, k, v, q_offset=length - rows, **tables)


@pytest.mark.parametrize("name", ["causal", "documents", "learned bias"])
def test_prefill_in_chunks(kit, backend, name):
    pattern, length = kit.patterns[name], kit.length(600)
    rows = length // 3
    q, k, v = kit.inputs(length=rows, kv_length=length)
    tables = kit.tables(pattern, length)
    assert_matches_reference(sd.compile(pattern, backend=backend), q, k, v, q_offset=length - rows - 5, **tables)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "odd rows"])
def test_strides(kit, backend, layout):
    if layout == "odd rows":  # neither rows nor their begin at multiples of 16 bytes
        q, k, v = (x[..., 1:-2] for x in kit.inputs(length=kit.length(300), dims=(67, 67)))
    else:
        q, k, v = kit.inputs(length=kit.length(300), layout=layout)
    assert_matches_reference(sd.compile(kit.patterns["window and sinks"], backend=backend), q, k, v)


LONG = ("causal", "window and sinks", "documents", "dilated", "blocks", "soft cap")


@pytest.mark.parametrize("name", LONG)
def test_many_tiles(kit, backend, name):
    """In float32, whose tolerance sees one missing tile also in rows that average over thousands of keys."""
    pattern, length = kit.patterns[name], kit.length(3000)
    q, k, v = kit.inputs((2, 1), length, batch=1, dtype=torch.float32)
    assert_matches_reference(sd.compile(pattern, backend=backend), q, k, v, **kit.tables(pattern, length, (2, 1)))


@pytest.mark.parametrize("name", LONG)
def test_every_row_of_many_in_bf16(kit, backend, name):
    pattern, length = kit.patterns[name], kit.length(8192)
    inputs, tables = kit.inputs((2, 1), length, batch=1), kit.tables(pattern, length, (2, 1))
    with torch.no_grad():
        got = sd.compile(pattern, backend=backend)(*inputs, **tables)
        wanted = sd.compile(pattern, backend="reference")(*(x.double() for x in inputs), **tables)
    assert_rows_close(got, wanted)


def assert_rows_close(got, wanted):
    """Each row, as a vector, within 2 eps of the weights (rounded one by one) and one of the output, which is eps / 2 off at most."""
    off = (got.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-30)
    assert float(off.max()) <= 3 * torch.finfo(got.dtype).eps, f"a row is off by {float(off.max()):.3g} of itself"


def test_a_missing_tile_is_noticed(kit):
    length = kit.length(8192)
    inputs = [x.double() for x in kit.inputs((2, 1), length, batch=1)]
    tile = slice(length // 2, length // 2 + 128)
    masks = [
        kit.patterns["causal"],
        sd.attend(kit.patterns["causal"].mask & ~((sd.kv_idx >= tile.start) & (sd.kv_idx < tile.stop))),
    ]
    whole, holed = (sd.compile(mask, backend="reference")(*inputs) for mask in masks)
    with pytest.raises(AssertionError, match="a row is off by"):
        assert_rows_close(holed.to(torch.bfloat16), whole)


def test_offsets_beyond_32_bits(kit, triton_backend):
    """The last key head begins after 2**31 elements; the first would be read if offsets wrapped round."""
    heads, length, rows = (2, 200, 70) if kit.rehearsing else (33, 1 << 19, 256)
    generator = torch.Generator(kit.device).manual_seed(0)
    dtype = torch.float16 if kit.rehearsing else torch.bfloat16
    q = torch.randn(1, heads, rows, 128, device=kit.device, dtype=dtype, generator=generator)
    k = torch.randn(1, heads, length, 128, device=kit.device, dtype=dtype, generator=generator)
    attn = sd.compile(kit.patterns["window and sinks"], backend=triton_backend)
    whole = attn(q, k, k, q_offset=length - rows)
    for head in (0, heads - 1):
        alone = attn(
            q[:, head : head + 1].clone(), k[:, head : head + 1].clone(), k[:, head : head + 1].clone(), q_offset=length - rows
        )
        torch.testing.assert_close(whole[:, head : head + 1], alone, rtol=0.02, atol=0.02)


def test_lists_on_the_device_equal_those_on_cpu(kit):
    length = kit.length(5000)
    ids = (torch.arange(length) // 300).to(torch.int32)
    doc, q_idx, kv_idx = sd.table("doc", monotone=True), sd.q_idx, sd.kv_idx
    same = doc[q_idx] == doc[kv_idx]
    for mask in ((kv_idx <= q_idx) & same, same & ((q_idx * kv_idx) % 3 == 0)):
        there = classify(mask.expr, Domain(length, length, tables={"doc": ids.to(kit.device)}))
        here = classify(mask.expr, Domain(length, length, tables={"doc": ids}))
        assert there.full.columns.device.type == kit.device
        assert torch.equal(there.classes().cpu(), here.classes())
