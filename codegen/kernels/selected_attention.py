"""Attention over picked chunks, forward: the queries of a tile read the union of their chunks once.

A tile is ``queries * pack`` rows: ``pack`` adjacent query heads that share list and key head, ``queries`` adjacent queries. Its
chunks come as a merged list, ascending; with each chunk the queries that picked it, as bits. Lists ascend and hold a chunk once,
so the slot at which a row holds a chunk is the number of its own chunks met before: a counter a row, and no table of slots.

``WEIGHTED``: a softmax of its own for every row and chunk, times the row's weight of the slot; nothing is rescaled from chunk to
chunk. Otherwise one softmax over all chunks, summed online. Where queries are few, programs share the slots of a row and
``selected_merge`` puts their results together. Logits are in units of log2.

Lines that end in ``# <- name`` are places where :mod:`sparsedsl.codegen.to_triton_selected` puts what a mask or a score needs.
"""

import triton
import triton.language as tl

__all__ = ["LOG2E", "aligned_rows", "allowed_pairs", "head_and_query", "list_line", "selected_forward", "selected_merge"]

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def head_and_query(tile, head, pack, queries, rows, ROWS: tl.constexpr):
    """Query head, query (within the call), place among the tile's queries and existence of each row of a tile."""
    line = tl.arange(0, ROWS)
    member = line // pack
    query = tile * queries + member
    exists = (member < queries) & (query < rows)
    return head + line % pack, tl.minimum(query, rows - 1), member, exists


@triton.jit
def aligned_rows(ptr, b, stride_b, h, stride_h, row, stride_row, ALIGN: tl.constexpr):
    """Pointers to rows ``(b, h, row)``; that they lie ``ALIGN`` apart is written out, or no load would be wider than a number."""
    at = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + row.to(tl.int64) * stride_row
    return ptr + at // ALIGN * ALIGN


@triton.jit
def list_line(b, head, list_batch, heads, list_group):
    """Which of the index lists ``(list_batch, heads // list_group)`` a batch entry and query head read."""
    return tl.where(list_batch > 1, b, 0) * (heads // list_group) + head // list_group


@triton.jit
def allowed_pairs(own, key, exists, first, last, INTERVAL: tl.constexpr):
    """Pairs (row, key) that attend: the row owns the chunk, the key exists and lies in the row's interval."""
    pairs = own[:, None] & exists[None, :]
    if INTERVAL:
        pairs = pairs & (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
    return pairs


@triton.jit
def log_of_sum(total):
    """Natural logarithm of weights' sums; -inf where there are none."""
    return tl.where(total != 0, tl.log(tl.where(total != 0, total, 1.0)), float("-inf"))


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "q_stride_row", "k_stride_b", "k_stride_h", "k_stride_row", "v_stride_b", "v_stride_h",
        "v_stride_row", "out_stride_s", "out_stride_b", "out_stride_h", "out_stride_row", "first_stride_b", "first_stride_h",
        "heads", "group", "pack", "queries", "list_batch", "list_group", "weight_group", "rows", "kv_len", "tiles", "width",
        "list_width", "splits", "scale",
        # <- numbers
    ]
)  # fmt: skip
def selected_forward(
    q_ptr, q_stride_b, q_stride_h, q_stride_row, k_ptr, k_stride_b, k_stride_h, k_stride_row, v_ptr, v_stride_b, v_stride_h,
    v_stride_row, out_ptr, out_stride_s, out_stride_b, out_stride_h, out_stride_row, lse_ptr, slot_lse_ptr, weights_ptr,
    chunks_ptr, owners_ptr, counts_ptr, first_ptr, last_ptr, first_stride_b, first_stride_h, heads, group, pack, queries,
    list_batch, list_group, weight_group, rows, kv_len, tiles, width, list_width, splits, scale,
    # <- called
    CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, ROWS: tl.constexpr, WEIGHTED: tl.constexpr, SOFTMAX1: tl.constexpr, INTERVAL: tl.constexpr, MERGED: tl.constexpr,
    SAVE: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and LSE of one tile of queries, with ``SPLIT`` of a share of its slots: the LSE of a weighted share is the sum of its
    weights. ``SAVE``: ``slot_lse``, that of each row and slot, is written for the backward pass."""
    share = tl.program_id(0) % splits
    tile = tl.program_id(0) // splits % tiles
    bundle = tl.program_id(0) // splits // tiles
    b = bundle // (heads // pack)
    head = bundle % (heads // pack) * pack
    h, query, member, inside = head_and_query(tile, head, pack, queries, rows, ROWS)
    line = (b.to(tl.int64) * heads + h) * rows + query
    weight_line = (b.to(tl.int64) * (heads // weight_group) + h // weight_group) * rows + query
    d = tl.arange(0, BLOCK_D)
    d_v = tl.arange(0, BLOCK_DV)
    q_rows = aligned_rows(q_ptr, b, q_stride_b, h, q_stride_h, query, q_stride_row, ALIGN)
    q = tl.load(q_rows[:, None] + d[None, :], mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
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
    begin = count * share // splits
    end = count * (share + 1) // splits
    chunks_ptr += list_place * list_width
    owners_ptr += list_place * list_width
    factor = scale * LOG2E
    # <- positions
    most = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SOFTMAX1 and not WEIGHTED:
        # The zero logit is one more key with the value zero; one share of a row has it.
        most = tl.where(share == 0, tl.zeros([ROWS], tl.float32), most)
        total = tl.where(share == 0, total + 1.0, total)
    # Where programs share the slots of a row there is one query a tile, and a place in the list is the slot.
    slot = tl.zeros([ROWS], tl.int32) + begin
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for i in range(begin, end):
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
        v = tl.load(v_ptr + start * v_stride_row + v_tile, mask=exists[:, None] & (d_v < HEAD_DIM_V)[None, :], other=0.0)
        top = tl.max(s, 1)
        if WEIGHTED:
            found = top > float("-inf")
            top = tl.maximum(top, 0.0 if SOFTMAX1 else LOWEST)
            p = tl.exp2(s - top[:, None])
            mass = tl.sum(p, 1)
            if SOFTMAX1:
                mass += tl.exp2(-top)
            mass = tl.where(found, mass, 1.0)
            weight = tl.load(weights_ptr + weight_line * width + slot, mask=own, other=0.0)
            total += weight
            # Weighted after the product: a weight may lie outside the range of the values' type.
            acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (weight / mass)[:, None]
            if SAVE:
                slot_lse = tl.where(found, top + tl.log2(mass), float("-inf"))
                tl.store(slot_lse_ptr + line * width + slot, slot_lse, mask=own)
        else:
            larger = tl.maximum(most, top)
            shrink = tl.exp2(most - larger)
            p = tl.exp2(s - larger[:, None])
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
            most = larger
        slot += own.to(tl.int32)
    if WEIGHTED:
        lse = total if SPLIT else log_of_sum(total)
    else:
        found = total > 0
        total = tl.where(found, total, 1.0)
        acc = acc / total[:, None]
        lse = tl.where(found, (most + tl.log2(total)) * LN2, float("-inf"))
    out_at = b.to(tl.int64) * out_stride_b + h.to(tl.int64) * out_stride_h + query.to(tl.int64) * out_stride_row
    out_rows = out_ptr + share.to(tl.int64) * out_stride_s + out_at
    has_d_v = inside[:, None] & (d_v < HEAD_DIM_V)[None, :]
    tl.store(out_rows[:, None] + d_v[None, :], acc.to(out_ptr.dtype.element_ty), mask=has_d_v)
    lines = tl.num_programs(0).to(tl.int64) // splits // tiles * pack * rows
    tl.store(lse_ptr + share * lines + line, lse, mask=inside)


@triton.jit(do_not_specialize=["lines", "splits", "rows", "heads", "out_stride_b", "out_stride_h", "out_stride_row"])
def selected_merge(
    share_ptr, share_lse_ptr, out_ptr, lse_ptr, lines, splits, rows, heads, out_stride_b, out_stride_h, out_stride_row,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """The shares ``(splits, lines, HEAD_DIM_V)`` of one query and head, put together."""
    line = tl.program_id(0).to(tl.int64)
    d_v = tl.arange(0, BLOCK_DV)
    exists = d_v < HEAD_DIM_V
    top = tl.full([1], LOWEST, tl.float32)
    if not WEIGHTED:
        for share in range(0, splits):
            top = tl.maximum(top, tl.load(share_lse_ptr + share * lines + line))
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for share in range(0, splits):
        at = share * lines + line
        part = tl.load(share_ptr + at * HEAD_DIM_V + d_v, mask=exists, other=0.0)
        lse = tl.load(share_lse_ptr + at)
        if WEIGHTED:
            total += lse
            acc += part
        else:
            weight = tl.exp(lse - top)
            total += weight
            acc += part * weight
    if WEIGHTED:
        lse = log_of_sum(total)
    else:
        found = total > 0
        total = tl.where(found, total, 1.0)
        acc = acc / total
        lse = tl.where(found, top + tl.log(total), float("-inf"))
    query = line % rows
    bh = line // rows
    out_at = bh // heads * out_stride_b + bh % heads * out_stride_h + query * out_stride_row
    tl.store(out_ptr + out_at + d_v, acc.to(out_ptr.dtype.element_ty), mask=exists)
    tl.store(lse_ptr + line + tl.arange(0, 1), lse)
