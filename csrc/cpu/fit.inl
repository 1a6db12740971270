// Steps of the ensemble's maximum-likelihood fit, one member after the other: threads take rows of its batch,
// forwards and backwards; then rows of its parameters.

// The activation at x, and its derivative there.
template <Activation activation>
MOPO_INLINE vf activate_and_differentiate(vf x, vf& slope) {
  if constexpr (activation == Activation::kSilu) {
    const vf gate = 1.0f / (1.0f + exp(-x)), y = x * gate;
    slope = gate + y * (1.0f - gate);
    return y;
  } else {
    const vf y = activate<activation>(x);
    slope = activation == Activation::kTanh ? 1.0f - y * y : select(x > 0.0f, broadcast(1.0f), vf{});
    return y;
  }
}

// Rows first .. last, whole blocks, of a step on `count` rows of a member, which begin at `begin` in its
// pass.
struct FitRows {
  const FitArgs& args;
  const FitPlan& plan;
  const int64_t member, begin, count, first, last;

  int64_t end() const { return smaller(last, count); }
  int64_t hidden() const { return args.depth - 1; }
  const Dense* layers() const { return plan.layers + member * args.depth; }

  void gather() const {
    const int64_t in = layers()[0].in;
    const int64_t* rows = args.rows + member * args.rows_stride + begin;
    for (int64_t row = first; row < end(); ++row) {
      const float* input = args.inputs + rows[row] * in;
      const float* target = args.targets + rows[row] * args.dims;
      for (int64_t d = 0; d < in; ++d) plan.inputs.at(row)[d] = input[d];
      for (int64_t d = 0; d < args.dims; ++d) plan.targets.at(row)[d] = target[d];
    }
  }

  template <Activation activation>
  void forward() const {
    const Rows* in = &plan.inputs;
    for (int64_t l = 0; l < hidden(); ++l) {
      const Dense& layer = layers()[l];
      const Rows &out = plan.hidden[l], &slopes = plan.slopes[l];
      forward_layer(first, last, *in, layer, layer.value, [&](int64_t row, int64_t column, vf x) {
        vf slope;
        store(out.at(row) + column, activate_and_differentiate<activation>(x, slope));
        store(slopes.at(row) + column, slope);
      });
      set_ones(first, last, out, layer.out);
      in = &out;
    }
    const Dense& head = layers()[hidden()];
    forward_layer(first, last, *in, head, head.value,
                  [&](int64_t row, int64_t column, vf x) { store(plan.head.at(row) + column, x); });
  }

  // The Gaussian negative log-likelihood, and its gradient by the head's outputs and by the bounds.
  void differentiate_loss() const {
    const int64_t dims = args.dims;
    const float share = 1.0f / static_cast<float>(count * dims);
    for (int64_t row = first; row < end(); ++row) {
      float loss = 0.0f;
      for (int64_t d = 0; d < dims; d += W) {
        const int64_t lanes = smaller(W, dims - d);
        const vf raw = load_lanes(plan.head.at(row) + dims + d, lanes);
        const vf error = load_lanes(plan.head.at(row) + d, lanes) - load(plan.targets.at(row) + d);
        const vf exp_min = load(plan.exp_min + d), exp_minus_max = load(plan.exp_minus_max + d);
        // The soft clamp in closed form (spec.h); below_max, above_min are its two slopes.
        const vf below = 1.0f / (exp_minus_max + exp(-raw));
        const vf inverse = 1.0f / (exp_min + below);
        const vf below_max = 1.0f / (1.0f + exp(raw - load(plan.max_logvar + d)));
        const vf above_min = below * inverse;
        const vf scaled = error * error * inverse;
        const vf losses = scaled - log(inverse);
        const vf logvar_grad = (1.0f - scaled) * share;
        const vf mean_grad = 2.0f * share * error * inverse;
        const vf raw_grad = logvar_grad * above_min * below_max;
        store(plan.max_grad.at(row) + d, logvar_grad * above_min * (1.0f - below_max));
        store(plan.min_grad.at(row) + d, logvar_grad * exp_min * inverse);
        float* to = plan.head_grad.at(row) + d;
        for (int lane = 0; lane < lanes; ++lane) {
          to[lane] = mean_grad[lane];
          to[dims + lane] = raw_grad[lane];
          loss += losses[lane];
        }
      }
      plan.loss[row] = loss * share;
    }
  }

  void backward() const {
    const Rows* grad = &plan.head_grad;
    for (int64_t l = hidden(); l > 0; --l) {
      const Dense& layer = layers()[l];
      const Rows &slopes = plan.slopes[l - 1], &to = plan.grads[l - 1];
      product<false>(first, last, layer.in, layer.out, grad->data, grad->stride, layer.transposed,
                     layer.transposed_stride, [&](int64_t row, int64_t column, vf x) {
                       store(to.at(row) + column, x * load(slopes.at(row) + column));
                     });
      grad = &to;
    }
  }
};

static void fit_rows(const FitArgs& args, const FitPlan& plan, int64_t member, int64_t begin, int64_t count,
                     int64_t first, int64_t last) {
  const FitRows rows{args, plan, member, begin, count, first, last};
  rows.gather();
  switch (args.activation) {
    case Activation::kSilu:
      rows.forward<Activation::kSilu>();
      break;
    case Activation::kRelu:
      rows.forward<Activation::kRelu>();
      break;
    case Activation::kTanh:
      rows.forward<Activation::kTanh>();
      break;
  }
  rows.differentiate_loss();
  rows.backward();
}

static void fit_train(const FitArgs& args, const FitPlan& plan, int64_t member, int64_t count,
                      const AdamStep* steps, int64_t part, int64_t parts) {
  const Dense* layers = plan.layers + member * args.depth;
  for (int64_t l = 0; l < args.depth; ++l)
    train_layer(share_rows(layers[l].in + 1, part, parts), layers[l], steps[l], count,
                l == 0 ? plan.inputs : plan.hidden[l - 1],
                l + 1 == args.depth ? plan.head_grad : plan.grads[l]);
}
