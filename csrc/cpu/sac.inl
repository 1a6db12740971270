// The stages of a SAC update. A team of threads works on a network in two phases. First each thread takes
// some rows of the batch through the network, forwards and backwards; no row depends on another. Then each
// thread sums the gradients of some rows of the parameters over the whole batch, and updates them.
//
// `Inner` is the kind of factors (factors.h) of the layers between a network's first and its last. The last
// one is always float32, as the parameters and all sums are.

// Calls run(window) for all of a thread's rows in turn, kSacWindow at a time.
template <class Run>
static void each_window(Span rows, Run run) {
  for (int64_t first = rows.first; first < rows.last; first += kSacWindow)
    run(Span{first, smaller(first + kSacWindow, rows.last)});
}

// Rows first .. last of an update's batch, whole blocks. Rows from batch() on are padding.
template <class Inner>
struct SacRows {
  using First = typename FirstLayer<Inner>::Factors;
  using Last = Float32Factors;

  const SacArgs& args;
  const SacPlan& plan;
  const int64_t first, last;

  int64_t batch() const { return args.real_rows + args.model_rows; }
  int64_t end() const { return smaller(last, batch()); }
  int64_t top() const { return args.depth - 2; }  // the last hidden layer

  const SacSource& source(int64_t row) const { return row < args.real_rows ? args.real : args.model; }

  // Takes the source's row for a row of the batch, and prefetches it.
  void draw(int64_t row, uint32_t step) const {
    const SacSource& source = this->source(row);
    const int64_t from = sac_row(args, row, step);
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
      copy_row(observation, args.obs_dim, plan.observations.numbers, row, 0);
      copy_row(observation, args.obs_dim, plan.inputs.numbers, row, 0);
      copy_row(observation, args.obs_dim, plan.policy_inputs.numbers, row, 0);
      copy_row(next, args.obs_dim, plan.next_observations.numbers, row, 0);
      copy_row(next, args.obs_dim, plan.next_inputs.numbers, row, 0);
      copy_row(source.actions.at(from), args.act_dim, plan.inputs.numbers, row, args.obs_dim);
      plan.rewards[row] = *source.rewards.at(from);
      plan.discounts[row] = *source.terminals.at(from) ? 0.0f : args.discount;
    }
    make_factor(plan.observations, args.obs_dim);
    make_factor(plan.next_observations, args.obs_dim);
    make_factor(plan.inputs, args.obs_dim + args.act_dim);
  }

  // Packs the inputs' numbers and their column of ones, where the first layer takes packed ones.
  void make_factor(const SacInputs& inputs, int64_t width) const {
    if constexpr (First::kCopies)
      each_block(inputs.numbers, {first, last}, width + 1, [&](int64_t row, int64_t column, auto& block) {
        First::put_left(inputs.factor, row, column, block);
      });
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

  // Outputs of a network's hidden layers.
  void forward(const SacInputs& inputs, const Dense* layers, bool target, const Factor* outputs) const {
    const auto relu = [](int64_t, int64_t, auto& block) {
      each_vector(block, [](int, int, vf& x) { x = activate<Activation::kRelu>(x); });
    };
    const Span rows{first, last};
    const Factor& in = inputs.factor;
    if (top() == 0) return forward_hidden<First, Last>(rows, in, layers[0], target, outputs[0], relu);
    forward_hidden<First, Inner>(rows, in, layers[0], target, outputs[0], relu);
    for (int64_t l = 1; l < top(); ++l)
      forward_hidden<Inner, Inner>(rows, outputs[l - 1], layers[l], target, outputs[l], relu);
    forward_hidden<Inner, Last>(rows, outputs[top() - 1], layers[top()], target, outputs[top()], relu);
  }

  // Backwards through a network's hidden layers, from the last one's gradient. source(row) is the row of
  // `outputs` that belongs to a row of `grads`.
  template <class Source>
  void backward(const Dense* layers, const Factor* outputs, const Factor* grads, Source source) const {
    const Span span{first, last};
    for (int64_t l = top(); l > 0; --l) {
      const auto multiply = slopes<Inner>(outputs[l - 1], source);
      if (l > 1)
        backward_hidden<Inner, Inner>(span, grads[l], layers[l], grads[l - 1], multiply);
      else
        backward_hidden<Inner, First>(span, grads[l], layers[l], grads[l - 1], multiply);
    }
  }

  // The slopes of ReLU at `outputs`, for backward_hidden.
  template <class Factors, class Source>
  static auto slopes(const Factor& outputs, Source source) {
    return [&outputs, source](int64_t row, int64_t column, auto& block) {
      each_vector(block, [&](int i, int v, vf& x) {
        x = select(Factors::left(outputs, source(row + i), column, v) > 0.0f, x, vf{});
      });
    };
  }

  // Calls run<Factors>() with the kind of the last hidden layer.
  template <class Run>
  void with_top(Run run) const {
    top() == 0 ? run.template operator()<First>() : run.template operator()<Inner>();
  }

  // Steps layer l by its inputs and the gradient of its outputs.
  void train(const Team& team, const Dense* layers, int64_t l, const AdamStep& step, const Factor& inputs,
             const Factor& grad) const {
    if (l == 0)
      train_layer<First>(team, layers[l], step, batch(), inputs, grad);
    else if (l > top())
      train_layer<Last>(team, layers[l], step, batch(), inputs, grad);
    else
      train_layer<Inner>(team, layers[l], step, batch(), inputs, grad);
  }

  // The policy's actions at `observations`, written behind the observations of `inputs`, and their
  // log-probabilities. `hidden` takes the outputs of its hidden layers.
  void act(const SacInputs& observations, const Factor* hidden, const SacInputs& inputs,
           float* log_probs) const {
    forward(observations, plan.actor, false, hidden);
    Last::forward(first, last, hidden[top()], plan.actor[top() + 1], false,
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
        const vf terms = draw.log_prob(args.log_prob_epsilon), action = draw.action();
        store(plan.spread.at(row) + d, draw.spread);
        if (args.log_prob_epsilon > 0.0f) store(plan.slopes.at(row) + d, exp(draw.log_slope()));
        store(plan.actions.at(row) + d, action);
        for (int lane = 0; lane < smaller(W, act_dim - d); ++lane) {
          *at(inputs.numbers, row, args.obs_dim + d + lane) = action[lane];
          log_prob += terms[lane];
        }
      }
      log_probs[row] = log_prob;
    }
    make_factor(inputs, args.obs_dim + act_dim);
  }

  void act_next() const {
    act(plan.next_observations, plan.next_hidden, plan.next_inputs, plan.next_log_prob);
  }

  // Adds the critics' gradients by the actions to the first one's.
  void add_up_action_gradients() const {
    const int64_t act_dim = args.act_dim;
    for (int64_t row = first; row < end(); ++row)
      for (int64_t d = 0; d < act_dim; d += W) {
        const auto of = [&](int64_t j) {
          return plan.action_grad.at(j * plan.rows + row) + args.obs_dim + d;
        };
        vf sum = load_lanes(of(0), act_dim - d);
        for (int64_t j = 1; j < args.critics; ++j) sum = sum + load_lanes(of(j), act_dim - d);
        store_lanes(of(0), sum, act_dim - d);
      }
  }

  // From the gradients of Q by the actions to those of the actor's layers.
  void actor_gradient() const {
    // In a loop of its own, so that the arithmetic below is the same in both cases.
    if (args.mean_actor) add_up_action_gradients();
    const float inverse_batch = 1.0f / static_cast<float>(batch());
    const int64_t act_dim = args.act_dim;
    for (int64_t row = first; row < end(); ++row)
      for (int64_t d = 0; d < act_dim; d += W) {
        const vf log_std = load_lanes(plan.actor_head.at(row) + act_dim + d, act_dim - d);
        const vf q_grad = load_lanes(plan.action_grad.at(row) + args.obs_dim + d, act_dim - d);
        const auto grad =
            squashed_gradient(load(plan.actions.at(row) + d), load(plan.spread.at(row) + d), log_std,
                              args.log_std_min, args.log_std_max, args.log_prob_epsilon,
                              load(plan.slopes.at(row) + d), q_grad, plan.alpha, inverse_batch);
        for (int lane = 0; lane < smaller(W, act_dim - d); ++lane) {
          *at(plan.actor_head_grad, row, d + lane) = grad.mean[lane];
          *at(plan.actor_head_grad, row, act_dim + d + lane) = grad.log_std[lane];
        }
      }
    const auto itself = [](int64_t row) { return row; };
    with_top([&]<class Factors>() {
      backward_hidden<Last, Factors>({first, last}, {plan.actor_head_grad, plan.actor_head_grad},
                                     plan.actor[top() + 1], plan.actor_grad[top()],
                                     slopes<Last>(plan.actor_hidden[top()], itself));
    });
    backward(plan.actor, plan.actor_hidden, plan.actor_grad, itself);
  }
};

// One critic's part of an update, for a thread's rows.
template <class Inner>
struct SacCritic {
  const SacRows<Inner> rows;
  const SacArgs& args;
  const SacPlan& plan;
  const int64_t critic, slot, first, last;

  SacCritic(const SacArgs& args, const SacPlan& plan, Span span, int64_t critic, int64_t slot)
      : rows{args, plan, span.first, span.last},
        args(args),
        plan(plan),
        critic(critic),
        slot(slot),
        first(span.first),
        last(span.last) {}

  int64_t top() const { return rows.top(); }
  const Dense* layers() const { return plan.critic + critic * args.depth; }
  const Dense& head() const { return layers()[top() + 1]; }
  // This critic's part of an array [slots][hidden].
  const Factor* now(const Factor* array) const { return array + slot * (top() + 1); }
  const Factor* policy_hidden() const { return plan.policy_hidden + critic * (top() + 1); }
  // This critic's part of an array [critics][rows].
  template <class T>
  T* mine(T* array) const {
    return array + critic * plan.rows;
  }

  // Writes Q to q[row]. The last layer has one output, so its weights are one row and Q is a dot product.
  void evaluate(const SacInputs& inputs, bool target, const Factor* outputs, float* q) const {
    rows.forward(inputs, layers(), target, outputs);
    const float* weight = target ? head().target : head().value;
    for (int64_t row = first; row < last; row += kBlock) {
      vf sum[kBlock] = {};
      for (int64_t k = 0; k <= head().in; k += W) {
        const float* block = at(outputs[top()].along, row, k);
        for (int i = 0; i < kBlock; ++i) sum[i] = sum[i] + load(block + within(i, 0)) * load(weight + k);
      }
      for (int i = 0; i < kBlock; ++i) q[row + i] = sum_lanes(sum[i]);
    }
  }

  // Q of the policy's actions.
  void evaluate_policy() const { evaluate(plan.policy_inputs, false, policy_hidden(), mine(plan.policy_q)); }

  static float sum_lanes(vf x) {
    float total = 0.0f;
    for (int lane = 0; lane < W; ++lane) total += x[lane];
    return total;
  }

  // The gradient by the pre-activations of the last hidden layer. source(row) is the row of `outputs` and of
  // q_grad that belongs to a row of `grads`.
  template <class Source>
  void top_gradient(const Factor* outputs, const Factor* grads, const float* q_grad, Source source) const {
    const auto slopes = rows.template slopes<Float32Factors>(outputs[top()], source);
    rows.with_top([&]<class Factors>() {
      for (int64_t column = 0; column < head().in; column += kPanel) {
        vf weight[kWidest];
        // The column of ones takes no gradient.
        for (int v = 0; v < kWidest; ++v)
          weight[v] = load_lanes(head().value + column + v * W, head().in - column - v * W);
        for (int64_t row = first; row < last; row += kBlock) {
          vf block[kBlock][kWidest];
          each_vector(block, [&](int i, int v, vf& x) { x = q_grad[source(row + i)] * weight[v]; });
          slopes(row, column, block);
          Factors::put_grad(grads[top()], row, column, block);
        }
      }
    });
  }

  // TD targets, Q, and the gradients of the critic's loss by all pre-activations.
  void differentiate() const {
    float *q = mine(plan.q), *q_grad = mine(plan.q_grad), *targets = mine(plan.targets);
    for (int64_t row = first; row < rows.end(); ++row) {
      float least = plan.target_q[row];
      for (int64_t place = 1; place < args.target_critics; ++place)
        least = nan_min(least, plan.target_q[place * plan.rows + row]);
      targets[row] =
          td_target(args, plan.rewards[row], plan.discounts[row], least, plan.alpha, plan.next_log_prob[row]);
    }
    // In a loop of its own, so that without a limit the arithmetic above is what it always was.
    for (int64_t row = first; row < rows.end(); ++row)
      targets[row] = targets[row] < args.target_min ? args.target_min : targets[row];
    const Factor *outputs = now(plan.critic_hidden), *grads = now(plan.critic_grad);
    evaluate(plan.inputs, false, outputs, q);
    const float scale = 2.0f * args.critic_loss_scale / static_cast<float>(rows.batch());
    for (int64_t row = first; row < last; ++row)
      q_grad[row] = row < rows.batch() ? scale * (q[row] - targets[row]) : 0.0f;
    const auto itself = [](int64_t row) { return row; };
    top_gradient(outputs, grads, q_grad, itself);
    rows.backward(layers(), outputs, grads, itself);
  }

  static float nan_min(float a, float b) { return b < a || b != b ? b : a; }

  // The gradient of -Q / batch by the action, in rows where this critic's Q is the least; the gradient of the
  // other critics is zero there. These rows are gathered into whole blocks, so only they are computed. With
  // mean_actor they are all rows, and each critic has a matrix of its own.
  void action_gradient() const {
    int64_t* picked = mine(plan.picked);
    int64_t stop = first;
    for (int64_t row = first; row < rows.end(); ++row)
      if (args.mean_actor || least_critic(row) == critic) picked[stop++] = row;
    if (stop == first) return;
    for (; (stop - first) % kBlock != 0; ++stop) picked[stop] = picked[stop - 1];
    each_window({first, stop},
                [&](Span window) { SacCritic(args, plan, window, critic, slot).picked_action_gradient(); });
  }

  // The same for rows of the picked ones.
  void picked_action_gradient() const {
    const int64_t* picked = mine(plan.picked);
    const auto source = [&](int64_t row) { return picked[row]; };
    const Factor *outputs = policy_hidden(), *grads = now(plan.policy_grad);
    top_gradient(outputs, grads, plan.policy_q_grad, source);
    rows.backward(layers(), outputs, grads, source);
    const Dense& layer = layers()[0];
    const int64_t matrix = args.mean_actor ? critic * plan.rows : 0;
    SacRows<Inner>::First::backward(
        first, last, args.obs_dim, grads[0], layer, [&](int64_t row, int64_t column, auto& block) {
          each_vector(block, [&](int i, int v, vf x) {
            store(plan.action_grad.at(matrix + picked[row + i]) + column + v * W, x);
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
    const Factor *hidden = now(plan.critic_hidden), *grads = now(plan.critic_grad);
    for (int64_t l = 0; l <= top(); ++l)
      rows.train(team, layers(), l, step, l == 0 ? plan.inputs.factor : hidden[l - 1], grads[l]);
    if (team.part != 0) return;
    const int64_t batch = rows.batch();
    const float* q_grad = mine(plan.q_grad);
    for (int64_t k = 0; k <= head().in; k += W) {
      const float* outputs = at(hidden[top()].along, 0, k);
      vf sum{};
      for (int64_t begin = 0; begin < batch; begin += 16) {
        vf part{};
        for (int64_t row = begin; row < smaller(begin + 16, batch); ++row)
          part = part + load(outputs + row * kPanel) * q_grad[row];
        sum = sum + part;
      }
      adam(step, head(), k, sum);
    }
  }
};

// This thread's rows of an update's batch.
template <class Inner>
static Span batch_rows(const SacPlan& plan, const Team& team) {
  return rows_of(team, plan.rows, Inner::kRows);
}

// Calls run(work) with this thread's part of a critic's work.
template <class Run>
static void with_critic(const SacArgs& args, const SacPlan& plan, const CriticTurn& turn, Run run) {
  with_factors(args.precision, [&]<class Inner>() {
    run(SacCritic<Inner>(args, plan, batch_rows<Inner>(plan, turn.team), turn.critic, turn.slot));
  });
}

// The same for one window of rows after the other.
template <class Run>
static void each_critic_window(const SacArgs& args, const SacPlan& plan, const CriticTurn& turn, Run run) {
  with_factors(args.precision, [&]<class Inner>() {
    each_window(batch_rows<Inner>(plan, turn.team),
                [&](Span window) { run(SacCritic<Inner>(args, plan, window, turn.critic, turn.slot)); });
  });
}

// Steps a critic, once the whole team has its gradients.
static void train_critic(const SacArgs& args, const SacPlan& plan, const CriticTurn& turn,
                         const AdamStep& step) {
  turn.team.wait();
  with_critic(args, plan, turn, [&](const auto& work) { work.train(turn.team, step); });
  // The slot may go to another critic now.
  turn.team.wait();
}

static void sac_sample(const SacArgs& args, const SacPlan& plan, const Team& team, int64_t update) {
  with_factors(args.precision, [&]<class Inner>() {
    const uint32_t step = static_cast<uint32_t>(args.first_draw + update);
    each_window(batch_rows<Inner>(plan, team), [&](Span window) {
      const SacRows<Inner> rows{args, plan, window.first, window.last};
      for (int64_t row = rows.first; row < rows.end(); ++row) rows.draw(row, step);
      // Noise is drawn while the rows are fetched.
      if (args.order != SacOrder::kActorFirst) {
        rows.draw_noise(kNextActionStream, step);
        rows.gather();
        rows.act_next();
        rows.draw_noise(kActionStream, step);
      } else {
        rows.draw_noise(kActionStream, step);
        rows.gather();
      }
      rows.act(plan.observations, plan.actor_hidden, plan.policy_inputs, plan.log_prob);
    });
  });
}

static void sac_next(const SacArgs& args, const SacPlan& plan, const Team& team, int64_t update) {
  with_factors(args.precision, [&]<class Inner>() {
    each_window(batch_rows<Inner>(plan, team), [&](Span window) {
      const SacRows<Inner> rows{args, plan, window.first, window.last};
      rows.draw_noise(kNextActionStream, static_cast<uint32_t>(args.first_draw + update));
      rows.act_next();
    });
  });
}

static void sac_target(const SacArgs& args, const SacPlan& plan, const CriticTurn& turn, int64_t place) {
  each_critic_window(args, plan, turn, [&](const auto& work) {
    work.evaluate(plan.next_inputs, true, work.now(plan.target_hidden), plan.target_q + place * plan.rows);
  });
}

static void sac_critic(const SacArgs& args, const SacPlan& plan, const CriticTurn& turn,
                       const AdamStep& step) {
  each_critic_window(args, plan, turn, [](const auto& work) { work.differentiate(); });
  if (args.order != SacOrder::kSimultaneous) train_critic(args, plan, turn, step);
}

static void sac_evaluate(const SacArgs& args, const SacPlan& plan, const CriticTurn& turn) {
  each_critic_window(args, plan, turn, [](const auto& work) { work.evaluate_policy(); });
}

static void sac_action_gradient(const SacArgs& args, const SacPlan& plan, const CriticTurn& turn,
                                const AdamStep& step) {
  with_critic(args, plan, turn, [](const auto& work) { work.action_gradient(); });
  if (args.order == SacOrder::kSimultaneous) train_critic(args, plan, turn, step);
}

static void sac_actor(const SacArgs& args, const SacPlan& plan, const Team& team, const AdamStep& step) {
  with_factors(args.precision, [&]<class Inner>() {
    const Span mine = batch_rows<Inner>(plan, team);
    each_window(mine,
                [&](Span window) { SacRows<Inner>{args, plan, window.first, window.last}.actor_gradient(); });
    team.wait();
    const SacRows<Inner> rows{args, plan, mine.first, mine.last};
    const Factor head_grad{plan.actor_head_grad, plan.actor_head_grad};
    for (int64_t l = 0; l < args.depth; ++l)
      rows.train(team, plan.actor, l, step, l == 0 ? plan.observations.factor : plan.actor_hidden[l - 1],
                 l > rows.top() ? head_grad : plan.actor_grad[l]);
  });
}
