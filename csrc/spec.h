// The mathematics of MOPO, once, for host and device: over a value type V, one float or a vector of them.
// Included where select(mask, yes, no) and sqrt(V) are in scope, once per instruction set, in its namespace.

// The authors' double soft clamp of the log-variance, as a variance: e^min + 1 / (e^-max + e^-logvar).
template <class V>
MOPO_INLINE V soft_clamp_variance(V exp_minus_logvar, V exp_minus_max, V exp_min) {
  return exp_min + 1.0f / (exp_minus_max + exp_minus_logvar);
}

// The larger one; a NaN on either side wins, so that it is never hidden.
template <class V>
MOPO_INLINE V nan_max(V a, V b) {
  return select((b > a) | (b != b), b, a);
}

// u(s, a) over `count` members; mean(i, d) and variance(i, d) give V for the i-th of them, d = obs_dim is the
// reward.
template <class V, class Mean, class Variance>
MOPO_INLINE V penalise(Penalty penalty, int count, int obs_dim, Mean mean, Variance variance) {
  V result{};
  if (penalty == Penalty::kMaxAleatoric) {
    for (int i = 0; i < count; ++i) {
      V sum{};
      for (int d = 0; d <= obs_dim; ++d) sum = sum + variance(i, d);
      result = nan_max(result, sum);
    }
    return sqrt(result);
  }
  if (penalty == Penalty::kMaxPairwise) {
    for (int i = 0; i < count; ++i) {
      for (int j = 0; j < i; ++j) {
        V sum{};
        for (int d = 0; d < obs_dim; ++d) {
          const V difference = mean(i, d) - mean(j, d);
          sum = sum + difference * difference;
        }
        result = nan_max(result, sum);
      }
    }
    return sqrt(result);
  }
  const float share = 1.0f / static_cast<float>(count);
  const auto centre = [&](int d) {
    V sum{};
    for (int i = 0; i < count; ++i) sum = sum + mean(i, d);
    return sum * share;
  };
  if (penalty == Penalty::kMaxDeviation) {
    V sums[kMaxMembers]{};
    for (int d = 0; d < obs_dim; ++d) {
      const V middle = centre(d);
      for (int i = 0; i < count; ++i) {
        const V difference = mean(i, d) - middle;
        sums[i] = sums[i] + difference * difference;
      }
    }
    for (int i = 0; i < count; ++i) result = nan_max(result, sums[i]);
    return sqrt(result);
  }
  // Variance over members, summed over dimensions.
  const bool mixture = penalty == Penalty::kMixtureStd;
  for (int d = 0; d < obs_dim + (mixture ? 1 : 0); ++d) {
    const V middle = centre(d);
    for (int i = 0; i < count; ++i) {
      const V difference = mean(i, d) - middle;
      result = result + difference * difference;
      if (mixture) result = result + variance(i, d);
    }
  }
  result = result * share;
  if (!mixture) result = result * (1.0f / static_cast<float>(obs_dim));
  return sqrt(result);
}
