// SAC updates. Rows of a batch are independent of one another up to the gradients of the parameters: a thread
// takes its rows through all networks, forwards and backwards; then it takes its share of the parameters.

// Thread-private view of one update's rows first .. last, whole blocks; rows from `batch` on are padding.
struct SacRows {
  const SacArgs& args;
  const SacPlan& plan;
  const int64_t first, last;
  const int64_t update;

  int64_t batch() const { return args.real_rows + args.model_rows; }
  int64_t end() const { return smaller(last, batch()); }
  int64_t hidden() const { return args.depth - 1; }

  void gather() const {
    const uint32_t step = static_cast<uint32_t>(args.first_draw + update);
    for (int64_t row = first; row < end(); ++row) {
      const SacSource& source = row < args.real_rows ? args.real : args.model;
      const uint32_t word = random_block(row, step, kBatchStream, 0, args.seed).word[0];
      const int64_t from = choose(word, static_cast<uint32_t>(source.size));
      const float* observation = source.observations + from * args.obs_dim;
      const float* next = source.next_observations + from * args.obs_dim;
      copy(observation, args.obs_dim, plan.observations.at(row));
      copy(observation, args.obs_dim, plan.inputs.at(row));
      copy(source.actions + from * args.act_dim, args.act_dim, plan.inputs.at(row) + args.obs_dim);
      copy(observation, args.obs_dim, plan.policy_inputs.at(row));
      copy(next, args.obs_dim, plan.next_observations.at(row));
      copy(next, args.obs_dim, plan.next_inputs.at(row));
      plan.rewards[row] = source.rewards[from];
      plan.continues[row] = source.terminals[from] ? 0.0f : args.discount;
    }
  }

  static void copy(const float* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  }

  void draw_noise(Stream stream) const {
    const uint32_t step = static_cast<uint32_t>(args.first_draw + update);
    for (int64_t row = first; row < end(); row += W)
      for (int64_t d = 0; d < args.act_dim; d += 4) {
        PhiloxBlock blocks[W];
        for (int lane = 0; lane < W; ++lane)
          blocks[lane] = random_block(smaller(row + lane, end() - 1), step, stream,
                                      static_cast<uint32_t>(d / 4), args.seed);
        vf normals[4];
        box_muller(blocks, normals);
        for (int lane = 0; lane < smaller(W, end() - row); ++lane)
          for (int i = 0; i < smaller(4, args.act_dim - d); ++i)
            plan.noise.at(row + lane)[d + i] = normals[i][lane];
      }
  }

  void hidden_layers(const Rows& input, const Dense* layers, bool targets, const Rows* outputs,
                     int64_t stop) const {
    const Rows* in = &input;
    for (int64_t l = 0; l < hidden(); ++l) {
      const Dense& layer = layers[l];
      const Rows& out = outputs[l];
      forward_layer(first, stop, *in, layer, targets ? layer.target : layer.value,
                    [&](int64_t row, int64_t column, vf x) {
                      store(out.at(row) + column, activate<Activation::kRelu>(x));
                    });
      set_ones(first, stop, out, layer.out);
      in = &out;
    }
  }

  // Actions into `inputs`, the columns after the observations; log-probabilities into plan.log_prob.
  void act(const Rows& observations, const Rows& inputs) const {
    const Dense& head = plan.actor[hidden()];
    hidden_layers(observations, plan.actor, false, plan.actor_hidden, last);
    forward_layer(first, last, plan.actor_hidden[hidden() - 1], head, head.value,
                  [&](int64_t row, int64_t column, vf x) { store(plan.actor_head.at(row) + column, x); });
    const int64_t act_dim = args.act_dim;
    for (int64_t row = first; row < end(); ++row) {
      float log_prob = 0.0f;
      for (int64_t d = 0; d < act_dim; d += W) {
        const vf mean = load_lanes(plan.actor_head.at(row) + d, act_dim - d);
        const vf log_std = clip_log_std(load_lanes(plan.actor_head.at(row) + act_dim + d, act_dim - d));
        const vf noise = load(plan.noise.at(row) + d), std = exp(log_std);
        const vf raw = mean + std * noise;
        // log(1 - tanh(x)^2) without cancellation.
        const vf squash = 2.0f * (0.69314718056f - raw - softplus(-2.0f * raw));
        const vf log_probs = -0.5f * noise * noise - log_std - 0.91893853320f - squash;
        const vf action = tanh(raw);
        store(plan.spread.at(row) + d, std * noise);
        store(plan.actions.at(row) + d, action);
        for (int lane = 0; lane < smaller(W, act_dim - d); ++lane) {
          inputs.at(row)[args.obs_dim + d + lane] = action[lane];
          log_prob += log_probs[lane];
        }
      }
      plan.log_prob[row] = log_prob;
    }
  }

  vf clip_log_std(vf x) const {
    x = select(x < args.log_std_min, broadcast(args.log_std_min), x);
    return select(x > args.log_std_max, broadcast(args.log_std_max), x);
  }

  static vf softplus(vf x) {
    const vf size = bits_to_float(float_to_bits(x) & 0x7fffffff);
    return select(x > 0.0f, x, vf{}) + log(1.0f + exp(-size));
  }

  // q[row] of one critic; its last layer has one output, so its weights are a row and this is a dot product.
  void evaluate(const Rows& input, int64_t critic, bool targets, const Rows* outputs, float* q) const {
    const Dense* layers = plan.critic + critic * args.depth;
    hidden_layers(input, layers, targets, outputs, last);
    const Dense& head = layers[hidden()];
    const float* weight = targets ? head.target : head.value;
    const Rows& top = outputs[hidden() - 1];
    for (int64_t row = first; row < last; row += kRows) {
      vf sum[kRows] = {};
      for (int64_t k = 0; k <= head.in; k += W)
        for (int i = 0; i < kRows; ++i) sum[i] = sum[i] + load(top.at(row + i) + k) * load(weight + k);
      for (int i = 0; i < kRows; ++i) q[row + i] = sum_lanes(sum[i]);
    }
  }

  static float sum_lanes(vf x) {
    float total = 0.0f;
    for (int lane = 0; lane < W; ++lane) total += x[lane];
    return total;
  }

  // d loss / d pre-activations of the last hidden layer, for rows to which `source` gives their row of `top`.
  template <class Source>
  void top_gradient(const Dense& head, const Rows& top, const Rows& grad, int64_t stop, const float* q_grad,
                    Source source) const {
    for (int64_t row = first; row < stop; ++row) {
      const int64_t from = source(row);
      for (int64_t k = 0; k < padded_lanes(head.in); k += W) {
        const vf slope = q_grad[from] * load(head.value + k);
        store(grad.at(row) + k, select(load(top.at(from) + k) > 0.0f, slope, vf{}));
      }
      // The column of ones takes no gradient.
      for (int64_t k = head.in; k < padded_lanes(head.in); ++k) grad.at(row)[k] = 0.0f;
    }
  }

  static int64_t padded_lanes(int64_t count) { return (count + W - 1) / W * W; }

  // Through layer `layer`, from the gradient of its outputs to that of the pre-activations below it.
  template <class Source>
  void backward(const Dense& layer, const Rows& grad, const Rows& below, const Rows& to, int64_t stop,
                Source source) const {
    product<false>(first, stop, layer.in, layer.out, grad.data, grad.stride, layer.transposed,
                   layer.transposed_stride, [&](int64_t row, int64_t column, vf x) {
                     const vf mask = load(below.at(source(row)) + column);
                     store(to.at(row) + column, select(mask > 0.0f, x, vf{}));
                   });
  }

  // Everything up to the critics' gradients.
  void critics() const {
    gather();
    draw_noise(kNextActionStream);
    act(plan.next_observations, plan.next_inputs);
    const int64_t rows = plan.rows;
    for (int64_t j = 0; j < args.critics; ++j)
      evaluate(plan.next_inputs, j, true, plan.scratch_hidden + j * hidden(), plan.policy_q + j * rows);
    const auto itself = [](int64_t row) { return row; };
    for (int64_t row = first; row < end(); ++row) {
      float least = plan.policy_q[row];
      for (int64_t j = 1; j < args.critics; ++j) least = nan_min(least, plan.policy_q[j * rows + row]);
      plan.targets[row] =
          plan.rewards[row] + (plan.continues[row] != 0.0f
                                   ? plan.continues[row] * (least - plan.alpha * plan.log_prob[row])
                                   : 0.0f);
    }
    const float scale = 2.0f * args.critic_loss_scale / static_cast<float>(batch());
    for (int64_t j = 0; j < args.critics; ++j) {
      const Dense* layers = plan.critic + j * args.depth;
      const Rows* outputs = plan.critic_hidden + j * hidden();
      const Rows* grads = plan.critic_grad + j * hidden();
      float *q = plan.q + j * rows, *q_grad = plan.q_grad + j * rows;
      evaluate(plan.inputs, j, false, outputs, q);
      for (int64_t row = first; row < last; ++row)
        q_grad[row] = row < batch() ? scale * (q[row] - plan.targets[row]) : 0.0f;
      top_gradient(layers[hidden()], outputs[hidden() - 1], grads[hidden() - 1], last, q_grad, itself);
      for (int64_t l = hidden() - 1; l > 0; --l)
        backward(layers[l], grads[l], outputs[l - 1], grads[l - 1], last, itself);
    }
  }

  static float nan_min(float a, float b) { return b < a || b != b ? b : a; }

  // Everything up to the actor's gradients.
  void actor() const {
    draw_noise(kActionStream);
    act(plan.observations, plan.policy_inputs);
    const int64_t rows = plan.rows;
    for (int64_t j = 0; j < args.critics; ++j)
      evaluate(plan.policy_inputs, j, false, plan.scratch_hidden + j * hidden(), plan.policy_q + j * rows);
    for (int64_t row = first; row < end(); ++row) {
      plan.least[row] = 0;
      for (int64_t j = 1; j < args.critics; ++j)
        if (plan.policy_q[j * rows + row] < plan.policy_q[plan.least[row] * rows + row]) plan.least[row] = j;
    }
    for (int64_t j = 0; j < args.critics; ++j) action_gradient(j);

    const float share = 1.0f / static_cast<float>(batch());
    const int64_t act_dim = args.act_dim;
    for (int64_t row = first; row < end(); ++row)
      for (int64_t d = 0; d < act_dim; d += W) {
        const vf action = load(plan.actions.at(row) + d);
        const vf through_q = load(plan.action_grad.at(row) + d) * (1.0f - action * action);
        const vf raw_grad = (plan.alpha * share) * 2.0f * action + through_q;
        const vf log_std = load_lanes(plan.actor_head.at(row) + act_dim + d, act_dim - d);
        const vi free = (log_std >= args.log_std_min) & (log_std <= args.log_std_max);
        const vf log_std_grad =
            select(free, raw_grad * load(plan.spread.at(row) + d) - plan.alpha * share, vf{});
        float* to = plan.actor_head_grad.at(row) + d;
        for (int lane = 0; lane < smaller(W, act_dim - d); ++lane) {
          to[lane] = raw_grad[lane];
          to[act_dim + lane] = log_std_grad[lane];
        }
      }
    const Rows* grad = &plan.actor_head_grad;
    const auto itself = [](int64_t row) { return row; };
    for (int64_t l = hidden(); l > 0; --l) {
      backward(plan.actor[l], *grad, plan.actor_hidden[l - 1], plan.actor_grad[l - 1], last, itself);
      grad = &plan.actor_grad[l - 1];
    }
  }

  // - d Q / d action / batch for the rows whose least Q is critic j's, gathered: the others' are zero.
  void action_gradient(int64_t j) const {
    int64_t stop = first;
    for (int64_t row = first; row < end(); ++row)
      if (plan.least[row] == j) plan.picked[stop++] = row;
    if (stop == first) return;
    for (; (stop - first) % kRows != 0; ++stop) plan.picked[stop] = plan.picked[stop - 1];
    const auto picked = [&](int64_t row) { return plan.picked[row]; };
    const Dense* layers = plan.critic + j * args.depth;
    const Rows* outputs = plan.scratch_hidden + j * hidden();
    Rows here = plan.scratch_grad[0], there = plan.scratch_grad[1];
    top_gradient(layers[hidden()], outputs[hidden() - 1], here, stop, plan.minus_share, picked);
    for (int64_t l = hidden() - 1; l > 0; --l) {
      backward(layers[l], here, outputs[l - 1], there, stop, picked);
      const Rows other = here;
      here = there;
      there = other;
    }
    product<false>(first, stop, args.act_dim, layers[0].out, here.data, here.stride, layers[0].transposed,
                   layers[0].transposed_stride, [&](int64_t row, int64_t column, vf x) {
                     store(plan.action_grad.at(plan.picked[row]) + column, x);
                   });
  }
};

static void sac_critic_rows(const SacArgs& args, const SacPlan& plan, int64_t update, int64_t first,
                            int64_t last) {
  SacRows{args, plan, first, last, update}.critics();
}

static void sac_actor_rows(const SacArgs& args, const SacPlan& plan, int64_t update, int64_t first,
                           int64_t last) {
  SacRows{args, plan, first, last, update}.actor();
}

static void sac_train_critics(const SacArgs& args, const SacPlan& plan, const AdamStep& step, int64_t part,
                              int64_t parts) {
  const int64_t batch = args.real_rows + args.model_rows, hidden = args.depth - 1;
  for (int64_t j = 0; j < args.critics; ++j) {
    const Dense* layers = plan.critic + j * args.depth;
    const Rows* outputs = plan.critic_hidden + j * hidden;
    for (int64_t l = 0; l < hidden; ++l)
      train_layer(share_rows(layers[l].in + 1, part, parts), layers[l], step, batch,
                  l == 0 ? plan.inputs : outputs[l - 1], plan.critic_grad[j * hidden + l]);
    if (j % parts != part) continue;
    const Dense& head = layers[hidden];
    const Rows& top = outputs[hidden - 1];
    const float* q_grad = plan.q_grad + j * plan.rows;
    for (int64_t k = 0; k <= head.in; k += W) {
      vf sum{};
      for (int64_t begin = 0; begin < batch; begin += 16) {
        vf part{};
        for (int64_t row = begin; row < smaller(begin + 16, batch); ++row)
          part = part + load(top.at(row) + k) * q_grad[row];
        sum = sum + part;
      }
      adam(step, head, k, sum);
    }
  }
}

static void sac_train_actor(const SacArgs& args, const SacPlan& plan, const AdamStep& step, int64_t part,
                            int64_t parts) {
  const int64_t batch = args.real_rows + args.model_rows, hidden = args.depth - 1;
  for (int64_t l = 0; l <= hidden; ++l)
    train_layer(share_rows(plan.actor[l].in + 1, part, parts), plan.actor[l], step, batch,
                l == 0 ? plan.observations : plan.actor_hidden[l - 1],
                l == hidden ? plan.actor_head_grad : plan.actor_grad[l]);
}
