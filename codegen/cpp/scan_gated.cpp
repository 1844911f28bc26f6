// Linear attention whose decays come with the data: the passes. What a chunk is made of stands in scan_gated.h.

// A chunk, backward: every gradient from those of its results and of the state after it.
struct Back : Chunk {
    using Chunk::Chunk;

    // Rows of `x` with rows of u, each row with those up to its own (`strict`: before it), times `by`.
    void with_writes(const real *x, real *to, bool strict, real by) const {
        for (i64 begin = 0; begin < high; begin += PART) {
            product<false>(PART, begin + PART, c->head_dim_v, x + begin * wide, wide, 1, turned, CHUNK, to + begin * CHUNK, CHUNK);
            for (i64 i = begin; i < begin + PART; i++)
                for (i64 j = 0; j < CHUNK; j++) to[i * CHUNK + j] = j < i + !strict ? to[i * CHUNK + j] * by : 0;
        }
    }

    // The gradients of readers x and of the keys they read, from those of their products. `fade`: overwritten.
    void slopes_of(const real *x, real *by_pairs, real *by_x) {
        if (c->vector) return slopes_of_channels(x, by_pairs, by_x);
        for (i64 i = 0; i < high; i++)
            for (i64 j = 0; j < CHUNK; j += WIDTH) put(by_pairs + i * CHUNK + j, at(by_pairs + i * CHUNK + j) * at(table + i * CHUNK + j));
        for (i64 begin = 0; begin < high; begin += PART) {
            product<true>(PART, broad, begin + PART, by_pairs + begin * CHUNK, CHUNK, 1, k, broad, by_x + begin * broad, broad);
            product<true>(PART, broad, high - begin, by_pairs + begin * CHUNK + begin, 1, CHUNK, x + begin * broad, broad, by_k + begin * broad, broad);
        }
    }
    void slopes_of_channels(const real *x, const real *by_pairs, real *by_x) {
        for (i64 begin = 0; begin < high; begin += PART) {
            const real *rows = by_pairs + begin * CHUNK;
            if (begin) {
                span_on(begin / PART - 1);
                for (i64 i = 0; i < begin * broad; i += WIDTH) put(scaled + i, at(k + i) * at(span + i));
                product<false>(PART, broad, begin, rows, CHUNK, 1, scaled, broad, sums, broad);
                for (i64 i = 0; i < PART * broad; i += WIDTH) {
                    Vector near_row = at(near + begin * broad + i);
                    put(by_x + begin * broad + i, at(by_x + begin * broad + i) + at(sums + i) * near_row);
                    put(turned + i, at(x + begin * broad + i) * near_row);
                }
                product<false>(begin, broad, PART, rows, 1, CHUNK, turned, broad, spare, broad);
                for (i64 i = 0; i < begin * broad; i += WIDTH) put(by_k + i, at(by_k + i) + at(spare + i) * at(span + i));
            }
            for (i64 i = begin; i < begin + PART; i++)
                for (i64 d = 0; d < broad; d += WIDTH) {
                    const real *by = by_pairs + i * CHUNK;
                    Vector sum = {}, own = at(x + i * broad + d);
                    for (i64 j = begin; j < i; j++) sum = (sum + at(k + j * broad + d) * by[j]) * at(kept + (j + 1) * broad + d);
                    put(by_x + i * broad + d, at(by_x + i * broad + d) + sum + at(k + i * broad + d) * by[i]);
                    for (i64 j = i;; j--) {
                        put(by_k + j * broad + d, at(by_k + j * broad + d) + own * by[j]);
                        if (j == begin) break;
                        own *= at(kept + j * broad + d);
                    }
                }
        }
    }

    // `next`: the state after the chunk. `grad_state` comes as its gradient, and leaves as that of the state before.
    void back(const real *next) {
        for (i64 r = 0; asked && r < group; r++) {
            real *to = grad + r * CHUNK * wide;
            read(c->grad_out, c->head_dim_v, out_head(r), row, asked, first, to);
            for (i64 i = 0; i < high * wide; i += WIDTH) put(to + i, at(to + i) * (real)c->scale);
        }
        times(k, left, scaled);
        product<false>(high, wide, c->head_dim, scaled, broad, 1, grad_state, wide, by_u, wide);
        for (i64 r = 0; asked && r < group; r++)
            for (i64 begin = 0; begin < high; begin += PART)
                product<true>(PART, wide, high - begin, pairs + r * CHUNK * CHUNK + begin * CHUNK + begin, 1, CHUNK,
                              grad + (r * CHUNK + begin) * wide, wide, by_u + begin * wide, wide);
        turn_rows(grad_state, c->head_dim, wide, other, broad);
        product<false>(high, broad, c->head_dim_v, u, wide, 1, other, broad, by_k, broad);
        times(by_k, left, by_k);
        turn_rows(u, high, wide, turned, CHUNK);
        turn_rows(state, c->head_dim, wide, other, broad);
        if (c->beta) back_of_rule();
        for (i64 r = 0; asked && r < group; r++) {
            with_writes(grad + r * CHUNK * wide, slopes + r * CHUNK * CHUNK, false, 1);
            real *to = by_q + r * CHUNK * broad;
            product<false>(high, broad, c->head_dim_v, grad + r * CHUNK * wide, wide, 1, other, broad, to, broad);
            times(to, reach, to);
        }
        for (i64 r = 0; asked && r < group; r++) slopes_of(q + r * CHUNK * broad, slopes + r * CHUNK * CHUNK, by_q + r * CHUNK * broad);
        if (c->beta) slopes_of(e, by_between, by_read);
        write(next);
        fade_state(grad_state);
        for (i64 r = 0; asked && r < group; r++) {
            times(q + r * CHUNK * broad, reach, scaled);
            product<true>(c->head_dim, wide, high, scaled, 1, broad, grad + r * CHUNK * wide, wide, grad_state, wide);
        }
        if (!c->beta) return;
        times(e, reach, scaled);
        for (i64 i = 0; i < high * broad; i += WIDTH) put(scaled + i, -at(scaled + i));
        product<true>(c->head_dim, wide, high, scaled, 1, broad, by_u, wide, grad_state, wide);
    }

    // The delta rule: `by_u` becomes the gradient of the values; those of beta, of what erases as readers of the state, and of pairs of keys.
    void back_of_rule() {
        __builtin_memcpy(through, by_u, high * wide * sizeof(real));
        substitute_back(through);
        with_writes(through, by_between, true, -1);
        for (i64 i = 0; i < high; i++) {
            Vector sum = {};
            for (i64 e = 0; e < wide; e += WIDTH) {
                sum += at(through + i * wide + e) * at(error + i * wide + e);
                put(by_u + i * wide + e, at(through + i * wide + e) * beta[i]);
            }
            for (i64 j = 0; j < CHUNK; j += WIDTH) {
                Vector by = at(by_between + i * CHUNK + j);
                sum += by * at(between + i * CHUNK + j);
                put(by_between + i * CHUNK + j, by * beta[i]);
            }
            if (i < count) c->grad_beta[line * c->keys + key + i] = total_of(sum);
        }
        product<false>(high, broad, c->head_dim_v, by_u, wide, 1, other, broad, by_read, broad);
        times(by_read, reach, by_read);
        for (i64 i = 0; i < high * broad; i += WIDTH) put(by_read + i, -at(by_read + i));
    }

    // Gradients of q, k, v and decays. A decay's is what rows from its own on read, less what they wrote, as far as nothing is forgotten.
    void write(const real *next) {
        for (i64 r = 0; asked && r < group; r++)
            __builtin_memcpy(c->grad_q + ((b * out_heads() + out_head(r)) * c->rows + row) * broad, by_q + (r * CHUNK + first) * broad,
                             asked * broad * sizeof(real));
        __builtin_memcpy(c->grad_v + (line * c->keys + key) * wide, by_u, count * wide * sizeof(real));
        real *to_k = c->grad_k + (line * c->keys + key) * broad, *to_e = c->grad_erase + (line * c->keys + key) * broad;
        real *to_g = c->grad_g + (line * c->keys + key) * (c->vector ? broad : 1);
        double end = 0;
        for (i64 d = 0; d < broad; d++) {
            Vector sum = {};
            for (i64 e = 0; d < c->head_dim && e < wide; e += WIDTH) sum += at(next + d * wide + e) * at(grad_state + d * wide + e);
            spare[d] = total_of(sum), end += spare[d];
        }
        for (i64 i = count - 1; i >= 0; i--) {
            Vector all_channels = {};
            for (i64 d = 0; d < broad; d += WIDTH) {
                Vector own = at(k + i * broad + d), written = at(by_k + i * broad + d), reads = {};
                if (c->beta) reads = at(e + i * broad + d) * at(by_read + i * broad + d);
                if (e != k) put(to_e + i * broad + d, at(by_read + i * broad + d));
                put(to_k + i * broad + d, c->beta && e == k ? written + at(by_read + i * broad + d) : written);
                for (i64 r = 0; asked && r < group; r++) reads += at(q + (r * CHUNK + i) * broad + d) * at(by_q + (r * CHUNK + i) * broad + d);
                reads -= own * written;
                all_channels += reads;
                if (!c->vector) continue;
                Vector keep = at(kept + i * broad + d), sum = at(spare + d) + reads;
                sum = keep == Vector{} ? Vector{} : sum;
                put(spare + d, sum), put(to_g + i * broad + d, sum);
            }
            if (c->vector) continue;
            end = kept[i * WIDTH] == 0 ? 0 : end + total_of(all_channels);
            to_g[i] = end;
        }
    }
};

static thread_local Room own_room;

template <class F>
static void share_lines(const Gated *c, F f) {
    i64 count = c->batch * c->states;
    bool little = count * (c->keys * (c->head_dim + c->head_dim_v) + c->head_dim * c->head_dim_v) < (1 << 16);
    share_among(c->parallel, little ? 1 : c->threads, count, f);
}

static void read_state(const real *from, i64 height, i64 width, real *to) {
    i64 wide = whole_vectors(width);
    for (i64 d = 0; d < height; d++)
        for (i64 j = 0; j < wide; j++) to[d * wide + j] = j < width ? from[d * width + j] : 0;
}

extern "C" int vector_width() { return WIDTH; }

// Whether all results are finite; -1: there is no memory.
extern "C" int gated_forward(const Gated *c) {
    bool failed = false, finite = true;
    share_lines(c, [&](i64 n) {
        real *room = own_room.of(Chunk::room(c));
        if (!room) {
            failed = true;
            return;
        }
        Chunk m(c, room);
        i64 size = c->head_dim * m.wide, chunks = chunks_of(c);
        read_state(c->state + n * c->head_dim * c->head_dim_v, c->head_dim, c->head_dim_v, m.state);
        real *entered = c->entered ? c->entered + n * (chunks + 1) * size : nullptr;
        Vector wrong = {};
        for (i64 chunk = 0; chunk < chunks; chunk++) {
            if (entered) __builtin_memcpy(entered + chunk * size, m.state, size * sizeof(real));
            m.load(n, chunk);
            m.make();
            if (m.asked) m.give(wrong);
            m.move_on();
        }
        if (entered) __builtin_memcpy(entered + chunks * size, m.state, size * sizeof(real));
        for (i64 d = 0; d < c->head_dim; d++)
            for (i64 j = 0; j < c->head_dim_v; j++) {
                real x = m.state[d * m.wide + j];
                c->after[(n * c->head_dim + d) * c->head_dim_v + j] = x;
                if (!(x * 0 == 0)) finite = false;
            }
        for (int i = 0; i < WIDTH; i++)
            if (!(wrong[i] == 0)) finite = false;
    });
    return failed ? -1 : finite;
}

// Of one chunk at most, token by token: a step of decoding. Nothing is made for other tokens, and what is forgotten may have been anything.
extern "C" int gated_steps(const Gated *c) {
    bool failed = false;
    share_lines(c, [&](i64 n) {
        real *room = own_room.of(Chunk::room(c));
        if (!room) {
            failed = true;
            return;
        }
        Chunk m(c, room);
        i64 wide = m.wide, full = m.size();
        read_state(c->state + n * c->head_dim * c->head_dim_v, c->head_dim, c->head_dim_v, m.state);
        m.load(n, 0);
        for (i64 i = 0; i < m.count; i++) {
            const real *key = m.k + i * m.broad, *erase = m.e + i * m.broad, *kept = m.kept + i * full;
            real *written = m.u;
            for (i64 e = 0; e < wide; e += WIDTH) put(m.error + e, Vector{});
            for (i64 d = 0; d < c->head_dim; d++) {
                real keep = kept[c->vector ? d : 0];
                for (i64 e = 0; e < wide; e += WIDTH) {
                    Vector x = keep == 0 ? Vector{} : at(m.state + d * wide + e) * keep;
                    put(m.state + d * wide + e, x);
                    if (c->beta) put(m.error + e, at(m.error + e) + x * erase[d]);
                }
            }
            for (i64 e = 0; e < wide; e += WIDTH) {
                Vector value = at(m.v + i * wide + e);
                put(written + e, c->beta ? (value - at(m.error + e)) * m.beta[i] : value);
            }
            bool seen = i >= m.first && i < m.first + m.asked;
            for (i64 r = 0; r < m.group; r++) {
                real *out = m.grad;
                for (i64 e = 0; e < wide; e += WIDTH) put(out + e, Vector{});
                for (i64 d = 0; d < c->head_dim && (seen || !r); d++)
                    for (i64 e = 0; e < wide; e += WIDTH) {
                        Vector x = at(m.state + d * wide + e);
                        if (!r) put(m.state + d * wide + e, x += at(written + e) * key[d]);
                        if (seen) put(out + e, at(out + e) + x * (m.q[(r * CHUNK + i) * m.broad + d] * (real)c->scale));
                    }
                if (seen)
                    narrow(out, c->kind, c->head_dim_v,
                           (char *)c->out.first + (m.b * c->out.batch + m.out_head(r) * c->out.head + (m.row + i - m.first) * c->out.row) *
                                                      element_bytes(c->kind));
            }
        }
        for (i64 d = 0; d < c->head_dim; d++)
            for (i64 j = 0; j < c->head_dim_v; j++) c->after[(n * c->head_dim + d) * c->head_dim_v + j] = m.state[d * wide + j];
    });
    return failed ? -1 : 1;
}

// 0; -1: there is no memory. The chunks go backwards; `entered` was left by the forward pass.
extern "C" int gated_backward(const Gated *c) {
    bool failed = false;
    share_lines(c, [&](i64 n) {
        real *room = own_room.of(Chunk::room(c));
        if (!room) {
            failed = true;
            return;
        }
        Back m(c, room);
        i64 size = c->head_dim * m.wide, chunks = chunks_of(c);
        for (i64 i = 0; i < size; i++) m.grad_state[i] = 0;
        if (c->grad_after) read_state(c->grad_after + n * c->head_dim * c->head_dim_v, c->head_dim, c->head_dim_v, m.grad_state);
        for (i64 chunk = chunks - 1; chunk >= 0; chunk--) {
            const real *before = c->entered + (n * (chunks + 1) + chunk) * size;
            __builtin_memcpy(m.state, before, size * sizeof(real));
            m.load(n, chunk);
            m.make();
            m.back(before + size);
        }
        for (i64 d = 0; d < c->head_dim; d++)
            for (i64 j = 0; j < c->head_dim_v; j++) c->grad_state[(n * c->head_dim + d) * c->head_dim_v + j] = m.grad_state[d * m.wide + j];
    });
    return failed ? -1 : 0;
}
