"""What patches of an image, or of the frames of a video, attend to, shown on the image: one small picture for each query and frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.errors import PatternError, ShapeError
from sparsedsl.lang.evaluation import evaluate
from sparsedsl.lang.wrapped import Expression
from sparsedsl.pattern_place import PatternPlace
from sparsedsl.picture_style import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ImageGrid", "draw_patch"]

# Lines between patches are drawn where there are no more of them along a side.
LINES = 48


class ImageGrid:
    """A grid of patches, ``(rows, columns)`` or ``(frames, rows, columns)``, and the token that lies at each.

    ``coordinates``: what :func:`sparsedsl.patterns.grid_position` gives of ``sd.q_idx``, where tokens do not lie row by row.

    >>> grid = ImageGrid((2, 3))
    >>> grid.query((1, 0)), grid.name(3)
    (3, 'row 1, column 0')
    """

    def __init__(self, shape: Any, coordinates: Any = None):
        whole = isinstance(shape, (tuple, list)) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
        if not whole or len(shape) not in (2, 3):
            raise ShapeError(f"plot(): grid must be (rows, columns) or (frames, rows, columns); got {shape!r}")
        self.shape = tuple(shape)
        self.tokens = math.prod(self.shape)
        tokens = torch.arange(self.tokens)
        if coordinates is None:
            places = torch.unravel_index(tokens, self.shape)
        else:
            parts = tuple(coordinates) if isinstance(coordinates, (tuple, list)) else (coordinates,)
            if len(parts) != len(self.shape) or not all(isinstance(part, Expression) for part in parts):
                raise PatternError(
                    f"plot(): coordinates must be {len(self.shape)} expressions of q_idx, such as those of "
                    f"sd.patterns.grid_position(sd.q_idx, {self.shape}, ...); got {coordinates!r}"
                )
            places = tuple(evaluate(part.expr, {"q_idx": tokens}).expand(tokens.shape) for part in parts)
        self.flat = torch.zeros(self.tokens, dtype=torch.int64)
        for place, size in zip(places, self.shape, strict=True):
            if bool(((place < 0) | (place >= size)).any()):
                raise PatternError(f"plot(): coordinates lie outside of the grid {self.shape}")
            self.flat = self.flat * size + place
        if self.flat.unique().numel() != self.tokens:
            raise PatternError(f"plot(): coordinates put two tokens at one place of the grid {self.shape}")
        self.token_at = torch.empty_like(self.flat)
        self.token_at[self.flat] = tokens

    @property
    def frames(self) -> int:
        """Pictures a query takes."""
        return 1 if len(self.shape) == 2 else self.shape[0]

    def query(self, given: Any) -> int:
        """The token that a position, or coordinates in the grid, stand for."""
        if isinstance(given, (tuple, list)):
            inside = len(given) == len(self.shape) and all(
                isinstance(n, int) and 0 <= n < size for n, size in zip(given, self.shape, strict=True)
            )
            if inside:
                return int(self.token_at.view(self.shape)[tuple(given)])
        elif isinstance(given, int) and not isinstance(given, bool) and 0 <= given < self.tokens:
            return given
        raise ShapeError(
            f"plot(): query must be a token below {self.tokens} or its coordinates in the grid {self.shape}; got {given!r}"
        )

    def queries(self, given: Any) -> list[int]:
        """One query, or a list of them; default a corner, an edge and the middle of the picture, of a video the middle of each."""
        if given is None:
            rows, columns = self.shape[-2:]
            spots = [(0, 0), (rows // 2, 0), (rows // 2, columns // 2)] if self.frames == 1 else [(rows // 2, columns // 2)]
            frames = [()] if self.frames == 1 else [(0,), (self.frames // 2,)]
            return list(dict.fromkeys(self.query((*frame, *spot)) for frame in frames for spot in spots))
        return [self.query(one) for one in given] if isinstance(given, list) else [self.query(given)]

    def name(self, token: int) -> str:
        """Where a token lies, in words."""
        place = [int(n) for n in torch.unravel_index(self.flat[token], self.shape)]
        names = ("frame", "row", "column")[-len(place) :]
        return ", ".join(f"{name} {n}" for name, n in zip(names, place, strict=True))

    def seen(self, place: PatternPlace, token: int) -> torch.Tensor:
        """``(frames, rows, columns)`` bool: the patches that a query attends to."""
        keys = place.allowed(torch.tensor([token - place.q_offset]), torch.arange(self.tokens))
        return keys[self.token_at].view(self.frames, *self.shape[-2:])


def draw_patch(axes: Sequence[Axes], place: PatternPlace, grid: ImageGrid, token: int, theme: Theme) -> str:
    """Draw what one query attends to, a frame in each of ``axes``; a note about it."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    seen = grid.seen(place, token)
    where = [int(n) for n in torch.unravel_index(grid.flat[token], (grid.frames, *grid.shape[-2:]))]
    rows, columns = grid.shape[-2:]
    for frame, axis in enumerate(axes):
        colours = ListedColormap([theme.nothing, theme.pair])
        axis.imshow(seen[frame].numpy(), cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        if max(rows, columns) <= LINES:
            axis.hlines([i - 0.5 for i in range(1, rows)], -0.5, columns - 0.5, color=theme.page, linewidth=0.5)
            axis.vlines([i - 0.5 for i in range(1, columns)], -0.5, rows - 0.5, color=theme.page, linewidth=0.5)
        if frame == where[0]:
            square = (where[2] - 0.5, where[1] - 0.5)
            axis.add_patch(Rectangle(square, 1, 1, facecolor="none", edgecolor=theme.query, linewidth=2, zorder=3))
        theme.axes(axis, f"query at {grid.name(token)}" if grid.frames == 1 else f"frame {frame}")
        axis.title.set_fontsize(9)
        axis.set_xticks([]), axis.set_yticks([])
    if grid.frames > 1:
        axes[0].set_ylabel(f"query at {grid.name(token).replace(', row', chr(10) + 'row')}", fontsize=8)
    return f"the query at {grid.name(token)} attends to {int(seen.sum()):,} of {grid.tokens:,} patches"
