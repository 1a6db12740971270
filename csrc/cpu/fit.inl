// A step of the ensemble's maximum-likelihood fit for one member. The threads of a team each take rows of the
// batch forwards; then, layer by layer from the top, rows backwards and rows of the layer's parameters.

// The activation at x and its derivative. kRough allows errors that rounding to bfloat16 hides.
template <Activation activation, bool kRough>
MOPO_INLINE vf activate_and_differentiate(vf x, vf& slope) {
  if constexpr (activation == Activation::kSilu) {
    const vf gate = kRough ? rough_sigmoid(x) : sigmoid(x), y = x * gate;
    slope = gate + y * (1.0f - gate);
    return y;
  } else {
    const vf y = activate<activation>(x);
    slope = activation == Activation::kTanh ? 1.0f - y * y : select(x > 0.0f, broadcast(1.0f), vf{});
    return y;
  }
}

// Rows first .. last of a turn's batch, whole blocks. Rows from turn.count on are padding.
template <class Factors>
struct FitRows {
  const FitArgs& args;
  const FitPlan& plan;
  const FitWorkspace& ws;
  const FitTurn& turn;
  const int64_t first, last;

  int64_t end() const { return smaller(last, turn.count); }
  int64_t hidden_count() const { return args.depth - 1; }
  const Dense* layers() const { return plan.layers + turn.member * args.depth; }
  const float* input(int64_t row) const { return args.inputs + drawn(row) * args.stride; }
  const float* target(int64_t row) const { return args.targets + drawn(row) * args.stride; }
  int64_t drawn(int64_t row) const { return args.rows[turn.member * args.rows_stride + turn.begin + row]; }

  void gather() const {
    const int64_t in = layers()[0].in;
    for (int64_t row = first; row < end(); ++row) {
      copy_row(input(row), in, ws.gathered, row, 0);
      const float* from = target(row);
      for (int64_t d = 0; d < args.dims; ++d) ws.targets.at(row)[d] = from[d];
    }
    set_ones(first, last, ws.gathered, in);
    if constexpr (Factors::kRounded)
      each_block(ws.gathered, in + 1, [&](int64_t row, int64_t column, auto& block) {
        Factors::put_left(ws.inputs, row, column, block);
      });
  }

  // Calls visit(row, column, block) for the blocks of a matrix in these rows.
  template <class Visit>
  void each_block(const Panels& matrix, int64_t width, Visit visit) const {
    for (int64_t column = 0; column < width; column += kPanel)
      for (int64_t row = first; row < last; row += kBlock) {
        const float* from = at(matrix, row, column);
        vf block[kBlock][kWidest];
        each_vector(block, [&](int i, int v, vf& x) { x = load(from + within(i, v)); });
        visit(row, column, block);
      }
  }

  template <Activation activation>
  void forward() const {
    const Factor* in = &ws.inputs;
    for (int64_t l = 0; l < hidden_count(); ++l) {
      const Dense& layer = layers()[l];
      const Factor& out = ws.hidden[l];
      const auto activate = [&](int64_t row, int64_t column, auto& block) {
        float* slopes = at(ws.slopes[l], row, column);
        each_vector(block, [&](int i, int v, vf& x) {
          vf slope;
          x = activate_and_differentiate<activation, Factors::kRounded>(x, slope);
          store(slopes + within(i, v), slope);
        });
      };
      forward_hidden<Factors, Factors>({first, last}, *in, layer, false, out, activate);
      in = &out;
    }
    Factors::forward(
        first, last, *in, layers()[hidden_count()], false, [&](int64_t row, int64_t column, auto& block) {
          each_vector(block, [&](int i, int v, vf x) { store(ws.head.at(row + i) + column + v * W, x); });
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
    for (int64_t row = first; row < end(); ++row) {
      float loss = 0.0f;
      for (int64_t d = 0; d < dims; d += W) {
        const int64_t lanes = smaller(W, dims - d);
        const vf raw = load_lanes(ws.head.at(row) + dims + d, lanes);
        const vf error = load_lanes(ws.head.at(row) + d, lanes) - load(ws.targets.at(row) + d);
        const auto some = likelihood(error, raw, load(plan.max_logvar + d), load(plan.exp_minus_max + d),
                                     load(plan.exp_min + d), inverse_count);
        store(ws.max_grad.at(row) + d, some.max_grad);
        store(ws.min_grad.at(row) + d, some.min_grad);
        for (int lane = 0; lane < lanes; ++lane) {
          *at(ws.head_floats, row, d + lane) = some.mean_grad[lane];
          *at(ws.head_floats, row, dims + d + lane) = some.raw_grad[lane];
          loss += some.loss[lane];
        }
      }
      ws.loss[row] = loss * inverse_count;
    }
    if constexpr (Factors::kRounded) {
      for (int64_t row = end(); row < last; ++row)
        for (int64_t d = 0; d < 2 * dims; ++d) *at(ws.head_floats, row, d) = 0.0f;
      each_block(ws.head_floats, 2 * dims, [&](int64_t row, int64_t column, auto& block) {
        Factors::put_grad(ws.head_grad, row, column, block);
      });
    }
  }

  // Backwards through layer l: from the gradient of its outputs to that of the pre-activations of layer l
  // - 1.
  void backward(int64_t l, const Factor& grad) const {
    const auto multiply = [&](int64_t row, int64_t column, auto& block) {
      const float* slopes = at(ws.slopes[l - 1], row, column);
      each_vector(block, [&](int i, int v, vf& x) { x = x * load(slopes + within(i, v)); });
    };
    backward_hidden<Factors, Factors>({first, last}, grad, layers()[l], ws.grads[l - 1], multiply);
  }

  // Sums the member's loss and its gradient by the bounds over all rows, in order: by one thread of the team.
  void add_up() const {
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
};

// Calls work(rows) for this thread's rows, with the factors of the precision asked for.
template <class Work>
static void with_rows(const FitArgs& args, const FitPlan& plan, const FitWorkspace& ws, const FitTurn& turn,
                      Work work) {
  with_factors(args.bfloat16, [&]<class Factors>() {
    const Span span = rows_of(turn.team, turn.count, Factors::kRows);
    work(FitRows<Factors>{args, plan, ws, turn, span.first, span.last});
  });
}

static void fit_forward(const FitArgs& args, const FitPlan& plan, const FitWorkspace& ws,
                        const FitTurn& turn) {
  with_rows(args, plan, ws, turn, [&](const auto& rows) {
    rows.gather();
    rows.forward();
    rows.differentiate_loss();
    turn.team.wait();
    if (turn.team.part == 0) rows.add_up();
  });
}

static void fit_backward(const FitArgs& args, const FitPlan& plan, const FitWorkspace& ws,
                         const FitTurn& turn, const AdamStep* steps) {
  with_rows(args, plan, ws, turn, [&]<class Factors>(const FitRows<Factors>& rows) {
    for (int64_t l = rows.hidden_count(); l >= 0; --l) {
      const Factor& grad = l == rows.hidden_count() ? ws.head_grad : ws.grads[l];
      // Gradients pass through the layer before its parameters move.
      if (l > 0) rows.backward(l, grad);
      turn.team.wait();
      train_layer<Factors>(turn.team, rows.layers()[l], steps[l], turn.count,
                           l == 0 ? ws.inputs : ws.hidden[l - 1], grad);
    }
    turn.team.wait();
  });
}
