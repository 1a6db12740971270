// A core's peak rate of arithmetic: multiply-adds on registers alone, in enough independent sums to fill its
// pipelines.

// Independent sums. A multiply-add takes some four cycles on two to four units, so at least 8 to 16 are
// needed; with the factors they fill 16 or 32 registers.
#if MOPO_WIDTH == 16 || defined(__aarch64__)
constexpr int kChains = 24;
#else
constexpr int kChains = 12;
#endif
static_assert(kChains * W <= kPeakNumbers);

// Calls sum = step(sum) for every sum, `rounds` times.
template <class Step>
MOPO_INLINE void repeat(int64_t rounds, float* numbers, Step step) {
  vf sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = load(numbers + i * W);
  for (; rounds > 0; --rounds)
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) sums[i] = step(sums[i]);
  for (int i = 0; i < kChains; ++i) store(numbers + i * W, sums[i]);
}

static double float32_peak(int64_t rounds, float* numbers) {
  const vf factor = broadcast(0.5f), term = broadcast(1.0f);
  repeat(rounds, numbers, [&](vf sum) { return sum * factor + term; });
  return 2.0 * W * kChains * static_cast<double>(rounds);
}

// The peak of bfloat16 products; float32's peak where the instruction set has no such products.
static double bfloat16_peak(int64_t rounds, float* numbers) {
#if defined(MOPO_AMX)
  // Four tiles of sums, 16 x 16 numbers each, hide the latency of a tile product; it adds 32 products to each
  // number.
  constexpr int64_t kSide = 16, kRowBytes = kSide * sizeof(float);
  static_assert(4 * kSide * kSide <= kPeakNumbers);
  const Tiles tiles;
  // GCC 12 does not know that loading a tile reads memory.
  asm volatile("" ::: "memory");
  _tile_loadd(0, numbers, kRowBytes);
  _tile_loadd(1, numbers, kRowBytes);
  _tile_loadd(2, numbers, kRowBytes);
  _tile_loadd(3, numbers, kRowBytes);
  _tile_loadd(4, numbers, kRowBytes);
  _tile_loadd(5, numbers, kRowBytes);
  _tile_loadd(6, numbers, kRowBytes);
  _tile_loadd(7, numbers, kRowBytes);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, numbers, kRowBytes);
  _tile_stored(1, numbers + kSide * kSide, kRowBytes);
  _tile_stored(2, numbers + 2 * kSide * kSide, kRowBytes);
  _tile_stored(3, numbers + 3 * kSide * kSide, kRowBytes);
  return 4 * 2.0 * kSide * kSide * 32 * static_cast<double>(rounds);
#elif defined(MOPO_BFLOAT16)
  const vf pairs = pack_pair(broadcast(1.0f), broadcast(-1.0f));
  repeat(rounds, numbers, [&](vf sum) { return add_products(sum, pairs, pairs[0]); });
  return 4.0 * W * kChains * static_cast<double>(rounds);
#elif defined(MOPO_BFMMLA)
  const bfloat16x8_t factors = (bfloat16x8_t)pack_pair(broadcast(1.0f), broadcast(-1.0f));
  repeat(rounds, numbers, [&](vf sum) { return (vf)vbfmmlaq_f32((float32x4_t)sum, factors, factors); });
  return 8.0 * W * kChains * static_cast<double>(rounds);
#else
  return float32_peak(rounds, numbers);
#endif
}
