"""How the `tiled` lowering cuts a call, where the cost model is not to choose."""

from __future__ import annotations

from dataclasses import dataclass

from sparsedsl.adjustable import Adjustable

__all__ = ["CUTTING", "Cutting"]


@dataclass(frozen=True)
class Cutting:
    """Strips, tiles and products.

    - ``height``: queries of a strip; None: the cheapest by the cost model.
    - ``keys``: taken at once for a strip.
    - ``together``: heads in one product; None: by the number of logits.
    - ``single``: results from which on a product stands alone.
    - ``blocks``: (queries, keys) of tiles where the mask is scattered, in the order in which they are tried: the second where
      most tiles of the first are cut by the mask.
    """

    height: int | None = None
    keys: int = 512
    together: int | None = None
    single: int = 40_000
    blocks: tuple[tuple[int, int], ...] = ((128, 128), (64, 64))


CUTTING = Adjustable(Cutting())
