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
static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 most(i64 a, i64 b) { return a > b ? a : b; }

// x * 2**n of whole numbers n, also where that has fewer digits (below the smallest normal number).
static inline Vector scaled(Vector x, Vector n) {
#if defined(__AVX512F__) && defined(DOUBLE)
    typedef double Wide __attribute__((vector_size(64)));
    return (Vector)__builtin_ia32_scalefpd512_mask((Wide)x, (Wide)n, Wide{}, -1, 4);
#elif defined(__AVX512F__)
    typedef float Wide __attribute__((vector_size(64)));
    return (Vector)__builtin_ia32_scalefps512_mask((Wide)x, (Wide)n, Wide{}, -1, 4);
#else
    constexpr int shift = sizeof(real) == 8 ? 52 : 23, bias = sizeof(real) == 8 ? 1023 : 127;
    Integers whole = __builtin_convertvector(n, Integers), half = whole >> 1;
    return x * (Vector)((half + bias) << shift) * (Vector)((whole - half + bias) << shift);
#endif
}

// 2**x, within one unit in the last place, for x below 127 (1023 in double); NaN for NaN. The fraction, between -1/2 and 1/2, goes into a
// polynomial fitted there; the whole part becomes the exponent.
static inline Vector power_of_two(Vector x) {
#ifdef DOUBLE
    constexpr double round = 6755399441055744.0, low = -1100;
#else
    constexpr float round = 12582912.0f, low = -200;
#endif
    x = x < low ? all(low) : x;
    Vector whole = (x + round) - round;
    Vector f = x - whole;
#ifdef DOUBLE
    Vector p = 4.4566753410492058782e-10 + f * 2.5733568308756891235e-11;
    p = 7.0548943863483480445e-09 + f * p;
    p = 1.017805119296064896e-07 + f * p;
    p = 1.3215486815999976975e-06 + f * p;
    p = 1.5252733856293466416e-05 + f * p;
    p = 1.5403530393362755291e-04 + f * p;
    p = 1.3333558146390352775e-03 + f * p;
    p = 9.6181291076284830543e-03 + f * p;
    p = 5.5504108664821698992e-02 + f * p;
    p = 2.4022650695910071228e-01 + f * p;
    p = 6.9314718055994530835e-01 + f * p;
#else
    Vector p = 1.3400428e-3f + f * 1.5461445e-4f;
    p = 9.6180567e-3f + f * p;
    p = 5.5503272e-2f + f * p;
    p = 2.4022651e-1f + f * p;
    p = 6.9314721e-1f + f * p;
#endif
    return scaled((real)1 + f * p, whole);
}
