"""How the `triton` backend launches its kernels, where nothing was measured."""

from __future__ import annotations

from dataclasses import dataclass

from sparsedsl.adjustable import Adjustable
from sparsedsl.codegen.triton_expression import LONGEST
from sparsedsl.gpu.kernel_config import Config

__all__ = ["LIMITS", "Limits"]


_SMALLEST = Config(16, 16, 4, 1)


@dataclass(frozen=True)
class Limits:
    """Tiles, shares and scratch memory.

    - ``interpreted``: the config of every kernel in Triton's interpreter, which runs one program after the other in numpy; tiles
      as small as its products allow show the loops at work.
    - ``decode_rows``: up to so many queries the heads that share keys lie in one tile, and programs share the keys.
    - ``splits``: programs that share them; None: as many as fill the device.
    - ``longest``: positions beyond are computed in 64 bits.
    - ``pair_bytes``: for gradients of learned tables that are kept pair by pair before they are summed. ``listed_pair_bytes``:
      the same of attention along lists, where sorting them takes several times as much.
    - ``stick_bytes``: for what kernels of the backward pass of sticks tell each other of tiles of keys; beyond, some heads at a time.
    - ``scan_steps``: so many keys of a linear attention whose decays come with the data are written one by one, without gradients.
    """

    interpreted: Config = _SMALLEST
    decode_rows: int = 16
    splits: int | None = None
    longest: int = LONGEST
    pair_bytes: int = 1 << 28
    listed_pair_bytes: int = 1 << 25
    stick_bytes: int = 1 << 30
    scan_steps: int = 16


LIMITS = Adjustable(Limits())
