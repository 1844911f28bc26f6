"""The forward pass as Triton source: a kernel for many queries, one that splits the keys for few (decode), and the merge of splits."""

from __future__ import annotations

import functools

from sparsedsl.codegen.source import Source
from sparsedsl.codegen.triton_expression import write_expression
from sparsedsl.codegen.triton_logits import level_of, number_of, write_factor, write_logits, write_ramp
from sparsedsl.codegen.triton_loops import Loop
from sparsedsl.codegen.triton_parts import KernelSource, Variant, suffixed
from sparsedsl.codegen.triton_sticks import begin_down, down, write_break, write_triangle
from sparsedsl.codegen.triton_writer import Writer
from sparsedsl.lang.normalisers import POINTWISE, STICK_BREAKING
from sparsedsl.lang.pattern import Pattern

__all__ = ["write_decode", "write_forward", "write_merge"]


def write_forward(source: Source, pattern: Pattern, variant: Variant) -> KernelSource:
    """One program a tile of queries of one head."""
    writer = Writer(source, pattern, variant, "forward", "out and LSE of one tile of queries.")
    _arguments(writer, "bh")
    writer.add(("heads", "i32"), ("group", "i32"), ("rows", "i32"), ("kv_len", "i32"), ("q_offset", "i32"), ("scale", "fp32"))
    loop = writer.key_loop()
    _rest(writer, loop, "BLOCK_M", "BLOCK_N", "ALIGN", "PRECISION", "HEAVY_FIRST")
    with writer.define():
        writer.programs("rows", "BLOCK_M")
        source.line("b = bh // heads")
        source.line("h = bh % heads")
        source.line("line = bh.to(tl.int64) * rows")
        for name in ("q", "out"):
            writer.head(name, "h")
        writer.column_heads("h")
        writer.residue(("q", "out"), ("k", "v"))
        source.line(f"row = {writer.number('BLOCK_M', 'tile')} + tl.arange(0, BLOCK_M)")
        source.line("inside = row < rows")
        # Rows beyond the last repeat it, so that they add nothing to the keys that the tile needs.
        source.line("q_idx = q_offset + tl.minimum(row, rows - 1)")
        writer.positions(*pattern.exprs)
        writer.dims()
        writer.load("q", "q", writer.d_parts, "row", "inside")
        _begin(writer, loop)
        _loops(writer, loop, split=False)
        _end(writer)
        writer.store("out", "out", writer.v_parts, "row", "inside")
        source.line(f"tl.store(lse_ptr + line + {writer.place()}, lse, mask=inside)")
    return writer.result


def write_decode(source: Source, pattern: Pattern, variant: Variant) -> KernelSource:
    """One program a share of the keys, for the queries of all heads that read the same keys."""
    writer = Writer(
        source,
        pattern,
        variant,
        "decode",
        "out and LSE of few queries over one share of the keys; heads lie side by side in a tile.",
        True,
    )
    _arguments(writer, "sbh")
    writer.add(("heads", "i32"), ("group", "i32"), ("pack", "i32"), ("splits", "i32"), ("rows", "i32"), ("kv_len", "i32"))
    writer.add(("q_offset", "i32"), ("scale", "fp32"))
    loop = writer.key_loop()
    _rest(writer, loop, "BLOCK_M", "BLOCK_N", "ALIGN", "PRECISION")
    with writer.define():
        source.line("packed_rows = rows * pack")
        source.line("tiles = tl.cdiv(packed_rows, BLOCK_M)")
        source.line("share = tl.program_id(0) % splits")
        source.line("tile = tl.program_id(0) // splits % tiles")
        source.line("bundle = tl.program_id(0) // splits // tiles")
        source.line("b = bundle // (heads // pack)")
        source.line("head = bundle % (heads // pack) * pack")
        writer.column_heads("head")
        source.line("# Row and head of each line of the tile; lines beyond the last repeat it.")
        source.line("place = tile * BLOCK_M + tl.arange(0, BLOCK_M)")
        source.line("inside = place < packed_rows")
        source.line("place = tl.minimum(place, packed_rows - 1)")
        source.line("row = place // pack")
        source.line("h = head + place % pack")
        source.line("q_idx = q_offset + row" + (".to(tl.int64)" if variant.wide else ""))
        writer.positions(*pattern.exprs)
        writer.dims()
        source.line("at = b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h + row.to(tl.int64) * q_stride_row")
        source.line("q_at = q_ptr + (at // ALIGN * ALIGN)[:, None]")
        for part in writer.d_parts:
            source.line(f"{suffixed('q', part)} = tl.load(q_at + {part.name}[None, :]{writer.mask(part, 'inside')})")
        _begin(writer, loop)
        _loops(writer, loop, split=True)
        _end(writer)
        source.line("to = b.to(tl.int64) * out_stride_b + h.to(tl.int64) * out_stride_h + row.to(tl.int64) * out_stride_row")
        source.line("to += share.to(tl.int64) * out_stride_s")
        for part in writer.v_parts:
            source.line(
                f"tl.store(out_ptr + to[:, None] + {part.name}[None, :], {suffixed('out', part)}.to(out_ptr.dtype.element_ty)"
                f"{writer.mask(part, 'inside', other=False)})"
            )
        source.line("batch = tl.num_programs(0) // splits // tiles // (heads // pack)")
        source.line("line = ((share * batch + b) * heads + h).to(tl.int64) * rows + row")
        source.line("tl.store(lse_ptr + line, lse, mask=inside)")
    return writer.result


def _arguments(writer: Writer, out_dims: str) -> None:
    writer.tensor("q")
    for name in "kv":
        writer.columns_of(name)
    if writer.variant.placed:
        writer.add(("kv_rows_ptr", "*i32"))
    writer.tensor("out", "*fp32" if out_dims == "sbh" else "*data", out_dims)
    writer.add(("lse_ptr", "*fp32"))


def _rest(writer: Writer, loop: Loop, *constants: str) -> None:
    writer.add_tables(*writer.pattern.exprs)
    writer.add(*loop.arguments())
    writer.constants(*constants, *(("SUMS",) if writer.breaks else ()))


def _begin(writer: Writer, loop: Loop) -> None:
    source = writer.source
    loop.prepare(source, writer.names("queries"))
    if writer.pointwise:
        source.line("# Weighted values so far.")
    elif writer.breaks:
        begin_down(writer)
    else:
        _begin_softmax(writer)
    for part in writer.v_parts:
        source.line(f"{suffixed('acc', part)} = tl.zeros([BLOCK_M, {part.width}], tl.float32)")
    writer.column_tiles()
    if writer.breaks:
        write_triangle(writer, "column_0", later=True)
    if writer.ramp is not None:
        source.line(
            "# Logits rise evenly along keys: to each product a step by its place in the tile, and one number for all pairs."
        )
        source.line(f"ref = q_offset + tl.minimum({writer.number('BLOCK_M', 'tile')} + BLOCK_M - 1, rows - 1)")
        write_ramp(writer, "ramp", "column_0", writer.ramp.by_key)


def _begin_softmax(writer: Writer) -> None:
    source = writer.source
    source.line("# The softmax so far: largest logit, sum and weighted values. `most` stays finite, so no row needs a check.")
    write_factor(writer)
    if writer.plain:
        source.line("most = tl.full([BLOCK_M], LOWEST, tl.float32) / tl.maximum(factor, 1.0)")
    elif writer.picks:
        source.line("most = tl.zeros([BLOCK_M], tl.float32)")
    else:
        source.line(f"most = tl.full([BLOCK_M], LOWEST{' / LOG2E' if writer.in_log2 else ''}, tl.float32)")
    source.line("total = tl.zeros([BLOCK_M], tl.float32)")


def _loops(writer: Writer, loop: Loop, *, split: bool) -> None:
    source = writer.source
    if writer.breaks:
        down(writer, loop, split, functools.partial(_step, writer, loop, "partial"))
        return
    for kind in ("full", "partial"):
        source.line("# Tiles without a condition." if kind == "full" else "# Tiles that the mask or the end of the keys cuts.")
        where = f"{kind}_tiles * share // splits, {kind}_tiles * (share + 1) // splits" if split else f"0, {kind}_tiles"
        with source.block(f"for i in range({where}):"):
            loop.tile(source, kind, "i")
            _step(writer, loop, kind)


def _step(writer: Writer, loop: Loop, kind: str) -> None:
    source = writer.source
    writer.begin_columns(kind)
    writer.load_column_tile("k", kind)
    writer.dot("s", "q", "k", writer.d_parts)
    condition = loop.condition(source, writer.names("tile")) if kind == "partial" else ""
    write_logits(writer, "tile", condition)
    if writer.breaks:
        write_break(writer, "[:, None]")
        source.line("left += tl.sum(passed, 1)")
    if writer.pointwise or writer.breaks:
        writer.load_column_tile("v", kind)
        for part in writer.v_parts:
            acc, v = suffixed("acc", part), suffixed("v", part)
            source.line(f"{acc} = tl.dot({'p' if writer.breaks else 'x'}.to({v}.dtype), {v}, {acc}, input_precision=PRECISION)")
        return
    if writer.ramp is not None:
        source.line(f"level = {level_of(writer, 'ref', 'start')}")
        source.line("larger = tl.maximum(most, tl.max(x, 1) + level)")
        source.line("shrink = tl.exp2(most - larger)")
        source.line("p = tl.exp2(x - (larger - level)[:, None])")
    else:
        logit, factor = ("s", "factor") if writer.plain else ("x", "LOG2E")
        source.line(f"larger = tl.maximum(most, tl.max({logit}, 1))")
        source.line(f"shrink = tl.exp2((most - larger) * {factor})")
        if writer.plain or writer.in_log2:
            source.line(f"p = tl.exp2({logit} * {factor} - (larger * {factor})[:, None])")
        else:
            source.line("p = tl.exp2((x - larger[:, None]) * LOG2E)")
    if writer.picks:
        source.line('p = tl.where(x == float("-inf"), 0.0, p - tl.exp2(larger * -LOG2E)[:, None])')
        source.line("total = total * shrink + tl.sum(tl.abs(p), 1)")
        source.line("p = tl.maximum(p, 0.0)")
    else:
        source.line("total = total * shrink + tl.sum(p, 1)")
    writer.load_column_tile("v", kind)
    for part in writer.v_parts:
        acc, v = suffixed("acc", part), suffixed("v", part)
        source.line(f"{acc} = tl.dot(p.to({v}.dtype), {v}, {acc} * shrink[:, None], input_precision=PRECISION)")
    source.line("most = larger")


def _end(writer: Writer) -> None:
    source, sink = writer.source, writer.pattern.sink
    if writer.pointwise or writer.breaks:
        source.line("lse = left / LOG2E" if writer.breaks else "lse = tl.zeros([BLOCK_M], tl.float32)")
        for part in writer.v_parts:
            source.line(f"{suffixed('out', part)} = {suffixed('acc', part)}")
        return
    if writer.plain:
        source.line("most = most * scale")
    if writer.ramp is not None:
        source.line("# What all keys of a query have in common: its distance to the query that the tile counted from.")
        source.line(f"most = most / LOG2E + (q_idx - ref).to(tl.float32) * ({number_of(writer, writer.ramp.by_query)})")
    if sink is not None:
        source.line("# The sink: one more logit, whose value is zero.")
        text = write_expression(source, sink.expr, writer.names("queries"), real="tl.float32")
        source.line(f"sink = tl.zeros_like(total) + ({text})")
        if writer.name == "decode":
            source.line('sink = tl.where(share == 0, sink, float("-inf"))')
        source.line("larger = tl.maximum(most, sink)")
        source.line("shrink = tl.exp2((most - larger) * LOG2E)")
        source.line("total = total * shrink + tl.exp2((sink - larger) * LOG2E)")
        for part in writer.v_parts:
            source.line(f"{suffixed('acc', part)} = {suffixed('acc', part)} * shrink[:, None]")
        source.line("most = larger")
    if writer.variant.safe_rows and writer.name == "forward":
        source.line("lse = most + tl.log(total)")
    else:
        source.line("# A row that saw nothing: out 0, LSE -inf.")
        source.line("seen = total > 0")
        source.line("total = tl.where(seen, total, 1.0)")
        source.line('lse = tl.where(seen, most + tl.log(total), float("-inf"))')
    for part in writer.v_parts:
        source.line(f"{suffixed('out', part)} = {suffixed('acc', part)} / total[:, None]")


def write_merge(source: Source, pattern: Pattern, variant: Variant) -> KernelSource:
    """The splits of decode, weighted by their LSE, or added up where there is none; of a stick, from its last."""
    purpose = {
        POINTWISE: "The sum of the shares of the keys.",
        STICK_BREAKING: "The shares of the keys from the last to the first, each of what later ones leave.",
    }.get(pattern.normaliser, "One softmax out of the shares of the keys, weighted by their LSE.")
    added = pattern.normaliser in (POINTWISE, STICK_BREAKING)
    writer = Writer(source, pattern, variant, "merge", purpose)
    writer.add(("share_ptr", "*fp32"), ("share_lse_ptr", "*fp32"), ("out_ptr", "*data"), ("lse_ptr", "*fp32"))
    writer.add(("splits", "i32"), ("lines", "i32"))
    writer.constants("BLOCK_M")
    width = variant.head_dim_v
    with writer.define():
        source.line("line = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)")
        source.line("inside = line < lines")
        writer.dims(of_k=False)
        if not added:
            source.line("most = tl.full([BLOCK_M], LOWEST, tl.float32)")
            source.line("total = tl.zeros([BLOCK_M], tl.float32)")
        for part in writer.v_parts:
            source.line(f"{suffixed('acc', part)} = tl.zeros([BLOCK_M, {part.width}], tl.float32)")
        if added:
            _add_shares(writer)
            return writer.result
        with source.block("for share in range(0, splits):"):
            source.line("at = line + tl.cast(share, tl.int64) * lines")
            source.line('lse = tl.load(share_lse_ptr + at, mask=inside, other=float("-inf"))')
            source.line("larger = tl.maximum(most, lse)")
            source.line("shrink = tl.exp2((most - larger) * LOG2E)")
            source.line("weight = tl.exp2((lse - larger) * LOG2E)")
            source.line("total = total * shrink + weight")
            for part in writer.v_parts:
                where = f"share_ptr + at[:, None] * {width} + {part.name}[None, :]"
                source.line(f"{suffixed('o', part)} = tl.load({where}{writer.mask(part, 'inside')})")
                acc = suffixed("acc", part)
                source.line(f"{acc} = {acc} * shrink[:, None] + {suffixed('o', part)} * weight[:, None]")
            source.line("most = larger")
        source.line("seen = total > 0")
        source.line("total = tl.where(seen, total, 1.0)")
        source.line('lse = tl.where(seen, most + tl.log(total), float("-inf"))')
        source.line("tl.store(lse_ptr + line, lse, mask=inside)")
        _store_merged(writer, " / total[:, None]")
    return writer.result


def _add_shares(writer: Writer) -> None:
    source, width = writer.source, writer.variant.head_dim_v
    source.line("lse = tl.zeros([BLOCK_M], tl.float32)")
    with source.block("for share in range(0, splits):"):
        number = "splits - 1 - share" if writer.breaks else "share"
        source.line(f"at = line + tl.cast({number}, tl.int64) * lines")
        if writer.breaks:
            source.line("weight = tl.exp2(lse * LOG2E)")
        for part in writer.v_parts:
            where, acc = f"share_ptr + at[:, None] * {width} + {part.name}[None, :]", suffixed("acc", part)
            times = "weight[:, None] * " if writer.breaks else ""
            source.line(f"{acc} += {times}tl.load({where}{writer.mask(part, 'inside')})")
        if writer.breaks:
            source.line("lse += tl.load(share_lse_ptr + at, mask=inside, other=0.0)")
    source.line("tl.store(lse_ptr + line, lse, mask=inside)")
    _store_merged(writer, "")


def _store_merged(writer: Writer, divided: str) -> None:
    for part in writer.v_parts:
        where = f"out_ptr + line[:, None] * {writer.variant.head_dim_v} + {part.name}[None, :]"
        value = f"({suffixed('acc', part)}{divided}).to(out_ptr.dtype.element_ty)"
        writer.source.line(f"tl.store({where}, {value}{writer.mask(part, 'inside', other=False)})")
