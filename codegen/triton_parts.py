"""What describes a generated kernel: its arguments, what it is written for, and the blocks that a head's dimensions are cut into."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Argument", "KernelSource", "Part", "Variant", "parts_of", "suffixed"]


@dataclass(frozen=True)
class Argument:
    """One parameter of a kernel. ``type``: "*data" (the dtype of q), "*fp32", "*i32", "*table:NAME", "i32", "fp32", "constexpr",
    or "*desc:W", a tensor descriptor of tiles of W columns."""

    name: str
    type: str


@dataclass(frozen=True)
class KernelSource:
    """One kernel of a generated module: its function's name, its parameters in order, and what it is for.

    ``blocks``: queries and keys of blocks within which the mask has one value, if it has such blocks.
    """

    name: str
    arguments: tuple[Argument, ...]
    purpose: str
    blocks: tuple[int, int] | None = None


@dataclass(frozen=True)
class Variant:
    """What a source is written for, beside the pattern.

    ``keys``, ``queries``: how the loops over keys and over queries find their tiles, "intervals" or "lists". ``head_dim``, ``head_dim_v``:
    widths of q and k, and of v. ``wide``: positions and offsets need 64 bits. ``safe_rows``: every query is known to see a key.
    ``descriptors``: K and V are read through tensor descriptors. ``wide_tables``: tables of 2**31 entries or more. ``step``: programs stay
    within one residue of positions (:mod:`sparsedsl.analysis.residue_classes`). ``decode_keys``: as ``keys``, for the kernel of
    few queries. ``placed``: rows of K and V are read by their numbers, as those of pages are; there is no backward pass.
    """

    keys: str
    queries: str
    decode_keys: str
    head_dim: int = 64
    head_dim_v: int = 64
    wide: bool = False
    safe_rows: bool = False
    descriptors: bool = False
    wide_tables: frozenset[str] = frozenset()
    step: int = 1
    placed: bool = False


@dataclass(frozen=True)
class Part:
    """A run of a head's dimensions that is one block of registers: ``first .. first + width``, of which ``used`` exist."""

    name: str
    first: int
    width: int
    used: int

    @property
    def padded(self) -> bool:
        """Whether some of its columns do not exist."""
        return self.used < self.width


def parts_of(width: int, stem: str) -> tuple[Part, ...]:
    """``width`` in blocks whose sizes are powers of two: 96 as 64 + 32 wastes nothing, where 128 would waste a quarter.

    >>> [(part.name, part.first, part.width) for part in parts_of(96, "d")]
    [('d_0', 0, 64), ('d_1', 64, 32)]
    >>> [(part.name, part.width, part.used) for part in parts_of(20, "d")]
    [('d', 32, 20)]
    """
    whole = max(16, 1 << (width - 1).bit_length())
    half = whole // 2
    if width in (whole, half) or half < 16 or width < half:
        return (Part(stem, 0, whole, width),)
    rest = max(16, 1 << (width - half - 1).bit_length())
    if rest >= half:
        return (Part(stem, 0, whole, width),)
    return Part(f"{stem}_0", 0, half, half), Part(f"{stem}_1", half, rest, width - half)


def suffixed(name: str, part: Part) -> str:
    """The name of one part of a tile: ``q``, or ``q_0`` and ``q_1`` where there are two."""
    _, _, number = part.name.partition("_")
    return f"{name}_{number}" if number else name
