"""The needle task of hsa_needle.py: find a key in a haystack, and say what stands behind it.

A needle is three tokens, ``MARK key value``. The haystack around needles is made of the same symbols as keys and values, so
that only the mark tells a needle; at 64K tokens every symbol stands there some five hundred times without one. Questions, ``ASK
key``, come last.
"""

from __future__ import annotations

import torch

SYMBOLS = 128
MARK, ASK = SYMBOLS, SYMBOLS + 1
VOCABULARY = SYMBOLS + 2
NEEDLE, QUESTION = 3, 2  # tokens


def needles(batch: int, length: int, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` needles with different keys at random places of each row, and as many questions, in random order.

    Returns:
        Tokens ``(batch, length)`` and answers ``(batch, count)``: the value behind the key of each question.

    >>> tokens, answers = needles(1, 64, 4, torch.Generator().manual_seed(0))
    >>> key = tokens[0, -1]  # the last question
    >>> at = [i for i in range(56) if tokens[0, i] == MARK and tokens[0, i + 1] == key]
    >>> len(at) == 1 and bool(tokens[0, at[0] + 2] == answers[0, -1])
    True
    """
    haystack = length - QUESTION * count
    spare = haystack - NEEDLE * count  # tokens that belong to no needle
    if spare < 0 or count > SYMBOLS:
        raise ValueError(f"{count} needles and questions do not fit into {length} tokens of {SYMBOLS} symbols")
    tokens = torch.randint(0, SYMBOLS, (batch, length), generator=generator)
    keys = torch.rand(batch, SYMBOLS, generator=generator).argsort(1)[:, :count]
    values = torch.randint(0, SYMBOLS, (batch, count), generator=generator)
    # Needles and spare tokens in random order: the n-th needle of a row begins two tokens later for each needle before it.
    order = torch.rand(batch, spare + count, generator=generator).argsort(1)[:, :count].sort(1).values
    start = order + (NEEDLE - 1) * torch.arange(count)
    for place, content in enumerate((torch.full_like(keys, MARK), keys, values)):
        tokens.scatter_(1, start + place, content)
    asked = torch.rand(batch, count, generator=generator).argsort(1)
    tokens[:, haystack::QUESTION] = ASK
    tokens[:, haystack + 1 :: QUESTION] = keys.gather(1, asked)
    return tokens, values.gather(1, asked)
