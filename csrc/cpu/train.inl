// What the training kernels share: layers forwards, backwards, and Adam where their gradient is made.

// c = a w, w [layer.in + 1][..] with the bias as its last row, where a has a column of ones.
template <class Epilogue>
MOPO_INLINE void forward_layer(int64_t first, int64_t last, const Rows& a, const Dense& layer,
                               const float* weight, Epilogue epilogue) {
  product<false>(first, last, layer.out, layer.in + 1, a.data, a.stride, weight, layer.stride, epilogue);
}

// The first `lanes` numbers from anywhere; zeros in the other lanes.
static vf load_lanes(const float* from, int64_t lanes) {
  vf x{};
  for (int lane = 0; lane < smaller(W, lanes); ++lane) x[lane] = from[lane];
  return x;
}

// The column of ones that the next layer's bias is multiplied by.
static void set_ones(int64_t first, int64_t last, const Rows& rows, int64_t column) {
  for (int64_t row = first; row < last; ++row) rows.at(row)[column] = 1.0f;
}

// The part of a layer's parameters that thread `part` of `parts` takes: rows first .. last of [in + 1].
struct Span {
  int64_t first, last;
};
static Span share_rows(int64_t rows, int64_t part, int64_t parts) {
  const int64_t blocks = (rows + kRows - 1) / kRows;
  return {blocks * part / parts * kRows, blocks * (part + 1) / parts * kRows};
}

// One vector of parameters a step against its gradient; gives the new values.
MOPO_INLINE vf adam(const AdamStep& step, const Dense& layer, int64_t at, vf gradient) {
  const vf m = load(layer.exp_avg + at), v = load(layer.exp_avg_sq + at);
  const vf new_m = m + (gradient - m) * static_cast<float>(1.0 - kBeta1);
  const vf new_v = v * static_cast<float>(kBeta2) + gradient * gradient * static_cast<float>(1.0 - kBeta2);
  const vf divisor = sqrt(new_v) * step.root_correction + static_cast<float>(kEpsilon);
  const vf value = load(layer.value + at) - step.size * new_m / divisor;
  store(layer.exp_avg + at, new_m);
  store(layer.exp_avg_sq + at, new_v);
  store(layer.value + at, value);
  if (layer.target != nullptr) {
    const vf target = load(layer.target + at);
    store(layer.target + at, target + (value - target) * step.polyak);
  }
  return value;
}

// The gradient of rows span of a layer's parameters, a^T grad over `count` rows, and Adam's step against it.
static void train_layer(Span span, const Dense& layer, const AdamStep& step, int64_t count, const Rows& a,
                        const Rows& grad) {
  const auto update = [&](int64_t row, int64_t column, vf sum) {
    const int64_t at = row * layer.stride + column;
    // Weight decay is of the weights alone; the last row is the bias.
    if (row < layer.in) sum = sum + step.weight_decay * load(layer.value + at);
    const vf value = adam(step, layer, at, sum);
    if (layer.transposed == nullptr || row < layer.first_input || row >= layer.in) return;
    float* to = layer.transposed + column * layer.transposed_stride + row - layer.first_input;
    const int64_t columns = smaller(W, layer.out - column);
    for (int64_t i = 0; i < columns; ++i) to[i * layer.transposed_stride] = value[i];
  };
  // The parameters come from far away; the product takes longer than they do.
  const auto prefetch = [&](int64_t row, int64_t column) {
    for (int i = 0; i < kRows; ++i) {
      const int64_t at = (row + i) * layer.stride + column;
      for (int64_t line = 0; line < 2 * W; line += 16) {
        __builtin_prefetch(layer.value + at + line, 1);
        __builtin_prefetch(layer.exp_avg + at + line, 1);
        __builtin_prefetch(layer.exp_avg_sq + at + line, 1);
        if (layer.target != nullptr) __builtin_prefetch(layer.target + at + line, 1);
      }
    }
  };
  product<true>(span.first, span.last, layer.out, count, a.data, a.stride, grad.data, grad.stride, update,
                prefetch);
}
