"""xFormers: attention biases by class, for one sequence or for blocks of packed ones, keys perhaps padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsedsl.analysis.domain import check_size
from sparsedsl.errors import ShapeError
from sparsedsl.export.bands import Band, Lines, find_band, find_documents, lines_of
from sparsedsl.export.export_case import MAX_BYTES, Case, prepare
from sparsedsl.export.exported import Exported, check_dense, ends_of
from sparsedsl.export.logits import logit_args

__all__ = ["XformersBias", "bias_block", "xformers"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class XformersBias(Exported):
    """``bias``: the name of the class, None for no bias; ``bias_args``: what it is made with.

    Blocks have ``q_seqstart`` and ``k_seqstart`` int32 ``(blocks + 1,)``; with ``kv_padding`` every block's keys begin at a multiple of it
    and ``k_seqlen`` says how many there are. Keys of :meth:`to_mask` are then those of the padded tensor.

    >>> import sparsedsl as sd
    >>> sd.export.xformers(sd.patterns.causal(), lens=[(2, 3)], kv_padding=4).to_mask().int()[0, 0].tolist()
    [[1, 1, 0, 0], [1, 1, 1, 0]]
    """

    engine: ClassVar[str] = "xformers"
    read_at: ClassVar[str] = "xformers bed3978"

    bias: str | None
    bias_args: Mapping[str, Any]
    q_seqstart: torch.Tensor | None = None
    k_seqstart: torch.Tensor | None = None
    k_seqlen: torch.Tensor | None = None
    kv_padding: int | None = None

    def to_mask(self) -> torch.Tensor:
        """As :meth:`Exported.to_mask`."""
        if self.q_seqstart is None or self.k_seqstart is None:
            check_dense(self.q_lens[0] * self.kv_lens[0])
            return bias_block(self.bias, self.bias_args, self.q_lens[0], self.kv_lens[0])[None, None]
        q, kv = self.q_seqstart.tolist(), self.k_seqstart.tolist()
        check_dense(q[-1] * kv[-1])
        out = torch.zeros(q[-1], kv[-1], dtype=torch.bool)
        for n in range(len(q) - 1):
            keys = kv[n + 1] - kv[n] if self.k_seqlen is None else int(self.k_seqlen[n])
            out[q[n] : q[n + 1], kv[n] : kv[n] + keys] = bias_block(self.bias, self.bias_args, q[n + 1] - q[n], keys)
        return out[None, None]


# Class -> whether it counts from the top left; all others do from the bottom right.
_TOP_LEFT = {"LowerTriangularMask", "BlockDiagonalCausalMask", "BlockDiagonalCausalLocalAttentionMask"}
_FULL = {None, "BlockDiagonalMask", "BlockDiagonalPaddedKeysMask"}
_TWO_SIDED = {"LocalAttentionFromBottomRightMask", "BlockDiagonalLocalAttentionPaddedKeysMask"}
_WINDOWS = {
    "LowerTriangularFromBottomRightLocalAttentionMask", "BlockDiagonalCausalLocalAttentionMask",
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask", "BlockDiagonalCausalLocalAttentionPaddedKeysMask",
}  # fmt: skip
_CAUSAL = {
    "LowerTriangularMask", "LowerTriangularFromBottomRightMask", "BlockDiagonalCausalMask", "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask",
}  # fmt: skip


def bias_block(bias: str | None, args: Mapping[str, Any], q_len: int, kv_len: int) -> torch.Tensor:
    """What one block of a class shows, bool ``(q_len, kv_len)``.

    >>> bias_block("LowerTriangularMask", {}, 2, 4).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0]]
    >>> bias_block("LowerTriangularFromBottomRightMask", {}, 2, 4).int().tolist()
    [[1, 1, 1, 0], [1, 1, 1, 1]]
    """
    place = torch.arange(q_len)[:, None] + (0 if bias in _TOP_LEFT else kv_len - q_len)
    key = torch.arange(kv_len)
    if bias in _FULL:
        return torch.ones(q_len, kv_len, dtype=torch.bool)
    if bias in _TWO_SIDED:
        return (key >= place - args["window_left"]) & (key <= place + args["window_right"])
    if bias in _WINDOWS:
        return (key <= place) & (key > place - args["window_size"])
    if bias in _CAUSAL:
        return key <= place
    raise ShapeError(f"xformers: there is no bias {bias!r}")


def xformers(
    pattern: Any, q_len: int | None = None, kv_len: int | None = None, *, lens: Sequence[int | tuple[int, int]] | None = None,
    kv_padding: int | None = None, q_offset: int | None = None, batch: int = 1, heads: int | None = None, kv_heads: int | None = None,
    head: int | None = None, device: Any = None, max_bytes: int = MAX_BYTES, **tables: Any,
) -> XformersBias:  # fmt: skip
    """The bias that ``memory_efficient_attention`` takes: one band for all queries, heads and sequences.

    Args:
        pattern, q_len, kv_len, q_offset, batch, heads, kv_heads, device, max_bytes, tables: as :func:`cudnn`.
        lens: in place of lengths and batch: packed sequences, a number each or a pair (queries, keys). Each is a call of its own, the
            n-th with ``b = n``.
        kv_padding: the keys of every sequence are padded to so many.
        head: export the mask of this head alone.

    Returns:
        :class:`XformersBias`.

    Raises:
        UnsupportedError: no band, heads or batch entries that differ, an offset that does not end at the last key, any score, a sink.
        ShapeError, TableError: as :func:`sparsedsl.analyse`.

    No kernel of xFormers was run.

    >>> import sparsedsl as sd
    >>> e = sd.export.xformers(sd.patterns.sliding_window(8), lens=[(4, 9), (5, 5)])
    >>> e.bias, e.bias_args, e.k_seqstart.tolist()
    ('BlockDiagonalCausalLocalAttentionFromBottomRightMask', {'window_size': 8}, [0, 9, 14])
    """
    pairs = None if lens is None else [_pair(n, value) for n, value in enumerate(lens)]
    if kv_padding is not None:
        check_size("kv_padding", kv_padding, 1)
        if pairs is None or any(keys > kv_padding for _, keys in pairs):
            raise ShapeError(
                f"xformers: kv_padding={kv_padding} pads the keys of lens=, none of which may have more; got lens={lens!r}"
            )
    case = prepare(
        "xformers", "biases", pattern, q_len, kv_len, q_offset=q_offset, batch=batch, heads=heads, kv_heads=kv_heads,
        q_lens=None if pairs is None else [q for q, _ in pairs], kv_lens=None if pairs is None else [kv for _, kv in pairs], head=head,
        device=device, max_bytes=max_bytes, tables=tables,
    )  # fmt: skip
    args = logit_args(case, scale="scale")
    case.ends_at_the_last_key()
    band, q_lens, kv_lens = _band(case)
    blocks = case.packed or len(q_lens) > 1
    tensors: dict[str, Any] = {}
    if blocks:
        begins = [n * kv_padding for n in range(len(kv_lens) + 1)] if kv_padding else ends_of(kv_lens)
        tensors = {"q_seqstart": case.place(torch.tensor(ends_of(q_lens))), "k_seqstart": case.place(torch.tensor(begins))}
        if kv_padding:
            tensors |= {"k_seqlen": case.place(torch.tensor(kv_lens)), "kv_padding": kv_padding}
    square = all(part.off == 0 for part in case.parts)
    bias, bias_args = _class(case, band, blocks, square, kv_padding is not None)
    seqlens = {"q_seqlen": list(q_lens), "kv_seqlen": list(kv_lens)} if blocks else {}
    made = {"class": bias, **bias_args, **seqlens, **({"kv_padding": kv_padding} if kv_padding else {})}
    lens_held = case.lens if case.packed else {**case.lens, "q_lens": case.q_lens[:1], "kv_lens": case.kv_lens[:1]}
    return XformersBias(bias=bias, bias_args=bias_args, **tensors, args=args | {"attn_bias": made}, **lens_held)


def _pair(number: int, value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ShapeError(f"xformers: lens[{number}] must be a number of tokens or a pair (queries, keys); got {value!r}")
    return check_size(f"lens[{number}]", pair[0], 1), check_size(f"lens[{number}]", pair[1], 1)


def _band(case: Case) -> tuple[Band, tuple[int, ...], tuple[int, ...]]:
    """The band, and lengths of the blocks: sequences as given, or documents of the only one."""
    parts = [part.alone() for part in case.parts]
    lines: list[Lines] = []
    owners: list[int] = []
    for number, part in enumerate(parts):
        for entry in range(part.rows.shape[0]):
            rows = part.rows.group(entry, 0)
            found = lines_of(rows, part.off)
            if isinstance(found, int):
                keys = rows.at(found)
                case.refuse(
                    f"{case.query(number, found)} sees key {keys[0].stop - 1} and key {keys[1].start}, none between: no band; "
                    f"{case.holder()}"
                )
            lines.append(found)
            owners.append(number)
    band = find_band(lines)
    if isinstance(band, Band) and band.holds_own_key:
        return band, case.q_lens if case.packed else case.q_lens[:1], case.kv_lens if case.packed else case.kv_lens[:1]
    if not case.packed and case.batch == 1 and (documents := find_documents(lines[0], case.part.off)):
        return documents[0], tuple(documents[1]), tuple(documents[1])
    if isinstance(band, Band):
        last = case.q_lens[0] - 1
        case.refuse(f"{case.query(0, last)} does not see key {last + parts[0].off}, where it stands ({band}); {case.holder()}")
    case.refuse(f"{case.query(owners[band.sequence], band.query)} {band}; {case.holder()}")


def _class(case: Case, band: Band, blocks: bool, square: bool, padded: bool) -> tuple[str | None, dict[str, int]]:
    """The class that is this band for one sequence, for blocks or for padded ones, and its own arguments."""
    if band == Band(None, None):
        return ("BlockDiagonalPaddedKeysMask" if padded else "BlockDiagonalMask" if blocks else None), {}
    if band == Band(None, 0):
        if padded:
            return "BlockDiagonalCausalWithOffsetPaddedKeysMask", {}
        name = "BlockDiagonalCausal" if blocks else "LowerTriangular"
        return f"{name}{'' if square else 'FromBottomRight'}Mask", {}
    if band.right == 0 and band.left is not None:
        name = "LowerTriangularFromBottomRightLocalAttentionMask"
        if blocks:
            name = f"BlockDiagonalCausalLocalAttention{'PaddedKeys' if padded else '' if square else 'FromBottomRight'}Mask"
        return name, {"window_size": band.left + 1}
    if blocks and not padded:
        case.refuse(
            f"blocks have no window with keys behind the query (right {band.right}); with kv_padding= they have; {case.holder()}"
        )
    far = max(case.kv_lens)
    sides = {name: far if end is None else end for name, end in (("window_left", band.left), ("window_right", band.right))}
    return ("BlockDiagonalLocalAttentionPaddedKeysMask" if padded else "LocalAttentionFromBottomRightMask"), sides
