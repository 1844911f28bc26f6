"""Long sums over entries of tables, which kernels run as loops: interpreted kernels against the reference."""

import operator
from functools import reduce

import pytest

import sparsedsl as sd
from sparsedsl import h, kv_idx, q_idx, score
from sparsedsl.backends.triton.limits import LIMITS
from sparsedsl.codegen.gradient_axes import rolled_reads
from sparsedsl.gpu.configs import Config
from sparsedsl.testing import assert_matches_reference, tensor

causal = kv_idx <= q_idx
hidden, shift, out = (sd.table(name, learned=True) for name in ("hidden", "shift", "out"))
fixed = sd.table("fixed", dtype=float)
far = sd.log(abs(q_idx - kv_idx) + 1)


def total(units):
    return reduce(operator.add, units)


NETWORKS = {
    # name: pattern, how many units its loops have
    "a bias by distance": (sd.attend(causal, sd.patterns.fire(11)), 11),
    "from the third entry on": (sd.attend(causal, score + total(out[h, j] * sd.relu(hidden[j] * far) for j in range(2, 13))), 11),
    "of the score, capped": (
        sd.attend(causal, 3 * sd.tanh(total(out[h, j] * sd.sigmoid(hidden[j] * score + shift[j]) for j in range(9)))),
        9,
    ),
    "entries by key": (
        sd.attend(causal & (q_idx - kv_idx < 9), score + total(out[kv_idx % 7, j] * sd.exp(-hidden[j]) for j in range(8))),
        8,
    ),
    "a table that is not learned": (sd.attend(causal, score + total(fixed[j] * sd.cos(hidden[j] * far) for j in range(10))), 10),
    "factors of one another": (
        sd.attend(causal, score * total(out[h, j] * hidden[j] for j in range(8)) + total(shift[j] * far for j in range(8))),
        8,
    ),
    "weights as they are": (
        sd.attend(causal, total(out[h, j] * sd.relu(hidden[j] * score) for j in range(8)), normaliser="pointwise"),
        8,
    ),
    "lists": (sd.attend((kv_idx * q_idx) % 3 != 1, score + total(out[h, j] * sd.relu(hidden[j] * score) for j in range(8))), 8),
    "too few": (sd.attend(causal, score + total(out[h, j] * hidden[j] for j in range(7))), None),
    "lengths that differ": (
        sd.attend(causal, score + total(out[h, j] * far for j in range(8)) + total(hidden[j] * score for j in range(9))),
        None,
    ),
    "entries by distance": (sd.attend(causal, score + total(out[sd.clamp(q_idx - kv_idx, 0, 9), j] for j in range(8))), None),
}  # fmt: skip
SHAPES = {"hidden": (16,), "shift": (16,), "fixed": (16,), "out": (10, 16)}


def tables_of(pattern):
    fire = {"fire_c": (1,), "fire_length": (1,), "fire_out": (2, 11), "fire_out_bias": (2,)}
    heads = dict(pattern.head_reads)
    found = {}
    for seed, name in enumerate(pattern.tables):
        shape = SHAPES.get(name) or fire.get(name) or (11,)
        found[name] = tensor(*(2 if heads.get(name) == dim else n for dim, n in enumerate(shape)), seed=40 + seed)
    return found | {name: 3 + found[name].abs() for name in ("fire_c", "fire_length") if name in found}


def qkv(queries, keys):
    return [tensor(1, heads, n, 16, seed=seed) for seed, (heads, n) in enumerate(((2, queries), (1, keys), (1, keys)))]


@pytest.mark.parametrize("name", NETWORKS)
def test_sums_that_are_loops(name, options):
    pattern, units = NETWORKS[name]
    assert {one.units[1] for one in rolled_reads(pattern) if one.units} == ({units} if units else set())
    options(LIMITS, interpreted=Config(16, 16, 4, 1))
    attn = sd.compile(pattern, backend="triton")
    compared = assert_matches_reference(attn, *qkv(20, 37), q_offset=17, **tables_of(pattern))
    assert {f"d{name}" for name, spec in pattern.tables.items() if spec.learned} < set(compared)


def test_a_decode_step(options):
    options(LIMITS, splits=3)
    pattern, _ = NETWORKS["a bias by distance"]
    assert_matches_reference(sd.compile(pattern, backend="triton"), *qkv(1, 50), q_offset=49, **tables_of(pattern))
