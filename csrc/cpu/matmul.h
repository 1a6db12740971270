// Matrix products for training: row-major, register-blocked, the work that follows them done in the epilogue.
// Every matrix has room for whole blocks: zeros beyond its last column, any numbers beyond its last row.

constexpr int kRows = MOPO_ROWS;  // rows at a time: kRows x 2 sums stay in registers
constexpr int64_t kPart = 136;    // terms of a long sum that are added up at a time, about

// sum += the product of kRows rows of `a` and kVectors vectors of `b`, `depth` terms each.
template <int kVectors, bool kTransposed>
MOPO_INLINE void add_products(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                              int64_t depth, vf (&sum)[kRows][kVectors]) {
  for (int64_t k = 0; k < depth; ++k) {
    vf right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * W);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const vf left = broadcast(kTransposed ? a[i] : a[i * a_stride]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] = sum[i][v] + left * right[v];
    }
    a += kTransposed ? a_stride : 1;
    b += b_stride;
  }
}

// epilogue(i, v, sum): row i, vector v of the product.
template <int kVectors, bool kTransposed, class Epilogue>
MOPO_INLINE void product_tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                              int64_t depth, Epilogue epilogue) {
  vf total[kRows][kVectors] = {};
  // In parts of equal length a long sum loses less to rounding.
  const int64_t parts = (depth + kPart - 1) / kPart, part = (depth + parts - 1) / parts;
  for (int64_t k = 0; k < depth; k += part) {
    const int64_t step = kTransposed ? a_stride : 1;
    vf sum[kRows][kVectors] = {};
    add_products<kVectors, kTransposed>(a + k * step, a_stride, b + k * b_stride, b_stride,
                                        smaller(part, depth - k), sum);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) total[i][v] = total[i][v] + sum[i][v];
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) epilogue(i, v, total[i][v]);
}

// Rows first .. last (in steps of kRows) of a b, a [rows][depth] or, transposed, [depth][rows]; b
// [depth][width]. epilogue(row, column, sums): a vector of them from that column on. prefetch(row, column):
// of a block of kRows x 2 vectors, whose turn is next.
template <bool kTransposed, class Epilogue, class Prefetch>
MOPO_INLINE void product(int64_t first, int64_t last, int64_t width, int64_t depth, const float* a,
                         int64_t a_stride, const float* b, int64_t b_stride, Epilogue epilogue,
                         Prefetch prefetch) {
  for (int64_t column = 0; column < width; column += 2 * W) {
    const auto run = [&](auto tile) {
      // A block of b's columns stays in the first-level cache while a passes by.
      for (int64_t row = first; row < last; row += kRows) {
        prefetch(row, column);
        tile(a + row * (kTransposed ? 1 : a_stride), a_stride, b + column, b_stride, depth,
             [&](int i, int v, vf sum) { epilogue(row + i, column + v * W, sum); });
      }
    };
    if (width - column > W) {
      run([](auto... arguments) { product_tile<2, kTransposed>(arguments...); });
    } else {
      run([](auto... arguments) { product_tile<1, kTransposed>(arguments...); });
    }
  }
}

template <bool kTransposed, class Epilogue>
MOPO_INLINE void product(int64_t first, int64_t last, int64_t width, int64_t depth, const float* a,
                         int64_t a_stride, const float* b, int64_t b_stride, Epilogue epilogue) {
  product<kTransposed>(first, last, width, depth, a, a_stride, b, b_stride, epilogue,
                       [](int64_t, int64_t) {});
}
