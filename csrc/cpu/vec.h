// The vector type that each kernel is written over: GCC and Clang vector extensions, W floats wide.
// Included once per instruction set, which has set MOPO_WIDTH, inside that set's own namespace.

constexpr int W = MOPO_WIDTH;

typedef float vf __attribute__((vector_size(MOPO_WIDTH * 4), may_alias));
typedef int32_t vi __attribute__((vector_size(MOPO_WIDTH * 4)));

MOPO_INLINE vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
MOPO_INLINE void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }
MOPO_INLINE vf broadcast(float x) { return x - vf{}; }
MOPO_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
MOPO_INLINE vi to_int(vf x) { return __builtin_convertvector(x, vi); }
MOPO_INLINE vf bits_to_float(vi x) { return reinterpret_cast<vf>(x); }
MOPO_INLINE vi float_to_bits(vf x) { return reinterpret_cast<vi>(x); }
// mask lanes are 0 or -1, as comparisons give them.
MOPO_INLINE vf select(vi mask, vf yes, vf no) {
  return bits_to_float((float_to_bits(yes) & mask) | (float_to_bits(no) & ~mask));
}
MOPO_INLINE vf sqrt(vf x) {
  vf result;
  for (int lane = 0; lane < W; ++lane) result[lane] = __builtin_sqrtf(x[lane]);
  return result;
}
