// Packs a network's weights for the rollout.
#include "packed.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace mopo {
namespace {

// Rounds to nearest, ties to even; a NaN stays a NaN.
uint32_t round_to_bfloat16(float x) {
  if (x != x) return 0x7fc0;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// x less its value in bfloat16.
float bfloat16_error(float x) { return x - std::bit_cast<float>(round_to_bfloat16(x) << 16); }

float pair(float first, float second) {
  return std::bit_cast<float>(round_to_bfloat16(first) | round_to_bfloat16(second) << 16);
}

}  // namespace

Packed::Packed(const Network& network, const Packing& packing)
    : packing_(packing), networks_(network.networks) {
  int64_t stride = 0;
  for (int64_t l = 0; l < network.depth; ++l) {
    const int64_t in = network.layers[l].in, out = network.layers[l].out;
    const int64_t words = round_up((in + packing.terms - 1) / packing.terms, packing.words);
    layers_.push_back({in, out, words, round_up(out, packing.outputs)});
    offset_.push_back(stride);
    stride += (words * packing.parts + 1) * layers_.back().width;
  }
  float* data = nullptr;
  arena_.take(data, stride * networks_);
  arena_.allocate_zeroed();
  arena_.take(data, stride * networks_);
  for (int64_t member = 0; member < networks_; ++member)
    for (int64_t l = 0; l < network.depth; ++l)
      pack(network.layers[l], member, l, data + member * stride + offset_[l]);
  view_ = {data, stride, offset_.data()};
}

int64_t Packed::place(const Place& layer, int64_t k, int64_t n) const {
  const int64_t outputs = packing_.outputs, together = packing_.words, word = k / packing_.terms;
  const int64_t group = n / outputs * (layer.words / together) + word / together;
  return (group * packing_.parts * outputs + n % outputs) * together + word % together;
}

int64_t Packed::bias(const Place& layer) const { return layer.words * packing_.parts * layer.width; }

void Packed::pack(const NetworkLayer& layer, int64_t member, int64_t l, float* to) const {
  const float* weight = layer.weight + member * layer.in * layer.out;
  for (int64_t k = 0; k < layer.in; k += packing_.terms)
    for (int64_t n = 0; n < layer.out; n += packing_.outputs) {
      float* target = to + place(layers_[l], k, n);
      const float* first = weight + k * layer.out + n;
      const int64_t count = std::min<int64_t>(packing_.outputs, layer.out - n), apart = packing_.words;
      float* low = target + packing_.outputs * packing_.words;
      for (int64_t j = 0; j < count; ++j) {
        const float x = first[j], y = k + 1 < layer.in ? first[layer.out + j] : 0.0f;
        target[j * apart] = packing_.terms == 1 ? x : pair(x, y);
        if (packing_.parts == 2) low[j * apart] = pair(bfloat16_error(x), bfloat16_error(y));
      }
    }
  std::copy_n(layer.bias + member * layer.out, layer.out, to + bias(layers_[l]));
}

bool Packed::resembles(const Network& network) const {
  const size_t last = layers_.size() - 1;
  const int64_t out = layers_[last].out;
  for (int64_t member = 0; member < networks_; ++member) {
    const float* packed = view_.data + member * view_.member_stride + offset_[last] + bias(layers_[last]);
    if (std::memcmp(packed, network.layers[last].bias + member * out, out * sizeof(float)) != 0) return false;
  }
  return true;
}

}  // namespace mopo
