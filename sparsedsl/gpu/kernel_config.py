"""How one kernel is compiled and launched (:class:`Config`), and what it is specialised for (:class:`Shape`): plain data, loads nothing."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["Config", "Shape"]

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
# A product on matrix units has at least 16 rows; above 256 nothing fits.
BLOCKS = (16, 32, 64, 128, 256)
WARPS = (1, 2, 4, 8, 16)
MOST_STAGES = 8


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled and launched.

    ``block_m`` queries and ``block_n`` keys a tile; ``warps`` a program; ``stages`` of the software pipeline. ``descriptors``: tensor
    descriptors (TMA) for K and V. ``heavy_first``: programs in reverse order of tiles, so that under a causal mask the longest rows begin.

    >>> Config.from_json(Config(128, 64, 4, 3).to_json())
    Config(block_m=128, block_n=64, warps=4, stages=3, descriptors=False, heavy_first=False)
    >>> str(Config(128, 64, 4, 3, heavy_first=True))
    '128x64, 4 warps, 3 stages, heavy first'
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    descriptors: bool = False
    heavy_first: bool = False

    def __str__(self) -> str:
        words = [f"{self.block_m}x{self.block_n}", f"{self.warps} warps", f"{self.stages} stages"]
        words += ["descriptors"] * self.descriptors + ["heavy first"] * self.heavy_first
        return ", ".join(words)

    def to_json(self) -> dict[str, Any]:
        """JSON data from which :meth:`from_json` makes an equal config."""
        return asdict(self)

    @staticmethod
    def from_json(data: Any) -> Config:
        """The config out of :meth:`to_json`; ValueError says which field is missing, surplus or of the wrong kind.

        >>> Config.from_json(Config(128, 64, 4, 3).to_json() | {"block_n": 48})
        Traceback (most recent call last):
            ...
        ValueError: block_n: got 48, wanted one of 16, 32, 64, 128, 256
        """
        names = [field.name for field in fields(Config)]
        if not isinstance(data, dict) or sorted(data) != sorted(names):
            got = sorted(data) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"got {got}, wanted the fields {sorted(names)}")
        limits: dict[str, tuple[Any, ...]] = {"block_m": BLOCKS, "block_n": BLOCKS, "warps": WARPS}
        limits |= {"stages": tuple(range(1, MOST_STAGES + 1)), "descriptors": (False, True), "heavy_first": (False, True)}
        for name, allowed in limits.items():
            value = data[name]
            if type(value) is not type(allowed[0]) or value not in allowed:
                raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(str, allowed))}")
        return Config(**data)


@dataclass(frozen=True)
class Shape:
    """What a kernel is specialised for. ``group``: query heads that share a key head. ``precision`` of fp32 products: "ieee" or "tf32".
    ``aligned``: all strides of the call are multiples of 8 elements."""

    dtype: str
    head_dim: int
    head_dim_v: int
    group: int = 1
    precision: str = "ieee"
    aligned: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return ITEMSIZE[self.dtype]

    @property
    def columns(self) -> int:
        """Columns that a tile of Q or K takes: the width of a head, filled up to the blocks that the kernels are written in.

        >>> Shape("float16", 80, 20).columns, Shape("float16", 80, 20).columns_v
        (80, 32)
        """
        return _filled(self.head_dim)

    @property
    def columns_v(self) -> int:
        """Columns that a tile of V or of the output takes."""
        return _filled(self.head_dim_v)

    @property
    def matrix_units(self) -> bool:
        """Whether products run on matrix units, and not number by number."""
        return self.dtype != "float32" or self.precision != "ieee"


@functools.cache
def _filled(width: int) -> int:
    from sparsedsl.codegen.triton_parts import parts_of

    return sum(part.width for part in parts_of(width, "d"))
