"""The tokens of one forward that run as one call of a program: all rows together, or sequences of one length where there is padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsedsl.errors import UnsupportedError
from sparsedsl.models.mask_arguments import MaskRequest

__all__ = ["TokenGroup", "token_groups"]


@dataclass(frozen=True, eq=False)
class TokenGroup:
    """Sequences with as many tokens ``before`` this forward, and in it. ``rows``: the row of the batch that each is in. ``places``: where
    their tokens stand; None: everywhere."""

    rows: list[int]
    before: int
    places: object = None

    @property
    def is_all(self) -> bool:
        return self.places is None

    def take(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor

    def put(self, tokens: torch.Tensor, into: torch.Tensor, axis: int) -> torch.Tensor:
        return tokens


def token_groups(request: MaskRequest, batch: int, device: torch.device) -> list[TokenGroup]:
    """The groups of a forward."""
    if request.padding is not None or request.packing is not None:
        raise UnsupportedError("padding and packed positions are not followed yet; give sequences of one length")
    return [TokenGroup(list(range(batch)), request.q_offset)]
