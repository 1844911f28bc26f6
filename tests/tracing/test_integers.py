"""torch's integer and boolean operations, each by itself, on operands of every sign and in every width."""

from __future__ import annotations

import pytest
import torch

import sparsedsl as sd

WHOLE = {
    "floor": lambda x, n: x // n,
    "floor, negative": lambda x, n: x // -n,
    "remainder": lambda x, n: x % n,
    "remainder, negative": lambda x, n: x % -n,
    "div floor": lambda x, n: torch.div(x, n, rounding_mode="floor"),
    "div trunc": lambda x, n: torch.div(x, n, rounding_mode="trunc"),
    "div trunc, negative": lambda x, n: torch.div(x, -n, rounding_mode="trunc"),
    "fmod": lambda x, n: torch.fmod(x, n),
    "fmod, negative": lambda x, n: torch.fmod(x, -n),
    "number by value": lambda x, n: 100 // (x % n + 1) + 50 % (x % n + 2) + 7 - x,
    "add, scaled": lambda x, n: torch.add(x, x % n, alpha=3) + torch.sub(x, n, alpha=2) + torch.rsub(x, n, alpha=2),
    "power": lambda x, n: (x % n) ** 3 + torch.pow(x % n, 2) + torch.square(x % n) + 2 ** (x % n),
    "sign": lambda x, n: torch.sign(x) * n + torch.sgn(x),
    "abs": lambda x, n: x.abs() + abs(x - n) + torch.neg(x) + (-x) + (+x),
    "minimum": lambda x, n: torch.minimum(x, x * 0 + n) + torch.max(x, x * 0 - n),
    "clamp": lambda x, n: x.clamp(-n, n) + torch.clamp(x, min=n) + torch.clip(x, max=n) + x.clamp(n, -n),
    "clamp by tensors": lambda x, n: torch.clamp(x, x % n, x % n + 3) + x.clamp_min(n) + x.clamp_max(n),
    "relu": lambda x, n: torch.relu(x) + torch.nn.functional.relu6(x) + torch.nn.functional.hardtanh(x, -n, n),
    "bits": lambda x, n: (x & n) + (x | n) * 2 + (x ^ n) * 3 + ~x,
    "bits of two values": lambda x, n: (x & (x * n)) + (x | (x * n)) + (x ^ (x * n)),
    "bitwise functions": lambda x, n: torch.bitwise_and(x, n) + torch.bitwise_or(x, n) - torch.bitwise_xor(x, n),
    "shifts": lambda x, n: (x << 3) + (x >> 2) + torch.bitwise_left_shift(x, 2) + (x >> 40),
    "shifts by a value": lambda x, n: (x >> (x % n)) + ((x % 8) << (x % n)) + (1 << (x % n)),
    "bits kept apart": lambda x, n: ((x & 7) << 4 | (x >> 3) & 15) ^ (x & 1) << 9,
    "bits of remainders": lambda x, n: (x % n & 6) + (x % n & 4) + (x % n | (x % 3) << 3) + (x % n >> 1) * 7 + ((x % 9 ^ 1) & 12),
    "negative mask": lambda x, n: (x & ~n) + (x & -8) + ((x | 3) & -4),
    "gcd": lambda x, n: torch.gcd(x, x * 0 + 12) + torch.lcm(x % n, x * 0 + 4),
    "where": lambda x, n: torch.where(x > n, x, n) + torch.where(x < 0, -1, 1) + x.masked_fill(x > 3, n),
    "rounding": lambda x, n: torch.floor(x) + x.round() + x.ceil() + x.trunc(),
    "casts": lambda x, n: x.to(torch.int32).long() + x.bool().int() + (x % n).to(torch.uint8).to(torch.int64),
    "from floats": lambda x, n: (x / n).to(torch.int64) + (x / n).int() + (x.float() * 0.7).long() + (x / n).floor().to(torch.int16),
    "constants": lambda x, n: torch.ones_like(x) + torch.zeros_like(x) + torch.full_like(x, n) + x.new_full((), n) + x.new_zeros(()),
    "addcmul": lambda x, n: torch.addcmul(x, x, x * 0 + n, value=2),
}  # fmt: skip

NARROW = {
    "difference": lambda x, y: x - y,
    "sum and product": lambda x, y: x * 3 + y * y,
    "negation": lambda x, y: -x,
    "invert": lambda x, y: ~x + y,
    "shift": lambda x, y: (x << 3) + (y >> 2) + (x << 9),
    "halves": lambda x, y: x // 2 + y % 7,
    "constants take their lowest bits": lambda x, y: (x + 300) % 1009,
    "by minus one": lambda x, y: x // -1,
    "compared with what does not fit": lambda x, y: (x > -1).int() + (y < 300).int() * 2 + (x == 300).int() * 4,
    "bits": lambda x, y: (x & 300) | (y ^ 5),
    "into a wider type": lambda x, y: x * y.long() - x.int(),
    "from a wider type": lambda x, y: (x.long() * 1000 + 77).to(torch.uint8) + (y.long() * 999).to(torch.int8),
    "absolute": lambda x, y: x.abs() if x.dtype.is_signed else x,
}

TRUTH = {
    "and or xor not": lambda p, q, x: (p & q) | (p ^ q) & ~p,
    "arithmetic": lambda p, q, x: p + q * p,
    "with numbers": lambda p, q, x: (p + 1 + q * 2) % 3 == 0,
    "logical": lambda p, q, x: torch.logical_and(p, x) ^ torch.logical_or(q, x) ^ torch.logical_xor(p, x) ^ torch.logical_not(x),
    "equal": lambda p, q, x: (p == q) ^ (p != True),  # noqa: E712
    "ordered": lambda p, q, x: torch.where(x > 2, p < q, torch.where(x > 0, p <= q, torch.where(x < -2, p > q, p >= q))),
    "extremes": lambda p, q, x: torch.where(x > 0, torch.maximum(p, q), torch.minimum(p, q)),
    "of numbers": lambda p, q, x: x.bool() ^ (x / 2).bool() ^ x.to(torch.bool),
    "as numbers": lambda p, q, x: (p.int() - q.int()) * x >= p.float() + q,
    "compared with 0": lambda p, q, x: (p.int() == 0) & (q.int() < 1),
    "compared with 1": lambda p, q, x: (1 <= p.long()) & (0 != torch.where(q, 3, 4) - 3),
    "compared with 2": lambda p, q, x: (p.int() > 1) | (q.int() < 2) & p,
    "number tests": lambda p, q, x: (
        torch.isnan(x / 0) | torch.isinf(x / 0) & torch.isposinf(x / 0) | torch.signbit(x) & x.isfinite()
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers(name, same_mask):
    """Two remainders give the value away."""
    function = WHOLE[name]
    same_mask(lambda b, h, q, kv: function(q * 3 - 17, 5) % 1009 == function(kv * 3 - 17, 5) % 1009, shape=(1, 1, 12, 12))
    same_mask(lambda b, h, q, kv: function(q * 3 - 17, 5) % 97 <= kv, shape=(1, 1, 12, 97))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16], ids=str)
@pytest.mark.parametrize("name", NARROW)
def test_narrow_integers_wrap_around(name, dtype, same_mask):
    limits = torch.iinfo(dtype)
    values = torch.linspace(limits.min, limits.max, 17).to(dtype)
    function = NARROW[name]
    same_mask(lambda b, h, q, kv: function(values[q], values[16 - q]).long() % 97 <= kv, shape=(1, 1, 17, 97))


@pytest.mark.parametrize("name", TRUTH)
def test_booleans(name, same_mask):
    same_mask(lambda b, h, q, kv: TRUTH[name](q % 2 == 0, kv < 3, q - kv), shape=(1, 1, 7, 7))


FAR = torch.tensor([-(2**63), 0, 2**63 - 1])
FULL = torch.tensor([2**31 - 1, -(2**31), 5], dtype=torch.int32)
NEAR = torch.tensor([3, 1, 2])


@pytest.mark.parametrize(
    "compared",
    [
        lambda b, h, q, kv: FAR[q % 3] <= FAR[kv % 3],
        lambda b, h, q, kv: FULL[q % 3].clamp(0, 9) * 1000 < kv,
        lambda b, h, q, kv: FULL[q % 3].to(torch.int64) - FULL[kv % 3] < 7,
        lambda b, h, q, kv: NEAR[q % 3] * NEAR[kv % 3] - NEAR[q % 3] < 4,
        lambda b, h, q, kv: (FULL[q % 3] ^ FULL[kv % 3]) < 4,
    ],
)
def test_what_stays_inside_its_type_is_traced(compared, same_mask):
    same_mask(compared)


@pytest.mark.parametrize(
    "wraps",
    [
        lambda b, h, q, kv: FAR[q] - FAR[kv] < 5,
        lambda b, h, q, kv: FULL[q] - FULL[kv] < 5,
        lambda b, h, q, kv: FULL[q] * FULL[kv] < 5,
        lambda b, h, q, kv: abs(FULL[q]) < 5,
        lambda b, h, q, kv: -FAR[q] < kv,
        lambda b, h, q, kv: FAR[q].to(torch.int32) < kv,
    ],
)
def test_what_would_wrap_around_is_refused(wraps):
    with pytest.raises(sd.TraceError, match=r"which may wrap around: with the values of (FAR|FULL)"):
        sd.trace_mask(wraps)
