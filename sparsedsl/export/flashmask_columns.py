"""FlashMask: a column's hidden queries as one or two intervals, four numbers a key at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsedsl.errors import ShapeError
from sparsedsl.export.export_case import MAX_BYTES, Case, prepare
from sparsedsl.export.exported import Exported, check_dense
from sparsedsl.export.logits import logit_args
from sparsedsl.export.spans import Spans, first_difference

__all__ = ["FlashMaskColumns", "decode_columns", "encode_columns", "flashmask"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class FlashMaskColumns(Exported):
    """``startend_row_indices`` int32 ``(batch, 1 | kv_heads, keys, C)``: what is *hidden*; what C numbers mean depends on ``causal``.

    >>> import sparsedsl as sd
    >>> sd.export.flashmask(sd.patterns.causal(), 4, causal=False).startend_row_indices[0, 0].tolist()
    [[4, 0], [4, 1], [4, 2], [4, 3]]
    """

    engine: ClassVar[str] = "flashmask"
    read_at: ClassVar[str] = "PaddlePaddle/flash-attention 9985af5"

    startend_row_indices: torch.Tensor
    causal: bool
    heads: int
    kv_heads: int

    def to_mask(self) -> torch.Tensor:
        """As :meth:`Exported.to_mask`, one mask a query head where key heads differ."""
        indices = self.startend_row_indices
        check_dense(indices.shape[0] * indices.shape[1] * self.q_lens[0] * self.kv_lens[0])
        mask = decode_columns(indices, self.q_lens[0], self.causal)
        return mask if indices.shape[1] == 1 else mask.repeat_interleave(self.heads // self.kv_heads, dim=1)


def decode_columns(indices: torch.Tensor, q_len: int, causal: bool) -> torch.Tensor:
    """``(.., keys, C)`` -> bool ``(.., queries, keys)``, the causal diagonal bottom-right.

    >>> decode_columns(torch.tensor([[3], [4], [4], [4]]), 4, True).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1]]
    """
    keys, count = indices.shape[-2:]
    if (causal, count) not in ((True, 1), (True, 2), (False, 2), (False, 4)):
        raise ShapeError(f"flashmask: C is 1 or 2 with causal, 2 or 4 without; got C={count} with causal={causal}")
    if bool(((indices < 0) | (indices > q_len)).any()):
        raise ShapeError(f"flashmask: row indices lie in 0 .. {q_len}; got {int(indices.min())} .. {int(indices.max())}")
    row = torch.arange(q_len, device=indices.device)[:, None]
    ends = [indices[..., n][..., None, :] for n in range(count)]
    if causal:
        below = ends[1] if count == 2 else q_len
        diagonal = torch.arange(keys, device=indices.device) > row + (keys - q_len)
        return ~(diagonal | ((ends[0] <= row) & (row < below)))
    if count == 2:
        return ~((row >= ends[0]) | (row < ends[1]))
    return ~(((ends[0] <= row) & (row < ends[1])) | ((ends[2] <= row) & (row < ends[3])))


@dataclass(frozen=True)
class _Misfit:
    """The flat column that does not fit, and why, in words."""

    column: int
    why: str


def encode_columns(columns: Spans, q_len: int, causal: bool) -> torch.Tensor | _Misfit:
    """int64 ``(lines, C)`` with the least C, or the first column that has no room."""
    device = columns.counts.device
    keys = columns.shape[2]
    if not causal:
        return _two_sided(columns, columns.gaps(), q_len)
    line = torch.arange(columns.counts.numel(), device=device)
    first_row = (line % keys - (keys - q_len)).clamp(min=0)
    early = (columns.starts < first_row[columns.owners]).nonzero()[:, 0]
    if early.numel():
        line_of = int(columns.owners[int(early[0])])
        return _Misfit(
            line_of, f"is seen above the diagonal (query {int(columns.starts[int(early[0])])}), where causal=True hides it"
        )
    gaps = columns.gaps(first_row)
    if gaps.most > 1:
        return _crowded(gaps, 1, "below the diagonal ")
    out = torch.full((columns.counts.numel(), 2), q_len, dtype=torch.int64, device=device)
    out[gaps.owners, 0] = gaps.starts
    out[gaps.owners, 1] = gaps.stops
    return out[:, :1] if bool((gaps.stops == q_len).all()) else out


def _two_sided(columns: Spans, gaps: Spans, q_len: int) -> torch.Tensor | _Misfit:
    if gaps.most > 2:
        return _crowded(gaps, 2, "")
    inner = (gaps.starts > 0) & (gaps.stops < q_len)
    lines, device = columns.counts.numel(), columns.counts.device
    # A gap that ends with the queries is the lower one, then one that begins with them is the upper one.
    upper = (gaps.starts == 0) & (gaps.stops < q_len)
    if not bool(inner.any()):
        out = torch.zeros(lines, 2, dtype=torch.int64, device=device)
        out[:, 0] = q_len
        out[gaps.owners[~upper], 0] = gaps.starts[~upper]
        out[gaps.owners[upper], 1] = gaps.stops[upper]
        return out
    out = torch.zeros(lines, 4, dtype=torch.int64, device=device)
    out[:, :2] = q_len
    # The last gap of a column stands first, the one before it second.
    last = gaps.ranks == gaps.counts[gaps.owners] - 1
    for part, place in ((last, 0), (~last, 2)):
        out[gaps.owners[part], place] = gaps.starts[part]
        out[gaps.owners[part], place + 1] = gaps.stops[part]
    return out


def _crowded(gaps: Spans, room: int, where: str) -> _Misfit:
    line = int((gaps.counts > room).nonzero()[0])
    runs = gaps.at(line)
    shown = ", ".join(str(run.start) if len(run) == 1 else f"{run.start}-{run.stop - 1}" for run in runs[:4])
    more = ", .." if len(runs) > 4 else ""
    return _Misfit(line, f"has {len(runs)} gaps {where}(queries {shown}{more}), room for {('no', 'one', 'two')[room]}")


def flashmask(
    pattern: Any, q_len: int | None = None, kv_len: int | None = None, *, q_offset: int | None = None, batch: int = 1,
    heads: int | None = None, kv_heads: int | None = None, causal: bool | None = None, version: int = 3, device: Any = None,
    max_bytes: int = MAX_BYTES, **tables: Any,
) -> FlashMaskColumns:  # fmt: skip
    """The columns that FlashMask takes: ``flashmask_attention(q, k, v, **e.args)``.

    With ``causal`` a key has room for one interval of hidden queries below the diagonal, which is bottom-right; without, for two. Query
    heads of a key head agree. Packed sequences are columns here: write them as documents.

    Args:
        pattern, q_len, kv_len, q_offset, batch, heads, kv_heads, device, max_bytes, tables: as :func:`cudnn`.
        causal: which form; None takes the one with fewer numbers a key.
        version: 3 or 4; a sink needs 4.

    Returns:
        :class:`FlashMaskColumns`.

    Raises:
        UnsupportedError: a column with more gaps, heads of a group that differ, a score, a sink in version 3.
        ShapeError, TableError: as :func:`sparsedsl.analyse`.

    No kernel of FlashMask was run.

    >>> import sparsedsl as sd
    >>> e = sd.export.flashmask(sd.patterns.sliding_window(3), 6)
    >>> e.causal, e.startend_row_indices.flatten().tolist()
    (True, [3, 4, 5, 6, 6, 6])
    """
    case = prepare(
        "flashmask", "columns", pattern, q_len, kv_len, q_offset=q_offset, batch=batch, heads=heads, kv_heads=kv_heads, device=device,
        max_bytes=max_bytes, tables=tables,
    )  # fmt: skip
    if version not in (3, 4):
        raise ShapeError(f"flashmask: version must be 3 or 4; got {version!r}")
    args = logit_args(case, scale="softmax_scale", sink="learnable_sink" if version == 4 else None, sink_dtype=torch.bfloat16)
    columns = _by_key_head(case)
    forms = [(form, encode_columns(columns, case.part.q_len, form)) for form in ((True, False) if causal is None else (causal,))]
    held = [(form, found) for form, found in forms if isinstance(found, torch.Tensor)]
    if not held:
        misfit = _telling(forms)
        b, h = divmod(misfit.column // columns.shape[2], columns.shape[1])
        where = (f" of batch entry {b}" if columns.shape[0] > 1 else "") + (f" of key head {h}" if columns.shape[1] > 1 else "")
        case.refuse(f"key {misfit.column % columns.shape[2]}{where} {misfit.why}; {case.holder()}")
    form, found = min(held, key=lambda item: item[1].shape[1])
    batches, groups, keys = columns.shape
    case.check_bytes(
        4 * batch * groups * keys * found.shape[1], f"startend_row_indices ({batch}, {groups}, {keys}, {found.shape[1]})"
    )
    indices = case.place(found.view(batches, groups, keys, found.shape[1]).expand(batch, groups, keys, found.shape[1]))
    args |= {"startend_row_indices": indices, "causal": form}
    return FlashMaskColumns(
        startend_row_indices=indices, causal=form, heads=case.heads, kv_heads=case.kv_heads, args=args, **case.lens
    )


def _telling(forms: list[tuple[bool, Any]]) -> _Misfit:
    """The reason to name: the causal one, unless the mask is not causal at all."""
    misfits = dict(forms)
    if True in misfits and (len(misfits) == 1 or "above the diagonal" not in misfits[True].why):
        return misfits[True]
    return misfits[False]


def _by_key_head(case: Case) -> Spans:
    """The columns of every key head; refuse query heads of one that differ."""
    columns = case.part.columns
    batches, heads, keys = columns.shape
    if heads == 1 or case.kv_heads == heads:
        return columns
    share = heads // case.kv_heads
    for b in range(batches):
        for h in range(heads):
            first = h - h % share
            found = first_difference(columns.group(b, first), columns.group(b, h)) if h != first else None
            if found:
                case.refuse(
                    f"query heads {first} and {h} of key head {h // share} differ (first at key {found[0]}, query {found[1]}), columns are "
                    f"one a key head; {case.holder()}"
                )
    lines = torch.arange(batches * heads * keys, device=columns.counts.device)
    kept = (lines // keys % heads) % share == 0
    runs = kept[columns.owners]
    return Spans((batches, case.kv_heads, keys), columns.length, columns.counts[kept], columns.starts[runs], columns.stops[runs])
