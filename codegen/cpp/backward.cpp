// Attention, backward: the gradients of a block of keys and a strip of queries from the LSE of the whole rows. Five products for each;
// the gradients of the queries stay with the strip, those of the keys are added up along the strips of a key/value head. A head's
// strips may be shared out in parts: how many depends on the call alone, and parts are joined in their order.

// What is needed of a strip beside the logits, lane by lane or turned.
struct Given {
    real *grad_turned, *q, *grad, *grad_q;  // (Dv, lanes), then (lanes, D or Dv in whole vectors)
    real lse[MOST_LANES], delta[MOST_LANES];

    static i64 size(const Call *c) {
        return MOST_LANES * (c->head_dim_v + 2 * whole_vectors(c->head_dim) + whole_vectors(c->head_dim_v)) + 64;
    }
    Given(const Call *c, real *room) {
        grad_turned = room;
        q = grad_turned + MOST_LANES * c->head_dim_v;
        grad_q = q + MOST_LANES * whole_vectors(c->head_dim);
        grad = grad_q + MOST_LANES * whole_vectors(c->head_dim);
    }
};

static void read_row(const Tensor &t, i64 kind, i64 width, const Strip &strip, i64 lane, real *to) {
    widen(t.first + (strip.b * t.batch + strip.h[lane] * t.head + strip.row[lane] * t.row) * element_bytes(kind), kind, width, to);
    for (i64 j = width; j < whole_vectors(width); j++) to[j] = 0;
}

// An LSE further from 0 than this has lost digits of the logarithm that was added to the highest logit.
constexpr real FAR = 1024;

static void prepare(const Call *c, const Strip &strip, const Desk &desk, Given &given) {
    i64 broad = whole_vectors(c->head_dim), broad_v = whole_vectors(c->head_dim_v);
    bool far = false;
    for (i64 i = 0; i < strip.lanes.count; i++) {
        real *out = desk.values, *grad = given.grad + i * broad_v;
        i64 line = line_of(c, strip, i);
        read_row(c->q, c->kind, c->head_dim, strip, i, given.q + i * broad);
        read_row(c->grad_out, c->kind, c->head_dim_v, strip, i, grad);
        read_row(c->out, c->kind, c->head_dim_v, strip, i, out);
        Vector sums = {};
        for (i64 j = 0; j < broad_v; j += WIDTH) sums += at(out + j) * at(grad + j);
        real delta = 0, lse = c->lse[line];
        for (int j = 0; j < WIDTH; j++) delta += sums[j];
        if (c->grad_lse && lse != LOWEST) delta -= c->grad_lse[line];
        if (i < strip.used) c->delta[line] = delta;
        given.delta[i] = delta;
        given.lse[i] = lse == LOWEST ? -LOWEST : (real)(lse * LOG2E);
        far |= divides(c) && sizeof(real) == 4 && __builtin_fabs(lse) > FAR && __builtin_fabs(lse) < -LOWEST;
    }
    if (far) {
        // Such an LSE is taken apart again. Gradients are linear in what comes from outside: there goes the factor of all weights.
        Sums sums = sums_at(desk.sums, 0);
        sums.values = nullptr;
        add_up(c, strip, 0, 1, desk, sums);
        add_sink(c, strip, sums);
        for (i64 i = 0; i < strip.lanes.count; i++) {
            i64 lane = least(i, strip.used - 1);
            real size = __builtin_fabs(c->lse[line_of(c, strip, i)]);
            if (!(size > FAR && size < -LOWEST)) continue;
            given.lse[i] = sums.highest[lane];
            given.delta[i] /= sums.total[lane];
            for (i64 j = 0; j < broad_v; j++) given.grad[i * broad_v + j] /= sums.total[lane];
        }
    }
    const real *q[MOST_LANES], *grad[MOST_LANES];
    for (i64 i = 0; i < strip.lanes.count; i++) q[i] = given.q + i * broad, grad[i] = given.grad + i * broad_v;
    turn(q, strip.lanes.count, c->head_dim, desk.turned);
    turn(grad, strip.lanes.count, c->head_dim_v, given.grad_turned);
    for (i64 i = 0; i < strip.used * broad; i++) given.grad_q[i] = 0;
}

// Logits -> weights; changes of weights -> changes of logits. Both tiles hold keys x lanes. `pick`: as in the forward pass.
template <bool pick>
static void differentiate(const Strip &strip, i64 keys, real factor, const Given &given, real *tile, real *change) {
    i64 row = strip.lanes.count;
    for (i64 i = 0; i < row; i += WIDTH) {
        Vector lse = at(given.lse + i), delta = at(given.delta + i);
        for (i64 j = 0; j < keys; j++) {
            real *p = tile + j * row + i, *d = change + j * row + i;
            Vector logit = at(p), weight = power_of_two(logit * factor - lse);
            if (pick) {
                Vector more = logit == LOWEST ? Vector{} : weight - power_of_two(-lse), none = {};
                put(p, more > none ? more : none);
                put(d, more > none ? weight * (at(d) - delta) : more < none ? weight * delta : none);
                continue;
            }
            put(p, weight);
            // What is masked has no part in it, whatever its product with the gradient is.
            put(d, weight == (real)0 ? Vector{} : weight * (at(d) - delta));
        }
    }
}

struct Gains {  // where a part of the work adds up, from a first key on
    real *k, *v;
    i64 first;
    double *tables;
};

static thread_local Room walk_room;

// Returns whether there was memory.
static bool add_strip(const Call *c, const Strip &strip, real *room, Gains gains) {
    i64 lanes = strip.lanes.count, broad = whole_vectors(c->head_dim), broad_v = whole_vectors(c->head_dim_v);
    Desk desk(c, room);
    constexpr i64 TILE = MOST_LANES * BLOCK_KEYS;
    real *change = room + Desk::size(c), *slope = change + TILE, *plain = slope + TILE, *shares = plain + TILE, *gain = shares + TILE;
    Given given(c, gain + TILE);
    prepare(c, strip, desk, given);
    Head k = keys_of(c, strip, c->k, c->head_dim), v = keys_of(c, strip, c->v, c->head_dim_v);
    const int *places = c->key_places.of(strip.b, strip.h[0], c->heads, c->keys);
    real factor = c->slope ? 1 : (real)(c->scale * LOG2E);
    auto products = [&](i64 key, i64 count) {
        Rows some_k = k.rows(key, count, true, desk.keys);
        product<false>(count, lanes, c->head_dim, some_k.first, some_k.row, 1, desk.turned, lanes, desk.tile, lanes);
        return some_k;
    };
    real left[MOST_LANES] = {}, earlier[MOST_LANES] = {};  // of a stick
    const real *left_here = nullptr;
    auto add = [&](i64 key, i64 count, bool full) {
        Rows some_k = products(key, count), some_v = v.rows(key, count, false, desk.values);
        if (c->gains) __builtin_memcpy(plain, desk.tile, count * lanes * sizeof(real));
        if (c->slope) c->slope(c, &strip.lanes, key, count, desk.tile, slope);
        if (!full) hide(c, strip, key, count, desk.tile);
        product<false>(count, lanes, c->head_dim_v, some_v.first, some_v.row, 1, given.grad_turned, lanes, change, lanes);
        if (c->weighing == SOFTMAX)
            differentiate<false>(strip, count, factor, given, desk.tile, change);
        else if (c->weighing == SOFTPICK)
            differentiate<true>(strip, count, factor, given, desk.tile, change);
        else if (c->weighing == STICK)
            differentiate_sticks(strip, count, factor, left_here, earlier, desk.tile, change, shares, gain);
        else if (!full)
            hide(c, strip, key, count, change);
        if (c->gains) c->gains(c, &strip.lanes, key, count, plain, change, gains.tables);
        for (i64 i = 0; c->slope && i < count * lanes; i += WIDTH)
            put(change + i, at(change + i) == (real)0 ? Vector{} : at(change + i) * at(slope + i));
        real *to_k[BLOCK_KEYS], *to_v[BLOCK_KEYS];
        for (i64 j = 0; j < count; j++) {
            i64 position = (key + j) * c->step + strip.lanes.residue, place = (places ? places[position] : position) - gains.first;
            to_k[j] = gains.k + place * broad, to_v[j] = gains.v + place * broad_v;
        }
        Even<const real> weights{desk.tile, lanes}, changes{change, lanes};
        product_of<true>(count, broad_v, strip.used, weights, 1, given.grad, broad_v, BROAD, Listed<real>{to_v});
        product_of<true>(count, broad, strip.used, changes, 1, given.q, broad, BROAD, Listed<real>{to_k});
        product<true>(strip.used, broad, count, change, 1, lanes, some_k.first, some_k.row, given.grad_q, broad);
    };
    if (c->weighing == STICK) {
        real *of_walk = walk_room.of(Walk::size(c, strip));
        if (!of_walk) return false;
        Walk walk(c, strip, of_walk);
        visit_down(c, strip, 0, 1, [&](i64 key, i64 count, bool full) {
            walk.add(strip, key, count, full, left);
            products(key, count);
            if (c->score) c->score(c, &strip.lanes, key, count, desk.tile);
            if (!full) hide(c, strip, key, count, desk.tile);
            pass_sticks(strip, desk.tile, count, factor, left);
            return !nothing_left(strip, left);
        });
        for (i64 n = walk.count - 1; n >= 0; n--) {
            left_here = walk.left + n * MOST_LANES;
            add(walk.blocks[n].key, walk.blocks[n].keys, walk.blocks[n].full);
        }
    } else {
        visit(c, strip, 0, 1, add);
    }
    for (i64 i = 0; i < strip.used; i++) {
        real *to = c->grad_q + line_of(c, strip, i) * c->head_dim;
        for (i64 j = 0; j < c->head_dim; j++) to[j] = given.grad_q[i * broad + j] * (real)c->scale;
    }
    return true;
}

// The rows of keys that some of a head's strips see: from `low` to `high`.
static void reach(const Call *c, const Cut &cut, i64 head, i64 from, i64 to, i64 &low, i64 &high) {
    low = c->keys, high = 0;
    if (c->intervals < 0 || c->key_places.first) {
        low = 0, high = c->key_places.rows(c->keys);
        return;
    }
    for (i64 n = from; n < to; n++) {
        Strip strip(c, cut, head / c->kv_heads, head % c->kv_heads, n);
        if (!strip.used) continue;
        for (i64 s = 0; s < c->intervals; s++)
            if (strip.begin[s] < strip.end[s]) {
                low = least(low, strip.begin[s] * c->step + strip.lanes.residue);
                high = most(high, (strip.end[s] - 1) * c->step + strip.lanes.residue + 1);
            }
    }
}

// Adds what a part has come to, keys `part.first` and on, to the gradients of its head.
static void join(const Call *c, i64 head, Gains part, i64 length) {
    i64 broad = whole_vectors(c->head_dim), broad_v = whole_vectors(c->head_dim_v);
    i64 row = head * c->key_places.rows(c->keys) + part.first;
    real *k = c->grad_k + row * broad, *v = c->grad_v + row * broad_v;
    for (i64 i = 0; i < length * broad; i += WIDTH) put(k + i, at(k + i) + at(part.k + i));
    for (i64 i = 0; i < length * broad_v; i += WIDTH) put(v + i, at(v + i) + at(part.v + i));
}

extern "C" int vector_width() { return WIDTH; }

// Adds gradients to grad_k and grad_v, which hold zeros, and writes the rest; -1: there is no memory.
extern "C" int attend_backward(Call *c) {
    cut_strips(c);
    Cut cut(c);
    i64 heads = c->batch * c->kv_heads, parts = c->parts, broad = whole_vectors(c->head_dim), broad_v = whole_vectors(c->head_dim_v);
    i64 keys = c->key_places.rows(c->keys);
    if (parts > cut.strips_of_head) parts = cut.strips_of_head;
    bool failed = false;
    if (c->parts_alone || is_little(c)) c->threads = 1;
    i64 *turn = (i64 *)__builtin_calloc(heads, sizeof(i64));
    Gains *done = (Gains *)__builtin_calloc(heads * parts, sizeof(Gains));
    i64 *length = (i64 *)__builtin_calloc(heads * parts, sizeof(i64));
    bool *ready = (bool *)__builtin_calloc(heads * parts, 1);
    bool lock = false;
    share(c, turn && done && length && ready ? heads * parts : 0, [&](i64 n) {
        i64 head = n / parts, part = n % parts;
        i64 from = cut.strips_of_head * part / parts, to = cut.strips_of_head * (part + 1) / parts;
        real *room = own_room.of(Desk::size(c) + Given::size(c) + 5 * MOST_LANES * BLOCK_KEYS);
        Gains gains = {c->grad_k + head * keys * broad, c->grad_v + head * keys * broad_v, 0, nullptr};
        i64 low = 0, high = 0;
        real *own = nullptr;
        if (parts > 1 && room) {
            reach(c, cut, head, from, to, low, high);
            if (low < high && (own = (real *)__builtin_calloc((high - low) * (broad + broad_v), sizeof(real))))
                gains = {own, own + (high - low) * broad, low, nullptr};
        }
        if (!room || (low < high && !own)) {
            failed = true;
            return;
        }
        gains.tables = c->sums ? c->sums + (c->parts_alone ? 0 : n * c->sums_size) : nullptr;
        for (i64 i = from; i < to; i++) {
            Strip strip(c, cut, head / c->kv_heads, head % c->kv_heads, i);
            if (strip.used && !add_strip(c, strip, room, gains)) failed = true;
        }
        if (parts == 1) return;
        // The parts of a head are joined one after the other, by whoever finishes the one that is next.
        while (__atomic_test_and_set(&lock, __ATOMIC_ACQUIRE)) {}
        done[n] = gains, length[n] = most(high - low, 0), ready[n] = true;
        for (i64 &next = turn[head]; next < parts && ready[head * parts + next]; next++) {
            i64 other = head * parts + next;
            if (!length[other]) continue;
            join(c, head, done[other], length[other]);
            __builtin_free(done[other].k);
        }
        __atomic_clear(&lock, __ATOMIC_RELEASE);
    });
    failed |= !(turn && done && length && ready);
    __builtin_free(turn);
    __builtin_free(done);
    __builtin_free(length);
    __builtin_free(ready);
    real scale = c->scale;
    share(c, failed ? 0 : heads, [&](i64 head) {
        real *k = c->grad_k + head * keys * broad;
        for (i64 i = 0; i < keys * broad; i += WIDTH) put(k + i, at(k + i) * scale);
    });
    return failed ? -1 : 0;
}
