"""A simulation, drawn: time and bytes by world size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sparsedsl.figures import axes_of
from sparsedsl.picture_style import theme_of
from sparsedsl.quantities import bytes_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]


def draw(simulation: Any, theme_name: str) -> Figure:
    """Two panels, a line for each way."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    theme = theme_of(theme_name)
    figure, axes, _ = axes_of(None, 2, (9.0, 4.0))
    theme.on(figure)
    looks = {
        "plan": (theme.pair, "o-"),
        "ring": (theme.partial, "s-"),
        "all-gather": (theme.query, "^--"),
        "ulysses": (theme.dim, "D-"),
    }
    panels = (
        ("seconds", "expected time of a step", seconds_text, LogLocator(10, subs=(1.0, 3.0), numticks=9)),
        ("bytes", "sent to the rank that gets the most", bytes_text, LogLocator(2, numticks=9)),
    )
    for axis, (field, title, text, ticks) in zip(axes, panels, strict=True):
        for way, (colour, look) in looks.items():
            points = [(one.world, getattr(one, field)) for one in simulation.steps if one.way == way and getattr(one, field)]
            if points:
                axis.plot(*zip(*points, strict=True), look, color=colour, markersize=4, linewidth=1.4, label=way)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticks)
        axis.yaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_minor_locator(NullLocator())
        theme.axes(axis, title)
        axis.set_xlabel("ranks", fontsize=9)
        axis.set_xticks(sorted({one.world for one in simulation.steps}))
        axis.xaxis.set_major_formatter(FuncFormatter(functools.partial(_told, "{:g}".format)))
        axis.yaxis.set_major_formatter(FuncFormatter(functools.partial(_told, text)))
        axis.grid(color=theme.line, alpha=0.3)
    axes[0].legend(fontsize=8, frameon=False, labelcolor=theme.text)
    figure.suptitle(f"{simulation.q_len:,} tokens", fontsize=10, color=theme.text)
    return figure


def _told(text: Callable[[float], str], value: float, _place: int | None = None) -> str:
    return text(value)
