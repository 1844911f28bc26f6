// C (M x N) = or += A (M x K) B (K x N). Rows of B and C have no gaps, N is whole vectors; A lies anyhow: element (i, k) at
// i * a_row + k * a_step, so that a product with a transposed matrix is the same code. Blocks of ROWS x VECTORS results stay in
// registers; K is short enough (a block of keys, a strip of queries, a head) that what is read stays in the nearest cache.

// Where the rows of a matrix begin: evenly, or as a list says.
template <class T>
struct Even {
    T *first;
    i64 row;
    T *operator()(i64 i) const { return first + i * row; }
};
template <class T>
struct Listed {
    T *const *rows;
    T *operator()(i64 i) const { return rows[i]; }
};

// The columns of some rows from one column on.
template <class T>
struct From {
    T *const *rows;
    i64 column;
    T *operator()(i64 i) const { return rows[i] + column; }
};

template <int ROWS, int VECTORS, bool ADD, class A, class B, class C>
static inline __attribute__((always_inline)) void product_block(i64 K, A a, C c, i64 from, i64 a_step, B of_b, i64 column) {
    Vector sum[ROWS][VECTORS];
    const real *of[ROWS];
    for (int i = 0; i < ROWS; i++) of[i] = a(from + i);
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) sum[i][j] = ADD ? at(c(from + i) + column + j * WIDTH) : Vector{};
    for (i64 k = 0; k < K; k++) {
        Vector b[VECTORS];
        const real *row = of_b(k);
        for (int j = 0; j < VECTORS; j++) b[j] = at(row + j * WIDTH);
        for (int i = 0; i < ROWS; i++) {
            Vector x = all(of[i][k * a_step]);
            for (int j = 0; j < VECTORS; j++) sum[i][j] += x * b[j];
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) put(c(from + i) + column + j * WIDTH, sum[i][j]);
}

template <int VECTORS, bool ADD, class A, class B, class C>
static void product_columns(i64 M, i64 K, A a, C c, i64 a_step, B b, i64 column) {
    constexpr int ROWS = VECTORS == 1 ? 8 : REGISTERS / VECTORS;
    i64 i = 0;
    for (; i + ROWS <= M; i += ROWS) product_block<ROWS, VECTORS, ADD>(K, a, c, i, a_step, b, column);
    i64 left = M - i;
    if (ROWS > 8 && left & 8) product_block<8, VECTORS, ADD>(K, a, c, i, a_step, b, column), i += 8;
    if (ROWS > 4 && left & 4) product_block<4, VECTORS, ADD>(K, a, c, i, a_step, b, column), i += 4;
    if (ROWS > 2 && left & 2) product_block<2, VECTORS, ADD>(K, a, c, i, a_step, b, column), i += 2;
    if (left & 1) product_block<1, VECTORS, ADD>(K, a, c, i, a_step, b, column);
}

constexpr i64 BROAD = (REGISTERS == 24 ? 4 : 2) * WIDTH;

// `from(j)`: the rows of B from column j on.
template <bool ADD, class A, class C, class F>
static inline void product_from(i64 M, i64 N, i64 K, A a, i64 a_step, F from, C c) {
    i64 j = 0;
    for (; j + BROAD <= N; j += BROAD) product_columns<BROAD / WIDTH, ADD>(M, K, a, c, a_step, from(j), j);
    i64 left = (N - j) / WIDTH;
    if (BROAD / WIDTH > 2 && left == 3) product_columns<3, ADD>(M, K, a, c, a_step, from(j), j);
    if (BROAD / WIDTH > 2 && left == 2) product_columns<2, ADD>(M, K, a, c, a_step, from(j), j);
    if (left == 1) product_columns<1, ADD>(M, K, a, c, a_step, from(j), j);
}

// `b_panel`: from one panel of B, BROAD columns, to the next.
template <bool ADD, class A, class C>
static void product_of(i64 M, i64 N, i64 K, A a, i64 a_step, const real *B, i64 b_row, i64 b_panel, C c) {
    product_from<ADD>(M, N, K, a, a_step, [&](i64 j) { return Even<const real>{B + j / BROAD * b_panel, b_row}; }, c);
}

template <bool ADD>
static void product(i64 M, i64 N, i64 K, const real *A, i64 a_row, i64 a_step, const real *B, i64 b_row, real *C, i64 c_row) {
    product_of<ADD>(M, N, K, Even<const real>{A, a_row}, a_step, B, b_row, BROAD, Even<real>{C, c_row});
}
