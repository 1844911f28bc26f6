// C (M x N) = or += A (M x K) B (K x N). B and C have rows without gaps, N is whole vectors; A lies anyhow: element (i, k) at
// i * a_row + k * a_step, so that a product with a transposed matrix is the same code. Blocks of ROWS x VECTORS results stay in
// registers; K is short enough (a block of keys, a strip of queries, a head) that what is read stays in the nearest cache.

template <int ROWS, int VECTORS, bool ADD>
static inline __attribute__((always_inline)) void product_block(
    i64 K, const real *__restrict A, i64 a_row, i64 a_step, const real *__restrict B, i64 b_row, real *__restrict C, i64 c_row) {
    Vector sum[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) sum[i][j] = ADD ? at(C + i * c_row + j * WIDTH) : Vector{};
    for (i64 k = 0; k < K; k++) {
        Vector b[VECTORS];
        for (int j = 0; j < VECTORS; j++) b[j] = at(B + k * b_row + j * WIDTH);
        for (int i = 0; i < ROWS; i++) {
            Vector a = all(A[i * a_row + k * a_step]);
            for (int j = 0; j < VECTORS; j++) sum[i][j] += a * b[j];
        }
    }
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < VECTORS; j++) put(C + i * c_row + j * WIDTH, sum[i][j]);
}

template <int VECTORS, bool ADD>
static void product_columns(
    i64 M, i64 K, const real *A, i64 a_row, i64 a_step, const real *B, i64 b_row, real *C, i64 c_row) {
    constexpr int ROWS = VECTORS == 1 ? 8 : REGISTERS / VECTORS;
    i64 i = 0;
    for (; i + ROWS <= M; i += ROWS)
        product_block<ROWS, VECTORS, ADD>(K, A + i * a_row, a_row, a_step, B, b_row, C + i * c_row, c_row);
    i64 left = M - i;
    if (ROWS > 8 && left & 8) {
        product_block<8, VECTORS, ADD>(K, A + i * a_row, a_row, a_step, B, b_row, C + i * c_row, c_row);
        i += 8;
    }
    if (ROWS > 4 && left & 4) {
        product_block<4, VECTORS, ADD>(K, A + i * a_row, a_row, a_step, B, b_row, C + i * c_row, c_row);
        i += 4;
    }
    if (ROWS > 2 && left & 2) {
        product_block<2, VECTORS, ADD>(K, A + i * a_row, a_row, a_step, B, b_row, C + i * c_row, c_row);
        i += 2;
    }
    if (left & 1) product_block<1, VECTORS, ADD>(K, A + i * a_row, a_row, a_step, B, b_row, C + i * c_row, c_row);
}

template <bool ADD>
static void product(
    i64 M, i64 N, i64 K, const real *A, i64 a_row, i64 a_step, const real *B, i64 b_row, real *C, i64 c_row) {
    constexpr i64 BROAD = (REGISTERS == 24 ? 4 : 2) * WIDTH;
    i64 j = 0;
    for (; j + BROAD <= N; j += BROAD)
        product_columns<BROAD / WIDTH, ADD>(M, K, A, a_row, a_step, B + j, b_row, C + j, c_row);
    i64 left = (N - j) / WIDTH;
    if (BROAD / WIDTH > 2 && left == 3) product_columns<3, ADD>(M, K, A, a_row, a_step, B + j, b_row, C + j, c_row);
    if (BROAD / WIDTH > 2 && left == 2) product_columns<2, ADD>(M, K, A, a_row, a_step, B + j, b_row, C + j, c_row);
    if (left == 1) product_columns<1, ADD>(M, K, A, a_row, a_step, B + j, b_row, C + j, c_row);
}
