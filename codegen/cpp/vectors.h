// Vectors as wide as the processor's, by the compiler's own extension: no header of the processor is needed, and any processor will do.

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define REGISTERS 24
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define REGISTERS 12
#else
#define VECTOR_BYTES 16
#define REGISTERS 12
#endif

constexpr i64 WIDTH = VECTOR_BYTES / sizeof(real);  // lanes of a vector
typedef real Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
#ifdef DOUBLE
typedef long long Integer;
#else
typedef int Integer;
#endif
typedef Integer Integers __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));

static inline Vector at(const real *p) { return *(const Vector *)p; }
static inline void put(real *p, Vector x) { *(Vector *)p = x; }
static inline Vector all(real x) { return x - Vector{}; }
static inline i64 whole_vectors(i64 n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }
static inline constexpr i64 least(i64 a, i64 b) { return a < b ? a : b; }
static inline constexpr i64 most(i64 a, i64 b) { return a > b ? a : b; }

// 2**x, within one unit in the last place, for x below 127 (1023 in double), also where the result has fewer digits than others (below the
// smallest normal number); NaN for NaN. The fraction, from 0 to 1, goes into a polynomial fitted there; the whole part becomes the exponent.
static inline Vector power_of_two(Vector x) {
#if defined(__AVX512DQ__) && !defined(DOUBLE)
    Vector f, result;
    __asm__("vreduceps $1, %1, %0" : "=v"(f) : "v"(x));  // x less the whole number below it
#elif defined(__AVX512DQ__)
    Vector f, result;
    __asm__("vreducepd $1, %1, %0" : "=v"(f) : "v"(x));
#else
    constexpr real round = sizeof(real) == 8 ? (real)6755399441055744.0 : (real)12582912.0, low = sizeof(real) == 8 ? -1100 : -200;
    x = x < low ? all(low) : x;
    Vector whole = (x - (real)0.5 + round) - round;
    Vector f = x - whole;
#endif
#ifdef DOUBLE
    Vector p = 4.11912503177561781e-10 + f * 3.63927613104984659e-11;
    p = 7.11112799318383314e-9 + f * p;
    p = 1.01719142535476744e-7 + f * p;
    p = 1.32159414109095564e-6 + f * p;
    p = 0.0000152527108995361559 + f * p;
    p = 0.000154035311812395517 + f * p;
    p = 0.00133335581283015609 + f * p;
    p = 0.00961812910789581856 + f * p;
    p = 0.0555041086647981399 + f * p;
    p = 0.240226506959101779 + f * p;
    p = 0.69314718055994529 + f * p;
    p = 1.0 + f * p;
#else
    Vector p = 0.0012391331834f + f * 0.00021865784787f;
    p = 0.0096841863103f + f * p;
    p = 0.055480630197f + f * p;
    p = 0.24023045441f + f * p;
    p = 0.69314693276f + f * p;
    p = 1.0000000025f + f * p;
#endif
#if defined(__AVX512DQ__) && !defined(DOUBLE)
    __asm__("vscalefps %2, %1, %0" : "=v"(result) : "v"(p), "v"(x));
    return result;
#elif defined(__AVX512DQ__)
    __asm__("vscalefpd %2, %1, %0" : "=v"(result) : "v"(p), "v"(x));
    return result;
#else
    constexpr int shift = sizeof(real) == 8 ? 52 : 23, bias = sizeof(real) == 8 ? 1023 : 127;
    Integers exponent = __builtin_convertvector(whole, Integers), half = exponent >> 1;  // in two steps: 2**-140 has no exponent
    return p * (Vector)((half + bias) << shift) * (Vector)((exponent - half + bias) << shift);
#endif
}

// Lanes of two vectors, by number.
static inline Vector shuffled(Vector a, Vector b, Integers which) {
#ifdef __clang__
    Vector result;
    for (int i = 0; i < WIDTH; i++) result[i] = which[i] < WIDTH ? a[which[i]] : b[which[i] - WIDTH];
    return result;
#else
    return __builtin_shuffle(a, b, which);
#endif
}

// Turns a square of WIDTH rows of a matrix: rounds of shuffling two rows into each other, as one shuffles cards.
static inline void turn_square(const real *const *from, i64 column, real *to, i64 to_row) {
    Vector a[WIDTH], b[WIDTH];
    Integers low, high;
    for (int i = 0; i < WIDTH; i++) low[i] = i / 2 + i % 2 * WIDTH, high[i] = low[i] + WIDTH / 2;
    for (int i = 0; i < WIDTH; i++) a[i] = at(from[i] + column);
    for (int round = 1; round < WIDTH; round *= 2) {
        for (int i = 0; i < WIDTH / 2; i++) {
            b[2 * i] = shuffled(a[i], a[i + WIDTH / 2], low);
            b[2 * i + 1] = shuffled(a[i], a[i + WIDTH / 2], high);
        }
        for (int i = 0; i < WIDTH; i++) a[i] = b[i];
    }
    for (int i = 0; i < WIDTH; i++) put(to + i * to_row, a[i]);
}
