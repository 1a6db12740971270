// The stages of a SAC update. A team of threads works on a network in two phases. First each thread takes
// some rows of the batch through the network, forwards and backwards; no row depends on another. Then each
// thread sums the gradients of some rows of the parameters over the whole batch, and updates them.

// Prefetches a row of the data: rows drawn at random come from memory, so all are asked for before one is
// read.
static void prefetch_row(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i);
  __builtin_prefetch(from + count - 1);
}

static void train_panels(const Team& team, const Dense& layer, const AdamStep& step, int64_t count,
                         const Panels& x, const Panels& grad) {
  train_layer<Float32Factors>(team, layer, step, count, {x, x}, {grad, grad});
}

// Rows first .. last of an update's batch, whole blocks. Rows from batch() on are padding.
struct SacRows {
  const SacArgs& args;
  const SacPlan& plan;
  const int64_t first, last;

  int64_t batch() const { return args.real_rows + args.model_rows; }
  int64_t end() const { return smaller(last, batch()); }
  int64_t hidden_count() const { return args.depth - 1; }

  const SacSource& source(int64_t row) const { return row < args.real_rows ? args.real : args.model; }

  // Draws the data row for a row of the batch, and prefetches it.
  void draw(int64_t row, uint32_t step) const {
    const SacSource& source = this->source(row);
    const uint32_t word = random_block(row, step, kBatchStream, 0, args.seed).word[0];
    const int64_t from = choose(word, static_cast<uint32_t>(source.size));
    prefetch_row(source.observations.at(from), args.obs_dim);
    prefetch_row(source.next_observations.at(from), args.obs_dim);
    prefetch_row(source.actions.at(from), args.act_dim);
    __builtin_prefetch(source.rewards.at(from));
    __builtin_prefetch(source.terminals.at(from));
    plan.drawn[row] = from;
  }

  void gather() const {
    for (int64_t row = first; row < end(); ++row) {
      const SacSource& source = this->source(row);
      const int64_t from = plan.drawn[row];
      const float* observation = source.observations.at(from);
      const float* next = source.next_observations.at(from);
      copy_row(observation, args.obs_dim, plan.observations, row, 0);
      copy_row(observation, args.obs_dim, plan.inputs, row, 0);
      copy_row(observation, args.obs_dim, plan.policy_inputs, row, 0);
      copy_row(next, args.obs_dim, plan.next_observations, row, 0);
      copy_row(next, args.obs_dim, plan.next_inputs, row, 0);
      copy_row(source.actions.at(from), args.act_dim, plan.inputs, row, args.obs_dim);
      plan.rewards[row] = *source.rewards.at(from);
      plan.discounts[row] = *source.terminals.at(from) ? 0.0f : args.discount;
    }
  }

  void draw_noise(PhiloxStream stream, uint32_t step) const {
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

  void hidden_layers(const Panels& input, const Dense* layers, bool targets, const Panels* outputs) const {
    const Panels* in = &input;
    for (int64_t l = 0; l < hidden_count(); ++l) {
      const Dense& layer = layers[l];
      const Panels& out = outputs[l];
      forward_layer(first, last, *in, layer, {targets ? layer.target : layer.value, layer.rows},
                    [&](int64_t row, int64_t column, auto& block) {
                      float* to = at(out, row, column);
                      each_vector(block, [&](int i, int v, vf x) {
                        store(to + within(i, v), activate<Activation::kRelu>(x));
                      });
                    });
      set_ones(first, last, out, layer.out);
      in = &out;
    }
  }

  // The policy's actions at `observations`, written behind the observations of `inputs`, and their
  // log-probabilities.
  void act(const Panels& observations, const Panels& inputs, float* log_probs) const {
    const Dense& head = plan.actor[hidden_count()];
    hidden_layers(observations, plan.actor, false, plan.actor_hidden);
    forward_layer(first, last, plan.actor_hidden[hidden_count() - 1], head, head.weight.across,
                  [&](int64_t row, int64_t column, auto& block) {
                    each_vector(block, [&](int i, int v, vf x) {
                      store(plan.actor_head.at(row + i) + column + v * W, x);
                    });
                  });
    const int64_t act_dim = args.act_dim;
    for (int64_t row = first; row < end(); ++row) {
      float log_prob = 0.0f;
      for (int64_t d = 0; d < act_dim; d += W) {
        const vf mean = load_lanes(plan.actor_head.at(row) + d, act_dim - d);
        const vf raw_log_std = load_lanes(plan.actor_head.at(row) + act_dim + d, act_dim - d);
        const SquashedGaussian draw(mean, raw_log_std, broadcast(args.log_std_min),
                                    broadcast(args.log_std_max), load(plan.noise.at(row) + d));
        const vf terms = draw.log_prob(), action = draw.action();
        store(plan.spread.at(row) + d, draw.spread);
        store(plan.actions.at(row) + d, action);
        for (int lane = 0; lane < smaller(W, act_dim - d); ++lane) {
          *at(inputs, row, args.obs_dim + d + lane) = action[lane];
          log_prob += terms[lane];
        }
      }
      log_probs[row] = log_prob;
    }
  }

  // Backwards through one layer: from the gradient of its outputs to that of the pre-activations of the layer
  // below, whose outputs are `below`. source(row) is the row of `below` that belongs to a row of `grad`.
  template <class Source>
  void backward(const Dense& layer, const Panels& grad, const Panels& below, const Panels& to, int64_t stop,
                Source source) const {
    product<false>(first, stop, 0, layer.in, layer.out, grad, layer.weight.along,
                   [&](int64_t row, int64_t column, auto& block) {
                     float* grads = at(to, row, column);
                     const float* outputs = at(below, 0, column);
                     each_vector(block, [&](int i, int v, vf x) {
                       const vf output = load(outputs + source(row + i) * kPanel + v * W);
                       store(grads + within(i, v), select(output > 0.0f, x, vf{}));
                     });
                   });
  }

  // From the gradients of Q by the actions to those of the actor's layers.
  void actor_gradient() const {
    const float inverse_batch = 1.0f / static_cast<float>(batch());
    const int64_t act_dim = args.act_dim;
    for (int64_t row = first; row < end(); ++row)
      for (int64_t d = 0; d < act_dim; d += W) {
        const vf log_std = load_lanes(plan.actor_head.at(row) + act_dim + d, act_dim - d);
        const vf q_grad = load_lanes(plan.action_grad.at(row) + args.obs_dim + d, act_dim - d);
        const auto grad =
            squashed_gradient(load(plan.actions.at(row) + d), load(plan.spread.at(row) + d), log_std,
                              args.log_std_min, args.log_std_max, q_grad, plan.alpha, inverse_batch);
        for (int lane = 0; lane < smaller(W, act_dim - d); ++lane) {
          *at(plan.actor_head_grad, row, d + lane) = grad.mean[lane];
          *at(plan.actor_head_grad, row, act_dim + d + lane) = grad.log_std[lane];
        }
      }
    const auto itself = [](int64_t row) { return row; };
    for (int64_t l = hidden_count(); l > 0; --l)
      backward(plan.actor[l], l == hidden_count() ? plan.actor_head_grad : plan.actor_grad[l],
               plan.actor_hidden[l - 1], plan.actor_grad[l - 1], last, itself);
  }
};

// One critic's part of an update, for a thread's rows.
struct SacCritic {
  const SacRows rows;
  const SacArgs& args;
  const SacPlan& plan;
  const int64_t critic, first, last;

  SacCritic(const SacArgs& args, const SacPlan& plan, const Team& team, int64_t critic)
      : SacCritic(args, plan, rows_of(team, plan.rows), critic) {}
  SacCritic(const SacArgs& args, const SacPlan& plan, Span span, int64_t critic)
      : rows{args, plan, span.first, span.last},
        args(args),
        plan(plan),
        critic(critic),
        first(span.first),
        last(span.last) {}

  int64_t hidden_count() const { return args.depth - 1; }
  const Dense* layers() const { return plan.critic + critic * args.depth; }
  const Panels* outputs() const { return plan.critic_hidden + critic * hidden_count(); }
  const Panels* grads() const { return plan.critic_grad + critic * hidden_count(); }
  const Panels* scratch() const { return plan.scratch_hidden + critic * hidden_count(); }
  // This critic's part of an array [critics][rows].
  template <class T>
  T* mine(T* array) const {
    return array + critic * plan.rows;
  }

  // Writes Q to q[row]. The last layer has one output, so its weights are one row and Q is a dot product.
  void evaluate(const Panels& input, bool targets, const Panels* outputs, float* q) const {
    rows.hidden_layers(input, layers(), targets, outputs);
    const Dense& head = layers()[hidden_count()];
    const float* weight = targets ? head.target : head.value;
    const Panels& top = outputs[hidden_count() - 1];
    for (int64_t row = first; row < last; row += kBlock) {
      vf sum[kBlock] = {};
      for (int64_t k = 0; k <= head.in; k += W) {
        const float* block = at(top, row, k);
        for (int i = 0; i < kBlock; ++i) sum[i] = sum[i] + load(block + within(i, 0)) * load(weight + k);
      }
      for (int i = 0; i < kBlock; ++i) q[row + i] = sum_lanes(sum[i]);
    }
  }

  static float sum_lanes(vf x) {
    float total = 0.0f;
    for (int lane = 0; lane < W; ++lane) total += x[lane];
    return total;
  }

  // The gradient by the pre-activations of the last hidden layer. source(row) is the row of `top` and of
  // q_grad that belongs to a row of `grad`.
  template <class Source>
  void top_gradient(const Panels& top, const Panels& grad, int64_t stop, const float* q_grad,
                    Source source) const {
    const Dense& head = layers()[hidden_count()];
    for (int64_t k = 0; k < head.in; k += W) {
      // The column of ones takes no gradient.
      const vf weight = load_lanes(head.value + k, head.in - k);
      const float* outputs = at(top, 0, k);
      float* to = at(grad, 0, k);
      for (int64_t row = first; row < stop; ++row) {
        const int64_t from = source(row);
        const vf output = load(outputs + from * kPanel);
        store(to + row * kPanel, select(output > 0.0f, q_grad[from] * weight, vf{}));
      }
    }
  }

  // TD targets, Q, and the gradients of the critic's loss by all pre-activations.
  void differentiate() const {
    float *q = mine(plan.q), *q_grad = mine(plan.q_grad), *targets = mine(plan.targets);
    for (int64_t row = first; row < rows.end(); ++row) {
      float least = plan.target_q[row];
      for (int64_t j = 1; j < args.critics; ++j) least = nan_min(least, plan.target_q[j * plan.rows + row]);
      const float value = least - plan.alpha * plan.next_log_prob[row];
      targets[row] = plan.rewards[row] + (plan.discounts[row] != 0.0f ? plan.discounts[row] * value : 0.0f);
    }
    evaluate(plan.inputs, false, outputs(), q);
    const float scale = 2.0f * args.critic_loss_scale / static_cast<float>(rows.batch());
    for (int64_t row = first; row < last; ++row)
      q_grad[row] = row < rows.batch() ? scale * (q[row] - targets[row]) : 0.0f;
    const auto itself = [](int64_t row) { return row; };
    top_gradient(outputs()[hidden_count() - 1], grads()[hidden_count() - 1], last, q_grad, itself);
    for (int64_t l = hidden_count() - 1; l > 0; --l)
      rows.backward(layers()[l], grads()[l], outputs()[l - 1], grads()[l - 1], last, itself);
  }

  static float nan_min(float a, float b) { return b < a || b != b ? b : a; }

  // The gradient of -Q / batch by the action, in rows where this critic's Q is the least; the gradient of the
  // other critics is zero there. These rows are gathered into whole blocks, so only they are computed.
  void action_gradient() const {
    int64_t* picked = mine(plan.picked);
    int64_t stop = first;
    for (int64_t row = first; row < rows.end(); ++row)
      if (least_critic(row) == critic) picked[stop++] = row;
    if (stop == first) return;
    for (; (stop - first) % kBlock != 0; ++stop) picked[stop] = picked[stop - 1];
    const auto source = [&](int64_t row) { return picked[row]; };
    Panels here = plan.scratch_grad[2 * critic], there = plan.scratch_grad[2 * critic + 1];
    top_gradient(scratch()[hidden_count() - 1], here, stop, plan.policy_q_grad, source);
    for (int64_t l = hidden_count() - 1; l > 0; --l) {
      rows.backward(layers()[l], here, scratch()[l - 1], there, stop, source);
      const Panels other = here;
      here = there;
      there = other;
    }
    const Dense& layer = layers()[0];
    product<false>(first, stop, args.obs_dim / kPanel * kPanel, layer.in, layer.out, here, layer.weight.along,
                   [&](int64_t row, int64_t column, auto& block) {
                     each_vector(block, [&](int i, int v, vf x) {
                       store(plan.action_grad.at(picked[row + i]) + column + v * W, x);
                     });
                   });
  }

  // The critic whose Q of the policy's action is the least, the first of equals.
  int64_t least_critic(int64_t row) const {
    int64_t least = 0;
    for (int64_t j = 1; j < args.critics; ++j)
      if (plan.policy_q[j * plan.rows + row] < plan.policy_q[least * plan.rows + row]) least = j;
    return least;
  }

  // The step of the critic's parameters.
  void train(const Team& team, const AdamStep& step) const {
    const int64_t batch = rows.batch();
    for (int64_t l = 0; l < hidden_count(); ++l)
      train_panels(team, layers()[l], step, batch, l == 0 ? plan.inputs : outputs()[l - 1], grads()[l]);
    if (team.part != 0) return;
    const Dense& head = layers()[hidden_count()];
    const Panels& top = outputs()[hidden_count() - 1];
    const float* q_grad = mine(plan.q_grad);
    for (int64_t k = 0; k <= head.in; k += W) {
      const float* outputs = at(top, 0, k);
      vf sum{};
      for (int64_t begin = 0; begin < batch; begin += 16) {
        vf part{};
        for (int64_t row = begin; row < smaller(begin + 16, batch); ++row)
          part = part + load(outputs + row * kPanel) * q_grad[row];
        sum = sum + part;
      }
      adam(step, head, k, sum);
    }
  }
};

static void sac_sample(const SacArgs& args, const SacPlan& plan, const Team& team, int64_t update) {
  const Span span = rows_of(team, plan.rows);
  const SacRows rows{args, plan, span.first, span.last};
  const uint32_t step = static_cast<uint32_t>(args.first_draw + update);
  for (int64_t row = rows.first; row < rows.end(); ++row) rows.draw(row, step);
  rows.draw_noise(kNextActionStream, step);  // overlaps with the prefetches
  rows.gather();
  rows.act(plan.next_observations, plan.next_inputs, plan.next_log_prob);
  rows.draw_noise(kActionStream, step);
  rows.act(plan.observations, plan.policy_inputs, plan.log_prob);
}

static void sac_target(const SacArgs& args, const SacPlan& plan, const Team& team, int64_t critic) {
  const SacCritic work(args, plan, team, critic);
  work.evaluate(plan.next_inputs, true, work.scratch(), work.mine(plan.target_q));
}

static void sac_critic(const SacArgs& args, const SacPlan& plan, const Team& team, int64_t critic,
                       const AdamStep& step) {
  const SacCritic work(args, plan, team, critic);
  work.differentiate();
  if (!args.simultaneous) {
    team.wait();
    work.train(team, step);
    team.wait();
  }
  work.evaluate(plan.policy_inputs, false, work.scratch(), work.mine(plan.policy_q));
}

static void sac_action_gradient(const SacArgs& args, const SacPlan& plan, const Team& team, int64_t critic,
                                const AdamStep& step) {
  const SacCritic work(args, plan, team, critic);
  work.action_gradient();
  if (!args.simultaneous) return;
  team.wait();
  work.train(team, step);
}

static void sac_actor(const SacArgs& args, const SacPlan& plan, const Team& team, const AdamStep& step) {
  const Span span = rows_of(team, plan.rows);
  const SacRows rows{args, plan, span.first, span.last};
  rows.actor_gradient();
  team.wait();
  for (int64_t l = 0; l <= rows.hidden_count(); ++l)
    train_panels(team, plan.actor[l], step, rows.batch(),
                 l == 0 ? plan.observations : plan.actor_hidden[l - 1],
                 l == rows.hidden_count() ? plan.actor_head_grad : plan.actor_grad[l]);
}
