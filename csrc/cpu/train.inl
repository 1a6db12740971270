// Shared by SAC and the fit: a team's rows of a batch, rows through a layer forwards and backwards, and a
// layer's gradient with Adam in its epilogue. Each layer has a kind of factors (factors.h), for all three of
// its products; what a layer passes on is a factor of the kind of the layer that takes it.

// Copies `count` numbers into a row of a matrix in panels, from `column` on.
static void copy_row(const float* from, int64_t count, const Panels& to, int64_t row, int64_t column) {
  while (count > 0) {
    const int64_t columns = smaller(count, kPanel - column % kPanel);
    float* target = at(to, row, column);
    for (int64_t i = 0; i < columns; i += W)
      store_lanes(target + i, load_lanes(from + i, columns - i), columns - i);
    from += columns;
    column += columns;
    count -= columns;
  }
}

// Prefetches a row of the data: rows drawn at random come from memory, so all are asked for before one is
// read. Inlined, because GCC drops calls of a function that only prefetches.
MOPO_INLINE void prefetch_row(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i);
  __builtin_prefetch(from + count - 1);
}

// Rows first .. last.
struct Span {
  int64_t first, last;
};
// This thread's part of `count` rows, in whole blocks. The last block may go beyond `count`.
static Span rows_of(const Team& team, int64_t count, int64_t block = kBlock) {
  const int64_t blocks = (count + block - 1) / block;
  return {blocks * team.part / team.parts * block, blocks * (team.part + 1) / team.parts * block};
}

// Calls visit(row, column, block) for the blocks of some rows of a matrix.
template <class Visit>
MOPO_INLINE void each_block(const Panels& matrix, Span rows, int64_t width, Visit visit) {
  for (int64_t column = 0; column < width; column += kPanel)
    for (int64_t row = rows.first; row < rows.last; row += kBlock) {
      const float* from = at(matrix, row, column);
      vf block[kBlock][kWidest];
      each_vector(block, [&](int i, int v, vf& x) { x = load(from + within(i, v)); });
      visit(row, column, block);
    }
}

// Calls run<Factors>() with the kind of factors that a call's precision asks for.
template <class Run>
static void with_factors(Precision precision, Run run) {
  if (precision == Precision::kFloat32) return run.template operator()<Float32Factors>();
  const Tiles tiles;
  if (precision == Precision::kBFloat16) return run.template operator()<BFloat16Factors>();
  run.template operator()<BFloat16x3Factors>();
}

// The outputs of a hidden layer, as factors of kind `Above`. activate(row, column, block) makes them of the
// layer's products, in place.
template <class Factors, class Above, class Activate>
MOPO_INLINE void forward_hidden(Span rows, const Factor& in, const Dense& layer, bool target,
                                const Factor& out, Activate activate) {
  Factors::forward(rows.first, rows.last, in, layer, target, [&](int64_t row, int64_t column, auto& block) {
    activate(row, column, block);
    Above::put_left(out, row, column, block);
  });
  Above::set_ones(rows.first, rows.last, out, layer.out);
}

// From the gradient of a layer's outputs to that of the pre-activations of the layer below, as factors of
// kind `Below`. multiply(row, column, block) multiplies by the activation's slopes, in place.
template <class Factors, class Below, class Multiply>
MOPO_INLINE void backward_hidden(Span rows, const Factor& grad, const Dense& layer, const Factor& to,
                                 Multiply multiply) {
  Factors::backward(rows.first, rows.last, 0, grad, layer, [&](int64_t row, int64_t column, auto& block) {
    multiply(row, column, block);
    Below::put_grad(to, row, column, block);
  });
}

// A vector of the target, moved towards the parameters' values.
MOPO_INLINE vf moved(vf target, vf value, float polyak) { return target + (value - target) * polyak; }

// One step of Adam on a vector of parameters, and of their target if they have one. Returns the new values.
template <class Arrays>
MOPO_INLINE vf adam(const AdamStep& step, const Arrays& arrays, int64_t at, vf gradient) {
  vf value = load(arrays.value + at), m = load(arrays.exp_avg + at), v = load(arrays.exp_avg_sq + at);
  adam<float>(step, gradient, value, m, v);
  store(arrays.exp_avg + at, m);
  store(arrays.exp_avg_sq + at, v);
  store(arrays.value + at, value);
  if constexpr (requires { arrays.target; })
    if (arrays.target != nullptr)
      store(arrays.target + at, moved(load(arrays.target + at), value, step.polyak));
  return value;
}

// This thread's part of a layer's parameters: the gradient x^T grad over `count` rows of the batch, and
// Adam's step. Each parameter has one thread, and its sum runs over the batch in order: the result does not
// depend on the team.
template <class Factors>
static void train_layer(const Team& team, const Dense& layer, const AdamStep& step, int64_t count,
                        const Factor& x, const Factor& grad) {
  const auto update = [&](int64_t row, int64_t column, auto& block) {
    const int64_t begin = offset(layer.rows, row, column);
    each_vector(block, [&](int i, int v, vf& sum) {
      const int64_t here = begin + within(i, v);
      // No weight decay for the bias, which is the last row.
      if (row + i < layer.in) sum = sum + step.weight_decay * load(layer.value + here);
      sum = adam(step, layer, here, sum);
    });
    Factors::put_weight(layer, row, column, block);
    if constexpr (Factors::kCopies)
      if (layer.target != nullptr) {
        each_vector(block, [&](int i, int v, vf& x) { x = load(layer.target + begin + within(i, v)); });
        Factors::put_target(layer, row, column, block);
      }
  };
  const Span rows = rows_of(team, layer.in + 1, Factors::kRows);
  Factors::weight_gradient(rows.first, rows.last, count, x, grad, layer, update);
}

template <class Factors>
static void make_weight_factors(const Dense& layer) {
  for (int64_t column = 0; column < layer.out; column += kPanel)
    for (int64_t row = 0; row <= layer.in; row += kBlock) {
      const int64_t begin = offset(layer.rows, row, column);
      vf block[kBlock][kWidest];
      each_vector(block, [&](int i, int v, vf& x) { x = load(layer.value + begin + within(i, v)); });
      Factors::put_weight(layer, row, column, block);
      if (layer.target == nullptr) continue;
      each_vector(block, [&](int i, int v, vf& x) { x = load(layer.target + begin + within(i, v)); });
      Factors::put_target(layer, row, column, block);
    }
}

static void make_factors(const Dense& layer, Precision precision) {
  with_factors(precision, [&]<class Factors>() { make_weight_factors<Factors>(layer); });
}

static void move_target(const Dense& layer, Precision precision, float polyak) {
  const auto round_up = [](int64_t count) { return (count + kPanel - 1) / kPanel * kPanel; };
  const bool one_row = layer.rows == 0;
  const int64_t size = one_row ? round_up(layer.in + 1) : layer.rows * round_up(layer.out);
  for (int64_t at = 0; at < size; at += W)
    store(layer.target + at, moved(load(layer.target + at), load(layer.value + at), polyak));
  if (!one_row) make_factors(layer, precision);
}
