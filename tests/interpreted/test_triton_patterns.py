"""Generated kernels, interpreted, against plain attention in float64: each kind of pattern, shape, width, layout and precision once."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import sparsedsl as sd
from sparsedsl import b, h, kv_idx, kv_len, q_idx, q_len, score
from sparsedsl.backends.triton import attention
from sparsedsl.backends.triton.limits import LIMITS
from sparsedsl.gpu.configs import Config
from sparsedsl.testing import assert_matches_reference, tensor

causal = kv_idx <= q_idx
doc, start, order = sd.table("doc", monotone=True), sd.table("start", monotone=True), sd.table("order")
limit, width, keep = sd.table("limit"), sd.table("width"), sd.table("keep", dtype=bool)
chosen, per_head = sd.table("chosen", dtype=bool), sd.table("per_head", dtype=bool)
slope, bias = sd.table("slope", dtype=float), sd.table("bias", learned=True)
near, rows, columns, pairs, sink, cubes = (
    sd.table(name, learned=True) for name in ("near", "rows", "columns", "pairs", "sink", "cubes")
)
distance = sd.clamp(q_idx - kv_idx, 0, 99)

TABLES = {
    "doc": lambda: torch.arange(120) // 13,
    "start": lambda: torch.arange(120) // 11 * 9,
    "order": lambda: (torch.arange(120) * 7) % 120,
    "limit": lambda: (torch.arange(120) * 5) % 43 - 3,
    "width": lambda: torch.tensor([3, 1, 17, 40, 9, 25]),
    "keep": lambda: torch.arange(120) % 5 != 2,
    "chosen": lambda: (torch.arange(15)[:, None] * 3 + torch.arange(15)) % 4 < 2,
    "per_head": lambda: (torch.arange(6)[:, None, None] + torch.arange(15)[:, None] * 3 + torch.arange(15)) % 3 < 1,
    "slope": lambda: torch.exp2(-torch.arange(1.0, 7.0)),
    "bias": lambda: tensor(2, 6, seed=11),
    "near": lambda: tensor(6, 100, seed=12),
    "rows": lambda: tensor(6, 120, seed=13),
    "columns": lambda: tensor(120, seed=14),
    "pairs": lambda: tensor(120, 120, seed=15),
    "sink": lambda: tensor(6, seed=16),
    "cubes": lambda: tensor(6, 8, 8, seed=17),
}

PATTERNS = {
    "full": True,
    "nothing": q_idx < -1,
    "causal": causal,
    "later": kv_idx > q_idx + 5,
    "window": causal & (q_idx - kv_idx < 20),
    "two-sided": abs(q_idx - kv_idx) <= 9,
    "window and sinks": causal & ((q_idx - kv_idx < 9) | (kv_idx < 3)),
    "two windows and an anchor": causal & ((kv_idx < 3) | (q_idx - kv_idx < 7) | ((kv_idx >= 18) & (kv_idx < 25))),
    "either side of a gap": abs(q_idx - kv_idx) > 12,
    "older than 30": q_idx - kv_idx > 30,
    "chunks": causal & (q_idx // 12 == kv_idx // 12),
    "prefix": causal | (kv_idx < 21),
    "prefix by batch entry": causal | (kv_idx < 9 + 14 * b),
    "windows by head": causal & (q_idx - kv_idx < width[h]),
    "windows by batch entry and head": causal & (q_idx - kv_idx < width[h] + 5 * b),
    "limits in a table": kv_idx <= limit[q_idx],
    "documents": causal & (doc[q_idx] == doc[kv_idx]),
    "documents by starts": causal & (kv_idx >= start[q_idx]),
    "first or own document": (doc[kv_idx] == 0) | (doc[q_idx] == doc[kv_idx]),
    "even queries": causal & (q_idx % 2 == 0),
    "from the end": kv_len - kv_idx <= q_len - q_idx + 5,
    "half as fast": (2 * kv_idx + 1 <= q_idx) & (kv_idx // 3 >= 1),
    "twice as fast": (2 * q_idx >= kv_idx) & (2 * q_idx - kv_idx < 30),
    "dilated": causal & ((q_idx - kv_idx) % 3 == 0) & (q_idx - kv_idx < 24),
    "dilated, two-sided": (abs(q_idx - kv_idx) < 17) & ((q_idx - kv_idx) % 4 == 0),
    "strided": causal & (((q_idx - kv_idx) % 5 == 0) | (q_idx - kv_idx < 6)),
    "blocks": chosen[q_idx // 8, kv_idx // 8],
    "blocks by head": per_head[h, q_idx // 8, kv_idx // 8],
    "kept keys": causal & keep[kv_idx],
    "an order of its own": order[kv_idx] <= order[q_idx],
    "scattered": (q_idx * kv_idx) % 7 < 2,
    "scattered by batch entry": (q_idx * kv_idx + b) % 3 < 2,
    "blocks by batch entry and head": (q_idx // 16 + kv_idx // 16 + b + 2 * h) % 4 == 0,
    "scattered blocks": (q_idx // 16 * 2 + kv_idx // 16) % 3 < 2,
    "against the diagonal": (q_idx + kv_idx <= 60) & (q_idx + kv_idx >= 40),
    "soft cap": sd.attend(causal, score=sd.tanh(score / 2) * 2),
    "ALiBi": sd.attend(causal, score=score - slope[h] * (q_idx - kv_idx)),
    "soft cap over lists": sd.attend(chosen[q_idx // 8, kv_idx // 8], score=sd.tanh(score / 2) * 2),
    "score and slope with branches": sd.attend(causal, score=sd.where(kv_idx % 2 == 0, score * sd.sigmoid(score), sd.relu(score) - b)),
    "dilated with a bias": sd.attend(causal & ((q_idx - kv_idx) % 3 == 0), score=score - 0.1 * (q_idx - kv_idx)),
    "score that drops pairs": sd.attend(causal, score=sd.where((q_idx + kv_idx) % 3 == 0, score, float("-inf"))),
    "score that drops rows": sd.attend(causal, score=sd.where(q_idx % 3 == 0, score, float("-inf"))),
    "score of positions alone": sd.attend(causal, score=0.1 * (kv_idx - q_idx) + 0 * score),
    "score that is one number": sd.attend(True, score=0 * score + 2),
    "score of the query alone": sd.attend(causal, score=0.1 * q_idx + 0 * score),
    "scale": sd.attend(causal, scale=0.7),
    "negative scale by a score": sd.attend(causal & (q_idx - kv_idx < 9), score=-2 * score),
    "sink": sd.attend(causal & (q_idx - kv_idx < 9), sink=1.5),
    "learned sink": sd.attend(kv_idx < q_idx - 4, sink=sink[h]),
    "learned sink over lists": sd.attend(chosen[q_idx // 8, kv_idx // 8], score=score + sink[h], sink=sink[h] * 2),
    "learned, by difference": sd.attend(causal & (q_idx - kv_idx < 20), score=score + near[h, distance]),
    "learned, a factor by difference": sd.attend(causal, score=score * near[h, distance // 5]),
    "learned, by difference, over lists": sd.attend(chosen[q_idx // 8, kv_idx // 8], score=score + near[h, abs(q_idx - kv_idx)]),
    "learned, by query": sd.attend(causal, score=score * rows[h, q_idx]),
    "learned, by key": sd.attend(causal, score=score + columns[kv_idx] * 2),
    "learned, by key, over lists": sd.attend(causal & keep[kv_idx], score=score + columns[kv_idx // 3]),
    "learned, by query and by key": sd.attend(causal, score=score + rows[h, q_idx] * columns[kv_idx]),
    "learned, by pair": sd.attend(abs(q_idx - kv_idx) < 12, score=score * pairs[q_idx, kv_idx]),
    "learned, by pair of blocks": sd.attend(causal, score=score + pairs[q_idx // 16, kv_idx // 16]),
    "learned, by head and pair of blocks": sd.attend(causal, score=score + cubes[h, q_idx // 16, kv_idx // 16]),
    "learned, by batch entry and head": sd.attend(causal, score=score + bias[b, h] * (kv_idx % 3)),
    "learned, one table in four places": sd.attend(
        causal, score=score + columns[q_idx] + columns[kv_idx] * columns[distance] - columns[(q_idx * kv_idx) % 50]
    ),
    "learned, dilated": sd.attend(causal & ((q_idx - kv_idx) % 3 == 0), score=score + near[h, distance // 3]),
    "ALiBi by a formula": sd.attend(causal, score=score - 0.25 * sd.exp(-h) * abs(q_idx - kv_idx)),
    "ALiBi in a window, with a sink": sd.attend(causal & (q_idx - kv_idx < 20), score=score - slope[h] * abs(kv_idx - q_idx), sink=0.5),
    "a ramp that is no distance": sd.attend(causal & (q_idx - kv_idx < 30), score=2 * score + 0.125 * q_idx - 0.0625 * kv_idx + slope[h]),
    "ALiBi, two-sided": sd.attend(abs(q_idx - kv_idx) < 25, score=score - slope[h] * abs(q_idx - kv_idx)),
    "ALiBi over lists": sd.attend(causal & (kv_idx % 3 != 1) & keep[kv_idx], score=score - slope[h] * (q_idx - kv_idx)),
    "ALiBi by batch entry": sd.attend(causal, score=score - slope[h] * (1 + b) * (q_idx - kv_idx)),
    "large blocks": chosen[q_idx // 32, kv_idx // 32],
    "large blocks with a soft cap": sd.attend(chosen[q_idx // 32, kv_idx // 16], score=sd.tanh(score / 2) * 2),
    "blocks of one side": chosen[q_idx // 64, kv_idx // 8],
    "weights of any sign": sd.attend(
        causal & ((q_idx - kv_idx < 9) | (kv_idx < 3)), score=score * sd.sigmoid(score + near[h, distance]) + rows[h, q_idx] / 8,
        normaliser="pointwise",
    ),
    "weights over lists": sd.attend(chosen[q_idx // 8, kv_idx // 8], normaliser="pointwise"),
    "softpick": sd.attend(causal & ((q_idx - kv_idx) % 3 == 0), score=score + columns[kv_idx], normaliser="softpick"),
    "sticks": sd.attend(kv_idx < q_idx, normaliser="stick_breaking"),
    "sticks over two runs": sd.attend(causal & ((q_idx - kv_idx < 19) | (kv_idx < 9)), normaliser="stick_breaking"),
    "sticks over lists, tables by key and by query": sd.attend(
        chosen[q_idx // 8, kv_idx // 8], score=2 * score + columns[kv_idx] + rows[h, q_idx], normaliser="stick_breaking",
    ),
    "sticks, tables by difference and by pair": sd.attend(
        causal, score=score + near[h, distance] + pairs[q_idx, kv_idx], normaliser="stick_breaking",
    ),
    "sticks whose rest goes to the first key": sd.patterns.stick_breaking(q_idx - kv_idx < 12, rest="first"),
    "sticks of which nothing is left": sd.attend(
        causal, score=score + 10_000 * ((q_idx + kv_idx) % 5 - 2), normaliser="stick_breaking",
    ),
}  # fmt: skip
# (queries, keys, offset)
LENGTHS = ((37, 37, 0), (20, 50, 30), (33, 18, 0), (40, 32, 3), (18, 64, 25))
BLOCKS = itertools.cycle(((16, 16), (16, 32), (32, 16)))


@pytest.mark.parametrize("offset", [0, 32, 64, 20, 33])
@pytest.mark.parametrize("name", ["large blocks", "large blocks with a soft cap", "blocks of one side"])
def test_blocks_wherever_the_first_query_lies(name, offset, options):
    """Tiles that divide the blocks of a mask are not looked up, which holds where the first query begins a block and nowhere else."""
    options(LIMITS, interpreted=Config(16, 16, 4, 1))
    assert_right(PATTERNS[name], *qkv(40, 100), q_offset=offset)


def test_slopes_far_from_the_first_position(options):
    """Sixteen thousand tokens on, a logit is as exact as it is at the first: slopes are multiplied by distances, not by positions."""
    options(LIMITS, interpreted=Config(16, 128, 4, 1))
    keys = 1 << 14
    pattern = sd.attend(causal & (q_idx - kv_idx < 40), score=score - 0.7 * slope[h] * (q_idx - kv_idx))
    assert_right(pattern, *qkv(24, keys), q_offset=keys - 24)


def qkv(
    q_length: int,
    kv_length: int,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (2, 1),
    dims: tuple[int, int] = (16, 16),
    **words: Any,
) -> Any:
    sizes = (heads[0], q_length, dims[0]), (heads[1], kv_length, dims[0]), (heads[1], kv_length, dims[1])
    return [tensor(batch, *size, seed=seed, **words) for seed, size in enumerate(sizes)]


def tables_of(pattern: Any, heads: int) -> dict[str, Any]:
    """The tables that a pattern reads, those read by the head with an entry for each."""
    found = {name: TABLES[name]() for name in pattern.tables}
    for name, dim in pattern.head_reads:
        found[name] = found[name].narrow(dim, 0, min(heads, found[name].shape[dim]))
    return found


def assert_right(pattern: Any, q: Any, k: Any, v: Any, **words: Any) -> None:
    """Output, LSE and all gradients are those of plain attention, as closely as the precision allows."""
    attn = sd.compile(pattern, backend="triton")
    tables = tables_of(attn.pattern, q.shape[1])
    compared = assert_matches_reference(attn, q, k, v, **tables, **words)
    learned = {f"d{n}" for n, spec in attn.pattern.tables.items() if spec.learned}
    assert set(compared) == {"out", "dq", "dk", "dv"} | ({"lse"} if attn.pattern.has_lse else set()) | learned


@pytest.mark.parametrize(
    ("name", "lengths", "block"), [(*pair, next(BLOCKS)) for pair in zip(PATTERNS, itertools.cycle(LENGTHS), strict=False)]
)
def test_patterns(name, lengths, block, options):
    options(LIMITS, interpreted=Config(*block, 4, 1))
    queries, keys, offset = lengths
    reads_both = sd.compile(PATTERNS[name]).pattern
    batch = 2 if any(str(s) == "b" for expr in reads_both.exprs for s in expr.free_symbols) else 1
    assert_right(PATTERNS[name], *qkv(queries, keys, batch=batch), q_offset=offset)


# ---- decode ------------------------------------------------------------------------------------------------------------------------

DECODED = ("causal", "blocks by head", "documents", "windows by head", "window and sinks", "dilated", "learned sink", "soft cap",
           "learned, by query and by key", "weights of any sign", "sticks over two runs",
           "sticks over lists, tables by key and by query")  # fmt: skip
CALLS = (
    (1, (2, 1), 1),
    (1, (5, 1), 3),
    (3, (6, 2), 2),
    (16, (3, 1), 1),
    (7, (2, 2), 4),
    (1, (4, 1), 5),
)  # queries, heads, splits


@pytest.mark.parametrize(("name", "call"), list(zip(DECODED, itertools.cycle(CALLS), strict=False)))
def test_decode(name, call, options):
    queries, heads, splits = call
    options(LIMITS, splits=splits)
    assert_right(PATTERNS[name], *qkv(queries, 83, heads=heads, dims=(16, 24)), q_offset=83 - queries)


@pytest.mark.parametrize("lengths", [(37, 32), (32, 37)], ids=str)
def test_full_tiles_of_lists_where_one_side_is_ragged(lengths):
    assert_right(PATTERNS["scattered blocks"], *qkv(*lengths))


@pytest.mark.parametrize("lengths", [(1, 1, 0), (1, 70, 0), (5, 2, 0), (16, 9, 40), (17, 3, 0)], ids=str)
def test_short_calls(lengths):
    queries, keys, offset = lengths
    for name in ("window and sinks", "blocks"):
        assert_right(PATTERNS[name], *qkv(queries, keys), q_offset=offset)


def test_sticks_some_heads_at_a_time(options):
    """What kernels of the backward pass tell each other has little room here; programs begin with the last tiles, tiles are not square."""
    options(LIMITS, stick_bytes=1, interpreted=Config(32, 16, 4, 1, heavy_first=True))
    assert_right(PATTERNS["sticks"], *qkv(37, 40, batch=2, heads=(4, 2)), q_offset=3)


def test_the_path_of_decode_and_that_of_prefill_agree(options):
    q, k, v = qkv(13, 50, heads=(4, 2), dims=(16, 8))
    found = []
    for limit_of_rows, splits in ((0, 1), (16, 1), (16, 4)):
        options(LIMITS, decode_rows=limit_of_rows, splits=splits)
        for name in ("window and sinks", "learned sink"):
            attn = sd.compile(PATTERNS[name], backend="triton")
            tables = tables_of(attn.pattern, q.shape[1])
            found.append(attn(q, k, v, q_offset=37, return_lse=True, **tables))
    for here, there in ((0, 2), (0, 4), (1, 3), (1, 5)):
        torch.testing.assert_close(found[here], found[there], rtol=1e-5, atol=1e-5)


# ---- widths, heads, layouts, precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(20, 24), (40, 16), (16, 72), (96, 33), (24, 96), (1, 1), (130, 8)], ids=str)
def test_head_dims(dims):
    assert_right(PATTERNS["window and sinks"], *qkv(21, 21, dims=dims))


def test_head_dims_of_decode(options):
    options(LIMITS, splits=2)
    assert_right(PATTERNS["window and sinks"], *qkv(2, 40, dims=(24, 96)), q_offset=30)


@pytest.mark.parametrize("heads", [(3, 1), (5, 1), (6, 2), (3, 3)], ids=str)
def test_query_heads_that_share_key_heads(heads):
    for name in ("windows by head", "learned, by query and by key"):
        assert_right(PATTERNS[name], *qkv(19, 25, heads=heads), q_offset=6)


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
def test_layouts(layout):
    for lengths in ((20, 26, 0), (4, 26, 20)):
        q, k, v = map(LAYOUTS[layout], qkv(*lengths[:2], batch=2, dims=(16, 24)))
        assert_right(PATTERNS["window"], q, k, v, q_offset=lengths[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["window and sinks", "soft cap over lists", "learned, one table in four places", "learned sink"])
def test_lower_precision(name, dtype):
    assert_right(PATTERNS[name], *qkv(21, 30, dtype=dtype), q_offset=9)
    assert_right(PATTERNS[name], *qkv(2, 30, dtype=dtype), q_offset=28)


def test_longest_tiles_first(options):
    options(LIMITS, interpreted=Config(16, 16, 4, 1, heavy_first=True))
    assert_right(PATTERNS["causal"], *qkv(37, 37))
    assert_right(PATTERNS["dilated"], *qkv(37, 37))


@pytest.mark.parametrize("name", ["window and sinks", "documents", "blocks", "dilated", "learned, by query and by key", "sticks"])
def test_keys_through_tensor_descriptors(name, monkeypatch, options):
    launched = []
    launch = attention.launch
    monkeypatch.setattr(
        attention, "launch", lambda source, *words, **more: launched.append(source) or launch(source, *words, **more)
    )
    options(LIMITS, interpreted=Config(16, 16, 4, 1, descriptors=True))
    for lengths, dims in (((37, 41, 4), (16, 32)), ((3, 41, 38), (16, 16)), ((20, 20, 0), (24, 16))):
        assert_right(PATTERNS[name], *qkv(*lengths[:2], dims=dims), q_offset=lengths[2])
    assert any("k_desc" in source.text for source in launched) == (name != "dilated")


def test_one_compiled_pattern_at_many_shapes():
    """Also where the tables change under it."""
    attn = sd.compile(PATTERNS["documents"], backend="triton")
    ids = torch.arange(60) // 7
    for length, offset in ((20, 0), (33, 0), (20, 20), (3, 40)):
        assert_matches_reference(attn, *qkv(length, length), doc=ids, q_offset=offset)
        ids += torch.arange(60) // 9
    assert_matches_reference(attn, *qkv(20, 20), doc=torch.zeros(60, dtype=torch.int64))


@pytest.mark.parametrize(("mask", "step"), [(causal & (q_idx - kv_idx < 20), 3), (causal & ((q_idx - kv_idx) % 4 == 0), 1)])
def test_rows_that_stand_elsewhere(mask, step):
    """Positions with gaps from tables; two runs within the mask, where residues matter."""
    at = torch.cat([torch.arange(8, 40), torch.arange(72, 104)]) if step == 1 else torch.arange(0, 120, step)
    q, k, v = (tensor(1, 2, 120, 16, seed=seed) for seed in range(3))
    here = torch.zeros(120, dtype=torch.int64)
    here[at] = 1
    want = sd.attention(q, k, v, mask & (sd.table("here")[kv_idx] == 1), here=here, backend="reference")[:, :, at]
    mine = (x[:, :, at] for x in (q, k, v))
    found = sd.attention(*mine, mask, q_positions=at, kv_positions=at, backend="triton")
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
