"""The `tiled` lowering against plain attention in float64: every way strips are cut and taken together, forward and backward.

Problems of a hundred tokens are cut as long ones would be: low strips, small tiles, few keys at once, products of every kind.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, q_idx, score
from sparsedsl.backends.tiled import gathered, tile_jobs
from sparsedsl.backends.tiled.limits import LIMITS
from sparsedsl.testing import (
    AttentionCase,
    assert_causal,
    assert_equivariant,
    assert_matches_reference,
    assert_prefill_equals_decode,
    inputs,
    patterns,
    shapes,
    tables_for,
    tensor,
)
from sparsedsl.tiling.cutting import CUTTING, Cutting

causal = kv_idx <= q_idx
doc = sd.table("doc", monotone=True)
bias, sink = sd.table("bias", learned=True), sd.table("sink", learned=True)


@dataclass(frozen=True)
class Cut:
    """How a problem is cut, and how many ``threads`` compute side by side (None: as many as there are)."""

    cutting: Cutting
    threads: int | None = None


def cut_in(block: int, *, threads: int | None = None, **words: Any) -> Cut:
    """Scattered tiles of ``block`` tokens, or of half as many; ``words``: fields of :class:`Cutting`."""
    return Cut(Cutting(blocks=((block, block), (block // 2, block // 2)), **words), threads)


@pytest.fixture(autouse=True)
def built_in_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same schedules on every machine."""
    monkeypatch.setenv("SPARSEDSL_TUNE", "off")


AS_IT_IS = Cut(Cutting())
CUTS = {
    "as it is": AS_IT_IS,
    "single products": cut_in(16, height=16, together=1, single=1),
    "heads together": cut_in(8, height=16, together=1000),
    "few together, in chunks": cut_in(16, height=32, keys=24, together=3),
    "chunks, single products": cut_in(32, height=64, keys=40, together=1, single=1),
    "three threads": cut_in(16, height=16, keys=50, together=3, threads=3),
}


def some_cuts(names: Any, count: int = 3) -> list[tuple[str, str]]:
    """Each name with ``count`` cuts, all cuts about equally often."""
    cuts = list(CUTS)
    return [(name, cuts[(number + 2 * turn) % len(cuts)]) for number, name in enumerate(names) for turn in range(count)]


@contextlib.contextmanager
def cut(how: Cut) -> Iterator[None]:
    """Calls inside are cut so, and memory that nobody has written to holds NaN."""
    changes: dict[str, Any] = {} if how.threads is None else {"threads_from": 1}
    with CUTTING.using(**vars(how.cutting)), LIMITS.using(**changes):
        before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(how.threads or threads)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            torch.set_num_threads(threads)


def assert_right(pattern: Any, q: Any, k: Any, v: Any, how: Cut = AS_IT_IS, **words: Any) -> None:
    """Output, LSE and all gradients are those of plain attention, as closely as the precision allows."""
    attn = sd.compile(pattern, backend="tiled")
    with cut(how):
        compared = assert_matches_reference(attn, q, k, v, **words)
    learned = {f"d{name}" for name, spec in attn.pattern.tables.items() if spec.learned}
    assert set(compared) == {"out", "lse", "dq", "dk", "dv"} | learned


def qkv(
    length: int, kv_len: int | None = None, *, batch=2, heads=4, kv_heads=2, dim=8, dim_v=5, dtype=torch.float64, **words: Any
) -> Any:
    kv_len = kv_len or length
    sizes = (heads, length, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, dim_v)
    return [tensor(batch, *size, seed=seed, dtype=dtype, **words) for seed, size in enumerate(sizes)]


# ---- random patterns ---------------------------------------------------------------------------------------------------------------


@given(
    pattern=patterns(),
    case=shapes(max_len=70, head_dims=(1, 8, 24)) | shapes(max_len=150, max_batch=1, max_heads=2, head_dims=(4, 16)),
    how=st.sampled_from(list(CUTS.values())),
    data=st.data(),
)
@settings(max_examples=150)
def test_random_patterns(pattern, case, how, data):
    tables = data.draw(tables_for(pattern, case))
    q, k, v = data.draw(inputs(case))
    assert_right(pattern, q, k, v, how, q_offset=case.q_offset, **tables)


USUAL = {
    "causal": causal,
    "full": True,
    "nothing": q_idx < -1,
    "window": sd.patterns.sliding_window(40),
    "window and sinks": causal & (sd.patterns.sliding_window(30) | sd.patterns.sinks(4)),
    "two-sided": abs(q_idx - kv_idx) <= 25,
    "not near": abs(q_idx - kv_idx) > 25,
    "dilated": sd.patterns.dilated(10, step=4),
    "dilated, two-sided": sd.patterns.dilated(10, step=4, two_sided=True),
    "strided": sd.patterns.strided(8, local=20),
    "every eighth key": (kv_idx % 8 == 1) & causal,
    "sum of both": ((q_idx + kv_idx) % 4 == 1) & causal,
    "chunks": sd.patterns.chunked(50),
    "prefix": causal | (kv_idx < 60),
    "window xor remainder": sd.patterns.sliding_window(33) ^ (kv_idx % 3 == 1),
    "residue classes that meet": ((kv_idx % 4 == 1) & causal & (q_idx > 50)) | ((q_idx * kv_idx) % 3 < 2),
    "two remainders": ((q_idx - kv_idx) % 4 == 0) | ((q_idx + kv_idx) % 6 == 1),
    "picture": sd.patterns.neighbourhood_2d(10, 15, 5),
    "scattered": causal & ((q_idx // 4) * (kv_idx // 4) % 5 < 2),
    "blocks per head": causal & ((q_idx // 16 + kv_idx // 16 + h) % 3 == 0),
    "against the diagonal": (q_idx + kv_idx <= 140) & (q_idx + kv_idx >= 120),
    "twice as fast": (2 * q_idx >= kv_idx) & (2 * q_idx - kv_idx < 30),
    "half as fast": (q_idx >= 2 * kv_idx) & (q_idx - 2 * kv_idx < 30),
    "window per head": causal & (q_idx - kv_idx < 5 + 11 * h),
    "length per batch entry": kv_idx < 70 * b,
    "both": causal & (q_idx - kv_idx < 5 + 11 * h + 7 * b),
    "ALiBi": sd.attend(sd.patterns.sliding_window(40), score=sd.patterns.alibi(4)),
    "soft cap": sd.attend(sd.patterns.sliding_window(40), score=sd.patterns.softcap(5)),
    "soft cap, dilated": sd.attend(sd.patterns.dilated(10, step=4), score=sd.patterns.softcap(5)),
    "capped tightly": sd.attend(causal, score=sd.tanh(score * 3) / 2),
    "capped loosely": sd.attend(causal, score=sd.patterns.softcap(500)),
    "general score": sd.attend(causal, score=score * sd.sigmoid(score) + sd.exp(-abs(q_idx - kv_idx) * 0.1)),
    "general score, dilated": sd.attend(sd.patterns.dilated(10, step=4), score=score * (1 + q_idx - kv_idx) / 9),
    "general score per head": sd.attend(sd.patterns.sliding_window(40), score=score * (1 + h) - b),
    "bias, dilated": sd.attend(sd.patterns.dilated(10, step=4), score=score - 0.1 * kv_idx + 0.01 * q_idx),
    "bias of scattered tiles": sd.attend((q_idx * kv_idx) % 3 == 0, score=score - 0.1 * kv_idx + 0.01 * q_idx * h),
    "bias, mask per batch entry": sd.attend(causal & (q_idx - kv_idx < 5 + 7 * b), score=score - 0.1 * (q_idx - kv_idx)),
    "bias, mask per head": sd.attend(causal & (q_idx - kv_idx < 5 + 7 * h), score=score - 0.1 * (q_idx - kv_idx)),
    "bias per head, mask per batch entry": sd.attend(causal & (q_idx - kv_idx < 5 + 7 * b), score=score - 0.1 * kv_idx * h),
    "bias per batch entry": sd.attend(causal & (q_idx - kv_idx < 30), score=score - 0.1 * (q_idx - kv_idx) * b),
    "bias, scattered per batch entry": sd.attend((q_idx * kv_idx + b) % 3 < 2, score=score - 0.1 * (q_idx - kv_idx)),
    "scattered per head": (q_idx * kv_idx + h) % 3 < 2,
    "residue classes per batch entry": ((kv_idx % 4) == 1) | (causal & (q_idx - kv_idx < 5 * b)),
    "sink": sd.attend(sd.patterns.sliding_window(40), sink=1.5),
    "sink over residue classes": sd.attend(sd.patterns.strided(8, local=20), sink=0.5 * h),
    "minus infinity as a score": sd.attend(causal, score=sd.where(kv_idx % 3 == 0, score, -math.inf)),
    "minus infinity as a bias": sd.attend(causal, score=score + sd.where(kv_idx % 3 == 0, 0.0, -math.inf)),
    "minus infinity for whole rows": sd.attend(True, score=sd.where(q_idx % 3 == 0, score, -math.inf)),
    "score without the product": sd.attend(causal, score=0.1 * (kv_idx - q_idx) + 0 * score),
}


@pytest.mark.parametrize(("name", "how"), some_cuts(USUAL))
def test_usual_patterns(name, how):
    assert_right(USUAL[name], *qkv(110), CUTS[how])


@pytest.mark.parametrize(
    "name", ["window", "strided", "scattered", "general score", "ALiBi", "soft cap", "sink over residue classes"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_usual_patterns_in_lower_precision(name, dtype):
    for how in ("as it is", "single products", "few together, in chunks"):
        assert_right(USUAL[name], *qkv(100, dtype=dtype), CUTS[how])


LENGTHS = [(1, 1, 0), (1, 150, 149), (1, 150, 0), (37, 150, 100), (65, 65, 0), (129, 129, 0), (3, 64, 90), (90, 7, 0)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", ["window", "strided", "every eighth key", "scattered", "window xor remainder", "ALiBi"])
def test_lengths_and_offsets(name, lengths):
    q_len, kv_len, offset = lengths
    for how in ("as it is", "single products", "few together, in chunks"):
        assert_right(USUAL[name], *qkv(q_len, kv_len, batch=1), CUTS[how], q_offset=offset)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (5, 1), (6, 3), (3, 3), (12, 2)])
@pytest.mark.parametrize("name", ["window", "strided", "scattered", "window per head", "general score per head"])
@pytest.mark.parametrize("how", ["heads together", "few together, in chunks"])
def test_heads(name, heads, kv_heads, how):
    assert_right(USUAL[name], *qkv(100, heads=heads, kv_heads=kv_heads), CUTS[how])


LAYOUTS = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "head_dim outside": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "one for the batch": lambda t: t[:1].expand(t.shape),
    "one for all heads": lambda t: t[:, :1].expand(t.shape),
    "one for all positions": lambda t: t[:, :, :1].expand(t.shape),
    "every other": lambda t: t.repeat_interleave(2, 2)[:, :, ::2],
    "a part of a cache": lambda t: torch.cat([t, t, t], dim=2)[:, :, 5 : 5 + t.shape[2]],
    "a part of a projection": lambda t: torch.cat([t, t], dim=3)[..., 3 : 3 + t.shape[3]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("window", torch.float32), ("window", torch.bfloat16), ("strided", torch.float32), ("scattered", torch.float64)],
)
def test_layouts(name, dtype, layout):
    for how in ("single products", "chunks, single products"):
        assert_right(USUAL[name], *map(LAYOUTS[layout], qkv(90, dtype=dtype)), CUTS[how])


# ---- tables ------------------------------------------------------------------------------------------------------------------------


LEARNED = {
    "relative bias": (sd.attend(sd.patterns.sliding_window(40), score=score + bias[h, q_idx - kv_idx]), {"bias": (4, 40)}),
    "bias of keys, dilated": (sd.attend(sd.patterns.dilated(10, step=4), score=score + bias[kv_idx]), {"bias": (130,)}),
    "factor": (sd.attend(causal, score=score * bias[q_idx - kv_idx]), {"bias": (130,)}),
    "temperature of a head": (sd.attend(USUAL["scattered"], score=score * bias[h]), {"bias": (4,)}),
    "cap": (sd.attend(causal, score=sd.tanh(score / 5) * bias[h]), {"bias": (4,)}),
    "bias per batch entry": (sd.attend(sd.patterns.strided(8, local=20), score=score + bias[b, kv_idx]), {"bias": (2, 130)}),
    "scattered bias": (sd.attend((q_idx * kv_idx) % 3 == 0, score=score + bias[h, kv_idx // 7]), {"bias": (4, 19)}),
    "sink": (sd.attend(sd.patterns.sliding_window(40), sink=sink[h]), {"sink": (4,)}),
    "sink over residue classes and bias": (
        sd.attend(sd.patterns.strided(8, local=20), score=score + bias[h], sink=sink[b, h]), {"bias": (4,), "sink": (2, 4)}
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "how"), some_cuts(LEARNED))
def test_learned_tables(name, how):
    pattern, sizes = LEARNED[name]
    for dtype in (torch.float64, torch.float32):
        tables = {table: tensor(*size, seed=7 + i, dtype=dtype) for i, (table, size) in enumerate(sizes.items())}
        assert_right(pattern, *qkv(100, dtype=dtype), CUTS[how], **tables)


@pytest.mark.parametrize("how", CUTS)
def test_documents(how):
    ids = torch.repeat_interleave(torch.arange(7), torch.tensor([20, 3, 40, 1, 45, 25, 16]))
    near = causal & (doc[q_idx] == doc[kv_idx])
    assert_right(near, *qkv(150), CUTS[how], doc=ids)
    assert_right(near & (q_idx - kv_idx < 20), *qkv(150), CUTS[how], doc=ids)
    assert_right((doc[q_idx] == doc[kv_idx]) | sd.patterns.sliding_window(30), *qkv(150), CUTS[how], doc=ids)


@pytest.mark.parametrize("reads", [b, h], ids=["b", "h"])
def test_a_lane_that_reads_less_than_the_mask(reads):
    """Taken apart, the mask turns out to be the same for all heads or batch entries."""
    at_least_one = sd.maximum(1, sd.table("packed")[reads, q_idx])
    for index in (q_idx * kv_idx - 900, q_idx - kv_idx - 9, abs(q_idx - kv_idx - 20) - 9):
        mask = sd.minimum(index, at_least_one) <= 0
        assert_right(mask, *qkv(60), packed=torch.zeros(4, 60, dtype=torch.int64))


def test_tables_that_change_are_seen():
    """Schedules and tiles of masks are remembered, but not beyond the values they were made of."""
    attn, (q, k, v) = sd.compile(causal & (doc[q_idx] == doc[kv_idx]), backend="tiled"), qkv(150)
    ids = torch.arange(150) // 40
    for _ in range(3):
        assert_matches_reference(attn, q, k, v, doc=ids)
        ids += torch.arange(150) // 60
    assert_matches_reference(attn, q, k, v, doc=torch.zeros(150, dtype=torch.int64))
    rows = sd.compile(causal & (kv_idx < sd.table("used")[b]), backend="tiled")
    for used in ([3, 150], [150, 3], [0, 0]):
        assert_matches_reference(rows, q, k, v, used=torch.tensor(used))


def test_one_compiled_pattern_at_many_shapes():
    attn = sd.compile(USUAL["strided"], backend="tiled")
    for length, dtype, batch in ((70, torch.float32, 1), (70, torch.float64, 1), (71, torch.bfloat16, 2), (70, torch.float32, 2)):
        assert_matches_reference(attn, *qkv(length, dtype=dtype, batch=batch))
        assert_matches_reference(attn, *qkv(length, dtype=dtype, batch=batch, kv_heads=1), q_offset=3)


# ---- numbers at the edge -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 10.0, 30.0, 1e4])
@pytest.mark.parametrize("name", ["window", "strided", "scattered"])
def test_logits_of_every_size(name, size, dtype):
    q, k, v = qkv(80, dtype=dtype, batch=1)
    for how in ("as it is", "few together, in chunks"):
        assert_right(USUAL[name], q * size, k, v, CUTS[how])


@pytest.mark.parametrize("how", CUTS)
def test_the_largest_logits_are_masked(how):
    """A maximum taken before the mask would leave nothing of the rows it masks."""
    q, k, v = qkv(100, dtype=torch.float32, batch=1)
    q, k = q.abs() + 0.1, k.abs() + 0.1
    k[:, :, 60:] *= 1e4
    assert_right(sd.attend(causal & (kv_idx < 60)), q, k, v, CUTS[how])
    assert_right(sd.attend(((q_idx * kv_idx) % 3 < 2) & (kv_idx < 60)), q, k, v, CUTS[how])
    assert_right(sd.attend(causal & (kv_idx % 7 != 3) & (kv_idx < 60), score=score + 0.01 * kv_idx), q, k, v, CUTS[how])


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("sign", [1, -1])
def test_all_logits_are_equal(sign, how):
    """Also where 2**logit would leave the range of float32."""
    for logit in (0.0, 50.0, 55.0, 57.0, 300.0):
        q, k = torch.ones(1, 2, 80, 4), torch.full((1, 1, 80, 4), sign * logit / 4)
        assert_right(sd.attend(causal, scale=1.0), q, k, tensor(1, 1, 80, 3, seed=1), CUTS[how])


@pytest.mark.parametrize("size", [1e-25, 1e-16, 1e16, 1e25])
@pytest.mark.parametrize("sign", [1, -1])
def test_values_of_every_size(sign, size):
    """2**logit times a value stays within float32."""
    q, k = torch.ones(1, 2, 40, 4), torch.full((1, 1, 40, 4), sign * 55 / 4)
    attn, v = sd.compile(sd.attend(causal, scale=1.0), backend="tiled"), tensor(1, 1, 40, 3, seed=1)
    out, plain = attn(q, k, v * size), attn(q, k, v)
    torch.testing.assert_close(out / size, plain, rtol=1e-4, atol=1e-5)


def test_empty_rows():
    mask = causal & (q_idx - kv_idx >= 30)
    for how in CUTS.values():
        assert_right(mask, *qkv(100), how)
        assert_right(sd.attend(mask, sink=0.5), *qkv(100), how)
        assert_right(mask & (q_idx % 5 == 2), *qkv(100), how)
        assert_right(mask & (kv_idx % 5 == 2), *qkv(100), how)
        assert_right((q_idx * kv_idx) % 97 == 5, *qkv(100), how)
    q, k, v = qkv(100, dtype=torch.float32)
    with cut(AS_IT_IS):
        out, lse = sd.compile(mask, backend="tiled")(q, k, v, return_lse=True)
    assert not bool(out[:, :, :30].any()) and bool((lse[:, :, :30] == -math.inf).all()) and bool(lse[:, :, 30:].isfinite().all())


WILD = {
    "bias that is NaN where masked": sd.attend(causal, score=score - sd.log(q_idx - kv_idx + 1)),
    "bias that is infinite where masked": sd.attend(kv_idx < q_idx, score=score + 1 / (q_idx - kv_idx)),
    "score that is NaN where masked": sd.attend(causal, score=sd.log(1 + score * score + (q_idx - kv_idx))),
    "slope that is NaN where masked": sd.attend(causal, score=score * sd.sqrt(q_idx - kv_idx + 1)),
    "scattered": sd.attend(causal & ((q_idx * kv_idx) % 3 < 2), score=score - sd.log(q_idx - kv_idx + 1)),
    "residue classes": sd.attend(sd.patterns.strided(8, local=20), score=score - sd.log(q_idx - kv_idx + 1)),
}


@pytest.mark.parametrize(("name", "how"), some_cuts(WILD))
def test_what_a_score_is_where_the_mask_drops_it_does_not_matter(name, how):
    assert_right(WILD[name], *qkv(90, batch=1), CUTS[how])


def test_a_table_that_is_infinite_where_masked():
    wild = torch.zeros(4, 120)
    wild[:, 60:] = math.inf
    pattern = sd.attend(sd.patterns.sliding_window(40), score=score + bias[h, q_idx - kv_idx])
    for how in CUTS.values():
        assert_right(pattern, *qkv(120, batch=1), how, bias=wild)


def test_a_sink_of_minus_infinity_is_no_sink():
    values = torch.tensor([-math.inf, 0.0, 1.0, -math.inf], dtype=torch.float64)
    q, k, v = qkv(60)
    for mask in (kv_idx < q_idx, q_idx < -1, USUAL["strided"]):
        attn = [sd.compile(sd.attend(mask, sink=sink[h]), backend=backend) for backend in ("tiled", "reference")]
        (out, lse), (wanted, wanted_lse) = (one(q, k, v, sink=values, return_lse=True) for one in attn)
        torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(lse, wanted_lse, rtol=1e-10, atol=1e-10)


# ---- autograd ------------------------------------------------------------------------------------------------------------------------


def test_gradients_by_finite_differences():
    """Of the kernel itself, without the reference between."""
    pattern = sd.attend(causal & (q_idx - kv_idx < 4), score=sd.tanh(score) * 3 + bias[h, q_idx - kv_idx], sink=sink[h])
    attn, sizes = sd.compile(pattern, backend="tiled"), ((1, 4, 6, 3), (1, 2, 6, 3), (1, 2, 6, 2), (4, 4), (4,))
    leaves = [tensor(*size, seed=i, dtype=torch.float64).requires_grad_() for i, size in enumerate(sizes)]

    def call(q, k, v, bias, sink):
        return attn(q, k, v, bias=bias, sink=sink, return_lse=True)

    with cut(Cut(Cutting(height=2, keys=3, together=2))):
        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "qk", "kvbias"])
def test_only_the_gradients_that_are_wanted(wanted):
    pattern = sd.attend(sd.patterns.sliding_window(9), score=score + bias[q_idx - kv_idx])
    leaves = dict(zip(["q", "k", "v", "bias"], [*qkv(30), tensor(9, seed=5, dtype=torch.float64)], strict=True))
    found = []
    for backend in ("tiled", "reference"):
        here = {name: t.clone().requires_grad_(name in wanted) for name, t in leaves.items()}
        sd.compile(pattern, backend=backend)(**here).square().sum().backward()
        found.append([t.grad for t in here.values()])
    for mine, theirs in zip(*found, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_gradients_through_the_lse_alone():
    q, k, v = (t.requires_grad_() for t in qkv(60))
    grads = []
    for backend in ("tiled", "reference"):
        lse = sd.compile(USUAL["strided"], backend=backend)(q, k, v, return_lse=True)[1]
        grads.append(torch.autograd.grad(lse.square().sum(), [q, k, v], allow_unused=True))
    for mine, theirs in zip(*grads, strict=True):
        theirs = torch.zeros_like(mine) if theirs is None else theirs
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


# ---- what else must hold ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["relative bias", "factor", "scattered bias", "sink over residue classes and bias"])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_two_runs_give_the_same_bits(name, dtype, threads):
    pattern, sizes = LEARNED[name]
    runs = []
    for _ in range(3):
        attn = sd.compile(pattern, backend="tiled")
        q, k, v = (t.requires_grad_() for t in qkv(100, dtype=dtype))
        tables = {table: tensor(*size, seed=7).requires_grad_() for table, size in sizes.items()}
        with cut(cut_in(16, height=16, together=2, threads=threads)):
            out, lse = attn(q, k, v, return_lse=True, **tables)
            grads = torch.autograd.grad(out.float().square().sum() + lse[lse.isfinite()].sum(), [q, k, v, *tables.values()])
        runs.append([out, lse, *grads])
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=["inference_mode", "no_grad"])
@pytest.mark.parametrize("name", ["window", "strided", "scattered", "general score", "ALiBi", "sink over residue classes"])
def test_inference_on_several_threads(name, mode):
    attn, (q, k, v) = sd.compile(USUAL[name], backend="tiled"), qkv(150, dtype=torch.float32)
    with cut(CUTS["three threads"]), mode():
        out, lse = attn(q, k, v, return_lse=True)
    wanted, wanted_lse = sd.compile(USUAL[name], backend="reference")(q, k, v, return_lse=True)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "kv_heads"), [(1, 1), (2, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("name", ["window", "strided", "scattered", "relative bias", "factor", "window per head"])
def test_threads_take_heads(name, batch, kv_heads):
    pattern, sizes = LEARNED.get(name) or (USUAL[name], {})
    tables = {table: tensor(*size, seed=7, dtype=torch.float64) for table, size in sizes.items()}
    for threads in (2, 3):
        assert_right(
            pattern, *qkv(100, batch=batch, kv_heads=kv_heads), cut_in(16, height=16, together=2, threads=threads), **tables
        )


@pytest.mark.parametrize("how", ["as it is", "few together, in chunks", "heads together"])
def test_a_row_does_not_depend_on_the_rest_of_the_call(how):
    case = AttentionCase(batch=2, heads=4, kv_heads=2, q_len=40, kv_len=40)
    with cut(CUTS[how]):
        for mask in (USUAL["window"], USUAL["strided"], USUAL["every eighth key"]):
            attn = sd.compile(mask, backend="tiled")
            assert_causal(attn, case)
            assert "token by token" in assert_prefill_equals_decode(attn, case)
            assert assert_equivariant(attn, case) == ("batch", "heads")


class Largest(TorchDispatchMode):
    """The largest tensor that any operator made, in elements."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.mark.parametrize("name", ["causal", "window", "strided", "picture", "general score", "ALiBi"])
def test_memory_grows_with_the_length_not_its_square(name):
    """No tensor of either pass has more elements than the operands, or than the logits that are held at once."""
    at_once, length = 1 << 20, 3000
    pattern = sd.patterns.neighbourhood_2d(60, 50, 5) if name == "picture" else USUAL[name]
    heads = getattr(pattern, "heads", None) or 1
    q, k, v = (t.requires_grad_() for t in qkv(length, batch=1, heads=heads, kv_heads=1, dtype=torch.float32))
    attn = sd.compile(pattern, backend="tiled")
    with cut(Cut(Cutting(height=1024), threads=1)), Largest() as largest:  # a mode sees the thread it is entered on
        attn(q, k, v).sum().backward()
    assert 0 < largest.elements <= 2 * max(at_once, q.numel()) < length * length // 4


def test_every_kind_of_unit_is_run_by_these_tests():
    kinds = set()
    with pytest.MonkeyPatch.context() as patch:
        real = tile_jobs.TileJob.sums

        def noted(job, q):
            kinds.add((job.high - job.low > 1, len(job.key_ranges) > 1, isinstance(job, gathered.ScatteredJob)))
            return real(job, q)

        patch.setattr(tile_jobs.TileJob, "sums", noted)
        for how in CUTS.values():
            for name in ("causal", "window", "window and sinks", "strided", "scattered", "residue classes that meet"):
                q, k, v = qkv(150, dtype=torch.float32)
                with cut(how), torch.no_grad():
                    sd.compile(USUAL[name], backend="tiled")(q, k, v)
    assert kinds == set(itertools.product((True, False), repeat=3))


# ---- what people see -----------------------------------------------------------------------------------------------------------------


def test_explain_shows_the_schedule():
    text = str(sd.compile(causal & (q_idx - kv_idx < 100), backend="tiled").explain(8192, heads=8))
    assert "backend: tiled (asked for)" in text and "schedule:" in text
    assert "strips of up to " in text and "pairs computed" in text and "queries from query 0: " in text
    text = str(sd.compile(USUAL["dilated"], backend="tiled").explain(4096))
    assert "queries 0, 4, 8, .., keys 0, 4, 8, .., and 3 more such classes:" in text
    explained = sd.compile(USUAL["picture"], backend="tiled").explain(150)
    assert any("scattered tiles" in line for line in explained.details)


def test_auto_trains_through_tiled():
    q, k, v = (t.requires_grad_() for t in qkv(150, dtype=torch.float32))
    attn = sd.compile(USUAL["window"])
    assert attn.explain(150, batch=2, heads=4, kv_heads=2, grad=True).plan.backend == "tiled"
    grads = [
        torch.autograd.grad(one(q, k, v).square().sum(), [q, k, v])
        for one in (attn, sd.compile(USUAL["window"], backend="reference"))
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert attn.static.runner("tiled")._schedules, "the schedule was made by the call"


def test_its_source_is_the_pattern():
    attn = sd.compile(causal, backend="tiled")
    assert attn.source == attn.pattern.text == "attend(q_idx >= kv_idx)"


# ---- logits far from 0 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [-1e9, torch.finfo(torch.float32).min, 1e30])
@pytest.mark.parametrize("kind", ["added", "chosen", "scattered"])
def test_gradients_where_every_logit_is_padding(number, kind):
    """In float32 -1e9 plus the logarithm of a sum is -1e9: an LSE does not hold it, and weights made of it would sum to their number."""
    bias = sd.table("bias", dtype="float")
    pattern = {
        "added": sd.attend(causal, score=score + bias[kv_idx]),
        "chosen": sd.attend(causal, score=sd.where(bias[kv_idx] != 0, bias[kv_idx], score)),
        "scattered": sd.attend(
            causal & ((q_idx * kv_idx) % 3 < 2), score=score + bias[kv_idx], sink=-2.0 if number > 0 else None
        ),
    }[kind]
    values = torch.where(torch.arange(60) < 40, number, 0.0)
    leaves = [tensor(1, heads, 60, 16, seed=heads).requires_grad_() for heads in (4, 2)]
    leaves.append(tensor(1, 2, 60, 16, seed=9).requires_grad_())
    found = []
    for backend in ("reference", "tiled"):
        out, lse = sd.compile(pattern, backend=backend)(*leaves, bias=values, return_lse=True)
        found.append(torch.autograd.grad([out, lse], leaves, [tensor(*out.shape, seed=1), tensor(*lse.shape, seed=2)]))
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)
