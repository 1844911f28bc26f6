"""Attention over picked chunks, backward, without atomics: the same inputs give the same bits.

First by queries, over the merged lists of the forward pass: dQ, and ``delta``, what a softmax is worth to the loss. Where each
chunk has a softmax of its own it has a delta of its own, ``<d out, out of the chunk>``, which is also the gradient of its weight;
it is not that of the whole row. Then by chunks, over the lists turned around: dK and dV, from all heads that share a key head.

Lines that end in ``# <- name`` are places where :mod:`sparsedsl.codegen.to_triton_selected` puts what a mask or a score needs.
"""

import triton
import triton.language as tl

from sparsedsl.codegen.kernels.selected_attention import LOG2E, aligned_rows, allowed_pairs, head_and_query, list_line

__all__ = ["selected_grad_kv", "selected_grad_q"]


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "q_stride_row", "k_stride_b", "k_stride_h", "k_stride_row", "v_stride_b", "v_stride_h",
        "v_stride_row", "out_stride_b", "out_stride_h", "out_stride_row", "grad_out_stride_b", "grad_out_stride_h",
        "grad_out_stride_row", "grad_q_stride_b", "grad_q_stride_h", "grad_q_stride_row", "first_stride_b", "first_stride_h",
        "heads", "group", "pack", "queries", "list_batch", "list_group", "weight_group", "rows", "kv_len", "tiles", "width",
        "list_width", "scale",
        # <- numbers
    ]
)  # fmt: skip
def selected_grad_q(
    q_ptr, q_stride_b, q_stride_h, q_stride_row, k_ptr, k_stride_b, k_stride_h, k_stride_row, v_ptr, v_stride_b, v_stride_h,
    v_stride_row, out_ptr, out_stride_b, out_stride_h, out_stride_row, grad_out_ptr, grad_out_stride_b, grad_out_stride_h,
    grad_out_stride_row, grad_q_ptr, grad_q_stride_b, grad_q_stride_h, grad_q_stride_row, lse_ptr, grad_lse_ptr, delta_ptr,
    weights_ptr, chunks_ptr, owners_ptr, counts_ptr, first_ptr, last_ptr, first_stride_b, first_stride_h, heads, group, pack,
    queries, list_batch, list_group, weight_group, rows, kv_len, tiles, width, list_width, scale,
    # <- called
    CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, WEIGHTED: tl.constexpr, INTERVAL: tl.constexpr, MERGED: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries, and delta. ``WEIGHTED``: ``lse`` (in units of log2) and ``delta`` are of each row and slot;
    otherwise of each row, and ``lse`` is natural."""
    tile = tl.program_id(0) % tiles  # <- tile
    bundle = tl.program_id(0) // tiles  # <- bundle
    b = bundle // (heads // pack)
    head = bundle % (heads // pack) * pack
    h, query, member, inside = head_and_query(tile, head, pack, queries, rows, ROWS)
    line = (b.to(tl.int64) * heads + h) * rows + query
    weight_line = (b.to(tl.int64) * (heads // weight_group) + h // weight_group) * rows + query
    d = tl.arange(0, BLOCK_D)
    d_v = tl.arange(0, BLOCK_DV)
    has_d = inside[:, None] & (d < HEAD_DIM)[None, :]
    has_d_v = inside[:, None] & (d_v < HEAD_DIM_V)[None, :]
    q_rows = aligned_rows(q_ptr, b, q_stride_b, h, q_stride_h, query, q_stride_row, ALIGN)
    q = tl.load(q_rows[:, None] + d[None, :], mask=has_d, other=0.0)
    grad_rows = aligned_rows(grad_out_ptr, b, grad_out_stride_b, h, grad_out_stride_h, query, grad_out_stride_row, ALIGN)
    grad_out = tl.load(grad_rows[:, None] + d_v[None, :], mask=has_d_v, other=0.0)
    lse = tl.zeros([ROWS], tl.float32)
    delta = tl.zeros([ROWS], tl.float32)
    if not WEIGHTED:
        lse = tl.load(lse_ptr + line)
        # Rows without keys have no finite LSE; their logits are -inf, whatever is taken off.
        lse = tl.where(lse > float("-inf"), lse, 0.0) * LOG2E
        out_rows = aligned_rows(out_ptr, b, out_stride_b, h, out_stride_h, query, out_stride_row, ALIGN)
        out = tl.load(out_rows[:, None] + d_v[None, :], mask=has_d_v, other=0.0)
        delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
        if HAS_GRAD_LSE:
            delta -= tl.load(grad_lse_ptr + line)
        tl.store(delta_ptr + line, delta, mask=inside)
    first = query
    last = query
    if INTERVAL:
        bounds = b.to(tl.int64) * first_stride_b + h.to(tl.int64) * first_stride_h + query
        first = tl.load(first_ptr + bounds)
        last = tl.load(last_ptr + bounds)
    kv_head = head // group
    k_ptr += tl.multiple_of(b.to(tl.int64) * k_stride_b + kv_head.to(tl.int64) * k_stride_h, ALIGN)
    v_ptr += tl.multiple_of(b.to(tl.int64) * v_stride_b + kv_head.to(tl.int64) * v_stride_h, ALIGN)
    k_stride_row = k_stride_row // ALIGN * ALIGN
    v_stride_row = v_stride_row // ALIGN * ALIGN
    key_0 = tl.arange(0, BLOCK_N)
    k_tile = key_0[:, None] * k_stride_row + d[None, :]
    v_tile = key_0[:, None] * v_stride_row + d_v[None, :]
    list_place = list_line(b, head, list_batch, heads, list_group).to(tl.int64) * tiles + tile
    count = tl.load(counts_ptr + list_place)
    chunks_ptr += list_place * list_width
    owners_ptr += list_place * list_width
    factor = scale * LOG2E
    # <- positions
    slot = tl.zeros([ROWS], tl.int32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for i in range(0, count):
        chunk = tl.load(chunks_ptr + i)
        own = inside
        if MERGED:
            own = inside & (((tl.load(owners_ptr + i) >> member) & 1) != 0)
        start = chunk.to(tl.int64) * CHUNK
        key = chunk * CHUNK + key_0
        exists = (key_0 < CHUNK) & (key < kv_len)
        k = tl.load(k_ptr + start * k_stride_row + k_tile, mask=exists[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        # <- indices
        pairs = allowed_pairs(own, key, exists, first, last, INTERVAL)  # <- mask
        s = tl.dot(q, k.T, input_precision=PRECISION) * factor  # <- logits
        s = tl.where(pairs, s, float("-inf"))
        if WEIGHTED:
            lse = tl.load(lse_ptr + line * width + slot, mask=own, other=0.0)
            lse = tl.where(lse > float("-inf"), lse, 0.0)
        p = tl.exp2(s - lse[:, None])
        v = tl.load(v_ptr + start * v_stride_row + v_tile, mask=exists[:, None] & (d_v < HEAD_DIM_V)[None, :], other=0.0)
        grad_p = tl.dot(grad_out, v.T, input_precision=PRECISION)
        if WEIGHTED:
            delta = tl.sum(p * grad_p, 1)
            tl.store(delta_ptr + line * width + slot, delta, mask=own)
        grad_s = p * (grad_p - delta[:, None])  # <- slopes
        if WEIGHTED:
            weight = tl.load(weights_ptr + weight_line * width + slot, mask=own, other=0.0)
            # <- weighed
            acc += tl.dot(grad_s.to(k.dtype), k, input_precision=PRECISION) * weight[:, None]
        else:
            acc = tl.dot(grad_s.to(k.dtype), k, acc, input_precision=PRECISION)
        # <- sums
        slot += own.to(tl.int32)
    # <- results
    grad_at = b.to(tl.int64) * grad_q_stride_b + h.to(tl.int64) * grad_q_stride_h + query.to(tl.int64) * grad_q_stride_row
    tl.store((grad_q_ptr + grad_at)[:, None] + d[None, :], (acc * scale).to(grad_q_ptr.dtype.element_ty), mask=has_d)


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "q_stride_row", "k_stride_b", "k_stride_h", "k_stride_row", "v_stride_b", "v_stride_h",
        "v_stride_row", "grad_out_stride_b", "grad_out_stride_h", "grad_out_stride_row", "grad_k_stride_b", "grad_k_stride_h",
        "grad_k_stride_row", "grad_v_stride_b", "grad_v_stride_h", "grad_v_stride_row", "first_stride_b", "first_stride_h",
        "heads", "group", "pack", "list_batch", "list_group", "weight_group", "rows", "kv_len", "blocks", "width", "scale",
        # <- numbers
    ]
)  # fmt: skip
def selected_grad_kv(
    q_ptr, q_stride_b, q_stride_h, q_stride_row, k_ptr, k_stride_b, k_stride_h, k_stride_row, v_ptr, v_stride_b, v_stride_h,
    v_stride_row, grad_out_ptr, grad_out_stride_b, grad_out_stride_h, grad_out_stride_row, grad_k_ptr, grad_k_stride_b,
    grad_k_stride_h, grad_k_stride_row, grad_v_ptr, grad_v_stride_b, grad_v_stride_h, grad_v_stride_row, lse_ptr, delta_ptr,
    weights_ptr, starts_ptr, places_ptr, first_ptr, last_ptr, first_stride_b, first_stride_h, heads, group, pack, list_batch,
    list_group, weight_group, rows, kv_len, blocks, width, scale,
    # <- called
    CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, WEIGHTED: tl.constexpr, INTERVAL: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of ``BLOCK_N`` keys of one chunk and key head; chunks that no query picked get zeros."""
    parts: tl.constexpr = (CHUNK + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(0) % parts
    chunk = tl.program_id(0) // parts % blocks
    bh = tl.program_id(0) // parts // blocks
    b = bh // (heads // group)
    kv_head = bh % (heads // group)
    d = tl.arange(0, BLOCK_D)
    d_v = tl.arange(0, BLOCK_DV)
    key_0 = part * BLOCK_N + tl.arange(0, BLOCK_N)
    key = chunk * CHUNK + key_0
    exists = (key_0 < CHUNK) & (key < kv_len)
    has_d = exists[:, None] & (d < HEAD_DIM)[None, :]
    has_d_v = exists[:, None] & (d_v < HEAD_DIM_V)[None, :]
    k_rows = aligned_rows(k_ptr, b, k_stride_b, kv_head, k_stride_h, key, k_stride_row, ALIGN)
    k = tl.load(k_rows[:, None] + d[None, :], mask=has_d, other=0.0)
    v_rows = aligned_rows(v_ptr, b, v_stride_b, kv_head, v_stride_h, key, v_stride_row, ALIGN)
    v = tl.load(v_rows[:, None] + d_v[None, :], mask=has_d_v, other=0.0)
    factor = scale * LOG2E
    # Rows of a step: some entries of the chunk's list, each with all heads of a pack.
    line_0 = tl.arange(0, ROWS)
    step = ROWS // pack
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for bundle in range(0, group // pack):
        head = kv_head * group + bundle * pack
        list_place = list_line(b, head, list_batch, heads, list_group).to(tl.int64)
        starts = starts_ptr + list_place * (blocks + 1) + chunk
        begin = tl.load(starts)
        end = tl.load(starts + 1)
        entries = places_ptr + list_place * rows * width
        h = head + line_0 % pack
        weight_at = (b.to(tl.int64) * (heads // weight_group) + h // weight_group) * rows * width
        line_at = (b.to(tl.int64) * heads + h) * rows
        # <- positions
        for entry_0 in range(begin, end, step):
            entry = entry_0 + line_0 // pack
            own = (line_0 // pack < step) & (entry < end)
            place = tl.load(entries + entry, mask=own, other=0)
            query = place // width
            q_rows = aligned_rows(q_ptr, b, q_stride_b, h, q_stride_h, query, q_stride_row, ALIGN)
            q = tl.load(q_rows[:, None] + d[None, :], mask=own[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
            g_rows = aligned_rows(grad_out_ptr, b, grad_out_stride_b, h, grad_out_stride_h, query, grad_out_stride_row, ALIGN)
            grad_out = tl.load(g_rows[:, None] + d_v[None, :], mask=own[:, None] & (d_v < HEAD_DIM_V)[None, :], other=0.0)
            # Rows that do not exist or have no keys get weights of zero; keys that do not exist are not stored.
            at = line_at * width + place if WEIGHTED else line_at + query
            lse = tl.load(lse_ptr + at, mask=own, other=float("-inf"))
            delta = tl.load(delta_ptr + at, mask=own, other=0.0)
            lse = tl.where(lse > float("-inf"), lse if WEIGHTED else lse * LOG2E, float("inf"))
            # <- indices
            s = tl.dot(k, q.T, input_precision=PRECISION) * factor  # <- logits
            if INTERVAL:
                bounds = b.to(tl.int64) * first_stride_b + h.to(tl.int64) * first_stride_h + query
                first = tl.load(first_ptr + bounds)
                last = tl.load(last_ptr + bounds)
                s = tl.where((key[:, None] >= first[None, :]) & (key[:, None] <= last[None, :]), s, float("-inf"))
            # <- mask
            p = tl.exp2(s - lse[None, :])
            grad_p = tl.dot(v, grad_out.T, input_precision=PRECISION)
            grad_s = p * (grad_p - delta[None, :])  # <- slopes
            if WEIGHTED:
                weight = tl.load(weights_ptr + weight_at + place, mask=own, other=0.0)
                # <- weighed
                p = p * weight[None, :]
                grad_s = grad_s * weight[None, :]
            grad_v = tl.dot(p.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
            grad_k = tl.dot(grad_s.to(q.dtype), q, grad_k, input_precision=PRECISION)
            # <- sums
        # <- results
    k_at = b.to(tl.int64) * grad_k_stride_b + kv_head.to(tl.int64) * grad_k_stride_h + key.to(tl.int64) * grad_k_stride_row
    tl.store((grad_k_ptr + k_at)[:, None] + d[None, :], (grad_k * scale).to(grad_k_ptr.dtype.element_ty), mask=has_d)
    v_at = b.to(tl.int64) * grad_v_stride_b + kv_head.to(tl.int64) * grad_v_stride_h + key.to(tl.int64) * grad_v_stride_row
    tl.store((grad_v_ptr + v_at)[:, None] + d_v[None, :], grad_v.to(grad_v_ptr.dtype.element_ty), mask=has_d_v)
