"""Packed calls from request to request, each an ordinary call: what they mean, and how programs run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from sparsedsl.execute.call_words import CallWords
from sparsedsl.execute.paged_keys import RequestKeys
from sparsedsl.program.relocation import reads_rows
from sparsedsl.runtime.dtypes import accumulated
from sparsedsl.runtime.packed_rows import Requests
from sparsedsl.runtime.standing import Standing

if TYPE_CHECKING:
    from sparsedsl.execute.calls import Calls

__all__ = ["request_by_request"]

Tensor = torch.Tensor
# Keys and values (1, Hkv, kv_len, D), and what reads their rows where they lie in pages.
RequestRows = tuple[Tensor, Tensor, RequestKeys | None]


def request_by_request(
    calls: Calls, q: Tensor, value_dim: int, requests: Requests, keys_of: Callable[[int], RequestRows],
    named_of: Callable[[int], Mapping[str, Any]], *, scale: float | None, lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``out (1, Hq, T, Dv)`` and the LSE ``(1, Hq, T)`` of ``q (1, Hq, T, D)``; rows of no request are 0 and -inf.

    ``keys_of``, ``named_of``: keys and values of a request, and its tables and inputs by name.
    """
    ends, starts = requests.ends.tolist(), requests.starts.tolist()
    tells_apart = reads_rows(calls.program)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for number, (begin, end) in enumerate(itertools.pairwise(ends)):
        if begin == end:
            continue
        k, v, in_pages = keys_of(number)
        where = Standing(entry=number) if tells_apart else None
        words = CallWords(named_of(number), starts[number], lse, scale, where, in_pages=in_pages)
        found = calls.attend_now(q[:, :, begin:end], k, v, words)
        out, weight = found if lse else (found, None)
        outs.append(out)
        lses += [] if weight is None else [weight]
    left = q.shape[2] - (ends[-1] if ends else 0)
    heads = outs[0].shape[1] if outs else q.shape[1]
    outs.append(q.new_zeros((1, heads, left, value_dim)))
    if not lse:
        return torch.cat(outs, 2), None
    lses.append(q.new_full((1, heads, left), float("-inf"), dtype=accumulated(q.dtype)))
    return torch.cat(outs, 2), torch.cat(lses, 2)
