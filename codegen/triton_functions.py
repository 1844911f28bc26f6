"""Functions that generated kernels call and that Triton lacks, as source text: what a module needs is put in front of its kernels."""

from __future__ import annotations

import re

__all__ = ["FUNCTIONS", "functions_for"]

FUNCTIONS = {
    "_floor_div": '''
@triton.jit
def _floor_div(a, c):
    """a // c rounded down; Triton's // rounds towards zero."""
    quotient = a // c
    rest = a % c
    return tl.where((rest != 0) & ((rest < 0) != (c < 0)), quotient - 1, quotient)
''',
    "_floor_mod": '''
@triton.jit
def _floor_mod(a, c):
    """a % c with the sign of c; Triton's has the sign of a."""
    rest = a % c
    return tl.where((rest != 0) & ((rest < 0) != (c < 0)), rest + c, rest)
''',
    "_tanh": '''
@triton.jit
def _tanh(x):
    """tanh(x) within 8 units in the last place of float32: x*P(x*x)/Q(x*x), fitted to [-9.02, 9.02], where it reaches 1.

    The denominator is at least 1, so that two inverse roots are its inverse: a division would look at its range first.
    """
    y = tl.minimum(tl.maximum(x, -9.02, propagate_nan=tl.PropagateNan.ALL), 9.02, propagate_nan=tl.PropagateNan.ALL)
    s = y * y
    over = (((1.3319073e-08 * s + 2.0583482e-05) * s + 0.0034940345) * s + 0.13379718) * s + 1.0
    under = (((7.762020e-07 * s + 0.00032830928) * s + 0.025871073) * s + 0.46713033) * s + 1.0
    root = tl.rsqrt(under)
    return y * over * (root * root)
''',
    "_tanh_double": '''
@triton.jit
def _tanh_double(x):
    """tanh(x) in float64, within 1e-16."""
    small = tl.exp(-2 * tl.abs(x))
    size = (1 - small) / (1 + small)
    return tl.where(x < 0, -size, size)
''',
    "_softplus": '''
@triton.jit
def _softplus(x):
    """log(1 + exp(x)), for any x and without loss where exp(x) is small."""
    small = tl.exp(-tl.abs(x))
    whole = 1 + small
    lost = small - (whole - 1)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + tl.log(whole) + lost / whole
''',
    "_log2_of_one_more": '''
@triton.jit
def _log2_of_one_more(t):
    """log2(1 + t) for 0 <= t <= 1, with the digits of t where it is small."""
    p = 0.028193907166 + t * -0.0045820817101
    p = -0.081329931667 + t * p
    p = 0.15211233763 + t * p
    p = -0.22029472964 + t * p
    p = 0.28368108259 + t * p
    p = -0.35997573045 + t * p
    p = 0.48084608051 + t * p
    p = -0.72134597168 + t * p
    p = 1.4426950332 + t * p
    return t * p
''',
    "_power": '''
@triton.jit
def _power(x, y):
    """x**y as torch.pow: a negative x has integer powers only."""
    size = tl.where(y == 0, 1.0, tl.exp2(y * tl.log2(tl.abs(x))))
    odd = tl.floor(y * 0.5) * 2 != y
    signed = tl.where(tl.floor(y) != y, float("nan"), tl.where(odd, -size, size))
    return tl.where(x < 0, signed, size)
''',
}


def functions_for(text: str) -> str:
    """The definitions of the functions that ``text`` calls.

    >>> print(functions_for("x = _floor_mod(a, 3)"))
    <BLANKLINE>
    @triton.jit
    def _floor_mod(a, c):
        \"\"\"a % c with the sign of c; Triton's has the sign of a.\"\"\"
        rest = a % c
        return tl.where((rest != 0) & ((rest < 0) != (c < 0)), rest + c, rest)
    <BLANKLINE>
    """
    used = set(re.findall(r"\b_\w+(?=\()", text))
    return "\n".join(source for name, source in FUNCTIONS.items() if name in used)
