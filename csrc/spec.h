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

// A sum that carries its rounding error along (Kahan): as good for 400 dimensions as for 4.
template <class V>
struct Sum {
  V value{}, lost{};

  MOPO_METHOD void add(V x) {
    const V corrected = x - lost;
    const V total = value + corrected;
    lost = (total - value) - corrected;
    value = total;
  }
};

// u(s, a) over `count` members; mean(i, d) and variance(i, d) give V for the i-th of them, d = obs_dim is the
// reward. Of the dimensions a caller takes `first` and every `apart`-th one on, and sum(V) adds up what those
// who share a row have.
template <class V, class Mean, class Variance, class Share>
MOPO_INLINE V penalise(Penalty penalty, int count, int obs_dim, Mean mean, Variance variance, int first,
                       int apart, Share sum) {
  const auto square = [](V x) { return x * x; };
  const float share = 1.0f / static_cast<float>(count);
  const auto centre = [&](int d) {
    V total{};
    for (int i = 0; i < count; ++i) total = total + mean(i, d);
    return total * share;
  };
  V largest{};
  // The members' largest sum of terms(d)(i), some members at a time: what they read does not wait for one
  // another, and their sums are no more than a GPU has registers for.
  const auto take_largest = [&](int dims, auto terms) {
    constexpr int kTogether = 4;
    for (int i = 0; i < count; i += kTogether) {
      Sum<V> totals[kTogether];
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
        Sum<V> total;
        for (int d = first; d < obs_dim; d += apart) total.add(square(mean(i, d) - mean(j, d)));
        largest = nan_max(largest, sum(total.value));
      }
    return sqrt(largest);
  }
  // The members' variance, summed over dimensions.
  const bool mixture = penalty == Penalty::kMixtureStd;
  const int dims = mixture ? obs_dim + 1 : obs_dim;
  Sum<V> total;
  for (int d = first; d < dims; d += apart) {
    const V middle = centre(d);
    for (int i = 0; i < count; ++i) {
      total.add(square(mean(i, d) - middle));
      if (mixture) total.add(variance(i, d));
    }
  }
  return sqrt(sum(total.value) * (mixture ? share : share / static_cast<float>(obs_dim)));
}
