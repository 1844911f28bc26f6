"""What a score function does, drawn: over positions at logit 0, or over logits where it does not depend on positions."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import sympy
import torch

from sparsedsl.analysis.exactness import exact_domain
from sparsedsl.errors import TableError
from sparsedsl.lang.pattern import as_pattern
from sparsedsl.lang.symbols import KV_IDX, Q_IDX
from sparsedsl.pattern_place import PatternPlace
from sparsedsl.picture_style import Theme
from sparsedsl.runtime.call import bind_tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_curve", "draw_scores", "missing_for_score", "score_limits", "score_values"]

# Beyond this share of the values, at either end, colours no longer tell values apart: what is rare would leave none for the rest.
RARE = 0.02


def missing_for_score(place: PatternPlace) -> list[str]:
    """Tables that the score reads and nobody gave."""
    return [name for name in place.pattern.score.tables if name not in place.tables]


def _parts(place: PatternPlace) -> tuple[sympy.Basic, dict[str, torch.Tensor]]:
    """The score at the head and batch entry, and its tables."""
    score = place.pattern.score
    if missing := missing_for_score(place):
        raise TableError(f"plot(): the score panel wants {', '.join(missing)}; pass {missing[0]}=tensor, or leave the panel out")
    tables = bind_tables(as_pattern(score), {name: tensor for name, tensor in place.tables.items() if name in score.tables})
    expr = score.expr.xreplace(place.at)
    return expr, dict(exact_domain((expr,), replace(place.domain, tables=tables)).tables)


def score_values(place: PatternPlace, most: int) -> torch.Tensor | None:
    """What stands in for ``q · k = 0``, ``(rows, columns)`` of at most ``most`` each, NaN where masked; None: it reads no position."""
    expr, tables = _parts(place)
    if not expr.free_symbols & {Q_IDX, KV_IDX}:
        return None
    side = [min(n, most) for n in (place.q_len, place.kv_len)]
    rows, keys = (((torch.arange(s) + 0.5) * n / s).long() for s, n in zip(side, (place.q_len, place.kv_len), strict=True))
    zero = {"score": torch.zeros((), dtype=torch.float64)} | tables
    values = place.value(expr, rows[:, None], keys[None], **zero).double()
    return values.where(place.allowed(rows[:, None], keys[None]) & values.isfinite(), torch.nan)


def score_limits(values: list[torch.Tensor]) -> tuple[float, float]:
    """The values between which colours change: all but the rarest, and 0 in the middle only where there are values on both sides.

    >>> score_limits([torch.tensor([-3.0, -2.0, torch.nan, -1.0])])
    (-3.0, -1.0)
    >>> score_limits([torch.tensor([-3.0, 1.0])])
    (-3.0, 3.0)
    """
    known = torch.cat([part[part.isfinite()].flatten() for part in values]).double()
    if not known.numel():
        return 0.0, 1.0
    ends = known.sort().values
    rare = int(RARE * (ends.numel() - 1))
    low, high = float(ends[rare]), float(ends[-1 - rare])
    if low == high:  # nearly all values are one
        low, high = float(ends[0]), float(ends[-1])
    if low == high:
        return low - 0.5, high + 0.5
    if low < 0 < high:
        return -max(-low, high), max(-low, high)
    return low, high


def draw_scores(axis: Axes, place: PatternPlace, values: torch.Tensor, limits: tuple[float, float], theme: Theme) -> Any:
    """The picture of values at pairs; the image, for a colour bar."""
    low, high = limits
    diverging = low < 0 < high and low == -high
    # white, or the dark of the page, is 0 where there is a middle; else light is near 0
    colours = ("RdBu" if theme.name == "light" else "berlin_r") if diverging else ("cividis" if high <= 0 else "cividis_r")
    extent = (-0.5, place.kv_len - 0.5, place.q_offset + place.q_len - 0.5, place.q_offset - 0.5)
    return axis.imshow(values.numpy(), cmap=colours, vmin=low, vmax=high, extent=extent, interpolation="nearest")


def beyond(values: torch.Tensor, limits: tuple[float, float]) -> str:
    """Which ends of a colour bar go on, as matplotlib says it."""
    known = values[values.isfinite()]
    if not known.numel():
        return "neither"
    below, above = bool((known < limits[0]).any()), bool((known > limits[1]).any())
    return "both" if below and above else "min" if below else "max" if above else "neither"


def draw_curve(axis: Axes, place: PatternPlace, theme: Theme) -> None:
    """Logit -> logit, of a score that reads no position."""
    expr, tables = _parts(place)
    numbers = [abs(float(number)) for number in expr.atoms(sympy.Number) if number.is_finite]
    reach = 2 * max([1.0, *numbers])
    raw = torch.linspace(-reach, reach, 401, dtype=torch.float64)
    zero = torch.zeros(401, dtype=torch.int64)
    axis.plot(raw.numpy(), raw.numpy(), color=theme.line, linewidth=1, label="unchanged")
    modified = place.value(expr, zero, zero, score=raw, **tables)
    axis.plot(raw.numpy(), modified.numpy(), color=theme.pair, linewidth=2, label="modified")
    theme.axes(axis, "logit")
    axis.set_xlabel("scaled q · k", fontsize=9)
    axis.set_ylabel("logit in the softmax", fontsize=9)
    axis.grid(color=theme.line, alpha=0.3)
    axis.set_box_aspect(1)
    axis.legend(fontsize=8, frameon=False, labelcolor=theme.text)
