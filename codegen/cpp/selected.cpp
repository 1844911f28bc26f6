// Attention along selected blocks. Some neighbouring queries, with the heads of their group that share lists and a key/value head, are
// worked on together: block after block, those of them that have it in their lists meet it at once. A query and head is a line: logits lie
// in rows of keys, one for each line, so that a vector is full however few lines there are. Each line sees its blocks in ascending order,
// whoever else is there: its digits depend on no other.

// Lines that meet a block at once. Lines of all queries that are worked on together: so many that about MEETING lines have each block in
// their lists, as its keys come from far away. Keys of one round; keys of a block in one round, where it may be cut; logits of all lines; entries of a
// block that are asked for before it is met.
constexpr i64 LINES = 32, LINES_TOGETHER = 1024, MEETING = 16, ROUND = 4096, KEYS_AT_ONCE = 2048, LOGITS = 1 << 22, FETCHED = 1 << 12;

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

// The work of one thread: room for some neighbouring queries of one group. Round by round, each of the same neighbouring blocks for all
// lines: products with keys, whose logits lie line by line, one softmax of what a line has there, products with values.
struct Team : Lines {
    i64 heads, queries;  // of a group; worked on together
    i64 keys, slots;  // of a block, in whole vectors, and slots of a line at most, in one round
    i64 *first, *count, *base;  // of each query: its slots in the round, and those of all queries before it
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

    Team(const Call *c, const Selected *s, i64 heads, real *at)
        : Lines{c, s, whole_vectors(c->head_dim_v)}, heads(heads), queries(queries_together(c, s, heads)) {
        keys = keys_at_once(s), slots = slots_at_once(s);
        i64 lines = queries * heads;
        auto take = [&](i64 n) { real *here = at; at += whole_vectors(n); return here; };
        q = take(lines * c->head_dim), values = take(lines * broad_v), highest = take(lines), total = take(lines);
        logits = take(lines * keys * slots), tile = take(keys * whole_vectors(lines_at_once(heads)));
        block_keys = take(c->head_dim * columns_of(s->block)), block_values = take(s->block * broad_v);
        entries[0] = (Entry *)take(entry_room(queries * slots)), entries[1] = (Entry *)take(entry_room(queries * slots));
        first = (i64 *)take(number_room(queries)), count = (i64 *)take(number_room(queries)), base = (i64 *)take(number_room(queries));
        room = take(s->block * whole_vectors(c->head_dim)), near = block_values;
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
        for (i64 line = 0; line < those.size * heads; line++) begin(b, group * heads + line % heads, row + line / heads, line);
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

// Columns of the keys of a block, turned; 0: keys are gathered. `weighted`: whether each block has a softmax of its own.
extern "C" int turned_columns(int block, int weighted) {
    Selected s = {};
    s.block = block, s.weights = weighted ? (const real *)&s : nullptr;
    return Gathering::fits(&s) ? 0 : (int)columns_of(block);
}

// Returns whether all results are finite; -1: there is no memory.
extern "C" int attend_selected(Call *c, Selected *s) {
    i64 heads, groups = groups_of(c, s, heads);
    bool gathers = Gathering::fits(s), finite = true, failed = !gathers && !turn_all(c, s, c->batch * c->kv_heads);
    i64 together = gathers ? GATHERING : Team::queries_together(c, s, heads), parts = (c->rows + together - 1) / together;
    share(c, failed ? 0 : c->batch * groups * parts, [&](i64 n) {
        real *room = own_room.of(gathers ? Gathering::size(c, heads) : Team::size(c, s, heads));
        if (!room) {
            failed = true;
            return;
        }
        i64 line = n / parts, row = n % parts * together;
        if (gathers) {
            Gathering some(c, s, heads, room);
            for (i64 end = least(row + together, c->rows); row < end; row++)
                if (!some.run(line / groups, line % groups, groups, row)) finite = false;
        } else if (!Team(c, s, heads, room).run(line / groups, line % groups, groups, row)) {
            finite = false;
        }
    });
    return failed ? -1 : finite;
}
