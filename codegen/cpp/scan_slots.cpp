// Gated slots, key by key: each slot moves towards the key by the share that its gate lets in, then a query looks at all slots. The keys of
// slots lie as (head_dim, slots) and their values as (slots, head_dim_v), so that both looks run along vectors. A key/value head is worked
// on by one thread. S + w (k - S) keeps its digits where w is tiny, as (1 - w) S + w k would not.

struct Slots {
    i64 batch, heads, kv_heads, rows, keys, head_dim, head_dim_v, q_offset;
    double scale;
    i64 kind, threads;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    Tensor q, k, v, out, grad_out;  // grad_out: or null
    i64 slots, delay, masked;
    const real *write;  // (batch, kv_heads, keys, slots): the share of each key that a slot takes
    const unsigned char *begins, *seen;  // (batch or 1, keys), (batch or 1, kv_heads or 1, rows): see SlotCall; or null
    i64 begins_batch, seen_batch, seen_head;
    const real *state_k, *state_v;  // (batch, kv_heads, slots, head_dim or head_dim_v)
    real *after_k, *after_v, *lse;  // likewise at the end; (batch, heads, rows)
    real *states;  // before every CHUNK keys, as they lie here, for the backward pass; or null
    // Contiguous gradients, rows of whole vectors where they are rows of q, k or v; zeros before.
    const real *grad_lse, *grad_after_k, *grad_after_v;  // or null
    real *grad_q, *grad_k, *grad_v, *grad_write, *grad_state_k, *grad_state_v;
};

constexpr i64 CHUNK = 64;

static inline real sum_of(Vector x) {
    real found = x[0];
    for (int i = 1; i < WIDTH; i++) found += x[i];
    return found;
}

struct Bank {
    const Slots *c;
    i64 group, wide, broad, broad_v, size;  // heads; slots, head_dim and head_dim_v in whole vectors; of a state
    real *k, *v, *share, *q, *grad, *weights, *slopes, *out;  // from q on a row for each head of the group

    static i64 state_size(const Slots *c) {
        return whole_vectors(c->head_dim) * whole_vectors(c->slots) + c->slots * whole_vectors(c->head_dim_v);
    }
    static i64 size_of(const Slots *c) {
        i64 rows = whole_vectors(c->head_dim) + 2 * whole_vectors(c->head_dim_v) + 2 * whole_vectors(c->slots);
        return whole_vectors(c->head_dim) + whole_vectors(c->head_dim_v) + whole_vectors(c->slots) + c->heads / c->kv_heads * rows + 16 * WIDTH;
    }
    Bank(const Slots *c, real *at_) : c(c) {
        real *here = at_;
        auto take = [&](i64 n) { real *to = here; here += whole_vectors(n); return to; };
        wide = whole_vectors(c->slots), broad = whole_vectors(c->head_dim), broad_v = whole_vectors(c->head_dim_v), size = state_size(c);
        group = c->heads / c->kv_heads, k = take(broad), v = take(broad_v), share = take(wide);
        q = take(group * broad), grad = take(group * broad_v), out = take(group * broad_v);
        weights = take(group * wide), slopes = take(group * wide);
    }
    real *values(real *state) const { return state + broad * wide; }
    const real *values(const real *state) const { return state + broad * wide; }

    void row(const Tensor &t, i64 width, i64 b, i64 head, i64 at_row, real by, real *to) const {
        widen(t.first + (b * t.batch + head * t.head + at_row * t.row) * element_bytes(c->kind), c->kind, width, to);
        for (i64 j = 0; by != 1 && j < width; j++) to[j] *= by;
        for (i64 j = width; j < whole_vectors(width); j++) to[j] = 0;
    }

    void load(const real *keys, const real *values_, real *to) const {
        for (i64 i = 0; i < size; i++) to[i] = 0;
        for (i64 m = 0; m < c->slots; m++) {
            for (i64 d = 0; d < c->head_dim; d++) to[d * wide + m] = keys[m * c->head_dim + d];
            for (i64 d = 0; d < c->head_dim_v; d++) values(to)[m * broad_v + d] = values_[m * c->head_dim_v + d];
        }
    }
    void store(const real *from, real *keys, real *values_) const {
        for (i64 m = 0; m < c->slots; m++) {
            for (i64 d = 0; d < c->head_dim; d++) keys[m * c->head_dim + d] = from[d * wide + m];
            for (i64 d = 0; d < c->head_dim_v; d++) values_[m * c->head_dim_v + d] = values(from)[m * broad_v + d];
        }
    }

    bool begins(i64 b, i64 key) const { return c->begins && c->begins[b * c->begins_batch * c->keys + key]; }
    bool sees(i64 b, i64 kv_head, i64 at_row) const {
        return !c->seen || c->seen[(b * c->seen_batch + kv_head * c->seen_head) * c->rows + at_row];
    }

    // The key's row, its value and what each slot takes of it.
    void read(i64 b, i64 kv_head, i64 key) const {
        row(c->k, c->head_dim, b, kv_head, key, 1, k);
        row(c->v, c->head_dim_v, b, kv_head, key, 1, v);
        const real *from = c->write + ((b * c->kv_heads + kv_head) * c->keys + key) * c->slots;
        for (i64 m = 0; m < wide; m++) share[m] = m < c->slots ? from[m] : 0;
    }

    void write(bool anew, real *state) const {
        if (anew)
            for (i64 i = 0; i < size; i += WIDTH) put(state + i, Vector{});
        for (i64 d = 0; d < c->head_dim; d++)
            for (i64 m = 0; m < wide; m += WIDTH) {
                Vector s = at(state + d * wide + m);
                put(state + d * wide + m, s + at(share + m) * (k[d] - s));
            }
        real *to = values(state);
        for (i64 m = 0; m < c->slots; m++)
            for (i64 j = 0; j < broad_v; j += WIDTH) {
                Vector s = at(to + m * broad_v + j);
                put(to + m * broad_v + j, s + share[m] * (at(v + j) - s));
            }
    }

    // The weights of the slots for the queries of a group, and their LSE where it is wanted.
    void weigh(i64 b, i64 kv_head, i64 at_row, const real *state, real *lse) const {
        for (i64 g = 0; g < group; g++) row(c->q, c->head_dim, b, kv_head * group + g, at_row, (real)c->scale, q + g * broad);
        product<false>(group, wide, c->head_dim, q, broad, 1, state, wide, weights, wide);
        for (i64 g = 0; g < group; g++) {
            real *of = weights + g * wide;
            for (i64 m = c->slots; m < wide; m++) of[m] = LOWEST;
            Vector peaks = at(of), total = {};
            for (i64 m = WIDTH; m < wide; m += WIDTH) peaks = at(of + m) > peaks ? at(of + m) : peaks;
            real peak = peaks[0];
            for (int i = 1; i < WIDTH; i++) peak = peaks[i] > peak ? peaks[i] : peak;
            for (i64 m = 0; m < wide; m += WIDTH) {
                Vector p = power_of_two((at(of + m) - peak) * (real)LOG2E);
                total += p;
                put(of + m, p);
            }
            real sum = sum_of(total), part = 1 / sum;
            for (i64 m = 0; m < wide; m += WIDTH) put(of + m, at(of + m) * part);
            if (lse) lse[g * c->rows] = peak + (real)__builtin_log((double)sum);
        }
    }

    // The results of one query for all heads of the group.
    bool ask(i64 b, i64 kv_head, i64 at_row, const real *state) const {
        real *lse = c->lse + (b * c->heads + kv_head * group) * c->rows + at_row;
        if (sees(b, kv_head, at_row)) {
            weigh(b, kv_head, at_row, state, lse);
            product<false>(group, broad_v, c->slots, weights, wide, 1, values(state), broad_v, out, broad_v);
        } else {
            for (i64 j = 0; j < group * broad_v; j += WIDTH) put(out + j, Vector{});
            for (i64 g = 0; g < group; g++) lse[g * c->rows] = c->masked ? (double)LOWEST : __builtin_log((double)c->slots);
        }
        Vector wrong = {};
        for (i64 j = 0; j < group * broad_v; j += WIDTH) wrong += at(out + j) * (real)0;
        bool finite = true;
        for (int i = 0; i < WIDTH; i++) finite &= wrong[i] == 0;
        for (i64 g = 0; g < group; g++)
            narrow(out + g * broad_v, c->kind, c->head_dim_v, (char *)c->out.first + (b * c->out.batch + (kv_head * group + g) * c->out.head +
                                                                                       at_row * c->out.row) * element_bytes(c->kind));
        return finite;
    }

    // The gradients of one query: those of q written, those of the slots added to `change`.
    void answer(i64 b, i64 kv_head, i64 at_row, const real *state, real *change) const {
        if (!sees(b, kv_head, at_row)) return;
        weigh(b, kv_head, at_row, state, nullptr);
        for (i64 g = 0; g < group; g++) {
            i64 head = kv_head * group + g, line = (b * c->heads + head) * c->rows + at_row;
            real *grad = this->grad + g * broad_v, *weights = this->weights + g * wide, *slopes = this->slopes + g * wide, mean = 0;
            row(c->grad_out, c->head_dim_v, b, head, at_row, 1, grad);
            for (i64 m = 0; m < c->slots; m++) {
                Vector sum = {};
                for (i64 j = 0; j < broad_v; j += WIDTH) sum += at(values(state) + m * broad_v + j) * at(grad + j);
                slopes[m] = sum_of(sum);
                mean += weights[m] * slopes[m];
            }
            real by_lse = c->grad_lse ? c->grad_lse[line] : 0;
            for (i64 m = 0; m < wide; m++) slopes[m] = m < c->slots ? weights[m] * (slopes[m] - mean + by_lse) : 0;
            for (i64 d = 0; d < c->head_dim; d++) {
                Vector sum = {};
                for (i64 m = 0; m < wide; m += WIDTH) sum += at(slopes + m) * at(state + d * wide + m);
                c->grad_q[line * broad + d] = sum_of(sum) * (real)c->scale;
            }
        }
        product<true>(c->head_dim, wide, group, q, 1, broad, slopes, wide, change, wide);
        product<true>(c->slots, broad_v, group, weights, 1, wide, grad, broad_v, values(change), broad_v);
    }

    // Back through the write of one key. `state`: before it (but for what a beginning forgets); `change`: of the slots after it, then before.
    void take_back(i64 b, i64 kv_head, i64 key, bool anew, const real *state, real *change) const {
        i64 line = (b * c->kv_heads + kv_head) * c->keys + key;
        real *to_write = c->grad_write + line * c->slots;
        for (i64 m = 0; m < wide; m += WIDTH) {
            Vector by_share = {};
            for (i64 d = 0; d < c->head_dim; d++) {
                Vector s = anew ? Vector{} : at(state + d * wide + m);
                by_share += at(change + d * wide + m) * (k[d] - s);
            }
            put(slopes + m, by_share);
        }
        for (i64 d = 0; d < c->head_dim; d++) {
            Vector sum = {};
            for (i64 m = 0; m < wide; m += WIDTH) {
                Vector x = at(change + d * wide + m), taken = x * at(share + m);
                sum += taken;
                put(change + d * wide + m, anew ? Vector{} : x - taken);
            }
            c->grad_k[line * broad + d] = sum_of(sum);
        }
        real *to_v = c->grad_v + line * broad_v;
        for (i64 m = 0; m < c->slots; m++) {
            Vector by_share = {};
            for (i64 j = 0; j < broad_v; j += WIDTH) {
                real *here = values(change) + m * broad_v + j;
                Vector x = at(here), s = anew ? Vector{} : at(values(state) + m * broad_v + j), taken = x * share[m];
                by_share += x * (at(v + j) - s);
                put(to_v + j, at(to_v + j) + taken);
                put(here, anew ? Vector{} : x - taken);
            }
            to_write[m] = slopes[m] + sum_of(by_share);
        }
    }
};

static thread_local Room own_room;

template <class F>
static void share_heads(const Slots *c, F f) {
    bool little = c->batch * c->heads * c->keys * c->slots < (1 << 14);
    share_among(c->parallel, little ? 1 : c->threads, c->batch * c->kv_heads, f);
}

static i64 chunks_of(const Slots *c) { return (c->keys + CHUNK - 1) / CHUNK; }

extern "C" int vector_width() { return WIDTH; }
extern "C" i64 state_size(const Slots *c) { return Bank::state_size(c); }

// Whether all results are finite; -1: there is no memory.
extern "C" int slots_forward(const Slots *c) {
    bool failed = false, finite = true;
    share_heads(c, [&](i64 n) {
        i64 size = Bank::state_size(c), b = n / c->kv_heads, kv_head = n % c->kv_heads;
        real *room = own_room.of(Bank::size_of(c) + size);
        if (!room) {
            failed = true;
            return;
        }
        Bank m(c, room + size);
        real *state = room;
        m.load(c->state_k + n * c->slots * c->head_dim, c->state_v + n * c->slots * c->head_dim_v, state);
        i64 row = 0;  // the next query
        bool good = true;
        for (; row < c->rows && c->q_offset + row - c->delay < 0; row++) good &= m.ask(b, kv_head, row, state);
        for (i64 key = 0; key < c->keys; key++) {
            if (c->states && key % CHUNK == 0) __builtin_memcpy(c->states + (n * chunks_of(c) + key / CHUNK) * size, state, size * sizeof(real));
            m.read(b, kv_head, key);
            m.write(m.begins(b, key), state);
            if (row < c->rows && c->q_offset + row - c->delay == key) good &= m.ask(b, kv_head, row++, state);
        }
        m.store(state, c->after_k + n * c->slots * c->head_dim, c->after_v + n * c->slots * c->head_dim_v);
        for (i64 i = 0; i < size; i++) good &= state[i] * 0 == 0;
        if (!good) finite = false;
    });
    return failed ? -1 : finite;
}

// 0; -1: there is no memory.
extern "C" int slots_backward(const Slots *c) {
    bool failed = false;
    share_heads(c, [&](i64 n) {
        i64 size = Bank::state_size(c), b = n / c->kv_heads, kv_head = n % c->kv_heads;
        real *room = own_room.of(Bank::size_of(c) + (CHUNK + 2) * size);
        if (!room) {
            failed = true;
            return;
        }
        real *change = room, *history = room + size;
        Bank m(c, room + (CHUNK + 2) * size);
        for (i64 i = 0; i < size; i++) change[i] = 0;
        if (c->grad_after_k) m.load(c->grad_after_k + n * c->slots * c->head_dim, c->grad_after_v + n * c->slots * c->head_dim_v, change);
        for (i64 chunk = chunks_of(c) - 1; chunk >= 0; chunk--) {
            i64 first = chunk * CHUNK, count = least(CHUNK, c->keys - first);
            __builtin_memcpy(history, c->states + (n * chunks_of(c) + chunk) * size, size * sizeof(real));
            for (i64 i = 0; i < count; i++) {
                __builtin_memcpy(history + (i + 1) * size, history + i * size, size * sizeof(real));
                m.read(b, kv_head, first + i);
                m.write(m.begins(b, first + i), history + (i + 1) * size);
            }
            for (i64 i = count - 1; i >= 0; i--) {
                i64 row = first + i + c->delay - c->q_offset;
                if (c->grad_out.first && row >= 0 && row < c->rows) m.answer(b, kv_head, row, history + (i + 1) * size, change);
                m.read(b, kv_head, first + i);
                m.take_back(b, kv_head, first + i, m.begins(b, first + i), history + i * size, change);
            }
        }
        m.load(c->state_k + n * c->slots * c->head_dim, c->state_v + n * c->slots * c->head_dim_v, history);
        for (i64 row = 0; c->grad_out.first && row < c->rows && c->q_offset + row - c->delay < 0; row++) m.answer(b, kv_head, row, history, change);
        m.store(change, c->grad_state_k + n * c->slots * c->head_dim, c->grad_state_v + n * c->slots * c->head_dim_v);
    });
    return failed ? -1 : 0;
}
