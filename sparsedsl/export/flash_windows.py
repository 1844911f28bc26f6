"""FlashAttention 2, 3 and 4: a causal flag and a window, a chunk in version 3, packed sequences; in version 4 block lists too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch

from sparsedsl.errors import ShapeError
from sparsedsl.export.bands import Band, Lines, band_mask, find_band, find_chunk, find_documents, lines_of
from sparsedsl.export.export_case import MAX_BYTES, Case, Part, prepare
from sparsedsl.export.exported import Exported, ends_of, packed_mask
from sparsedsl.export.flash_lists import FlashLists, export_lists
from sparsedsl.export.logits import logit_args

__all__ = ["FlashWindow", "flash_attention", "flash_visible"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class FlashWindow(Exported):
    """``args`` hold all: ``causal``, ``window_size``, perhaps ``attention_chunk``, and ``cu_seqlens_*`` of packed sequences.

    >>> import sparsedsl as sd
    >>> sd.export.flash_attention(sd.patterns.chunked(256), 1024, version=3).args
    {'attention_chunk': 256, 'causal': True, 'window_size': (-1, 0)}
    """

    engine: ClassVar[str] = "flash_attention"
    read_at: ClassVar[str] = "flash-attention 0251105"

    version: int
    causal: bool
    window_size: tuple[int | None, int | None]
    attention_chunk: int = 0
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None

    def to_mask(self) -> torch.Tensor:
        """As :meth:`Exported.to_mask`, by the rules of the version."""
        cu = [self.cu_seqlens_q, self.cu_seqlens_k]
        q_lens, kv_lens = (
            list(lens) if ends is None else ends.diff().tolist()
            for lens, ends in zip((self.q_lens, self.kv_lens), cu, strict=True)
        )
        blocks = [
            flash_visible(q, kv, self.window_size, self.causal, self.version, self.attention_chunk)[None]
            for q, kv in zip(q_lens, kv_lens, strict=True)
        ]
        if self.packed or cu[0] is None:
            return packed_mask(self, blocks)
        return torch.block_diag(*(block[0].int() for block in blocks)).bool()[None, None]


def flash_visible(
    q_len: int, kv_len: int, window: tuple[int | None, int | None], causal: bool, version: int, chunk: int = 0
) -> torch.Tensor:
    """What a call shows, bool ``(q_len, kv_len)``. Negative numbers are no limit in versions 2 and 3; in version 4 None is.

    >>> flash_visible(3, 3, (-1, 0), False, 2).sum().item(), flash_visible(3, 3, (-1, 0), False, 4).sum().item()
    (6, 9)
    """
    left, right = window
    right = 0 if causal else right
    if version < 4:
        left, right = (None if end is None or end < 0 else end for end in (left, right))
    elif left is not None and right is not None and left + right < 0:
        left, right = None, 0 if causal else None
    return band_mask(q_len, kv_len, Band(left, right), chunk)


def flash_attention(
    pattern: Any, q_len: int | None = None, kv_len: int | None = None, *, version: int = 2, blocks: bool = False,
    block: tuple[int, int] = (128, 128), q_offset: int | None = None, batch: int = 1, heads: int | None = None,
    kv_heads: int | None = None, q_lens: Sequence[int] | None = None, kv_lens: Sequence[int] | None = None, head: int | None = None,
    device: Any = None, max_bytes: int = MAX_BYTES, **tables: Any,
) -> FlashWindow | FlashLists:  # fmt: skip
    """The words of a call of FlashAttention: ``flash_attn_func(q, k, v, **e.args)``, packed ``flash_attn_varlen_func``.

    Holds one band for all sequences and heads, with the last query at the last key; in version 3 also chunks; documents of one packed
    sequence become ``cu_seqlens``. With ``version=4, blocks=True`` any mask, as :class:`FlashLists`.

    Args:
        pattern, q_len, kv_len, q_offset, batch, heads, kv_heads, q_lens, kv_lens, device, max_bytes, tables: as :func:`cudnn`.
        version: 2, 3 or 4.
        blocks: lists of blocks in place of a window (version 4); ``block`` are tokens of a block, of queries and of keys.
        head: export the mask of this head alone.

    Returns:
        :class:`FlashWindow`, with ``blocks`` :class:`FlashLists`.

    Raises:
        UnsupportedError: no band, heads that differ, an offset that does not end at the last key, scores other than a soft cap, a sink
            before version 4.
        ShapeError, TableError: as :func:`sparsedsl.analyse`.

    No kernel of FlashAttention was run.

    >>> import sparsedsl as sd
    >>> e = sd.export.flash_attention(sd.patterns.sliding_window(1024), 4096)
    >>> e.args
    {'causal': True, 'window_size': (1023, 0)}
    """
    case = prepare(
        "flash_attention", "windows", pattern, q_len, kv_len, q_offset=q_offset, batch=batch, heads=heads, kv_heads=kv_heads,
        q_lens=q_lens, kv_lens=kv_lens, head=head, device=device, max_bytes=max_bytes, tables=tables,
    )  # fmt: skip
    if version not in (2, 3, 4):
        raise ShapeError(f"flash_attention: version must be 2, 3 or 4; got {version!r}")
    if blocks and version != 4:
        raise ShapeError(f"flash_attention: blocks=True is of version 4; got version={version}")
    sink = "learnable_sink" if version == 4 else None
    args = logit_args(case, scale="softmax_scale", cap="softcap", sink=sink, sink_dtype=torch.bfloat16)
    if blocks:
        return export_lists(case, block, args)
    case.ends_at_the_last_key()
    parts = [part.alone() for part in case.parts]
    lines = [_lines(case, part, number, entry) for number, part in enumerate(parts) for entry in range(part.rows.shape[0])]
    band = find_band(lines)
    if isinstance(band, Band) and band.holds_own_key:
        return _window(case, version, band, args, case.q_lens, case.kv_lens)
    if not case.packed and case.batch == 1:
        if version == 3 and (chunk := find_chunk(lines[0])) and chunk[1].holds_own_key:
            return _window(case, version, chunk[1], args | {"attention_chunk": chunk[0]}, case.q_lens, case.kv_lens)
        if documents := find_documents(lines[0], case.part.off):
            lens = tuple(documents[1])
            return _window(case, version, documents[0], args, lens, lens, cut=True)
    if isinstance(band, Band):
        _refuse_own_key(case, band, parts)
    owners = [number for number, part in enumerate(parts) for _ in range(part.rows.shape[0])]
    case.refuse(f"{case.query(owners[band.sequence], band.query)} {band}; {_lists_or(case)}")


def _lists_or(case: Case) -> str:
    return case.holder() if case.packed else "version=4 with blocks=True holds it"


def _keys(runs: list[range]) -> str:
    words = [f"{run.start}" if len(run) == 1 else f"{run.start}-{run.stop - 1}" for run in runs[:4]] + [".."] * (len(runs) > 4)
    return f"keys {' and '.join(words)}" if runs else "no key"


def _lines(case: Case, part: Part, number: int, entry: int) -> Lines:
    rows = part.rows.group(entry, 0)
    found = lines_of(rows, part.off)
    if isinstance(found, int):
        case.refuse(f"{case.query(number, found)} sees {_keys(rows.at(found))}, no band; {_lists_or(case)}")
    return found


def _refuse_own_key(case: Case, band: Band, parts: list[Part]) -> NoReturn:
    side, reach = ("left", band.left) if band.left is not None and band.left < 0 else ("right", band.right)
    for n, part in enumerate(parts):
        rows = part.rows.group(0, 0)
        seen = rows.counts.nonzero()[:, 0]
        if seen.numel():
            row = int(seen[-1])
            case.refuse(
                f"{case.query(n, row)} does not see key {row + part.off}, where it stands: {side} {reach} keys, and a negative number is "
                f"no limit here; {_lists_or(case)}"
            )
    case.refuse(f"no query sees a key; {_lists_or(case)}")


def _window(
    case: Case,
    version: int,
    band: Band,
    args: dict[str, Any],
    q_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    *,
    cut: bool = False,
) -> FlashWindow:
    none = None if version == 4 else -1
    left, right = (none if end is None else end for end in (band.left, band.right))
    words: dict[str, Any] = {"causal": band.causal, "window_size": (left, right)}
    cu: dict[str, Any] = {}
    if case.packed or cut:
        cu = {
            "cu_seqlens_q": case.place(torch.tensor(ends_of(q_lens))),
            "cu_seqlens_k": case.place(torch.tensor(ends_of(kv_lens))),
        }
        args = args | cu | {"max_seqlen_q": max(q_lens), "max_seqlen_k": max(kv_lens)}
    return FlashWindow(
        version=version, **words, attention_chunk=args.get("attention_chunk", 0), **cu, args=args | words, **case.lens
    )
