// A strip: some queries of one key/value head, those of several heads of its group side by side, as lanes. Which keys a strip visits
// (intervals, lists) is told apart from what happens there: `visit` calls a function for each block of keys.

struct Cut {  // how the work is cut into strips
    i64 head_groups, strips, strips_of_head;

    explicit Cut(const Call *c) {
        head_groups = c->heads / c->kv_heads / c->strip_heads;
        i64 most_rows = (c->rows + c->step - 1) / c->step;
        strips = (most_rows + c->strip_queries - 1) / c->strip_queries;
        strips_of_head = head_groups * c->step * strips;
    }
};

struct Strip {
    Lanes lanes;
    i64 q_idx[MOST_LANES], h[MOST_LANES], row[MOST_LANES];  // `row` of q, out and LSE
    i64 used;  // lanes that are queries
    i64 b, kv_head, number, keys;
    i64 first[MOST_INTERVALS * MOST_LANES], last[MOST_INTERVALS * MOST_LANES];
    i64 begin[MOST_INTERVALS], end[MOST_INTERVALS], inner_begin[MOST_INTERVALS], inner_end[MOST_INTERVALS];

    // `which`: of all strips of a key/value head.
    Strip(const Call *c, const Cut &cut, i64 b, i64 kv_head, i64 which) : b(b), kv_head(kv_head) {
        number = which % cut.strips;
        i64 residue = which / cut.strips % c->step;
        i64 head = kv_head * (c->heads / c->kv_heads) + which / (cut.strips * c->step) * c->strip_heads;
        // Positions residue, residue + step, .. within q_offset .. q_offset + rows are counted from `low` to `high`.
        i64 low = most(c->q_offset - residue + c->step - 1, 0) / c->step;
        i64 high = most(c->q_offset + c->rows - residue + c->step - 1, 0) / c->step;
        low += number * c->strip_queries;
        i64 queries = most(least(high - low, c->strip_queries), 0);
        used = queries * c->strip_heads;
        keys = most(c->keys - residue + c->step - 1, 0) / c->step;
        lanes = {whole_vectors(used), used, b, residue, c->q_offset + c->rows, keys, q_idx, h};
        for (i64 i = 0, n = 0; n < c->strip_heads; n++)
            for (i64 at = low; at < low + queries; at++, i++) q_idx[i] = at, h[i] = head + n;
        for (i64 i = used; used && i < lanes.count; i++) q_idx[i] = q_idx[used - 1], h[i] = h[used - 1];
        for (i64 i = 0; i < lanes.count; i++) {
            i64 position = q_idx[i] * c->step + residue - c->q_offset;
            const int *places = c->query_places.of(b, h[i], c->heads, c->rows);
            row[i] = places ? places[position] : position;
        }
        if (used && c->intervals > 0) find_intervals(c);
    }

    // The keys each query sees, and of each interval where any of them begins and ends, and where all of them have begun.
    void find_intervals(const Call *c) {
        c->ends(c, &lanes, first, last);
        for (i64 s = 0; s < c->intervals; s++) {
            i64 low = keys, high = -1, inner_low = 0, inner_high = keys - 1;
            for (i64 i = 0; i < lanes.count; i++) {
                i64 f = most(first[s * MOST_LANES + i], 0), l = least(last[s * MOST_LANES + i], keys - 1);
                bool empty = l < f;
                low = least(low, empty ? keys : f);
                high = most(high, empty ? -1 : l);
                inner_low = most(inner_low, empty ? keys : f);
                inner_high = least(inner_high, empty ? -1 : l);
            }
            begin[s] = low, end[s] = high + 1, inner_begin[s] = inner_low, inner_end[s] = inner_high + 1;
        }
    }

    // Masks a block of keys by the intervals of its queries: what lies outside of all of them is -inf, of weights 0.
    void hide(const Call *c, i64 key, i64 count, real *tile) const {
        Vector masked = c->weighing == POINTWISE ? Vector{} : all(LOWEST);
        Integer low[MOST_INTERVALS][MOST_LANES], high[MOST_INTERVALS][MOST_LANES];
        for (i64 s = 0; s < c->intervals; s++)
            for (i64 i = 0; i < lanes.count; i++) {
                low[s][i] = least(most(first[s * MOST_LANES + i] - key, 0), count);
                high[s][i] = least(most(last[s * MOST_LANES + i] - key, -1), count - 1);
            }
        for (i64 j = 0; j < count; j++) {
            bool by_all = false;
            for (i64 s = 0; s < c->intervals; s++) by_all |= inner_begin[s] <= key + j && key + j < inner_end[s];
            for (i64 i = 0; !by_all && i < lanes.count; i += WIDTH) {
                Integers here = (Integer)j - Integers{}, seen = {};
                for (i64 s = 0; s < c->intervals; s++)
                    seen |= (here >= *(Integers *)&low[s][i]) & (here <= *(Integers *)&high[s][i]);
                real *p = tile + j * lanes.count + i;
                put(p, seen ? at(p) : masked);
            }
        }
    }
};

// Rows of one head of keys or values, as a strip counts them.
static Head keys_of(const Call *c, const Strip &strip, const Tensor &t, i64 width) {
    const int *places = c->key_places.of(strip.b, strip.h[0], c->heads, c->keys);
    return Head(t, c->kind, width, strip.b, strip.kv_head, strip.lanes.residue, c->step, places);
}

// Which of all lines of results a lane has.
static i64 line_of(const Call *c, const Strip &strip, i64 lane) {
    return (strip.b * c->heads + strip.h[lane]) * c->query_places.rows(c->rows) + strip.row[lane];
}

enum Kind { EMPTY, PARTIAL, FULL };

static Kind kind_of(const Call *c, const Strip &strip, i64 key, i64 count) {
    for (i64 s = 0; s < c->intervals; s++)
        if (strip.inner_begin[s] <= key && key + count <= strip.inner_end[s]) return FULL;
    for (i64 s = 0; s < c->intervals; s++)
        for (i64 i = 0; i < strip.used; i++) {
            i64 f = most(strip.first[s * MOST_LANES + i], key), l = least(strip.last[s * MOST_LANES + i], key + count - 1);
            if (f <= l) return PARTIAL;
        }
    return EMPTY;
}

// The blocks between the ends of the intervals of a strip, in ascending order: an interval begins where those before it end.
struct Runs {
    i64 begin[MOST_INTERVALS], end[MOST_INTERVALS], blocks = 0;

    Runs(const Call *c, const Strip &strip) {
        for (i64 s = 0; s < c->intervals; s++) {
            i64 at = s;
            for (; at > 0 && begin[at - 1] > strip.begin[s]; at--) begin[at] = begin[at - 1], end[at] = end[at - 1];
            begin[at] = strip.begin[s], end[at] = strip.end[s];
        }
        for (i64 s = 0, reached = 0; s < c->intervals; s++) {
            begin[s] = most(begin[s], reached);
            reached = most(reached, end[s]);
            blocks += blocks_of(s);
        }
    }
    i64 blocks_of(i64 s) const { return most(end[s] - begin[s] + BLOCK_KEYS - 1, 0) / BLOCK_KEYS; }
};

// The blocks of keys between the ends of the intervals, those of one part of `parts`.
template <class F>
static void visit_intervals(const Call *c, const Strip &strip, i64 part, i64 parts, F f) {
    Runs runs(c, strip);
    i64 low = runs.blocks * part / parts, high = runs.blocks * (part + 1) / parts, number = 0;
    for (i64 s = 0; s < c->intervals; s++)
        for (i64 key = runs.begin[s]; key < runs.end[s]; key += BLOCK_KEYS, number++) {
            i64 count = least(BLOCK_KEYS, runs.end[s] - key);
            Kind kind = number < low || number >= high ? EMPTY : kind_of(c, strip, key, count);
            if (kind != EMPTY) f(key, count, kind == FULL);
        }
}

// The blocks of keys that lists name for a strip: full ones, then partial ones.
template <class F>
static void visit_lists(const Call *c, const Strip &strip, i64 part, i64 parts, F f) {
    i64 line = (strip.b * c->list_batch + strip.h[0] * c->list_head) * c->list_rows + strip.number;
    const int *starts[] = {c->full_starts, c->partial_starts}, *columns[] = {c->full_columns, c->partial_columns};
    i64 full = starts[0][line + 1] - starts[0][line], blocks = full + starts[1][line + 1] - starts[1][line];
    for (i64 n = blocks * part / parts; n < blocks * (part + 1) / parts; n++) {
        i64 key = BLOCK_KEYS * (n < full ? columns[0][starts[0][line] + n] : columns[1][starts[1][line] + n - full]);
        f(key, least(BLOCK_KEYS, strip.keys - key), n < full);
    }
}

// Calls f(key, count, full) for each block of keys that some query of the strip may see; in a full one every query sees all.
template <class F>
static void visit(const Call *c, const Strip &strip, i64 part, i64 parts, F f) {
    if (c->intervals < 0)
        visit_lists(c, strip, part, parts, f);
    else
        visit_intervals(c, strip, part, parts, f);
}

// The same blocks from the last key to the first, until f answers that this was enough.
template <class F>
static void visit_down(const Call *c, const Strip &strip, i64 part, i64 parts, F f) {
    if (c->intervals < 0) {
        i64 line = (strip.b * c->list_batch + strip.h[0] * c->list_head) * c->list_rows + strip.number;
        i64 full = c->full_starts[line + 1], partial = c->partial_starts[line + 1];
        i64 blocks = full - c->full_starts[line] + partial - c->partial_starts[line], low = blocks * part / parts;
        for (i64 number = blocks - 1; number >= low; number--) {
            bool is_full = partial == c->partial_starts[line] ||
                           (full > c->full_starts[line] && c->full_columns[full - 1] > c->partial_columns[partial - 1]);
            i64 key = BLOCK_KEYS * (is_full ? c->full_columns[--full] : c->partial_columns[--partial]);
            if (number < blocks * (part + 1) / parts && !f(key, least(BLOCK_KEYS, strip.keys - key), is_full)) return;
        }
        return;
    }
    Runs runs(c, strip);
    i64 low = runs.blocks * part / parts, high = runs.blocks * (part + 1) / parts, number = runs.blocks;
    for (i64 s = c->intervals - 1; s >= 0; s--)
        for (i64 n = runs.blocks_of(s) - 1; n >= 0; n--) {
            if (--number < low) return;
            i64 key = runs.begin[s] + n * BLOCK_KEYS, count = least(BLOCK_KEYS, runs.end[s] - key);
            Kind kind = number >= high ? EMPTY : kind_of(c, strip, key, count);
            if (kind != EMPTY && !f(key, count, kind == FULL)) return;
        }
}

// Whether weights are divided by their sum, whose logarithm is in the LSE.
static bool divides(const Call *c) { return c->weighing == SOFTMAX || c->weighing == SOFTPICK; }

// How many blocks of keys a strip visits at most.
static i64 most_blocks(const Call *c, const Strip &strip) { return strip.keys / BLOCK_KEYS + MOST_INTERVALS + 1; }

static void hide(const Call *c, const Strip &strip, i64 key, i64 count, real *tile) {
    if (c->intervals < 0)
        c->mask(c, &strip.lanes, key, count, tile);
    else
        strip.hide(c, key, count, tile);
}

// How many keys a query sees, about: of the first, the middle and the last one.
static i64 usual_width(const Call *c) {
    if (c->intervals < 0) return c->keys;
    i64 width = 0, counted = 0;
    for (i64 n = 0; n < 3; n++) {
        i64 row = n * (c->rows - 1) / 2, position = c->q_offset + row;
        i64 residue = position % c->step, q_idx = position / c->step, h = 0;
        i64 keys = most(c->keys - residue + c->step - 1, 0) / c->step, first[MOST_INTERVALS * MOST_LANES], last[MOST_INTERVALS * MOST_LANES];
        Lanes lane = {1, 1, 0, residue, c->q_offset + c->rows, keys, &q_idx, &h};
        if (c->intervals) c->ends(c, &lane, first, last);
        for (i64 s = 0; s < c->intervals; s++)
            width += most(least(last[s * MOST_LANES], keys - 1) - most(first[s * MOST_LANES], 0) + 1, 0);
        counted++;
    }
    return most(width / counted, 1);
}

// Chooses how strips are cut, where that is left open (strip_queries 0). Higher strips multiply faster, lower ones look at fewer
// keys that only some of their queries see; the rates were measured, in hundredths, of strips of 16, 32, 48 and 64 lanes.
static void cut_strips(Call *c) {
    if (c->strip_queries) return;
    static const i64 heights[] = {16, 32, 48, 64}, rates[] = {75, 89, 96, 100};
    // Heads of a strip share a key/value head and its places.
    i64 group = c->heads / most(c->kv_heads, most(c->key_places.heads, c->query_places.heads)), width = usual_width(c);
    i64 rows = most((c->rows + c->step - 1) / c->step, 1);
    double best = 0;
    for (int n = 0; n < 4; n++) {
        i64 heads = least(group, heights[n]);
        while (group % heads) heads--;
        i64 queries = least(heights[n] / heads, rows);
        double rate = (double)rates[n] * width / (width + queries - 1);
        if (rate > best || !n) best = rate, c->strip_heads = heads, c->strip_queries = queries;
    }
}

// ---- sharing the work -----------------------------------------------------------------------------------------------------------

// Whether a call is too little work to wake other threads for: a fortieth of a millisecond.
static bool is_little(const Call *c) {
    return c->batch * c->heads * c->rows * least(c->keys, usual_width(c)) * (c->head_dim + c->head_dim_v) < (1 << 20);
}

template <class F>
static void share(const Call *c, i64 count, F f) {
    share_among(c->parallel, c->threads, count, f);
}
