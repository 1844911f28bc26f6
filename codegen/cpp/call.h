// What one call is told, and what the code that is generated for a pattern offers. Python fills a Call field by field, each 8 bytes
// wide and in this order (sparsedsl/backends/cpp/call_bytes.py); lengths and strides count elements.

typedef long long i64;
#ifdef DOUBLE
typedef double real;
#else
typedef float real;
#endif

// The queries of one strip, side by side: lane i is the query at position q_idx[i] of head h[i]. All belong to batch entry b.
// Lanes from `used` on repeat the last one, to fill whole vectors. `residue`: of a pattern that is taken apart by residues, which one; positions and lengths then count within it.
struct Lanes {
    i64 count, used, b, residue, q_len, kv_len;
    const i64 *q_idx, *h;
    const i64 *bits;  // of a block that choices selected, for each lane: bit n says whether choice n did; or null
};

// A tensor (batch, heads, length, width) whose rows lie without gaps.
struct Tensor {
    const char *first;
    i64 batch, head, row;
};

// Which row of a tensor each position of a head has, (batch or 1, some heads, positions); or null: that of its own number.
struct Places {
    const int *first;
    i64 batch, heads;  // `batch`: heads from one entry to the next, or 0
    i64 length;  // rows of the tensor

    const int *of(i64 b, i64 head, i64 of_heads, i64 positions) const {
        return first ? first + (b * batch + head * heads / of_heads) * positions : nullptr;
    }
    i64 rows(i64 positions) const { return first ? length : positions; }
};

struct Call {
    i64 batch, heads, kv_heads, rows, keys, head_dim, head_dim_v, q_offset;
    double scale;
    i64 kind;  // of the elements of q, k, v, out and its gradient: 0 real, 1 bfloat16, 2 float16
    i64 threads;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);  // GOMP_parallel, of the OpenMP that torch uses
    Tensor q, k, v, out;
    real *lse;  // (batch, heads, rows of q)

    // How strips are cut: queries of each of so many heads of a group. `step`: residues modulo it, one after the other.
    i64 strip_queries, strip_heads, step;
    i64 weighing;  // how logits become weights: SOFTMAX; POINTWISE, where `score` gives weights, and 0 is masked; SOFTPICK; STICK

    // The pattern. `intervals`: intervals of keys of each query; -1: there are none, lists of blocks are read. A function may be null.
    i64 intervals;
    void (*ends)(const Call *, const Lanes *, i64 *first, i64 *last);  // [interval][lane], last inclusive
    void (*mask)(const Call *, const Lanes *, i64 key, i64 keys, real *tile);  // puts what is masked to -inf, of weights to 0
    void (*score)(const Call *, const Lanes *, i64 key, i64 keys, real *tile);  // products -> logits in units of log2, or weights
    real (*sink)(const Call *, i64 b, i64 h);

    // Lists of blocks of strip_queries x BLOCK_KEYS pairs, of each batch entry and head that the mask tells apart.
    const int *full_starts, *full_columns, *partial_starts, *partial_columns;
    i64 list_batch, list_head, list_rows;

    // Where rows of k and v lie, and those of q, out and LSE; each has one for each position of `keys` and `rows`.
    Places key_places, query_places;

    // The backward pass: gradients of the results; sums over the key/value head, as wide as whole vectors.
    Tensor grad_out;
    const real *grad_lse;  // or null
    real *delta;  // like the LSE: sum of out * grad_out less grad_lse
    real *grad_q, *grad_k, *grad_v;  // contiguous; widths of grad_k and grad_v rounded up to whole vectors
    void (*slope)(const Call *, const Lanes *, i64 key, i64 keys, real *tile, real *slope);  // score, and its derivative
    void (*gains)(const Call *, const Lanes *, i64 key, i64 keys, const real *tile, const real *change, double *sums);
    double *sums;  // gradients of learned tables, one after the other, of each part of the work
    i64 sums_size, parts, parts_alone;  // entries of all; parts a key/value head is worked on in; whether one part after the other

    i64 more[];  // tables and arrays of the pattern: see its own code
};

// Keys in one block of a list, and lanes at most.
constexpr i64 BLOCK_KEYS = 64, MOST_LANES = 64, MOST_INTERVALS = 4;
constexpr i64 SOFTMAX = 0, POINTWISE = 1, SOFTPICK = 2, STICK = 3;
constexpr real LOWEST = -__builtin_huge_val();
constexpr double LN2 = 0.69314718055994530942, LOG2E = 1.4426950408889634074;
