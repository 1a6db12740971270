// The factors of training's products. In float32 they are the matrices themselves, in bfloat16 rounded
// copies; sums are always float32. kCopies: the factors are not the matrices themselves.
//
// A layer has three matrices: inputs X [rows][in], gradients of its outputs G [rows][out], weights W
// [in][out]. Its three products are forwards X W, backwards G W^T, and the weight's gradient X^T G. X has a
// column of ones, so that X^T G has the bias's gradient as its last row. The bias itself is never rounded.

// Zeroes the bias's row in a block of a layer's values.
template <int kWide>
MOPO_INLINE void without_bias(const Dense& layer, int64_t row, vf (&block)[kBlock][kWide]) {
  each_vector(block, [&](int i, int, vf& x) {
    if (row + i >= layer.in) x = vf{};
  });
}

// Factors as matrices in panels: float32, and bfloat16 as rounded floats where no instruction multiplies it.
template <bool kToBFloat16>
struct PanelFactors {
  static constexpr bool kCopies = kToBFloat16;
  static constexpr Precision kPrecision = kToBFloat16 ? Precision::kBFloat16 : Precision::kFloat32;
  static constexpr int64_t kRows = kBlock;  // rows that a product takes at a time

  MOPO_INLINE vf round(vf x) {
    if constexpr (kCopies) return pack_pair(vf{}, x);
    return x;
  }

  // X from row `first` on, a multiple of kRows; grad_from is the same of G. A packed factor has its `along`
  // in a buffer of these rows alone.
  MOPO_INLINE Factor left_from(const Factor& x, int64_t first, const Panels&) {
    const auto from = [&](const Panels& matrix) { return Panels{matrix.data + first * kPanel, matrix.rows}; };
    return {from(x.along), from(x.across)};
  }
  MOPO_INLINE Factor grad_from(const Factor& grad, int64_t first, const Panels& along) {
    return left_from(grad, first, along);
  }

  // Stores a block of X as a factor; put_grad a block of G, put_weight a block of a layer's values.
  template <int kWide>
  MOPO_INLINE void put_left(const Factor& to, int64_t row, int64_t column, vf (&block)[kBlock][kWide]) {
    float* first = at(to.along, row, column);
    each_vector(block, [&](int i, int v, vf x) { store(first + within(i, v), round(x)); });
  }
  template <int kWide>
  MOPO_INLINE void put_grad(const Factor& to, int64_t row, int64_t column, vf (&block)[kBlock][kWide]) {
    put_left(to, row, column, block);
  }

  // Vector v of a row of X, from `column` on.
  MOPO_INLINE vf left(const Factor& x, int64_t row, int64_t column, int v) {
    return load(at(x.along, row, column) + v * W);
  }

  template <int kWide>
  MOPO_INLINE void put_target(const Dense& layer, int64_t row, int64_t column, vf (&block)[kBlock][kWide]) {
    if constexpr (kCopies) put_across(layer, layer.target_weight, row, column, block);
  }
  template <int kWide>
  MOPO_INLINE void put_weight(const Dense& layer, int64_t row, int64_t column, vf (&block)[kBlock][kWide]) {
    if constexpr (kCopies) put_across(layer, layer.weight.across, row, column, block);
    if (layer.weight.along.data == nullptr) return;
    without_bias(layer, row, block);
#pragma GCC unroll 2
    for (int i = 0; i < kBlock; i += 4)
      if (row + i < layer.in)
#pragma GCC unroll 3
        for (int v = 0; v < kWide; ++v)
          store_transposed(at(layer.weight.along, column + v * W, row + i), kPanel, block[i][v],
                           block[i + 1][v], block[i + 2][v], block[i + 3][v]);
  }

  MOPO_INLINE void set_ones(int64_t first, int64_t last, const Factor& x, int64_t column) {
    mopo::MOPO_ISA::set_ones(first, last, x.along, column);
  }

  // X W, of the weights or of their target.
  template <class Epilogue>
  MOPO_INLINE void forward(int64_t first, int64_t last, const Factor& x, const Dense& layer, bool target,
                           Epilogue epilogue) {
    product<false>(first, last, 0, layer.out, layer.in + 1, x.along,
                   target ? layer.target_weight : layer.weight.across, epilogue);
  }

  // G W^T: gradients of the layer's inputs, from the panel on that holds input `from`.
  template <class Epilogue>
  MOPO_INLINE void backward(int64_t first, int64_t last, int64_t from, const Factor& grad, const Dense& layer,
                            Epilogue epilogue) {
    product<false>(first, last, from / kPanel * kPanel, layer.in, layer.out, grad.along, layer.weight.along,
                   epilogue);
  }

  // Rows first .. last of X^T G, summed over `count` rows of the batch.
  template <class Epilogue>
  MOPO_INLINE void weight_gradient(int64_t first, int64_t last, int64_t count, const Factor& x,
                                   const Factor& grad, const Dense& layer, Epilogue epilogue) {
    product<true>(first, last, 0, layer.out, count, x.across, grad.across, epilogue);
  }

 private:
  template <int kWide>
  MOPO_INLINE void put_across(const Dense& layer, const Panels& to, int64_t row, int64_t column,
                              vf (&block)[kBlock][kWide]) {
    float* first = at(to, row, column);
    each_vector(block, [&](int i, int v, vf& x) {
      if (row + i < layer.in) x = round(x);
      store(first + within(i, v), x);
    });
  }
};

using Float32Factors = PanelFactors<false>;

#ifndef MOPO_BFLOAT16
using BFloat16Factors = PanelFactors<true>;
using BFloat16x3Factors = Float32Factors;  // not asked for
#else
// Factors of packed bfloat16, for AMX and for vdpbf16ps: words of two numbers that follow one another in the
// sum, in tiles of 16 x 16 words. A row of a left factor's tile is a row of the matrix; a column of a right
// factor's tile is a column of the matrix, and two such tiles stand side by side. Padding rows of a batch are
// zeros in G and finite numbers of an earlier batch in X.
//
// With kParts = 2 a factor is the sum of two matrices: its values in bfloat16, and the errors of these. Their
// tiles take turns: [tiles][parts][rows][words].
template <int kParts>
struct PackedFactors {
  static constexpr bool kCopies = true;
  static constexpr Precision kPrecision = kParts == 1 ? Precision::kBFloat16 : Precision::kBFloat16x3;
  static constexpr int64_t kRows = 32;
  static constexpr int64_t kWords = 16;  // in a tile's row
  static_assert(W == kWords && kPanel == kRows);

  MOPO_INLINE Factor left_from(const Factor& x, int64_t first, const Panels& along) {
    return {along, {x.across.data + first / kRows * kParts * x.across.rows * kWords, x.across.rows}};
  }
  MOPO_INLINE Factor grad_from(const Factor& grad, int64_t first, const Panels& along) {
    return {along, {grad.across.data + first * kWords, grad.across.rows}};
  }

  template <int kWide>
  MOPO_INLINE void put_left(const Factor& to, int64_t row, int64_t column, vf (&block)[kBlock][kWide]) {
    each_part(block, [&](int part) {
      put_along(to, row, column, part, block);
      if (to.across.data == nullptr) return;
      float* here = tile(to.across, row, column, part) + row % kRows / 2;
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v)
        store_transposed(here + v * W * kWords, kWords, row_pair(block, 0, v), row_pair(block, 2, v),
                         row_pair(block, 4, v), row_pair(block, 6, v));
    });
  }
  template <int kWide>
  MOPO_INLINE void put_grad(const Factor& to, int64_t row, int64_t column, vf (&block)[kBlock][kWide]) {
    each_part(block, [&](int part) {
      if (to.along.data != nullptr) put_along(to, row, column, part, block);
      if (to.across.data != nullptr) put_across(to.across, row, column, part, block);
    });
  }
  // In bfloat16, whose sign is that of a sum of two parts.
  MOPO_INLINE vf left(const Factor& x, int64_t row, int64_t column, int v) {
    return unpack_row(tile(x.along, column, row, 0) + v * W / 2);
  }
  template <int kWide>
  MOPO_INLINE void put_target(const Dense& layer, int64_t row, int64_t column, vf (&block)[kBlock][kWide]) {
    without_bias(layer, row, block);
    each_part(block, [&](int part) { put_across(layer.target_weight, row, column, part, block); });
  }
  template <int kWide>
  MOPO_INLINE void put_weight(const Dense& layer, int64_t row, int64_t column, vf (&block)[kBlock][kWide]) {
    without_bias(layer, row, block);
    each_part(block, [&](int part) {
      put_across(layer.weight.across, row, column, part, block);
      const Panels& along = layer.weight.along;
      if (along.data == nullptr) return;
      float* here = tile(along, row, column, part) + row % kRows;
#pragma GCC unroll 2
      for (int i = 0; i < kBlock; i += 4)
        store_transposed(here + i, kRows, column_pairs(block, i), column_pairs(block, i + 1),
                         column_pairs(block, i + 2), column_pairs(block, i + 3));
    });
  }

  MOPO_INLINE void set_ones(int64_t first, int64_t last, const Factor& x, int64_t column) {
    if (x.across.data == nullptr) return;
    const vf ones = pack_pair(broadcast(1.0f), broadcast(1.0f));
    for (int64_t row = first; row < last; row += kRows) store(tile(x.across, row, column, 0), ones);
  }

  template <class Epilogue>
  MOPO_INLINE void forward(int64_t first, int64_t last, const Factor& x, const Dense& layer, bool target,
                           Epilogue epilogue) {
    const Panels value{target ? layer.target : layer.value, layer.rows};
    product(first, last, 0, layer.out, layer.in, x.along, target ? layer.target_weight : layer.weight.across,
            [&](int64_t row, int64_t column, auto& block) {
              const float* bias = at(value, layer.in, column);
              each_vector(block, [&](int, int v, vf& sum) { sum = sum + load(bias + v * W); });
              epilogue(row, column, block);
            });
  }

  template <class Epilogue>
  MOPO_INLINE void backward(int64_t first, int64_t last, int64_t from, const Factor& grad, const Dense& layer,
                            Epilogue epilogue) {
    product(first, last, from / kRows * kRows, layer.in, layer.out, grad.along, layer.weight.along, epilogue);
  }

  template <class Epilogue>
  MOPO_INLINE void weight_gradient(int64_t first, int64_t last, int64_t count, const Factor& x,
                                   const Factor& grad, const Dense& layer, Epilogue epilogue) {
    product(first, smaller(last, layer.rows), 0, layer.out, count, x.across, grad.across, epilogue);
  }

 private:
  // Row `within` of a tile of the panel that has number `across`.
  MOPO_INLINE float* tile(const Panels& words, int64_t across, int64_t within, int part) {
    return words.data + ((across / kRows * kParts + part) * words.rows + within) * kWords;
  }
  // Calls put(part) for each part; `block` holds the part to be put.
  template <int kWide, class Put>
  MOPO_INLINE void each_part(vf (&block)[kBlock][kWide], Put put) {
    put(0);
    if constexpr (kParts == 2) {
      each_vector(block, [](int, int, vf& x) { x = bfloat16_error(x); });
      put(1);
    }
  }
  template <int kWide>
  MOPO_INLINE vf row_pair(const vf (&block)[kBlock][kWide], int i, int v) {
    return pack_pair(block[i][v], block[i + 1][v]);
  }
  template <int kWide>
  MOPO_INLINE vf column_pairs(const vf (&block)[kBlock][kWide], int i) {
    return pack_row(block[i][0], kWide == 2 ? block[i][kWide - 1] : vf{});
  }
  // Stores X or G as a left factor: pairs along its rows.
  template <int kWide>
  MOPO_INLINE void put_along(const Factor& to, int64_t row, int64_t column, int part,
                             const vf (&block)[kBlock][kWide]) {
    float* here = tile(to.along, column, row, part);
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; ++i) store(here + i * kWords, column_pairs(block, i));
  }
  // Stores G or W as a right factor: pairs along its columns.
  template <int kWide>
  MOPO_INLINE void put_across(const Panels& to, int64_t row, int64_t column, int part,
                              const vf (&block)[kBlock][kWide]) {
    float* here = tile(to, column, row, part);
#pragma GCC unroll 4
    for (int i = 0; i < kBlock; i += 2)
#pragma GCC unroll 2
      for (int v = 0; v < kWide; ++v) store(here + i * kWords + v * W, row_pair(block, i, v));
  }

#ifdef MOPO_AMX
  // Rows first .. last and columns first_column .. width of a product that sums `depth` terms, in squares of
  // four tiles. The epilogue of a square runs piece by piece among the tile products of the next one.
  template <class Epilogue>
  MOPO_INLINE void product(int64_t first, int64_t last, int64_t first_column, int64_t width, int64_t depth,
                           const Panels& a, const Panels& b, Epilogue epilogue) {
    if (first >= last) return;
    constexpr int64_t kPieces = kRows / kBlock;
    alignas(64) float sums[2][kRows * kRows];
    // GCC 12 does not know that loading a tile reads memory.
    asm volatile("" ::: "memory");
    const int64_t steps = (depth + kRows - 1) / kRows;
    const int64_t row_squares = (last - first + kRows - 1) / kRows;
    const int64_t squares = row_squares * ((width - first_column + kRows - 1) / kRows);
    const auto row_of = [&](int64_t square) { return first + square % row_squares * kRows; };
    const auto column_of = [&](int64_t square) { return first_column + square / row_squares * kRows; };
    const auto finish = [&](int64_t square, int64_t piece, int64_t end) {
      const int64_t column = column_of(square);
      for (; piece < end; ++piece) {
        const int64_t row = row_of(square) + piece * kBlock;
        if (row >= last) return;
        const float* from = sums[square % 2] + piece * kBlock * kRows;
        const auto run = [&]<int kWide>() {
          vf block[kBlock][kWide];
          each_vector(block, [&](int i, int v, vf& x) { x = load(from + i * kRows + v * W); });
          epilogue(row, column, block);
        };
        if (width - column > W)
          run.template operator()<2>();
        else
          run.template operator()<1>();
      }
    };
    for (int64_t square = 0; square < squares; ++square) {
      const int64_t row = row_of(square), column = column_of(square);
      const bool tall = last - row > W, wide = width - column > W;
      const float* left = a.data + row * kWords;
      const float* right = tile(b, column, 0, 0);
      // Tiles 0 to 3 are sums; 4 and 5 hold 16 rows of a each; 6 and 7 hold 16 columns of b each.
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 3
        for (int product = kFirstProduct<kParts>; product <= kLastProduct<kParts>; ++product) {
          // The second product keeps the first one's part of b, the third the second one's of a.
          const bool new_left = product != 2, new_right = product != 1 || kParts == 1;
          const float* here = left + left_part(product) * a.rows * kWords;
          const float* there = right + right_part(product) * b.rows * kWords;
          if (new_left) _tile_loadd(4, here, kWords * sizeof(float));
          if (new_right) _tile_loadd(6, there, kRows * sizeof(float));
          _tile_dpbf16ps(0, 4, 6);
          if (wide) {
            if (new_right) _tile_loadd(7, there + W, kRows * sizeof(float));
            _tile_dpbf16ps(1, 4, 7);
          }
          if (tall) {
            if (new_left) _tile_loadd(5, here + W * kWords, kWords * sizeof(float));
            _tile_dpbf16ps(2, 5, 6);
            if (wide) _tile_dpbf16ps(3, 5, 7);
          }
        }
        left += kParts * a.rows * kWords;
        right += kWords * kRows;
        if (square > 0) finish(square - 1, kPieces * step / steps, kPieces * (step + 1) / steps);
      }
      float* to = sums[square % 2];
      _tile_stored(0, to, kRows * sizeof(float));
      _tile_stored(1, to + W, kRows * sizeof(float));
      _tile_stored(2, to + W * kRows, kRows * sizeof(float));
      _tile_stored(3, to + W * kRows + W, kRows * sizeof(float));
    }
    finish(squares - 1, 0, kPieces);
  }
#else
  // kBlock rows of the product, kWide vectors each, that sum `tiles` tiles of words. Parts of a lie `a_part`
  // floats apart, those of b `b_part`.
  template <int kWide>
  __attribute__((noinline)) static void product_block(const float* a, int64_t a_part, const float* b,
                                                      int64_t b_part, int64_t tiles,
                                                      vf (&sum)[kBlock][kWide]) {
    each_vector(sum, [](int, int, vf& x) { x = vf{}; });
    for (; tiles > 0; --tiles) {
      for (int64_t k = 0; k < kWords; ++k) {
#pragma GCC unroll 3
        for (int product = kFirstProduct<kParts>; product <= kLastProduct<kParts>; ++product) {
          const float* left = a + left_part(product) * a_part + k;
          vf right[kWide];
#pragma GCC unroll 2
          for (int v = 0; v < kWide; ++v) right[v] = load(b + right_part(product) * b_part + v * W);
          each_vector(sum, [&](int i, int v, vf& x) { x = add_products(x, right[v], left[i * kWords]); });
        }
        b += kRows;
      }
      a += kParts * a_part;
    }
  }

  // Rows first .. last and columns first_column .. width of a product that sums `depth` terms.
  template <class Epilogue>
  MOPO_INLINE void product(int64_t first, int64_t last, int64_t first_column, int64_t width, int64_t depth,
                           const Panels& a, const Panels& b, Epilogue epilogue) {
    const int64_t tiles = (depth + kRows - 1) / kRows;
    for (int64_t column = first_column; column < width; column += kRows) {
      const float* right = tile(b, column, 0, 0);
      const auto run = [&]<int kWide>() {
        for (int64_t row = first; row < last; row += kBlock) {
          vf block[kBlock][kWide];
          product_block<kWide>(a.data + row * kWords, a.rows * kWords, right, b.rows * kWords, tiles, block);
          epilogue(row, column, block);
        }
      };
      if (width - column > W)
        run.template operator()<2>();
      else
        run.template operator()<1>();
    }
  }
#endif
};
using BFloat16Factors = PackedFactors<1>;
using BFloat16x3Factors = PackedFactors<2>;
#endif

// The factors of a SAC network's first layer, where the hidden layers have the factors `Inner`: three
// products in bfloat16 where that is faster than float32, else float32.
template <class Inner>
struct FirstLayer {
  using Factors = Float32Factors;
};
#ifdef MOPO_AMX
template <int kParts>
struct FirstLayer<PackedFactors<kParts>> {
  using Factors = BFloat16x3Factors;
};
#endif
