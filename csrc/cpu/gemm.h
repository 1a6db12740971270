// One layer for one tile of rows: out[n][row] = activate(bias[n] + sum_k in[k][row] weight[k][n]).
// A vector holds one feature of W rows, so any width works and nothing is summed across lanes.

constexpr int kVectors = 3;          // vectors of rows in a tile
constexpr int kTile = kVectors * W;  // rows in a tile
constexpr int kBlock = MOPO_BLOCK;   // outputs at a time: kBlock x kVectors accumulators stay in registers

constexpr int64_t padded(int64_t width) { return (width + kBlock - 1) / kBlock * kBlock; }

// `weight` is packed [padded(width) / kBlock][depth][kBlock], `bias` [padded(width)]; in [depth][kTile],
// out [padded(width)][kTile].
template <class Epilogue>
MOPO_INLINE void layer_tile(const float* in, int64_t depth, const float* weight, const float* bias,
                            int64_t width, float* out, Epilogue epilogue) {
  for (int64_t n = 0; n < width; n += kBlock) {
    // The bias comes last: a large one, added first, would cost every product its low bits.
    vf sum[kBlock][kVectors] = {};
    const float* x = in;
    for (int64_t k = 0; k < depth; ++k) {
      vf rows[kVectors];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) rows[v] = load(x + v * W);
#pragma GCC unroll 8
      for (int j = 0; j < kBlock; ++j) {
        const vf factor = broadcast(weight[j]);
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) sum[j][v] = sum[j][v] + rows[v] * factor;
      }
      x += kTile;
      weight += kBlock;
    }
#pragma GCC unroll 8
    for (int j = 0; j < kBlock; ++j)
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v)
        store(out + (n + j) * kTile + v * W, epilogue(sum[j][v] + bias[n + j]));
  }
}
