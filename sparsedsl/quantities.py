"""Quantities in reports, written one way everywhere: three significant digits, the unit that makes the number short, a blank between.

Exact numbers in full are for counts (``f"{n:,}"``) and for :meth:`~sparsedsl.plain_values.Reported.to_dict`.
"""

from __future__ import annotations

import math

__all__ = ["bytes_text", "factor_text", "flops_text", "number_text", "seconds_text", "share_text"]

_BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_FLOPS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")
_SECONDS = ((1e-9, "ns"), (1e-6, "us"), (1e-3, "ms"), (1.0, "s"))


def number_text(value: float) -> str:
    """Three significant digits, more where there are more before the point; no zeros at the end.

    >>> [number_text(x) for x in (0, 2.0, 1.2345, 12.345, 123456.7, 0.00012345)]
    ['0', '2', '1.23', '12.3', '123,457', '0.000123']
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}" if places < 12 else f"{value:.2e}"
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def bytes_text(count: float) -> str:
    """Bytes, in powers of 1,024.

    >>> [bytes_text(x) for x in (0, 512, 2368, 3 << 29, 1023 << 20, 1 << 44)]
    ['0 B', '512 B', '2.31 KiB', '1.5 GiB', '0.999 GiB', '16 TiB']
    """
    return _scaled(count, 1024, _BYTES)


def flops_text(count: float) -> str:
    """Floating-point operations, in powers of 1,000.

    >>> [flops_text(x) for x in (800, 2214592512, 1.5e12)]
    ['800 FLOP', '2.21 GFLOP', '1.5 TFLOP']
    """
    return _scaled(count, 1000, _FLOPS)


def _scaled(count: float, step: int, units: tuple[str, ...]) -> str:
    power = 0
    while power + 1 < len(units) and abs(count) >= 999.5 * step**power:  # four digits are no longer short
        power += 1
    return f"{number_text(count / step**power)} {units[power]}"


def seconds_text(seconds: float) -> str:
    """A time, from nanoseconds to hours.

    >>> [seconds_text(x) for x in (0, 4.2e-8, 0.00012345, 0.012, 1.5, 150, 7300)]
    ['0 s', '42 ns', '123 us', '12 ms', '1.5 s', '2 min 30 s', '2 h 1 min']
    """
    if seconds >= 119.5:
        minutes, rest = divmod(round(seconds), 60)
        hours, left = divmod(minutes, 60)
        large, small = ((hours, "h"), (left, "min")) if hours else ((minutes, "min"), (rest, "s"))
        return f"{large[0]} {large[1]}" + (f" {small[0]} {small[1]}" if small[0] else "")
    size, unit = next(((size, unit) for size, unit in _SECONDS if 0 < seconds < 999.5 * size), _SECONDS[-1])
    return f"{number_text(seconds / size)} {unit}"


def share_text(share: float) -> str:
    """A part of a whole in percent; what is not quite none or all does not look like it.

    >>> [share_text(x) for x in (0, 0.5, 0.501953, 0.0000123, 0.99998, 1)]
    ['0 %', '50 %', '50.2 %', '0.00123 %', '99.998 %', '100 %']
    """
    if 0.9995 <= share < 1:
        return f"{100 * share:.{-math.floor(math.log10(100 * (1 - share)))}f} %"
    return f"{number_text(100 * share)} %"


def factor_text(factor: float) -> str:
    """How many times as much.

    >>> factor_text(1.94), factor_text(28.25), factor_text(1234.5)
    ('1.94x', '28.2x', '1,234x')
    """
    return f"{number_text(factor)}x"
