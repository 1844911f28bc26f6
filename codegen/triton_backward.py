"""The backward pass as Triton source: row sums first, then gradients of q tile by tile of queries, of k and v tile by tile of keys.

Nothing is added up by atomics: every sum belongs to one program, so the same inputs give the same bits.
"""

from __future__ import annotations

import functools

from sparsedsl.codegen.gradient_axes import LearnedRead, rolled_reads
from sparsedsl.codegen.source import Source
from sparsedsl.codegen.triton_logits import gradients_of, write_factor, write_logits, write_ramp
from sparsedsl.codegen.triton_loops import Loop
from sparsedsl.codegen.triton_parts import KernelSource, Variant, suffixed
from sparsedsl.codegen.triton_sticks import (
    add_scratch,
    begin_down,
    down,
    load_scratch,
    store_scratch,
    up,
    write_passed,
    write_triangle,
)
from sparsedsl.codegen.triton_writer import Writer
from sparsedsl.lang.pattern import Pattern
from sparsedsl.lang.symbols import HEAD

__all__ = ["write_delta", "write_grad_kv", "write_grad_q", "write_left"]


def write_delta(source: Source, pattern: Pattern, variant: Variant) -> KernelSource:
    """What both passes need of every row."""
    writer = Writer(
        source,
        pattern,
        variant,
        "delta",
        "Of each query: sum of out * grad_out less the gradient of the LSE; the LSE as exponent.",
    )
    writer.tensor("out")
    writer.tensor("grad_out")
    writer.add(("lse_ptr", "*fp32"), ("grad_lse_ptr", "*fp32"), ("delta_ptr", "*fp32"), ("base_ptr", "*fp32"))
    writer.add(("heads", "i32"), ("rows", "i32"))
    writer.constants("BLOCK_M", "ALIGN", "HAS_GRAD_LSE")
    with writer.define():
        source.line("tiles = tl.cdiv(rows, BLOCK_M)")
        source.line("tile = tl.program_id(0) % tiles")
        source.line("bh = tl.program_id(0) // tiles")
        source.line("b = bh // heads")
        source.line("h = bh % heads")
        writer.head("out", "h")
        writer.head("grad_out", "h")
        source.line(f"row = {writer.number('BLOCK_M', 'tile')} + tl.arange(0, BLOCK_M)")
        source.line("inside = row < rows")
        writer.dims(of_k=False)
        source.line("delta = tl.zeros([BLOCK_M], tl.float32)")
        writer.load("out", "out", writer.v_parts, "row", "inside")
        writer.load("grad_out", "grad", writer.v_parts, "row", "inside")
        for part in writer.v_parts:
            out, grad = suffixed("out", part), suffixed("grad", part)
            source.line(f"delta += tl.sum({out}.to(tl.float32) * {grad}.to(tl.float32), 1)")
        source.line("at = bh.to(tl.int64) * rows + row")
        with source.block("if HAS_GRAD_LSE:"):
            source.line("delta -= tl.load(grad_lse_ptr + at, mask=inside, other=0.0)")
        source.line("lse = tl.load(lse_ptr + at, mask=inside, other=0.0)")
        source.line("# A row that saw nothing has only masked pairs: any finite number makes them 0.")
        source.line(f'base = tl.where(lse == float("-inf"), 0.0, lse){" * LOG2E" if writer.in_log2 else ""}')
        source.line("tl.store(delta_ptr + at, delta, mask=inside)")
        source.line("tl.store(base_ptr + at, base, mask=inside)")
    return writer.result


def write_grad_q(source: Source, pattern: Pattern, variant: Variant) -> KernelSource:
    """One program a tile of queries of one head; it visits the same keys as the forward pass."""
    writer = Writer(source, pattern, variant, "grad_q", "Gradient of one tile of queries.")
    for name in ("q", "grad_out", "grad_q"):
        writer.tensor(name)
    for name in "kv":
        writer.columns_of(name)
    writer.add(*((f"{name}_ptr", "*fp32") for name in writer.row_sums))
    if writer.breaks:
        add_scratch(writer)
    learned = [one for one in rolled_reads(pattern) if one.axis == "rows"]
    writer.add(*((f"{one.name}_ptr", "*fp32") for one in learned))
    writer.add(("heads", "i32"), ("group", "i32"), ("rows", "i32"), ("kv_len", "i32"), ("q_offset", "i32"), ("scale", "fp32"))
    writer.add_tables(*pattern.exprs)
    loop = writer.key_loop()
    writer.add(*loop.arguments())
    _constants(writer)
    with writer.define():
        writer.programs("rows", "BLOCK_M", _first(writer))
        source.line("b = bh // heads")
        source.line("h = bh % heads")
        if writer.row_sums or learned:
            source.line("line = bh.to(tl.int64) * rows")
        for name in ("q", "grad_out", "grad_q"):
            writer.head(name, "h")
        writer.column_heads("h")
        writer.residue(("q", "grad_out", "grad_q"), ("k", "v"))
        source.line(f"row = {writer.number('BLOCK_M', 'tile')} + tl.arange(0, BLOCK_M)")
        source.line("inside = row < rows")
        source.line("q_idx = q_offset + tl.minimum(row, rows - 1)")
        writer.positions(*pattern.exprs)
        writer.dims()
        writer.load("q", "q", writer.d_parts, "row", "inside")
        writer.load("grad_out", "grad", writer.v_parts, "row", "inside")
        if writer.row_sums or learned:
            source.line(f"at = line + {writer.place()}")
        for name in writer.row_sums:
            source.line(f"{name} = tl.load({name}_ptr + at, mask=inside, other=0.0)")
        loop.prepare(source, writer.names("queries"))
        write_factor(writer)
        for part in writer.d_parts:
            source.line(f"{suffixed('grad_q', part)} = tl.zeros([BLOCK_M, {part.width}], tl.float32)")
        _begin_sums(writer, learned, "BLOCK_M")
        writer.column_tiles()
        if writer.ramp is not None:
            write_ramp(writer, "ramp", "column_0", writer.ramp.by_key)
        if writer.breaks:
            for later in (True, False):
                write_triangle(writer, "column_0", later=later)
            source.line("earlier = tl.zeros([BLOCK_M], tl.float32)")
            up(writer, loop, functools.partial(_query_gradients, writer, loop, "partial", learned))
        for kind in () if writer.breaks else ("full", "partial"):
            with source.block(f"for i in range(0, {kind}_tiles):"):
                loop.tile(source, kind, "i")
                _query_gradients(writer, loop, kind, learned)
        for part in writer.d_parts:
            source.line(f"{suffixed('grad_q', part)} *= scale")
        writer.store("grad_q", "grad_q", writer.d_parts, "row", "inside")
        _store_sums(writer, learned, "at")
    return writer.result


def _begin_sums(writer: Writer, learned: list[LearnedRead], block: str) -> None:
    """Gradients of reads of learned tables: a number for each row of the tile and, where there are some, each unit of a sum."""
    for one in learned:
        if one.units is None:
            writer.source.line(f"{one.name} = tl.zeros([{block}], tl.float32)")
    running = [one for one in learned if one.units]
    if running:
        writer.source.line(f"units = {running[0].first} + tl.arange(0, {running[0].width})")
    for one in running:
        writer.source.line(f"{one.name} = tl.zeros([{block}, {one.width}], tl.float32)")


def _store_sums(writer: Writer, learned: list[LearnedRead], at: str) -> None:
    for one in learned:
        if one.units is None:
            writer.source.line(f"tl.store({one.name}_ptr + {at}, {one.name}, mask=inside)")
        else:
            place = f"({at})[:, None] * {one.width} + tl.arange(0, {one.width})[None, :]"
            writer.source.line(f"tl.store({one.name}_ptr + {place}, {one.name}, mask=inside[:, None])")


def _constants(writer: Writer) -> None:
    writer.constants("BLOCK_M", "BLOCK_N", "ALIGN", "PRECISION", "HEAVY_FIRST", *(("SUMS",) if writer.breaks else ()))


def _first(writer: Writer) -> str:
    """What the number of a program's heads begins with: sticks are worked on some heads at a time."""
    return "first_line + " if writer.breaks else ""


def _query_gradients(writer: Writer, loop: Loop, kind: str, learned: list[LearnedRead]) -> None:
    """What one tile of keys adds to the gradients of the queries."""
    source = writer.source
    writer.begin_columns(kind)
    writer.load_column_tile("k", kind)
    writer.load_column_tile("v", kind)
    if writer.breaks:
        load_scratch(writer, "left", "row", "inside")
        store_scratch(writer, "earlier")
    writer.dot("s", "q", "k", writer.d_parts)
    gradients_of(writer, loop, kind, "tile", learned, lambda: writer.dot("dp", "grad", "v", writer.v_parts))
    if writer.breaks:
        source.line("earlier += tl.sum(given, 1)")
    for one in learned:
        if not one.units:  # those of units are added up in their own loop
            source.line(f"{one.name} += tl.sum(d_{one.name}, 1)")
    for part in writer.d_parts:
        grad, k = suffixed("grad_q", part), suffixed("k", part)
        source.line(f"{grad} = tl.dot(ds.to({k}.dtype), {k}, {grad}, input_precision=PRECISION)")


def write_left(source: Source, pattern: Pattern, variant: Variant) -> KernelSource:
    """Of sticks: one program a tile of queries of one head. It visits the same keys as the forward pass and needs no values."""
    writer = Writer(source, pattern, variant, "left", "What later keys leave to each tile of keys, for one tile of queries.")
    writer.tensor("q")
    writer.columns_of("k")
    add_scratch(writer)
    writer.add(("heads", "i32"), ("group", "i32"), ("rows", "i32"), ("kv_len", "i32"), ("q_offset", "i32"), ("scale", "fp32"))
    writer.add_tables(*pattern.exprs)
    loop = writer.key_loop()
    writer.add(*loop.arguments())
    writer.constants("BLOCK_M", "BLOCK_N", "ALIGN", "PRECISION", "HEAVY_FIRST")

    def step() -> None:
        writer.begin_columns("partial")
        writer.load_column_tile("k", "partial")
        store_scratch(writer, "left")
        writer.dot("s", "q", "k", writer.d_parts)
        write_logits(writer, "tile", loop.condition(source, writer.names("tile")))
        write_passed(writer)
        source.line("left += tl.sum(passed, 1)")

    with writer.define():
        writer.programs("rows", "BLOCK_M", _first(writer))
        source.line("b = bh // heads")
        source.line("h = bh % heads")
        writer.head("q", "h")
        writer.column_heads("h", "k")
        source.line(f"row = {writer.number('BLOCK_M', 'tile')} + tl.arange(0, BLOCK_M)")
        source.line("inside = row < rows")
        source.line("q_idx = q_offset + tl.minimum(row, rows - 1)")
        writer.positions(*pattern.exprs)
        writer.dims(of_v=False)
        writer.load("q", "q", writer.d_parts, "row", "inside")
        loop.prepare(source, writer.names("queries"))
        begin_down(writer)
        writer.column_tiles("k")
        down(writer, loop, False, step)
    return writer.result


def write_grad_kv(source: Source, pattern: Pattern, variant: Variant) -> KernelSource:
    """One program a tile of keys of one key head; it visits the queries of all heads that read them."""
    writer = Writer(
        source, pattern, variant, "grad_kv", "Gradients of one tile of keys and values, over all heads that read them."
    )
    learned = [one for one in rolled_reads(pattern) if one.axis == "columns"]
    loop = writer.query_loop()
    for name in ("q", "k", "v", "grad_out", "grad_k", "grad_v"):
        writer.tensor(name)
    writer.add(*((f"{name}_ptr", "*fp32") for name in writer.row_sums))
    if writer.breaks:
        add_scratch(writer)
    writer.add(*((f"{one.name}_ptr", "*fp32") for one in learned))
    writer.add(("heads", "i32"), ("group", "i32"), ("rows", "i32"), ("kv_len", "i32"), ("q_offset", "i32"), ("scale", "fp32"))
    writer.add_tables(*pattern.exprs)
    writer.add(*loop.arguments())
    _constants(writer)
    with writer.define():
        _keys_of_program(writer)
        by_head = HEAD in pattern.score.expr.free_symbols  # of a ramp
        if writer.ramp is not None and not by_head:
            _ramps(writer)
        per_head = variant.queries == "lists" or HEAD in pattern.mask.expr.free_symbols
        if not per_head:
            loop.prepare(source, writer.names("keys"))
        with source.block("for member in range(0, group):"):
            source.line("h = kv_head * group + member")
            if writer.ramp is not None and by_head:
                _ramps(writer)
            if per_head:
                loop.prepare(source, writer.names("keys"))
            _queries_of_head(writer)
            _begin_sums(writer, learned, "BLOCK_N")
            for kind in ("every",) if writer.breaks else ("full", "partial"):
                with source.block(f"for i in range(0, {kind}_tiles):"):
                    _key_gradients(writer, loop, kind, learned)
            _store_sums(writer, learned, "(b * heads + h).to(tl.int64) * kv_len + key")
        for part in writer.d_parts:
            source.line(f"{suffixed('grad_k', part)} *= scale")
        writer.store("grad_k", "grad_k", writer.d_parts, "key", "inside")
        writer.store("grad_v", "grad_v", writer.v_parts, "key", "inside")
    return writer.result


def _keys_of_program(writer: Writer) -> None:
    """Which keys of which head a program has, their tiles of k and v, and sums that begin at 0."""
    source, variant = writer.source, writer.variant
    writer.programs("kv_len", "BLOCK_N", _first(writer))
    source.line("b = bh // (heads // group)")
    source.line("kv_head = bh % (heads // group)")
    if variant.step > 1 and writer.row_sums:
        source.line("all_rows = rows")
    for name in ("k", "v", "grad_k", "grad_v"):
        writer.head(name, "kv_head")
    writer.aligned("q")
    writer.aligned("grad_out")
    writer.residue(("q", "grad_out"), ("k", "v", "grad_k", "grad_v"))
    source.line(f"key = {writer.number('BLOCK_N', 'tile')} + tl.arange(0, BLOCK_N)")
    source.line("inside = key < kv_len")
    source.line("kv_idx = tl.minimum(key, kv_len - 1)")
    writer.positions(*writer.pattern.exprs, ends=variant.queries == "intervals")
    writer.dims()
    for name, parts in (("k", writer.d_parts), ("v", writer.v_parts)):
        writer.load(name, name, parts, "key", "inside")
    for name, parts in (("grad_k", writer.d_parts), ("grad_v", writer.v_parts)):
        for part in parts:
            source.line(f"{suffixed(name, part)} = tl.zeros([BLOCK_N, {part.width}], tl.float32)")
    write_factor(writer)
    source.line("row_0 = tl.arange(0, BLOCK_M)")
    if writer.breaks:
        source.line("column_0 = tl.arange(0, BLOCK_N)")
        for later in (True, False):
            write_triangle(writer, "column_0", later=later, turned=True)


def _queries_of_head(writer: Writer) -> None:
    """Pointers to the first tile of the queries of one head, and to what else is read of them."""
    source = writer.source
    for name, parts in (("q", writer.d_parts), ("grad_out", writer.v_parts)):
        source.line(
            f"{name}_head = {name}_ptr + tl.multiple_of("
            f"b.to(tl.int64) * {name}_stride_b + h.to(tl.int64) * {name}_stride_h, ALIGN)"
        )
        for part in parts:
            where = f"{name}_head + row_0[:, None] * {name}_stride_row + {part.name}[None, :]"
            source.line(f"{suffixed(name + '_tile', part)} = {where}")
    if writer.row_sums:
        source.line(f"line = (b * heads + h).to(tl.int64) * {'rows' if writer.variant.step == 1 else 'all_rows'}")
    for name in writer.row_sums:
        source.line(f"{name}_tile = {name}_ptr + line + {writer.place('row_0')}")


def _key_gradients(writer: Writer, loop: Loop, kind: str, learned: list[LearnedRead]) -> None:
    """What one tile of queries adds to the gradients of the keys."""
    source = writer.source
    loop.tile(source, kind, "i")
    kind = "partial" if kind == "every" else kind
    masked = _query_tile(writer, kind)
    for name in ("left", "earlier") if writer.breaks else ():
        line = "(bh - first_line) * group + member"
        load_scratch(writer, name, "row", "exists", line=line, column="tile")
    writer.dot("s", "k", "q", writer.d_parts)
    gradients_of(writer, loop, kind, "turned", learned, functools.partial(_value_gradients, writer, masked))
    for one in learned:
        if not one.units:  # those of units are added up in their own loop
            source.line(f"{one.name} += tl.sum(d_{one.name}, 1)")
    for part in writer.d_parts:
        grad, q = suffixed("grad_k", part), suffixed("q", part)
        source.line(f"{grad} = tl.dot(ds.to({q}.dtype), {q}, {grad}, input_precision=PRECISION)")


def _ramps(writer: Writer) -> None:
    """Steps of the exponent along the keys of the program, and along the queries of a tile."""
    ramp, source = writer.ramp, writer.source
    assert ramp is not None
    source.line(f"ref = {writer.number('BLOCK_N', 'tile')}")
    write_ramp(writer, "ramp", "(kv_idx - ref)", ramp.by_key)
    write_ramp(writer, "across", "row_0", ramp.by_query)


def _value_gradients(writer: Writer, masked: str) -> None:
    """What needs the weights alone goes before the second product: fewer numbers are held at a time."""
    source = writer.source
    for part in writer.v_parts:
        grad, do = suffixed("grad_v", part), suffixed("grad", part)
        source.line(f"{grad} = tl.dot(p.to({do}.dtype), {do}, {grad}, input_precision=PRECISION)")
    writer.dot("dp", "v", "grad", writer.v_parts)
    if writer.row_sums:
        source.line(f"delta = tl.load(delta_tile + {_first_row(writer)}{masked})")


def _first_row(writer: Writer) -> str:
    return "start" if writer.variant.step == 1 else f"start * {writer.variant.step}"


def _query_tile(writer: Writer, kind: str) -> str:
    """Load a tile of queries; what its other loads say of rows that do not exist."""
    source = writer.source
    source.line(f"start = {writer.number('BLOCK_M', 'column')}")
    source.line("row = start + row_0")
    source.line("q_idx = q_offset + row")
    exists = ""
    if kind == "partial":
        source.line("exists = row < rows")
        exists = "exists"
    for name, target, parts in (("q", "q", writer.d_parts), ("grad_out", "grad", writer.v_parts)):
        for part in parts:
            where = f"{suffixed(name + '_tile', part)} + start * {name}_stride_row"
            source.line(f"{suffixed(target, part)} = tl.load({where}{writer.mask(part, exists)})")
    masked = ", mask=exists, other=0.0" if exists else ""
    if writer.row_sums:
        source.line(f"base = tl.load(base_tile + {_first_row(writer)}{masked})")
    return masked
