"""A pattern -> Python source for torch FlexAttention: ``mask_mod``, ``score_mod``, and the function that is compiled around them.

Nothing that varies from call to call is a Python number in the source: offset and lengths are 0-d tensors and tables are arguments,
so one compile serves all lengths. Input: a :class:`~sparsedsl.lang.pattern.Pattern`. Output: a :class:`FlexSource`.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from sparsedsl.codegen.expression import Names, write_expression
from sparsedsl.codegen.source import Source
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import INDEX_SYMBOLS, KV_LEN, Q_IDX, Q_LEN, SCORE
from sparsedsl.lang.tables import table_reads

__all__ = ["FlexSource", "flex_functions", "flex_kernel", "table_extents"]

_TAKEN = {
    *INDEX_SYMBOLS, "score", "q_pos", "q_end", "kv_end", "q_offset", "sink_at",
    "logit", "torch", "inf", "min", "mods", "mask_mod", "score_mod",
}  # fmt: skip

# What the lengths are called inside the functions that users are given.
_LENGTHS = {"q_len": "q_end", "kv_len": "kv_end"}

# The lists come flat and compact. FlexAttention wants index tensors as wide as a whole row of tiles, though it reads only the first
# `counts` entries of each row: a strided view is as wide and needs no storage for the rest.
_KERNEL = '''
def wide(flat, counts, width):
    """Flat tile lists as (batch, heads, rows, width): rows lie as close as they are stored, and look as wide as they must."""
    batch, heads, rows = counts.shape
    step = flat.shape[0] // (batch * heads * rows)
    return flat.as_strided((batch, heads, rows, width), (heads * rows * step, rows * step, step, 1))


def attention(q, k, v, lists, *values):
    """q (B, Hq, Sq, D), k (B, Hkv, Skv, D), v (B, Hkv, Skv, Dv) -> out (B, Hq, Sq, Dv)."""
    mask_mod, score_mod = mods(*values)
    counts, columns, full_counts, full_columns = lists[:4]
    tiles = (k.shape[2] + BLOCK[1] - 1) // BLOCK[1]
    by_query = counts, wide(columns, counts, tiles), full_counts, wide(full_columns, full_counts, tiles)
    by_key = (None, None, None, None)
    BY_KEY
    block_mask = BlockMask((q.shape[2], k.shape[2]), *by_query, *by_key, BLOCK_SIZE=BLOCK, mask_mod=mask_mod)
    return flex_attention(
        q, k, v, score_mod=score_mod, block_mask=block_mask, scale=SCALE, enable_gqa=True, return_aux=AUX
    )
'''
_BY_KEY = """
    key_counts, rows, full_key_counts, full_rows = lists[4:]
    tiles = counts.shape[2]
    by_key = key_counts, wide(rows, key_counts, tiles), full_key_counts, wide(full_rows, full_key_counts, tiles)
"""


@dataclass(frozen=True)
class FlexSource:
    """Generated text that defines ``mods(*values) -> (mask_mod, score_mod)``, and ``attention`` if it is a kernel.

    ``values`` names the arguments of ``mods`` in order: ``q_offset``, ``q_len``, ``kv_len``, with a sink key ``sink_at``, then the
    tables. ``extents``: see :func:`table_extents`; empty where every table index is clamped.
    """

    text: str
    values: tuple[str, ...]
    extents: dict[str, tuple[frozenset[str | int], ...]]


def flex_functions(pattern: Pattern) -> FlexSource:
    """The mask and the score as plain functions for any use of FlexAttention; the sink is no part of them.

    >>> import sparsedsl as sd
    >>> pattern = sd.attend((sd.kv_idx <= sd.q_idx) & (sd.q_idx - sd.kv_idx < 512), score=sd.tanh(sd.score / 30) * 30)
    >>> for line in flex_functions(pattern).text.splitlines()[-8:-2]:
    ...     print(line.removeprefix("    "))
    def mask_mod(b, h, q_idx, kv_idx):
        q_pos = q_idx + q_offset
        return (q_pos >= kv_idx) & (q_pos - kv_idx <= 511)
    <BLANKLINE>
    def score_mod(score, b, h, q_idx, kv_idx):
        return 30*torch.tanh(score / 30)
    """
    return _write(pattern, clamp=True, sink_key=False, kernel="")


def flex_kernel(pattern: Pattern, *, sink_key: bool = False, backward: bool = False) -> FlexSource:
    """The functions and the ``attention`` to compile around them.

    ``sink_key``: the pattern's sink is the logit of one more key, at position ``sink_at``; keys from ``kv_len`` on are padding.
    ``backward``: ``attention`` is also given the tiles listed by key, which gradients need.
    """
    kernel = _KERNEL.replace("    BY_KEY\n", _BY_KEY.lstrip("\n") if backward else "")
    return _write(pattern, clamp=False, sink_key=sink_key and pattern.sink is not None, kernel=kernel)


def table_extents(pattern: Pattern) -> dict[str, tuple[frozenset[str | int], ...]]:
    """For each table and dimension, what indexes it directly: names of symbols, whose range it must cover, and sizes it must have.

    >>> import sparsedsl as sd
    >>> doc = sd.table("doc")
    >>> table_extents(sd.attend(doc[sd.q_idx // 2] == doc[sd.kv_idx]))
    {'doc': (frozenset({'kv_idx'}),)}
    """
    found: dict[str, list[set[str | int]]] = {}
    for expr in pattern.exprs:
        for read in table_reads(expr):
            dims = found.setdefault(read.spec.name, [set() for _ in read.args])
            for dim, index in zip(dims, read.args, strict=True):
                if index.is_Symbol:
                    dim.add(index.name)
                elif index.is_Integer:
                    dim.add(max(int(index), 0) + 1)
    return {name: tuple(frozenset(dim) for dim in dims) for name, dims in sorted(found.items())}


def _write(pattern: Pattern, *, clamp: bool, sink_key: bool, kernel: str) -> FlexSource:
    source = Source(_TAKEN)
    tables = {name: source.fresh(name) for name in pattern.tables}
    symbols = {name: name for name in INDEX_SYMBOLS} | {"score": "score", "q_idx": "q_pos"}
    if not kernel:
        symbols |= _LENGTHS
    names = Names(symbols, tables, clamp)
    values = ("q_offset", "q_len", "kv_len", *(("sink_at",) if sink_key else ()), *tables)
    source.line('"""FlexAttention functions, generated by sparsedsl from')
    source.line()
    source.lines(pattern.text.replace("\\", "\\\\"))
    source.line('"""')
    source.line()
    source.line("import torch")
    if kernel:
        source.line("from torch.nn.attention.flex_attention import BlockMask, flex_attention")
    source.line()
    source.line('inf = float("inf")')
    for _ in range(2):
        source.line()
    arguments = ["q_offset", "q_len", "kv_len", *(("sink_at",) if sink_key else ()), *tables.values()]
    with source.block(f"def mods({', '.join(arguments)}):"):
        source.line(
            '"""What varies from call to call -> (mask_mod, score_mod); q_idx counts from the first query of the call."""'
        )
        source.line()
        with source.block("def mask_mod(b, h, q_idx, kv_idx):"):
            _write_mask(source, pattern, names)
        source.line()
        if pattern.has_score or sink_key:
            with source.block("def score_mod(score, b, h, q_idx, kv_idx):"):
                _write_score(source, pattern, names, sink_key)
            source.line()
        source.line(f"return mask_mod, {'score_mod' if pattern.has_score or sink_key else 'None'}")
    if kernel:
        source.line()
        source.line()
        source.lines(kernel)
    return FlexSource(source.text, values, {} if clamp else table_extents(pattern))


def _write_position(source: Source, expr: sympy.Basic, names: Names) -> None:
    if Q_IDX in expr.free_symbols:
        source.line("q_pos = q_idx + q_offset")
    for symbol in (Q_LEN, KV_LEN):
        if symbol in expr.free_symbols and names.symbols[symbol.name] != symbol.name:
            # A user's length is a Python number, which torch.minimum and its like refuse.
            source.line(f"{names.symbols[symbol.name]} = torch.full_like(kv_idx, {symbol.name})")


def _write_mask(source: Source, pattern: Pattern, names: Names) -> None:
    expr = pattern.mask.expr
    if expr in (sympy.true, sympy.false):
        # FlexAttention wants a tensor, also from a mask that is the same everywhere.
        source.line(f"return kv_idx {'>=' if expr == sympy.true else '<'} 0")
        return
    _write_position(source, expr, names)
    source.line(f"return {write_expression(source, expr, names, real='torch.float64')}")


def _write_score(source: Source, pattern: Pattern, names: Names, sink_key: bool) -> None:
    expr = pattern.score.expr
    sink = pattern.sink.expr if sink_key and pattern.sink is not None else sympy.S.Zero
    _write_position(source, expr, names)
    body = write_expression(source, expr, names)
    if SCORE not in expr.free_symbols:
        body = f"torch.zeros_like(score) + ({body})"
    if not sink_key:
        source.line(f"return {body}")
        return
    source.line(f"logit = {body}")
    sink_logit = write_expression(source, sink, names)
    source.line(f"return torch.where(kv_idx < kv_len, logit, torch.where(kv_idx == sink_at, {sink_logit}, -inf))")


def needs_lengths(pattern: Pattern) -> tuple[bool, bool]:
    """Whether the mask or the score reads ``q_len``, and ``kv_len``."""
    free = pattern.mask.expr.free_symbols | pattern.score.expr.free_symbols
    return Q_LEN in free, KV_LEN in free
