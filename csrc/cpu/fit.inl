// A step of the ensemble's maximum-likelihood fit for one member. The threads of a team each take rows of the
// batch forwards and backwards, a window at a time; then, layer by layer, rows of the parameters.

// The activation at x and its derivative, for a result that becomes a factor of this precision.
template <Precision precision, Activation activation>
MOPO_INLINE vf activate_and_differentiate(vf x, vf& slope) {
  if constexpr (activation == Activation::kSilu) {
    const vf gate = sigmoid_of_factor<precision>(x), y = x * gate;
    slope = gate + y * (1.0f - gate);
    return y;
  } else {
    const vf y = activate<activation>(x);
    slope = activation == Activation::kTanh ? 1.0f - y * y : select(x > 0.0f, broadcast(1.0f), vf{});
    return y;
  }
}

// A window of a turn's batch: rows `begin` to `begin` + `rows`, whole blocks. Rows from `count` on are
// padding. All rows are counted from the window's first.
template <class Factors>
struct FitRows {
  const FitArgs& args;
  const FitPlan& plan;
  const FitWorkspace& ws;
  const FitTurn& turn;
  const FitWindow& window;
  const int64_t begin, rows, count;

  FitRows(const FitArgs& args, const FitPlan& plan, const FitWorkspace& ws, const FitTurn& turn,
          int64_t begin, int64_t rows)
      : args(args),
        plan(plan),
        ws(ws),
        turn(turn),
        window(ws.windows[turn.team.part]),
        begin(begin),
        rows(rows),
        count(smaller(rows, turn.count - begin)) {}

  int64_t hidden_count() const { return args.depth - 1; }
  const Dense* layers() const { return plan.layers + turn.member * args.depth; }
  const float* input(int64_t row) const { return args.inputs + drawn(row) * args.stride; }
  const float* target(int64_t row) const { return args.targets + drawn(row) * args.stride; }
  int64_t drawn(int64_t row) const {
    return args.rows[turn.member * args.rows_stride + turn.begin + begin + row];
  }

  // The inputs of layer l, and the gradient of its outputs.
  Factor left(int64_t l) const {
    return Factors::left_from(l == 0 ? ws.inputs : ws.hidden[l - 1], begin, window.left[l % 2]);
  }
  Factor grad(int64_t l) const {
    return Factors::grad_from(l == hidden_count() ? ws.head_grad : ws.grads[l], begin, window.grad[l % 2]);
  }

  bool normed() const { return plan.norms != nullptr; }
  const Norm& norm(int64_t l) const { return plan.norms[turn.member * hidden_count() + l]; }

  void gather() const {
    const int64_t in = layers()[0].in;
    const Factor to = left(0);
    const Panels& gathered = Factors::kCopies ? window.gathered : to.along;
    for (int64_t row = 0; row < count; ++row) {
      copy_row(input(row), in, gathered, row, 0);
      for (int64_t d = 0; d < args.dims; d += W)
        store(window.targets.at(row) + d, load_lanes(target(row) + d, args.dims - d));
    }
    set_ones(0, rows, gathered, in);
    if constexpr (Factors::kCopies)
      each_block(gathered, {0, rows}, in + 1, [&](int64_t row, int64_t column, auto& block) {
        Factors::put_left(to, row, column, block);
      });
  }

  template <Activation activation>
  void forward() const {
    for (int64_t l = 0; l < hidden_count(); ++l) {
      const Dense& layer = layers()[l];
      const auto activate = [&](int64_t row, int64_t column, auto& block) {
        float* slopes = at(window.slopes[l], row, column);
        each_vector(block, [&](int i, int v, vf& x) {
          vf slope;
          x = activate_and_differentiate<Factors::kPrecision, activation>(x, slope);
          store(slopes + within(i, v), slope);
        });
      };
      if (!normed()) {
        forward_hidden<Factors, Factors>({0, rows}, left(l), layer, false, left(l + 1), activate);
        continue;
      }
      const Panels& outputs = window.normed[l];
      Factors::forward(0, rows, left(l), layer, false, [&](int64_t row, int64_t column, auto& block) {
        float* to = at(outputs, row, column);
        each_vector(block, [&](int i, int v, vf x) { store(to + within(i, v), x); });
        if constexpr (Factors::kCopies) add_moments(row, column, layer.out, block);
      });
      Factors::kCopies ? finish_moments(l) : measure(l);
      const Factor above = left(l + 1);
      const float *means = window.means[0], *inverse_std = window.inverse_std[l];
      each_block(outputs, {0, rows}, layer.out, [&](int64_t row, int64_t column, auto& block) {
        float* to = at(outputs, row, column);
        each_vector(block, [&](int i, int v, vf& x) {
          const int64_t n = column + v * W;
          if (n >= layer.out) return;
          x = (x - means[row + i]) * inverse_std[row + i];
          store(to + within(i, v), x);
          x = x * load(norm(l).scale.value + n) + load(norm(l).shift.value + n);
        });
        activate(row, column, block);
        Factors::put_left(above, row, column, block);
      });
      Factors::set_ones(0, rows, above, layer.out);
    }
    Factors::forward(
        0, rows, left(hidden_count()), layers()[hidden_count()], false,
        [&](int64_t row, int64_t column, auto& block) {
          each_vector(block, [&](int i, int v, vf x) { store(window.head.at(row + i) + column + v * W, x); });
        });
  }

  // Calls visit(offset, n) for the vectors of `count` numbers of a row in panels: vector n .. n + W lies
  // `offset` behind the row's first number.
  template <class Visit>
  MOPO_INLINE void each_in_row(const Panels& matrix, int64_t count, Visit visit) {
    for (int64_t n = 0, panel = 0; n < count; panel += matrix.rows * kPanel)
      for (int v = 0; v < kWidest && n < count; ++v, n += W) visit(panel + v * W, n);
  }

  // The mean of each row of outputs of hidden layer l, and the factor that normalises it.
  void measure(int64_t l) const {
    const Panels& outputs = window.normed[l];
    const int64_t count = layers()[l].out;
    const float inverse_count = 1.0f / static_cast<float>(count);
    for (int64_t row = 0; row < rows; ++row) {
      const float* x = at(outputs, row, 0);
      vf total{}, rest{}, squares{};
      each_in_row(outputs, count, [&](int64_t offset, int64_t) { total = total + load(x + offset); });
      const vf near = sum_of_lanes(total) * inverse_count;
      // The mean's own error, which matters where the outputs are almost equal.
      each_in_row(outputs, count, [&](int64_t offset, int64_t n) {
        rest = rest + first_lanes_of(load(x + offset) - near, count - n);
      });
      const vf mean = near + sum_of_lanes(rest) * inverse_count;
      // Unlike the mean of squares less the square of the mean, this does not cancel.
      each_in_row(outputs, count, [&](int64_t offset, int64_t n) {
        const vf distance = first_lanes_of(load(x + offset) - mean, count - n);
        squares = squares + distance * distance;
      });
      const vf inverse_std = 1.0f / sqrt(sum_of_lanes(squares) * inverse_count + kLayerNormEpsilon);
      window.means[0][row] = mean[0];
      window.inverse_std[l][row] = inverse_std[0];
    }
  }

  struct Pair {
    vf first, second;
  };

  // Adds two terms for each vector of a block to the sums of its rows, which begin at column 0.
  template <int kWide, class Terms>
  MOPO_METHOD void add_to_rows(int64_t row, int64_t column, const vf (&block)[kBlock][kWide],
                               Terms terms) const {
#pragma GCC unroll 8
    for (int i = 0; i < kBlock; ++i) {
      float *to = window.sums[0].at(row + i), *to_other = window.sums[1].at(row + i);
      vf sum{}, other{};
      if (column > 0) {
        sum = load(to);
        other = load(to_other);
      }
#pragma GCC unroll 3
      for (int v = 0; v < kWide; ++v) {
        const auto [term, second] = terms(i, v, block[i][v]);
        sum = sum + term;
        other = other + second;
      }
      store(to, sum);
      store(to_other, other);
    }
  }

  // The sums of W rows, from `row` on, each divided by `count`.
  Pair means_of_rows(int64_t row, int64_t count) const {
    alignas(64) float sums[2][W];
    for (int i = 0; i < W; ++i)
      for (int j = 0; j < 2; ++j) sums[j][i] = sum_of_lanes(load(window.sums[j].at(row + i)))[0];
    const float inverse_count = 1.0f / static_cast<float>(count);
    return {load(sums[0]) * inverse_count, load(sums[1]) * inverse_count};
  }

  // measure() by one pass, while the layer's blocks are made, for factors that are rounded. Distances are
  // from the mean of a row's first vector, so that little cancels in the variance.
  template <int kWide>
  MOPO_METHOD void add_moments(int64_t row, int64_t column, int64_t width,
                               const vf (&block)[kBlock][kWide]) const {
    float* firsts = window.means[0] + row;
    if (column == 0)
      for (int i = 0; i < kBlock; ++i) firsts[i] = sum_of_lanes(block[i][0])[0] * (1.0f / W);
    const auto add = [&](auto some) {
      add_to_rows(row, column, block, [&](int i, int v, vf x) {
        const vf distance = some(x - firsts[i], width - column - v * W);
        return Pair{distance, distance * distance};
      });
    };
    if (width - column >= kWide * W)
      add([](vf x, int64_t) { return x; });
    else
      add([](vf x, int64_t lanes) { return first_lanes_of(x, lanes); });
  }
  void finish_moments(int64_t l) const {
    for (int64_t row = 0; row < rows; row += W) {
      const auto [distance, square] = means_of_rows(row, layers()[l].out);
      const vf variance = square - distance * distance;
      // A variance that is not a number stays one, so that the fit ends.
      const vf positive = select(variance < 0.0f, vf{}, variance);
      store(window.means[0] + row, load(window.means[0] + row) + distance);
      store(window.inverse_std[l] + row, 1.0f / sqrt(positive + kLayerNormEpsilon));
    }
  }

  // Takes a block of the gradient by the outputs of layer norm l to its scale's, to its shift's, and to the
  // sums over rows that the gradient by its inputs needs. It is multiplied by the scale.
  template <int kWide>
  MOPO_METHOD void differentiate_norm(int64_t l, int64_t row, int64_t column,
                                      vf (&block)[kBlock][kWide]) const {
    const int64_t number = (begin + row) / Factors::kRows;
    const bool adds = (begin + row) % Factors::kRows != 0;
    const float* normed = at(window.normed[l], row, column);
#pragma GCC unroll 3
    for (int v = 0; v < kWide; ++v) {
      float* to_scale = ws.scale_grads[l].at(number) + column + v * W;
      float* to_shift = ws.shift_grads[l].at(number) + column + v * W;
      vf scale{}, shift{};
      if (adds) {
        scale = load(to_scale);
        shift = load(to_shift);
      }
      // Gradients of padding rows do not count: they are zeros in packed factors, and not read in others.
      for (int i = 0; i < smaller(kBlock, count - row); ++i) {
        scale = scale + block[i][v] * load(normed + within(i, v));
        shift = shift + block[i][v];
      }
      store(to_scale, scale);
      store(to_shift, shift);
      const vf factor = load(norm(l).scale.value + column + v * W);
      for (int i = 0; i < kBlock; ++i) block[i][v] = block[i][v] * factor;
    }
    add_to_rows(row, column, block,
                [&](int i, int v, vf x) { return Pair{x, x * load(normed + within(i, v))}; });
  }
  void finish_gradients(int64_t l) const {
    for (int64_t row = 0; row < rows; row += W) {
      const auto [mean, slope] = means_of_rows(row, layers()[l].out);
      store(window.means[0] + row, mean);
      store(window.means[1] + row, slope);
    }
  }

  void forward() const {
    switch (args.activation) {
      case Activation::kSilu:
        return forward<Activation::kSilu>();
      case Activation::kRelu:
        return forward<Activation::kRelu>();
      case Activation::kTanh:
        return forward<Activation::kTanh>();
    }
  }

  // The Gaussian negative log-likelihood of each row; its gradient by the last layer's outputs and by the
  // bounds.
  void differentiate_loss() const {
    const int64_t dims = args.dims;
    const float inverse_count = 1.0f / static_cast<float>(turn.count * dims);
    const Factor to = grad(hidden_count());
    const Panels& head_grad = Factors::kCopies ? window.head_grad : to.along;
    for (int64_t row = 0; row < count; ++row) {
      // The gradient takes the place of the predictions.
      float* head = window.head.at(row);
      const float* target = window.targets.at(row);
      float loss = 0.0f;
      for (int64_t d = 0; d < dims; d += W) {
        const int64_t lanes = smaller(W, dims - d);
        const vf raw = load_lanes(head + dims + d, lanes);
        const vf error = load_lanes(head + d, lanes) - load(target + d);
        const auto some = likelihood(error, raw, load(plan.max_logvar + d), load(plan.exp_minus_max + d),
                                     load(plan.exp_min + d), inverse_count);
        store(ws.max_grad.at(begin + row) + d, some.max_grad);
        store(ws.min_grad.at(begin + row) + d, some.min_grad);
        store_lanes(head + d, some.mean_grad, lanes);
        store_lanes(head + dims + d, some.raw_grad, lanes);
        for (int lane = 0; lane < lanes; ++lane) loss += some.loss[lane];
      }
      copy_row(head, 2 * dims, head_grad, row, 0);
      ws.loss[begin + row] = loss * inverse_count;
    }
    if constexpr (Factors::kCopies) {
      for (int64_t row = count; row < rows; ++row)
        for (int64_t d = 0; d < 2 * dims; ++d) *at(head_grad, row, d) = 0.0f;
      each_block(head_grad, {0, rows}, 2 * dims, [&](int64_t row, int64_t column, auto& block) {
        Factors::put_grad(to, row, column, block);
      });
    }
  }

  // From the gradient of the last layer's outputs to those of all pre-activations.
  void backward() const {
    for (int64_t l = hidden_count(); l > 0; --l) {
      const auto multiply = [&](int64_t row, int64_t column, auto& block) {
        const float* slopes = at(window.slopes[l - 1], row, column);
        each_vector(block, [&](int i, int v, vf& x) { x = x * load(slopes + within(i, v)); });
      };
      if (!normed()) {
        backward_hidden<Factors, Factors>({0, rows}, grad(l), layers()[l], grad(l - 1), multiply);
        continue;
      }
      const Panels &grads = window.slopes[l - 1], &outputs = window.normed[l - 1];
      Factors::backward(0, rows, 0, grad(l), layers()[l], [&](int64_t row, int64_t column, auto& block) {
        multiply(row, column, block);
        differentiate_norm(l - 1, row, column, block);
        float* to = at(grads, row, column);
        each_vector(block, [&](int i, int v, vf x) { store(to + within(i, v), x); });
      });
      finish_gradients(l - 1);
      const Factor below = grad(l - 1);
      const int64_t width = layers()[l].in;
      const float *means = window.means[0], *along = window.means[1],
                  *inverse_std = window.inverse_std[l - 1];
      each_block(grads, {0, rows}, width, [&](int64_t row, int64_t column, auto& block) {
        const float* normed = at(outputs, row, column);
        each_vector(block, [&](int i, int v, vf& x) {
          x = (x - means[row + i] - load(normed + within(i, v)) * along[row + i]) * inverse_std[row + i];
          const int64_t lanes = width - column - v * W;
          if (lanes < W) x = lanes > 0 ? first_lanes_of(x, lanes) : vf{};
        });
        Factors::put_grad(below, row, column, block);
      });
    }
  }
};

// Sums the member's loss and its gradient by the bounds over all rows, in order.
static void add_up(const FitArgs& args, const FitPlan& plan, const FitWorkspace& ws, const FitTurn& turn) {
  double loss = 0.0;
  double* max_grad = plan.max_grad + turn.member * args.dims;
  double* min_grad = plan.min_grad + turn.member * args.dims;
  for (int64_t d = 0; d < args.dims; ++d) max_grad[d] = min_grad[d] = 0.0;
  for (int64_t row = 0; row < turn.count; ++row) {
    loss += ws.loss[row];
    for (int64_t d = 0; d < args.dims; ++d) {
      max_grad[d] += ws.max_grad.at(row)[d];
      min_grad[d] += ws.min_grad.at(row)[d];
    }
  }
  plan.loss[turn.member] = loss;
}

static void fit_rows(const FitArgs& args, const FitPlan& plan, const FitWorkspace& ws, const FitTurn& turn) {
  with_factors(args.precision, [&]<class Factors>() {
    const Span span = rows_of(turn.team, turn.count, Factors::kRows);
    for (int64_t begin = span.first; begin < span.last; begin += kFitWindow) {
      const FitRows<Factors> rows(args, plan, ws, turn, begin, smaller(kFitWindow, span.last - begin));
      rows.gather();
      rows.forward();
      rows.differentiate_loss();
      rows.backward();
    }
  });
  turn.team.wait();
  if (turn.team.part == 0) add_up(args, plan, ws, turn);
}

// This thread's part of the layer norms' parameters. As in train_layer, each has one thread, and its sum runs
// over the batch in order.
template <class Factors>
static void train_norms(const FitArgs& args, const FitPlan& plan, const FitWorkspace& ws, const FitTurn& turn,
                        const AdamStep* steps) {
  const int64_t hidden = args.depth - 1;
  const int64_t sums = (turn.count + Factors::kRows - 1) / Factors::kRows;
  for (int64_t l = 0; l < hidden; ++l) {
    const Norm& norm = plan.norms[turn.member * hidden + l];
    const auto train = [&](const NormArray& array, const Rows& grads, int64_t n) {
      vf gradient{};
      for (int64_t i = 0; i < sums; ++i) gradient = gradient + load(grads.at(i) + n);
      adam(steps[l], array, n, gradient);
    };
    const Span columns = rows_of(turn.team, args.layers[l].out, W);
    for (int64_t n = columns.first; n < columns.last; n += W) {
      train(norm.scale, ws.scale_grads[l], n);
      train(norm.shift, ws.shift_grads[l], n);
    }
  }
}

static void fit_parameters(const FitArgs& args, const FitPlan& plan, const FitWorkspace& ws,
                           const FitTurn& turn, const AdamStep* steps) {
  const Dense* layers = plan.layers + turn.member * args.depth;
  with_factors(args.precision, [&]<class Factors>() {
    for (int64_t l = 0; l < args.depth; ++l)
      train_layer<Factors>(turn.team, layers[l], steps[l], turn.count, l == 0 ? ws.inputs : ws.hidden[l - 1],
                           l + 1 == args.depth ? ws.head_grad : ws.grads[l]);
    if (plan.norms != nullptr) train_norms<Factors>(args, plan, ws, turn, steps);
  });
  turn.team.wait();
}
