// What the training kernels share: layers forwards, and Adam where a layer's gradient is made.

// c = a w, w [layer.in + 1][..] with the bias as its last row, where a has a column of ones.
template <class Epilogue>
MOPO_INLINE void forward_layer(int64_t first, int64_t last, const Panels& a, const Dense& layer,
                               float* weight, Epilogue epilogue) {
  product<false>(first, last, 0, layer.out, layer.in + 1, a, {weight, layer.rows}, epilogue);
}

// The first `lanes` numbers from anywhere; zeros in the other lanes.
static vf load_lanes(const float* from, int64_t lanes) {
  vf x{};
  for (int lane = 0; lane < smaller(W, lanes); ++lane) x[lane] = from[lane];
  return x;
}

static void copy_row(const float* from, int64_t count, const Panels& to, int64_t row, int64_t column) {
  while (count > 0) {
    const int64_t columns = smaller(count, kPanel - column % kPanel);
    float* target = at(to, row, column);
    for (int64_t i = 0; i < columns; ++i) target[i] = from[i];
    from += columns;
    column += columns;
    count -= columns;
  }
}

// Rows drawn at random are far away: all are asked for before the first is read.
static void prefetch_row(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i);
  __builtin_prefetch(from + count - 1);
}

// The column of ones that the next layer's bias is multiplied by.
static void set_ones(int64_t first, int64_t last, const Panels& matrix, int64_t column) {
  for (int64_t row = first; row < last; ++row) *at(matrix, row, column) = 1.0f;
}

// The team's share of `count` rows, whole blocks of them.
struct Span {
  int64_t first, last;
};
static Span share(const Team& team, int64_t count) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  return {blocks * team.part / team.parts * kBlock, blocks * (team.part + 1) / team.parts * kBlock};
}

// One vector of parameters a step against its gradient; gives the new values.
MOPO_INLINE vf adam(const AdamStep& step, const Dense& layer, int64_t at, vf gradient) {
  const vf m = load(layer.exp_avg + at), v = load(layer.exp_avg_sq + at);
  const vf new_m = m + (gradient - m) * static_cast<float>(1.0 - kBeta1);
  const vf new_v = v * static_cast<float>(kBeta2) + gradient * gradient * static_cast<float>(1.0 - kBeta2);
  const vf divisor = fast_sqrt(new_v) * step.root_correction + static_cast<float>(kEpsilon);
  const vf value = load(layer.value + at) - step.size * new_m * reciprocal(divisor);
  store(layer.exp_avg + at, new_m);
  store(layer.exp_avg_sq + at, new_v);
  store(layer.value + at, value);
  if (layer.target != nullptr) {
    const vf target = load(layer.target + at);
    store(layer.target + at, target + (value - target) * step.polyak);
  }
  return value;
}

// The gradient of the team's share of a layer's parameters, a^T grad over `count` rows, and Adam's step.
static void train_layer(const Team& team, const Dense& layer, const AdamStep& step, int64_t count,
                        const Panels& a, const Panels& grad) {
  const auto update = [&](int64_t row, int64_t column, auto& block) {
    const int64_t begin = offset(layer.rows, row, column);
    each_vector(block, [&](int i, int v, vf& x) {
      const int64_t here = begin + within(i, v);
      // Weight decay is of the weights alone; the last row is the bias.
      if (row + i < layer.in) x = x + step.weight_decay * load(layer.value + here);
      x = adam(step, layer, here, x);
      if (row + i >= layer.in) x = vf{};
    });
    if (layer.transposed.data == nullptr) return;
    constexpr int kWide = sizeof(block[0]) / sizeof(vf);
#pragma GCC unroll 2
    for (int i = 0; i < kBlock; i += 4)
      if (row + i < layer.in)
#pragma GCC unroll 3
        for (int v = 0; v < kWide; ++v)
          store_transposed(at(layer.transposed, column + v * W, row + i), block[i][v], block[i + 1][v],
                           block[i + 2][v], block[i + 3][v]);
  };
  // The parameters come from far away; the product takes longer than they do.
  const auto prefetch = [&](int64_t row, int64_t column) {
    const int64_t begin = offset(layer.rows, row, column);
    for (int64_t line = begin; line < begin + kBlock * kPanel; line += 16) {
      __builtin_prefetch(layer.value + line, 1);
      __builtin_prefetch(layer.exp_avg + line, 1);
      __builtin_prefetch(layer.exp_avg_sq + line, 1);
      if (layer.target != nullptr) __builtin_prefetch(layer.target + line, 1);
    }
  };
  const Span rows = share(team, layer.in + 1);
  product<true>(rows.first, rows.last, 0, layer.out, count, a, grad, update, prefetch);
}
