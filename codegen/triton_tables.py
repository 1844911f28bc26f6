"""Gradients of learned tables that neither pass can sum on its way, as Triton source: along diagonals, or pair by pair."""

from __future__ import annotations

import functools

from sparsedsl.codegen.gradient_axes import LearnedRead
from sparsedsl.codegen.source import Source
from sparsedsl.codegen.triton_logits import predicate, weights_and_gradients
from sparsedsl.codegen.triton_parts import KernelSource, Variant
from sparsedsl.codegen.triton_sticks import add_scratch, load_scratch, write_triangle
from sparsedsl.codegen.triton_writer import Writer
from sparsedsl.lang.pattern import Pattern

__all__ = ["write_grad_difference", "write_grad_pairs"]


def write_grad_difference(source: Source, pattern: Pattern, variant: Variant, one: LearnedRead) -> KernelSource:
    """One program a band of diagonals of one head: the sums of all its tiles lie side by side, so no two programs meet."""
    writer = Writer(
        source,
        pattern,
        variant,
        one.name,
        f"Gradient of {one.read.spec.name} by q_idx - kv_idx: sums along the diagonals of one band.",
    )
    _arguments(writer, one)
    writer.add(("first_band", "i32"), ("bands", "i32"))
    writer.constants("BLOCK", "ALIGN", "PRECISION", *(("SUMS",) if writer.breaks else ()))
    with writer.define():
        source.line("band = tl.program_id(0) % bands")
        source.line("bh = tl.program_id(0) // bands")
        _heads(writer)
        source.line("j = tl.arange(0, BLOCK)")
        source.line(
            "# In tile (m, n) of band t = m - n, column (i - j) % BLOCK of line i lies on the diagonal j, or j - BLOCK, of the tile."
        )
        source.line("across = (j[:, None] - j[None, :] + BLOCK) % BLOCK")
        source.line("upper = tl.zeros([BLOCK], tl.float32)")
        source.line("lower = tl.zeros([BLOCK], tl.float32)")
        source.line("t = first_band + band")
        source.line("tiles = tl.minimum(tl.cdiv(rows, BLOCK), tl.cdiv(kv_len, BLOCK) + t)")
        with source.block("for m in range(tl.maximum(t, 0), tiles):"):
            source.line(f"row = {writer.number('BLOCK', 'm')} + j")
            source.line("column = m - t")
            source.line(f"kv_idx = {writer.number('BLOCK', 'column')} + j")
            _tile(writer, one)
            source.line(f"turned = tl.gather(d_{one.name}, across, 1)")
            source.line("right = j[:, None] >= j[None, :]")
            source.line("upper += tl.sum(tl.where(right, turned, 0.0), 0)")
            source.line("lower += tl.sum(tl.where(right, 0.0, turned), 0)")
        source.line("at = (bh.to(tl.int64) * bands + band) * 2 * BLOCK")
        source.line(f"tl.store({one.name}_ptr + at + j, lower)")
        source.line(f"tl.store({one.name}_ptr + at + BLOCK + j, upper)")
    return writer.result


def write_grad_pairs(source: Source, pattern: Pattern, variant: Variant, one: LearnedRead) -> KernelSource:
    """One program a tile of pairs, of the rows from ``row_begin`` on; what it finds is stored as it is and summed afterwards."""
    writer = Writer(source, pattern, variant, one.name, f"Gradient of {one.read.spec.name}, pair by pair, for some of the rows.")
    _arguments(writer, one)
    writer.add(("row_begin", "i32"), ("row_end", "i32"))
    writer.constants("BLOCK", "ALIGN", "PRECISION", *(("SUMS",) if writer.breaks else ()))
    with writer.define():
        source.line("tiles = tl.cdiv(kv_len, BLOCK)")
        source.line("tall = tl.cdiv(row_end - row_begin, BLOCK)")
        source.line("column = tl.program_id(0) % tiles")
        source.line("m = tl.program_id(0) // tiles % tall")
        source.line("bh = tl.program_id(0) // tiles // tall")
        _heads(writer)
        source.line("j = tl.arange(0, BLOCK)")
        source.line(f"row = row_begin + {writer.number('BLOCK', 'm')} + j")
        source.line(f"kv_idx = {writer.number('BLOCK', 'column')} + j")
        _tile(writer, one)
        source.line("at = (bh.to(tl.int64) * (row_end - row_begin) + row - row_begin)[:, None] * kv_len + kv_idx[None, :]")
        source.line(f"tl.store({one.name}_ptr + at, d_{one.name}, mask=(row[:, None] < row_end) & (kv_idx[None, :] < kv_len))")
    return writer.result


def _arguments(writer: Writer, one: LearnedRead) -> None:
    for name in ("q", "k", "v", "grad_out"):
        writer.tensor(name)
    writer.add(*((f"{name}_ptr", "*fp32") for name in (*writer.row_sums, one.name)))
    if writer.breaks:
        add_scratch(writer)
    writer.add(("heads", "i32"), ("group", "i32"), ("rows", "i32"), ("kv_len", "i32"), ("q_offset", "i32"), ("scale", "fp32"))
    writer.add_tables(*writer.pattern.exprs)


def _heads(writer: Writer) -> None:
    source = writer.source
    source.line("b = bh // heads")
    source.line("h = bh % heads")
    for name, head in (("q", "h"), ("k", "(h // group)"), ("v", "(h // group)"), ("grad_out", "h")):
        writer.head(name, head)
    writer.positions(*writer.pattern.exprs)
    writer.dims()
    if writer.row_sums:
        source.line("line = bh.to(tl.int64) * rows")


def _tile(writer: Writer, one: LearnedRead) -> None:
    """The gradients of the pairs of one tile, ``d_...``; 0 where a pair is masked."""
    source = writer.source
    source.line("q_idx = q_offset + row")
    source.line("inside = row < rows")
    source.line("exists = kv_idx < kv_len")
    writer.load("q", "q", writer.d_parts, "row", "inside")
    writer.load("grad_out", "grad", writer.v_parts, "row", "inside")
    writer.load("k", "k", writer.d_parts, "kv_idx", "exists")
    writer.load("v", "v", writer.v_parts, "kv_idx", "exists")
    for name in writer.row_sums:
        source.line(f"{name} = tl.load({name}_ptr + line + row, mask=inside, other=0.0)")
    if writer.breaks:
        for name in ("left", "earlier"):
            load_scratch(writer, name, "row", "inside")
        for later in (True, False):
            write_triangle(writer, "j", later=later)
    writer.dot("s", "q", "k", writer.d_parts)
    products = functools.partial(writer.dot, "dp", "grad", "v", writer.v_parts)
    weights_and_gradients(writer, predicate(writer, "tile"), "tile", "[:, None]", [one], products)
