"""Which engines hold a pattern, and in how many bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sparsedsl.errors import UnsupportedError
from sparsedsl.export.cudnn_rows import cudnn
from sparsedsl.export.export_case import MAX_BYTES
from sparsedsl.export.flash_windows import flash_attention
from sparsedsl.export.flashinfer_blocks import flashinfer
from sparsedsl.export.flashmask_columns import flashmask
from sparsedsl.export.magi_slices import magi
from sparsedsl.export.natten_grid import natten
from sparsedsl.export.splash_blocks import splash
from sparsedsl.export.xformers_bias import xformers

__all__ = ["Fits", "fits"]


@dataclass(frozen=True)
class Fits(Mapping[str, "int | str"]):
    """Engine -> bytes of the tensors, or why it does not hold the pattern. ``print`` shows a table.

    >>> print(Fits({"cudnn": 49152, "natten": "natten: query 0 sees no key"}))
    cudnn           49,152 bytes
    natten  natten: query 0 sees no key
    """

    found: Mapping[str, int | str]

    def __getitem__(self, engine: str) -> int | str:
        return self.found[engine]

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __str__(self) -> str:
        width = max(map(len, self.found))
        return "\n".join(
            f"{engine:{width}}  {f'{value:>14,} bytes' if isinstance(value, int) else value}"
            for engine, value in self.found.items()
        )


def fits(
    pattern: Any, q_len: int, kv_len: int | None = None, *, shape: tuple[int, ...] | None = None, q_offset: int | None = None,
    batch: int = 1, heads: int | None = None, kv_heads: int | None = None, max_bytes: int = MAX_BYTES, **tables: Any,
) -> Fits:  # fmt: skip
    """What every engine would take to hold a pattern at these lengths: bytes, or why it does not.

    Args:
        pattern, q_len, kv_len, q_offset, batch, heads, kv_heads, tables: as :func:`cudnn`.
        shape: the grid of the tokens, for NATTEN.
        max_bytes: engines that would take more are refused before they do.

    Returns:
        :class:`Fits`, a mapping. Exports are made to be counted, and let go.

    Raises:
        ShapeError, TableError, PatternError: what no engine would take either.

    >>> import sparsedsl as sd
    >>> table = sd.export.fits(sd.patterns.sliding_window(64), 4096)
    >>> table["cudnn"], table["flashmask"], table["flash_attention 2"]
    (49152, 16384, 0)
    """
    asked: dict[str, tuple[Any, dict[str, Any]]] = {
        "cudnn": (cudnn, {"batch": batch}),
        "flashmask": (flashmask, {"batch": batch, "version": 4}),
        "magi": (magi, {"batch": batch}),
        "flashinfer": (flashinfer, {}),
        "flash_attention 2": (flash_attention, {"batch": batch}),
        "flash_attention 3": (flash_attention, {"batch": batch, "version": 3}),
        "flash_attention 4": (flash_attention, {"batch": batch, "version": 4}),
        "flash_attention 4, blocks": (flash_attention, {"batch": batch, "version": 4, "blocks": True}),
        "splash": (splash, {"batch": batch}),
        "xformers": (xformers, {"batch": batch}),
    }
    found: dict[str, int | str] = {}
    words = {"q_offset": q_offset, "heads": heads, "kv_heads": kv_heads, "max_bytes": max_bytes, **tables}
    if shape is not None:
        asked["natten"] = natten, {"shape": shape, "batch": batch}
    for engine, (function, own) in asked.items():
        try:
            found[engine] = function(pattern, q_len, kv_len, **own, **words).bytes
        except UnsupportedError as refusal:
            found[engine] = str(refusal)
    return Fits(found | ({} if shape is not None else {"natten": "natten: say the grid of the tokens: shape=(rows, columns)"}))
