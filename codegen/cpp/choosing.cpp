// Choosing blocks: scores are made for a few rows at a time, all the blocks these may choose side by side, and each row is made into an
// ascending list at once. What scores are made of is a few steps, each of which turns planes of scores into one.
//
// A score becomes a whole number that is ordered as scores are. The least one that is chosen is found by halving the range it lies in,
// counting (or adding up the masses of) what lies above: passes over a row that stays in the nearest cache.

enum { DOT, CELLS, ADD, GROUP, REGROUP, SHARES, RELU, TIMES };
enum { SUM, MEAN, MAX };
enum { TOP_K, TOP_P, THRESHOLD };

// Which blocks a row may choose: from `begin` up to `end`, and if there are `spans`, those in one of them, ends included. Numbers lie
// (batch, head, row), spans (batch, head, row, count); a stride of 0 serves all.
struct Limits {
    const int *begin;
    i64 begin_batch, begin_head;
    const int *end;
    i64 end_batch, end_head;
    const int *firsts, *lasts;
    i64 count, span_batch, span_head;
};

struct Step {
    i64 kind, first, second;  // steps that it reads
    i64 heads, blocks;  // of its scores
    i64 how, size;
    double scale, second_scale;  // factors; of ADD that of each
    // DOT: rows (batch, a_heads, rows, width) times columns (batch, b_heads, blocks, width); or `both`: the part of a row above 0 times
    // those, and the part below times `other`. Columns are turned first: (batch, b_heads, panels, width or twice that, BROAD).
    Tensor a;
    i64 a_kind, a_heads, width, both;
    Tensor b, other;
    i64 b_kind, b_heads;
    i64 turned;  // where they begin, among those of all products; -1: for the few rows of this call they stay as they are
    // CELLS: strides of (batch, heads, rows, blocks); 0 serves all. TIMES: factors of (batch, heads, rows), `second` their heads.
    const real *cells;
    i64 batch, head, row, column;
    Limits limits;
};

struct Choosing {  // the steps follow it in memory
    i64 count, turned, batch, rows, blocks, heads;  // the last step is what blocks are chosen by
    Limits limits;
    i64 has_forced;
    Limits forced;  // blocks that are picked in any case: only spans
    const unsigned char *named;  // the same as a table (batch, heads, rows, blocks), or null
    i64 forced_within;  // only those that the spans of `limits` have
    i64 rule, k, extra;  // of TOP_K: whether what is forced comes on top
    double share;  // of TOP_P; of THRESHOLD the least
    i64 measure;  // 0 the score, 1 softmax, 2 share of the sum
    i64 inclusive, unmet_all, forced_in_mass;
    i64 start;  // number of the first block
    i64 width;  // of a list
    int *indices, *counts;  // (batch, heads, rows, width), -1 after the end; (batch, heads, rows)
    real *picked;  // their scores, -inf after the end; or null
    i64 threads;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);

    const Step &step(i64 number) const { return ((const Step *)(this + 1))[number]; }
};

// Scores of some heads and rows: those of block j lie at j - low of a row.
struct Plane {
    const real *first;
    i64 head, row, low;
};

static inline i64 panels_of(const Step &s) { return (s.blocks + BROAD - 1) / BROAD; }
static inline bool is_nan(real x) { return x != x; }

// The rows that one thread works on.
struct Some {
    const Choosing *c;
    const real *turned;  // columns of all products
    i64 b, row, rows;
    real *free;  // room for planes

    real *take(i64 n) {
        real *here = free;
        free += whole_vectors(n);
        return here;
    }

    static i64 begin_of(const Limits &l, i64 b, i64 head, i64 row) {
        return l.begin ? most(l.begin[b * l.begin_batch + head * l.begin_head + row], 0) : 0;
    }
    static i64 end_of(const Limits &l, i64 b, i64 head, i64 row, i64 blocks) {
        return l.end ? least(l.end[b * l.end_batch + head * l.end_head + row], blocks) : blocks;
    }

    // The blocks that some of the rows may choose.
    void reach(const Limits &l, i64 head, i64 heads, i64 blocks, i64 &low, i64 &high) const {
        low = blocks, high = 0;
        for (i64 h = head; h < head + heads; h++)
            for (i64 i = row; i < row + rows; i++) {
                i64 from = begin_of(l, b, h, i), to = end_of(l, b, h, i, blocks);
                if (from < to) low = least(low, from), high = most(high, to);
            }
        if (low >= high) low = high = 0;
    }

    // Marks what the spans of a row have, from block `low` on.
    static void mark(const Limits &l, i64 b, i64 head, i64 row, i64 low, i64 high, unsigned char *flags) {
        __builtin_memset(flags, 0, high - low);
        i64 place = b * l.span_batch + head * l.span_head + row * l.count;
        for (i64 n = place; n < place + l.count; n++) {
            i64 from = most(l.firsts[n], low), to = least((i64)l.lasts[n] + 1, high);
            if (from < to) __builtin_memset(flags + from - low, 1, to - from);
        }
    }

    Plane scores(i64 number, i64 head, i64 heads, i64 low, i64 high) {
        const Step &s = c->step(number);
        switch (s.kind) {
            case DOT: return dot(s, head, heads, low, high);
            case CELLS: return cells(s, head, heads, low, high);
            case ADD: return add(s, head, heads, low, high);
            case GROUP: return group(s, head, heads, low, high);
            case REGROUP: return regroup(s, head, heads, low, high);
            case RELU: return relu(s, head, heads, low, high);
            case TIMES: return times(s, head, heads, low, high);
            default: return softmax(s, head, heads, low, high);
        }
    }

    // Rows of `a` by themselves: those of `n` heads from h on, times the scale, `width` from one to the next; of `both` the part above 0 and,
    // `second` after it, the part below.
    void scaled_rows(const Step &s, i64 h, i64 n, i64 width, i64 second, real *to) const {
        real scale = s.scale;
        for (i64 m = 0; m < n; m++)
            for (i64 i = 0; i < rows; i++) {
                real *x = to + (m * rows + i) * width;
                i64 of_a = (h + m) * s.a_heads / s.heads;
                widen(s.a.first + (b * s.a.batch + of_a * s.a.head + (row + i) * s.a.row) * element_bytes(s.a_kind), s.a_kind, s.width, x);
                for (i64 d = 0; d < s.width; d++) {
                    real y = x[d] * scale;
                    x[d] = s.both && y < 0 ? 0 : y;
                    if (s.both) x[second + d] = y > 0 ? 0 : y;
                }
            }
    }

    // How many heads from `head` on, before `end`, have the columns of the same head of `b`.
    static i64 sharing(const Step &s, i64 head, i64 end) {
        i64 n = 1;
        while (head + n < end && (head + n) * s.b_heads / s.heads == head * s.b_heads / s.heads) n++;
        return n;
    }

    Plane dot(const Step &s, i64 head, i64 heads, i64 low, i64 high) {
        if (s.turned < 0) return dot_few(s, head, heads, low, high);
        i64 left = low / BROAD * BROAD, columns = whole_vectors(high - left), width = s.both ? 2 * s.width : s.width;
        real *to = take(heads * rows * columns), *some = take(heads * rows * width), *before = free;
        for (i64 h = head, n; h < head + heads; h += n) {
            i64 of_b = h * s.b_heads / s.heads;
            n = sharing(s, h, head + heads);
            scaled_rows(s, h, n, width, s.width, some);
            const real *columns_of_b = turned + s.turned + ((b * s.b_heads + of_b) * panels_of(s) * BROAD + left) * width;
            product_of<false>(n * rows, columns, width, Even<const real>{some, width}, 1, columns_of_b, BROAD, width * BROAD,
                              Even<real>{to + (h - head) * rows * columns, columns});
        }
        free = before;
        return {to, rows * columns, columns, left};
    }

    // The same where turning the columns would take longer than reading them once for each row.
    Plane dot_few(const Step &s, i64 head, i64 heads, i64 low, i64 high) {
        i64 columns = whole_vectors(high - low), broad = whole_vectors(s.width), width = (1 + s.both) * broad;
        real *to = take(heads * rows * columns), *before = free, *some = take(heads * rows * width), *room = take(BROAD * broad);
        for (i64 n = 0; n < heads * rows * width; n++) some[n] = 0;
        for (i64 h = head, n; h < head + heads; h += n) {
            n = sharing(s, h, head + heads);
            scaled_rows(s, h, n, width, broad, some);
            i64 of_b = h * s.b_heads / s.heads;
            for (i64 j = low; j < high; j += BROAD)
                for (i64 first = 0; first < n * rows; first += FEW) {
                    const real *few[FEW];
                    i64 lanes = least(FEW, n * rows - first), count = least(BROAD, high - j);
                    real *here = to + ((h - head) * rows + first) * columns + j - low;
                    for (i64 lane = 0; lane < lanes; lane++) few[lane] = some + (first + lane) * width;
                    Head of(s.b, s.b_kind, s.width, b, of_b, 0, 1);
                    multiply_few<false>(lanes, count, broad, of.rows(j, count, true, room), few, here, 1, columns);
                    if (!s.both) continue;
                    for (i64 lane = 0; lane < lanes; lane++) few[lane] += broad;
                    Head less(s.other, s.b_kind, s.width, b, of_b, 0, 1);
                    multiply_few<true>(lanes, count, broad, less.rows(j, count, true, room), few, here, 1, columns);
                }
        }
        free = before;
        return {to, rows * columns, columns, low};
    }

    Plane cells(const Step &s, i64 head, i64 heads, i64 low, i64 high) {
        const real *from = s.cells + b * s.batch + head * s.head + row * s.row;
        if (s.column == 1) return {from, s.head, s.row, 0};
        i64 columns = whole_vectors(high - low);
        real *to = take(heads * rows * columns);
        for (i64 h = 0; h < heads; h++)
            for (i64 i = 0; i < rows; i++)
                for (i64 j = low; j < high; j++) to[(h * rows + i) * columns + j - low] = from[h * s.head + i * s.row + j * s.column];
        return {to, rows * columns, columns, low};
    }

    Plane add(const Step &s, i64 head, i64 heads, i64 low, i64 high) {
        i64 columns = whole_vectors(high - low), of[2] = {s.first, s.second}, from[2];
        real *to = take(heads * rows * columns), *before = free;
        Plane part[2];
        for (int n = 0; n < 2; n++) {
            i64 all_heads = c->step(of[n]).heads;
            from[n] = head * all_heads / s.heads;
            part[n] = scores(of[n], from[n], (head + heads - 1) * all_heads / s.heads + 1 - from[n], low, high);
        }
        for (i64 h = 0; h < heads; h++)
            for (i64 i = 0; i < rows; i++) {
                const real *x[2];
                for (int n = 0; n < 2; n++)
                    x[n] = part[n].first + ((head + h) * c->step(of[n]).heads / s.heads - from[n]) * part[n].head + i * part[n].row +
                           low - part[n].low;
                real *y = to + (h * rows + i) * columns, scale = s.scale, other = s.second_scale;
                for (i64 j = 0; j < high - low; j++) y[j] = x[0][j] * scale + x[1][j] * other;
            }
        free = before;
        return {to, rows * columns, columns, low};
    }

    Plane relu(const Step &s, i64 head, i64 heads, i64 low, i64 high) {
        i64 columns = whole_vectors(high - low);
        real *to = take(heads * rows * columns), *before = free;
        Plane part = scores(s.first, head, heads, low, high);
        for (i64 h = 0; h < heads; h++)
            for (i64 i = 0; i < rows; i++) {
                const real *x = part.first + h * part.head + i * part.row + low - part.low;
                real *y = to + (h * rows + i) * columns;
                for (i64 j = 0; j < high - low; j++) y[j] = x[j] < 0 ? 0 : x[j];  // a NaN stays one
            }
        free = before;
        return {to, rows * columns, columns, low};
    }

    Plane times(const Step &s, i64 head, i64 heads, i64 low, i64 high) {
        i64 columns = whole_vectors(high - low), all_heads = c->step(s.first).heads, from = head * all_heads / s.heads;
        real *to = take(heads * rows * columns), *before = free;
        Plane part = scores(s.first, from, (head + heads - 1) * all_heads / s.heads + 1 - from, low, high);
        for (i64 h = 0; h < heads; h++)
            for (i64 i = 0; i < rows; i++) {
                const real *x = part.first + ((head + h) * all_heads / s.heads - from) * part.head + i * part.row + low - part.low;
                real *y = to + (h * rows + i) * columns;
                real factor = s.cells[b * s.batch + (head + h) * s.second / s.heads * s.head + (row + i) * s.row];
                for (i64 j = 0; j < high - low; j++) y[j] = x[j] * factor;
            }
        free = before;
        return {to, rows * columns, columns, low};
    }

    static real reduce(i64 how, real a, real x) { return how != MAX ? a + x : x > a || is_nan(x) ? x : a; }

    Plane group(const Step &s, i64 head, i64 heads, i64 low, i64 high) {
        i64 columns = whole_vectors(high - low), size = c->step(s.first).heads / s.heads;
        real *to = take(heads * rows * columns), *before = free;
        Plane part = scores(s.first, head * size, heads * size, low, high);
        for (i64 h = 0; h < heads; h++)
            for (i64 i = 0; i < rows; i++) {
                real *y = to + (h * rows + i) * columns;
                for (i64 n = 0; n < size; n++) {
                    const real *x = part.first + (h * size + n) * part.head + i * part.row + low - part.low;
                    for (i64 j = 0; j < high - low; j++) y[j] = n ? reduce(s.how, y[j], x[j]) : x[j];
                }
                for (i64 j = 0; s.how == MEAN && j < high - low; j++) y[j] /= (real)size;
            }
        free = before;
        return {to, rows * columns, columns, low};
    }

    Plane regroup(const Step &s, i64 head, i64 heads, i64 low, i64 high) {
        i64 columns = whole_vectors(high - low), end = least(high * s.size, c->step(s.first).blocks);
        real *to = take(heads * rows * columns), *before = free;
        Plane part = scores(s.first, head, heads, low * s.size, end);
        for (i64 h = 0; h < heads; h++)
            for (i64 i = 0; i < rows; i++) {
                const real *x = part.first + h * part.head + i * part.row - part.low;
                for (i64 j = low; j < high; j++) {
                    i64 n = j * s.size, stop = least(n + s.size, end);
                    real found = x[n];
                    for (i64 m = n + 1; m < stop; m++) found = reduce(s.how, found, x[m]);
                    to[(h * rows + i) * columns + j - low] = s.how == MEAN ? found / (real)(stop - n) : found;
                }
            }
        free = before;
        return {to, rows * columns, columns, low};
    }

    // exp2((x - the greatest) * factor) of whole vectors, in place; their sum.
    static real weigh(real *x, i64 n, real factor) {
        Vector peak = all(LOWEST), sum = {};
        for (i64 j = 0; j < n; j += WIDTH) {
            Vector s = at(x + j);
            peak = s > peak ? s : peak;
        }
        real highest = LOWEST, total = 0;
        for (int i = 0; i < WIDTH; i++) highest = peak[i] > highest ? peak[i] : highest;
        if (highest == LOWEST) highest = 0;
        for (i64 j = 0; j < n; j += WIDTH) {
            Vector p = power_of_two((at(x + j) - highest) * factor);
            sum += p;
            put(x + j, p);
        }
        for (int i = 0; i < WIDTH; i++) total += sum[i];
        return total;
    }

    Plane softmax(const Step &s, i64 head, i64 heads, i64 low, i64 high) {
        i64 from, to;
        reach(s.limits, head, heads, s.blocks, from, to);
        low = least(low, from), high = most(high, to);
        i64 columns = whole_vectors(high - low);
        real *result = take(heads * rows * columns), *before = free;
        for (i64 n = 0; n < heads * rows * columns; n++) result[n] = from < to ? LOWEST : 0;
        if (from >= to) return {result, rows * columns, columns, low};
        Plane part = scores(s.first, head, heads, from, to);
        unsigned char *flags = (unsigned char *)take(high - low);
        for (i64 h = 0; h < heads; h++)
            for (i64 i = 0; i < rows; i++) {
                real *y = result + (h * rows + i) * columns;
                const real *x = part.first + h * part.head + i * part.row - part.low;
                i64 first = begin_of(s.limits, b, head + h, row + i), last = end_of(s.limits, b, head + h, row + i, s.blocks);
                if (s.limits.firsts) mark(s.limits, b, head + h, row + i, low, high, flags);
                for (i64 j = first; j < last; j++)
                    if (!s.limits.firsts || flags[j - low]) y[j - low] = x[j];
                real total = weigh(y, columns, (real)LOG2E), share = total == 0 ? 0 : 1 / total;
                for (i64 j = 0; j < columns; j += WIDTH) put(y + j, at(y + j) * share);
            }
        free = before;
        return {result, rows * columns, columns, low};
    }

    // Room that the scores of a step take, for so many heads and rows.
    static i64 size(const Choosing *c, i64 number, i64 heads, i64 rows) {
        const Step &s = c->step(number);
        i64 own = heads * rows * (whole_vectors(s.blocks) + BROAD + 2 * WIDTH) + WIDTH;
        switch (s.kind) {
            case DOT: return own + (heads * rows * 2 + BROAD) * whole_vectors(s.width) + 2 * WIDTH;
            case CELLS: return own;
            case ADD:
                return own + size(c, s.first, least(heads, c->step(s.first).heads), rows) +
                       size(c, s.second, least(heads, c->step(s.second).heads), rows);
            case GROUP: return own + size(c, s.first, heads * (c->step(s.first).heads / s.heads), rows);
            case TIMES: return own + size(c, s.first, least(heads, c->step(s.first).heads), rows);
            default: return own + whole_vectors(s.blocks) + 2 * WIDTH + size(c, s.first, heads, rows);
        }
    }
};

static inline Integer flipped(Integer bits) {  // the bits of a number -> a whole number in the same order; and back
    return bits ^ ((bits >> (sizeof bits * 8 - 1)) & (Integer)((sizeof bits == 8 ? ~0ull : ~0u) >> 1));
}
static inline Integer ordered(real x) {
    if (is_nan(x)) x = __builtin_huge_val();
    Integer bits;
    x += 0;  // -0 equals 0
    __builtin_memcpy(&bits, &x, sizeof bits);
    return flipped(bits);
}
static inline real score_of(Integer key) {
    Integer bits = flipped(key);
    real x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}
static const Integer NONE = ordered(LOWEST), INFINITE = ordered(__builtin_huge_val());
static const Integer CAPPED = INFINITE - 1;

// The greatest key from which on `enough(key)` is more than 0, as it is at `low`; 2 ends the search. Scores are halved before their
// bits are: they lie more evenly.
template <class F>
static Integer greatest_of(Integer low, Integer high, F enough) {
    for (int round = 0; low < high; round++) {
        typedef unsigned long long Wide;
        Integer middle = low + (Integer)(((Wide)((__int128)high - low) + 1) / 2);
        if (round < 24) {
            Integer half = ordered(score_of(low) / 2 + score_of(high) / 2);
            if (low < half && half < high) middle = half;
        }
        int verdict = enough(middle);
        if (verdict) low = middle;
        else high = middle - 1;
        if (verdict > 1) break;
    }
    return low;
}

// A row that is being made into a list: n blocks, and room for what is known of each, in whole vectors.
struct Row {
    Integer *keys;
    real *mass;
    unsigned char *taken, *forced, *flags;
    i64 n;

    static i64 broad(i64 blocks) { return whole_vectors(blocks) + 2 * WIDTH; }

    Row(i64 blocks, real *room)
        : keys((Integer *)room), mass(room + broad(blocks)), taken((unsigned char *)(room + 2 * broad(blocks))),
          forced(taken + broad(blocks)), flags(forced + broad(blocks)), n(0) {}

    static i64 size(i64 blocks) { return 5 * broad(blocks); }

    void make_keys(const real *scores) {
        i64 whole = n / WIDTH * WIDTH;
        for (i64 j = 0; j < whole; j += WIDTH) {
            Vector x = at(scores + j);
            x = x != x ? all(__builtin_huge_val()) : x + (real)0;
            Integers bits = (Integers)x;
            *(Integers *)(keys + j) = bits ^ ((bits >> (sizeof(Integer) * 8 - 1)) & (Integer)((sizeof(Integer) == 8 ? ~0ull : ~0u) >> 1));
        }
        for (i64 j = whole; j < n; j++) keys[j] = ordered(scores[j]);
        for (i64 j = n; j < whole_vectors(n); j++) keys[j] = NONE;
    }

    i64 count_from(Integer key) const {
        Integers found = {};
        for (i64 j = 0; j < n; j += WIDTH) found -= *(Integers *)(keys + j) >= key;
        i64 sum = 0;
        for (int i = 0; i < WIDTH; i++) sum += found[i];
        return sum;
    }

    double mass_from(Integer key) const {
        double sum = 0;
        for (i64 j = 0; j < n; j++) sum += keys[j] >= key ? (double)mass[j] : 0;
        return sum;
    }

    // The best `wanted` of them as a list; how many there are. Of those that equal the last one the first are taken.
    i64 best(i64 wanted, i64 start, int *to) const {
        Integers low = (INFINITE - Integers{}), high = (NONE - Integers{}), some = {};
        for (i64 j = 0; j < n; j += WIDTH) {
            Integers x = *(Integers *)(keys + j), is_one = x > NONE;
            low = is_one & (x <= low) ? x : low;
            high = x > high ? x : high;
            some -= is_one;
        }
        Integer least_key = INFINITE, greatest_key = NONE;
        i64 candidates = 0, placed = 0;
        for (int i = 0; i < WIDTH; i++) {
            least_key = low[i] < least_key ? low[i] : least_key, greatest_key = high[i] > greatest_key ? high[i] : greatest_key;
            candidates += some[i];
        }
        i64 above = candidates;
        wanted = least(wanted, candidates);
        Integer cut = least_key;  // from here on they are taken, but for some of those that equal it
        if (candidates > wanted)
            cut = greatest_of(least_key, greatest_key, [&](Integer key) {
                i64 found = count_from(key);
                if (found >= wanted) above = found;
                return (found >= wanted) + (found == wanted);
            });
        i64 left_out = above - wanted, ties = 0;
        if (!left_out) {
            for (i64 j = 0; placed < wanted; j++) {
                to[placed] = (int)(start + j);
                placed += keys[j] >= cut;
            }
            return placed;
        }
        for (i64 j = 0; j < n; j++) ties += keys[j] == cut;
        for (i64 j = 0, kept = ties - left_out; placed < wanted; j++) {
            if (keys[j] < cut || (keys[j] == cut && kept-- <= 0)) continue;
            to[placed++] = (int)(start + j);
        }
        return placed;
    }
};

// Marks the blocks of a row whose mass reaches the share that is wanted, or is as much as each has to have.
static void mark_mass(const Choosing *c, const Row &row, const real *scores) {
    i64 n = row.n;
    for (i64 j = 0; j < n; j++) row.flags[j] = row.keys[j] > NONE;
    if (c->measure == 1) {
        for (i64 j = 0; j < n; j++) row.mass[j] = row.flags[j] ? scores[j] : LOWEST;
        for (i64 j = n; j < whole_vectors(n); j++) row.mass[j] = LOWEST;
        real total = Some::weigh(row.mass, whole_vectors(n), (real)LOG2E);
        for (i64 j = 0; j < n; j++) row.mass[j] = total == 0 || is_nan(total) ? 0 : row.mass[j] / total;
    } else {
        double total = 0;
        for (i64 j = 0; j < n; j++) total += row.flags[j] ? (double)scores[j] : 0;
        for (i64 j = 0; j < n; j++)
            row.mass[j] = !row.flags[j] ? 0 : c->measure == 0 ? scores[j] : scores[j] / (total == 0 ? (real)1 : (real)total);
    }
    real wanted = c->share;
    if (c->rule == THRESHOLD) {
        for (i64 j = 0; j < n; j++) row.taken[j] = row.flags[j] && row.mass[j] >= wanted;
        return;
    }
    Integer high = NONE;
    bool first = c->forced_in_mass && c->has_forced;
    for (i64 j = 0; j < n; j++) {
        if (first && row.forced[j]) row.keys[j] = INFINITE;
        high = row.keys[j] > high ? row.keys[j] : high;
    }
    if (c->share == 1) {  // when rounded sums reach 1 is a matter of chance
        for (i64 j = 0; j < n; j++) row.taken[j] = row.flags[j];
        return;
    }
    if (!((real)row.mass_from(NONE) >= wanted)) {
        for (i64 j = 0; j < n; j++) row.taken[j] = c->unmet_all && row.flags[j];
        return;
    }
    Integer cut = greatest_of(NONE, high, [&](Integer key) { return (int)((real)row.mass_from(key) >= wanted); });
    double sum = cut == high ? 0 : row.mass_from(cut + 1);
    for (i64 j = 0; j < n; j++) {
        bool allowed = row.flags[j] || (first && row.forced[j]);
        row.taken[j] = allowed && row.keys[j] > cut;
        if (row.keys[j] != cut || !((real)sum < wanted)) continue;
        sum += row.mass[j];
        row.taken[j] = allowed && (c->inclusive || (real)sum < wanted);
    }
}

// One row of scores, of the blocks from `low` to `high`, into its list.
static void list_of(const Choosing *c, i64 b, i64 head, i64 row_number, const real *scores, i64 low, i64 high, Row row) {
    i64 line = (b * c->heads + head) * c->rows + row_number, placed = 0;
    real *picked = c->picked ? c->picked + line * c->width : nullptr;
    int *to = c->indices + line * c->width;
    i64 begin = most(Some::begin_of(c->limits, b, head, row_number), low);
    i64 end = least(Some::end_of(c->limits, b, head, row_number, c->blocks), high);
    if (begin < end) {
        scores += begin - low;
        row.n = end - begin;
        row.make_keys(scores);
        bool spans = c->limits.firsts;
        if (spans) {
            Some::mark(c->limits, b, head, row_number, begin, end, row.flags);
            for (i64 j = 0; j < row.n; j++)
                if (!row.flags[j]) row.keys[j] = NONE;
        }
        if (c->has_forced) {
            if (c->named)
                __builtin_memcpy(row.forced, c->named + line * c->blocks + begin, row.n);
            else
                Some::mark(c->forced, b, head, row_number, begin, end, row.forced);
            for (i64 j = 0; spans && c->forced_within && j < row.n; j++) row.forced[j] &= row.flags[j];
        }
        if (c->rule == TOP_K) {
            i64 wanted = c->k;
            for (i64 j = 0; c->has_forced && j < row.n; j++) {  // nothing comes before what is forced
                if (row.keys[j] > CAPPED) row.keys[j] = CAPPED;
                if (row.forced[j]) row.keys[j] = INFINITE, wanted += c->extra;
            }
            placed = row.best(wanted, c->start + begin, to);
        } else {
            mark_mass(c, row, scores);
            for (i64 j = 0; j < row.n && placed < c->width; j++)
                if (row.taken[j] || (c->has_forced && row.forced[j])) to[placed++] = (int)(c->start + begin + j);
        }
    }
    c->counts[line] = (int)placed;
    for (i64 n = 0; picked && n < c->width; n++) picked[n] = n < placed ? scores[to[n] - c->start - begin] : LOWEST;
    for (; placed < c->width; placed++) to[placed] = -1;
}

static thread_local Room own_room;

// Turns the columns of all products; whether there was memory.
static bool turn_columns(const Choosing *c, real *turned) {
    bool done = true;
    for (i64 number = 0; number < c->count; number++) {
        const Step &s = c->step(number);
        if (s.kind != DOT || s.turned < 0) continue;
        i64 panels = panels_of(s), lines = c->batch * s.b_heads, width = s.both ? 2 * s.width : s.width;
        share_among(c->parallel, lines * s.blocks * width < (1 << 15) ? 1 : c->threads, lines * panels, [&](i64 n) {
            real *room = own_room.of(BROAD * whole_vectors(s.width)), *to = turned + s.turned + n * width * BROAD;
            i64 line = n / panels, from = n % panels * BROAD, count = least(BROAD, s.blocks - from);
            if (!room) done = false;
            for (int part = 0; room && part < 1 + s.both; part++) {
                Head columns(part ? s.other : s.b, s.b_kind, s.width, line / s.b_heads, line % s.b_heads, 0, 1);
                turn_block(s.width, columns, from, count, BROAD, room, to + part * s.width * BROAD);
            }
        });
    }
    return done;
}

// Returns 0; -1: there is no memory.
extern "C" int choose_blocks(const Choosing *c) {
    constexpr i64 LINES = 64, PLANE = 1 << 16;  // rows of products at a time; scores of a plane, about
    const Step &last = c->step(c->count - 1);
    i64 heads = 1;  // that one result is made of, at most
    for (i64 n = 0; n < c->count; n++) heads = most(heads, c->step(n).heads / last.heads);
    i64 rows = most(least(LINES / heads, PLANE / (heads * most(last.blocks, 1))), 4), parts = (c->rows + rows - 1) / rows;
    real *turned = (real *)__builtin_malloc((c->turned + 1) * sizeof(real));
    bool failed = !turned || !turn_columns(c, turned), little = c->batch * c->heads * c->rows * c->blocks < (1 << 14);
    share_among(c->parallel, little ? 1 : c->threads, failed ? 0 : c->batch * c->heads * parts, [&](i64 n) {
        i64 line = n / parts, b = line / c->heads, head = line % c->heads, row = (parts - 1 - n % parts) * rows;  // long ones first
        i64 planes = Some::size(c, c->count - 1, 1, rows);
        real *room = own_room.of(planes + Row::size(c->blocks));
        if (!room) {
            failed = true;
            return;
        }
        Some some = {c, turned, b, row, least(rows, c->rows - row), room};
        Row one(c->blocks, room + planes);
        i64 low, high;
        some.reach(c->limits, head, 1, c->blocks, low, high);
        Plane plane = {nullptr, 0, 0, 0};
        if (low < high) plane = some.scores(c->count - 1, head * last.heads / c->heads, 1, low, high);
        for (i64 i = 0; i < some.rows; i++)
            list_of(c, b, head, row + i, plane.first ? plane.first + i * plane.row + low - plane.low : nullptr, low, high, one);
    });
    __builtin_free(turned);
    return failed ? -1 : 0;
}
