// exp, log, sin, cos, tanh and SiLU over the vector type. Tests hold the error bounds, which are in units in
// the last place (ULP). Polynomials: S. Moshier's Cephes library, single precision.

// e^x within 2 ULP; 0 below -104, infinity above 89, NaN for NaN.
MOPO_INLINE vf exp(vf x) {
  x = maximum(broadcast(-104.0f), minimum(broadcast(89.0f), x));
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest whole number.
  const float magic = 12582912.0f;
  const vf n = (x * 1.44269504088896341f + magic) - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return scale(p, n);
}

// ln x within 2 ULP, for normal x > 0.
MOPO_INLINE vf log(vf x) {
  const vi bits = float_to_bits(x);
  // x = m 2^e with m in [sqrt(1/2), sqrt(2)).
  const vi shifted = bits - 0x3f3504f3;
  const vf e = to_float(shifted >> 23);
  const vf m = bits_to_float((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const vf z = m * m;
  vf p = broadcast(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  vf y = p * m * z;
  y = y + e * -2.12194440e-4f;
  y = y - 0.5f * z;
  return (m + y) + e * 0.693359375f;
}

// ln(1 + x) for x >= 0. Its absolute error is small; near 0 its relative error is not.
MOPO_INLINE vf log1p(vf x) { return log(1.0f + x); }

struct SinCos {
  vf sin, cos;
};

// sin and cos of 2 pi u for u in [0, 1], each within 2 ULP of 1. The reduction to a quarter turn is exact.
MOPO_INLINE SinCos sincos_turns(vf u) {
  const float magic = 12582912.0f;
  const vf quarter = (u * 4.0f + magic) - magic;
  const vf x = (u * 4.0f - quarter) * 1.57079632679489662f;
  const vf z = x * x;
  vf s = broadcast(-1.9515295891e-4f);
  s = s * z + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * x + x;
  vf c = broadcast(2.443315711809948e-5f);
  c = c * z - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * (z * z) - 0.5f * z + 1.0f;
  const vi q = to_int(quarter);
  const vi swap = (q & 1) != 0;
  const vf sine = select(swap, c, s), cosine = select(swap, s, c);
  return {select((q & 2) != 0, -sine, sine), select(((q + 1) & 2) != 0, -cosine, cosine)};
}

// tanh x within 3 ULP.
MOPO_INLINE vf tanh(vf x) {
  const vi sign = float_to_bits(x) & static_cast<int32_t>(0x80000000);
  const vf size = bits_to_float(float_to_bits(x) & 0x7fffffff);
  const vf far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  const vf z = x * x;
  vf p = broadcast(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  vf near = p * z * x + x;
  // GCC would fuse the product and the sum in some places, and in others the sum and the selection.
  keep_apart(near);
  return select(size < 0.625f, near, bits_to_float(float_to_bits(far) | sign));
}

// 1 / (1 + e^-x); 0 below -86.
MOPO_INLINE vf sigmoid(vf x) { return select(x < -86.0f, vf{}, reciprocal(1.0f + exp(-x))); }

// x sigmoid(x), within 4 ULP above -86. As by definition, -inf gives NaN.
MOPO_INLINE vf silu(vf x) { return x * sigmoid(x); }

// sigmoid for a result that becomes a factor of this precision, whose rounding hides the error: 2^-13 of the
// result in kBFloat16, 2^-17 in kBFloat16x3.
template <Precision precision>
MOPO_INLINE vf sigmoid_of_factor(vf x) {
#ifdef MOPO_AVX512
  if constexpr (precision != Precision::kFloat32) {
    const vf t = x * -1.44269504088896341f;
    // 2^t = 2^r 2^floor(t): 2^r by a minimax polynomial, and scale() floors t itself.
    const vf r = (vf)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    vf p = broadcast(0.0135341679f);
    p = p * r + 0.0520114606f;
    p = p * r + 0.241442757f;
    p = p * r + 0.693003834f;
    p = p * r + 1.00000259f;
    const vf y = 1.0f + scale(p, t);
    if constexpr (precision == Precision::kBFloat16) return (vf)_mm512_rcp14_ps((__m512)y);
    return select(x < -86.0f, vf{}, reciprocal(y));
  }
#endif
  return sigmoid(x);
}

template <Activation activation>
MOPO_INLINE vf activate(vf x) {
  if constexpr (activation == Activation::kSilu) return silu(x);
  if constexpr (activation == Activation::kRelu) return select(x < 0.0f, vf{}, x);
  if constexpr (activation == Activation::kTanh) return tanh(x);
}

// activate for a result that becomes a factor of this precision.
template <Precision precision, Activation activation>
MOPO_INLINE vf activate_factor(vf x) {
  if constexpr (activation == Activation::kSilu) return x * sigmoid_of_factor<precision>(x);
  return activate<activation>(x);
}
