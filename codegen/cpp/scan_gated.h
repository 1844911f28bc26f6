// Linear attention whose decays come with the data, one a key or one a channel of a key, added or written by the delta rule; forward and
// backward, chunk by chunk. Decays between rows are running products of factors of at most 1: nothing overflows, and none is the quotient of
// two. A document begins where the factor is 0. One line, a state and the query heads that read it, is worked on by one thread.

struct Gated {
    i64 batch, states, heads, k_heads, v_heads, g_heads, beta_heads, erase_heads, rows, keys, head_dim, head_dim_v, q_offset;
    double scale;
    i64 kind, threads;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    Tensor q, k, v, erase, out, grad_out;  // erase, grad_out: or null; out and its gradient have as many heads as states, or those of q if these are more
    const real *g, *beta;  // (batch or 1, g_heads, keys) and a channel more where `vector`; beta or null
    i64 g_batch, beta_batch, vector;
    const unsigned char *begins;  // (batch or 1, keys), or null
    i64 begins_batch;
    const real *state;  // (batch, states, head_dim, head_dim_v)
    real *after;  // the same at the end
    real *entered;  // (batch, states, chunks + 1, head_dim, whole vectors): before each chunk and after the last, or null
    // Contiguous, a head for every state (of q: of out); rows of whole vectors. `grad_after`: of the state at the end, or null.
    real *grad_q, *grad_k, *grad_v, *grad_g, *grad_beta, *grad_erase, *grad_state;
    const real *grad_after;
};

constexpr i64 CHUNK = 64, PART = 16, MOST_READERS = 33, WIDEST = 512;
// Products of factors below this are as good as 0; numbers beyond are slow.
constexpr real SMALL = sizeof(real) == 8 ? (real)1e-290 : (real)1e-30;

static i64 chunks_of(const Gated *c) { return (c->keys + CHUNK - 1) / CHUNK; }
static inline Vector flushed(Vector x) { return x < SMALL ? Vector{} : x; }
static inline real total_of(Vector x) {
    real sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += x[i];
    return sum;
}

// x (rows x wide), turned: (wide x to_row), of which whole vectors of the rows are written.
static void turn_rows(const real *x, i64 rows, i64 wide, real *to, i64 to_row) {
    const real *lines[WIDTH];
    static const real zeros[WIDTH] = {};
    for (i64 j = 0; j < rows; j += WIDTH)
        for (i64 d = 0; d < wide; d += WIDTH) {
            for (i64 i = 0; i < WIDTH; i++) lines[i] = j + i < rows ? x + (j + i) * wide + d : zeros;
            turn_square(lines, 0, to + d * to_row + j, to_row);
        }
}

// A chunk of one line. Rows beyond `count` hold zeros and decay nothing; `high`: rows in whole parts.
struct Chunk {
    const Gated *c;
    i64 broad, wide, group, b, line, key, count, high;
    i64 first, asked, row;  // the rows with queries: from `first` on, `asked` of them, beginning with query `row`
    real *q, *k, *e, *v, *u, *error, *scaled, *turned, *sums, *spare, *pairs, *between, *by_between, *table;
    real *kept, *reach, *left, *near, *span;  // of every row, a number or (vector) `broad` of them; `near`: since the part began
    real *state, *grad_state, *other, *beta;
    real *grad, *slopes, *by_q, *by_k, *by_read, *by_u, *through;

    i64 size() const { return c->vector ? broad : WIDTH; }

    static i64 room(const Gated *c) {
        i64 broad = whole_vectors(c->head_dim), wide = whole_vectors(c->head_dim_v), widest = most(broad, wide);
        i64 group = most(1, c->heads / c->states);
        widest = most(widest, PART);
        return CHUNK * (broad * (2 * group + 10) + wide * (group + 5) + 3 * widest) + (2 * group + 3) * CHUNK * CHUNK + 3 * widest * widest +
               CHUNK + 64 * WIDTH;
    }

    Chunk(const Gated *c, real *at) : c(c) {
        broad = whole_vectors(c->head_dim), wide = whole_vectors(c->head_dim_v), group = most(1, c->heads / c->states);
        i64 widest = most(most(broad, wide), PART);
        auto take = [&](i64 n) { real *here = at; at += whole_vectors(n); return here; };
        q = take(group * CHUNK * broad), by_q = take(group * CHUNK * broad);
        k = take(CHUNK * broad), e = c->erase.first ? take(CHUNK * broad) : k, scaled = take(CHUNK * broad), by_k = take(CHUNK * broad), by_read = take(CHUNK * broad);
        kept = take(CHUNK * broad), reach = take(CHUNK * broad), left = take(CHUNK * broad), near = take(CHUNK * broad), span = take(CHUNK * broad);
        v = take(CHUNK * wide), u = take(CHUNK * wide), error = take(CHUNK * wide), by_u = take(CHUNK * wide), through = take(CHUNK * wide);
        grad = take(group * CHUNK * wide);
        turned = take(CHUNK * widest), sums = take(CHUNK * widest), spare = take(CHUNK * widest);
        pairs = take(group * CHUNK * CHUNK), slopes = take(group * CHUNK * CHUNK);
        between = take(CHUNK * CHUNK), by_between = take(CHUNK * CHUNK), table = take(CHUNK * CHUNK);
        state = take(widest * widest), grad_state = take(widest * widest), other = take(widest * widest);
        beta = take(CHUNK);
    }

    // Rows `from` .. of a head, `rows` of them, to the chunk's rows from `to_row` on; zeros elsewhere.
    void read(const Tensor &t, i64 width, i64 head, i64 from, i64 rows, i64 to_row, real *to) const {
        i64 full = whole_vectors(width);
        for (i64 i = 0; i < high; i++, to += full) {
            i64 n = i - to_row;
            if (n < 0 || n >= rows) {
                for (i64 j = 0; j < full; j++) to[j] = 0;
                continue;
            }
            widen(t.first + (b * t.batch + head * t.head + (from + n) * t.row) * element_bytes(c->kind), c->kind, width, to);
            for (i64 j = width; j < full; j++) to[j] = 0;
        }
    }

    // Everything that is read of a chunk of line `n`.
    void load(i64 n, i64 chunk) {
        line = n, b = n / c->states;
        i64 own = n % c->states;
        key = chunk * CHUNK, count = least(CHUNK, c->keys - key), high = (count + PART - 1) / PART * PART;
        read(c->k, c->head_dim, own * c->k_heads / c->states, key, count, 0, k);
        if (e != k) read(c->erase, c->head_dim, own * c->erase_heads / c->states, key, count, 0, e);
        read(c->v, c->head_dim_v, own * c->v_heads / c->states, key, count, 0, v);
        first = most(c->q_offset - key, 0);
        asked = most(least(c->q_offset + c->rows - key, count) - first, 0);
        row = key + first - c->q_offset;
        for (i64 r = 0; asked && r < group; r++) read(c->q, c->head_dim, query_head(r), row, asked, first, q + r * CHUNK * broad);
        if (c->beta) {
            const real *from = c->beta + (b * c->beta_batch * c->beta_heads + own * c->beta_heads / c->states) * c->keys + key;
            for (i64 i = 0; i < high; i++) beta[i] = i < count ? from[i] : 0;
        }
        weigh(own);
    }
    // The head of q that is the r-th to read this state, and that of out.
    i64 query_head(i64 r) const { return c->heads >= c->states ? line % c->states * group + r : line % c->states * c->heads / c->states; }
    i64 out_head(i64 r) const { return line % c->states * group + r; }
    i64 out_heads() const { return c->states * group; }

    void weigh(i64 own) {
        const unsigned char *begins = c->begins ? c->begins + b * c->begins_batch * c->keys + key : nullptr;
        i64 width = c->vector ? c->head_dim : 1, full = size();
        const real *from = c->g + ((b * c->g_batch * c->g_heads + own * c->g_heads / c->states) * c->keys + key) * width;
        constexpr real lowest = sizeof(real) == 8 ? -1100 : -200;
        for (i64 i = 0; i < high; i++) {
            real *to = kept + i * full;
            bool begin = i < count && begins && begins[i];
            if (i >= count || begin) {
                for (i64 d = 0; d < full; d++) to[d] = begin ? 0 : 1;
                continue;
            }
            for (i64 d = 0; d < full; d++) to[d] = c->vector ? (d < width ? from[i * width + d] : 0) : from[i];
            for (i64 d = 0; d < full; d += WIDTH) {
                Vector x = at(to + d);
                x = x < lowest ? all(lowest) : x;
                put(to + d, power_of_two(x * (real)LOG2E));
            }
        }
        for (i64 d = 0; d < full; d += WIDTH) {
            Vector far = all(1), close = all(1), rest = all(1);
            for (i64 i = 0; i < high; i++) {
                Vector x = at(kept + i * full + d);
                put(reach + i * full + d, far = flushed(far * x));
                put(near + i * full + d, close = i % PART ? flushed(close * x) : x);
            }
            for (i64 i = high - 1; i >= 0; i--) {
                put(left + i * full + d, rest);
                rest = flushed(rest * at(kept + i * full + d));
            }
        }
        if (c->vector) return;
        for (i64 i = 0; i < high; i++) {
            real *to = table + i * CHUNK;
            Vector x = at(kept + i * full);
            for (i64 j = 0; j < CHUNK; j += WIDTH) put(to + j, i ? flushed(at(to + j - CHUNK) * x) : Vector{});
            to[i] = 1;
        }
    }

    // x of row i times what `by` holds for it.
    void times(const real *x, const real *by, real *to) const {
        i64 full = size();
        for (i64 i = 0; i < high; i++)
            for (i64 d = 0; d < broad; d += WIDTH) put(to + i * broad + d, at(x + i * broad + d) * at(by + i * full + (c->vector ? d : 0)));
    }

    // `span`: what is left, before the first row of a part, of what rows of earlier parts wrote; moved on to the next part.
    void span_on(i64 part) {
        i64 begin = part * PART, last = begin + PART - 1;
        for (i64 d = 0; d < broad; d += WIDTH) {
            Vector over = at(near + last * broad + d), rest = all(1);
            for (i64 j = 0; j < begin; j++) put(span + j * broad + d, flushed(at(span + j * broad + d) * over));
            for (i64 j = last; j >= begin; j--) {
                put(span + j * broad + d, rest);
                rest = flushed(rest * at(kept + j * broad + d));
            }
        }
    }

    // Products of readers (rows of x) with all keys, each times the decay between; 0 for keys that come later. Entries of a key with itself
    // are in it, or 0 where `strict`.
    void products(const real *const *x, real *const *to, const bool *strict, i64 readers) {
        if (!c->vector) turn_rows(k, high, broad, turned, CHUNK);
        for (i64 part = 0; part < high / PART; part++) {
            i64 begin = part * PART, seen = c->vector ? begin : begin + PART;
            if (c->vector && part) {
                span_on(part - 1);
                for (i64 j = 0; j < begin; j++)
                    for (i64 d = 0; d < broad; d += WIDTH) put(scaled + j * broad + d, at(k + j * broad + d) * at(span + j * broad + d));
                turn_rows(scaled, begin, broad, turned, CHUNK);
            }
            for (i64 r = 0; r < readers; r++) {
                real *rows = to[r] + begin * CHUNK;
                const real *of = x[r] + begin * broad;
                if (c->vector) {
                    for (i64 i = 0; i < PART * broad; i += WIDTH) put(sums + i, at(of + i) * at(near + begin * broad + i));
                    of = sums;
                }
                i64 columns = whole_vectors(seen);
                if (columns) product<false>(PART, columns, c->head_dim, of, broad, 1, turned, CHUNK, rows, CHUNK);
                for (i64 i = 0; i < PART; i++) {
                    for (i64 j = c->vector ? begin : columns; j < CHUNK; j++) rows[i * CHUNK + j] = 0;
                    if (!c->vector)
                        for (i64 j = 0; j < columns; j += WIDTH) {
                            real *at_pair = rows + i * CHUNK + j;
                            put(at_pair, at(at_pair) * at(table + (begin + i) * CHUNK + j));
                        }
                    if (c->vector) close_products(x[r] + (begin + i) * broad, begin, begin + i, rows + i * CHUNK);
                    if (strict[r]) rows[i * CHUNK + begin + i] = 0;
                }
            }
        }
    }
    // Within a part: the reader fades on its way back from key to key.
    void close_products(const real *x, i64 begin, i64 i, real *to) const {
        real own[WIDEST];
        for (i64 d = 0; d < broad; d += WIDTH) put(own + d, at(x + d));
        for (i64 j = i;; j--) {
            Vector sum = {};
            for (i64 d = 0; d < broad; d += WIDTH) {
                Vector y = at(own + d);
                sum += y * at(k + j * broad + d);
                put(own + d, y * at(kept + j * broad + d));
            }
            to[j] = total_of(sum);
            if (j == begin) break;
        }
    }

    // u = (I + beta N)^-1 u, part after part.
    void substitute(real *x) const {
        for (i64 begin = 0; begin < high; begin += PART) {
            if (begin) {
                minus_beta(begin);
                product<true>(PART, wide, begin, sums, CHUNK, 1, x, wide, x + begin * wide, wide);
            }
            for (i64 i = begin + 1; i < begin + PART; i++)
                for (i64 j = begin; j < i; j++) {
                    Vector by = all(-beta[i] * between[i * CHUNK + j]);
                    for (i64 e = 0; e < wide; e += WIDTH) put(x + i * wide + e, at(x + i * wide + e) + by * at(x + j * wide + e));
                }
        }
    }
    void minus_beta(i64 begin) const {
        for (i64 i = 0; i < PART; i++)
            for (i64 j = 0; j < CHUNK; j += WIDTH)
                put(sums + i * CHUNK + j, at(between + (begin + i) * CHUNK + j) * all(-beta[begin + i]));
    }
    // x = (I + beta N)^-T x, from the last part on.
    void substitute_back(real *x) const {
        for (i64 begin = high - PART; begin >= 0; begin -= PART) {
            for (i64 i = begin + PART; i < high; i += PART) {
                minus_beta(i);
                product<true>(PART, wide, PART, sums + begin, 1, CHUNK, x + i * wide, wide, x + begin * wide, wide);
            }
            for (i64 i = begin + PART - 1; i > begin; i--)
                for (i64 j = begin; j < i; j++) {
                    Vector by = all(-beta[i] * between[i * CHUNK + j]);
                    for (i64 e = 0; e < wide; e += WIDTH) put(x + j * wide + e, at(x + j * wide + e) + by * at(x + i * wide + e));
                }
        }
    }

    // Pairs, and what every row writes, from the state before.
    void make() {
        const real *x[MOST_READERS];
        real *to[MOST_READERS];
        bool strict[MOST_READERS];
        i64 readers = 0;
        for (i64 r = 0; asked && r < group; r++) x[readers] = q + r * CHUNK * broad, to[readers] = pairs + r * CHUNK * CHUNK, strict[readers++] = false;
        if (c->beta) x[readers] = e, to[readers] = between, strict[readers++] = true;
        if (readers) products(x, to, strict, readers);
        if (!c->beta) {
            __builtin_memcpy(u, v, high * wide * sizeof(real));
            return;
        }
        times(e, reach, scaled);
        product<false>(high, wide, c->head_dim, scaled, broad, 1, state, wide, error, wide);
        for (i64 i = 0; i < high; i++)
            for (i64 e = 0; e < wide; e += WIDTH) {
                Vector off = at(v + i * wide + e) - at(error + i * wide + e);
                put(error + i * wide + e, off), put(u + i * wide + e, off * beta[i]);
            }
        substitute(u);
    }

    void fade_state(real *x) const {
        for (i64 d = 0; d < c->head_dim; d++) {
            Vector by = all(reach[(high - 1) * size() + (c->vector ? d : 0)]);
            for (i64 e = 0; e < wide; e += WIDTH) put(x + d * wide + e, at(x + d * wide + e) * by);
        }
    }

    void move_on() {
        fade_state(state);
        times(k, left, scaled);
        product<true>(c->head_dim, wide, high, scaled, 1, broad, u, wide, state, wide);
    }

    void give(Vector &wrong) {
        for (i64 r = 0; r < group; r++) {
            times(q + r * CHUNK * broad, reach, scaled);
            product<false>(high, wide, c->head_dim, scaled, broad, 1, state, wide, grad, wide);
            const real *own = pairs + r * CHUNK * CHUNK;
            for (i64 begin = 0; begin < high; begin += PART)
                product<true>(PART, wide, begin + PART, own + begin * CHUNK, CHUNK, 1, u, wide, grad + begin * wide, wide);
            for (i64 i = 0; i < asked; i++) {
                real *x = grad + (first + i) * wide;
                for (i64 e = 0; e < wide; e += WIDTH) put(x + e, at(x + e) * (real)c->scale), wrong += at(x + e) * (real)0;
                narrow(x, c->kind, c->head_dim_v,
                       (char *)c->out.first + (b * c->out.batch + out_head(r) * c->out.head + (row + i) * c->out.row) * element_bytes(c->kind));
            }
        }
    }
};
