// Matrix products for training: register-blocked, over matrices in panels. The caller's epilogue takes each
// block of the product while it is in registers. Padding columns are zeros; padding rows hold any numbers.

// Vectors of a block. On AVX-512 8 x 2 are as fast as 8 x 3.
constexpr int kWidest = kBlock == 8 ? 2 : kVectors;
constexpr int kPanel = kWidest * W;
constexpr int64_t kPart = 128 / kPanel * kPanel;  // terms of a partial sum
static_assert(kPanel % kBlock == 0 && kBlock % 4 == 0);

MOPO_INLINE int64_t offset(int64_t rows, int64_t row, int64_t column) {
  return (column / kPanel * rows + row) * kPanel + column % kPanel;
}
MOPO_INLINE float* at(const Panels& matrix, int64_t row, int64_t column) {
  return matrix.data + offset(matrix.rows, row, column);
}
// Sets the column of ones that the next layer's bias is multiplied by.
static void set_ones(int64_t first, int64_t last, const Panels& matrix, int64_t column) {
  for (int64_t row = first; row < last; ++row) *at(matrix, row, column) = 1.0f;
}

// Offset of vector v of row i within a block.
constexpr int64_t within(int i, int v) { return i * kPanel + v * W; }

// Calls visit(i, v, x) for every vector of a block.
template <int kWide, class Visit>
MOPO_INLINE void each_vector(vf (&block)[kBlock][kWide], Visit visit) {
#pragma GCC unroll 8
  for (int i = 0; i < kBlock; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kWide; ++v) visit(i, v, block[i][v]);
}

// Adds one term of the product: the outer product of kBlock numbers of a and kWide vectors of b.
template <int kWide, bool kTransposed>
MOPO_INLINE void add_term(const float* a, const float* b, vf (&sum)[kBlock][kWide]) {
  vf right[kWide];
#pragma GCC unroll 3
  for (int v = 0; v < kWide; ++v) right[v] = load(b + v * W);
#pragma GCC unroll 8
  for (int i = 0; i < kBlock; ++i) {
    const vf left = broadcast(a[kTransposed ? i : i * kPanel]);
#pragma GCC unroll 3
    for (int v = 0; v < kWide; ++v) sum[i][v] = sum[i][v] + left * right[v];
  }
}

// kBlock rows of the product, kWide vectors each. A term is a row of the panel of a transposed `a`; of any
// other `a` it is a column, and panels lie `a_panel` floats apart. Not inlined: among other code the compiler
// would spill the sums. Order of a sum: terms in parts of kPart, then the parts, both ascending.
template <int kWide, bool kTransposed>
__attribute__((noinline)) static void product_block(const float* a, int64_t a_panel, const float* b,
                                                    int64_t depth, vf (&total)[kBlock][kWide]) {
  each_vector(total, [](int, int, vf& x) { x = vf{}; });
  while (depth > 0) {
    // Partial sums lose less to rounding.
    vf sum[kBlock][kWide] = {};
    int64_t part = smaller(kPart, depth);
    depth -= part;
    while (part > 0) {
      const int64_t terms = kTransposed ? part : smaller(kPanel, part);
      // Unrolled, so that the processor predicts the loop's end.
#pragma GCC unroll 4
      for (int64_t k = 0; k < terms; ++k) {
        add_term<kWide, kTransposed>(a + (kTransposed ? k * kPanel : k), b, sum);
        b += kPanel;
      }
      a += kTransposed ? terms * kPanel : a_panel;
      part -= terms;
    }
    each_vector(total, [&](int i, int v, vf& x) { x = x + sum[i][v]; });
  }
}

// Rows first .. last (in steps of kBlock) and columns first_column .. width of a b, where a is [rows][depth],
// or [depth][rows] if transposed, and b [depth][width]. Calls epilogue(row, column, block) with each
// block [kBlock][vectors] of the product. first_column begins a panel.
template <bool kTransposed, class Epilogue>
MOPO_INLINE void product(int64_t first, int64_t last, int64_t first_column, int64_t width, int64_t depth,
                         const Panels& a, const Panels& b, Epilogue epilogue) {
  const int64_t a_panel = a.rows * kPanel;
  for (int64_t column = first_column; column < width; column += kPanel) {
    const float* right = at(b, 0, column);
    const auto run = [&]<int kWide>() {
      // The panel of b stays in the first-level cache while a passes by.
      for (int64_t row = first; row < last; row += kBlock) {
        vf total[kBlock][kWide];
        product_block<kWide, kTransposed>(kTransposed ? at(a, 0, row) : at(a, row, 0), a_panel, right, depth,
                                          total);
        epilogue(row, column, total);
      }
    };
    const int64_t vectors = smaller(kWidest, (width - column + W - 1) / W);
    if (vectors == kWidest)
      run.template operator()<kWidest>();
    else if (vectors == 1)
      run.template operator()<1>();
    else if constexpr (kWidest == 3)
      run.template operator()<2>();
  }
}

// Both take the lower (from = 0) or the upper (from = 2) two of each four lanes of x and of y. interleave
// lets them alternate; join puts those of y behind those of x.
template <int from>
MOPO_INLINE vf interleave(vf x, vf y) {
  return shuffle(x, y, [](int lane) { return lane / 4 * 4 + from + lane % 4 / 2 + lane % 2 * W; });
}
template <int from>
MOPO_INLINE vf join(vf x, vf y) {
  return shuffle(x, y, [](int lane) { return lane / 4 * 4 + from + lane % 2 + lane % 4 / 2 * W; });
}

// Stores lane l of x0 .. x3 to to[l * stride + 0 .. 3].
MOPO_INLINE void store_transposed(float* to, int64_t stride, vf x0, vf x1, vf x2, vf x3) {
  const vf low01 = interleave<0>(x0, x1), low23 = interleave<0>(x2, x3);
  const vf high01 = interleave<2>(x0, x1), high23 = interleave<2>(x2, x3);
  const vf columns[4] = {join<0>(low01, low23), join<2>(low01, low23), join<0>(high01, high23),
                         join<2>(high01, high23)};
  const auto store_group = [&]<int group>() {
    if constexpr (group < W / 4)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        *reinterpret_cast<quad*>(to + (4 * group + j) * stride) = four_lanes<group>(columns[j]);
  };
  store_group.template operator()<0>();
  store_group.template operator()<1>();
  store_group.template operator()<2>();
  store_group.template operator()<3>();
}
