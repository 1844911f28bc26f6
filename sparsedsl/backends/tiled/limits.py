"""How much the `tiled` backend computes at once, and from where on another way is worth it."""

from __future__ import annotations

from dataclasses import dataclass

from sparsedsl.adjustable import Adjustable

__all__ = ["LIMITS", "Limits"]


@dataclass(frozen=True)
class Limits:
    """Of strips, of attention along lists, of decoding, of scans along the keys.

    Strips:

    - ``threads_from``: pairs of queries and keys, of all heads, from which on it is worth to wake other threads.

    Lists:

    - ``output_bytes``: what the outputs of everything at work, one for each pair, may take in all; ``output_bytes_each``: what
      one of many threads may take at least.
    - ``numbers``: what is computed at once may hold so many; products on a GPU should be few. ``numbers_cpu``: a core's cache is
      small.
    - ``few``: numbers of the whole call that are not worth a second thread.

    Decoding:

    - ``decode_numbers``: of k and v that are worked on at once; more are cut into tiles like any other call, by several threads.

    Scans:

    - ``scan_chunk``: a power of two: slots halve it. Pairs within a chunk cost ``scan_chunk`` products a row, states cost
      head_dim / ``scan_chunk`` numbers a row.
    - ``scan_rows``: computed at once over all heads and batch entries: enough to make calls to torch cheap, few enough for a
      cache. ``gated_rows``: the same where decays come with the data, which takes more calls.
    - ``scan_tokens``: of a call without gradients, up to which these go one by one.
    """

    threads_from: int = 1 << 20
    output_bytes: int = 64 << 20
    output_bytes_each: int = 16 << 20
    numbers: int = 1 << 22
    numbers_cpu: int = 1 << 18
    few: int = 1 << 22
    decode_numbers: int = 1 << 24
    scan_chunk: int = 64
    scan_rows: int = 4096
    gated_rows: int = 16384
    scan_tokens: int = 4


LIMITS = Adjustable(Limits())
