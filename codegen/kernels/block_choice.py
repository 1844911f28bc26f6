"""Choosing blocks: from rows and landmarks to the list of the k best of each row, in one kernel; scores never reach memory.

A tile is ``ROWS`` rows of one head of lists. A score of a tile's row and a block is made of ``GROUP * SIZE`` products (heads of a group,
neighbouring landmarks of a block), summed up or the greatest of them, each perhaps a share of a softmax over the row.

The landmarks are gone through twice. The first time each column of a tile keeps the greatest score that it meets, one instruction a
score: as the columns are disjoint sets of blocks, at least k blocks reach the k-th greatest of these, and few more than k do. The
second time what reaches it is put into the list in place of the least that is there. Which places of a tile reach it are the bits of a
number a row; they are taken out from the lowest on, so that blocks come in ascending order and of equal scores the first is kept.
"""

import triton
import triton.language as tl

from sparsedsl.codegen.kernels.selected_attention import LOG2E, LOWEST, aligned_rows

__all__ = ["choose_best", "score_totals"]

# Of floats: the bits of -inf in the order of numbers, the largest one, and the least that is not denormal.
BELOW_ALL: tl.constexpr = tl.constexpr(-2139095041)
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
LEAST_NORMAL: tl.constexpr = tl.constexpr(1.1754943508222875e-38)
NOBODY: tl.constexpr = tl.constexpr(2147483647)  # instead of a block
# Halvings of the range of scores, by their bits, in which the first pass looks for its bound.
HALVINGS: tl.constexpr = tl.constexpr(20)


@triton.jit
def in_order(x):
    """The bits of floats as whole numbers that are ordered as they are; and back."""
    return x ^ ((x >> 31) & 0x7FFFFFFF)


@triton.jit
def bound_of(tops, k, COLUMNS: tl.constexpr):
    """A number that at least k of each row of ``tops`` are greater than, near to the greatest such; -inf where fewer are above -inf."""
    keys = in_order(tops.to(tl.int32, bitcast=True))
    low = tl.min(keys, 1)
    high = tl.max(keys, 1)
    for _ in range(HALVINGS):
        middle = (low | high) - ((low ^ high) >> 1)
        enough = tl.sum((keys >= middle[:, None]).to(tl.int32), 1) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    bound = in_order(low - 1).to(tl.float32, bitcast=True)
    # Two zeros are equal, and processors may take denormal numbers for zeros.
    bound = tl.where(tl.abs(bound) < LEAST_NORMAL, -LEAST_NORMAL, bound)
    return tl.where((low > BELOW_ALL) & (k <= COLUMNS), bound, float("-inf"))


@triton.jit
def limit_of(ptr, b, by_batch, head, by_head, row, exists, otherwise, HAS: tl.constexpr):
    """The limits of rows, or ``otherwise`` where there are none."""
    limit = tl.zeros_like(row) + otherwise
    if HAS:
        limit = tl.load(ptr + b * by_batch + head * by_head + row, mask=exists, other=0)
    return limit


@triton.jit
def in_spans(firsts_ptr, lasts_ptr, place, exists, column, SPANS: tl.constexpr):
    """Which columns lie in one of the ranges of each row; ``place``: of its first range."""
    inside = (place[:, None] < 0) & (column[None, :] < 0)
    for n in tl.static_range(SPANS):
        first = tl.load(firsts_ptr + place + n, mask=exists, other=1)
        last = tl.load(lasts_ptr + place + n, mask=exists, other=-1)
        inside = inside | ((column[None, :] >= first[:, None]) & (column[None, :] <= last[:, None]))
    return inside


@triton.jit
def rows_of(
    ptr, b, by_batch, head, by_head, row, by_row, exists, ALIGN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows of a head, 0 where there are none."""
    d = tl.arange(0, BLOCK_D)
    rows = aligned_rows(ptr, b, by_batch, head, by_head, row, by_row, ALIGN)
    return tl.load(rows[:, None] + d[None, :], mask=exists[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def products(
    q, b, head, start, step, landmarks, high_ptr, high_stride_b, high_stride_h, high_stride_row, low_ptr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, BOUND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows times every ``step``-th landmark from ``start`` on; ``BOUND``: what is above 0 in a row times those, and what is below times
    the landmarks ``low``."""
    d = tl.arange(0, BLOCK_D)
    column = tl.arange(0, COLUMNS) * step
    by_row = high_stride_row // ALIGN * ALIGN
    head_at = b * high_stride_b + head.to(tl.int64) * high_stride_h + start * by_row.to(tl.int64)
    places = tl.multiple_of(head_at // ALIGN * ALIGN, ALIGN) + column[:, None] * by_row + d[None, :]
    there = (start + column < landmarks)[:, None] & (d < WIDTH)[None, :]
    high = tl.load(high_ptr + places, mask=there, other=0.0)
    if not BOUND:
        return tl.dot(q, high.T, input_precision=PRECISION)
    nothing = tl.zeros_like(q)
    low = tl.load(low_ptr + places, mask=there, other=0.0)
    found = tl.dot(tl.where(q > 0, q, nothing), high.T, input_precision=PRECISION)
    return tl.dot(tl.where(q > 0, nothing, q), low.T, found, input_precision=PRECISION)


@triton.jit
def scores_of(
    q, b, head, row, inside, start, q_ptr, q_stride_b, q_stride_h, q_stride_row, high_ptr, high_stride_b, high_stride_h, high_stride_row,
    low_ptr, totals_ptr, score_begin_ptr, score_begin_batch, score_begin_head, score_end_ptr, score_end_batch, score_end_head, q_share,
    high_share, score_heads, landmarks, rows, scale, mean,
    GROUP: tl.constexpr, SIZE: tl.constexpr, GREATEST: tl.constexpr, RAGGED_MEAN: tl.constexpr, SOFTMAX: tl.constexpr,
    SCORE_BEGIN: tl.constexpr, SCORE_END: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOUND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of rows and the blocks from ``start`` on. ``q``: the rows, where a score is one product."""
    column = start + tl.arange(0, COLUMNS)
    if GROUP * SIZE == 1 and not SOFTMAX:
        return products(
            q, b, head // high_share, start, 1, landmarks, high_ptr, high_stride_b, high_stride_h, high_stride_row, low_ptr, ALIGN, WIDTH,
            BLOCK_D, COLUMNS, BOUND, PRECISION,
        )  # fmt: skip
    found = tl.full([ROWS, COLUMNS], float("-inf") if GREATEST else 0.0, tl.float32)
    for part in range(0, GROUP * SIZE):
        member = head * GROUP + part // SIZE
        landmark = column * SIZE + part % SIZE
        q = rows_of(q_ptr, b, q_stride_b, member // q_share, q_stride_h, row, q_stride_row, inside, ALIGN, WIDTH, BLOCK_D)
        one = products(
            q, b, member // high_share, start * SIZE + part % SIZE, SIZE, landmarks, high_ptr, high_stride_b, high_stride_h,
            high_stride_row, low_ptr, ALIGN, WIDTH, BLOCK_D, COLUMNS, BOUND, PRECISION,
        ) * scale  # fmt: skip
        if SOFTMAX:
            total = tl.load(totals_ptr + (b * score_heads + member) * rows + row, mask=inside, other=0.0)
            one = tl.exp2(one * LOG2E - total[:, None])
            first = limit_of(score_begin_ptr, b, score_begin_batch, member, score_begin_head, row, inside, 0, SCORE_BEGIN)
            end = limit_of(score_end_ptr, b, score_end_batch, member, score_end_head, row, inside, landmarks, SCORE_END)
            counted = (landmark[None, :] >= first[:, None]) & (landmark[None, :] < tl.minimum(end, landmarks)[:, None])
            one = tl.where(counted, one, 0.0)
        if GREATEST:
            one = tl.where((landmark < landmarks)[None, :], one, float("-inf"))
            found = tl.maximum(found, one, propagate_nan=tl.PropagateNan.ALL)
        else:
            found += one
    found = found * mean
    if RAGGED_MEAN:
        found = found / tl.maximum(tl.minimum(landmarks - column * SIZE, SIZE), 1).to(tl.float32)[None, :]
    return found


@triton.jit
def of_candidates(
    found, b, head, row, inside, first, end, start, firsts_ptr, lasts_ptr, span_batch, span_head, SPANS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Scores, -inf where a row may not choose."""
    column = start + tl.arange(0, COLUMNS)
    if (tl.max(first, 0) > start) | (tl.min(end, 0) < start + COLUMNS):
        found = tl.where((column[None, :] >= first[:, None]) & (column[None, :] < end[:, None]), found, float("-inf"))
    if SPANS > 0:
        place = b * span_batch + head * span_head + row * SPANS
        found = tl.where(in_spans(firsts_ptr, lasts_ptr, place, inside, column, SPANS), found, float("-inf"))
    return found


@triton.jit
def picked_places(found, bound, COLUMNS: tl.constexpr):
    """Of each row the columns that are greater than a bound, and those that are NaN, as bits."""
    bit = tl.full([COLUMNS], 1, tl.int64) << tl.arange(0, COLUMNS).to(tl.int64)
    return tl.sum(tl.where(found <= bound[:, None], 0, bit[None, :]), 1)


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "q_stride_row", "high_stride_b", "high_stride_h", "high_stride_row", "score_begin_batch",
        "score_begin_head", "score_end_batch", "score_end_head", "q_share", "high_share", "score_heads", "landmarks", "rows", "scale",
        "mean", "heads", "tiles", "blocks", "shares", "k", "begin_batch", "begin_head", "end_batch", "end_head", "span_batch", "span_head",
        "forced_batch", "forced_head", "start_block", "width", "lines",
    ]
)  # fmt: skip
def choose_best(
    q_ptr, q_stride_b, q_stride_h, q_stride_row, high_ptr, high_stride_b, high_stride_h, high_stride_row, low_ptr, totals_ptr,
    score_begin_ptr, score_begin_batch, score_begin_head, score_end_ptr, score_end_batch, score_end_head, q_share, high_share,
    score_heads, landmarks, rows, scale, mean, heads, tiles, blocks, shares, k,
    begin_ptr, begin_batch, begin_head, end_ptr, end_batch, end_head, firsts_ptr, lasts_ptr, span_batch, span_head,
    forced_firsts_ptr, forced_lasts_ptr, forced_batch, forced_head, indices_ptr, counts_ptr, picked_ptr, start_block, width, lines,
    GROUP: tl.constexpr, SIZE: tl.constexpr, GREATEST: tl.constexpr, RAGGED_MEAN: tl.constexpr, SOFTMAX: tl.constexpr,
    SCORE_BEGIN: tl.constexpr, SCORE_END: tl.constexpr, BEGIN: tl.constexpr, END: tl.constexpr, SPANS: tl.constexpr,
    FORCED: tl.constexpr, FORCED_WITHIN: tl.constexpr, EXTRA: tl.constexpr, PICKED: tl.constexpr, BOUND: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Lists ``(shares, lines, width)`` of a tile of rows, how many blocks each has and, if ``PICKED``, the scores of these."""
    share = tl.program_id(0) % shares
    bundle = tl.program_id(0) // shares
    tile = tiles - 1 - bundle % tiles  # under a causal mask the last rows have the most to do
    head = bundle // tiles % heads
    b = (bundle // tiles // heads).to(tl.int64)
    line = tile * ROWS + tl.arange(0, ROWS)
    inside = line < rows
    row = tl.minimum(line, rows - 1)
    first = tl.maximum(limit_of(begin_ptr, b, begin_batch, head, begin_head, row, inside, 0, BEGIN), 0)
    end = tl.minimum(limit_of(end_ptr, b, end_batch, head, end_head, row, inside, blocks, END), blocks)
    end = tl.where(inside, end, 0)
    there = first < end
    low = tl.min(tl.where(there, first, blocks), 0)
    high = tl.max(tl.where(there, end, 0), 0)
    steps = tl.cdiv(tl.maximum(high - low, 0), COLUMNS)
    start = low + steps * share // shares * COLUMNS
    stop = tl.minimum(low + steps * (share + 1) // shares * COLUMNS, high)
    q = rows_of(q_ptr, b, q_stride_b, head // q_share, q_stride_h, row, q_stride_row, inside, ALIGN, WIDTH, BLOCK_D)

    forced_place = b * forced_batch + head * forced_head + row * FORCED
    tops = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    for at in range(start, stop, COLUMNS):
        found = scores_of(
            q, b, head, row, inside, at, q_ptr, q_stride_b, q_stride_h, q_stride_row, high_ptr, high_stride_b, high_stride_h,
            high_stride_row, low_ptr, totals_ptr, score_begin_ptr, score_begin_batch, score_begin_head, score_end_ptr, score_end_batch,
            score_end_head, q_share, high_share, score_heads, landmarks, rows, scale, mean, GROUP, SIZE, GREATEST, RAGGED_MEAN, SOFTMAX,
            SCORE_BEGIN, SCORE_END, ALIGN, WIDTH, BLOCK_D, ROWS, COLUMNS, BOUND, PRECISION,
        )  # fmt: skip
        found = of_candidates(
            found, b, head, row, inside, first, end, at, firsts_ptr, lasts_ptr, span_batch, span_head, SPANS, COLUMNS
        )  # fmt: skip
        if EXTRA:
            column = at + tl.arange(0, COLUMNS)
            named = in_spans(forced_firsts_ptr, forced_lasts_ptr, forced_place, inside, column, FORCED)
            found = tl.where(named, float("-inf"), found)
        tops = tl.maximum(tops, found)
    bound = bound_of(tops, k, COLUMNS)
    if FORCED > 0:
        bound = tl.where(bound >= LARGEST, 1.7e38, bound)  # what is infinite is cut to the largest number

    # Places of the list hold the number of a block, or one that no block has; places beyond k are never the least.
    slot = tl.arange(0, KEPT)
    ids = tl.zeros([ROWS, KEPT], tl.int32) + (slot + (NOBODY - KEPT))[None, :]
    values = tl.zeros([ROWS, KEPT], tl.float32) + tl.where(slot < k, float("-inf"), float("inf"))[None, :]
    for at in range(start, stop, COLUMNS):
        found = scores_of(
            q, b, head, row, inside, at, q_ptr, q_stride_b, q_stride_h, q_stride_row, high_ptr, high_stride_b, high_stride_h,
            high_stride_row, low_ptr, totals_ptr, score_begin_ptr, score_begin_batch, score_begin_head, score_end_ptr, score_end_batch,
            score_end_head, q_share, high_share, score_heads, landmarks, rows, scale, mean, GROUP, SIZE, GREATEST, RAGGED_MEAN, SOFTMAX,
            SCORE_BEGIN, SCORE_END, ALIGN, WIDTH, BLOCK_D, ROWS, COLUMNS, BOUND, PRECISION,
        )  # fmt: skip
        found = of_candidates(
            found, b, head, row, inside, first, end, at, firsts_ptr, lasts_ptr, span_batch, span_head, SPANS, COLUMNS
        )  # fmt: skip
        if FORCED > 0:
            column = at + tl.arange(0, COLUMNS)
            named = in_spans(forced_firsts_ptr, forced_lasts_ptr, forced_place, inside, column, FORCED)
            named = named & (column[None, :] >= first[:, None]) & (column[None, :] < end[:, None])
            if FORCED_WITHIN:
                place = b * span_batch + head * span_head + row * SPANS
                named = named & in_spans(firsts_ptr, lasts_ptr, place, inside, column, SPANS)
            # Nothing comes before what is forced; NaN counts as infinity.
            found = tl.where(named, float("-inf") if EXTRA else float("inf"), tl.where(found < LARGEST, found, LARGEST))
        places = picked_places(found, bound, COLUMNS)
        columns = tl.arange(0, COLUMNS)
        while tl.max((places != 0).to(tl.int32), 0) != 0:
            lowest = places & -places
            places = places ^ lowest
            spot = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127  # of no place none
            value = tl.max(tl.where(columns[None, :] == spot[:, None], found, float("-inf")), 1)
            value = tl.where((lowest != 0) & (value == float("-inf")), float("inf"), value)  # it is NaN, which counts as infinity
            least = tl.min(values, 1)
            # Of equal ones the last block goes; it takes a greater score to take a place.
            last = tl.max(tl.where(values == least[:, None], ids, -1), 1)
            here = (ids == last[:, None]) & (value > least)[:, None]
            ids = tl.where(here, (at + spot)[:, None], ids)
            values = tl.where(here, value[:, None], values)
        bound = tl.maximum(bound, tl.min(values, 1))

    taken = (values > float("-inf")) & (slot < k)[None, :]
    ids = tl.where(taken, ids, NOBODY)
    entry = share.to(tl.int64) * lines + (b * heads + head) * rows + row
    if not EXTRA:
        tl.store(counts_ptr + entry, tl.sum(taken.to(tl.int32), 1), mask=inside)
    if PICKED:
        together = (ids.to(tl.int64) << 32) | (values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)
        together = tl.sort(together)
        ids = (together >> 32).to(tl.int32)
        values = (together & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)
        if GROUP * SIZE == 1 and not SOFTMAX:
            values = values * scale
    else:
        ids = tl.sort(ids)
    is_block = ids < NOBODY
    to = entry[:, None] * width + slot[None, :]
    written = inside[:, None] & (slot < width)[None, :]
    if EXTRA:  # one range, which comes between what lies before it and behind
        one = tl.maximum(tl.load(forced_firsts_ptr + forced_place, mask=inside, other=1), first)
        last = tl.minimum(tl.load(forced_lasts_ptr + forced_place, mask=inside, other=-1), end - 1)
        size = tl.maximum(last - one + 1, 0)
        before = tl.sum((ids < one[:, None]).to(tl.int32), 1)
        for n in range(0, tl.max(size, 0)):
            tl.store(indices_ptr + entry * width + before + n, one + n + start_block, mask=inside & (n < size))
        to += tl.where((slot[None, :] >= before[:, None]), size[:, None], 0)
        written = written & is_block
        tl.store(counts_ptr + entry, tl.sum(taken.to(tl.int32), 1) + size, mask=inside)
    tl.store(indices_ptr + to, tl.where(is_block, ids + start_block, -1), mask=written)
    if PICKED:
        tl.store(picked_ptr + to, tl.where(is_block, values, float("-inf")), mask=written)


@triton.jit(
    do_not_specialize=[
        "q_stride_b", "q_stride_h", "q_stride_row", "high_stride_b", "high_stride_h", "high_stride_row", "score_begin_batch",
        "score_begin_head", "score_end_batch", "score_end_head", "q_share", "high_share", "score_heads", "landmarks", "rows", "scale",
        "tiles",
    ]
)  # fmt: skip
def score_totals(
    q_ptr, q_stride_b, q_stride_h, q_stride_row, high_ptr, high_stride_b, high_stride_h, high_stride_row, low_ptr, totals_ptr,
    score_begin_ptr, score_begin_batch, score_begin_head, score_end_ptr, score_end_batch, score_end_head, q_share, high_share,
    score_heads, landmarks, rows, scale, tiles,
    SCORE_BEGIN: tl.constexpr, SCORE_END: tl.constexpr, BOUND: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The logarithm, to the base 2, of the sum of ``exp(score)`` of each row over its candidates; 0 where it has none."""
    tile = tiles - 1 - tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % score_heads
    b = (tl.program_id(0) // tiles // score_heads).to(tl.int64)
    line = tile * ROWS + tl.arange(0, ROWS)
    inside = line < rows
    row = tl.minimum(line, rows - 1)
    first = tl.maximum(limit_of(score_begin_ptr, b, score_begin_batch, head, score_begin_head, row, inside, 0, SCORE_BEGIN), 0)
    end = limit_of(score_end_ptr, b, score_end_batch, head, score_end_head, row, inside, landmarks, SCORE_END)
    end = tl.where(inside, tl.minimum(end, landmarks), 0)
    there = first < end
    low = tl.min(tl.where(there, first, landmarks), 0)
    high = tl.max(tl.where(there, end, 0), 0)
    q = rows_of(q_ptr, b, q_stride_b, head // q_share, q_stride_h, row, q_stride_row, inside, ALIGN, WIDTH, BLOCK_D)
    most = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for at in range(low, high, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        found = products(
            q, b, head // high_share, at, 1, landmarks, high_ptr, high_stride_b, high_stride_h, high_stride_row, low_ptr, ALIGN, WIDTH,
            BLOCK_D, COLUMNS, BOUND, PRECISION,
        ) * (scale * LOG2E)  # fmt: skip
        found = tl.where((column[None, :] >= first[:, None]) & (column[None, :] < end[:, None]), found, float("-inf"))
        larger = tl.maximum(most, tl.max(found, 1))
        total = total * tl.exp2(most - larger) + tl.sum(tl.exp2(found - larger[:, None]), 1)
        most = larger
    total = tl.where(there, most + tl.log2(tl.where(there, total, 1.0)), 0.0)
    tl.store(totals_ptr + (b * score_heads + head) * rows + row, total, mask=inside)
