// Attention along selected blocks. Some neighbouring queries, with the heads of their group that share lists and a key/value head, are
// worked on together: block after block, those of them that have it in their lists meet it at once. A query and head is a line: logits lie
// in rows of keys, one for each line, so that a vector is full however few lines there are. Each line sees its blocks in ascending order,
// whoever else is there: its digits depend on no other.

struct Selected {
    const int *indices, *members;  // (batch or 1, list_heads, rows, slots), -1 after the end; bits of the choices likewise, or null
    const real *weights;  // (batch, weight_heads, rows, slots), or null
    i64 slots, block, blocks, list_heads, list_batch, weight_heads;
    i64 softmax1;  // one more logit of 0 in each softmax
    // (batch, kv_heads, blocks, head_dim, whole vectors of a block): the keys of each block, turned; (batch, kv_heads, keys, whole
    // vectors): values. Null: blocks are made ready as they are met, which a few queries do.
    real *turned, *values;
};

// Lines that meet a block at once, keys of a block that they meet at once, lines of all queries that are worked on together.
constexpr i64 LINES = 32, KEYS = 128, LINES_TOGETHER = 256;

// Rows of one block, turned: (width, broad); what lies beyond `count` repeats the last.
static void turn_block(i64 width, const Head &k, i64 key, i64 count, i64 broad, real *room, real *to) {
    Rows some = k.rows(key, count, false, room);
    const real *rows[WIDTH];
    for (i64 j = 0; j < broad; j += WIDTH) {
        for (i64 i = 0; i < WIDTH; i++) rows[i] = some.first + least(j + i, count - 1) * some.row;
        i64 whole = width / WIDTH * WIDTH;
        for (i64 d = 0; d < whole; d += WIDTH) turn_square(rows, d, to + d * broad + j, broad);
        for (i64 d = whole; d < width; d++)
            for (i64 i = 0; i < WIDTH; i++) to[d * broad + j + i] = rows[i][d];
    }
}

static inline real largest_of(Vector x) {
    real found = x[0];
    for (int i = 1; i < WIDTH; i++) found = x[i] > found ? x[i] : found;
    return found;
}
static inline real sum_of(Vector x) {
    real found = x[0];
    for (int i = 1; i < WIDTH; i++) found += x[i];
    return found;
}

// exp2(logits - base) in place, and their sum.
static inline real weigh_row(real *logits, i64 n, real base) {
    Vector sum = {};
    for (i64 j = 0; j < n; j += WIDTH) {
        Vector p = power_of_two(at(logits + j) - base);
        sum += p;
        put(logits + j, p);
    }
    return sum_of(sum);
}

static inline real highest_of(const real *logits, i64 n) {
    Vector peak = all(LOWEST);
    for (i64 j = 0; j < n; j += WIDTH) {
        Vector s = at(logits + j);
        peak = s > peak ? s : peak;
    }
    return largest_of(peak);
}

// A query of those worked on together, that has a block in a slot of its list.
struct Entry {
    int block, query, slot;
};

// Lists of queries one after the other, each ascending -> all entries by block; of one block in the order of the queries.
static Entry *sorted(Entry *from, Entry *to, i64 *ends, i64 runs) {
    for (i64 width = 1; width < runs; width *= 2) {
        for (i64 low = 0; low < runs; low += 2 * width) {
            i64 a = low ? ends[low - 1] : 0, middle = ends[least(low + width, runs) - 1], end = ends[least(low + 2 * width, runs) - 1];
            for (i64 b = middle, n = a; n < end; n++) to[n] = b >= end || (a < middle && from[a].block <= from[b].block) ? from[a++] : from[b++];
        }
        Entry *other = from;
        from = to, to = other;
    }
    return from;
}

// What lies outside of all intervals of a line becomes -inf: logits of `count` keys of a block from `key` on.
static void hide_line(const Call *c, const i64 *first, const i64 *last, i64 line, i64 key, i64 count, real *logits) {
    for (i64 n = 0; n < c->intervals; n++)
        if (first[n * MOST_LANES + line] <= key && last[n * MOST_LANES + line] >= key + count - 1) return;
    for (i64 j = 0; j < count; j++) {
        bool seen = false;
        for (i64 n = 0; n < c->intervals; n++)
            seen |= first[n * MOST_LANES + line] <= key + j && key + j <= last[n * MOST_LANES + line];
        if (!seen) logits[j] = LOWEST;
    }
}

// The work of one thread: room for some neighbouring queries of one group.
struct Team {
    const Call *c;
    const Selected *s;
    i64 heads, queries;  // of a group; worked on together
    i64 broad, broad_v, keys;  // whole vectors of a block and of a row of values; keys met at once, in whole vectors
    real *q, *values, *highest, *total;  // of all lines
    real *some_q, *logits, *tile, *sums, *block_keys, *block_values, *room;  // of the lines that meet a block
    Entry *entries[2];
    i64 *ends;

    static i64 keys_at_once(const Selected *s) {
        i64 broad = whole_vectors(s->block);
        return s->weights || broad < KEYS ? broad : KEYS;  // a softmax of a block alone wants all of it
    }
    static i64 queries_together(const Call *c, i64 heads) { return most(least(LINES_TOGETHER / heads, c->rows), 1); }

    static i64 size(const Call *c, const Selected *s, i64 heads) {
        i64 broad = whole_vectors(s->block), broad_d = whole_vectors(c->head_dim), broad_v = whole_vectors(c->head_dim_v);
        i64 queries = queries_together(c, heads), lines = queries * heads, met = lines_at_once(heads), keys = keys_at_once(s);
        i64 entries = (2 * queries * s->slots * (i64)sizeof(Entry) + queries * (i64)sizeof(i64)) / (i64)sizeof(real);
        return lines * (broad_d + broad_v + 2) + met * (broad_d + keys + broad_v) + keys * whole_vectors(met) + broad_d * broad +
               s->block * (broad_v + broad_d) + entries + 32 * WIDTH;
    }
    static i64 lines_at_once(i64 heads) { return most(LINES / heads, 1) * heads; }

    Team(const Call *c, const Selected *s, i64 heads, real *at) : c(c), s(s), heads(heads), queries(queries_together(c, heads)) {
        broad = whole_vectors(s->block), broad_v = whole_vectors(c->head_dim_v), keys = keys_at_once(s);
        i64 lines = queries * heads, met = lines_at_once(heads), broad_d = whole_vectors(c->head_dim);
        auto take = [&](i64 n) { real *here = at; at += whole_vectors(n); return here; };
        q = take(lines * c->head_dim), values = take(lines * broad_v), highest = take(lines), total = take(lines);
        some_q = take(met * c->head_dim), logits = take(met * keys), sums = take(met * broad_v);
        tile = take(keys * whole_vectors(met));
        block_keys = take(c->head_dim * broad), block_values = take(s->block * broad_v);
        i64 each = (queries * s->slots * (i64)sizeof(Entry) + 8) / (i64)sizeof(real) + 1;
        entries[0] = (Entry *)take(each), entries[1] = (Entry *)take(each);
        ends = (i64 *)take(queries * (i64)(sizeof(i64) / sizeof(real)));
        room = take(s->block * broad_d);
    }

    // Masks and scores of a block, by the pattern's own functions, which want lines side by side.
    void modify(const Lanes *lanes, i64 key, i64 count) const {
        if (!c->score && !c->mask) return;
        i64 row = lanes->count;
        for (i64 i = 0; i < row; i++)
            for (i64 j = 0; j < count; j++) tile[j * row + i] = logits[least(i, lanes->used - 1) * keys + j];
        if (c->score) c->score(c, lanes, key, count, tile);
        if (c->mask) c->mask(c, lanes, key, count, tile);
        for (i64 i = 0; i < lanes->used; i++)
            for (i64 j = 0; j < count; j++) logits[i * keys + j] = tile[j * row + i];
    }

    // Logits of a line -> weights; what the line has come to before is scaled.
    void join(i64 met, i64 line, i64 count) const {
        real *from = logits + met * keys, before = highest[line], now = highest_of(from, count);
        if (now > before) {
            real less = power_of_two(all(before - now))[0];
            highest[line] = now;
            total[line] *= less;
            for (i64 j = 0; j < broad_v; j += WIDTH) put(values + line * broad_v + j, at(values + line * broad_v + j) * less);
        }
        total[line] += weigh_row(from, count, highest[line] == LOWEST ? 0 : highest[line]);
    }

    // The same where the block has a softmax of its own.
    void share_out(i64 met, i64 line, real weight) const {
        real *from = logits + met * keys, peak = highest_of(from, keys), base = peak == LOWEST ? 0 : peak;
        real sum = weigh_row(from, keys, base);
        if (s->softmax1) sum += power_of_two(all(-base))[0];
        real share = sum == 0 ? 0 : weight / sum;
        for (i64 j = 0; j < keys; j += WIDTH) put(from + j, at(from + j) * share);
        total[line] += weight;
    }

    // Some lines, `entries` of one block, against it.
    void meet(i64 b, i64 group, i64 kv_head, i64 row, const Entry *some, i64 count, i64 place) const {
        i64 q_idx[MOST_LANES], h[MOST_LANES], bits[MOST_LANES], first[MOST_INTERVALS * MOST_LANES], last[MOST_INTERVALS * MOST_LANES];
        i64 used = count * heads, line_kv = b * c->kv_heads + kv_head, block = some->block;
        Lanes lanes = {whole_vectors(used), used, b, 0, c->q_offset + c->rows, c->keys, q_idx, h, bits};
        for (i64 i = 0; i < lanes.count; i++) {
            i64 met = least(i, used - 1);
            const Entry &entry = some[met / heads];
            q_idx[i] = c->q_offset + row + entry.query, h[i] = group * heads + met % heads;
            bits[i] = s->members ? s->members[place + entry.query * s->slots + entry.slot] : 0;
            const real *from = q + (entry.query * heads + met % heads) * c->head_dim;
            if (i < used) __builtin_memcpy(some_q + i * c->head_dim, from, c->head_dim * sizeof(real));
        }
        if (c->ends) c->ends(c, &lanes, first, last);
        i64 begin = block * s->block, size = least(s->block, c->keys - begin);
        const real *turned = s->turned ? s->turned + (line_kv * s->blocks + block) * c->head_dim * broad : block_keys;
        for (i64 low = 0; low < size; low += keys) {
            i64 n = least(keys, size - low), whole = whole_vectors(n);
            product<false>(used, whole, c->head_dim, some_q, c->head_dim, 1, turned + low, broad, logits, keys);
            modify(&lanes, begin + low, n);
            for (i64 i = 0; i < used; i++) {
                const Entry &entry = some[i / heads];
                i64 line = entry.query * heads + i % heads;
                if (c->ends) hide_line(c, first, last, i, begin + low, n, logits + i * keys);
                for (i64 j = n; j < (s->weights ? keys : whole); j++) logits[i * keys + j] = LOWEST;
                if (s->weights) {
                    i64 of = (b * s->weight_heads + h[i] * s->weight_heads / c->heads) * c->rows + row + entry.query;
                    share_out(i, line, s->weights[of * s->slots + entry.slot]);
                } else {
                    join(i, line, whole);
                }
            }
            i64 key = begin + low;
            const real *rows = s->values ? s->values + (line_kv * c->keys + key) * broad_v : block_values + low * broad_v;
            i64 step = broad_v;
            if (!s->values && some_values.first) rows = some_values.first + low * some_values.row, step = some_values.row;
            product<false>(used, broad_v, n, logits, keys, 1, rows, step, sums, broad_v);
            for (i64 i = 0; i < used; i++) {
                real *to = values + (some[i / heads].query * heads + i % heads) * broad_v;
                for (i64 j = 0; j < broad_v; j += WIDTH) put(to + j, at(to + j) + at(sums + i * broad_v + j));
            }
        }
    }
    Rows some_values = {nullptr, 0};  // those of the block that is met

    // The queries from `row` on. Whether all that was written is finite.
    bool run(i64 b, i64 group, i64 groups, i64 row) {
        i64 kv_head = group * c->kv_heads / groups, list = group * s->list_heads / groups, count = least(queries, c->rows - row);
        i64 place = ((b * s->list_batch + list) * c->rows + row) * s->slots, known = 0;
        real factor = c->score ? 1 : (real)(c->scale * LOG2E);
        for (i64 n = 0; n < count; n++) {
            for (i64 i = 0; i < heads; i++) {
                i64 line = n * heads + i, h = group * heads + i;
                widen(c->q.first + (b * c->q.batch + h * c->q.head + (row + n) * c->q.row) * element_bytes(c->kind), c->kind, c->head_dim,
                      q + line * c->head_dim);
                for (i64 d = 0; d < c->head_dim; d++) q[line * c->head_dim + d] *= factor;
                highest[line] = LOWEST, total[line] = 0;
                for (i64 j = 0; j < broad_v; j += WIDTH) put(values + line * broad_v + j, Vector{});
            }
            for (i64 slot = 0; slot < s->slots && s->indices[place + n * s->slots + slot] >= 0; slot++)
                entries[0][known++] = {s->indices[place + n * s->slots + slot], (int)n, (int)slot};
            ends[n] = known;
        }
        const Entry *all_entries = sorted(entries[0], entries[1], ends, count);
        Head k(c->k, c->kind, c->head_dim, b, kv_head, 0, 1), v(c->v, c->kind, c->head_dim_v, b, kv_head, 0, 1);
        i64 at_once = most(LINES / heads, 1);
        for (i64 low = 0, high; low < known; low = high) {
            i64 block = all_entries[low].block, key = block * s->block, size = least(s->block, c->keys - key);
            for (high = low; high < known && all_entries[high].block == block;) high++;
            if (!s->turned) turn_block(c->head_dim, k, key, size, broad, room, block_keys);
            if (!s->values) some_values = v.rows(key, size, true, block_values);
            for (i64 n = low; n < high; n += at_once)
                meet(b, group, kv_head, row, all_entries + n, least(at_once, high - n), place);
        }
        bool finite = true;
        for (i64 line = 0; line < count * heads; line++) finite &= finish(b, row + line / heads, group * heads + line % heads, line);
        return finite;
    }

    bool finish(i64 b, i64 row, i64 h, i64 line) const {
        Vector wrong = {};
        real share = 1, *from = values + line * broad_v;
        double lse;
        if (s->weights) {
            lse = total[line] > 0 ? __builtin_log((double)total[line]) : (double)LOWEST;
        } else {
            if (s->softmax1) {
                real before = highest[line], now = before > 0 ? before : 0, less = power_of_two(all(before - now))[0];
                total[line] = total[line] * less + power_of_two(all(-now))[0];
                highest[line] = now;
                for (i64 j = 0; j < broad_v; j += WIDTH) put(from + j, at(from + j) * less);
            }
            share = total[line] == 0 ? 0 : 1 / total[line];
            lse = total[line] == 0 ? (double)LOWEST : highest[line] * LN2 + __builtin_log((double)total[line]);
        }
        for (i64 j = 0; j < broad_v; j += WIDTH) {
            Vector x = at(from + j) * share;
            wrong += x * (real)0;
            put(from + j, x);
        }
        narrow(from, c->kind, c->head_dim_v,
               (char *)c->out.first + (b * c->out.batch + h * c->out.head + row * c->out.row) * element_bytes(c->kind));
        c->lse[(b * c->heads + h) * c->rows + row] = lse;
        bool finite = true;
        for (int i = 0; i < WIDTH; i++) finite &= wrong[i] == 0;
        return finite;
    }
};

static thread_local Room own_room;

static i64 greatest_divisor(i64 a, i64 b) { return b ? greatest_divisor(b, a % b) : a; }

// How many groups of heads share lists and a key/value head, and `heads` of each.
static i64 groups_of(const Call *c, const Selected *s, i64 &heads) {
    i64 groups = c->kv_heads / greatest_divisor(c->kv_heads, s->list_heads) * s->list_heads;
    heads = c->heads / groups;
    for (i64 parts = 2; heads > LINES; parts++)  // a group of very many heads as several
        if (heads % parts == 0 && heads / parts <= LINES) groups *= parts, heads /= parts;
    return groups;
}

// Turns the keys of all blocks, and widens their values, where there is room for it; whether there was memory.
static bool turn_all(const Call *c, const Selected *s, i64 lines, i64 broad) {
    bool done = true;
    i64 broad_v = whole_vectors(c->head_dim_v);
    share(c, s->turned ? lines * s->blocks : 0, [&](i64 n) {
        i64 line = n / s->blocks, key = n % s->blocks * s->block, count = least(s->block, c->keys - key);
        real *room = own_room.of(s->block * whole_vectors(c->head_dim) + WIDTH);
        if (!room) {
            done = false;
            return;
        }
        Head k(c->k, c->kind, c->head_dim, line / c->kv_heads, line % c->kv_heads, 0, 1);
        turn_block(c->head_dim, k, key, count, broad, room, s->turned + n * c->head_dim * broad);
        if (!s->values) return;
        Head v(c->v, c->kind, c->head_dim_v, line / c->kv_heads, line % c->kv_heads, 0, 1);
        real *to = s->values + (line * c->keys + key) * broad_v;
        for (i64 i = 0; i < count; i++) {
            widen(v.at_row(key + i), c->kind, c->head_dim_v, to + i * broad_v);
            for (i64 j = c->head_dim_v; j < broad_v; j++) to[i * broad_v + j] = 0;
        }
    });
    return done;
}


// Returns whether all results are finite; -1: there is no memory.
extern "C" int attend_selected(Call *c, Selected *s) {
    i64 heads, groups = groups_of(c, s, heads);
    bool finite = true, failed = !turn_all(c, s, c->batch * c->kv_heads, whole_vectors(s->block));
    i64 together = Team::queries_together(c, heads), parts = (c->rows + together - 1) / together;
    share(c, failed ? 0 : c->batch * groups * parts, [&](i64 n) {
        real *room = own_room.of(Team::size(c, s, heads));
        if (!room) {
            failed = true;
            return;
        }
        Team team(c, s, heads, room);
        i64 line = n / parts;
        if (!team.run(line / groups, line % groups, groups, n % parts * together)) finite = false;
    });
    return failed ? -1 : finite;
}

