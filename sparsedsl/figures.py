"""Figures to draw in: new ones, without pyplot, or the axes of a user."""

from __future__ import annotations

import functools
import io
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsedsl.errors import MissingPackageError, PatternError
from sparsedsl.lang.advice import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["axes_of"]


def axes_of(
    ax: Any, count: int, size: tuple[float, float], shares: Sequence[float] | None = None, columns: int | None = None
) -> tuple[Figure, list[Axes], bool]:
    """The figure, the axes to draw in, and whether the figure is ours: ``count`` axes, or those of the user, ``ax``.

    ``size``: of a new figure, in inches; ``columns``: axes side by side in it, default all.
    Raises :class:`~sparsedsl.UnsupportedError` without matplotlib, and
    :class:`~sparsedsl.PatternError` where ``ax`` is not ``count`` axes.
    """
    try:
        from matplotlib.figure import Figure as NewFigure
    except ImportError:
        raise MissingPackageError("sd.plot", "matplotlib", "plots") from None
    if not _is_size(size):
        raise PatternError(f"plot(): figsize must be (width, height) in inches; got {shown(size)}")
    if ax is None:
        figure = NewFigure(figsize=size, dpi=110, layout="constrained")
        # what notebooks ask for, since pyplot, which would answer, is not involved
        setattr(figure, "_repr_png_", functools.partial(_png, figure))  # noqa: B010  (unknown to mypy)
        columns = columns or count
        made = list(figure.subplots(-(-count // columns), columns, squeeze=False, width_ratios=shares).flat)
        for surplus in made[count:]:
            surplus.remove()
        return figure, made[:count], True
    axes = list(ax.flat) if hasattr(ax, "flat") else list(ax) if isinstance(ax, (tuple, list)) else [ax]
    if len(axes) != count or not all(hasattr(axis, "imshow") for axis in axes):
        raise PatternError(f"plot(): ax must be {count} matplotlib axes, one for each panel; got {shown(ax)}")
    return axes[0].figure, axes, False


def _is_size(size: Any) -> bool:
    numeric = isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(x, numbers.Real) for x in size)
    return numeric and all(0 < float(x) < float("inf") for x in size)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
