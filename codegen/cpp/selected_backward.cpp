// Gradients along selected blocks, from the LSE of whole rows. Twice through the pairs: once by queries, for the gradients of q, the weights
// and learned tables; once by blocks, each with all lines that have it in their lists, for those of k and v. Each sum belongs to one thread
// and has a fixed order.

struct SelectedGrads {
    Tensor grad_out;
    const real *delta;  // (batch, heads, rows): sum of out * grad_out less grad_lse; not read where each block has a softmax of its own
    real *grad_q, *grad_k, *grad_v;  // contiguous; rows of whole vectors; those of k and v `copies` times, whose sum is wanted
    real *grad_weights;  // (batch, heads, rows, slots), zeros
    real *turned_v;  // values of each block, turned as keys are in Selected
    double *sums;  // gradients of learned tables, one after the other, of each of `parts` of the work
    i64 sums_size, parts;
    i64 copies;  // 1, but where keys are gathered: each is of some of the queries
};

// Keys of a block that lines meet at once; lines of all queries that are worked on together.
constexpr i64 KEYS = 128, TOGETHER = 256;

// A query with a block in a slot of its list.
struct Chooser {
    int row, slot;
};

// Keys one after the other, in columns from `from` on; of the slot at `place` of all lists, -1: of that which the lines were seated with.
struct Piece {
    i64 key, from, count, place;
};

// Some lines that meet a block, or keys that one query gathers, and room for what comes of it.
struct Meeting {
    const Call *c;
    const Selected *s;
    const SelectedGrads *g;
    i64 heads, broad, panel, broad_d, broad_v, keys, met;  // broad: columns of a block, turned, in panels
    real *q, *grad, *weights, *change, *tile, *slope, *plain, *turned_k, *turned_v, *key_rows, *room, *own;
    i64 q_idx[MOST_LANES], h[MOST_LANES], bits[MOST_LANES], first[MOST_INTERVALS * MOST_LANES], last[MOST_INTERVALS * MOST_LANES];
    real lse[MOST_LANES], delta[MOST_LANES];
    Lanes lanes;
    double *gains = nullptr;

    // Keys that lines meet at once; a softmax of a block alone wants all of it.
    static i64 keys_at_once(const Selected *s) {
        i64 broad = whole_vectors(s->block);
        return Gathering::fits(s) ? GATHERED : s->weights || broad < KEYS ? broad : KEYS;
    }
    static i64 columns(const Selected *s) { return Gathering::fits(s) ? GATHERED : columns_of(s->block); }
    static i64 rows_at_once(const Selected *s) { return Gathering::fits(s) ? GATHERED : s->block; }
    static i64 queries_together(const Call *c, i64 heads) { return most(least(TOGETHER / heads, c->rows), 1); }
    static i64 size(const Call *c, const Selected *s, i64 heads) {
        i64 broad_d = whole_vectors(c->head_dim), broad_v = whole_vectors(c->head_dim_v);
        i64 met = Team::lines_at_once(heads), keys = keys_at_once(s), wide = whole_vectors(met);
        return met * (2 * broad_d + broad_v + 2 * keys) + 3 * keys * wide + (broad_d + broad_v) * columns(s) +
               rows_at_once(s) * (2 * broad_d + broad_v) + 24 * WIDTH;
    }
    Meeting(const Call *c, const Selected *s, const SelectedGrads *g, i64 heads, real *at) : c(c), s(s), g(g), heads(heads) {
        broad = columns(s), panel = Gathering::fits(s) ? BROAD : panel_of(s->block), broad_d = whole_vectors(c->head_dim), broad_v = whole_vectors(c->head_dim_v);
        met = Team::lines_at_once(heads), keys = keys_at_once(s);
        i64 wide = whole_vectors(met);
        auto take = [&](i64 n) { real *here = at; at += whole_vectors(n); return here; };
        q = take(met * broad_d), grad = take(met * broad_v), own = take(met * broad_d);
        weights = take(met * keys), change = take(met * keys);
        tile = take(keys * wide), slope = take(keys * wide), plain = take(keys * wide);
        turned_k = take(broad_d * broad), turned_v = take(broad_v * broad);
        key_rows = take(rows_at_once(s) * broad_d);
        room = take(rows_at_once(s) * most(broad_d, broad_v));
    }

    real factor() const { return c->slope ? 1 : (real)(c->scale * LOG2E); }

    void read(const Tensor &t, i64 width, i64 b, i64 head, i64 row, real by, real *to) const {
        widen(t.first + (b * t.batch + head * t.head + row * t.row) * element_bytes(c->kind), c->kind, width, to);
        for (i64 j = 0; j < width; j++) to[j] *= by;
        for (i64 j = width; j < whole_vectors(width); j++) to[j] = 0;
    }

    // The lines of some queries, head by head.
    void seat(i64 b, i64 group, i64 list, const Chooser *some, i64 count) {
        i64 used = count * heads;
        lanes = {whole_vectors(used), used, b, 0, c->q_offset + c->rows, c->keys, q_idx, h, bits};
        for (i64 i = 0; i < lanes.count; i++) {
            i64 line = least(i, used - 1), row = some[line / heads].row;
            q_idx[i] = c->q_offset + row, h[i] = group * heads + line % heads;
            bits[i] = s->members ? s->members[((b * s->list_batch + list) * c->rows + row) * s->slots + some[line / heads].slot] : 0;
            if (i >= used) continue;
            read(c->q, c->head_dim, b, h[i], row, factor(), q + i * broad_d);
            read(g->grad_out, c->head_dim_v, b, h[i], row, 1, grad + i * broad_v);
            i64 place = (b * c->heads + h[i]) * c->rows + row;
            if (s->weights) {
                i64 of = (b * s->weight_heads + h[i] * s->weight_heads / c->heads) * c->rows + row;
                delta[i] = s->weights[of * s->slots + some[line / heads].slot];
            } else {
                lse[i] = c->lse[place] == LOWEST ? -LOWEST : (real)(c->lse[place] * LOG2E);
                delta[i] = g->delta[place];
            }
        }
        if (c->ends) c->ends(c, &lanes, first, last);
    }

    // Weights and changes of logits (of the scaled products, where there is a score) of `n` columns of turned keys and values, from `low` on,
    // which are those of the pieces.
    void differentiate(const real *of_k, const real *of_v, i64 low, i64 n, const Piece *pieces, i64 count, const Chooser *some) {
        i64 used = lanes.used, whole = whole_vectors(n);
        auto multiply = [&](const real *lines, i64 step, i64 width, const real *turned, real *to) {
            product_of<false>(used, whole, width, Even<const real>{lines, step}, 1, turned + low * width, panel, panel * width,
                              Even<real>{to, keys});
        };
        multiply(q, broad_d, c->head_dim, of_k, weights);
        multiply(grad, broad_v, c->head_dim_v, of_v, change);
        for (i64 m = 0; m < count; m++) modify(pieces[m]);
        for (i64 i = 0; i < used; i++) {
            real *p = weights + i * keys, *d = change + i * keys;
            i64 end = s->weights ? keys : whole;
            for (i64 j = n; j < end; j++) p[j] = LOWEST, d[j] = 0;
            if (s->weights) {
                g_weights(lanes.b, i, some[i / heads].row, some[i / heads].slot, p, d);
                continue;
            }
            for (i64 j = 0; j < whole; j += WIDTH) {
                Vector x = at(p + j) - lse[i];
                Vector weight = power_of_two(x > (real)0 ? Vector{} : x);  // a logit so large that the LSE could not hold the rest
                put(p + j, weight);
                put(d + j, weight == (real)0 ? Vector{} : weight * (at(d + j) - delta[i]));
            }
        }
        for (i64 m = 0; m < count && (gains || c->slope); m++) pass_on(pieces[m]);
    }

    // Products -> logits, by the pattern's own functions; what is masked becomes -inf.
    void modify(const Piece &of) {
        i64 used = lanes.used, row = lanes.count, from = of.from;
        for (i64 i = 0; s->members && of.place >= 0 && i < row; i++) bits[i] = s->members[of.place];
        if (c->slope || c->mask) {
            real *here = tile + from * row;
            for (i64 i = 0; i < row; i++)
                for (i64 j = 0; j < of.count; j++) here[j * row + i] = weights[least(i, used - 1) * keys + from + j];
            if (gains) __builtin_memcpy(plain + from * row, here, of.count * row * sizeof(real));
            if (c->slope) c->slope(c, &lanes, of.key, of.count, here, slope + from * row);
            if (c->mask) c->mask(c, &lanes, of.key, of.count, here);
            for (i64 i = 0; i < used; i++)
                for (i64 j = 0; j < of.count; j++) weights[i * keys + from + j] = here[j * row + i];
        }
        for (i64 i = 0; c->ends && i < used; i++) hide_line(c, first, last, i, of.key, of.count, weights + i * keys + from);
    }

    // Changes of logits -> those of learned tables, and of the products that scores were made of.
    void pass_on(const Piece &of) {
        i64 used = lanes.used, row = lanes.count, from = of.from;
        if (gains) {
            real *here = tile + from * row;
            for (i64 i = 0; s->members && of.place >= 0 && i < row; i++) bits[i] = s->members[of.place];
            for (i64 i = 0; i < row; i++)
                for (i64 j = 0; j < of.count; j++) here[j * row + i] = i < used ? change[i * keys + from + j] : 0;
            c->gains(c, &lanes, of.key, of.count, plain + from * row, here, gains);
        }
        for (i64 i = 0; c->slope && i < used; i++)
            for (i64 j = from; j < from + of.count; j++) {
                real &d = change[i * keys + j];
                d = d == 0 ? 0 : d * slope[j * row + i];
            }
    }

    // A line whose block has a softmax of its own; delta[i] is the weight of the block.
    void g_weights(i64 b, i64 i, i64 row, i64 slot, real *p, real *d) {
        real peak = highest_of(p, keys), base = peak == LOWEST ? 0 : peak, sum = weigh_row(p, keys, base), mean = 0;
        if (s->softmax1) sum += power_of_two(all(-base))[0];
        real share = sum == 0 ? 0 : 1 / sum;
        Vector means = {};
        for (i64 j = 0; j < keys; j += WIDTH) {
            Vector weight = at(p + j) * share;
            put(p + j, weight);
            means += weight == (real)0 ? Vector{} : weight * at(d + j);
        }
        mean = sum_of(means);
        if (gains_of_weights) g->grad_weights[((b * c->heads + h[i]) * c->rows + row) * s->slots + slot] = mean;
        for (i64 j = 0; j < keys; j += WIDTH) {
            Vector weight = at(p + j) * delta[i];
            put(d + j, weight == (real)0 ? Vector{} : weight * (at(d + j) - mean));
            put(p + j, weight);
        }
    }
    bool gains_of_weights = false;
};

// Some neighbouring queries of one group: the gradients of q and of the weights.
static void add_queries(Meeting &m, Entry *entries, Entry *other, i64 b, i64 group, i64 groups, i64 row, i64 count) {
    const Call *c = m.c;
    const Selected *s = m.s;
    i64 kv_head = group * c->kv_heads / groups, list = group * s->list_heads / groups, known = 0, heads = m.heads;
    i64 place = ((b * s->list_batch + list) * c->rows + row) * s->slots, line = b * c->kv_heads + kv_head;
    for (i64 n = 0; n < count; n++)
        for (i64 slot = 0; slot < s->slots && s->indices[place + n * s->slots + slot] >= 0; slot++)
            entries[known++] = {s->indices[place + n * s->slots + slot], (int)n, (int)slot};
    const Entry *all_entries = sorted(entries, other, known, s->blocks);
    Head k(c->k, c->kind, c->head_dim, b, kv_head, 0, 1), v(c->v, c->kind, c->head_dim_v, b, kv_head, 0, 1);
    i64 at_once = most(LINES / heads, 1);
    for (i64 low = 0, high; low < known; low = high) {
        i64 block = all_entries[low].block, key = block * s->block, size = least(s->block, c->keys - key);
        for (high = low; high < known && all_entries[high].block == block;) high++;
        const real *of_k = m.turned_k, *of_v = m.turned_v;
        if (s->turned) {
            of_k = s->turned + (line * s->blocks + block) * c->head_dim * m.broad;
            of_v = m.g->turned_v + (line * s->blocks + block) * c->head_dim_v * m.broad;
        } else {
            turn_block(c->head_dim, k, key, size, s->block, m.room, m.turned_k);
            turn_block(c->head_dim_v, v, key, size, s->block, m.room, m.turned_v);
        }
        Rows rows = k.rows(key, size, true, m.key_rows);
        for (i64 n = low; n < high; n += at_once) {
            Chooser some[MOST_LANES];
            i64 met = least(at_once, high - n);
            for (i64 i = 0; i < met; i++) some[i] = {(int)(row + all_entries[n + i].query), all_entries[n + i].slot};
            m.seat(b, group, list, some, met);
            for (i64 from = 0; from < size; from += m.keys) {
                i64 here = least(m.keys, size - from);
                Piece piece = {key + from, 0, here, -1};
                m.differentiate(of_k, of_v, from, here, &piece, 1, some);
                product<false>(m.lanes.used, m.broad_d, here, m.change, m.keys, 1, rows.first + from * rows.row, rows.row, m.own, m.broad_d);
                for (i64 i = 0; i < m.lanes.used; i++) {
                    real *to = m.g->grad_q + ((b * c->heads + m.h[i]) * c->rows + some[i / heads].row) * m.broad_d;
                    for (i64 j = 0; j < m.broad_d; j += WIDTH) put(to + j, at(to + j) + at(m.own + i * m.broad_d + j) * (real)c->scale);
                }
            }
        }
    }
}

// Of one list head: which queries have a block in their lists, block by block, in the order of the queries.
static void invert(const Call *c, const Selected *s, i64 list, i64 *starts, Chooser *choosers) {
    const int *from = s->indices + list * c->rows * s->slots;
    for (i64 n = 0; n < c->rows; n++)
        for (i64 slot = 0; slot < s->slots && from[n * s->slots + slot] >= 0; slot++) starts[from[n * s->slots + slot] + 1]++;
    for (i64 block = 0; block < s->blocks; block++) starts[block + 1] += starts[block];
    for (i64 n = 0; n < c->rows; n++)
        for (i64 slot = 0; slot < s->slots && from[n * s->slots + slot] >= 0; slot++)
            choosers[starts[from[n * s->slots + slot]]++] = {(int)n, (int)slot};
    for (i64 block = s->blocks; block > 0; block--) starts[block] = starts[block - 1];
    starts[0] = 0;
}

// One block of keys of one head: the gradients of its keys and values.
static void add_keys(Meeting &m, i64 b, i64 kv_head, i64 block, i64 groups, const i64 *starts, const Chooser *choosers) {
    const Call *c = m.c;
    const Selected *s = m.s;
    i64 line = b * c->kv_heads + kv_head, key = block * s->block, size = least(s->block, c->keys - key);
    const real *of_k = m.turned_k, *of_v = m.turned_v;
    bool ready = false;
    i64 at_once = most(LINES / m.heads, 1);
    for (i64 group = kv_head * groups / c->kv_heads; group < (kv_head + 1) * groups / c->kv_heads; group++) {
        i64 list = group * s->list_heads / groups, of = b * s->list_batch + list;
        const i64 *ends = starts + of * (s->blocks + 1);
        const Chooser *those = choosers + of * c->rows * s->slots;
        for (i64 n = ends[block]; n < ends[block + 1]; n += at_once) {
            if (!ready && s->turned) {
                of_k = s->turned + (line * s->blocks + block) * c->head_dim * m.broad;
                of_v = m.g->turned_v + (line * s->blocks + block) * c->head_dim_v * m.broad;
            } else if (!ready) {
                turn_block(c->head_dim, Head(c->k, c->kind, c->head_dim, b, kv_head, 0, 1), key, size, s->block, m.room, m.turned_k);
                turn_block(c->head_dim_v, Head(c->v, c->kind, c->head_dim_v, b, kv_head, 0, 1), key, size, s->block, m.room, m.turned_v);
            }
            ready = true;
            m.seat(b, group, list, those + n, least(at_once, ends[block + 1] - n));
            for (i64 from = 0; from < size; from += m.keys) {
                i64 here = least(m.keys, size - from);
                Piece piece = {key + from, 0, here, -1};
                m.differentiate(of_k, of_v, from, here, &piece, 1, those + n);
                real *to_k = m.g->grad_k + (line * c->keys + key + from) * m.broad_d, *to_v = m.g->grad_v + (line * c->keys + key + from) * m.broad_v;
                product<true>(here, m.broad_v, m.lanes.used, m.weights, 1, m.keys, m.grad, m.broad_v, to_v, m.broad_v);
                product<true>(here, m.broad_d, m.lanes.used, m.change, 1, m.keys, m.q, m.broad_d, to_k, m.broad_d);
            }
        }
    }
    // q went in times the factor of the logits.
    real scale = c->scale / m.factor();
    for (i64 i = 0; ready && i < size * m.broad_d; i += WIDTH) {
        real *to = m.g->grad_k + (line * c->keys + key) * m.broad_d + i;
        put(to, at(to) * scale);
    }
}

// One query of one group, whose keys are gathered: all its gradients.
static void add_gathered(Meeting &m, i64 b, i64 kv_head, i64 group, i64 groups, i64 row, real *grad_k, real *grad_v) {
    const Call *c = m.c;
    const Selected *s = m.s;
    i64 list = group * s->list_heads / groups, place = ((b * s->list_batch + list) * c->rows + row) * s->slots, heads = m.heads;
    Chooser query = {(int)row, 0};
    m.seat(b, group, list, &query, 1);
    for (i64 i = 0; i < heads * m.broad_d; i += WIDTH) put(m.own + i, Vector{});
    Head k(c->k, c->kind, c->head_dim, b, kv_head, 0, 1), v(c->v, c->kind, c->head_dim_v, b, kv_head, 0, 1);
    for (i64 slot = 0; slot < s->slots && s->indices[place + slot] >= 0;) {
        Piece pieces[GATHERED];
        const real *of_k[GATHERED], *of_v[GATHERED];
        real *to_k[GATHERED], *to_v[GATHERED];
        i64 n = 0, count = 0;
        for (; slot < s->slots && s->indices[place + slot] >= 0 && n + s->block <= GATHERED; slot++) {
            i64 key = s->indices[place + slot] * s->block, some = least(s->block, c->keys - key);
            pieces[count++] = {key, n, some, place + slot};
            for (i64 i = 0; i < some; i++, n++) {
                of_k[n] = k.padded_row(key + i, m.key_rows + n * m.broad_d), of_v[n] = v.padded_row(key + i, m.room + n * m.broad_v);
                to_k[n] = grad_k + (key + i) * m.broad_d, to_v[n] = grad_v + (key + i) * m.broad_v;
            }
        }
        i64 whole = whole_vectors(n);
        turn_rows(c->head_dim, [&](i64 i) { return of_k[i]; }, n, whole, BROAD, m.turned_k);
        turn_rows(c->head_dim_v, [&](i64 i) { return of_v[i]; }, n, whole, BROAD, m.turned_v);
        m.differentiate(m.turned_k, m.turned_v, 0, n, pieces, count, &query);
        product_from<true>(heads, m.broad_d, n, Even<const real>{m.change, m.keys}, 1, [&](i64 d) { return From<const real>{of_k, d}; },
                           Even<real>{m.own, m.broad_d});
        product_of<true>(n, m.broad_v, heads, Even<const real>{m.weights, 1}, m.keys, m.grad, m.broad_v, BROAD, Listed<real>{to_v});
        product_of<true>(n, m.broad_d, heads, Even<const real>{m.change, 1}, m.keys, m.q, m.broad_d, BROAD, Listed<real>{to_k});
    }
    for (i64 i = 0; i < heads; i++) {
        real *to = m.g->grad_q + ((b * c->heads + m.h[i]) * c->rows + row) * m.broad_d;
        for (i64 j = 0; j < m.broad_d; j += WIDTH) put(to + j, at(m.own + i * m.broad_d + j) * (real)c->scale);
    }
}

// All gradients where keys are gathered: each copy of those of k and v is of some of the queries, of all that share a key/value head.
static bool gather_backward(Call *c, Selected *s, SelectedGrads *g, i64 heads, i64 groups) {
    i64 jobs = c->batch * c->kv_heads * g->copies, parts = g->sums ? g->parts : jobs, own = groups / c->kv_heads;
    bool failed = false;
    share(c, parts, [&](i64 part) {
        real *room = own_room.of(Meeting::size(c, s, heads));
        if (!room) {
            failed = true;
            return;
        }
        Meeting m(c, s, g, heads, room);
        if (g->sums) m.gains = g->sums + part * g->sums_size;
        for (i64 job = jobs * part / parts; job < jobs * (part + 1) / parts; job++) {
            i64 copy = job % g->copies, line = job / g->copies, place = (copy * c->batch * c->kv_heads + line) * c->keys;
            real *grad_k = g->grad_k + place * m.broad_d, *grad_v = g->grad_v + place * m.broad_v, scale = c->scale / m.factor();
            for (i64 row = c->rows * copy / g->copies; row < c->rows * (copy + 1) / g->copies; row++)
                for (i64 n = 0; n < own; n++)
                    add_gathered(m, line / c->kv_heads, line % c->kv_heads, line % c->kv_heads * own + n, groups, row, grad_k, grad_v);
            for (i64 i = 0; i < c->keys * m.broad_d; i += WIDTH) put(grad_k + i, at(grad_k + i) * scale);
        }
    });
    return !failed;
}

extern "C" int vector_width() { return WIDTH; }

// Gradients hold zeros before. Returns 0; -1: there is no memory.
extern "C" int attend_selected_backward(Call *c, Selected *s, SelectedGrads *g) {
    i64 heads, groups = groups_of(c, s, heads), lines = c->batch * c->kv_heads;
    if (Gathering::fits(s)) return gather_backward(c, s, g, heads, groups) ? 0 : -1;
    bool failed = !turn_all(c, s, lines);
    if (s->turned && !failed)
        share(c, lines * s->blocks, [&](i64 n) {
            i64 line = n / s->blocks, key = n % s->blocks * s->block, count = least(s->block, c->keys - key);
            real *room = own_room.of(s->block * whole_vectors(c->head_dim_v) + WIDTH);
            Head v(c->v, c->kind, c->head_dim_v, line / c->kv_heads, line % c->kv_heads, 0, 1);
            if (room)
                turn_block(c->head_dim_v, v, key, count, s->block, room, g->turned_v + n * c->head_dim_v * columns_of(s->block));
            else
                failed = true;
        });
    i64 together = Meeting::queries_together(c, heads), teams = (c->rows + together - 1) / together * c->batch * groups;
    i64 parts = g->sums ? g->parts : teams, per_head = (c->rows + together - 1) / together;
    share(c, failed ? 0 : parts, [&](i64 part) {
        i64 entries = together * s->slots, extra = 2 * entries * (i64)sizeof(Entry) / (i64)sizeof(real) + 4 * WIDTH;
        real *room = own_room.of(Meeting::size(c, s, heads) + extra);
        if (!room) {
            failed = true;
            return;
        }
        Entry *first = (Entry *)room, *second = first + entries;
        Meeting m(c, s, g, heads, room + whole_vectors(extra));
        m.gains_of_weights = true;
        if (g->sums) m.gains = g->sums + part * g->sums_size;
        for (i64 n = teams * part / parts; n < teams * (part + 1) / parts; n++) {
            i64 line = n / per_head, row = n % per_head * together;
            add_queries(m, first, second, line / groups, line % groups, groups, row, least(together, c->rows - row));
        }
    });
    i64 lists = (s->list_batch ? c->batch : 1) * s->list_heads;
    i64 *starts = (i64 *)__builtin_calloc(lists * (s->blocks + 1), sizeof(i64));
    Chooser *choosers = (Chooser *)__builtin_malloc(lists * c->rows * s->slots * sizeof(Chooser) + 8);
    failed |= !starts || !choosers;
    share(c, failed ? 0 : lists, [&](i64 list) {
        invert(c, s, list, starts + list * (s->blocks + 1), choosers + list * c->rows * s->slots);
    });
    share(c, failed ? 0 : lines * s->blocks, [&](i64 n) {
        real *room = own_room.of(Meeting::size(c, s, heads));
        if (!room) {
            failed = true;
            return;
        }
        Meeting m(c, s, g, heads, room);
        i64 line = n / s->blocks;
        add_keys(m, line / c->kv_heads, line % c->kv_heads, n % s->blocks, groups, starts, choosers);
    });
    __builtin_free(starts);
    __builtin_free(choosers);
    return failed ? -1 : 0;
}
