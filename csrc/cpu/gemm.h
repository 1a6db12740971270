// One layer for one tile of rows: sum_k in[k][row] weight[k][n] + bias[n].
// A vector holds one feature of W rows, so any width works and nothing is summed across lanes.

constexpr int kVectors = 3;          // vectors of rows in a tile
constexpr int kTile = kVectors * W;  // rows in a tile
constexpr int kBlock = MOPO_BLOCK;   // outputs at a time: kBlock x kVectors accumulators stay in registers

constexpr int64_t padded(int64_t width) { return (width + kBlock - 1) / kBlock * kBlock; }

// What a 32-bit word of a layer's inputs and weights holds: a float ...
struct Float32 {
  static constexpr int kTerms = 1;
  MOPO_INLINE vf multiply_add(vf sum, vf rows, float weight) { return sum + rows * broadcast(weight); }
};

// ... or two bfloat16 that follow one another in the sum, the first in the lower half. Sums are float.
struct BFloat16 {
  static constexpr int kTerms = 2;
  MOPO_INLINE vf multiply_add(vf sum, vf rows, float weight) { return add_products(sum, rows, weight); }
};

constexpr int64_t words(int64_t depth, int terms) { return (depth + terms - 1) / terms; }

// `weight` is packed [padded(width) / kBlock][words(depth)][kBlock], `bias` [padded(width)]; in
// [words(depth)][kTile]. write(n, v, outputs): vector v of rows, kBlock outputs from n on.
template <class Operand, class Write>
MOPO_INLINE void layer_tile(const float* in, int64_t depth, const float* weight, const float* bias,
                            int64_t width, Write write) {
  for (int64_t n = 0; n < width; n += kBlock) {
    // The bias comes last: a large one, added first, would cost every product its low bits.
    vf sum[kBlock][kVectors] = {};
    const float* x = in;
    for (int64_t k = words(depth, Operand::kTerms); k > 0; --k) {
      vf rows[kVectors];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) rows[v] = load(x + v * W);
#pragma GCC unroll 8
      for (int j = 0; j < kBlock; ++j)
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) sum[j][v] = Operand::multiply_add(sum[j][v], rows[v], weight[j]);
      x += kTile;
      weight += kBlock;
    }
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      vf outputs[kBlock];
#pragma GCC unroll 8
      for (int j = 0; j < kBlock; ++j) outputs[j] = sum[j][v] + bias[n + j];
      write(n, v, outputs);
    }
  }
}

// Outputs as floats [padded(width)][kTile].
MOPO_INLINE void write_floats(float* out, int64_t n, int v, const vf (&outputs)[kBlock]) {
#pragma GCC unroll 8
  for (int j = 0; j < kBlock; ++j) store(out + (n + j) * kTile + v * W, outputs[j]);
}

// Activated outputs as the next layer's inputs [words(padded(width))][kTile].
template <class Operand, Activation activation>
MOPO_INLINE void write_operands(float* out, int64_t n, int v, vf (&outputs)[kBlock]) {
#pragma GCC unroll 8
  for (int j = 0; j < kBlock; ++j) outputs[j] = activate<activation>(outputs[j]);
  if constexpr (Operand::kTerms == 1) {
    write_floats(out, n, v, outputs);
  } else {
#pragma GCC unroll 4
    for (int j = 0; j < kBlock; j += 2)
      store(out + (n + j) / 2 * kTile + v * W, pack_pair(outputs[j], outputs[j + 1]));
  }
}

// Floats [depth][kTile] as bfloat16 inputs [words(depth)][kTile].
static void convert_to_pairs(const float* in, int64_t depth, float* out) {
  for (int64_t k = 0; k < depth; k += 2)
    for (int64_t row = 0; row < kTile; row += W) {
      const vf second = k + 1 < depth ? load(in + (k + 1) * kTile + row) : vf{};
      store(out + k / 2 * kTile + row, pack_pair(load(in + k * kTile + row), second));
    }
}
