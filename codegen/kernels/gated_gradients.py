"""Gradients of :mod:`sparsedsl.codegen.kernels.gated_scan`, whose letters these are; ``dX`` is the gradient of X.

:func:`carry_back` goes from the last chunk to the first and finds dS after every chunk, ``dR = T^T dU`` and dv; :func:`slopes` finds all
else of a chunk from these, all chunks at a time. With ``dM = scale dO U^T`` and ``dN' = -dR U^T`` (of N without beta), each with the decay
of its pair::

    reads of q:    dq = scale e^c dO S^T + dM k                     reads of e:    z = dN' k - e^c dR S^T, times beta
    writes of k:   w = e^(c_C - c) U dS'^T + dM^T q + dN'^T beta e      dk = beta z + w        dbeta = e . z + dR . v

(if it ``ERASES``, e is no k, and ``de = beta z``, ``dk = w``).

The gradient of a log decay is that of its sum ``c``, reads minus writes (``q dq + e beta z - k w``, and ``S' dS'`` at the end of the
chunk), added up from its row on as far as its document goes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsedsl.codegen.kernels.gated_scan import (
    LEAST,
    documents_of,
    from_rows,
    line_of,
    numbers_at,
    over_all,
    pair_decays,
    to_rows,
)
from sparsedsl.codegen.kernels.linear_scan import document_at, product, rows_at
from sparsedsl.codegen.kernels.slot_scan import across, halves

__all__ = ["carry_back", "slopes"]


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "q_stride_row", "k_stride_b", "k_stride_h", "k_stride_row", "erase_stride_b", "erase_stride_h",
        "erase_stride_row", "d_out_stride_b", "d_out_stride_h", "d_out_stride_row", "gate_stride_b", "beta_stride_b",
        "documents_stride_b", "q_first", "q_rows", "length", "heads", "chunks", "scale",
    ]
)  # fmt: skip
def carry_back(
    q_ptr, k_ptr, erase_ptr, d_out_ptr, gate_ptr, beta_ptr, documents_ptr, pairs_ptr, solve_ptr, d_last_ptr, d_states_ptr, d_v_ptr,
    through_ptr,
    q_stride_b, q_stride_h, q_stride_row, k_stride_b, k_stride_h, k_stride_row, erase_stride_b, erase_stride_h, erase_stride_row,
    d_out_stride_b, d_out_stride_h, d_out_stride_row, gate_stride_b, beta_stride_b, documents_stride_b, q_first, q_rows, length, heads,
    chunks, scale,
    READERS: tl.constexpr, Q_SHARED: tl.constexpr, K_SHARED: tl.constexpr, ERASE_SHARED: tl.constexpr, GATE_SHARED: tl.constexpr,
    BETA_SHARED: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, VECTOR: tl.constexpr, DELTA: tl.constexpr, ERASES: tl.constexpr, HAS_LAST: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``d_states (states, chunks + 1, WIDTH, WIDTH_V)``: of the state before each chunk and of the last; ``d_v`` and, by the delta rule,
    ``through (states, length, WIDTH_V)``: dR. One program ``COLUMNS`` columns of a state."""
    q_stride_row, k_stride_row = q_stride_row // ALIGN * ALIGN, k_stride_row // ALIGN * ALIGN
    d_out_stride_row = d_out_stride_row // ALIGN * ALIGN
    PARTS: tl.constexpr = (WIDTH_V + COLUMNS - 1) // COLUMNS
    line = (tl.program_id(0) // PARTS).to(tl.int64)
    columns, columns_v = tl.arange(0, WHOLE), tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    GATES: tl.constexpr = WIDTH if VECTOR else 1
    gate_ptr = line_of(gate_ptr, line, heads, gate_stride_b, length.to(tl.int64) * GATES, GATE_SHARED)
    beta_ptr = line_of(beta_ptr, line, heads, beta_stride_b, length.to(tl.int64), BETA_SHARED)
    k_ptr = line_of(k_ptr, line, heads, k_stride_b, k_stride_h, K_SHARED)
    erase_ptr = line_of(erase_ptr, line, heads, erase_stride_b, erase_stride_h, ERASE_SHARED)
    erase_stride_row = erase_stride_row // ALIGN * ALIGN
    documents_ptr += line // heads * documents_stride_b
    ranks = tl.arange(0, CHUNK)
    inside = (columns < WIDTH)[:, None] & (columns_v < WIDTH_V)[None, :]
    place = columns[:, None] * WIDTH_V + columns_v[None, :]
    square = ranks[:, None] * CHUNK + ranks[None, :]
    d_state = tl.zeros([WHOLE, COLUMNS], tl.float32)
    if HAS_LAST:
        d_state += tl.load(d_last_ptr + line * (WIDTH * WIDTH_V) + place, mask=inside, other=0.0)
    for back in range(chunks):
        chunk = chunks - 1 - back
        begin = chunk * CHUNK
        tl.store(d_states_ptr + (line * (chunks + 1) + chunk + 1) * (WIDTH * WIDTH_V) + place, d_state, mask=inside)
        document, before, last = documents_of(documents_ptr, begin, ranks, length, HAS_DOCUMENTS)
        k = rows_at(k_ptr, begin, ranks, 0, length, k_stride_row, columns, WIDTH)
        left = from_rows(gate_ptr, document, last, begin, ranks, length, columns, WIDTH, VECTOR)
        by_u = product(k * left, d_state, PRECISION)
        d_state *= over_all(gate_ptr, before, last, begin, ranks, length, columns, WIDTH, VECTOR)
        for reader in range(READERS):
            head = line % heads * READERS + reader
            q_line = q_ptr + line // heads * q_stride_b + head // Q_SHARED * q_stride_h
            d_line = d_out_ptr + line // heads * d_out_stride_b + head * d_out_stride_h
            q = rows_at(q_line, begin, ranks, q_first, q_rows, q_stride_row, columns, WIDTH)
            q *= to_rows(gate_ptr, document, before, begin, ranks, length, columns, WIDTH, VECTOR)
            d_out = rows_at(d_line, begin, ranks, q_first, q_rows, d_out_stride_row, columns_v, WIDTH_V) * scale
            pairs = tl.load(pairs_ptr + ((line * READERS + reader) * chunks + chunk) * (CHUNK * CHUNK) + square)
            by_u += tl.dot(tl.trans(pairs), d_out, input_precision=PRECISION)
            d_state += tl.dot(tl.trans(q), d_out, input_precision=PRECISION)
        kept = (begin + ranks < length)[:, None] & (columns_v < WIDTH_V)[None, :]
        rows = (line * length + begin) * WIDTH_V + (ranks[:, None] * WIDTH_V + columns_v[None, :])
        if DELTA:
            solve = tl.load(solve_ptr + (line * chunks + chunk) * (CHUNK * CHUNK) + square)
            through = tl.dot(tl.trans(solve), by_u, input_precision=PRECISION)
            tl.store(through_ptr + rows, through, mask=kept)
            by_u = through * numbers_at(beta_ptr, begin, ranks, length)[:, None]
            reach = to_rows(gate_ptr, document, before, begin, ranks, length, columns, WIDTH, VECTOR)
            erase = k
            if ERASES:
                erase = rows_at(erase_ptr, begin, ranks, 0, length, erase_stride_row, columns, WIDTH)
            d_state -= tl.dot(tl.trans(erase * reach), by_u, input_precision=PRECISION)
        tl.store(d_v_ptr + rows, by_u.to(d_v_ptr.dtype.element_ty), mask=kept)
    tl.store(d_states_ptr + line * (chunks + 1) * (WIDTH * WIDTH_V) + place, d_state, mask=inside)


@triton.jit
def _of_pairs(
    by_pairs, x, writers, k, gate_ptr, begin, ranks, length, columns, levels, WIDTH: tl.constexpr, VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of products of readers with rows of k: of the readers, and of the rows of k, for which ``x`` are the readers."""
    if VECTOR:
        gates = tl.maximum(rows_at(gate_ptr, begin, ranks, 0, length, WIDTH, columns, WIDTH), LEAST)
        own = tl.sum(tl.where(ranks[:, None] == ranks[None, :], by_pairs, 0.0), 1)[:, None]
        by_x, by_k = own * k, own * x
        before, after = gates, tl.zeros_like(gates)
        for level in range(levels):
            to_edge, before, after = halves(before, after, ranks, level)
            split = tl.where(across(ranks, level), by_pairs, 0.0)
            by_x += tl.dot(split, k * to_edge, input_precision=PRECISION) * to_edge
            by_k += tl.dot(tl.trans(split), x * to_edge, input_precision=PRECISION) * to_edge
        return by_x, writers + by_k
    else:
        by_pairs *= pair_decays(gate_ptr, begin, ranks, length)
        by_x = tl.dot(by_pairs, k, input_precision=PRECISION)
        return by_x, tl.dot(tl.trans(by_pairs), x, writers, input_precision=PRECISION)


@triton.jit
def _from_each_row(x, document, ranks, levels):
    """Sums over the rows of x from each row on, as far as its document goes: of neighbours, of the sums of these, and so on."""
    for level in range(levels):
        far = ranks + (1 << level)
        at = tl.minimum(far, ranks.shape[0] - 1)
        more = (far < ranks.shape[0]) & (tl.gather(document, at, 0) == document)
        x += tl.where(more[:, None], tl.gather(x, tl.broadcast_to(at[:, None], x.shape), 0), 0.0)
    return x


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "q_stride_row", "k_stride_b", "k_stride_h", "k_stride_row", "erase_stride_b", "erase_stride_h",
        "erase_stride_row", "v_stride_b", "v_stride_h", "v_stride_row", "u_stride_b", "u_stride_h", "u_stride_row", "d_out_stride_b",
        "d_out_stride_h", "d_out_stride_row",
        "gate_stride_b", "beta_stride_b", "documents_stride_b", "q_first", "q_rows", "length", "heads", "chunks", "width_v",
        "levels", "scale",
    ]
)  # fmt: skip
def slopes(
    q_ptr, k_ptr, erase_ptr, v_ptr, u_ptr, d_out_ptr, gate_ptr, beta_ptr, documents_ptr, through_ptr, states_ptr, d_states_ptr, d_q_ptr,
    d_k_ptr, d_erase_ptr, d_gate_ptr, d_beta_ptr,
    q_stride_b, q_stride_h, q_stride_row, k_stride_b, k_stride_h, k_stride_row, erase_stride_b, erase_stride_h, erase_stride_row,
    v_stride_b, v_stride_h, v_stride_row, u_stride_b,
    u_stride_h, u_stride_row, d_out_stride_b, d_out_stride_h, d_out_stride_row, gate_stride_b, beta_stride_b, documents_stride_b,
    q_first, q_rows, length, heads, chunks, width_v, levels, scale,
    READERS: tl.constexpr, Q_SHARED: tl.constexpr, K_SHARED: tl.constexpr, ERASE_SHARED: tl.constexpr, V_SHARED: tl.constexpr,
    U_SHARED: tl.constexpr, GATE_SHARED: tl.constexpr, BETA_SHARED: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr, DELTA: tl.constexpr, ERASES: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``d_q (states * READERS, q_rows, WIDTH)``, ``d_k`` and ``d_erase (states, length, WIDTH)`` and that of log decays; where columns
    are added up in these and in ``d_beta``, the sum of each block of columns: ``(states, blocks, length)``. One program a block of columns
    of a chunk.
    ``width_v`` and ``levels``: see ``make_pairs``."""
    q_stride_row, k_stride_row = q_stride_row // ALIGN * ALIGN, k_stride_row // ALIGN * ALIGN
    v_stride_row, u_stride_row = v_stride_row // ALIGN * ALIGN, u_stride_row // ALIGN * ALIGN
    d_out_stride_row = d_out_stride_row // ALIGN * ALIGN
    PARTS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    part = tl.program_id(0) % PARTS
    chunk = tl.program_id(0) // PARTS % chunks
    line = (tl.program_id(0) // PARTS // chunks).to(tl.int64)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    begin, ranks = chunk * CHUNK, tl.arange(0, CHUNK)
    GATES: tl.constexpr = WIDTH if VECTOR else 1
    gate_ptr = line_of(gate_ptr, line, heads, gate_stride_b, length.to(tl.int64) * GATES, GATE_SHARED)
    beta_ptr = line_of(beta_ptr, line, heads, beta_stride_b, length.to(tl.int64), BETA_SHARED)
    k_ptr = line_of(k_ptr, line, heads, k_stride_b, k_stride_h, K_SHARED)
    v_ptr = line_of(v_ptr, line, heads, v_stride_b, v_stride_h, V_SHARED)
    u_ptr = line_of(u_ptr, line, heads, u_stride_b, u_stride_h, U_SHARED)
    erase_ptr = line_of(erase_ptr, line, heads, erase_stride_b, erase_stride_h, ERASE_SHARED)
    erase_stride_row = erase_stride_row // ALIGN * ALIGN
    documents_ptr += line // heads * documents_stride_b
    through_ptr += line * length * WIDTH_V
    states_ptr += (line * (chunks + 1) + chunk) * (WIDTH * WIDTH_V)
    d_states_ptr += (line * (chunks + 1) + chunk) * (WIDTH * WIDTH_V)
    document, before, last = documents_of(documents_ptr, begin, ranks, length, HAS_DOCUMENTS)
    same = document[:, None] == document[None, :]
    k = rows_at(k_ptr, begin, ranks, 0, length, k_stride_row, columns, WIDTH)

    writes = tl.zeros([CHUNK, BLOCK], tl.float32)
    read_by_k = tl.zeros([CHUNK, BLOCK], tl.float32)
    by_between = tl.zeros([CHUNK, CHUNK], tl.float32)
    by_end = tl.zeros([BLOCK], tl.float32)
    by_beta = tl.zeros([CHUNK], tl.float32)
    for start in range(0, width_v, COLUMNS):
        columns_v = start + tl.arange(0, COLUMNS)
        inside = (columns < WIDTH)[:, None] & (columns_v < WIDTH_V)[None, :]
        place = columns[:, None] * WIDTH_V + columns_v[None, :]
        u = rows_at(u_ptr, begin, ranks, 0, length, u_stride_row, columns_v, WIDTH_V)
        leaving = tl.load(d_states_ptr + WIDTH * WIDTH_V + place, mask=inside, other=0.0)
        writes += tl.dot(u, tl.trans(leaving), input_precision=PRECISION)
        by_end += tl.sum(tl.load(states_ptr + WIDTH * WIDTH_V + place, mask=inside, other=0.0) * leaving, 1)
        if DELTA:
            through = rows_at(through_ptr, begin, ranks, 0, length, WIDTH_V, columns_v, WIDTH_V)
            state = tl.load(states_ptr + place, mask=inside, other=0.0)
            read_by_k -= tl.dot(through, tl.trans(state), input_precision=PRECISION)
            by_between -= tl.dot(through, tl.trans(u), input_precision=PRECISION)
            v = rows_at(v_ptr, begin, ranks, 0, length, v_stride_row, columns_v, WIDTH_V)
            by_beta += tl.sum(through * v, 1)
    writes *= from_rows(gate_ptr, document, last, begin, ranks, length, columns, WIDTH, VECTOR)
    reads = tl.zeros([CHUNK, BLOCK], tl.float32)
    by_k = tl.zeros([CHUNK, BLOCK], tl.float32)
    rows = begin + ranks
    kept = (rows < length)[:, None] & (columns < WIDTH)[None, :]
    k_place = (line * length + begin) * WIDTH + (ranks[:, None] * WIDTH + columns[None, :])
    if DELTA:
        erase = k
        if ERASES:
            erase = rows_at(erase_ptr, begin, ranks, 0, length, erase_stride_row, columns, WIDTH)
        beta = numbers_at(beta_ptr, begin, ranks, length)
        by_between = tl.where((ranks[:, None] > ranks[None, :]) & same, by_between, 0.0)
        found, writes = _of_pairs(
            by_between, erase * beta[:, None], writes, k, gate_ptr, begin, ranks, length, columns, levels, WIDTH, VECTOR, PRECISION
        )  # fmt: skip
        read_by_k = read_by_k * to_rows(gate_ptr, document, before, begin, ranks, length, columns, WIDTH, VECTOR) + found
        by_beta = tl.where(part == 0, by_beta, 0.0) + tl.sum(erase * read_by_k, 1)
        tl.store(d_beta_ptr + (line * PARTS + part) * length + begin + ranks, by_beta, mask=begin + ranks < length)
        by_k = read_by_k * beta[:, None]
        reads = erase * by_k
        if ERASES:
            tl.store(d_erase_ptr + k_place, by_k.to(d_erase_ptr.dtype.element_ty), mask=kept)
            by_k = tl.zeros([CHUNK, BLOCK], tl.float32)
    for reader in range(READERS):
        head = line % heads * READERS + reader
        q_line = q_ptr + line // heads * q_stride_b + head // Q_SHARED * q_stride_h
        d_line = d_out_ptr + line // heads * d_out_stride_b + head * d_out_stride_h
        by_q = tl.zeros([CHUNK, BLOCK], tl.float32)
        by_pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
        for start in range(0, width_v, COLUMNS):
            columns_v = start + tl.arange(0, COLUMNS)
            inside = (columns < WIDTH)[:, None] & (columns_v < WIDTH_V)[None, :]
            state = tl.load(states_ptr + columns[:, None] * WIDTH_V + columns_v[None, :], mask=inside, other=0.0)
            u = rows_at(u_ptr, begin, ranks, 0, length, u_stride_row, columns_v, WIDTH_V)
            d_out = rows_at(d_line, begin, ranks, q_first, q_rows, d_out_stride_row, columns_v, WIDTH_V) * scale
            by_q += tl.dot(d_out, tl.trans(state), input_precision=PRECISION)
            by_pairs += tl.dot(d_out, tl.trans(u), input_precision=PRECISION)
        by_pairs = tl.where((ranks[:, None] >= ranks[None, :]) & same, by_pairs, 0.0)
        q = rows_at(q_line, begin, ranks, q_first, q_rows, q_stride_row, columns, WIDTH)
        found, writes = _of_pairs(
            by_pairs, q, writes, k, gate_ptr, begin, ranks, length, columns, levels, WIDTH, VECTOR, PRECISION
        )  # fmt: skip
        by_q = by_q * to_rows(gate_ptr, document, before, begin, ranks, length, columns, WIDTH, VECTOR) + found
        reads += q * by_q
        row = begin - q_first + ranks
        kept = ((row >= 0) & (row < q_rows))[:, None] & (columns < WIDTH)[None, :]
        q_place = ((line * READERS + reader) * q_rows + begin - q_first) * WIDTH + (ranks[:, None] * WIDTH + columns[None, :])
        tl.store(d_q_ptr + q_place, by_q.to(d_q_ptr.dtype.element_ty), mask=kept)
    kept = (rows < length)[:, None] & (columns < WIDTH)[None, :]
    tl.store(d_k_ptr + k_place, (by_k + writes).to(d_k_ptr.dtype.element_ty), mask=kept)

    by_sums = reads - k * writes
    # What begins a document is not decayed, and nothing moves a decay that is 0 in float32.
    moves = rows < length
    if HAS_DOCUMENTS:
        moves = moves & (document == document_at(documents_ptr, rows - 1, 0, length))
    if VECTOR:
        by_sums += tl.where((ranks == CHUNK - 1)[:, None], by_end[None, :], 0.0)
        by_sums = _from_each_row(by_sums, document, ranks, levels)
        gates = rows_at(gate_ptr, begin, ranks, 0, length, WIDTH, columns, WIDTH)
        tl.store(d_gate_ptr + k_place, tl.where(moves[:, None] & (gates > LEAST), by_sums, 0.0), mask=kept)
    else:
        by_row = tl.sum(by_sums, 1) + tl.where(ranks == CHUNK - 1, tl.sum(by_end, 0), 0.0)
        # Transposed, so that what is added up lies along the rows, as it is made.
        by_row = tl.sum(tl.where((ranks[:, None] >= ranks[None, :]) & same, by_row[:, None], 0.0), 0)
        gates = numbers_at(gate_ptr, begin, ranks, length)
        by_row = tl.where(moves & (gates > LEAST), by_row, 0.0)
        tl.store(d_gate_ptr + (line * PARTS + part) * length + rows, by_row, mask=rows < length)
