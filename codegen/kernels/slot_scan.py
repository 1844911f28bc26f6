"""Gated slots: a state ``H (slots, width)`` that decays by a factor of each slot's own; with ``L[t, u]`` the decay from u to t, a vector,

- :func:`read_slots`   ``y[t] = scale * sum over u <= t of (a[t] . b[u]) L[t, u] c[u]``   (a number a slot),
- :func:`read_values`  ``y[t] = sum over u <= t of (w[t] . (L[t, u] c[u])) b[u]``          (a number a column).

The forward pass reads scores from the keys' slots (a, b, c = q, k, writes), and values with the softmax of the scores as w. The
backward pass is made of the same two, forward for what belongs to queries, and from the last position to the first for what
belongs to keys, where c is a query's row of weights: a key head then gathers from all its query heads in one state.

A query stands at the position of the newest key that it sees, ``delay`` before its own; position 0 is before every key. Steps count
in the direction of the pass. Chunks are as in ``linear_scan``: :func:`sum_chunks`, ``carry``, then all chunks at a time.

Decays may be as strong as they like: exp is taken of sums of log decays between the two rows themselves, never of a difference of
sums. Within a block a pair of rows is split where ``row >> level`` are neighbours for the first time: its decay is the product of
two, one a row, from the edge between the halves. So each level is two plain products (:func:`halves`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsedsl.codegen.kernels.linear_scan import document_at, position_of, product, rows_at

__all__ = ["across", "halves", "read_slots", "read_values", "sum_chunks"]


@triton.jit
def halves(before, after, ranks, LEVEL):
    """One level of the tree over a block's rows: the decay between each row and the edge of the two parts of ``2**LEVEL`` rows, and
    the sums of the next level: of the log decays of a part up to and with a row (``before``), and from the next row on (``after``)."""
    lower = (((ranks >> LEVEL) & 1) == 0)[:, None]
    other_end = (((ranks >> LEVEL) ^ 1) << LEVEL) + (1 << LEVEL) - 1
    other = tl.gather(before, tl.broadcast_to(other_end[:, None], before.shape), 0)
    to_edge = tl.exp(tl.where(lower, after, before))
    return to_edge, tl.where(lower, before, before + other), tl.where(lower, after + other, after)


@triton.jit
def across(ranks, LEVEL):
    """Which pairs (t, u) of a block's rows are split at this level: t in the upper half, u in the lower."""
    part = ranks >> LEVEL
    return (part[:, None] == part[None, :] + 1) & ((part & 1) == 1)[:, None]


@triton.jit
def _sums(gates, ranks, LEVELS: tl.constexpr):
    """Sums of log decays up to and with each row of a block, and from the row after it to the block's end."""
    before, after = gates, tl.zeros_like(gates)
    for level in tl.static_range(LEVELS):
        _, before, after = halves(before, after, ranks, level)
    return before, after


@triton.jit
def _documents(documents_ptr, begin, offsets, length, first, keys, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """Documents of a block's steps, of the step before it, and of its last step."""
    document = document_at(documents_ptr, position_of(begin, length, REVERSE) + offsets, first, keys)
    before = document_at(documents_ptr, position_of(begin - 1, length, REVERSE), first, keys)
    return document, before, document_at(documents_ptr, position_of(begin + BLOCK - 1, length, REVERSE), first, keys)


@triton.jit
def _gates(gate_ptr, at, offsets, first, keys, slots, SLOTS: tl.constexpr, REVERSE: tl.constexpr):
    """Log decays on the way into each position: forward its own, backward that of the position above."""
    if REVERSE:
        at += 1
    return rows_at(gate_ptr, at, offsets, first, keys, SLOTS, slots, SLOTS)


@triton.jit(
    do_not_specialize=[
        "b_stride_b", "b_stride_h", "b_stride_row", "documents_stride_b", "b_first", "b_rows", "first", "keys", "heads", "chunks",
    ]
)  # fmt: skip
def sum_chunks(
    b_ptr, c_ptr, gate_ptr, documents_ptr, states_ptr, factors_ptr,
    b_stride_b, b_stride_h, b_stride_row, documents_stride_b, b_first, b_rows, first, keys, heads, chunks,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, REVERSE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``sum of L[last, u] c[u]^T b[u]`` over a chunk and the ``GROUP`` heads of b and c that a key head has, and the factors for the state
    before it. One program a block of the state, a chunk and a key head; blocks from the last to the first."""
    b_stride_row = b_stride_row // ALIGN * ALIGN
    b_stride_h, b_stride_b = b_stride_h.to(tl.int64) // ALIGN * ALIGN, b_stride_b // ALIGN * ALIGN
    PARTS_WIDTH: tl.constexpr = (WIDTH + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    PARTS: tl.constexpr = (SLOTS + BLOCK_SLOTS - 1) // BLOCK_SLOTS * PARTS_WIDTH
    part = tl.program_id(0) % PARTS
    chunk = tl.program_id(0) // PARTS % chunks
    line = (tl.program_id(0) // PARTS // chunks).to(tl.int64)
    batch, head = line // heads, line % heads
    length = chunks * CHUNK
    b_ptr += batch * b_stride_b + head * GROUP * b_stride_h
    c_ptr += line * GROUP * b_rows * SLOTS
    gate_ptr += line * keys * SLOTS
    documents_ptr += batch * documents_stride_b
    slots = part // PARTS_WIDTH * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS)
    columns = part % PARTS_WIDTH * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    ranks = tl.arange(0, BLOCK)
    if HAS_DOCUMENTS:
        last = position_of(chunk * CHUNK + CHUNK - 1, length, REVERSE)
        last_document = document_at(documents_ptr, last, first, keys)
    state = tl.zeros([BLOCK_SLOTS, BLOCK_WIDTH], tl.float32)
    total = tl.zeros([BLOCK_SLOTS], tl.float32)
    offsets = (1 - 2 * REVERSE) * ranks
    for back in range(BLOCK, CHUNK + BLOCK, BLOCK):
        at = position_of(chunk * CHUNK + CHUNK - back, length, REVERSE)
        gates = _gates(gate_ptr, at, offsets, first, keys, slots, SLOTS, REVERSE)
        _, after = _sums(gates, ranks, LEVELS)
        weight = tl.exp(after + total[None, :])
        if HAS_DOCUMENTS:
            weight = tl.where((document_at(documents_ptr, at + offsets, first, keys) == last_document)[:, None], weight, 0.0)
        total += tl.sum(gates, 0)
        for one in range(GROUP):
            b = rows_at(b_ptr + one * b_stride_h, at, offsets, b_first, b_rows, b_stride_row, columns, WIDTH)
            c = rows_at(c_ptr + one * b_rows.to(tl.int64) * SLOTS, at, offsets, b_first, b_rows, SLOTS, slots, SLOTS)
            state += tl.dot(tl.trans(c * weight), b, input_precision=PRECISION)
    inside = (slots < SLOTS)[:, None] & (columns < WIDTH)[None, :]
    states_ptr += (line * (chunks + 1) + chunk) * (SLOTS * WIDTH)
    tl.store(states_ptr + slots[:, None] * WIDTH + columns[None, :], state, mask=inside)
    if part % PARTS_WIDTH == 0:
        factors = tl.exp(total)
        if HAS_DOCUMENTS:
            before = document_at(documents_ptr, position_of(chunk * CHUNK - 1, length, REVERSE), first, keys)
            factors = tl.where(before == last_document, factors, 0.0)
        tl.store(factors_ptr + (line * chunks + chunk) * SLOTS + slots, factors, mask=slots < SLOTS)


@triton.jit(
    do_not_specialize=[
        "a_stride_b", "a_stride_h", "a_stride_row", "b_stride_b", "b_stride_h", "b_stride_row", "documents_stride_b",
        "a_first", "a_rows", "b_first", "b_rows", "first", "keys", "heads", "chunks", "first_chunk", "read_chunk_count", "group",
        "scale",
    ]
)  # fmt: skip
def read_slots(
    a_ptr, b_ptr, c_ptr, gate_ptr, y_ptr, documents_ptr, states_ptr,
    a_stride_b, a_stride_h, a_stride_row, b_stride_b, b_stride_h, b_stride_row, documents_stride_b,
    a_first, a_rows, b_first, b_rows, first, keys, heads, chunks, first_chunk, read_chunk_count, group, scale,
    SHARED: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, REVERSE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One program a block of slots, a chunk (those from ``first_chunk`` on) and one of ``heads`` heads of a and y, float32
    ``(.., rows, slots)``. ``SHARED`` of them read one key head's state, which ``group`` heads of b and c are written into.

    ``group`` is no constant so that the loop over it stays one, even if it has one turn: without it all products are scheduled side by
    side, and registers do not hold their operands."""
    a_stride_row, b_stride_row = a_stride_row // ALIGN * ALIGN, b_stride_row // ALIGN * ALIGN
    a_stride_h, b_stride_h = a_stride_h // ALIGN * ALIGN, b_stride_h.to(tl.int64) // ALIGN * ALIGN
    a_stride_b, b_stride_b = a_stride_b // ALIGN * ALIGN, b_stride_b // ALIGN * ALIGN
    PARTS: tl.constexpr = (SLOTS + BLOCK_SLOTS - 1) // BLOCK_SLOTS
    part = tl.program_id(0) % PARTS
    chunk = tl.program_id(0) // PARTS % read_chunk_count + first_chunk
    line = (tl.program_id(0) // PARTS // read_chunk_count).to(tl.int64)
    batch, head, key_line = line // heads, line % heads, line // SHARED
    length = chunks * CHUNK
    a_ptr += batch * a_stride_b + head * a_stride_h
    b_ptr += batch * b_stride_b + head // SHARED * group * b_stride_h
    c_ptr += key_line * group * b_rows * SLOTS
    y_ptr += line * a_rows * SLOTS
    gate_ptr += key_line * keys * SLOTS
    documents_ptr += batch * documents_stride_b
    slots, columns, ranks = part * BLOCK_SLOTS + tl.arange(0, BLOCK_SLOTS), tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK)
    states_ptr += (key_line * (chunks + 1) + chunk) * (SLOTS * WIDTH)
    state_inside = (slots < SLOTS)[:, None] & (columns < WIDTH)[None, :]
    state = tl.load(states_ptr + slots[:, None] * WIDTH + columns[None, :], mask=state_inside, other=0.0)
    offsets = (1 - 2 * REVERSE) * ranks
    for begin in range(chunk * CHUNK, chunk * CHUNK + CHUNK, BLOCK):
        at = position_of(begin, length, REVERSE)
        gates = _gates(gate_ptr, at, offsets, first, keys, slots, SLOTS, REVERSE)
        before, after = _sums(gates, ranks, LEVELS)
        reach, tail, kept = tl.exp(before), tl.exp(after), tl.exp(tl.sum(gates, 0))
        if HAS_DOCUMENTS:
            document, old, new = _documents(documents_ptr, begin, offsets, length, first, keys, BLOCK, REVERSE)
            reach = tl.where((document == old)[:, None], reach, 0.0)
            tail = tl.where((document == new)[:, None], tail, 0.0)
            kept = tl.where(old == new, kept, 0.0)
        a = rows_at(a_ptr, at, offsets, a_first, a_rows, a_stride_row, columns, WIDTH)
        y = product(a, tl.trans(state), PRECISION) * reach
        for one in range(group):
            b = rows_at(b_ptr + one * b_stride_h, at, offsets, b_first, b_rows, b_stride_row, columns, WIDTH)
            c = rows_at(c_ptr + one * b_rows.to(tl.int64) * SLOTS, at, offsets, b_first, b_rows, SLOTS, slots, SLOTS)
            pairs = product(a, tl.trans(b), PRECISION)
            if HAS_DOCUMENTS:
                pairs = tl.where(document[:, None] == document[None, :], pairs, 0.0)
            y += tl.sum(tl.where(ranks[:, None] == ranks[None, :], pairs, 0.0), 1)[:, None] * c
            before, after = gates, tl.zeros_like(gates)
            for level in tl.static_range(LEVELS):
                to_edge, before, after = halves(before, after, ranks, level)
                split = tl.where(across(ranks, level), pairs, 0.0)
                y += tl.dot(split, c * to_edge, input_precision=PRECISION) * to_edge
        row = at - a_first + offsets
        inside = ((row >= 0) & (row < a_rows))[:, None] & (slots < SLOTS)[None, :]
        place = y_ptr + (at - a_first).to(tl.int64) * SLOTS + (offsets[:, None] * SLOTS + slots[None, :])
        tl.store(place, y * scale, mask=inside)
        state *= kept[:, None]
        for one in range(group):
            b = rows_at(b_ptr + one * b_stride_h, at, offsets, b_first, b_rows, b_stride_row, columns, WIDTH)
            c = rows_at(c_ptr + one * b_rows.to(tl.int64) * SLOTS, at, offsets, b_first, b_rows, SLOTS, slots, SLOTS)
            state += tl.dot(tl.trans(c * tail), b, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=[
        "b_stride_b", "b_stride_h", "b_stride_row", "y_stride_b", "y_stride_h", "y_stride_row", "documents_stride_b",
        "a_first", "a_rows", "b_first", "b_rows", "first", "keys", "heads", "chunks", "first_chunk", "read_chunk_count", "group",
    ]
)  # fmt: skip
def read_values(
    w_ptr, b_ptr, c_ptr, gate_ptr, y_ptr, documents_ptr, states_ptr,
    b_stride_b, b_stride_h, b_stride_row, y_stride_b, y_stride_h, y_stride_row, documents_stride_b,
    a_first, a_rows, b_first, b_rows, first, keys, heads, chunks, first_chunk, read_chunk_count, group,
    SHARED: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, REVERSE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """As :func:`read_slots`, for a block of columns of y; ``BLOCK_SLOTS`` holds all slots."""
    b_stride_row, y_stride_row = b_stride_row // ALIGN * ALIGN, y_stride_row // ALIGN * ALIGN
    b_stride_h, y_stride_h = b_stride_h.to(tl.int64) // ALIGN * ALIGN, y_stride_h // ALIGN * ALIGN
    b_stride_b, y_stride_b = b_stride_b // ALIGN * ALIGN, y_stride_b // ALIGN * ALIGN
    PARTS: tl.constexpr = (WIDTH + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    part = tl.program_id(0) % PARTS
    chunk = tl.program_id(0) // PARTS % read_chunk_count + first_chunk
    line = (tl.program_id(0) // PARTS // read_chunk_count).to(tl.int64)
    batch, head, key_line = line // heads, line % heads, line // SHARED
    length = chunks * CHUNK
    w_ptr += line * a_rows * SLOTS
    b_ptr += batch * b_stride_b + head // SHARED * group * b_stride_h
    c_ptr += key_line * group * b_rows * SLOTS
    y_ptr += batch * y_stride_b + head * y_stride_h
    gate_ptr += key_line * keys * SLOTS
    documents_ptr += batch * documents_stride_b
    slots, columns, ranks = tl.arange(0, BLOCK_SLOTS), part * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK)
    states_ptr += (key_line * (chunks + 1) + chunk) * (SLOTS * WIDTH)
    state_inside = (slots < SLOTS)[:, None] & (columns < WIDTH)[None, :]
    state = tl.load(states_ptr + slots[:, None] * WIDTH + columns[None, :], mask=state_inside, other=0.0)
    offsets = (1 - 2 * REVERSE) * ranks
    for begin in range(chunk * CHUNK, chunk * CHUNK + CHUNK, BLOCK):
        at = position_of(begin, length, REVERSE)
        gates = _gates(gate_ptr, at, offsets, first, keys, slots, SLOTS, REVERSE)
        before, after = _sums(gates, ranks, LEVELS)
        reach, tail, kept = tl.exp(before), tl.exp(after), tl.exp(tl.sum(gates, 0))
        if HAS_DOCUMENTS:
            document, old, new = _documents(documents_ptr, begin, offsets, length, first, keys, BLOCK, REVERSE)
            reach = tl.where((document == old)[:, None], reach, 0.0)
            tail = tl.where((document == new)[:, None], tail, 0.0)
            kept = tl.where(old == new, kept, 0.0)
        row = at - a_first + offsets
        is_row = (row >= 0) & (row < a_rows)
        w = rows_at(w_ptr, at, offsets, a_first, a_rows, SLOTS, slots, SLOTS)
        y = product(w * reach, state, PRECISION)
        for one in range(group):
            b = rows_at(b_ptr + one * b_stride_h, at, offsets, b_first, b_rows, b_stride_row, columns, WIDTH)
            c = rows_at(c_ptr + one * b_rows.to(tl.int64) * SLOTS, at, offsets, b_first, b_rows, SLOTS, slots, SLOTS)
            pairs = tl.where(ranks[:, None] == ranks[None, :], tl.sum(w * c, 1)[:, None], 0.0)
            before, after = gates, tl.zeros_like(gates)
            for level in tl.static_range(LEVELS):
                to_edge, before, after = halves(before, after, ranks, level)
                split = product(w * to_edge, tl.trans(c * to_edge), PRECISION)
                pairs = tl.where(across(ranks, level), split, pairs)
            if HAS_DOCUMENTS:
                pairs = tl.where(document[:, None] == document[None, :], pairs, 0.0)
            y += tl.dot(pairs, b, input_precision=PRECISION)
        place = y_ptr + (at - a_first).to(tl.int64) * y_stride_row
        place += offsets[:, None] * y_stride_row + columns[None, :]
        tl.store(place, y.to(y_ptr.dtype.element_ty), mask=is_row[:, None] & (columns < WIDTH)[None, :])
        state *= kept[:, None]
        for one in range(group):
            b = rows_at(b_ptr + one * b_stride_h, at, offsets, b_first, b_rows, b_stride_row, columns, WIDTH)
            c = rows_at(c_ptr + one * b_rows.to(tl.int64) * SLOTS, at, offsets, b_first, b_rows, SLOTS, slots, SLOTS)
            state += tl.dot(tl.trans(c * tail), b, input_precision=PRECISION)
