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
      each_block(gathered, in + 1, [&](int64_t row, int64_t column, auto& block) {
        Factors::put_left(to, row, column, block);
      });
  }

  // Calls visit(row, column, block) for the blocks of a matrix.
  template <class Visit>
  void each_block(const Panels& matrix, int64_t width, Visit visit) const {
    for (int64_t column = 0; column < width; column += kPanel)
      for (int64_t row = 0; row < rows; row += kBlock) {
        const float* from = at(matrix, row, column);
        vf block[kBlock][kWidest];
        each_vector(block, [&](int i, int v, vf& x) { x = load(from + within(i, v)); });
        visit(row, column, block);
      }
  }

  template <Activation activation>
  void forward() const {
    for (int64_t l = 0; l < hidden_count(); ++l) {
      const auto activate = [&](int64_t row, int64_t column, auto& block) {
        float* slopes = at(window.slopes[l], row, column);
        each_vector(block, [&](int i, int v, vf& x) {
          vf slope;
          x = activate_and_differentiate<Factors::kPrecision, activation>(x, slope);
          store(slopes + within(i, v), slope);
        });
      };
      forward_hidden<Factors, Factors>({0, rows}, left(l), layers()[l], false, left(l + 1), activate);
    }
    Factors::forward(
        0, rows, left(hidden_count()), layers()[hidden_count()], false,
        [&](int64_t row, int64_t column, auto& block) {
          each_vector(block, [&](int i, int v, vf x) { store(window.head.at(row + i) + column + v * W, x); });
        });
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
      each_block(head_grad, 2 * dims, [&](int64_t row, int64_t column, auto& block) {
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
      backward_hidden<Factors, Factors>({0, rows}, grad(l), layers()[l], grad(l - 1), multiply);
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

static void fit_parameters(const FitArgs& args, const FitPlan& plan, const FitWorkspace& ws,
                           const FitTurn& turn, const AdamStep* steps) {
  const Dense* layers = plan.layers + turn.member * args.depth;
  with_factors(args.precision, [&]<class Factors>() {
    for (int64_t l = 0; l < args.depth; ++l)
      train_layer<Factors>(turn.team, layers[l], steps[l], turn.count, l == 0 ? ws.inputs : ws.hidden[l - 1],
                           l + 1 == args.depth ? ws.head_grad : ws.grads[l]);
  });
  turn.team.wait();
}
