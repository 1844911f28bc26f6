// Functions that generated expressions call. They are written without branches where a loop of vectors may be made of them.

template <class T>
static inline T infinite() { return (T)__builtin_huge_val(); }

static inline i64 floor_div(i64 a, i64 c) {
    if (c == 0) return 0;  // only of pairs that are masked: lengths and tables were checked
    i64 quotient = a / c;
    return quotient - (quotient * c != a && (a < 0) != (c < 0));
}
static inline i64 floor_mod(i64 a, i64 c) { return c == 0 ? 0 : a - floor_div(a, c) * c; }
static inline i64 inside(i64 index, i64 size) { return index < 0 ? 0 : index < size ? index : size - 1; }

// The smaller and the larger of two; NaN if either is.
static inline i64 smaller(i64 a, i64 c) { return a < c ? a : c; }
static inline i64 larger(i64 a, i64 c) { return a > c ? a : c; }
static inline float smaller(float a, float c) { return a != a ? a : c > a ? a : c; }
static inline float larger(float a, float c) { return a != a ? a : c < a ? a : c; }
static inline double smaller(double a, double c) { return a != a ? a : c > a ? a : c; }
static inline double larger(double a, double c) { return a != a ? a : c < a ? a : c; }

static inline i64 abs_of(i64 x) { return x < 0 ? -x : x; }
static inline float abs_of(float x) { return __builtin_fabsf(x); }
static inline double abs_of(double x) { return __builtin_fabs(x); }
static inline float sqrt_of(float x) { return __builtin_sqrtf(x); }
static inline double sqrt_of(double x) { return __builtin_sqrt(x); }
static inline float relu_of(float x) { return larger(x, 0.0f); }
static inline double relu_of(double x) { return larger(x, 0.0); }
static inline i64 floor_of(float x) { return (i64)__builtin_floorf(x); }
static inline i64 floor_of(double x) { return (i64)__builtin_floor(x); }

static inline float floor_exact(float x) { return __builtin_floorf(x); }
static inline double floor_exact(double x) { return __builtin_floor(x); }
static inline float ceil_exact(float x) { return __builtin_ceilf(x); }
static inline double ceil_exact(double x) { return __builtin_ceil(x); }
static inline float trunc_exact(float x) { return __builtin_truncf(x); }
static inline double trunc_exact(double x) { return __builtin_trunc(x); }
static inline float round_exact(float x) { return __builtin_nearbyintf(x); }
static inline double round_exact(double x) { return __builtin_nearbyint(x); }
static inline float sign_exact(float x) { return (float)(x > 0) - (float)(x < 0); }
static inline double sign_exact(double x) { return (double)(x > 0) - (double)(x < 0); }
static inline float to_half(float x) { return (float)(_Float16)x; }
static inline float to_bfloat(float x) {
    unsigned bits;
    __builtin_memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    float y;
    __builtin_memcpy(&y, &bits, 4);
    return x != x ? x : y;
}

// exp(x): 2 to the whole part of x / ln 2, times a polynomial of the rest.
static inline float exp_of(float x) {
    float limited = x < -104.0f ? -104.0f : x > 88.73f ? 88.73f : x;
    float near = limited * 1.44269504f + 12582912.0f, whole = near - 12582912.0f;
    float r = (limited - whole * 0.693145752f) - whole * 1.42860677e-6f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int half = (int)whole / 2, rest = (int)whole - half;  // 2**128 is no float, and 2**-140 has few digits: in two steps
    unsigned low = (unsigned)(half + 127) << 23, high = (unsigned)(rest + 127) << 23;
    float a, c;
    __builtin_memcpy(&a, &low, 4);
    __builtin_memcpy(&c, &high, 4);
    return x != x ? x : x > 88.722839f ? infinite<float>() : p * a * c;
}
// tanh(x) within 3 units in the last place: x * P(x * x) / Q(x * x), fitted up to 9.02, where it reaches 1.
static inline float tanh_of(float x) {
    float y = x < -9.02f ? -9.02f : x > 9.02f ? 9.02f : x, s = y * y;
    float over = (((1.3319073e-08f * s + 2.0583482e-05f) * s + 0.0034940345f) * s + 0.13379718f) * s + 1.0f;
    float under = (((7.762020e-07f * s + 0.00032830928f) * s + 0.025871073f) * s + 0.46713033f) * s + 1.0f;
    return y * over / under;
}
static inline float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }
static inline float softplus_of(float x) { return larger(x, 0.0f) + __builtin_log1pf(__builtin_expf(-__builtin_fabsf(x))); }
static inline float log_of(float x) { return __builtin_logf(x); }
static inline float sin_of(float x) { return __builtin_sinf(x); }
static inline float cos_of(float x) { return __builtin_cosf(x); }
static inline float erf_of(float x) { return __builtin_erff(x); }
static inline float power_of(float x, float y) { return __builtin_powf(x, y); }

static inline double exp_of(double x) { return __builtin_exp(x); }
static inline double tanh_of(double x) { return __builtin_tanh(x); }
static inline double sigmoid_of(double x) { return 1.0 / (1.0 + __builtin_exp(-x)); }
static inline double softplus_of(double x) { return larger(x, 0.0) + __builtin_log1p(__builtin_exp(-__builtin_fabs(x))); }
static inline double log_of(double x) { return __builtin_log(x); }
static inline double sin_of(double x) { return __builtin_sin(x); }
static inline double cos_of(double x) { return __builtin_cos(x); }
static inline double erf_of(double x) { return __builtin_erf(x); }
static inline double power_of(double x, double y) { return __builtin_pow(x, y); }
