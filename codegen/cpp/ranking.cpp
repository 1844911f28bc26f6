// The k best of each row of scores, as ascending lists. A score becomes a whole number that is ordered as scores are; the k-th best is found
// by halving the range it lies in, counting how many numbers lie above: a pass over a row that stays in the nearest cache.

struct Ranking {
    const real *scores;  // (rows, blocks); -inf: no candidate; NaN counts as infinity
    const int *extra;  // of each row how many more than k it may have, or null
    i64 rows, blocks, row, k, width, start;  // `row`: from one row to the next; `width` of a list; `start`: number of the first block
    int *indices, *counts;  // (rows, width), -1 after the end; (rows)
    i64 threads;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
};

static inline Integer ordered(real x) {
    if (x != x) x = __builtin_huge_val();
    Integer bits;
    x += 0;  // -0 equals 0
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits < 0 ? bits ^ (Integer)((sizeof bits == 8 ? ~0ull : ~0u) >> 1) : bits;
}

static i64 count_from(const Integer *keys, i64 n, Integer least_key) {
    i64 found = 0;
    for (i64 j = 0; j < n; j++) found += keys[j] >= least_key;
    return found;
}

static void rank_row(const Ranking *r, i64 row, Integer *keys) {
    const real *scores = r->scores + row * r->row;
    const Integer none = ordered(-(real)__builtin_huge_val());
    int *to = r->indices + row * r->width;
    i64 n = r->blocks, wanted = r->k + (r->extra ? r->extra[row] : 0), candidates = 0;
    Integer low = none, high = none;
    for (i64 j = 0; j < n; j++) {
        Integer key = ordered(scores[j]);
        keys[j] = key;
        candidates += key > none;
        high = key > high ? key : high;
    }
    Integer cut = none + 1;  // keys from here on are taken, but for some of those that equal it
    i64 above = candidates;
    wanted = wanted < candidates ? wanted : candidates;
    if (candidates > wanted) {
        // count_from(low) > wanted holds, count_from(high + 1) = 0
        low = none + 1;
        while (low < high) {
            Integer middle = low + (Integer)(((sizeof(Integer) == 8 ? (unsigned long long)high - (unsigned long long)low
                                                                    : (unsigned)high - (unsigned)low) + 1) / 2);
            i64 found = count_from(keys, n, middle);
            if (found >= wanted)
                low = middle;
            else
                high = middle - 1;
            if (found == wanted) break;
        }
        cut = low;
        above = count_from(keys, n, cut);
    }
    i64 equal = above - wanted;  // so many of those that equal the last one are left out, from the right
    i64 ties = 0;
    if (equal)
        for (i64 j = 0; j < n; j++) ties += keys[j] == cut;
    i64 kept = ties - equal, at = 0;
    for (i64 j = 0; j < n && at < wanted; j++) {
        if (keys[j] < cut) continue;
        if (equal && keys[j] == cut && kept-- <= 0) continue;
        to[at++] = (int)(r->start + j);
    }
    r->counts[row] = (int)at;
    for (; at < r->width; at++) to[at] = -1;
}

static thread_local Room own_room;

// Returns 0; -1: there is no memory.
extern "C" int rank_rows(const Ranking *r) {
    constexpr i64 ROWS = 64;  // taken at a time
    bool failed = false;
    share_among(r->parallel, r->rows * r->blocks < (1 << 16) ? 1 : r->threads, (r->rows + ROWS - 1) / ROWS, [&](i64 part) {
        Integer *keys = (Integer *)own_room.of(r->blocks);
        if (!keys) {
            failed = true;
            return;
        }
        for (i64 row = part * ROWS; row < least((part + 1) * ROWS, r->rows); row++) rank_row(r, row, keys);
    });
    return failed ? -1 : 0;
}
