"""Decayed linear attention: ``y[t] = scale * sum over u <= t of decay**(t - u) (a[t] . b[u]) c[u]``, one decay a head.

All four passes are this sum: the output is (a, b, c) = (q, k, v) and the gradient of q (dout, v, k); those of k, (v, dout, q), and of v,
(k, q, dout), run from the last position to the first. A *step* counts in the direction of the pass, a *position* always from the first key.

Steps are cut into chunks, and a pass into three kernels: :func:`sum_chunks` (what a chunk adds to the state, all chunks at a time),
:func:`carry` (the state before each chunk, from chunk to chunk), :func:`read_chunks` (the results, all chunks at a time). A state going
forward decays once more on the way to the next row; going backward it already has, so that such a pass begins with the gradient of
the last state and ends with that of the first.

The state and all sums are float32; float16 and bfloat16 are exact in TF32. No weight is ever the quotient of two powers of the decay:
each is computed from its own distance, so nothing overflows.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["carry", "document_at", "position_of", "product", "read_chunks", "rows_at", "sum_chunks"]


@triton.jit
def position_of(step, length, REVERSE: tl.constexpr):
    """The position that a step stands for."""
    if REVERSE:
        return length - 1 - step
    else:
        return step


@triton.jit
def rows_at(ptr, begin, offsets, first, rows, stride, columns, WIDTH: tl.constexpr):
    """The rows at positions ``begin + offsets`` of a matrix whose row 0 stands at ``first``, in float32; zeros where it has no row or
    column. Only ``begin`` is multiplied in 64 bits: addresses of a whole tile would take twice the registers of what they load."""
    row = begin - first + offsets
    inside = ((row >= 0) & (row < rows))[:, None] & (columns < WIDTH)[None, :]
    ptr += (begin - first).to(tl.int64) * stride
    return tl.load(ptr + (offsets[:, None] * stride + columns[None, :]), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def document_at(ptr, at, first, rows):
    """The document of a position; before the first key it is the first key's, after the last the last one's."""
    return tl.load(ptr + tl.minimum(tl.maximum(at - first, 0), rows - 1))


@triton.jit
def _halves(a, b):
    """Both halves of what a product sums over: of the columns of a, and of the rows of b."""
    a = tl.permute(tl.reshape(a, [a.shape[0], 2, a.shape[1] // 2]), (0, 2, 1))
    b = tl.permute(tl.reshape(b, [2, b.shape[0] // 2, b.shape[1]]), (1, 2, 0))
    a_low, a_high = tl.split(a)
    b_low, b_high = tl.split(b)
    return a_low, b_low, a_high, b_high


@triton.jit
def _short_product(a, b, PRECISION: tl.constexpr):
    if a.shape[1] > 32:
        a_low, b_low, a_high, b_high = _halves(a, b)
        return tl.dot(a_high, b_high, tl.dot(a_low, b_low, input_precision=PRECISION), input_precision=PRECISION)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """``a @ b``. Without matrix units a thread holds whole rows of a and columns of b: long ones are cut."""
    if PRECISION == "ieee" and a.shape[1] > 64:
        a_low, b_low, a_high, b_high = _halves(a, b)
        return _short_product(a_low, b_low, PRECISION) + _short_product(a_high, b_high, PRECISION)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _power(log_decay, distance):
    """decay**distance; 0 for a negative distance, 1 for distance 0 whatever the decay is."""
    return tl.where(distance > 0, tl.exp(log_decay * tl.maximum(distance, 1.0)), tl.where(distance == 0, 1.0, 0.0))


@triton.jit(
    do_not_specialize=[
        "b_stride_b", "b_stride_h", "b_stride_row", "c_stride_b", "c_stride_h", "c_stride_row", "documents_stride_b", "first", "rows",
        "length", "heads", "chunks",
    ]
)  # fmt: skip
def sum_chunks(
    b_ptr, c_ptr, log_decay_ptr, documents_ptr, states_ptr, factors_ptr,
    b_stride_b, b_stride_h, b_stride_row, c_stride_b, c_stride_h, c_stride_row, documents_stride_b,
    first, rows, length, heads, chunks,
    SHARED: tl.constexpr, WIDTH_B: tl.constexpr, WIDTH_C: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """``sum of decay**(last - u) b[u]^T c[u]`` over a chunk, and the factor for the state before it.

    One program a block of the state, a chunk and a head with a decay; ``SHARED`` such heads read one head of b and c, whose row 0
    stands at position ``first``.
    """
    b_stride_row, c_stride_row = b_stride_row // ALIGN * ALIGN, c_stride_row // ALIGN * ALIGN
    b_stride_h, c_stride_h = b_stride_h // ALIGN * ALIGN, c_stride_h // ALIGN * ALIGN
    b_stride_b, c_stride_b = b_stride_b // ALIGN * ALIGN, c_stride_b // ALIGN * ALIGN
    PARTS_C: tl.constexpr = (WIDTH_C + BLOCK_C - 1) // BLOCK_C
    PARTS: tl.constexpr = (WIDTH_B + BLOCK_B - 1) // BLOCK_B * PARTS_C
    part = tl.program_id(0) % PARTS
    chunk = tl.program_id(0) // PARTS % chunks
    line = (tl.program_id(0) // PARTS // chunks).to(tl.int64)
    batch, head = line // heads, line % heads
    log_decay = tl.load(log_decay_ptr + head)
    b_ptr += batch * b_stride_b + head // SHARED * b_stride_h
    c_ptr += batch * c_stride_b + head // SHARED * c_stride_h
    documents_ptr += batch * documents_stride_b
    columns_b = part // PARTS_C * BLOCK_B + tl.arange(0, BLOCK_B)
    columns_c = part % PARTS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = chunk * CHUNK
    last = tl.minimum(begin + CHUNK, length) - 1
    if HAS_DOCUMENTS:
        last_document = document_at(documents_ptr, position_of(last, length, REVERSE), 0, length)
    state = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    ranks = tl.arange(0, BLOCK)
    offsets = (1 - 2 * REVERSE) * ranks
    for start in range(begin, begin + CHUNK, BLOCK):
        at = position_of(start, length, REVERSE)
        weight = _power(log_decay, (last - start - ranks + REVERSE).to(tl.float32))
        if HAS_DOCUMENTS:
            weight = tl.where(document_at(documents_ptr, at + offsets, 0, length) == last_document, weight, 0.0)
        b = rows_at(b_ptr, at, offsets, first, rows, b_stride_row, columns_b, WIDTH_B) * weight[:, None]
        c = rows_at(c_ptr, at, offsets, first, rows, c_stride_row, columns_c, WIDTH_C)
        state += tl.dot(tl.trans(b), c, input_precision=PRECISION)
    inside = (columns_b < WIDTH_B)[:, None] & (columns_c < WIDTH_C)[None, :]
    states_ptr += (line * (chunks + 1) + chunk) * (WIDTH_B * WIDTH_C)
    tl.store(states_ptr + columns_b[:, None] * WIDTH_C + columns_c[None, :], state, mask=inside)
    if part == 0:
        factor = _power(log_decay, (last + 1 - begin).to(tl.float32))
        if HAS_DOCUMENTS:
            before = document_at(documents_ptr, position_of(begin - 1, length, REVERSE), 0, length)
            factor = tl.where(before == last_document, factor, 0.0)
        tl.store(factors_ptr + line * chunks + chunk, factor)


@triton.jit(do_not_specialize=["chunks", "elements"])
def carry(
    states_ptr, factors_ptr, initial_ptr, chunks, elements, FACTORS: tl.constexpr, WIDTH: tl.constexpr,
    HAS_INITIAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of chunks -> the state before each chunk, in place; entry ``chunks`` becomes the state after the last.

    One program a block of a state's ``elements``; ``FACTORS`` factors a chunk, each for ``WIDTH`` elements.
    """
    blocks = tl.cdiv(elements, BLOCK)
    line = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial_ptr + line * elements + place, mask=inside, other=0.0)
    states_ptr += line * (chunks + 1) * elements + place
    factors_ptr += line * chunks * FACTORS + place // WIDTH
    for _ in range(chunks):
        added = tl.load(states_ptr, mask=inside, other=0.0)
        factor = tl.load(factors_ptr, mask=inside, other=0.0)
        tl.store(states_ptr, state, mask=inside)
        state = state * factor + added
        states_ptr += elements
        factors_ptr += FACTORS
    tl.store(states_ptr, state, mask=inside)


@triton.jit(
    do_not_specialize=[
        "a_stride_b", "a_stride_h", "a_stride_row", "b_stride_b", "b_stride_h", "b_stride_row", "c_stride_b", "c_stride_h", "c_stride_row",
        "y_stride_b", "y_stride_h", "y_stride_row", "documents_stride_b", "a_first", "a_rows", "first", "rows", "length", "heads", "chunks",
        "first_chunk", "read_chunk_count", "scale",
    ]
)  # fmt: skip
def read_chunks(
    a_ptr, b_ptr, c_ptr, y_ptr, log_decay_ptr, documents_ptr, states_ptr,
    a_stride_b, a_stride_h, a_stride_row, b_stride_b, b_stride_h, b_stride_row, c_stride_b, c_stride_h, c_stride_row,
    y_stride_b, y_stride_h, y_stride_row, documents_stride_b,
    a_first, a_rows, first, rows, length, heads, chunks, first_chunk, read_chunk_count, scale,
    SHARED: tl.constexpr, SUMMED: tl.constexpr, WIDTH_A: tl.constexpr, WIDTH_C: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr, TRANSPOSED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The results of a chunk, from the state before it.

    One program a block of columns of y, a chunk (those from ``first_chunk`` on) and one of ``heads`` heads of a and y. Such a head sums
    over ``SUMMED`` heads with decays and states of their own, each of which reads head ``number // SHARED`` of b and c: going forward
    ``SHARED`` query heads read a key head, going backward a key head gathers from ``SUMMED`` query heads, in order.
    ``TRANSPOSED``: the states lie in memory as (c, a) and not as (a, c).
    """
    a_stride_row, b_stride_row = a_stride_row // ALIGN * ALIGN, b_stride_row // ALIGN * ALIGN
    c_stride_row, y_stride_row = c_stride_row // ALIGN * ALIGN, y_stride_row // ALIGN * ALIGN
    a_stride_h, b_stride_h = a_stride_h // ALIGN * ALIGN, b_stride_h // ALIGN * ALIGN
    c_stride_h, y_stride_h = c_stride_h // ALIGN * ALIGN, y_stride_h // ALIGN * ALIGN
    a_stride_b, b_stride_b = a_stride_b // ALIGN * ALIGN, b_stride_b // ALIGN * ALIGN
    c_stride_b, y_stride_b = c_stride_b // ALIGN * ALIGN, y_stride_b // ALIGN * ALIGN
    PARTS: tl.constexpr = (WIDTH_C + BLOCK_C - 1) // BLOCK_C
    part = tl.program_id(0) % PARTS
    chunk = tl.program_id(0) // PARTS % read_chunk_count + first_chunk
    line = (tl.program_id(0) // PARTS // read_chunk_count).to(tl.int64)
    batch, head = line // heads, line % heads
    a_ptr += batch * a_stride_b + head * a_stride_h
    y_ptr += batch * y_stride_b + head * y_stride_h
    documents_ptr += batch * documents_stride_b
    columns_a, columns_c = tl.arange(0, BLOCK_A), part * BLOCK_C + tl.arange(0, BLOCK_C)
    state_inside = (columns_a < WIDTH_A)[:, None] & (columns_c < WIDTH_C)[None, :]
    if TRANSPOSED:
        state_place = columns_a[:, None] + columns_c[None, :] * WIDTH_A
    else:
        state_place = columns_a[:, None] * WIDTH_C + columns_c[None, :]
    ranks = tl.arange(0, BLOCK)
    offsets = (1 - 2 * REVERSE) * ranks
    distance = (ranks[:, None] - ranks[None, :]).to(tl.float32)
    for summed in range(SUMMED):
        source = head * SUMMED + summed
        log_decay = tl.load(log_decay_ptr + source)
        b_line = b_ptr + batch * b_stride_b + source // SHARED * b_stride_h
        c_line = c_ptr + batch * c_stride_b + source // SHARED * c_stride_h
        state_line = states_ptr + ((line * SUMMED + summed) * (chunks + 1) + chunk) * (WIDTH_A * WIDTH_C)
        state = tl.load(state_line + state_place, mask=state_inside, other=0.0)
        pair_weight = _power(log_decay, distance)
        reach = _power(log_decay, (ranks + 1 - REVERSE).to(tl.float32))
        tail = _power(log_decay, (BLOCK - 1 - ranks + REVERSE).to(tl.float32))
        for begin in range(chunk * CHUNK, chunk * CHUNK + CHUNK, BLOCK):
            at = position_of(begin, length, REVERSE)
            a = rows_at(a_ptr, at, offsets, a_first, a_rows, a_stride_row, columns_a, WIDTH_A)
            b = rows_at(b_line, at, offsets, first, rows, b_stride_row, columns_a, WIDTH_A)
            c = rows_at(c_line, at, offsets, first, rows, c_stride_row, columns_c, WIDTH_C)
            pairs = product(a, tl.trans(b), PRECISION) * pair_weight
            from_state, kept, to_state = reach, _power(log_decay, BLOCK * 1.0), tail
            if HAS_DOCUMENTS:
                document = document_at(documents_ptr, at + offsets, 0, length)
                before = document_at(documents_ptr, position_of(begin - 1, length, REVERSE), 0, length)
                after = document_at(documents_ptr, position_of(begin + BLOCK - 1, length, REVERSE), 0, length)
                pairs = tl.where(document[:, None] == document[None, :], pairs, 0.0)
                from_state = tl.where(document == before, reach, 0.0)
                to_state = tl.where(document == after, tail, 0.0)
                kept = tl.where(before == after, kept, 0.0)
            y = product(a, state, PRECISION) * from_state[:, None]
            y = (y + tl.dot(pairs, c, input_precision=PRECISION)) * scale
            state = state * kept + tl.dot(tl.trans(b * to_state[:, None]), c, input_precision=PRECISION)
            row = at - a_first + offsets
            inside = ((row >= 0) & (row < a_rows))[:, None] & (columns_c < WIDTH_C)[None, :]
            place = y_ptr + (at - a_first).to(tl.int64) * y_stride_row + (offsets[:, None] * y_stride_row + columns_c[None, :])
            if SUMMED > 1:
                y += tl.load(place, mask=inside & (summed > 0), other=0.0)
            tl.store(place, y.to(y_ptr.dtype.element_ty), mask=inside)
        if SUMMED > 1:
            # The next head adds to what other threads may have stored.
            tl.debug_barrier()
