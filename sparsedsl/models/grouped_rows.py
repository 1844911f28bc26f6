"""The tokens of one forward that run as one call of a program: all rows together, or sequences of one length where there is padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsedsl.models.mask_arguments import MaskRequest
from sparsedsl.models.sequences import Places, sequence_groups

__all__ = ["TokenGroup", "token_groups"]


@dataclass(frozen=True, eq=False)
class TokenGroup:
    """Sequences with as many tokens ``before`` this forward, and in it. ``rows``: the row of the batch that each is in. ``places``: where
    their tokens stand in this forward; None: everywhere."""

    rows: list[int]
    before: int
    places: Places | None = None

    def take(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """What belongs to these tokens."""
        return tensor if self.places is None else self.places.gather(tensor, axis)

    def put(self, tokens: torch.Tensor, into: torch.Tensor, axis: int) -> torch.Tensor:
        """``into``, with this in the places of these tokens."""
        if self.places is None:
            return tokens
        self.places.scatter(tokens, into, axis)
        return into


def token_groups(request: MaskRequest, batch: int, device: torch.device) -> list[TokenGroup]:
    """The groups of a forward. Rows whose tokens are all padding are in none."""
    if request.padding is None and request.packing is None:
        return [TokenGroup(list(range(batch)), request.q_offset)]
    groups = sequence_groups(request, 0, request.written, batch, device)
    return [TokenGroup(group.queries.numbers, group.q_offset, group.queries) for group in groups]
