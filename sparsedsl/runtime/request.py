"""What a backend is asked about: one piece of work of a call, as plain values without tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from sparsedsl.lang.pattern import Pattern
from sparsedsl.plain_values import Reported

__all__ = ["CallFacts", "NotYet", "Plan", "Request", "Work"]

Work = Literal["attention", "selected", "slots", "linear"]
"""Attention over a mask that reads tables only; attention of each query over blocks that were selected for it; a scan of gated slots; a
scan of decayed linear attention."""


@dataclass(frozen=True)
class CallFacts:
    """What a choice of a backend depends on. ``grad``: autograd wants gradients; ``lse``: somebody reads the LSE. Lengths in tokens."""

    device: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    head_dim_v: int
    grad: bool = False
    lse: bool = False

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, grad: bool, lse: bool) -> CallFacts:
        """Those of tensors ``(B, H, S, D)``."""
        return cls(
            q.device.type, str(q.dtype).removeprefix("torch."), q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3],
            v.shape[3], grad, lse,
        )  # fmt: skip

    @property
    def logits(self) -> int:
        """Number of logits a dense evaluation holds."""
        return self.batch * self.heads * self.q_len * self.kv_len


@dataclass(frozen=True)
class Request:
    """A piece of work.

    Args:
        pattern: of attention over a mask that reads tables only, the pattern.
        new_tables: its tables are others at every call, so that nothing worked out for them is used again.
        mask, score: of attention along selected blocks, which pairs of a block attend and the logit (see
            :class:`~sparsedsl.selection.selected_call.SelectedCall`); ``block`` keys in each; ``per_block``: each has a softmax of its own.
        slots: how many a scan has.
        form: of linear attention: ``""``, a constant decay a head and a plain sum; else ``scalar`` or ``vector`` decays that come with the
            data, followed by ``delta`` for the delta rule or ``before`` where queries read before their token writes.
    """

    work: Work
    facts: CallFacts
    pattern: Pattern | None = None
    new_tables: bool = False
    mask: Any = None
    score: Any = None
    block: int = 0
    per_block: bool = False
    slots: int = 0
    form: str = ""


class NotYet(str):
    """A refusal that ends by itself."""

    __slots__ = ()


@dataclass(frozen=True)
class Plan(Reported):
    """The decision: ``backend`` runs the work; ``reason`` says why, for ``explain``. ``lasting``: the next call gets the same; not
    where a better backend is being built."""

    backend: str
    reason: str
    lasting: bool = True
