// Rows of a tensor made into one for each block of them: their mean, sum, greatest, least, or the least and the greatest in one reading.

enum { OF_MEAN, OF_SUM, OF_GREATEST, OF_LEAST, OF_BOUNDS };

struct Pooling {
    Tensor x;
    i64 kind, own_heads, batch, heads, length, width, block, how;  // `own_heads` of x, of which several heads may be made
    i64 zeros;  // whether what a ragged last block lacks counts as zeros
    real *to, *greatest;  // (batch, heads, blocks, width) without gaps; `greatest` of OF_BOUNDS alone
    Places places;  // of the rows
    i64 threads;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
};

// Rows that are added up by themselves, so that a long sum loses few digits; vectors of a row that are worked on at once.
constexpr i64 ROWS_TOGETHER = 32, POOLED_AT_ONCE = REGISTERS / 3;

// Rows that are asked for ahead, as a narrow part of a row follows the other with a gap, which processors do not foresee; vectors of a line
// of their caches.
constexpr i64 AHEAD = 16, LINE = most(64 / VECTOR_BYTES, 1);

// Of numbers; NaN is looked for beside them.
static inline Vector greater_of(Vector a, Vector x) { return x > a ? x : a; }
static inline Vector less_of(Vector a, Vector x) { return x < a ? x : a; }

// N vectors of `count` rows.
template <i64 N>
static inline void pool_vectors(const Pooling *p, const real *from, i64 row, i64 count, real *to, real *greatest) {
    Vector some[N], most_of[N];
    bool adds = p->how == OF_MEAN || p->how == OF_SUM, ragged = p->zeros && count < p->block;
    if (adds) {
        for (i64 n = 0; n < N; n++) some[n] = Vector{};
        for (i64 i = 0; i < count; i += ROWS_TOGETHER) {
            Vector part[N];
            for (i64 n = 0; n < N; n++) part[n] = Vector{};
            for (i64 j = i; j < least(count, i + ROWS_TOGETHER); j++)
                for (i64 n = 0; n < N; n++) part[n] += at(from + j * row + n * WIDTH);
            for (i64 n = 0; n < N; n++) some[n] += part[n];
        }
        real size = p->zeros ? p->block : count;
        for (i64 n = 0; n < N; n++) put(to + n * WIDTH, p->how == OF_MEAN ? some[n] / size : some[n]);
        return;
    }
    Integers wrong[N];
    for (i64 n = 0; n < N; n++) wrong[n] = Integers{}, some[n] = most_of[n] = ragged ? Vector{} : at(from + n * WIDTH);
    auto each = [&](auto take) {
        for (i64 j = 0; j < count; j++)
            for (i64 n = 0; n < N; n++) {
                if (n % LINE == 0) __builtin_prefetch(from + (j + AHEAD) * row + n * WIDTH);
                Vector x = at(from + j * row + n * WIDTH);
                wrong[n] |= x != x;
                take(n, x);
            }
    };
    if (p->how == OF_BOUNDS)
        each([&](i64 n, Vector x) { some[n] = less_of(some[n], x), most_of[n] = greater_of(most_of[n], x); });
    else if (p->how == OF_LEAST)
        each([&](i64 n, Vector x) { some[n] = less_of(some[n], x); });
    else
        each([&](i64 n, Vector x) { some[n] = greater_of(some[n], x); });
    for (i64 n = 0; n < N; n++) {
        put(to + n * WIDTH, wrong[n] ? all(__builtin_nan("")) : some[n]);
        if (p->how == OF_BOUNDS) put(greatest + n * WIDTH, wrong[n] ? all(__builtin_nan("")) : most_of[n]);
    }
}

// One block; `to` and `greatest` have room for whole vectors.
static void pool_block(const Pooling *p, Rows rows, i64 count, real *to, real *greatest) {
    i64 d = 0, broad = whole_vectors(p->width);
    for (; d + POOLED_AT_ONCE * WIDTH <= broad; d += POOLED_AT_ONCE * WIDTH)
        pool_vectors<POOLED_AT_ONCE>(p, rows.first + d, rows.row, count, to + d, greatest + d);
    for (; d < broad; d += WIDTH) pool_vectors<1>(p, rows.first + d, rows.row, count, to + d, greatest + d);
}

static thread_local Room pooling_room;

// Returns 0; -1: there is no memory.
extern "C" int pool_blocks(const Pooling *p) {
    constexpr i64 LITTLE = 1 << 15, SHARE = 1 << 14;  // entries that one thread reads; of one share of the work, about
    i64 blocks = (p->length + p->block - 1) / p->block, broad = whole_vectors(p->width), entries = p->block * p->width;
    i64 some = most(least(SHARE / entries, blocks), 1), shares = (blocks + some - 1) / some, lines = p->batch * p->heads;
    bool failed = false;
    share_among(p->parallel, lines * p->length * p->width < LITTLE ? 1 : p->threads, lines * shares, [&](i64 n) {
        i64 line = n / shares, first = n % shares * some;
        real *room = pooling_room.of((p->block + 2) * broad);
        if (!room) {
            failed = true;
            return;
        }
        i64 b = line / p->heads, head = line % p->heads;
        Head x(p->x, p->kind, p->width, b, head * p->own_heads / p->heads, 0, 1, p->places.of(b, head, p->heads, p->length));
        for (i64 block = first; block < least(first + some, blocks); block++) {
            i64 count = least(p->block, p->length - block * p->block), place = (line * blocks + block) * p->width;
            Rows rows = x.rows(block * p->block, count, true, room + 2 * broad);
            bool whole = p->width == broad;  // else vectors would reach into the next row
            real *to = whole ? p->to + place : room, *greatest = p->greatest && whole ? p->greatest + place : room + broad;
            pool_block(p, rows, count, to, greatest);
            if (whole) continue;
            __builtin_memcpy(p->to + place, to, p->width * sizeof(real));
            if (p->greatest) __builtin_memcpy(p->greatest + place, greatest, p->width * sizeof(real));
        }
    });
    return failed ? -1 : 0;
}
