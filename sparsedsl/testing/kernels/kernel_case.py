"""One call of a kernel as a value that prints as code: sizes, positions, and by which rule and seed its tensors are filled."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from sparsedsl.errors import ShapeError
from sparsedsl.testing.call_shapes import AttentionCase
from sparsedsl.testing.kernels.arena import LAYOUTS
from sparsedsl.testing.kernels.values import VALUES

__all__ = ["DTYPES", "KernelCase"]

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


@dataclass(frozen=True, repr=False)
class KernelCase:
    """A call that a kernel is tested with. The same values give the same tensors, bit by bit, in any process.

    ``q_offset``: position of the first query row. ``scale``: None for what the pattern says. ``dtype``: by name. ``values``: what q, k
    and v hold, see :mod:`sparsedsl.testing.kernels.values`. ``memory``: how they lie, see :mod:`sparsedsl.testing.kernels.arena`.
    ``seed``: of all that is drawn, tables too. ``device``: where the kernel is called.

    >>> KernelCase(heads=4, kv_heads=2, kv_len=5, dtype="bfloat16")
    KernelCase(heads=4, kv_heads=2, kv_len=5, dtype='bfloat16')
    """

    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    q_len: int = 1
    kv_len: int = 1
    head_dim: int = 1
    head_dim_v: int = 1
    q_offset: int = 0
    scale: float | None = None
    dtype: str = "float32"
    values: str = "normal"
    memory: str = "packed"
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "kv_heads", "q_len", "kv_len", "head_dim", "head_dim_v"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ShapeError(f"KernelCase: {name} must be a whole number of at least 1; got {size!r}")
        for name, known in (("dtype", DTYPES), ("values", VALUES), ("memory", LAYOUTS)):
            if getattr(self, name) not in known:
                raise ShapeError(f"KernelCase: {name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")

    def __repr__(self) -> str:
        words = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"KernelCase({', '.join(words)})"

    @property
    def attention(self) -> AttentionCase:
        """The sizes alone, as the rest of the kit takes them."""
        sizes = (self.batch, self.heads, self.kv_heads, self.q_len, self.kv_len, self.head_dim, self.head_dim_v)
        return AttentionCase(*sizes, q_offset=self.q_offset)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, k and v."""
        return DTYPES[self.dtype]

    @property
    def size(self) -> int:
        """How large the case is, as a reader sees it: ``batch * heads * (q_len + kv_len) * (head_dim + head_dim_v)``."""
        return self.batch * self.heads * (self.q_len + self.kv_len) * (self.head_dim + self.head_dim_v)
