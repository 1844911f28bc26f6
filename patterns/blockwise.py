"""Patterns in whole blocks: from a table, at random, and block diffusion."""

from __future__ import annotations

import functools
import operator
import random
from typing import Any

from sparsedsl.errors import PatternError
from sparsedsl.lang.expressions import Index, Mask, as_mask, b, h, kv_idx, kv_len, q_idx
from sparsedsl.lang.table_reads import table
from sparsedsl.patterns.checked_arguments import check_count, check_flag, check_whole

__all__ = ["block_causal", "block_diffusion", "blocks", "random_blocks"]

# Three different primes: with one modulus sympy would join nested remainders, and the products would leave the integers
# of a machine. As it is no intermediate value reaches 2**31.
_PRIMES = (65521, 32717, 32749)


def blocks(
    name: str = "block_table",
    block_q: int = 128,
    block_kv: int | None = None,
    *,
    heads: bool = False,
    batched: bool = False,
) -> Mask:
    """Block-sparse attention from a table: ``table[q_idx // block_q, kv_idx // block_kv]``.

    Args:
        name: name of a bool table of shape ``(q blocks, kv blocks)``; ``True`` means that the pair of blocks attends.
        block_q: queries in a block.
        block_kv: keys in a block; default ``block_q``.
        heads: every head has its own table: shape ``(H, q blocks, kv blocks)``.
        batched: every batch entry has its own: shape ``(B, q blocks, kv blocks)``, or ``(B, H, q blocks, kv blocks)``.

    Raises:
        PatternError: a block length below 1, a bad table name.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers" (block-sparse kernels, arXiv 1904.10509).

    >>> import sparsedsl as sd
    >>> print((sd.patterns.causal() & sd.patterns.blocks("chosen", 64, heads=True)).text)
    chosen = table('chosen', dtype=bool)
    (q_idx >= kv_idx) & chosen[h, q_idx // 64, kv_idx // 64]
    """
    block_q = check_whole("blocks", "block_q", block_q, 1)
    block_kv = block_q if block_kv is None else check_whole("blocks", "block_kv", block_kv, 1)
    lead = (b,) * check_flag("blocks", "batched", batched) + (h,) * check_flag("blocks", "heads", heads)
    return table(name, dtype=bool)[(*lead, q_idx // block_q, kv_idx // block_kv)]


def block_causal(block: int | Index) -> Mask:
    """Full inside a block of tokens, causal between blocks: ``kv_idx // block <= q_idx // block``.

    Args:
        block: tokens in a block, e.g. in a video frame; a whole number, or an index expression with values known to be positive.

    Raises:
        PatternError: ``block`` is below 1 or not a whole number.

    Source: block diffusion at sampling time, Arriola et al. 2025 (arXiv 2503.09573); frame-causal video models.

    >>> import sparsedsl as sd
    >>> print(sd.patterns.block_causal(16))
    kv_idx // 16 <= q_idx // 16
    """
    block = check_count("block_causal", "block", block, 1)
    return kv_idx // block <= q_idx // block


def random_blocks(block: int, count: int, *, seed: int, causal: bool = False) -> Mask:
    """Every block of queries sees ``count`` blocks of keys drawn at random, some of them possibly twice.

    Block ``i`` sees blocks ``(x*x + x) % 32749 % n`` with ``x = (a[r]*(i % 65521) + c[r]) % 32717``, for ``r = 1 .. count``;
    ``a`` and ``c`` come from ``seed``, and ``n`` is the number of key blocks, or ``i + 1`` if causal. The draw is arithmetic: no
    table, any length, the same blocks on every machine. To choose the blocks yourself use :func:`blocks`.

    Args:
        block: tokens in a block.
        count: blocks drawn for each block of queries; 0 gives an empty mask.
        seed: a whole number of at least 0; another seed draws other blocks.
        causal: draw among the blocks up to the query's own, and drop later keys in that one.

    Raises:
        PatternError: ``block`` below 1, ``count`` or ``seed`` negative.

    Source: Zaheer et al. 2020, "Big Bird" (arXiv 2007.14062), random attention in blocks.

    >>> import sparsedsl as sd
    >>> sd.patterns.random_blocks(64, 3, seed=0).same_as(sd.patterns.random_blocks(64, 3, seed=0))
    True
    """
    block = check_whole("random_blocks", "block", block, 1)
    count = check_whole("random_blocks", "count", count, 0)
    seed = check_whole("random_blocks", "seed", seed, 0)
    causal = check_flag("random_blocks", "causal", causal)
    row = q_idx // block
    choices = row + 1 if causal else (kv_len - 1) // block + 1
    draws = [kv_idx // block == _hash(row, seed, draw) % choices for draw in range(count)]
    drawn = functools.reduce(operator.or_, draws, as_mask(False))
    return drawn & (kv_idx <= q_idx) if causal else drawn


def _hash(i: Index, seed: int, draw: int) -> Index:
    """A number in ``0 .. 32748`` for each ``i``, spread evenly enough to draw blocks by."""
    first, second, third = _PRIMES
    generator = random.Random(f"{seed}/{draw}")
    factor, shift = generator.randrange(1, second), generator.randrange(second)
    x = (i % first * factor + shift) % second
    return (x * x + x) % third


def block_diffusion(block: int, *, length: int | None = None) -> Mask:
    """Training mask of block diffusion: noisy tokens then clean ones, ``n`` each, in blocks of ``block`` tokens.

    A noisy query sees its own noisy block and all *earlier* clean blocks; a clean query sees the clean blocks up to its own.

    Args:
        block: tokens denoised at a time.
        length: ``n``, the tokens of one half; default ``kv_len // 2``, so that the call's sequence is cut in the middle.

    Raises:
        PatternError: ``block`` or ``length`` is below 1; ``length`` is not a multiple of ``block``.

    Source: Arriola et al. 2025, "Block Diffusion" (BD3-LM, arXiv 2503.09573), section 3.

    >>> import sparsedsl as sd
    >>> for part in str(sd.patterns.block_diffusion(16, length=64)).split(" | "):
    ...     print(part)
    ((kv_idx >= 64) & (q_idx >= 64) & (kv_idx // 16 <= q_idx // 16))
    ((kv_idx >= 64) & (q_idx // 16 - kv_idx // 16 >= -3) & (q_idx < 64))
    ((q_idx // 16 == kv_idx // 16) & (kv_idx < 64) & (q_idx < 64))
    """
    block = check_whole("block_diffusion", "block", block, 1)
    half: Any = kv_len // 2
    if length is not None:
        half = check_whole("block_diffusion", "length", length, 1)
        if half % block:
            raise PatternError(f"block_diffusion(): length must be a multiple of block, which is {block}; got {length}")
    noisy_q, noisy_kv = q_idx < half, kv_idx < half
    own_block = noisy_q & noisy_kv & (q_idx // block == kv_idx // block)
    before = noisy_q & ~noisy_kv & ((kv_idx - half) // block < q_idx // block)
    clean = ~noisy_q & ~noisy_kv & ((kv_idx - half) // block <= (q_idx - half) // block)
    return own_block | before | clean
