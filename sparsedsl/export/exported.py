"""What an export is: tensors by the engine's names, the words of its call, and the way back to a mask."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsedsl.errors import UnsupportedError

__all__ = ["Exported", "check_dense", "ends_of", "packed_mask"]

# A dense mask is for looking at and for tests.
MOST_DENSE = 1 << 32


@dataclass(frozen=True, eq=False, kw_only=True)
class Exported(ABC):
    """A mask in an engine's form.

    ``q_lens`` and ``kv_lens``: lengths of the sequences that it holds; ``packed``: whether they lie one behind the other, else they are
    ``batch`` entries of one length. ``args``: keywords of the engine's call, the tensors among them. ``read_at``: the version whose
    semantics it follows. ``bytes`` counts the tensors.

    >>> import sparsedsl as sd
    >>> e = sd.export.cudnn(sd.patterns.causal(), 4)
    >>> isinstance(e, sd.export.Exported), e.engine, e.bytes, e
    (True, 'cudnn', 16, CudnnRows(mask_func=torch.int32 (1, 1, 4), 16 bytes))
    """

    engine: ClassVar[str]
    read_at: ClassVar[str]

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    packed: bool
    args: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """Bytes of the tensors."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))

    @abstractmethod
    def to_mask(self) -> torch.Tensor:
        """``(batch | 1, heads | 1, queries, keys)`` bool, decoded from the tensors and the arguments alone.

        Sequences of lengths of their own stand one behind the other, as in the tensors of the call.
        """

    def __repr__(self) -> str:
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("args", "q_lens", "kv_lens", "packed") and value is not None:
                words.append(
                    f"{field.name}={f'{value.dtype} {tuple(value.shape)}' if isinstance(value, torch.Tensor) else repr(value)}"
                )
        return f"{type(self).__name__}({', '.join([*words, f'{self.bytes:,} bytes'])})"


def check_dense(pairs: int) -> None:
    """Raise :class:`~sparsedsl.UnsupportedError` before a dense mask of more than 4 GiB is made."""
    if pairs > MOST_DENSE:
        raise UnsupportedError(
            f"to_mask() would make {pairs:,} pairs, one byte each; it is for looking at small masks: take short lengths"
        )


def ends_of(lens: tuple[int, ...]) -> list[int]:
    """``0, n0, n0 + n1, ..``: where sequences that lie one behind the other begin, and where the last one ends."""
    ends = [0]
    for n in lens:
        ends.append(ends[-1] + n)
    return ends


def packed_mask(exported: Exported, blocks: list[torch.Tensor]) -> torch.Tensor:
    """The masks ``(heads, queries, keys)`` of all sequences as one: one behind the other if they are packed, else one a batch entry."""
    if not exported.packed:
        return torch.stack(blocks)
    q, kv = ends_of(exported.q_lens), ends_of(exported.kv_lens)
    heads = max((block.shape[0] for block in blocks), default=1)
    check_dense(heads * q[-1] * kv[-1])
    out = torch.zeros(1, heads, q[-1], kv[-1], dtype=torch.bool)
    for n, block in enumerate(blocks):
        out[0, :, q[n] : q[n + 1], kv[n] : kv[n + 1]] = block.cpu()
    return out
