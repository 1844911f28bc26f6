"""Which slot of a row holds which of its real tokens. Input: real tokens, or the sequences of packed rows, as (B, S) tensors.

Output: the numbers by which a pattern counts tokens instead of slots, on the device of the input, int32.
"""

from __future__ import annotations

import torch

__all__ = ["count_in_sequence", "has_holes", "leading_padding", "place_of"]


def has_holes(real: torch.Tensor) -> bool:
    """Whether any row has padding between its real tokens.

    >>> has_holes(torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]]).bool()), has_holes(torch.tensor([[1, 0, 1]]).bool())
    (False, True)
    """
    begins = real[:, :1].sum(-1) + (real[:, 1:] & ~real[:, :-1]).sum(-1)
    return bool((begins > 1).any())


def leading_padding(real: torch.Tensor) -> torch.Tensor:
    """(B,): slots before the first real token of each row; all of them where it has none.

    >>> leading_padding(torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0]]).bool()).tolist()
    [1, 4]
    """
    return (real.cumsum(-1) == 0).sum(-1, dtype=torch.int32)


def place_of(real: torch.Tensor) -> torch.Tensor:
    """(B, S): which of the real tokens of its row a slot holds, from 0 on; padding counts as the token before it.

    >>> place_of(torch.tensor([[0, 1, 0, 1, 1]]).bool()).tolist()
    [[0, 0, 0, 1, 2]]
    """
    return (real.cumsum(-1, dtype=torch.int32) - 1).clamp_(min=0)


def count_in_sequence(sequence: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S) each: which token of its sequence a token is, and how many tokens the sequence has.

    >>> [numbers.tolist() for numbers in count_in_sequence(torch.tensor([[0, 0, 0, 1, 1]]))]
    [[[0, 1, 2, 0, 1]], [[3, 3, 3, 2, 2]]]
    """
    sequence = sequence.long()
    sizes = torch.zeros_like(sequence).scatter_add_(1, sequence, torch.ones_like(sequence))
    begin = (sizes.cumsum(-1) - sizes).gather(1, sequence)
    place = torch.arange(sequence.shape[1], device=sequence.device) - begin
    return place.int(), sizes.gather(1, sequence).int()
