// One softmax over two branches that were normalised by themselves: of the rows of out and LSE of each. The result takes the place of the first.

struct Merging {
    i64 rows, width;
    real *out, *lse;
    const real *other_out, *other_lse;
    i64 threads;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
};

static void merge_row(const Merging *m, i64 row) {
    constexpr bool wide = sizeof(real) == 8;
    real a = m->lse[row], b = m->other_lse[row], peak = a > b || a != a ? a : b;
    real base = peak == LOWEST ? 0 : peak;  // neither has keys
    real first = wide ? (real)__builtin_exp(a - base) : (real)__builtin_expf(a - base);
    real second = wide ? (real)__builtin_exp(b - base) : (real)__builtin_expf(b - base);
    real total = first + second, whole = total == 0 ? 1 : total;
    m->lse[row] = base + (wide ? (real)__builtin_log(total) : (real)__builtin_logf(total));
    first /= whole, second /= whole;
    real *out = m->out + row * m->width;
    const real *other = m->other_out + row * m->width;
    for (i64 i = 0; i < m->width; i++) out[i] = out[i] * first + other[i] * second;
}

extern "C" void merge_rows(const Merging *m) {
    constexpr i64 some = 256;
    share_among(m->parallel, m->threads, (m->rows + some - 1) / some, [&](i64 n) {
        for (i64 row = n * some; row < least(m->rows, (n + 1) * some); row++) merge_row(m, row);
    });
}
