// What probing queries pay each key: their softmax over the keys, added up over the queries. Two passes, tile by tile, so that nothing of
// the size queries x keys is held: the highest logit and the total of each query, then the sum of each key. Logits lie in tiles of keys x
// lanes, a lane for each query, so that only the sum of a key is added up across a vector.

struct Probing {
    Tensor q;  // its first row is the first that probes
    i64 q_kind, q_heads;
    Tensor k;
    i64 k_kind, k_heads;
    i64 batch, heads, rows, width;
    i64 keys, kept;  // the softmax goes over so many first keys; sums are made of so many
    i64 causal, position;  // whether a row sees the keys up to its own position alone; that of the first row
    double scale, share;  // of the logits; of the sums
    real *to;  // (batch, heads, kept), `line` entries from one to the next
    i64 line;
    i64 threads;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
};

// Lanes of a strip, keys of a tile; keys that one share of the work goes through: what is added up depends on no number of threads.
constexpr i64 PROBING_LANES = 128, PROBING_KEYS = 32, PROBING_SHARE = 1024;
static_assert(PROBING_KEYS % WIDTH == 0);

static thread_local Room probing_room;

// Some probing queries of one head, turned, and where their logits go.
struct Prober {
    const Probing *p;
    i64 b, head;
    real *turned, *rows, *tile, *keys, *columns, *base, *shares;
    i64 first, lanes;  // of the strip: number of its first row, and how many

    static i64 size(const Probing *p) {
        i64 broad = whole_vectors(p->width);
        return p->width * columns_of(PROBING_LANES) + PROBING_LANES * (broad + 2) + PROBING_KEYS * (PROBING_LANES + broad) + 2 * WIDTH * WIDTH +
               8 * WIDTH;
    }

    Prober(const Probing *p, i64 b, i64 head, real *room) : p(p), b(b), head(head), first(0), lanes(0) {
        auto take = [&](i64 n) { real *here = room; room += whole_vectors(n); return here; };
        i64 broad = whole_vectors(p->width);
        turned = take(p->width * columns_of(PROBING_LANES)), rows = take(PROBING_LANES * broad);
        tile = take(PROBING_KEYS * PROBING_LANES), keys = take(PROBING_KEYS * broad), columns = take(2 * WIDTH * WIDTH);
        base = take(PROBING_LANES), shares = take(PROBING_LANES);
    }

    i64 strips() const { return (p->rows + PROBING_LANES - 1) / PROBING_LANES; }

    void seat(i64 strip) {
        first = strip * PROBING_LANES, lanes = least(PROBING_LANES, p->rows - first);
        Head q(p->q, p->q_kind, p->width, b, head * p->q_heads / p->heads, 0, 1);
        turn_block(p->width, q, first, lanes, PROBING_LANES, rows, turned);
    }

    i64 broad() const { return whole_vectors(lanes); }

    // Keys that some lane sees, of those up to `high`.
    i64 end_of(i64 high) const { return p->causal ? most(least(high, p->position + first + lanes), 0) : high; }

    // The products of some keys with all lanes; -inf where a lane does not see a key.
    void multiply(const Head &k, i64 key, i64 count) {
        i64 panel = panel_of(PROBING_LANES);
        Rows some = k.rows(key, count, false, keys);
        product_of<false>(count, broad(), p->width, Even<const real>{some.first, some.row}, 1, turned, panel, panel * p->width,
                          Even<real>{tile, broad()});
        for (i64 j = 0; p->causal && j < count; j++)
            for (i64 i = 0; i < least(key + j - p->position - first, lanes); i++) tile[j * broad() + i] = LOWEST;
    }

    // The highest logit of each lane among some keys, in units of log2, and the sum of its weights; added to what is there.
    void weigh(i64 count, real factor, real *highest, real *total) const {
        i64 row = broad();
        for (i64 i = 0; i < row; i += WIDTH) {
            Vector peak = all(LOWEST), sum = {};
            for (i64 j = 0; j < count; j++) {
                Vector s = at(tile + j * row + i);
                peak = s > peak ? s : peak;
            }
            Vector before = at(highest + i), now = peak * factor;
            now = now > before ? now : before;
            Vector from = now == LOWEST ? Vector{} : now;
            for (i64 j = 0; j < count; j++) sum += power_of_two(at(tile + j * row + i) * factor - from);
            put(total + i, at(total + i) * power_of_two(before - from) + sum);
            put(highest + i, now);
        }
    }

    // Adds the weights of some keys, of all lanes together, to their sums.
    void add(i64 count, real factor, real *sums) {
        i64 row = broad(), whole = lanes / WIDTH * WIDTH;
        Integers number;
        for (int i = 0; i < WIDTH; i++) number[i] = i;
        const real *of[WIDTH];
        real *across = columns + WIDTH * WIDTH;
        for (int i = 0; i < WIDTH; i++) of[i] = columns + i * WIDTH;
        for (i64 low = 0; low < count; low += WIDTH) {
            for (i64 j = 0; j < WIDTH; j++) {
                Vector sum = {};
                const real *logits = tile + least(low + j, count - 1) * row;
                for (i64 i = 0; i < whole; i += WIDTH) sum += power_of_two(at(logits + i) * factor - at(base + i)) * at(shares + i);
                if (whole < lanes) {  // lanes after the last one repeat it
                    Vector last = power_of_two(at(logits + whole) * factor - at(base + whole)) * at(shares + whole);
                    sum += number < (Integer)(lanes - whole) ? last : Vector{};
                }
                put(columns + j * WIDTH, sum);
            }
            turn_square(of, 0, across, WIDTH);
            Vector total = {};
            for (int i = 0; i < WIDTH; i++) total += at(across + i * WIDTH);
            for (i64 j = 0; j < least(WIDTH, count - low); j++) sums[low + j] += total[j];
        }
    }
};

// Calls f(prober, line, part, low, high) for each part of the keys, from low to high, of each head; whether there was memory.
template <class F>
static bool each_share(const Probing *p, i64 keys, F f) {
    i64 lines = p->batch * p->heads, parts = (keys + PROBING_SHARE - 1) / PROBING_SHARE;
    bool done = true, little = lines * p->rows * keys * p->width < (1 << 18);
    share_among(p->parallel, little ? 1 : p->threads, lines * parts, [&](i64 n) {
        real *room = probing_room.of(Prober::size(p));
        if (!room) {
            done = false;
            return;
        }
        i64 line = n / parts, low = n % parts * PROBING_SHARE;
        Prober prober(p, line / p->heads, line % p->heads, room);
        f(prober, line, n % parts, low, least(low + PROBING_SHARE, keys));
    });
    return done;
}

// Returns 0; -1: there is no memory.
extern "C" int probe_keys(const Probing *p) {
    i64 broad = whole_vectors(p->rows), lines = p->batch * p->heads, parts = (p->keys + PROBING_SHARE - 1) / PROBING_SHARE;
    real factor = (real)(p->scale * LOG2E);
    // (lines, parts, rows): highest logits, then totals; in the end those of all keys lie where those of the first part did.
    i64 size = lines * parts * broad;
    real *highest = (real *)__builtin_malloc((2 * size + WIDTH) * sizeof(real)), *total = highest + size;
    if (!highest) return -1;
    for (i64 n = 0; n < size; n++) highest[n] = LOWEST, total[n] = 0;
    bool done = each_share(p, p->keys, [&](Prober &prober, i64 line, i64 part, i64 low, i64 high) {
        Head k(p->k, p->k_kind, p->width, prober.b, prober.head * p->k_heads / p->heads, 0, 1);
        for (i64 strip = 0; strip < prober.strips(); strip++) {
            prober.seat(strip);
            i64 place = (line * parts + part) * broad + prober.first, end = prober.end_of(high);
            for (i64 key = low; key < end; key += PROBING_KEYS) {
                i64 count = least(PROBING_KEYS, end - key);
                prober.multiply(k, key, count);
                prober.weigh(count, factor, highest + place, total + place);
            }
        }
    });
    for (i64 line = 0; line < lines; line++)
        for (i64 i = 0; i < broad; i += WIDTH) {
            real *peak = highest + line * parts * broad + i, *sum = total + line * parts * broad + i;
            for (i64 part = 1; part < parts; part++) {
                Vector a = at(peak), other = at(peak + part * broad), now = other > a ? other : a, from = now == LOWEST ? Vector{} : now;
                put(sum, at(sum) * power_of_two(a - from) + at(sum + part * broad) * power_of_two(other - from));
                put(peak, now);
            }
            Vector now = at(peak), whole = at(sum);
            put(sum, whole == (real)0 ? Vector{} : (real)p->share / whole);  // a row that sees no key adds nothing
            put(peak, now == LOWEST ? Vector{} : now);
        }
    done &= each_share(p, p->kept, [&](Prober &prober, i64 line, i64, i64 low, i64 high) {
        Head k(p->k, p->k_kind, p->width, prober.b, prober.head * p->k_heads / p->heads, 0, 1);
        real *to = p->to + line * p->line;
        for (i64 key = low; key < high; key++) to[key] = 0;
        for (i64 strip = 0; strip < prober.strips(); strip++) {
            prober.seat(strip);
            i64 place = line * parts * broad + prober.first, end = prober.end_of(high);
            for (i64 i = 0; i < prober.broad(); i++) prober.base[i] = highest[place + i], prober.shares[i] = total[place + i];
            for (i64 key = low; key < end; key += PROBING_KEYS) {
                i64 count = least(PROBING_KEYS, end - key);
                prober.multiply(k, key, count);
                prober.add(count, factor, to + key);
            }
        }
    });
    __builtin_free(highest);
    return done ? 0 : -1;
}
