// The mathematics of MOPO and of its training, written once for host and device over a value type V: one
// float or a vector of them. It is included inside the namespace that has V's functions (exp, select, ...):
// by scalar.h for one float, by cpu/kernels.inl for the vectors of each instruction set. Hence no include
// guard.

// The authors' double soft clamp of the log-variance, as a variance: e^min + 1 / (e^-max + e^-logvar).
template <class V>
MOPO_INLINE V soft_clamp_variance(V exp_minus_logvar, V exp_minus_max, V exp_min) {
  return exp_min + 1.0f / (exp_minus_max + exp_minus_logvar);
}

// The Gaussian negative log-likelihood of a prediction that is off by `error`, its log-variance `raw` softly
// clamped; and the gradient of scale * loss by the mean, by `raw` and by the two bounds.
template <class V>
struct Likelihood {
  V loss, mean_grad, raw_grad, max_grad, min_grad;
};
template <class V>
MOPO_INLINE Likelihood<V> likelihood(V error, V raw, V max_logvar, V exp_minus_max, V exp_min, float scale) {
  // The derivatives in closed form; below_max and above_min are the clamp's two slopes.
  const V below = 1.0f / (exp_minus_max + exp(-raw));
  const V inverse = 1.0f / (exp_min + below);
  const V below_max = 1.0f / (1.0f + exp(raw - max_logvar));
  const V above_min = below * inverse;
  const V scaled = error * error * inverse;
  const V logvar_grad = (1.0f - scaled) * scale;
  return {scaled - log(inverse), 2.0f * scale * error * inverse, logvar_grad * above_min * below_max,
          logvar_grad * above_min * (1.0f - below_max), logvar_grad * exp_min * inverse};
}

// ln(1 + e^x) without overflow.
template <class V>
MOPO_INLINE V softplus(V x) {
  const auto positive = x > 0.0f;
  return select(positive, x, V{}) + log1p(exp(select(positive, -x, x)));
}

// A draw from a Gaussian whose tanh is the action (Haarnoja et al., "Soft Actor-Critic", 2018).
template <class V>
struct SquashedGaussian {
  V log_std;  // clipped
  V noise;    // standard normal
  V spread;   // std * noise
  V raw;      // mean + spread: the action before tanh

  MOPO_METHOD SquashedGaussian(V mean, V raw_log_std, V log_std_min, V log_std_max, V noise) : noise(noise) {
    log_std = select(raw_log_std < log_std_min, log_std_min, raw_log_std);
    log_std = select(log_std > log_std_max, log_std_max, log_std);
    spread = exp(log_std) * noise;
    raw = mean + spread;
  }
  MOPO_METHOD V action() const { return tanh(raw); }
  // That of the action before tanh.
  MOPO_METHOD V log_density() const { return -0.5f * noise * noise - log_std - 0.91893853320f; }
  // log(1 - tanh(raw)^2) without cancellation: the logarithm of the action's slope.
  MOPO_METHOD V log_slope() const { return 2.0f * (0.69314718056f - raw - softplus(-2.0f * raw)); }
  // `epsilon` is added to the slope before its logarithm is taken.
  MOPO_METHOD V log_prob(float epsilon) const {
    if (epsilon > 0.0f) return log_density() - log(exp(log_slope()) + epsilon);
    return log_density() - log_slope();
  }
};

// The gradient of scale * (alpha * log_prob(epsilon) - Q) by the mean and by the log std before the clip.
// `q_grad` is the gradient of -scale * Q by the action. `slope`, exp(log_slope()), only counts with an
// epsilon.
template <class V>
struct SquashedGradient {
  V mean, log_std;
};
template <class V>
MOPO_INLINE SquashedGradient<V> squashed_gradient(V action, V spread, V raw_log_std, float log_std_min,
                                                  float log_std_max, float epsilon, V slope, V q_grad,
                                                  float alpha, float scale) {
  const auto free = (raw_log_std >= log_std_min) & (raw_log_std <= log_std_max);
  const auto result = [&](V mean_grad) -> SquashedGradient<V> {
    return {mean_grad, select(free, mean_grad * spread - alpha * scale, V{})};
  };
  const V through_action = q_grad * (1.0f - action * action);
  if (epsilon > 0.0f)
    return result(alpha * scale * 2.0f * action * (slope / (slope + epsilon)) + through_action);
  return result(alpha * scale * 2.0f * action + through_action);
}

// One step of Adam, its arithmetic in T. Adam has no weight decay here: `gradient` includes it.
template <class T, class V, class Gradient>
MOPO_INLINE void adam(const AdamStep& step, Gradient gradient, V& value, V& exp_avg, V& exp_avg_sq) {
  exp_avg = static_cast<V>(exp_avg + (gradient - exp_avg) * static_cast<T>(1.0 - kBeta1));
  exp_avg_sq = static_cast<V>(exp_avg_sq * static_cast<T>(kBeta2) +
                              gradient * gradient * static_cast<T>(1.0 - kBeta2));
  const auto divisor = fast_sqrt(exp_avg_sq) * step.root_correction + static_cast<T>(step.epsilon);
  value = value - static_cast<V>(fast_quotient(step.size * exp_avg, divisor));
}

// The larger of two values. A NaN on either side is the result, so that it is never hidden.
template <class V>
MOPO_INLINE V nan_max(V a, V b) {
  return select((b > a) | (b != b), b, a);
}

// Compensated summation (Kahan): the error does not grow with the number of dimensions, which may be 400.
template <class V>
struct KahanSum {
  V value{}, lost{};

  MOPO_METHOD void add(V x) {
    const V corrected = x - lost;
    const V total = value + corrected;
    lost = (total - value) - corrected;
    value = total;
  }
};

// The uncertainty penalty u(s, a) over `count` members. mean(i, d) and variance(i, d) are those of member i;
// dimension d = obs_dim is the reward. Several threads may share a row: each takes the dimensions first,
// first + apart, ..., and sum(V) adds up the threads' parts. A thread on its own has first = 0, apart = 1.
template <class V, class Mean, class Variance, class Sum>
MOPO_INLINE V penalise(Penalty penalty, int count, int obs_dim, Mean mean, Variance variance, int first,
                       int apart, Sum sum) {
  const auto square = [](V x) { return x * x; };
  const float inverse_count = 1.0f / static_cast<float>(count);
  const auto centre = [&](int d) {
    V total{};
    for (int i = 0; i < count; ++i) total = total + mean(i, d);
    return total * inverse_count;
  };
  V largest{};
  // The root of the members' largest sum of terms(d)(i). Four members at a time: their loads overlap, and
  // their sums fit a GPU's registers.
  const auto take_largest = [&](int dims, auto terms) {
    constexpr int kTogether = 4;
    for (int i = 0; i < count; i += kTogether) {
      KahanSum<V> totals[kTogether];
      for (int d = first; d < dims; d += apart) {
        const auto term = terms(d);
        for (int j = 0; j < kTogether; ++j)
          if (i + j < count) totals[j].add(term(i + j));
      }
      for (int j = 0; j < kTogether; ++j) largest = nan_max(largest, sum(totals[j].value));
    }
    return sqrt(largest);
  };
  if (penalty == Penalty::kMaxAleatoric)
    return take_largest(obs_dim + 1, [&](int d) { return [&, d](int i) { return variance(i, d); }; });
  if (penalty == Penalty::kMaxDeviation)
    return take_largest(obs_dim, [&](int d) {
      return [&, d, middle = centre(d)](int i) { return square(mean(i, d) - middle); };
    });
  if (penalty == Penalty::kMaxPairwise) {
    for (int i = 0; i < count; ++i)
      for (int j = 0; j < i; ++j) {
        KahanSum<V> total;
        for (int d = first; d < obs_dim; d += apart) total.add(square(mean(i, d) - mean(j, d)));
        largest = nan_max(largest, sum(total.value));
      }
    return sqrt(largest);
  }
  // kEnsembleStd and kMixtureStd: the members' variance, summed over dimensions.
  const bool mixture = penalty == Penalty::kMixtureStd;
  const int dims = mixture ? obs_dim + 1 : obs_dim;
  KahanSum<V> total;
  for (int d = first; d < dims; d += apart) {
    const V middle = centre(d);
    for (int i = 0; i < count; ++i) {
      total.add(square(mean(i, d) - middle));
      if (mixture) total.add(variance(i, d));
    }
  }
  return sqrt(sum(total.value) * (mixture ? inverse_count : inverse_count / static_cast<float>(obs_dim)));
}
