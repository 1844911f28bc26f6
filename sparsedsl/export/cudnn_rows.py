"""cuDNN frontend, flex attention: a row's keys as an odd number of rising endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsedsl.errors import ShapeError
from sparsedsl.export.export_case import MAX_BYTES, Case, prepare
from sparsedsl.export.exported import Exported, check_dense, ends_of, packed_mask
from sparsedsl.export.logits import logit_args
from sparsedsl.export.spans import Spans

__all__ = ["CudnnRows", "cudnn", "decode_endpoints", "encode_endpoints"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class CudnnRows(Exported):
    """``mask_func`` int32 ``(1 | heads, nfunc, rows)``, rows batch-major: a row sees keys ``[0, F0), [F1, F2), [F3, F4), ..``.

    >>> import sparsedsl as sd
    >>> e = sd.export.cudnn(sd.kv_idx % 2 == 0, 1, 4)
    >>> e.mask_func.flatten().tolist(), e.to_mask().flatten().tolist()
    ([1, 2, 3], [True, False, True, False])
    """

    engine: ClassVar[str] = "cudnn"
    read_at: ClassVar[str] = "cudnn-frontend 0b648e4 (docs), 1ddab8d (validation), 817e565 (classification)"

    mask_func: torch.Tensor
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None

    def to_mask(self) -> torch.Tensor:
        """As :meth:`Exported.to_mask`. Raises ShapeError for endpoints that fall, are negative or lie behind the keys."""
        check_dense(self.mask_func.shape[0] * sum(q * kv for q, kv in zip(self.q_lens, self.kv_lens, strict=True)))
        ends = ends_of(self.q_lens) if self.cu_seqlens_q is None else self.cu_seqlens_q.tolist()
        parts = [self.mask_func[..., ends[n] : ends[n + 1]] for n in range(len(ends) - 1)]
        return packed_mask(self, [decode_endpoints(part, keys) for part, keys in zip(parts, self.kv_lens, strict=True)])


def decode_endpoints(mask_func: torch.Tensor, kv_len: int) -> torch.Tensor:
    """Endpoints ``(heads, nfunc, rows)`` -> bool ``(heads, rows, kv_len)``.

    >>> decode_endpoints(torch.tensor([[[1, 2, 0], [1, 2, 1], [1, 2, 3]]]), 3).int().tolist()
    [[[1, 0, 0], [1, 1, 0], [0, 1, 1]]]
    """
    if mask_func.shape[1] % 2 == 0:
        raise ShapeError(f"cudnn: nfunc must be odd; got {mask_func.shape[1]}")
    wrong = (mask_func.diff(dim=1, prepend=torch.zeros_like(mask_func[:, :1])) < 0).any(dim=1) | (mask_func[:, -1] > kv_len)
    if bool(wrong.any()):
        head, row = wrong.nonzero()[0].tolist()
        raise ShapeError(
            f"cudnn: endpoints of a row rise from 0 to at most {kv_len}; row {row} of head {head} has {mask_func[head, :, row].tolist()}"
        )
    key = torch.arange(kv_len, device=mask_func.device)
    end = mask_func[..., None]
    out = key < end[:, 0]
    for n in range(1, mask_func.shape[1], 2):
        out |= (end[:, n] <= key) & (key < end[:, n + 1])
    return out


def encode_endpoints(rows: Spans, nfunc: int) -> torch.Tensor:
    """int32 ``(nfunc, lines)`` of all flat lines; rows that need fewer endpoints repeat their last one."""
    lines = rows.counts.numel()
    out = torch.zeros(nfunc, lines, dtype=torch.int32, device=rows.counts.device)
    from_zero = torch.bincount(rows.owners[rows.starts == 0], minlength=lines)
    last = 2 * (rows.ranks + 1 - from_zero[rows.owners])
    out[last, rows.owners] = rows.stops.to(torch.int32)
    other = rows.starts > 0
    out[last[other] - 1, rows.owners[other]] = rows.starts[other].to(torch.int32)
    return out.cummax(dim=0).values  # endpoints rise, so that this repeats the last one


def cudnn(
    pattern: Any, q_len: int | None = None, kv_len: int | None = None, *, q_offset: int | None = None, batch: int = 1,
    heads: int | None = None, kv_heads: int | None = None, q_lens: Sequence[int] | None = None, kv_lens: Sequence[int] | None = None,
    device: Any = None, max_bytes: int = MAX_BYTES, **tables: Any,
) -> CudnnRows:  # fmt: skip
    """The endpoints that cuDNN frontend's flex attention takes: ``create_mask_plan(e.mask_func, q, k, v)``, then ``flex_attn_func``.

    Holds every mask; a row needs one endpoint, and two for every run of keys that does not begin at key 0. Scale is the only change to
    logits that it knows.

    Args:
        pattern: a mask or a pattern; a program that chooses is refused.
        q_len, kv_len: numbers of queries and keys; ``kv_len`` defaults to ``q_len``.
        q_offset: position of the first query; None puts the last query at the last key.
        batch, heads, kv_heads: of the call; heads default to those the pattern is written for, else 1.
        q_lens, kv_lens: in place of ``q_len``, ``kv_len``, ``batch``: packed sequences. Each is a call of its own, the n-th with ``b = n``.
        device: where the tensors are put; None leaves them on the device of the tables.
        max_bytes: what would take more is refused before it is made.
        tables: a tensor for each table that is not bound.

    Returns:
        :class:`CudnnRows`; ``args`` are the words of ``flex_attn_func`` and, packed, of ``create_mask_plan``.

    Raises:
        UnsupportedError: a score or a sink, a program that chooses, more than ``max_bytes``.
        ShapeError, TableError: as :func:`sparsedsl.analyse`.

    No kernel of cuDNN was run: the encoding is decoded again by the rule its documentation states.

    >>> import sparsedsl as sd
    >>> e = sd.export.cudnn(sd.patterns.sliding_window(2), 4)
    >>> e.mask_func.tolist(), e.bytes
    ([[[1, 2, 0, 0], [1, 2, 1, 2], [1, 2, 3, 4]]], 48)
    """
    case = prepare(
        "cudnn", "rows", pattern, q_len, kv_len, q_offset=q_offset, batch=batch, heads=heads, kv_heads=kv_heads, q_lens=q_lens,
        kv_lens=kv_lens, device=device, max_bytes=max_bytes, tables=tables,
    )  # fmt: skip
    args = logit_args(case, scale="softmax_scale")
    mask_func = _rows(case)
    cu: dict[str, Any] = {}
    if case.packed:
        cu = {
            "cu_seqlens_q": case.place(torch.tensor(ends_of(case.q_lens))),
            "cu_seqlens_k": case.place(torch.tensor(ends_of(case.kv_lens))),
        }
        args |= cu | {"max_seqlen_q": max(case.q_lens), "max_seqlen_k": max(case.kv_lens)}
    return CudnnRows(mask_func=mask_func, args=args | {"mask_func": mask_func}, **case.lens, **cu)


def _rows(case: Case) -> torch.Tensor:
    all_rows = [part.rows for part in case.parts]
    nfunc = 1 + 2 * max(rows.most_away for rows in all_rows)
    heads = max(rows.shape[1] for rows in all_rows)
    case.check_bytes(4 * heads * nfunc * sum(case.q_lens), f"mask_func ({heads}, {nfunc}, {sum(case.q_lens)})")
    found = []
    for rows in all_rows:
        batch, own_heads, lines = rows.shape
        ends = encode_endpoints(rows, nfunc).view(nfunc, batch, own_heads, lines).permute(2, 0, 1, 3)
        entries = 1 if case.packed else case.batch
        found.append(ends.expand(heads, nfunc, entries, lines).reshape(heads, nfunc, entries * lines))
    return case.place(torch.cat(found, dim=-1))
