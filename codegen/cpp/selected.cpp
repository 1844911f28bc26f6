// Attention along selected blocks. Some neighbouring queries, with the heads of their group that share lists and a key/value head, are
// worked on together: block after block, those of them that have it in their lists meet it at once. A query and head is a line: logits lie
// in rows of keys, one for each line, so that a vector is full however few lines there are. Each line sees its blocks in ascending order,
// whoever else is there: its digits depend on no other.

struct Selected {
    const int *indices, *members;  // (batch or 1, list_heads, rows, slots), -1 after the end; bits of the choices likewise, or null
    const real *weights;  // (batch, weight_heads, rows, slots), or null
    i64 slots, block, blocks, list_heads, list_batch, weight_heads;
    i64 softmax1;  // one more logit of 0 in each softmax
    // (batch, kv_heads, blocks, head_dim, `columns_of` a block): the keys of each block, turned; (batch, kv_heads, keys, whole
    // vectors): values. Null: blocks are made ready as they are met, which a few queries do.
    real *turned, *values;
    // (batch, heads, rows, head_dim_v), (batch, heads, rows): the results over other keys, which are part of the same softmax; or null. They
    // may lie where out and LSE go.
    const char *near_out;
    const real *near_lse;
};

// Lines that meet a block at once. Lines of all queries that are worked on together: so many that about MEETING lines have each block in
// their lists, as its keys come from far away. Keys of one round; keys of a block in one round, where it may be cut; logits of all lines; entries of a
// block that are asked for before it is met.
constexpr i64 LINES = 32, LINES_TOGETHER = 1024, MEETING = 16, ROUND = 4096, KEYS_AT_ONCE = 2048, LOGITS = 1 << 22, FETCHED = 1 << 12;

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

// The logarithm of the sum of two softmaxes that were normalised by themselves, and the share of each.
static inline real join_lse(real a, real b, real *shares) {
    constexpr bool wide = sizeof(real) == 8;
    real peak = a > b || a != a ? a : b;
    real base = peak == LOWEST ? 0 : peak;  // neither has keys
    real first = wide ? (real)__builtin_exp(a - base) : (real)__builtin_expf(a - base);
    real second = wide ? (real)__builtin_exp(b - base) : (real)__builtin_expf(b - base);
    real total = first + second, whole = total == 0 ? 1 : total;
    shares[0] = first / whole, shares[1] = second / whole;
    return base + (wide ? (real)__builtin_log(total) : (real)__builtin_logf(total));
}

// A query of those worked on together, that has a block in a slot of its list.
struct Entry {
    int block, query, slot;
};

// Entries of queries one after the other -> by block; of one block in the order of the queries. Either `from` or `to`.
static Entry *sorted(Entry *from, Entry *to, i64 n, i64 blocks) {
    constexpr i64 BITS = 11, BUCKETS = 1 << BITS;
    for (i64 shift = 0; (blocks - 1) >> shift; shift += BITS) {
        int ends[BUCKETS + 1] = {};
        for (i64 i = 0; i < n; i++) ends[(from[i].block >> shift) % BUCKETS + 1]++;
        for (i64 i = 0; i < BUCKETS; i++) ends[i + 1] += ends[i];
        for (i64 i = 0; i < n; i++) to[ends[(from[i].block >> shift) % BUCKETS]++] = from[i];
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

// The work of one thread: room for some neighbouring queries of one group. Round by round, each of the same neighbouring blocks for all
// lines: products with keys, whose logits lie line by line, one softmax of what a line has there, products with values.
struct Team {
    const Call *c;
    const Selected *s;
    i64 heads, queries;  // of a group; worked on together
    i64 keys, slots;  // of a block, in whole vectors, and slots of a line at most, in one round
    i64 broad_v;  // whole vectors of a row of values
    i64 *first, *count, *base;  // of each query: its slots in the round, and those of all queries before it
    real *q, *values, *highest, *total;  // of all lines
    real *logits, *tile, *block_keys, *block_values, *room;
    Entry *entries[2];

    // Keys of a block in one round: all, where it has a softmax of its own.
    static i64 keys_at_once(const Selected *s) { return s->weights ? whole_vectors(s->block) : least(whole_vectors(s->block), KEYS_AT_ONCE); }
    static i64 blocks_at_once(const Selected *s) { return most(ROUND / s->block, 1); }
    static i64 slots_at_once(const Selected *s) { return least(s->slots, blocks_at_once(s)); }
    static i64 queries_together(const Call *c, const Selected *s, i64 heads) {
        i64 wanted = most(MEETING * s->blocks / s->slots, 4 * LINES), room = LOGITS / (keys_at_once(s) * slots_at_once(s));
        i64 lines = least(least(wanted, LINES_TOGETHER), room);
        return most(least(lines / heads, c->rows), 1);
    }
    static i64 lines_at_once(i64 heads) { return most(LINES / heads, 1) * heads; }
    static i64 entry_room(i64 entries) { return entries * (i64)sizeof(Entry) / (i64)sizeof(real) + 8; }

    static i64 size(const Call *c, const Selected *s, i64 heads) {
        i64 broad_d = whole_vectors(c->head_dim), broad_v = whole_vectors(c->head_dim_v), keys = keys_at_once(s), slots = slots_at_once(s);
        i64 queries = queries_together(c, s, heads), lines = queries * heads;
        return lines * (broad_d + broad_v + 2 + keys * slots) + keys * whole_vectors(lines_at_once(heads)) + c->head_dim * columns_of(s->block) +
               s->block * (broad_v + broad_d) + 2 * entry_room(queries * slots) + 3 * number_room(queries) + 32 * WIDTH;
    }
    static i64 number_room(i64 n) { return n * (i64)(sizeof(i64) / sizeof(real)) + WIDTH; }

    Team(const Call *c, const Selected *s, i64 heads, real *at) : c(c), s(s), heads(heads), queries(queries_together(c, s, heads)) {
        broad_v = whole_vectors(c->head_dim_v), keys = keys_at_once(s), slots = slots_at_once(s);
        i64 lines = queries * heads;
        auto take = [&](i64 n) { real *here = at; at += whole_vectors(n); return here; };
        q = take(lines * c->head_dim), values = take(lines * broad_v), highest = take(lines), total = take(lines);
        logits = take(lines * keys * slots), tile = take(keys * whole_vectors(lines_at_once(heads)));
        block_keys = take(c->head_dim * columns_of(s->block)), block_values = take(s->block * broad_v);
        entries[0] = (Entry *)take(entry_room(queries * slots)), entries[1] = (Entry *)take(entry_room(queries * slots));
        first = (i64 *)take(number_room(queries)), count = (i64 *)take(number_room(queries)), base = (i64 *)take(number_room(queries));
        room = take(s->block * whole_vectors(c->head_dim));
    }

    // The logits of head i of a query in the round.
    real *logits_of(i64 query, i64 i) const { return logits + (base[query] * heads + i * count[query]) * keys; }

    // Masks and scores of a block, by the pattern's own functions, which want lines side by side; and intervals.
    void modify(i64 b, i64 group, i64 first_row, i64 place, const Entry *some, i64 used, i64 key, i64 count, real *const *to) const {
        i64 q_idx[MOST_LANES], h[MOST_LANES], bits[MOST_LANES], first[MOST_INTERVALS * MOST_LANES], last[MOST_INTERVALS * MOST_LANES];
        Lanes lanes = {whole_vectors(used), used, b, 0, c->q_offset + c->rows, c->keys, q_idx, h, bits};
        for (i64 i = 0; i < lanes.count; i++) {
            i64 met = least(i, used - 1);
            const Entry &entry = some[met / heads];
            q_idx[i] = c->q_offset + first_row + entry.query, h[i] = group * heads + met % heads;
            bits[i] = s->members ? s->members[place + entry.query * s->slots + entry.slot] : 0;
        }
        if (c->ends) c->ends(c, &lanes, first, last);
        i64 side = lanes.count;
        if (c->score || c->mask) {
            for (i64 i = 0; i < side; i++)
                for (i64 j = 0; j < count; j++) tile[j * side + i] = to[least(i, used - 1)][j];
            if (c->score) c->score(c, &lanes, key, count, tile);
            if (c->mask) c->mask(c, &lanes, key, count, tile);
            for (i64 i = 0; i < used; i++)
                for (i64 j = 0; j < count; j++) to[i][j] = tile[j * side + i];
        }
        for (i64 i = 0; c->ends && i < used; i++) hide_line(c, first, last, i, key, count, to[i]);
    }

    // The logits of a round -> weights; what a line has come to before is scaled.
    void join(real *from, i64 n, i64 line) const {
        real before = highest[line], now = highest_of(from, n);
        if (now > before) {
            real less = power_of_two(all(before - now))[0];
            highest[line] = now;
            total[line] *= less;
            for (i64 j = 0; j < broad_v && less != 1; j += WIDTH) put(values + line * broad_v + j, at(values + line * broad_v + j) * less);
        }
        total[line] += weigh_row(from, n, highest[line] == LOWEST ? 0 : highest[line]);
    }

    // The same where the block has a softmax of its own.
    void share_out(real *from, i64 line, real weight) const {
        real peak = highest_of(from, keys), base = peak == LOWEST ? 0 : peak;
        real sum = weigh_row(from, keys, base);
        if (s->softmax1) sum += power_of_two(all(-base))[0];
        real share = sum == 0 ? 0 : weight / sum;
        for (i64 j = 0; j < keys; j += WIDTH) put(from + j, at(from + j) * share);
        total[line] += weight;
    }

    // The queries from `row` on. Whether all that was written is finite.
    bool run(i64 b, i64 group, i64 groups, i64 row) {
        Queries those = {b, group, group * c->kv_heads / groups, row, least(queries, c->rows - row), 0};
        those.place = ((b * s->list_batch + group * s->list_heads / groups) * c->rows + row) * s->slots;
        real factor = c->score ? 1 : (real)(c->scale * LOG2E);
        for (i64 line = 0; line < those.size * heads; line++) {
            i64 h = group * heads + line % heads, of = row + line / heads;
            widen(c->q.first + (b * c->q.batch + h * c->q.head + of * c->q.row) * element_bytes(c->kind), c->kind, c->head_dim,
                  q + line * c->head_dim);
            for (i64 d = 0; d < c->head_dim; d++) q[line * c->head_dim + d] *= factor;
            highest[line] = LOWEST, total[line] = 0;
            for (i64 j = 0; j < broad_v; j += WIDTH) put(values + line * broad_v + j, Vector{});
        }
        for (i64 n = 0; n < those.size; n++) first[n] = count[n] = 0;
        for (i64 block = 0; block < s->blocks; block += blocks_at_once(s)) {
            i64 known = gather(those, block + blocks_at_once(s));
            const Entry *some = sorted(entries[0], entries[1], known, s->blocks);
            for (i64 low = 0; known && low < s->block; low += keys) run_round(those, some, known, low);
        }
        bool finite = true;
        for (i64 line = 0; line < those.size * heads; line++) finite &= finish(b, row + line / heads, group * heads + line % heads, line);
        return finite;
    }

    struct Queries {  // those that are worked on
        i64 b, group, kv_head, row, size, place;  // `place` of the first one's list
    };

    // The entries of a round: all that come next in the lists and are below `end`.
    i64 gather(const Queries &those, i64 end) const {
        i64 known = 0;
        for (i64 n = 0; n < those.size; n++) {
            const int *list = s->indices + those.place + n * s->slots;
            first[n] += count[n], base[n] = known, count[n] = 0;
            for (i64 slot = first[n]; slot < s->slots && list[slot] >= 0 && list[slot] < end; slot++, count[n]++)
                entries[0][known++] = {list[slot], (int)n, (int)slot};
        }
        return known;
    }

    // Keys of each block from `low` on.
    void run_round(const Queries &those, const Entry *all_entries, i64 known, i64 low) {
        i64 line_kv = those.b * c->kv_heads + those.kv_head, panel = panel_of(s->block);
        Head k(c->k, c->kind, c->head_dim, those.b, those.kv_head, 0, 1), v(c->v, c->kind, c->head_dim_v, those.b, those.kv_head, 0, 1);
        bool plain = !c->ends && !c->score && !c->mask;
        const real *from[MOST_LANES];
        real *to[MOST_LANES];
        each_block(all_entries, known, [&](const Entry *some, i64 met, bool is_first, i64 next) {
            i64 block = some->block, key = block * s->block, size = least(s->block, c->keys - key), n = least(keys, size - low);
            if (is_first && !s->turned) turn_block(c->head_dim, k, key, size, s->block, room, block_keys);
            const real *turned = s->turned ? s->turned + (line_kv * s->blocks + block) * c->head_dim * columns_of(s->block) : block_keys;
            if (is_first && s->turned && next >= 0)
                fetch(s->turned + (line_kv * s->blocks + next) * c->head_dim * columns_of(s->block), c->head_dim * columns_of(s->block));
            i64 used = met * heads;
            for (i64 i = 0; i < used; i++) {
                const Entry &e = some[i / heads];
                from[i] = q + (e.query * heads + i % heads) * c->head_dim;
                to[i] = logits_of(e.query, i % heads) + (e.slot - first[e.query]) * keys;
            }
            if (n > 0)
                product_of<false>(used, whole_vectors(n), c->head_dim, Listed<const real>{from}, 1, turned + low * c->head_dim, panel,
                                  panel * c->head_dim, Listed<real>{to});
            if (n > 0 && !plain) modify(those.b, those.group, those.row, those.place, some, used, key + low, n, to);
            for (i64 i = 0; n < keys && i < used; i++)
                for (i64 j = most(n, 0); j < keys; j++) to[i][j] = LOWEST;
        });
        for (i64 n = 0; n < those.size; n++)
            for (i64 i = 0; count[n] && i < heads; i++) {
                i64 weight_line = (those.b * s->weight_heads + (those.group * heads + i) * s->weight_heads / c->heads) * c->rows + those.row + n;
                real *of = logits_of(n, i);
                if (!s->weights) join(of, count[n] * keys, n * heads + i);
                for (i64 m = 0; s->weights && m < count[n]; m++)
                    share_out(of + m * keys, n * heads + i, s->weights[weight_line * s->slots + first[n] + m]);
            }
        Rows rows = {nullptr, 0};
        each_block(all_entries, known, [&](const Entry *some, i64 met, bool is_first, i64 next) {
            i64 block = some->block, key = block * s->block, n = least(keys, least(s->block, c->keys - key) - low);
            if (n <= 0) return;
            if (s->values)
                rows = {s->values + (line_kv * c->keys + key + low) * broad_v, broad_v};
            else if (is_first)
                rows = v.rows(key + low, n, true, block_values);
            if (is_first && rows.first != block_values && next >= 0)
                fetch(rows.first + (next - block) * s->block * rows.row, n * rows.row);
            for (i64 i = 0; i < met * heads; i++) {
                const Entry &e = some[i / heads];
                from[i] = logits_of(e.query, i % heads) + (e.slot - first[e.query]) * keys;
                to[i] = values + (e.query * heads + i % heads) * broad_v;
            }
            product_of<true>(met * heads, broad_v, n, Listed<const real>{from}, 1, rows.first, rows.row, BROAD, Listed<real>{to});
        });
    }

    // Asks for what comes next, the beginning of it: where blocks lie apart, the processor does not foresee it.
    static void fetch(const real *from, i64 n) {
        for (const char *at = (const char *)from, *end = (const char *)(from + least(n, FETCHED)); at < end; at += 64) __builtin_prefetch(at, 0, 2);
    }

    // The entries of one block after the other, some lines at a time; and the block after it, or -1.
    template <class F>
    void each_block(const Entry *all_entries, i64 known, F f) const {
        i64 at_once = most(LINES / heads, 1);
        for (i64 low = 0, high; low < known; low = high) {
            for (high = low; high < known && all_entries[high].block == all_entries[low].block;) high++;
            i64 next = high < known ? all_entries[high].block : -1;
            for (i64 n = low; n < high; n += at_once) f(all_entries + n, least(at_once, high - n), n == low, next);
        }
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
        char *out = (char *)c->out.first + (b * c->out.batch + h * c->out.head + row * c->out.row) * element_bytes(c->kind);
        real *known = c->lse + (b * c->heads + h) * c->rows + row;
        if (s->near_out) {
            i64 place = (b * c->heads + h) * c->rows + row;
            widen(s->near_out + place * c->head_dim_v * element_bytes(c->kind), c->kind, c->head_dim_v, block_values);
            real shares[2];
            lse = join_lse(s->near_lse[place], lse, shares);
            for (i64 j = 0; j < c->head_dim_v; j++) from[j] = block_values[j] * shares[0] + from[j] * shares[1];
        }
        narrow(from, c->kind, c->head_dim_v, out);
        *known = lse;
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
static bool turn_all(const Call *c, const Selected *s, i64 lines) {
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
        turn_block(c->head_dim, k, key, count, s->block, room, s->turned + n * c->head_dim * columns_of(s->block));
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

// Columns of the keys of a block, turned.
extern "C" int turned_columns(int block) { return (int)columns_of(block); }

// Returns whether all results are finite; -1: there is no memory.
extern "C" int attend_selected(Call *c, Selected *s) {
    i64 heads, groups = groups_of(c, s, heads);
    bool finite = true, failed = !turn_all(c, s, c->batch * c->kv_heads);
    i64 together = Team::queries_together(c, s, heads), parts = (c->rows + together - 1) / together;
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
