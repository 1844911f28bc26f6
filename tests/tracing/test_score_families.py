"""The score families of the public example collections, written as FlexAttention users write them, value by value."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sparsedsl.tracing import trace_score

SLOPES = torch.tensor([2.0 ** -(i + 1) for i in range(3)])
RELATIVE = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
LATENT_Q, LATENT_KV = (torch.randn(17, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
GRAPH_DISTANCE = torch.randint(0, 6, (17, 17), generator=torch.Generator().manual_seed(3))
DISTANCE_BIAS = torch.randn(6, 3, generator=torch.Generator().manual_seed(4))
BATCH_BIAS = torch.randn(2, 3, 12, 17, generator=torch.Generator().manual_seed(5))


def alibi(heads):
    def score_mod(score, b, h, q_idx, kv_idx):
        return score + torch.exp2(-((h + 1) * 8.0 / heads)) * (kv_idx - q_idx)

    return score_mod


def soft_cap(cap):
    return lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap)


class CheapTanh(torch.nn.Module):
    """A rational approximation of tanh, as hardware does it."""

    def forward(self, x):
        x = torch.clamp(x, -4.9, 4.9)
        square = x * x
        return x * (27.0 + square) / (27.0 + 9.0 * square)


def soft_cap_approximate(cap):
    tanh = CheapTanh()
    return lambda score, b, h, q_idx, kv_idx: tanh(score / cap) * cap


def t5_bucket(distance, buckets, furthest, both_ways):
    """Half of the buckets exact, half logarithmic, in float32 as the model computes it."""
    bucket = torch.zeros_like(distance)
    if both_ways:
        buckets //= 2
        bucket = (distance > 0).to(torch.long) * buckets
        distance = torch.abs(distance)
    else:
        distance = -torch.min(distance, torch.zeros_like(distance))
    exact = buckets // 2
    large = exact + (torch.log(distance.float() / exact) / math.log(furthest / exact) * (buckets - exact)).to(torch.long)
    large = torch.min(large, torch.full_like(large, buckets - 1))
    return bucket + torch.where(distance < exact, distance, large)


def t5(bias, buckets, furthest, both_ways):
    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bias[t5_bucket(kv_idx - q_idx, buckets, furthest, both_ways), h]

    return score_mod


T5_BIAS = torch.randn(16, 3, generator=torch.Generator().manual_seed(6))

FAMILIES = {
    "identity": lambda score, b, h, q, kv: score,
    "scaled": lambda score, b, h, q, kv: score * 0.125,
    "temperature by position": lambda score, b, h, q, kv: score * torch.log(q + 2.0),
    "alibi": alibi(8),
    "alibi by table": lambda score, b, h, q, kv: score - SLOPES[h] * (q - kv).abs(),
    "relative position": lambda score, b, h, q, kv: score + (q - kv),
    "relative causal": lambda score, b, h, q, kv: torch.where(q >= kv, score + (q - kv), -float("inf")),
    "relative table": lambda score, b, h, q, kv: score + RELATIVE[h, q - kv + 32],
    "relative table, negative from the end": lambda score, b, h, q, kv: score + RELATIVE[h, q - kv],
    "soft cap": soft_cap(2.0),
    "soft cap, approximate": soft_cap_approximate(2.0),
    "soft cap, then alibi": lambda score, b, h, q, kv: soft_cap(3.0)(score, b, h, q, kv) - SLOPES[h] * (q - kv),
    "T5, both ways": t5(T5_BIAS, 16, 40, True),
    "T5, causal": t5(T5_BIAS, 16, 40, False),
    "graph distance": lambda score, b, h, q, kv: score + DISTANCE_BIAS[GRAPH_DISTANCE[q, kv], h],
    "latent": lambda score, b, h, q, kv: score * torch.sigmoid(LATENT_Q[q] * LATENT_KV[kv]),
    "dense bias": lambda score, b, h, q, kv: score + BATCH_BIAS[b, h, q, kv],
    "dense bias, step by step": lambda score, b, h, q, kv: score + BATCH_BIAS[b][h][q][kv],
    "checkerboard": lambda score, b, h, q, kv: torch.where(
        (q - kv).abs() % 2 == 1, score * 0.5, torch.where(q == kv, score, score * 2.0)
    ),
    "mask as penalty": lambda score, b, h, q, kv: score + (1.0 - (q >= kv).float()) * -1e4,
    "minus infinity": lambda score, b, h, q, kv: score.masked_fill(q < kv, float("-inf")),
    "sigmoid by the log trick": lambda score, b, h, q, kv: F.logsigmoid(score - math.log(17)),
    "gelu by the log trick": lambda score, b, h, q, kv: torch.log(F.gelu(score).clamp(min=0) + 1e-3),
    "squared relu": lambda score, b, h, q, kv: torch.square(F.relu(score)),
    "threshold": lambda score, b, h, q, kv: torch.where(score > 0.25, score, torch.finfo(score.dtype).min),
    "quantised": lambda score, b, h, q, kv: torch.round(score * 4) / 4,
    "rounded distance": lambda score, b, h, q, kv: score - torch.floor((q - kv).abs() / 3) * 0.1,
    "head switch": lambda score, b, h, q, kv: torch.where(h == 1, score * 2, torch.where(b == 0, score, -score)),
    "a number": lambda score, b, h, q, kv: 0.5,
    "an index": lambda score, b, h, q, kv: q - kv,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, same_score):
    same_score(FAMILIES[name])


FLOAT_FUNCTIONS = {
    "abs": torch.abs,
    "neg": torch.neg,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": torch.tan,
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "tanh": torch.tanh,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "square": torch.square,
    "sign": torch.sign,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "trunc": torch.trunc,
    "frac": torch.frac,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "softplus": F.softplus,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "leaky_relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus 2": lambda x: F.softplus(x, beta=2.0),
    "softplus above its threshold": lambda x: F.softplus(x, beta=2.0, threshold=0.5),
    "softplus, high threshold": lambda x: F.softplus(x * 40, threshold=35),
    "softplus, negative beta": lambda x: F.softplus(x, beta=-1.5, threshold=1.0),
    "elu alpha": lambda x: F.elu(x, alpha=0.3),
    "celu alpha": lambda x: F.celu(x, alpha=0.3),
    "leaky_relu slope": lambda x: F.leaky_relu(x, negative_slope=-0.4),
    "hardtanh bounds": lambda x: F.hardtanh(x, -0.2, 0.7),
    "nan_to_num words": lambda x: torch.nan_to_num(x.abs().log() * 0, nan=0.5, posinf=1.0, neginf=-2.0),
    "sub alpha": lambda x: torch.sub(x, x * x, alpha=-3),
    "root of a square": lambda x: torch.sqrt(x**2) + (x**4) ** 0.25 + torch.sqrt(x * x * 0.25),
    "threshold": lambda x: F.threshold(x, 0.1, -1.0),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clip": lambda x: torch.clip(x, max=0.25),
    "pow": lambda x: torch.pow(x.abs(), 1.5),
    "rpow": lambda x: 2.0**x,
    "reciprocal": lambda x: torch.reciprocal(x * x + 1),
    "log": lambda x: torch.log(x.abs() + 1),
    "log2": lambda x: torch.log2(x.abs() + 1),
    "log10": lambda x: torch.log10(x.abs() + 1),
    "log1p": lambda x: torch.log1p(x.abs()),
    "sqrt": lambda x: x.abs().sqrt(),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 1),
    "atan2": lambda x: torch.atan2(x, x + 2),
    "hypot": lambda x: torch.hypot(x, x + 1),
    "fmod": lambda x: torch.fmod(x, 0.3),
    "remainder": lambda x: x % 0.3,
    "floor_divide": lambda x: x // 0.3,
    "lerp": lambda x: torch.lerp(x, x * x, 0.25),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x, x * x + 1, value=0.5),
    "logaddexp": lambda x: torch.logaddexp(x, x * 2),
    "maximum": lambda x: torch.maximum(x, -x),
    "fmin": lambda x: torch.fmin(x, x * x),
    "copysign": lambda x: torch.copysign(x, -x),
    "nan_to_num": torch.nan_to_num,
    "rsub": lambda x: torch.rsub(x, 1, alpha=3),
    "add alpha": lambda x: torch.add(x, x * x, alpha=0.5),
    "heaviside": lambda x: torch.heaviside(x, x * 0),
    "deg2rad": torch.deg2rad,
    "sinc": torch.sinc,
    "ldexp": lambda x: torch.ldexp(x, torch.tensor(2)),
    "isfinite": lambda x: x.isfinite() * x,
    "true_divide": lambda x: torch.true_divide(1, x * x + 1),
    "float_power": lambda x: torch.float_power(x.abs() + 1, 0.5),
    "sum of casts": lambda x: x.bool() + x.double() + x.half().float() * 0 + x.to(torch.float64) + x.type_as(x),
    "positive": lambda x: +x,
    "divide, floor": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "divide, trunc": lambda x: torch.div(x, 0.3, rounding_mode="trunc"),
    "sin of pi": lambda x: torch.sin(x * torch.pi),
    "round to": lambda x: torch.round(x, decimals=1),
    "item of constant": lambda x: x * torch.tensor(3).item(),
}


@pytest.mark.parametrize("name", FLOAT_FUNCTIONS)
def test_float_functions(name, same_score):
    """Each function of the score itself, and of an index, where none of the language's own words may exist."""
    function = FLOAT_FUNCTIONS[name]
    same_score(lambda score, b, h, q, kv: function(score) - function((q - kv) / 7), shape=(1, 2, 5, 7))


def test_decisions_on_floats_are_exact(same_score, same_mask):
    """T5's buckets for every distance up to 6000, in float32 as torch computes them: one wrong bit would move a boundary."""
    same_mask(lambda b, h, q, kv: t5_bucket(kv - q, 32, 128, True) % 3 == 0, shape=(1, 1, 1, 6000))
    same_mask(lambda b, h, q, kv: t5_bucket(-q + 3 * kv, 32, 1000, False) % 2 == 0, shape=(1, 1, 1, 4000), q_offset=6000)
    # float64 would decide each of these otherwise at some keys
    same_mask(lambda b, h, q, kv: kv * 0.1 * 10 == kv, shape=(1, 1, 1, 4000))
    same_mask(lambda b, h, q, kv: (kv / 0.7).long() % 2 == 0, shape=(1, 1, 1, 4000), q_offset=1)
    same_mask(lambda b, h, q, kv: kv * 0.7 - 0.7 <= (kv - 1) * 0.7, shape=(1, 1, 1, 4000))
    # beyond 2**24 float32 cannot tell neighbours apart, nor can a comparison with a float
    same_mask(lambda b, h, q, kv: (q <= 2.0**24 + 1) ^ (q > 2.0**24 + 3), shape=(1, 1, 9, 1), q_offset=(1 << 24) - 3)
    same_mask(lambda b, h, q, kv: (kv.half() * 0.1).to(torch.int32) % 2 == 0, shape=(1, 1, 1, 4000))
    same_mask(lambda b, h, q, kv: (kv.bfloat16() / 3 + 0.1).floor().long() % 2 == 0, shape=(1, 1, 1, 4000))
    same_mask(lambda b, h, q, kv: (kv.double() / 3).ceil() * 0.1 < (q + 1) * 0.7, shape=(1, 1, 3, 400))


def test_a_learned_bias_is_a_learned_table():
    bias = torch.nn.Parameter(torch.zeros(4, 3))
    score = trace_score(lambda score, b, h, q, kv: score + bias[(q - kv).clamp(0, 3), h])
    assert score.tables["bias"].learned and score.bound["bias"] is bias


def test_a_score_keeps_small_ratios_of_constants():
    """Constants are Python's float64 numbers, not rounded to text and back."""
    score = trace_score(lambda score, b, h, q, kv: score * (1 / 3) + math.pi)
    assert str(score) == f"{1 / 3!r}*score + {math.pi!r}"
