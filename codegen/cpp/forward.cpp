// Attention, forward: a softmax of one block of keys after the other, with the highest logit so far. Logits lie in tiles of keys x
// lanes, so that a vector holds one key and many queries, and nothing is ever added across a vector.

// What a strip has come to: of each lane the highest logit (in units of log2) and the sum of weights, and sums of weighted values.
// Where weights are taken as they are, the first is 0, and the second not read. Of a softpick the first is at least 0. Of a stick the
// second is the logarithm of what is left of it, in units of log2.
struct Sums {
    real *highest, *total, *values;
    i64 broad;  // width of a row of values, in whole vectors
};

// Products -> weights, for VECTORS vectors of lanes; whether the highest logit of some lane has moved, and by which factor. `pick`: the
// exponential less 1, of which what is negative counts in the total alone.
template <int VECTORS, bool pick>
static inline bool weigh_lanes(real *tile, i64 keys, i64 row, real factor, real *highest, real *total, real *shrink) {
    Vector peak[VECTORS], base[VECTORS], sum[VECTORS];
    for (int v = 0; v < VECTORS; v++) peak[v] = all(LOWEST);
    for (i64 j = 0; j < keys; j++)
        for (int v = 0; v < VECTORS; v++) {
            Vector s = at(tile + j * row + v * WIDTH);
            peak[v] = s > peak[v] ? s : peak[v];
        }
    Integers moved = {};
    for (int v = 0; v < VECTORS; v++) {
        Vector before = at(highest + v * WIDTH), now = peak[v] * factor;
        now = now > before ? now : before;
        base[v] = now == LOWEST ? Vector{} : now;
        Vector less = power_of_two(before - base[v]);
        put(highest + v * WIDTH, now);
        put(shrink + v * WIDTH, less);
        sum[v] = at(total + v * WIDTH) * less;
        moved |= now != before;
    }
    for (i64 j = 0; j < keys; j++)
        for (int v = 0; v < VECTORS; v++) {
            Vector s = at(tile + j * row + v * WIDTH), p = power_of_two(s * factor - base[v]);
            if (pick) {
                p = s == LOWEST ? Vector{} : p - power_of_two(-base[v]);
                sum[v] += p < (real)0 ? -p : p;
                p = p < (real)0 ? Vector{} : p;
            } else {
                sum[v] += p;
            }
            put(tile + j * row + v * WIDTH, p);
        }
    Integer any = 0;
    for (int v = 0; v < VECTORS; v++) put(total + v * WIDTH, sum[v]);
    for (int i = 0; i < WIDTH; i++) any |= moved[i];
    return any;
}

template <bool pick>
static void weigh(const Strip &strip, real *tile, i64 keys, real factor, Sums sums) {
    real shrink[MOST_LANES];
    i64 row = strip.lanes.count, i = 0;
    bool moved = false;
    for (; i + 4 * WIDTH <= row; i += 4 * WIDTH)
        moved |= weigh_lanes<4, pick>(tile + i, keys, row, factor, sums.highest + i, sums.total + i, shrink + i);
    switch ((row - i) / WIDTH) {
        case 3: moved |= weigh_lanes<3, pick>(tile + i, keys, row, factor, sums.highest + i, sums.total + i, shrink + i); break;
        case 2: moved |= weigh_lanes<2, pick>(tile + i, keys, row, factor, sums.highest + i, sums.total + i, shrink + i); break;
        case 1: moved |= weigh_lanes<1, pick>(tile + i, keys, row, factor, sums.highest + i, sums.total + i, shrink + i); break;
    }
    if (moved && sums.values)
        for (i64 n = 0; n < strip.used; n++)
            for (i64 j = 0; shrink[n] != 1 && j < sums.broad; j += WIDTH)
                put(sums.values + n * sums.broad + j, at(sums.values + n * sums.broad + j) * shrink[n]);
}

// A matrix of lanes x width, turned: (width, lanes).
static void turn(const real *const *rows, i64 lanes, i64 width, real *to) {
    i64 broad = width / WIDTH * WIDTH;
    for (i64 i = 0; i < lanes; i += WIDTH) {
        for (i64 j = 0; j < broad; j += WIDTH) turn_square(rows + i, j, to + j * lanes + i, lanes);
        for (i64 j = broad; j < width; j++)
            for (i64 n = i; n < i + WIDTH; n++) to[j * lanes + n] = rows[n][j];
    }
}

// The queries of a strip, as rows and turned. `room`: where they are widened.
static void turn_queries(const Call *c, const Strip &strip, real *room, const real **rows, real *to) {
    for (i64 i = 0; i < strip.lanes.count; i++) {
        const char *place =
            c->q.first + (strip.b * c->q.batch + strip.h[i] * c->q.head + strip.row[i] * c->q.row) * element_bytes(c->kind);
        rows[i] = c->kind ? room + i * c->head_dim : (const real *)place;
        if (c->kind) widen(place, c->kind, c->head_dim, room + i * c->head_dim);
    }
    turn(rows, strip.lanes.count, c->head_dim, to);
}

// Room that a strip needs, and its parts.
struct Desk {
    real *turned, *tile, *keys, *values, *rows, *sums;

    static i64 size(const Call *c) {
        i64 broad = whole_vectors(c->head_dim), broad_v = whole_vectors(c->head_dim_v);
        return MOST_LANES * (c->head_dim + BLOCK_KEYS + broad_v + 2) + BLOCK_KEYS * (broad + broad_v) + MOST_LANES * c->head_dim + 64;
    }
    Desk(const Call *c, real *room) {
        i64 broad = whole_vectors(c->head_dim), broad_v = whole_vectors(c->head_dim_v);
        turned = room;
        tile = turned + MOST_LANES * c->head_dim;
        sums = tile + MOST_LANES * BLOCK_KEYS;
        keys = sums + MOST_LANES * (broad_v + 2);
        values = keys + BLOCK_KEYS * broad;
        rows = values + BLOCK_KEYS * broad_v;
    }
};

static Sums sums_at(real *room, i64 broad) { return {room, room + MOST_LANES, room + 2 * MOST_LANES, broad}; }

// One strip against one part of its keys, without the division by the total. Without `values`: only the highest logits and totals.
static void add_up(const Call *c, const Strip &strip, i64 part, i64 parts, const Desk &desk, Sums sums) {
    i64 lanes = strip.lanes.count;
    for (i64 i = 0; i < lanes; i++) sums.highest[i] = c->weighing == SOFTMAX ? LOWEST : 0, sums.total[i] = 0;
    for (i64 i = 0; sums.values && i < strip.used * sums.broad; i++) sums.values[i] = 0;
    const real *queries[MOST_LANES];
    turn_queries(c, strip, desk.rows, queries, desk.turned);
    bool few = strip.used <= FEW && c->head_dim % WIDTH == 0;
    for (i64 i = 0; few && i < lanes * BLOCK_KEYS; i++) desk.tile[i] = 0;
    Head k = keys_of(c, strip, c->k, c->head_dim), v = keys_of(c, strip, c->v, c->head_dim_v);
    real factor = c->score ? 1 : (real)(c->scale * LOG2E);
    auto add = [&](i64 key, i64 count, bool full) {
        const real *some_k[BLOCK_KEYS];
        v.fetch(key, count);
        k.fetch(key + count, most(least(BLOCK_KEYS, strip.keys - key - count), 0));  // as if blocks followed each other
        if (!few) k.list(key, count, desk.keys, some_k);
        if (few)
            multiply_few<false>(strip.used, count, c->head_dim, k.rows(key, count, false, desk.keys), queries, desk.tile, lanes, 1);
        else
            product_of<false>(count, lanes, c->head_dim, Listed<const real>{some_k}, 1, desk.turned, lanes, BROAD, Even<real>{desk.tile, lanes});
        if (c->score) c->score(c, &strip.lanes, key, count, desk.tile);
        if (!full) hide(c, strip, key, count, desk.tile);
        if (c->weighing == SOFTMAX)
            weigh<false>(strip, desk.tile, count, factor, sums);
        else if (c->weighing == SOFTPICK)
            weigh<true>(strip, desk.tile, count, factor, sums);
        else if (c->weighing == STICK)
            break_sticks(strip, desk.tile, count, factor, sums.total);
        if (!sums.values) return;
        Rows some_v = v.rows(key, count, true, desk.values);
        product<true>(strip.used, sums.broad, count, desk.tile, 1, lanes, some_v.first, some_v.row, sums.values, sums.broad);
    };
    if (c->weighing != STICK) {
        visit(c, strip, part, parts, add);
        return;
    }
    visit_down(c, strip, part, parts, [&](i64 key, i64 count, bool full) {
        add(key, count, full);
        return !nothing_left(strip, sums.total);
    });
}

// What earlier keys have come to, and what later ones have: they take of what these left.
static void join_sticks(const Strip &strip, Sums earlier, Sums later) {
    for (i64 i = 0; i < strip.used; i++) {
        Vector share = power_of_two(all(later.total[i]));
        real *to = earlier.values + i * earlier.broad;
        for (i64 j = 0; j < earlier.broad; j += WIDTH) put(to + j, at(to + j) * share + at(later.values + i * later.broad + j));
        earlier.total[i] += later.total[i];
    }
}

// Another logit for each lane, whose value is zero.
static void add_sink(const Call *c, const Strip &strip, Sums sums) {
    for (i64 i = 0; c->sink && i < strip.used; i++) {
        real logit = c->sink(c, strip.b, strip.h[i]) * (real)LOG2E, before = sums.highest[i];
        real now = logit > before ? logit : before, base = now == LOWEST ? 0 : now;
        Vector less = power_of_two(all(before - base)), more = power_of_two(all(logit - base));
        sums.highest[i] = now;
        sums.total[i] = sums.total[i] * less[0] + more[0];
        for (i64 j = 0; sums.values && j < sums.broad; j++) sums.values[i * sums.broad + j] *= less[0];
    }
}

// Divides by the totals and writes out and LSE; whether all that was written is finite.
static bool finish(const Call *c, const Strip &strip, Sums sums) {
    add_sink(c, strip, sums);
    Vector wrong = {};
    for (i64 i = 0; i < strip.used; i++) {
        real total = divides(c) ? sums.total[i] : 1, share = total == 0 ? 0 : 1 / total, *values = sums.values + i * sums.broad;
        for (i64 j = 0; j < sums.broad; j += WIDTH) {
            Vector x = at(values + j) * share;
            wrong += x * (real)0;
            put(values + j, x);
        }
        char *to = (char *)c->out.first +
                   (strip.b * c->out.batch + strip.h[i] * c->out.head + strip.row[i] * c->out.row) * element_bytes(c->kind);
        narrow(values, c->kind, c->head_dim_v, to);
        double lse = sums.highest[i] * LN2 + __builtin_log((double)total);
        c->lse[line_of(c, strip, i)] = total == 0 ? LOWEST : lse;
    }
    bool finite = true;
    for (int i = 0; i < WIDTH; i++) finite &= wrong[i] == 0;
    return finite;
}

static thread_local Room own_room;

#ifndef BACKWARD
// Where there is one strip a head, as when a token is decoded, its keys are shared; in how many parts depends on lengths alone.
static i64 key_parts(const Call *c, const Cut &cut) {
    return cut.strips_of_head == cut.head_groups ? most(least(c->keys / 1024, 16), 1) : 1;
}

// Returns whether all results are finite; -1: there is no memory.
extern "C" int attend(Call *c) {
    cut_strips(c);
    Cut cut(c);
    i64 strips = c->batch * c->kv_heads * cut.strips_of_head, parts = key_parts(c, cut), broad = whole_vectors(c->head_dim_v);
    i64 sums_size = MOST_LANES * (broad + 2);
    bool finite = true, failed = false;
    if (is_little(c)) c->threads = 1;
    Room shared;
    if (parts > 1 && !shared.of(strips * parts * sums_size)) return -1;
    auto strip_of = [&](i64 n) {
        i64 head = n / cut.strips_of_head, which = n % cut.strips_of_head;
        return Strip(c, cut, head / c->kv_heads, head % c->kv_heads, cut.strips_of_head - 1 - which);
    };
    share(c, strips * parts, [&](i64 n) {
        real *room = own_room.of(Desk::size(c));
        if (!room) {
            failed = true;
            return;
        }
        Strip strip = strip_of(n / parts);
        if (!strip.used) return;
        Desk desk(c, room);
        Sums sums = sums_at(parts > 1 ? shared.of(0) + n * sums_size : desk.sums, broad);
        add_up(c, strip, n % parts, parts, desk, sums);
        if (parts == 1 && !finish(c, strip, sums)) finite = false;
    });
    for (i64 n = 0; parts > 1 && !failed && n < strips; n++) {
        Strip strip = strip_of(n);
        if (!strip.used) continue;
        Sums sums = sums_at(shared.of(0) + n * parts * sums_size, broad);
        for (i64 part = 1; part < parts; part++) {
            Sums other = sums_at(shared.of(0) + (n * parts + part) * sums_size, broad);
            if (c->weighing == STICK) {
                join_sticks(strip, sums, other);
                continue;
            }
            for (i64 i = 0; i < strip.used; i++) {
                real a = sums.highest[i], b = other.highest[i], now = a > b ? a : b, base = now == LOWEST ? 0 : now;
                real less = power_of_two(all(a - base))[0], more = power_of_two(all(b - base))[0];
                sums.highest[i] = now;
                sums.total[i] = sums.total[i] * less + other.total[i] * more;
                for (i64 j = 0; j < broad; j++)
                    sums.values[i * broad + j] = sums.values[i * broad + j] * less + other.values[i * broad + j] * more;
            }
        }
        if (!finish(c, strip, sums)) finite = false;
    }
    return failed ? -1 : finite;
}
#endif
