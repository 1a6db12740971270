// One layer of a network for one tile of a rollout's rows: sum_k in[k][row] weight[k][n] + bias[n].
// A vector holds one feature of W rows, so any width works and nothing is summed across lanes. Products for
// training are in matmul.h.

constexpr int kVectors = 3;         // vectors of rows at a time
constexpr int kBlock = MOPO_BLOCK;  // outputs at a time: kBlock x kVectors accumulators stay in registers

constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// The precisions of a layer's inputs and weights. A 32-bit word holds a float ...
struct Float32 {
  static constexpr Precision kPrecision = Precision::kFloat32;
  static constexpr Packing kPacking{kVectors * W, 1, kBlock, 1, 1};
  MOPO_INLINE vf multiply_add(vf sum, vf rows, float weight) { return sum + rows * broadcast(weight); }
};

// ... or two bfloat16 that follow one another in the sum, the first in the lower half. Sums are float.
struct BFloat16 {
  static constexpr Precision kPrecision = Precision::kBFloat16;
#if defined(MOPO_AMX)
  static constexpr Packing kPacking{2 * W, 2, 32, 16, 1};
#elif defined(MOPO_BFMMLA)
  static constexpr Packing kPacking{kVectors * W, 2, kBlock, 2, 1};
#else
  static constexpr Packing kPacking{kVectors * W, 2, kBlock, 1, 1};
#endif
  MOPO_INLINE vf multiply_add(vf sum, vf rows, float weight) { return add_products(sum, rows, weight); }
};

// A factor that is the sum of two numbers in bfloat16 has two such words. Sets of instructions without
// products of bfloat16 are not asked for it.
#ifdef MOPO_BFLOAT16
struct BFloat16x3 : BFloat16 {
  static constexpr Precision kPrecision = Precision::kBFloat16x3;
  static constexpr Packing kPacking{BFloat16::kPacking.tile, 2, BFloat16::kPacking.outputs,
                                    BFloat16::kPacking.words, 2};
};
#else
using BFloat16x3 = Float32;
#endif

// Words of `depth` packed inputs, padding included; of one part, where factors have two.
template <class Operand>
constexpr int64_t packed_words(int64_t depth) {
  constexpr Packing packing = Operand::kPacking;
  return round_up((depth + packing.terms - 1) / packing.terms, packing.words);
}

template <class Operand>
constexpr bool divides_width_multiple() {
  constexpr Packing packing = Operand::kPacking;
  return kWidthMultiple % packing.outputs == 0 && kWidthMultiple % (packing.terms * packing.words) == 0;
}
static_assert(divides_width_multiple<Float32>() && divides_width_multiple<BFloat16>());

// Rows of a tile, and numbers whose sum is a factor.
template <class Operand>
constexpr int kTile = Operand::kPacking.tile;
template <class Operand>
constexpr int kParts = Operand::kPacking.parts;

// A layer of packed `weight` and `bias` on the first kUsed vectors of a tile's rows, in
// [packed_words(depth)][kParts][kTile]. Calls write(n, v, outputs) for kBlock outputs from n on of vector v.
template <class Operand, int kUsed, class Write>
MOPO_INLINE void layer_vectors(const float* in, int64_t depth, const float* weight, const float* bias,
                               int64_t width, Write write) {
  for (int64_t n = 0; n < width; n += kBlock) {
    // The bias is added last: added first, a large one would cost every product its low bits.
    vf sum[kBlock][kUsed] = {};
    const float* x = in;
    for (int64_t k = packed_words<Operand>(depth); k > 0; --k) {
#pragma GCC unroll 3
      for (int product = kFirstProduct<kParts<Operand>>; product <= kLastProduct<kParts<Operand>>;
           ++product) {
        const float* from = x + left_part(product) * kTile<Operand>;
        const float* factors = weight + right_part(product) * kBlock;
        vf rows[kUsed];
#pragma GCC unroll 3
        for (int v = 0; v < kUsed; ++v) rows[v] = load(from + v * W);
#pragma GCC unroll 8
        for (int j = 0; j < kBlock; ++j)
#pragma GCC unroll 3
          for (int v = 0; v < kUsed; ++v) sum[j][v] = Operand::multiply_add(sum[j][v], rows[v], factors[j]);
      }
      x += kParts<Operand> * kTile<Operand>;
      weight += kParts<Operand> * kBlock;
    }
#pragma GCC unroll 3
    for (int v = 0; v < kUsed; ++v) {
      vf outputs[kBlock];
#pragma GCC unroll 8
      for (int j = 0; j < kBlock; ++j) outputs[j] = sum[j][v] + bias[n + j];
      write(n, v, outputs);
    }
  }
}

#ifdef MOPO_BFMMLA
// layer_vectors on BFMMLA, which adds to the outputs n and n + 1 of two rows the products of four inputs.
template <class Operand, int kUsed, class Write>
  requires(Operand::kPacking.words == 2)
MOPO_INLINE void layer_vectors(const float* in, int64_t depth, const float* weight, const float* bias,
                               int64_t width, Write write) {
  static_assert(W == 4);
  for (int64_t n = 0; n < width; n += kBlock) {
    float32x4_t sum[kBlock / 2][2 * kUsed] = {};
    const float* x = in;
    for (int64_t k = packed_words<Operand>(depth); k > 0; k -= 2) {
      bfloat16x8_t rows[2 * kUsed];
#pragma GCC unroll 3
      for (int v = 0; v < kUsed; ++v) {
        asm volatile("" ::: "memory");
        const float32x4_t first = vld1q_f32(x + v * W), second = vld1q_f32(x + kTile<Operand> + v * W);
        rows[2 * v] = vreinterpretq_bf16_f32(vzip1q_f32(first, second));
        rows[2 * v + 1] = vreinterpretq_bf16_f32(vzip2q_f32(first, second));
      }
#pragma GCC unroll 4
      for (int j = 0; j < kBlock / 2; ++j) {
        // One load at a time: sums, rows and all four factors would not fit the registers.
        asm volatile("" ::: "memory");
        const bfloat16x8_t factors = vreinterpretq_bf16_f32(vld1q_f32(weight + 4 * j));
#pragma GCC unroll 6
        for (int r = 0; r < 2 * kUsed; ++r) sum[j][r] = vbfmmlaq_f32(sum[j][r], rows[r], factors);
      }
      x += 2 * kTile<Operand>;
      weight += 2 * kBlock;
    }
#pragma GCC unroll 3
    for (int v = 0; v < kUsed; ++v) {
      vf outputs[kBlock];
#pragma GCC unroll 4
      for (int j = 0; j < kBlock; j += 2) {
        const float32x4_t(&block)[2 * kUsed] = sum[j / 2];
        outputs[j] = (vf)vuzp1q_f32(block[2 * v], block[2 * v + 1]) + bias[n + j];
        outputs[j + 1] = (vf)vuzp2q_f32(block[2 * v], block[2 * v + 1]) + bias[n + j + 1];
      }
      write(n, v, outputs);
    }
  }
}
#endif

// layer_vectors for the number of vectors that hold rows: a tile that is not full costs less.
template <class Operand, class Write>
MOPO_INLINE void layer_tile(const float* in, int64_t depth, const float* weight, const float* bias,
                            int64_t width, int vectors, Write write) {
  static_assert(kVectors == 3);
  if (vectors == 3)
    layer_vectors<Operand, 3>(in, depth, weight, bias, width, write);
  else if (vectors == 2)
    layer_vectors<Operand, 2>(in, depth, weight, bias, width, write);
  else
    layer_vectors<Operand, 1>(in, depth, weight, bias, width, write);
}

// Rows up to which a layer in float32 has its outputs in the lanes of a vector, not the rows.
constexpr int64_t kFewRows = 4;

// kBlocks blocks of outputs of one row: sum_k in[k] weight[k][n] + bias[n]. The order of a sum is that of
// layer_vectors, so that the result is the same to the bit.
template <int kBlocks>
MOPO_INLINE void row_blocks(const float* in, int64_t depth, const float* weight, const float* bias,
                            float* out) {
  typedef float vb __attribute__((vector_size(kBlock * 4), may_alias, aligned(16)));
  vb sum[kBlocks] = {};
  const int64_t apart = depth * kBlock;
  for (int64_t k = 0; k < depth; ++k) {
    const vb x = in[k] - vb{};
#pragma GCC unroll 8
    for (int b = 0; b < kBlocks; ++b)
      sum[b] = sum[b] + x * *reinterpret_cast<const vb*>(weight + b * apart + k * kBlock);
  }
#pragma GCC unroll 8
  for (int b = 0; b < kBlocks; ++b)
    *reinterpret_cast<vb*>(out + b * kBlock) = sum[b] + *reinterpret_cast<const vb*>(bias + b * kBlock);
}

// A layer on `rows` rows that lie `stride` floats apart, in float32. So many blocks of outputs at a time that
// their sums do not wait for one another; their weights stay in the first-level cache for all rows.
static void layer_rows(const float* in, int64_t rows, int64_t stride, int64_t depth, const float* weight,
                       const float* bias, int64_t width, float* out) {
  constexpr int64_t kTogether = 8;
  for (int64_t n = 0; n < width; n += kTogether * kBlock)
    for (int64_t row = 0; row < rows; ++row) {
      const float *x = in + row * stride, *w = weight + n * depth;
      float* y = out + row * stride + n;
      int64_t m = 0;
      const auto take = [&]<int kBlocks>() {
        for (; m < kTogether * kBlock && n + m + (kBlocks - 1) * kBlock < width; m += kBlocks * kBlock)
          row_blocks<kBlocks>(x, depth, w + m * depth, bias + n + m, y + m);
      };
      take.template operator()<kTogether>();
      take.template operator()<4>();
      take.template operator()<2>();
      take.template operator()<1>();
    }
}

#ifdef MOPO_AMX
// layer_tile on AMX: 32 outputs of 32 rows at a time, in four tiles of 16 x 16. Among the tile instructions,
// write() takes the 32 outputs before.
template <class Operand, class Write>
MOPO_INLINE void layer_amx(const float* in, int64_t depth, const float* weight, const float* bias,
                           int64_t width, int vectors, Write write) {
  constexpr int64_t kSide = 32, kWords = 16, kRowBytes = kSide * sizeof(float);
  static_assert(kTile<Operand> == kSide && W == 16);
  constexpr int kNumber = kParts<Operand>;
  constexpr int kSlices = 2 * kSide / kBlock;
  alignas(64) float sums[2][kSide * kSide];
  // GCC 12 does not know that loading a tile reads memory.
  asm volatile("" ::: "memory");
  const int64_t steps = packed_words<Operand>(depth) / kWords, blocks = (width + kSide - 1) / kSide;
  const bool wide = vectors > 1;  // else the second half of the rows is left out
  // Writes slices of a finished block; a slice is kBlock outputs of one vector of rows.
  const auto finish = [&](int64_t block, int64_t slice, int64_t end) {
    const float* from = sums[block % 2];
    for (; slice < end; ++slice) {
      const int v = static_cast<int>(slice % 2);
      if (v == 1 && !wide) continue;
      const int64_t j = slice / 2 * kBlock, n = block * kSide + j;
      if (n >= width) return;
      vf outputs[kBlock];
#pragma GCC unroll 8
      for (int i = 0; i < kBlock; ++i) outputs[i] = load(from + (j + i) * kSide + v * W) + bias[n + i];
      write(n, v, outputs);
    }
  };
  for (int64_t block = 0; block < blocks; ++block) {
    // Tiles 0 to 3 are sums; 4 and 5 weights of 16 outputs each; 6 and 7 inputs of 16 rows each.
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 3
      for (int product = kFirstProduct<kNumber>; product <= kLastProduct<kNumber>; ++product) {
        // The second product keeps the first one's rows, the third the second one's weights.
        const bool new_rows = product != 1 || kNumber == 1, new_weights = product != 2;
        const float* rows = in + (step * kWords * kNumber + right_part(product)) * kSide;
        const float* weights = weight + left_part(product) * kSide * kWords;
        if (new_weights) _tile_loadd(4, weights, kWords * sizeof(float));
        if (new_rows) _tile_loadd(6, rows, kNumber * kRowBytes);
        if (new_rows && wide) _tile_loadd(7, rows + W, kNumber * kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        if (wide) _tile_dpbf16ps(1, 4, 7);
        if (new_weights) _tile_loadd(5, weights + 16 * kWords, kWords * sizeof(float));
        _tile_dpbf16ps(2, 5, 6);
        if (wide) _tile_dpbf16ps(3, 5, 7);
      }
      weight += kNumber * kSide * kWords;
      if (block > 0) finish(block - 1, kSlices * step / steps, kSlices * (step + 1) / steps);
    }
    float* to = sums[block % 2];
    _tile_stored(0, to, kRowBytes);
    _tile_stored(1, to + W, kRowBytes);
    _tile_stored(2, to + 16 * kSide, kRowBytes);
    _tile_stored(3, to + 16 * kSide + W, kRowBytes);
  }
  finish(blocks - 1, 0, kSlices);
}

// The operand of ldtilecfg.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configures all eight tiles as 16 rows of 64 bytes for the lifetime of the object. Such a thread must not
// call code that may use AMX itself.
class Tiles {
 public:
  Tiles() {
    // Static: GCC 12 does not know that the instruction reads all of it.
    static constexpr TileConfig kConfig;
    _tile_loadconfig(&kConfig);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};
#else
struct Tiles {
  Tiles() {}
};
#endif

// Stores outputs as floats, [width, rounded up to kBlock][kTile].
template <class Operand>
MOPO_INLINE void write_floats(float* out, int64_t n, int v, const vf (&outputs)[kBlock]) {
#pragma GCC unroll 8
  for (int j = 0; j < kBlock; ++j) store(out + (n + j) * kTile<Operand> + v * W, outputs[j]);
}

// Stores a word of pairs, in all its parts.
template <class Operand>
MOPO_INLINE void write_pair(float* out, int64_t word, vf first, vf second) {
  float* to = out + word * kParts<Operand> * kTile<Operand>;
  store(to, pack_pair(first, second));
#ifdef MOPO_BFLOAT16
  if constexpr (kParts<Operand> == 2)
    store(to + kTile<Operand>, pack_pair(bfloat16_error(first), bfloat16_error(second)));
#endif
}

// Stores activated outputs as the next layer's inputs.
template <class Operand, Activation activation>
MOPO_INLINE void write_operands(float* out, int64_t n, int v, vf (&outputs)[kBlock]) {
#pragma GCC unroll 8
  for (int j = 0; j < kBlock; ++j) outputs[j] = activate_factor<Operand::kPrecision, activation>(outputs[j]);
  if constexpr (Operand::kPacking.terms == 1) {
    write_floats<Operand>(out, n, v, outputs);
  } else {
#pragma GCC unroll 4
    for (int j = 0; j < kBlock; j += 2)
      write_pair<Operand>(out + v * W, n / 2 + j / 2, outputs[j], outputs[j + 1]);
  }
}

// Zeroes what `width` outputs do not fill in the words of a packing. Padding outputs need not be finite, and
// the next layer would multiply them by zero.
template <class Operand>
static void fill_up(float* out, int64_t width) {
  if constexpr (Operand::kPacking.terms == 2) {
    constexpr int64_t kWord = kParts<Operand> * kTile<Operand>;
    float* first = out + width / 2 * kWord;
    if (width % 2 == 1)
      for (const float* end = first + kWord; first < end; first += W)
        store(first, bits_to_float(float_to_bits(load(first)) & 0xffff));
    for (const float* end = out + packed_words<Operand>(width) * kWord; first < end; first += W)
      store(first, vf{});
  }
}

// Returns floats [depth][kTile], of which `vectors` vectors are in use, as a layer's inputs: `in` itself in
// float32, else packed into `out`.
template <class Operand>
static const float* as_operands(const float* in, int64_t depth, int vectors, float* out) {
  if constexpr (Operand::kPacking.terms == 1) return in;
  for (int64_t word = 0; word < packed_words<Operand>(depth); ++word)
    for (int64_t row = 0; row < vectors * W; row += W) {
      const auto term = [&](int64_t k) { return k < depth ? load(in + k * kTile<Operand> + row) : vf{}; };
      write_pair<Operand>(out + row, word, term(2 * word), term(2 * word + 1));
    }
  return out;
}
