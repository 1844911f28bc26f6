// Lists of blocks of keys, and what becomes of one line, a query of a head, along the blocks of its list.

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

// Lines that are worked on together, each one what it has come to so far.
struct Lines {
    const Call *c;
    const Selected *s;
    i64 broad_v;  // whole vectors of a row of values
    real *q, *values, *highest, *total, *near;  // queries times the factor of the logits; `near`: room for one row of values

    // A line without any keys.
    void begin(i64 b, i64 h, i64 row, i64 line) const {
        real factor = c->score ? 1 : (real)(c->scale * LOG2E), *to = q + line * c->head_dim;
        widen(c->q.first + (b * c->q.batch + h * c->q.head + row * c->q.row) * element_bytes(c->kind), c->kind, c->head_dim, to);
        for (i64 d = 0; d < c->head_dim; d++) to[d] *= factor;
        highest[line] = LOWEST, total[line] = 0;
        for (i64 j = 0; j < broad_v; j += WIDTH) put(values + line * broad_v + j, Vector{});
    }

    // `n` more logits -> weights; what the line has come to before is scaled.
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

    // The results of a line: whether all of them are finite.
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
            widen(s->near_out + place * c->head_dim_v * element_bytes(c->kind), c->kind, c->head_dim_v, near);
            real shares[2];
            lse = join_lse(s->near_lse[place], lse, shares);
            for (i64 j = 0; j < c->head_dim_v; j++) from[j] = near[j] * shares[0] + from[j] * shares[1];
        }
        narrow(from, c->kind, c->head_dim_v, out);
        *known = lse;
        bool finite = true;
        for (int i = 0; i < WIDTH; i++) finite &= wrong[i] == 0;
        return finite;
    }
};
