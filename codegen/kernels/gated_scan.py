"""Linear attention whose decays come with the data, and the delta rule: the forward pass, and a few tokens one by one.

With ``a_t = e^(g_t)``, a number a key or one for each of its channels: ``Sd = a_t S_(t-1)``, ``u_t = v_t`` or, by the delta rule,
``beta_t (v_t - e_t Sd)``, ``S_t = Sd + k_t^T u_t``, ``out_t = scale q_t S_t``; ``e_t`` is ``k_t`` unless it ``ERASES``. In a
chunk, with ``c`` the sums of ``g`` from its begin::

    M_ij = q_i . k_j e^(c_i - c_j)  (j <= i)        N_ij = beta_i e_i . k_j e^(c_i - c_j)  (j < i)        T = (I + N)^-1
    U = V, or T beta (V - e e^c S)                  O = scale (q e^c S + M U)                    S' = e^(c_C) S + (k e^(c_C - c))^T U

:func:`make_pairs` makes M and T of all chunks at a time, :func:`write_states` goes from chunk to chunk, :func:`read_states` makes the
results of all chunks at a time. Decays may be as strong as they like: exp is taken of sums of log decays between the two rows
themselves, never of a difference of sums. Where channels have decays of their own, pairs are split as in ``slot_scan``: each level of
its tree is a product of two factors of at most 1. T is found row by row in float32: entries of powers of N grow beyond what numbers hold.

The state, u and all sums are float32. A tensor of fewer heads is read by neighbouring states: head ``state // .._SHARED``. Each state
has ``READERS`` heads of results; head h of these reads query head ``h // Q_SHARED``. Rows behind the last are zeros: they keep the state.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparsedsl.codegen.kernels.linear_scan import document_at, product, rows_at
from sparsedsl.codegen.kernels.slot_scan import across, halves

__all__ = [
    "LEAST",
    "documents_of",
    "from_rows",
    "line_of",
    "make_pairs",
    "numbers_at",
    "over_all",
    "pair_decays",
    "read_states",
    "step",
    "to_rows",
    "write_states",
]

# A decay by less is 0 in float32, and sums of such logarithms are finite.
LEAST = tl.constexpr(-110.0)


@triton.jit
def line_of(ptr, line, heads, stride_b, stride_h, SHARED: tl.constexpr):
    """Where the head of a tensor lies that a state reads."""
    return ptr + line // heads * stride_b + line % heads // SHARED * stride_h


@triton.jit
def numbers_at(ptr, begin, ranks, rows):
    """A number for each row from ``begin`` on; 0 behind the last."""
    return tl.load(ptr + begin + ranks, mask=begin + ranks < rows, other=0.0)


@triton.jit
def documents_of(ptr, begin, ranks, length, HAS_DOCUMENTS: tl.constexpr):
    """Documents of a chunk's rows, of the row before it and of its last row; all the same where there are none."""
    if HAS_DOCUMENTS:
        document = document_at(ptr, begin + ranks, 0, length)
        return document, document_at(ptr, begin - 1, 0, length), document_at(ptr, begin + ranks.shape[0] - 1, 0, length)
    else:
        one = tl.full([], 0, tl.int32)
        return tl.zeros([ranks.shape[0]], tl.int32), one, one


@triton.jit
def _gates(gate_ptr, begin, ranks, rows, columns, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """Log decays (rows, columns); without ``VECTOR`` columns share them: (rows, 1)."""
    if VECTOR:
        return tl.maximum(rows_at(gate_ptr, begin, ranks, 0, rows, WIDTH, columns, WIDTH), LEAST)
    else:
        return tl.maximum(numbers_at(gate_ptr, begin, ranks, rows), LEAST)[:, None]


@triton.jit
def to_rows(gate_ptr, document, before, begin, ranks, length, columns, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """Decays from the begin of a chunk to each row; 0 where a document begins between. Made where they are used: kept in registers, they
    would drive out others."""
    gates = _gates(gate_ptr, begin, ranks, length, columns, WIDTH, VECTOR)
    return tl.where((document == before)[:, None], tl.exp(tl.cumsum(gates, 0)), 0.0)


@triton.jit
def from_rows(gate_ptr, document, last, begin, ranks, length, columns, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """Decays from each row to the end of a chunk."""
    end = tl.minimum(begin + ranks.shape[0], length)
    following = _gates(gate_ptr, begin + 1, ranks, end, columns, WIDTH, VECTOR)
    return tl.where((document == last)[:, None], tl.exp(tl.cumsum(following, 0, reverse=True)), 0.0)


@triton.jit
def over_all(gate_ptr, before, last, begin, ranks, length, columns, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """Decays over a whole chunk: (columns, 1), or (1, 1)."""
    gates = _gates(gate_ptr, begin, ranks, length, columns, WIDTH, VECTOR)
    return tl.where(before == last, tl.exp(tl.sum(gates, 0)), 0.0)[:, None]


@triton.jit
def pair_decays(gate_ptr, begin, ranks, length):
    """The decay on the way from row j to row i, one number a key; 0 for j > i."""
    gates = tl.maximum(numbers_at(gate_ptr, begin, ranks, length), LEAST)
    between = tl.cumsum(tl.where(ranks[:, None] > ranks[None, :], gates[:, None], 0.0), 0)
    return tl.where(ranks[:, None] >= ranks[None, :], tl.exp(between), 0.0)


@triton.jit
def _pairs(
    x_ptr, k_ptr, gate_ptr, begin, ranks, length, x_first, x_rows, x_stride, k_stride, width, levels, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``x_i . k_j`` times the decay between them for j <= i; of others, anything."""
    found = tl.zeros([ranks.shape[0], ranks.shape[0]], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = rows_at(x_ptr, begin, ranks, x_first, x_rows, x_stride, columns, WIDTH)
        k = rows_at(k_ptr, begin, ranks, 0, length, k_stride, columns, WIDTH)
        if VECTOR:
            gates = _gates(gate_ptr, begin, ranks, length, columns, WIDTH, VECTOR)
            found += tl.where(ranks[:, None] == ranks[None, :], tl.sum(x * k, 1)[:, None], 0.0)
            before, after = gates, tl.zeros_like(gates)
            for level in range(levels):
                to_edge, before, after = halves(before, after, ranks, level)
                split = tl.dot(x * to_edge, tl.trans(k * to_edge), input_precision=PRECISION)
                found += tl.where(across(ranks, level), split, 0.0)
        else:
            found += tl.dot(x, tl.trans(k), input_precision=PRECISION)
    if not VECTOR:
        found *= pair_decays(gate_ptr, begin, ranks, length)
    return found


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "q_stride_row", "k_stride_b", "k_stride_h", "k_stride_row", "erase_stride_b", "erase_stride_h",
        "erase_stride_row", "gate_stride_b", "beta_stride_b", "documents_stride_b", "q_first", "q_rows", "length", "heads", "chunks",
        "width", "levels",
    ]
)  # fmt: skip
def make_pairs(
    q_ptr, k_ptr, erase_ptr, gate_ptr, beta_ptr, documents_ptr, pairs_ptr, solve_ptr,
    q_stride_b, q_stride_h, q_stride_row, k_stride_b, k_stride_h, k_stride_row, erase_stride_b, erase_stride_h, erase_stride_row,
    gate_stride_b, beta_stride_b, documents_stride_b, q_first, q_rows, length, heads, chunks, width, levels,
    READERS: tl.constexpr, Q_SHARED: tl.constexpr, K_SHARED: tl.constexpr, ERASE_SHARED: tl.constexpr, GATE_SHARED: tl.constexpr,
    BETA_SHARED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr, DELTA: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``pairs (states, READERS, chunks, CHUNK, CHUNK)``: M; ``solve (states, chunks, CHUNK, CHUNK)``: T. One program a chunk of a state.
    ``width``: WIDTH, and ``levels`` of the tree over a chunk's rows, as numbers that the compiler does not know: it would unroll the
    loops, and spill."""
    q_stride_row, k_stride_row = q_stride_row // ALIGN * ALIGN, k_stride_row // ALIGN * ALIGN
    chunk = tl.program_id(0) % chunks
    line = (tl.program_id(0) // chunks).to(tl.int64)
    begin, ranks = chunk * CHUNK, tl.arange(0, CHUNK)
    GATES: tl.constexpr = WIDTH if VECTOR else 1
    gate_ptr = line_of(gate_ptr, line, heads, gate_stride_b, length.to(tl.int64) * GATES, GATE_SHARED)
    k_ptr = line_of(k_ptr, line, heads, k_stride_b, k_stride_h, K_SHARED)
    document, _, _ = documents_of(documents_ptr + line // heads * documents_stride_b, begin, ranks, length, HAS_DOCUMENTS)
    same = document[:, None] == document[None, :]
    place = ranks[:, None] * CHUNK + ranks[None, :]
    for reader in range(READERS):
        q_line = q_ptr + line // heads * q_stride_b + (line % heads * READERS + reader) // Q_SHARED * q_stride_h
        found = _pairs(
            q_line, k_ptr, gate_ptr, begin, ranks, length, q_first, q_rows, q_stride_row, k_stride_row, width, levels, WIDTH, BLOCK,
            VECTOR, PRECISION,
        )  # fmt: skip
        found = tl.where((ranks[:, None] >= ranks[None, :]) & same, found, 0.0)
        tl.store(pairs_ptr + ((line * READERS + reader) * chunks + chunk) * (CHUNK * CHUNK) + place, found)
    if DELTA:
        beta_ptr = line_of(beta_ptr, line, heads, beta_stride_b, length.to(tl.int64), BETA_SHARED)
        erase_ptr = line_of(erase_ptr, line, heads, erase_stride_b, erase_stride_h, ERASE_SHARED)
        erase_stride_row = erase_stride_row // ALIGN * ALIGN
        lower = _pairs(
            erase_ptr, k_ptr, gate_ptr, begin, ranks, length, 0, length, erase_stride_row, k_stride_row, width, levels, WIDTH, BLOCK,
            VECTOR, PRECISION,
        )  # fmt: skip
        lower = (
            tl.where((ranks[:, None] > ranks[None, :]) & same, lower, 0.0) * numbers_at(beta_ptr, begin, ranks, length)[:, None]
        )
        solve = tl.where(ranks[:, None] == ranks[None, :], 1.0, 0.0)
        for row in range(1, CHUNK):
            own = ranks[:, None] == row
            taken = tl.sum(tl.where(own, lower, 0.0), 0)
            solve = tl.where(own, solve - tl.sum(taken[:, None] * solve, 0)[None, :], solve)
        tl.store(solve_ptr + (line * chunks + chunk) * (CHUNK * CHUNK) + place, solve)


@triton.jit(
    do_not_specialize=[
        "k_stride_b", "k_stride_h", "k_stride_row", "erase_stride_b", "erase_stride_h", "erase_stride_row", "v_stride_b", "v_stride_h",
        "v_stride_row", "gate_stride_b", "beta_stride_b", "documents_stride_b", "length", "heads", "chunks",
    ]
)  # fmt: skip
def write_states(
    k_ptr, erase_ptr, v_ptr, gate_ptr, beta_ptr, documents_ptr, solve_ptr, initial_ptr, written_ptr, states_ptr,
    k_stride_b, k_stride_h, k_stride_row, erase_stride_b, erase_stride_h, erase_stride_row, v_stride_b, v_stride_h, v_stride_row,
    gate_stride_b, beta_stride_b, documents_stride_b, length, heads, chunks,
    K_SHARED: tl.constexpr, ERASE_SHARED: tl.constexpr, V_SHARED: tl.constexpr, GATE_SHARED: tl.constexpr, BETA_SHARED: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
    VECTOR: tl.constexpr, DELTA: tl.constexpr, ERASES: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``states (states, chunks + 1, WIDTH, WIDTH_V)`` before each chunk and after the last; by the delta rule ``written (states, length,
    WIDTH_V)``: u. One program ``COLUMNS`` columns of a state."""
    k_stride_row, v_stride_row = k_stride_row // ALIGN * ALIGN, v_stride_row // ALIGN * ALIGN
    PARTS: tl.constexpr = (WIDTH_V + COLUMNS - 1) // COLUMNS
    line = (tl.program_id(0) // PARTS).to(tl.int64)
    columns, columns_v = tl.arange(0, WHOLE), tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    GATES: tl.constexpr = WIDTH if VECTOR else 1
    gate_ptr = line_of(gate_ptr, line, heads, gate_stride_b, length.to(tl.int64) * GATES, GATE_SHARED)
    beta_ptr = line_of(beta_ptr, line, heads, beta_stride_b, length.to(tl.int64), BETA_SHARED)
    k_ptr = line_of(k_ptr, line, heads, k_stride_b, k_stride_h, K_SHARED)
    v_ptr = line_of(v_ptr, line, heads, v_stride_b, v_stride_h, V_SHARED)
    erase_ptr = line_of(erase_ptr, line, heads, erase_stride_b, erase_stride_h, ERASE_SHARED)
    erase_stride_row = erase_stride_row // ALIGN * ALIGN
    documents_ptr += line // heads * documents_stride_b
    ranks = tl.arange(0, CHUNK)
    inside = (columns < WIDTH)[:, None] & (columns_v < WIDTH_V)[None, :]
    place = columns[:, None] * WIDTH_V + columns_v[None, :]
    states_ptr += line * (chunks + 1) * (WIDTH * WIDTH_V)
    state = tl.zeros([WHOLE, COLUMNS], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial_ptr + line * (WIDTH * WIDTH_V) + place, mask=inside, other=0.0)
    for chunk in range(chunks):
        tl.store(states_ptr + place, state, mask=inside)
        states_ptr += WIDTH * WIDTH_V
        begin = chunk * CHUNK
        document, before, last = documents_of(documents_ptr, begin, ranks, length, HAS_DOCUMENTS)
        k = rows_at(k_ptr, begin, ranks, 0, length, k_stride_row, columns, WIDTH)
        u = rows_at(v_ptr, begin, ranks, 0, length, v_stride_row, columns_v, WIDTH_V)
        if DELTA:
            beta = numbers_at(beta_ptr, begin, ranks, length)
            solve = tl.load(solve_ptr + (line * chunks + chunk) * (CHUNK * CHUNK) + (ranks[:, None] * CHUNK + ranks[None, :]))
            reach = to_rows(gate_ptr, document, before, begin, ranks, length, columns, WIDTH, VECTOR)
            erase = k
            if ERASES:
                erase = rows_at(erase_ptr, begin, ranks, 0, length, erase_stride_row, columns, WIDTH)
            error = (u - product(erase * reach, state, PRECISION)) * beta[:, None]
            u = tl.dot(solve, error, input_precision=PRECISION)
            kept = (begin + ranks < length)[:, None] & (columns_v < WIDTH_V)[None, :]
            rows = (line * length + begin) * WIDTH_V + (ranks[:, None] * WIDTH_V + columns_v[None, :])
            tl.store(written_ptr + rows, u, mask=kept)
        left = from_rows(gate_ptr, document, last, begin, ranks, length, columns, WIDTH, VECTOR)
        state *= over_all(gate_ptr, before, last, begin, ranks, length, columns, WIDTH, VECTOR)
        state += tl.dot(tl.trans(k * left), u, input_precision=PRECISION)
    tl.store(states_ptr + place, state, mask=inside)


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "q_stride_row", "u_stride_b", "u_stride_h", "u_stride_row", "gate_stride_b", "documents_stride_b",
        "q_first", "q_rows", "length", "heads", "chunks", "first_chunk", "read_chunk_count", "scale",
    ]
)  # fmt: skip
def read_states(
    q_ptr, u_ptr, gate_ptr, documents_ptr, pairs_ptr, states_ptr, out_ptr,
    q_stride_b, q_stride_h, q_stride_row, u_stride_b, u_stride_h, u_stride_row, gate_stride_b, documents_stride_b,
    q_first, q_rows, length, heads, chunks, first_chunk, read_chunk_count, scale,
    READERS: tl.constexpr, Q_SHARED: tl.constexpr, U_SHARED: tl.constexpr, GATE_SHARED: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``out (states * READERS, q_rows, WIDTH_V)``. One program ``COLUMNS`` columns of a chunk and head of results."""
    q_stride_row, u_stride_row = q_stride_row // ALIGN * ALIGN, u_stride_row // ALIGN * ALIGN
    PARTS: tl.constexpr = (WIDTH_V + COLUMNS - 1) // COLUMNS
    part = tl.program_id(0) % PARTS
    chunk = tl.program_id(0) // PARTS % read_chunk_count + first_chunk
    reader = (tl.program_id(0) // PARTS // read_chunk_count).to(tl.int64)
    line = reader // READERS
    columns, columns_v = tl.arange(0, WHOLE), part * COLUMNS + tl.arange(0, COLUMNS)
    begin, ranks = chunk * CHUNK, tl.arange(0, CHUNK)
    GATES: tl.constexpr = WIDTH if VECTOR else 1
    gate_ptr = line_of(gate_ptr, line, heads, gate_stride_b, length.to(tl.int64) * GATES, GATE_SHARED)
    q_ptr += line // heads * q_stride_b + reader % (heads * READERS) // Q_SHARED * q_stride_h
    u_ptr = line_of(u_ptr, line, heads, u_stride_b, u_stride_h, U_SHARED)
    documents_ptr += line // heads * documents_stride_b
    document, before, _ = documents_of(documents_ptr, begin, ranks, length, HAS_DOCUMENTS)
    reach = to_rows(gate_ptr, document, before, begin, ranks, length, columns, WIDTH, VECTOR)
    inside = (columns < WIDTH)[:, None] & (columns_v < WIDTH_V)[None, :]
    state = tl.load(
        states_ptr + (line * (chunks + 1) + chunk) * (WIDTH * WIDTH_V) + (columns[:, None] * WIDTH_V + columns_v[None, :]),
        mask=inside, other=0.0,
    )  # fmt: skip
    q = rows_at(q_ptr, begin, ranks, q_first, q_rows, q_stride_row, columns, WIDTH)
    found = product(q * reach, state, PRECISION)
    u = rows_at(u_ptr, begin, ranks, 0, length, u_stride_row, columns_v, WIDTH_V)
    pairs = tl.load(pairs_ptr + (reader * chunks + chunk) * (CHUNK * CHUNK) + (ranks[:, None] * CHUNK + ranks[None, :]))
    found = (found + tl.dot(pairs, u, input_precision=PRECISION)) * scale
    row = begin - q_first + ranks
    kept = ((row >= 0) & (row < q_rows))[:, None] & (columns_v < WIDTH_V)[None, :]
    out_ptr += (reader * q_rows + begin - q_first) * WIDTH_V
    tl.store(out_ptr + (ranks[:, None] * WIDTH_V + columns_v[None, :]), found.to(out_ptr.dtype.element_ty), mask=kept)


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "q_stride_row", "k_stride_b", "k_stride_h", "k_stride_row", "erase_stride_b", "erase_stride_h",
        "erase_stride_row", "v_stride_b", "v_stride_h", "v_stride_row", "gate_stride_b", "beta_stride_b", "documents_stride_b", "q_first",
        "q_rows", "length", "heads", "scale",
    ]
)  # fmt: skip
def step(
    q_ptr, k_ptr, erase_ptr, v_ptr, gate_ptr, beta_ptr, documents_ptr, initial_ptr, states_ptr, out_ptr,
    q_stride_b, q_stride_h, q_stride_row, k_stride_b, k_stride_h, k_stride_row, erase_stride_b, erase_stride_h, erase_stride_row,
    v_stride_b, v_stride_h, v_stride_row, gate_stride_b, beta_stride_b, documents_stride_b, q_first, q_rows, length, heads, scale,
    READERS: tl.constexpr, Q_SHARED: tl.constexpr, K_SHARED: tl.constexpr, ERASE_SHARED: tl.constexpr, V_SHARED: tl.constexpr,
    GATE_SHARED: tl.constexpr, BETA_SHARED: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr, VECTOR: tl.constexpr, DELTA: tl.constexpr, ERASES: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The recurrence as it is written, token by token: ``out``, and the state ``(states, WIDTH, WIDTH_V)`` after the last. One program
    ``COLUMNS`` columns of a state."""
    PARTS: tl.constexpr = (WIDTH_V + COLUMNS - 1) // COLUMNS
    line = (tl.program_id(0) // PARTS).to(tl.int64)
    columns, columns_v = tl.arange(0, WHOLE), tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    real, real_v = columns < WIDTH, columns_v < WIDTH_V
    GATES: tl.constexpr = WIDTH if VECTOR else 1
    gate_ptr = line_of(gate_ptr, line, heads, gate_stride_b, length.to(tl.int64) * GATES, GATE_SHARED)
    beta_ptr = line_of(beta_ptr, line, heads, beta_stride_b, length.to(tl.int64), BETA_SHARED)
    k_ptr = line_of(k_ptr, line, heads, k_stride_b, k_stride_h, K_SHARED)
    v_ptr = line_of(v_ptr, line, heads, v_stride_b, v_stride_h, V_SHARED)
    erase_ptr = line_of(erase_ptr, line, heads, erase_stride_b, erase_stride_h, ERASE_SHARED)
    documents_ptr += line // heads * documents_stride_b
    inside = real[:, None] & real_v[None, :]
    place = line * (WIDTH * WIDTH_V) + (columns[:, None] * WIDTH_V + columns_v[None, :])
    state = tl.zeros([WHOLE, COLUMNS], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial_ptr + place, mask=inside, other=0.0)
    for token in range(length):
        k = tl.load(k_ptr + token * k_stride_row + columns, mask=real, other=0.0).to(tl.float32)
        u = tl.load(v_ptr + token * v_stride_row + columns_v, mask=real_v, other=0.0).to(tl.float32)
        if VECTOR:
            state *= tl.exp(tl.load(gate_ptr + token * WIDTH + columns, mask=real, other=0.0))[:, None]
        else:
            state *= tl.exp(tl.load(gate_ptr + token))
        if HAS_DOCUMENTS:
            new = document_at(documents_ptr, token, 0, length) != document_at(documents_ptr, token - 1, 0, length)
            state = tl.where(new, 0.0, state)
        if DELTA:
            erase = k
            if ERASES:
                erase = tl.load(erase_ptr + token * erase_stride_row + columns, mask=real, other=0.0).to(tl.float32)
            u = (u - tl.sum(erase[:, None] * state, 0)) * tl.load(beta_ptr + token)
        state += k[:, None] * u[None, :]
        row = token - q_first
        if (row >= 0) & (row < q_rows):
            for reader in range(READERS):
                head = line % heads * READERS + reader
                q_line = q_ptr + line // heads * q_stride_b + head // Q_SHARED * q_stride_h + row * q_stride_row
                q = tl.load(q_line + columns, mask=real, other=0.0).to(tl.float32)
                found = tl.sum(q[:, None] * state, 0) * scale
                out_line = out_ptr + ((line * READERS + reader) * q_rows + row) * WIDTH_V
                tl.store(out_line + columns_v, found.to(out_ptr.dtype.element_ty), mask=real_v)
    tl.store(states_ptr + place, state, mask=inside)
