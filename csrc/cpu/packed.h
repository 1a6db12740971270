// A network's weights in the layout of PackedNetwork, in memory of its own.
#pragma once

#include <vector>

#include "arena.h"
#include "kernels.h"

namespace mopo {

class Packed {
 public:
  Packed(const Network& network, const Packing& packing);
  Packed(Packed&&) = default;

  const PackedNetwork& view() const { return view_; }

  // False if a network of the same sizes has other biases in its last layer than were packed. Any step of an
  // optimiser changes these, and comparing them takes no time.
  bool resembles(const Network& network) const;

 private:
  struct Place {
    int64_t in, out, words, width;
  };

  // The word with input k of output n, and the first bias, counted from the layer's start.
  int64_t place(const Place& layer, int64_t k, int64_t n) const;
  int64_t bias(const Place& layer) const;
  void pack(const NetworkLayer& layer, int64_t member, int64_t l, float* to) const;

  Packing packing_;
  int64_t networks_;
  std::vector<Place> layers_;
  std::vector<int64_t> offset_;
  Arena arena_;
  PackedNetwork view_{};
};

}  // namespace mopo
