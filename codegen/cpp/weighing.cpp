// Weights of the blocks in the list of a row, from their scores, and the logarithm of their total. A score of -inf: the slot is empty.

enum { WEIGH_SOFTMAX, WEIGH_SOFTMAX1, WEIGH_STICK_BREAKING, WEIGH_SIGMOID, WEIGH_RAW };

struct Weighing {
    i64 rows, slots, rule;
    const real *scores;  // (rows, slots), as the weights
    real *weights, *totals;
    i64 threads;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
};

static inline real exponential(real x) { return sizeof(real) == 8 ? (real)__builtin_exp(x) : (real)__builtin_expf(x); }
static inline real logarithm(real x) { return sizeof(real) == 8 ? (real)__builtin_log(x) : (real)__builtin_logf(x); }
static inline real softplus(real x) {
    real rest = exponential(x < 0 ? x : -x);
    rest = sizeof(real) == 8 ? (real)__builtin_log1p(rest) : (real)__builtin_log1pf(rest);
    return (x < 0 ? 0 : x) + rest;
}

static void weigh_slots(const Weighing *w, const real *scores, real *weights, real *log_total) {
    if (w->rule <= WEIGH_SOFTMAX1) {
        bool one = w->rule == WEIGH_SOFTMAX1;  // a logit of 0 without a weight
        real peak = one ? 0 : LOWEST, total = 0;
        for (i64 n = 0; n < w->slots; n++) peak = scores[n] > peak || scores[n] != scores[n] ? scores[n] : peak;
        if (peak == LOWEST) {
            for (i64 n = 0; n < w->slots; n++) weights[n] = 0;
            *log_total = LOWEST;
            return;
        }
        for (i64 n = 0; n < w->slots; n++) total += weights[n] = exponential(scores[n] - peak);
        if (one) total += exponential(-peak);
        for (i64 n = 0; n < w->slots; n++) weights[n] = scores[n] == LOWEST ? 0 : weights[n] / total;  // also where the total is no number
        *log_total = peak == __builtin_huge_val() ? peak : peak + logarithm(total);
        return;
    }
    real later = 0, total = 0;  // what the slots after it have left to the others
    for (i64 n = w->slots - 1; n >= 0; n--) {
        real x = scores[n];
        if (x == LOWEST) {
            weights[n] = 0;
            continue;
        }
        if (w->rule == WEIGH_STICK_BREAKING) {
            weights[n] = exponential(-softplus(-x) - later);
            later += softplus(x);
        } else {
            weights[n] = w->rule == WEIGH_SIGMOID ? 1 / (1 + exponential(-x)) : x;
        }
    }
    for (i64 n = 0; n < w->slots; n++) total += weights[n];
    *log_total = total <= 0 ? LOWEST : logarithm(total);
}

extern "C" void weigh_rows(const Weighing *w) {
    constexpr i64 some = 256;
    share_among(w->parallel, w->threads, (w->rows + some - 1) / some, [&](i64 n) {
        for (i64 row = n * some; row < least(w->rows, (n + 1) * some); row++)
            weigh_slots(w, w->scores + row * w->slots, w->weights + row * w->slots, w->totals + row);
    });
}
