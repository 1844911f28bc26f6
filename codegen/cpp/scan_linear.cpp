// Linear attention with a constant decay for each query head, forward and backward, chunk by chunk: within a chunk pairs are products like
// any other, between chunks a state (head_dim x head_dim_v) is carried on. A head is worked on by one thread, its chunks in their order.

struct Linear {
    i64 batch, heads, kv_heads, rows, keys, head_dim, head_dim_v, q_offset;
    double scale;
    i64 kind, threads;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    Tensor q, k, v, out, grad_out;  // grad_out: or null
    const real *log_decay;  // (heads); at most 0, -inf: nothing is remembered
    const unsigned char *begins;  // (batch or 1, keys): keys that begin a document, or null
    i64 begins_batch;
    const real *state;  // (batch, heads, head_dim, head_dim_v)
    real *after;  // the same at the end
    real *states;  // (batch, heads, chunks, head_dim, whole vectors): before each chunk, for the backward pass, or null
    // Contiguous gradients, rows of whole vectors; those of k and v hold zeros. `grad_after`: of the state at the end, or null.
    real *grad_q, *grad_k, *grad_v, *grad_state;
    const real *grad_after;
};

constexpr i64 CHUNK = 64;

static i64 chunks_of(const Linear *c) { return (c->keys + CHUNK - 1) / CHUNK; }

// What a chunk of one head is made of. Row i is the key `key + i` and, where there is one, the query at its position.
struct Chunk {
    const Linear *c;
    i64 broad, broad_v, key, count;
    real powers[CHUNK + 1];  // decay to the power of 0, 1, ..
    real reach[CHUNK], later[CHUNK], total;  // of the state before in row i; of row i in the state after; of the state before in it
    i64 document[CHUNK];  // of its rows, counted from that of the first
    real *q, *k, *v, *grad, *turned, *pairs, *slopes, *sums, *state, *grad_state, *other;

    static i64 size(const Linear *c) {
        i64 broad = whole_vectors(c->head_dim), broad_v = whole_vectors(c->head_dim_v), widest = most(broad, broad_v);
        return CHUNK * (2 * broad + 2 * broad_v + 3 * widest) + 2 * CHUNK * CHUNK + 3 * widest * widest + 32 * WIDTH;
    }
    Chunk(const Linear *c, real *at) : c(c) {
        broad = whole_vectors(c->head_dim), broad_v = whole_vectors(c->head_dim_v);
        i64 widest = most(broad, broad_v);
        auto take = [&](i64 n) { real *here = at; at += whole_vectors(n); return here; };
        q = take(CHUNK * broad), k = take(CHUNK * broad), v = take(CHUNK * broad_v), grad = take(CHUNK * broad_v);
        turned = take(CHUNK * widest), sums = take(2 * CHUNK * widest);
        pairs = take(CHUNK * CHUNK), slopes = take(CHUNK * CHUNK);
        state = take(widest * widest), grad_state = take(widest * widest), other = take(widest * widest);
    }

    void decay(i64 head) {
        double each = c->log_decay[head];
        powers[0] = 1;
        for (i64 n = 1; n <= CHUNK; n++) powers[n] = (real)__builtin_exp(each * n);
    }

    void read(const Tensor &t, i64 width, i64 b, i64 head, i64 row, i64 rows, real by, real *to) const {
        i64 wide = whole_vectors(width);
        for (i64 i = 0; i < rows; i++, to += wide) {
            widen(t.first + (b * t.batch + head * t.head + (row + i) * t.row) * element_bytes(c->kind), c->kind, width, to);
            for (i64 j = 0; by != 1 && j < width; j++) to[j] *= by;
            for (i64 j = width; j < wide; j++) to[j] = 0;
        }
    }

    void weigh(i64 b) {
        const unsigned char *begins = c->begins ? c->begins + b * c->begins_batch * c->keys + key : nullptr;
        i64 number = 0;
        for (i64 i = 0; i < count; i++) document[i] = number += begins && begins[i];
        for (i64 i = 0; i < count; i++) {
            reach[i] = document[i] ? 0 : powers[i + 1];
            later[i] = document[i] == number ? powers[count - 1 - i] : 0;
        }
        total = number ? 0 : powers[count];
    }

    // x (rows x width in whole vectors), turned: (width, CHUNK), zeros beyond the rows.
    void turn(const real *x, i64 rows, i64 wide, real *to) const {
        const real *lines[WIDTH];
        static const real zeros[4096 / sizeof(real)] = {};
        for (i64 j = 0; j < CHUNK; j += WIDTH) {
            for (i64 d = 0; d < wide; d += WIDTH) {
                for (i64 i = 0; i < WIDTH; i++) lines[i] = j + i < rows ? x + (j + i) * wide + d : zeros;
                turn_square(lines, 0, to + d * CHUNK + j, CHUNK);
            }
        }
    }

    // A square state (height x wide), turned: (wide_v .. rows of the other side).
    static void turn_state(const real *x, i64 height, i64 wide, real *to, i64 to_wide) {
        const real *lines[WIDTH];
        static const real zeros[4096 / sizeof(real)] = {};
        for (i64 j = 0; j < to_wide; j += WIDTH)
            for (i64 d = 0; d < wide; d += WIDTH) {
                for (i64 i = 0; i < WIDTH; i++) lines[i] = j + i < height ? x + (j + i) * wide + d : zeros;
                turn_square(lines, 0, to + d * to_wide + j, to_wide);
            }
    }

    // Pairs of rows (those of queries, all keys), a product in, that times its decay out; what a query does not see is 0.
    void fade(real *from, i64 first) const {
        for (i64 i = first; i < count; i++) {
            real *row = from + (i - first) * CHUNK;
            for (i64 j = 0; j < CHUNK; j++) row[j] = j > i || document[j] != document[i] || powers[i - j] == 0 ? 0 : row[j] * powers[i - j];
        }
    }
};

// The queries of a chunk: its rows from `first` on, `n` of them, beginning with query `row`.
struct Asked {
    i64 first, n, row;
    Asked(const Linear *c, i64 key, i64 count) {
        first = most(c->q_offset - key, 0);
        i64 end = least(c->q_offset + c->rows - key, count);
        n = most(end - first, 0);
        row = key + first - c->q_offset;
        if (!n) first = 0;
    }
};

static thread_local Room own_room;

template <class F>
static void share_heads(const Linear *c, i64 count, F f) {
    bool little = c->batch * c->heads * c->keys * (c->head_dim + c->head_dim_v) < (1 << 16);
    share_among(c->parallel, little ? 1 : c->threads, count, f);
}

static void read_state(const real *from, i64 height, i64 width, real *to) {
    i64 wide = whole_vectors(width);
    for (i64 d = 0; d < height; d++)
        for (i64 j = 0; j < wide; j++) to[d * wide + j] = j < width ? from[d * width + j] : 0;
}

extern "C" int vector_width() { return WIDTH; }

// Whether all results are finite; -1: there is no memory.
extern "C" int linear_forward(const Linear *c) {
    bool failed = false, finite = true;
    i64 group = c->heads / c->kv_heads;
    share_heads(c, c->batch * c->heads, [&](i64 n) {
        real *room = own_room.of(Chunk::size(c));
        if (!room) {
            failed = true;
            return;
        }
        Chunk m(c, room);
        i64 b = n / c->heads, head = n % c->heads, wide = m.broad_v, size = c->head_dim * wide;
        m.decay(head);
        read_state(c->state + n * c->head_dim * c->head_dim_v, c->head_dim, c->head_dim_v, m.state);
        Vector wrong = {};
        for (i64 at_chunk = 0; at_chunk < chunks_of(c); at_chunk++) {
            m.key = at_chunk * CHUNK, m.count = least(CHUNK, c->keys - m.key);
            m.weigh(b);
            m.read(c->k, c->head_dim, b, head / group, m.key, m.count, 1, m.k);
            m.read(c->v, c->head_dim_v, b, head / group, m.key, m.count, 1, m.v);
            if (c->states) __builtin_memcpy(c->states + (n * chunks_of(c) + at_chunk) * size, m.state, size * sizeof(real));
            Asked asked(c, m.key, m.count);
            if (asked.n) {
                m.read(c->q, c->head_dim, b, head, asked.row, asked.n, (real)c->scale, m.q);
                m.turn(m.k, m.count, m.broad, m.turned);
                product<false>(asked.n, CHUNK, c->head_dim, m.q, m.broad, 1, m.turned, CHUNK, m.pairs, CHUNK);
                m.fade(m.pairs, asked.first);
                product<false>(asked.n, wide, c->head_dim, m.q, m.broad, 1, m.state, wide, m.sums, wide);
                for (i64 i = 0; i < asked.n; i++)
                    for (i64 j = 0; j < wide; j += WIDTH) put(m.sums + i * wide + j, at(m.sums + i * wide + j) * m.reach[asked.first + i]);
                product<true>(asked.n, wide, asked.first + asked.n, m.pairs, CHUNK, 1, m.v, wide, m.sums, wide);
                for (i64 i = 0; i < asked.n; i++) {
                    for (i64 j = 0; j < wide; j += WIDTH) wrong += at(m.sums + i * wide + j) * (real)0;
                    narrow(m.sums + i * wide, c->kind, c->head_dim_v,
                           (char *)c->out.first + (b * c->out.batch + head * c->out.head + (asked.row + i) * c->out.row) * element_bytes(c->kind));
                }
            }
            for (i64 i = 0; i < m.count; i++)
                for (i64 d = 0; d < m.broad; d += WIDTH) put(m.k + i * m.broad + d, at(m.k + i * m.broad + d) * m.later[i]);
            for (i64 i = 0; i < size; i += WIDTH) put(m.state + i, at(m.state + i) * m.total);
            product<true>(c->head_dim, wide, m.count, m.k, 1, m.broad, m.v, wide, m.state, wide);
        }
        for (i64 d = 0; d < c->head_dim; d++)
            for (i64 j = 0; j < c->head_dim_v; j++) {
                real x = m.state[d * wide + j];
                c->after[(n * c->head_dim + d) * c->head_dim_v + j] = x;
                if (!(x * 0 == 0)) finite = false;
            }
        for (int i = 0; i < WIDTH; i++)
            if (!(wrong[i] == 0)) finite = false;
    });
    return failed ? -1 : finite;
}

// 0; -1: there is no memory. The chunks go backwards; `states` were left by the forward pass.
extern "C" int linear_backward(const Linear *c) {
    bool failed = false;
    i64 group = c->heads / c->kv_heads;
    share_heads(c, c->batch * c->kv_heads, [&](i64 line) {
        real *room = own_room.of(Chunk::size(c));
        if (!room) {
            failed = true;
            return;
        }
        Chunk m(c, room);
        i64 b = line / c->kv_heads, kv_head = line % c->kv_heads, wide = m.broad_v, broad = m.broad, size = c->head_dim * wide;
        for (i64 head = kv_head * group; head < (kv_head + 1) * group; head++) {
            i64 n = b * c->heads + head;
            m.decay(head);
            for (i64 i = 0; i < size; i++) m.grad_state[i] = 0;
            if (c->grad_after) read_state(c->grad_after + n * c->head_dim * c->head_dim_v, c->head_dim, c->head_dim_v, m.grad_state);
            for (i64 chunk = chunks_of(c) - 1; chunk >= 0; chunk--) {
                m.key = chunk * CHUNK, m.count = least(CHUNK, c->keys - m.key);
                m.weigh(b);
                m.read(c->k, c->head_dim, b, kv_head, m.key, m.count, 1, m.k);
                m.read(c->v, c->head_dim_v, b, kv_head, m.key, m.count, 1, m.v);
                const real *before = c->states + (n * chunks_of(c) + chunk) * size;
                real *to_k = c->grad_k + (line * c->keys + m.key) * broad, *to_v = c->grad_v + (line * c->keys + m.key) * wide;
                // What the state after the chunk gets: by k, (count x head_dim); by v.
                Chunk::turn_state(m.grad_state, c->head_dim, wide, m.other, broad);
                product<false>(m.count, broad, c->head_dim_v, m.v, wide, 1, m.other, broad, m.sums, broad);
                for (i64 i = 0; i < m.count; i++)
                    for (i64 d = 0; d < broad; d += WIDTH)
                        put(to_k + i * broad + d, at(to_k + i * broad + d) + at(m.sums + i * broad + d) * m.later[i]);
                product<false>(m.count, wide, c->head_dim, m.k, broad, 1, m.grad_state, wide, m.sums, wide);
                for (i64 i = 0; i < m.count; i++)
                    for (i64 j = 0; j < wide; j += WIDTH)
                        put(to_v + i * wide + j, at(to_v + i * wide + j) + at(m.sums + i * wide + j) * m.later[i]);
                for (i64 i = 0; i < size; i += WIDTH) put(m.grad_state + i, at(m.grad_state + i) * m.total);
                Asked asked(c, m.key, m.count);
                if (!asked.n) continue;
                m.read(c->q, c->head_dim, b, head, asked.row, asked.n, (real)c->scale, m.q);
                m.read(c->grad_out, c->head_dim_v, b, head, asked.row, asked.n, 1, m.grad);
                i64 seen = asked.first + asked.n;
                m.turn(m.k, m.count, broad, m.turned);
                product<false>(asked.n, CHUNK, c->head_dim, m.q, broad, 1, m.turned, CHUNK, m.pairs, CHUNK);
                m.fade(m.pairs, asked.first);
                m.turn(m.v, m.count, wide, m.turned);
                product<false>(asked.n, CHUNK, c->head_dim_v, m.grad, wide, 1, m.turned, CHUNK, m.slopes, CHUNK);
                m.fade(m.slopes, asked.first);
                product<true>(seen, wide, asked.n, m.pairs, 1, CHUNK, m.grad, wide, to_v, wide);
                product<true>(seen, broad, asked.n, m.slopes, 1, CHUNK, m.q, broad, to_k, broad);
                // By q: through pairs, and through the state before.
                real *to_q = c->grad_q + (n * c->rows + asked.row) * broad;
                Chunk::turn_state(before, c->head_dim, wide, m.other, broad);
                product<false>(asked.n, broad, c->head_dim_v, m.grad, wide, 1, m.other, broad, m.sums, broad);
                for (i64 i = 0; i < asked.n; i++)
                    for (i64 d = 0; d < broad; d += WIDTH) put(m.sums + i * broad + d, at(m.sums + i * broad + d) * m.reach[asked.first + i]);
                product<true>(asked.n, broad, seen, m.slopes, CHUNK, 1, m.k, broad, m.sums, broad);
                for (i64 i = 0; i < asked.n * broad; i += WIDTH) put(to_q + i, at(m.sums + i) * (real)c->scale);
                // By the state before.
                for (i64 i = 0; i < asked.n; i++)
                    for (i64 d = 0; d < broad; d += WIDTH) put(m.q + i * broad + d, at(m.q + i * broad + d) * m.reach[asked.first + i]);
                product<true>(c->head_dim, wide, asked.n, m.q, 1, broad, m.grad, wide, m.grad_state, wide);
            }
            for (i64 d = 0; d < c->head_dim; d++)
                for (i64 j = 0; j < c->head_dim_v; j++)
                    c->grad_state[(n * c->head_dim + d) * c->head_dim_v + j] = m.grad_state[d * wide + j];
        }
    });
    return failed ? -1 : 0;
}
