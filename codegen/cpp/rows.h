// Rows of a tensor in the type of the computation, as they are or widened on the way, and rows written back.

// A vector of half the width, for elements of 16 bits: the compilers at hand would widen these one by one.
#if (defined(__AVX512F__) || defined(__F16C__)) && !defined(DOUBLE)
#define HALVES 1
typedef short Halves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
#ifdef __AVX512F__
#define REGISTER "v"
#else
#define REGISTER "x"
#endif
#endif

static inline i64 element_bytes(i64 kind) { return kind == 0 ? (i64)sizeof(real) : 2; }

static inline void widen(const char *from, i64 kind, i64 n, real *to) {
    if (kind == 0) {
        __builtin_memcpy(to, from, n * sizeof(real));
    } else if (kind == 1) {
        const unsigned short *x = (const unsigned short *)from;
        for (i64 i = 0; i < n; i++) {
            unsigned bits = (unsigned)x[i] << 16;
            float y;
            __builtin_memcpy(&y, &bits, 4);
            to[i] = y;
        }
    } else {
        const _Float16 *x = (const _Float16 *)from;
        i64 i = 0;
#ifdef HALVES
        for (; i + WIDTH <= n; i += WIDTH) {
            Vector wide;
            __asm__("vcvtph2ps %1, %0" : "=" REGISTER(wide) : REGISTER(*(const Halves *)(x + i)));
            put(to + i, wide);
        }
#endif
        for (; i < n; i++) to[i] = (real)x[i];
    }
}

static inline void narrow(const real *from, i64 kind, i64 n, char *to) {
    if (kind == 0) {
        __builtin_memcpy(to, from, n * sizeof(real));
    } else if (kind == 1) {
        unsigned short *y = (unsigned short *)to;
        for (i64 i = 0; i < n; i++) {
            float x = from[i];
            unsigned bits;
            __builtin_memcpy(&bits, &x, 4);
            unsigned rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
            y[i] = x != x ? 0x7fc0 : rounded;
        }
    } else {
        _Float16 *y = (_Float16 *)to;
        i64 i = 0;
#ifdef HALVES
        for (; i + WIDTH <= n; i += WIDTH) {
            Halves narrow;
            __asm__("vcvtps2ph $0, %1, %0" : "=" REGISTER(narrow) : REGISTER(at(from + i)));  // to nearest, ties to even
            *(Halves *)(y + i) = narrow;
        }
#endif
        for (; i < n; i++) y[i] = (_Float16)from[i];
    }
}

struct Rows {
    const real *first;
    i64 row;
};

// Rows of one head, every `step`-th from number `residue` on; with `places` row i is that of number places[i].
struct Head {
    const char *first;
    i64 row_bytes, kind, width, step;
    const int *places;

    Head(const Tensor &t, i64 kind, i64 width, i64 b, i64 h, i64 residue, i64 step, const int *places = nullptr)
        : first(t.first + (b * t.batch + h * t.head + (places ? 0 : residue * t.row)) * element_bytes(kind)),
          row_bytes((places ? 1 : step) * t.row * element_bytes(kind)), kind(kind), width(width), step(step),
          places(places ? places + residue : nullptr) {}

    const char *at_row(i64 row) const { return first + (places ? places[row * step] : row) * row_bytes; }

    // Where `count` rows begin, in the type of the computation: as they lie, or in `room`, where they are widened.
    void list(i64 from, i64 count, real *room, const real **to) const {
        if (kind == 0) {
            for (i64 i = 0; i < count; i++) to[i] = (const real *)at_row(from + i);
            return;
        }
        Rows some = rows(from, count, false, room);
        for (i64 i = 0; i < count; i++) to[i] = some.first + i * some.row;
    }

    // A row in the type of the computation, with whole vectors to read: where it lies, or in `room`.
    const real *padded_row(i64 row, real *room) const {
        if (kind == 0 && width % WIDTH == 0) return (const real *)at_row(row);
        widen(at_row(row), kind, width, room);
        for (i64 j = width; j < whole_vectors(width); j++) room[j] = 0;
        return room;
    }

    // Asks for rows that lie in no order, of which the processor does not foresee the next.
    void fetch(i64 from, i64 count) const {
        for (i64 i = 0; places && i < count; i++)
            for (i64 n = 0; n < width * element_bytes(kind); n += 64) __builtin_prefetch(at_row(from + i) + n, 0, 3);
    }

    // `count` rows in the type of the computation: where they lie, or in `room` (count x whole vectors). `padded`: whole vectors
    // are read of each.
    Rows rows(i64 from, i64 count, bool padded, real *room) const {
        if (kind == 0 && !places && !(padded && width % WIDTH)) return {(const real *)at_row(from), row_bytes / (i64)sizeof(real)};
        i64 broad = whole_vectors(width);
        if (kind == 0 && width == broad) {
            for (i64 i = 0; i < count; i++) {
                const real *row = (const real *)at_row(from + i);
                for (i64 j = 0; j < width; j += WIDTH) put(room + i * broad + j, at(row + j));
            }
            return {room, broad};
        }
        for (i64 i = 0; i < count; i++) {
            widen(at_row(from + i), kind, width, room + i * broad);
            for (i64 j = width; j < broad; j++) room[i * broad + j] = 0;
        }
        return {room, broad};
    }
};

// Rows of a block lie turned in panels of as many columns as a product takes at a time, one panel after the other.
static inline i64 panel_of(i64 block) { return least(BROAD, whole_vectors(block)); }
static inline i64 columns_of(i64 block) { return (whole_vectors(block) + panel_of(block) - 1) / panel_of(block) * panel_of(block); }

// `count` rows, turned: (panels, width, columns of a panel), whole vectors of columns; what lies beyond `count` repeats the last. `row_at`
// says where a row begins.
template <class F>
static inline void turn_rows(i64 width, F row_at, i64 count, i64 columns, i64 panel, real *to) {
    const real *rows[WIDTH];
    for (i64 j = 0; j < columns; j += WIDTH) {
        for (i64 i = 0; i < WIDTH; i++) rows[i] = row_at(least(j + i, count - 1));
        i64 whole = width / WIDTH * WIDTH;
        real *here = to + j / panel * panel * width + j % panel;
        for (i64 d = 0; d < whole; d += WIDTH) turn_square(rows, d, here + d * panel, panel);
        for (i64 d = whole; d < width; d++)
            for (i64 i = 0; i < WIDTH; i++) here[d * panel + i] = rows[i][d];
    }
}

// The rows of one block.
static void turn_block(i64 width, const Head &k, i64 key, i64 count, i64 block, real *room, real *to) {
    Rows some = k.rows(key, count, false, room);
    turn_rows(width, [&](i64 i) { return some.first + i * some.row; }, count, whole_vectors(block), panel_of(block), to);
}

// Products of a few queries with keys, for when vectors of queries would be nearly empty: here vectors run along the head, and WIDTH keys
// at a time are added up. Queries and keys lie in rows of `width`, which is whole vectors; the product of a key and a lane goes to
// key * key_step + lane * lane_step of `tile`, or is added to what lies there.
constexpr i64 FEW = 4;

template <bool ADD>
static void multiply_few(i64 lanes, i64 keys, i64 width, Rows k, const real *const *queries, real *tile, i64 key_step, i64 lane_step) {
    const real *rows[WIDTH];
    real sums[WIDTH * WIDTH], turned[WIDTH * WIDTH];
    for (int i = 0; i < WIDTH; i++) rows[i] = sums + i * WIDTH;
    for (i64 key = 0; key < keys; key += WIDTH)
        for (i64 lane = 0; lane < lanes; lane++) {
            Vector sum[WIDTH] = {};
            const real *from[WIDTH];
            for (int i = 0; i < WIDTH; i++) from[i] = k.first + least(key + i, keys - 1) * k.row;
            for (i64 j = 0; j < width; j += WIDTH)
                for (int i = 0; i < WIDTH; i++) sum[i] += at(from[i] + j) * at(queries[lane] + j);
            for (int i = 0; i < WIDTH; i++) put(sums + i * WIDTH, sum[i]);
            turn_square(rows, 0, turned, WIDTH);
            Vector total = {};
            for (int i = 0; i < WIDTH; i++) total += at(turned + i * WIDTH);
            real *to = tile + key * key_step + lane * lane_step;
            for (int i = 0; i < WIDTH && key + i < keys; i++) to[i * key_step] = ADD ? to[i * key_step] + total[i] : total[i];
        }
}

// Memory of a thread, kept from call to call.
struct Room {
    void *first = nullptr;
    i64 bytes = 0;
    ~Room() { __builtin_free(first); }

    real *of(i64 wanted) {
        if (wanted * (i64)sizeof(real) + 64 > bytes) {  // where it begins is rounded up
            __builtin_free(first);
            bytes = wanted * sizeof(real) + 256;
            first = __builtin_malloc(bytes);
            if (!first) bytes = 0;
        }
        return (real *)(((unsigned long)first + 63) / 64 * 64);
    }
};
