// The vector types that each kernel is written over: vf of W floats, vi of W int32, as GCC's and Clang's
// vector extensions. Included once an instruction set, inside its namespace, with MOPO_WIDTH = W.

constexpr int W = MOPO_WIDTH;

typedef float vf __attribute__((vector_size(MOPO_WIDTH * 4), may_alias));
typedef int32_t vi __attribute__((vector_size(MOPO_WIDTH * 4)));

MOPO_INLINE vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
MOPO_INLINE void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }
// `lanes` numbers, 1 or more; of more than W the first W. load_lanes and first_lanes_of set the other lanes
// to 0.
#ifdef MOPO_AVX512
MOPO_INLINE __mmask16 first_lanes(int64_t lanes) {
  return static_cast<__mmask16>(lanes < W ? (1u << lanes) - 1 : 0xffff);
}
MOPO_INLINE vf load_lanes(const float* p, int64_t lanes) {
  return (vf)_mm512_maskz_loadu_ps(first_lanes(lanes), p);
}
MOPO_INLINE void store_lanes(float* p, vf x, int64_t lanes) {
  _mm512_mask_storeu_ps(p, first_lanes(lanes), (__m512)x);
}
MOPO_INLINE vf first_lanes_of(vf x, int64_t lanes) {
  return (vf)_mm512_maskz_mov_ps(first_lanes(lanes), (__m512)x);
}
#else
MOPO_INLINE vf load_lanes(const float* p, int64_t lanes) {
  vf x{};
  for (int lane = 0; lane < W && lane < lanes; ++lane) x[lane] = p[lane];
  return x;
}
MOPO_INLINE void store_lanes(float* p, vf x, int64_t lanes) {
  for (int lane = 0; lane < W && lane < lanes; ++lane) p[lane] = x[lane];
}
MOPO_INLINE vf first_lanes_of(vf x, int64_t lanes) {
  for (int lane = 0; lane < W; ++lane) x[lane] = lane < lanes ? x[lane] : 0.0f;
  return x;
}
#endif
// Hides where x comes from, so that what follows is not merged with it.
MOPO_INLINE void keep_apart(vf& x) {
#if defined(MOPO_AVX512)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  (void)x;
#endif
}
MOPO_INLINE vf broadcast(float x) { return x - vf{}; }
MOPO_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
MOPO_INLINE vi to_int(vf x) { return __builtin_convertvector(x, vi); }
MOPO_INLINE vf bits_to_float(vi x) { return reinterpret_cast<vf>(x); }
// The bits of x in every lane; arithmetic could change those of a NaN.
MOPO_INLINE vf broadcast_bits(float x) { return bits_to_float(vi{} + __builtin_bit_cast(int32_t, x)); }
MOPO_INLINE vi float_to_bits(vf x) { return reinterpret_cast<vi>(x); }
// Lane i is lane Order{}(i) of x, or lane Order{}(i) - W of y. In a loop over
// lanes, Clang takes them one by one.
template <class Order>
MOPO_INLINE vf shuffle(vf x, vf y, Order) {
  return [&]<int... lane>(std::integer_sequence<int, lane...>) {
#ifdef __clang__
    return __builtin_shufflevector(x, y, Order{}(lane)...);
#else
    return __builtin_shuffle(x, y, vi{Order{}(lane)...});
#endif
  }(std::make_integer_sequence<int, W>{});
}
// The sum of all lanes, in every lane.
template <int half = W / 2>
MOPO_INLINE vf sum_of_lanes(vf x) {
  if constexpr (half == 0)
    return x;
  else
    return sum_of_lanes<half / 2>(x + shuffle(x, x, [](int lane) { return lane ^ half; }));
}
// Lanes 4 group .. 4 group + 3.
typedef float quad __attribute__((vector_size(16), may_alias));
template <int group>
MOPO_INLINE quad four_lanes(vf x) {
#ifdef MOPO_AVX512
  return (quad)_mm512_extractf32x4_ps((__m512)x, group);  // GCC 12 would take lane by lane
#else
  return quad{x[4 * group], x[4 * group + 1], x[4 * group + 2], x[4 * group + 3]};
#endif
}
// A mask's lanes are 0 or -1, as comparisons give them.
MOPO_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
// minimum and maximum: the second operand where either is NaN.
#ifdef MOPO_AVX512
MOPO_INLINE vf minimum(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
MOPO_INLINE vf maximum(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
#else
MOPO_INLINE vf minimum(vf a, vf b) { return select(a < b, a, b); }
MOPO_INLINE vf maximum(vf a, vf b) { return select(a > b, a, b); }
#endif
MOPO_INLINE vf sqrt(vf x) {
  vf result;
  for (int lane = 0; lane < W; ++lane) result[lane] = __builtin_sqrtf(x[lane]);
  return result;
}

// reciprocal: 1 / x within 2 ULP, for x whose reciprocal is a normal number.
// fast_sqrt: within 2 ULP, for 0 and normal numbers; infinity gives a large finite number on AVX-512.
// scale: x 2^n for whole n; AVX-512 takes the whole number below any n.
#ifdef MOPO_AVX512
MOPO_INLINE vf reciprocal(vf x) {
  const vf r = (vf)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);
}
MOPO_INLINE vf fast_sqrt(vf x) {
  x = minimum(broadcast(0x1.fffffep127f), x);
  const vf r = (vf)_mm512_rsqrt14_ps((__m512)maximum(broadcast(0x1p-126f), x));
  const vf root = x * r;
  return root + (0.5f * root) * (1.0f - root * r);
}
MOPO_INLINE vf scale(vf x, vf n) { return (vf)_mm512_scalef_ps((__m512)x, (__m512)n); }
#else
MOPO_INLINE vf reciprocal(vf x) { return 1.0f / x; }
MOPO_INLINE vf fast_sqrt(vf x) { return sqrt(x); }
MOPO_INLINE vf scale(vf x, vf n) {
  // Two factors reach infinity and the subnormals.
  const vi whole = to_int(n), half = whole >> 1;
  return x * bits_to_float((half + 127) << 23) * bits_to_float((whole - half + 127) << 23);
}
#endif

// x / y, for y whose reciprocal is a normal number.
MOPO_INLINE vf fast_quotient(vf x, vf y) { return x * reciprocal(y); }

// pack_pair: words of two bfloat16, lane i of `first` in the lower half; rounded to nearest, ties to even; a
// NaN stays a NaN. add_products: sum + both products of a word's halves.
#ifdef MOPO_BFLOAT16
MOPO_INLINE vf pack_pair(vf first, vf second) {
  typedef uint16_t halves __attribute__((vector_size(MOPO_WIDTH * 4)));
  const halves both = (halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const halves in_turn = []<int... lane>(std::integer_sequence<int, lane...>) {
    return halves{static_cast<uint16_t>(lane / 2 + lane % 2 * W)...};
  }(std::make_integer_sequence<int, 2 * W>{});
  return (vf)_mm512_permutexvar_epi16((__m512i)in_turn, (__m512i)both);
}
// 2 W numbers that follow one another, packed in that order.
MOPO_INLINE vf pack_row(vf first, vf second) {
  return (vf)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
// Half of what pack_row packed, from its words on.
MOPO_INLINE vf unpack_row(const float* words) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
// x less its value in bfloat16.
MOPO_INLINE vf bfloat16_error(vf x) {
  const __m256i halves = (__m256i)_mm512_cvtneps_pbh((__m512)x);
  return x - (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}
MOPO_INLINE vf add_products(vf sum, vf pairs, float weights) {
  return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)_mm512_set1_ps(weights));
}
#else
MOPO_INLINE vi round_to_bfloat16(vf x) {
  typedef uint32_t vu __attribute__((vector_size(MOPO_WIDTH * 4)));
  const vu bits = reinterpret_cast<vu>(x);
  const vi rounded = reinterpret_cast<vi>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  const vi is_nan = x != x;
  return (is_nan & 0x7fc0) | (~is_nan & rounded);
}
#ifdef MOPO_BFMMLA
MOPO_INLINE vf pack_pair(vf first, vf second) {
  const uint16x4_t low = vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)first)),
                   high = vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)second));
  return (vf)vorrq_u32(vmovl_u16(low), vshll_n_u16(high, 16));
}
#else
MOPO_INLINE vf pack_pair(vf first, vf second) {
  return bits_to_float(round_to_bfloat16(first) | (round_to_bfloat16(second) << 16));
}
#endif
MOPO_INLINE vf add_products(vf sum, vf pairs, float weights) {
  const vi x = float_to_bits(pairs), y = float_to_bits(broadcast_bits(weights));
  const int32_t high = static_cast<int32_t>(0xffff0000);
  return sum + bits_to_float(x << 16) * bits_to_float(y << 16) +
         bits_to_float(x & high) * bits_to_float(y & high);
}
#endif
