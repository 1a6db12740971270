// The rollout: one thread takes a chunk of rollouts, in tiles of rows, through all steps. The lanes of a
// vector are rows of a tile.

static vi is_finite(vf x) { return (float_to_bits(x) & 0x7f800000) != 0x7f800000; }

// One layer for the first `vectors` vectors of a tile's rows, on AMX tiles where the operand has them.
template <class Operand, class Write>
MOPO_INLINE void apply_layer(const NetworkLayer& layer, const float* weight, const float* in, int vectors,
                             Write write) {
  const int64_t width = round_up(layer.out, Operand::kPacking.outputs);
  const float* bias = weight + packed_words<Operand>(layer.in) * kParts<Operand> * width;
#ifdef MOPO_AMX
  if constexpr (Operand::kPacking.terms == 2) {
    layer_amx<Operand>(in, layer.in, weight, bias, layer.out, vectors, write);
  } else
#endif
    layer_tile<Operand>(in, layer.in, weight, bias, layer.out, vectors, write);
}

// A layer norm of outputs x, for each lane.
struct LayerNorm {
  vf mean, inverse_std;

  LayerNorm() = default;
  MOPO_METHOD LayerNorm(vf mean, vf variance) : mean(mean) {
    inverse_std = 1.0f / sqrt(variance + kLayerNormEpsilon);
  }
  MOPO_METHOD vf apply(vf x, float scale, float shift) const {
    return (x - mean) * inverse_std * scale + shift;
  }
};

// The layer norm of `count` outputs, of which number n is x(n).
template <class Outputs>
MOPO_INLINE LayerNorm layer_norm(int64_t count, Outputs x) {
  // Four sums at a time, since an addition has to wait for the one before.
  const auto average = [&](auto term) {
    vf sums[4] = {};
    int64_t n = 0;
    for (; n + 4 <= count; n += 4)
      for (int i = 0; i < 4; ++i) sums[i] = sums[i] + term(n + i);
    for (; n < count; ++n) sums[0] = sums[0] + term(n);
    return (sums[0] + sums[1] + (sums[2] + sums[3])) * (1.0f / static_cast<float>(count));
  };
  const vf near = average(x);
  // The mean's own error, which matters where the outputs are almost equal.
  const vf mean = near + average([&](int64_t n) { return x(n) - near; });
  // Unlike the mean of squares less the square of the mean, this does not cancel.
  return LayerNorm(mean, average([&](int64_t n) {
                     const vf distance = x(n) - mean;
                     return distance * distance;
                   }));
}

// The same by one pass, for factors that are rounded: sums over the outputs while a layer writes them. They
// are counted from the first one, which is within some deviations of the mean, so that little cancels.
struct Moments {
  vf first, total{}, squares{};

  MOPO_METHOD void add(int64_t n, const vf (&outputs)[kBlock], int64_t width) {
    if (n == 0) first = outputs[0];
    const int64_t count = smaller(kBlock, width - n);
    // Four sums, since an addition has to wait for the one before.
    vf sums[4] = {}, products[4] = {};
    const auto take = [&](int j) {
      const vf distance = outputs[j] - first;
      sums[j % 4] = sums[j % 4] + distance;
      products[j % 4] = products[j % 4] + distance * distance;
    };
    if (count == kBlock) {
#pragma GCC unroll 8
      for (int j = 0; j < kBlock; ++j) take(j);
    } else {
      for (int j = 0; j < count; ++j) take(j);
    }
    total = total + (sums[0] + sums[1] + (sums[2] + sums[3]));
    squares = squares + (products[0] + products[1] + (products[2] + products[3]));
  }
  MOPO_METHOD LayerNorm norm(int64_t width) const {
    const float inverse_width = 1.0f / static_cast<float>(width);
    const vf distance = total * inverse_width;
    const vf variance = squares * inverse_width - distance * distance;
    // A variance that is not a number stays one, so that the rollout ends.
    return LayerNorm(first + distance, select(variance < 0.0f, vf{}, variance));
  }
};

// Turns a layer's outputs `raw`, floats, into inputs of the next one: layer norm, then activation.
template <class Operand, Activation activation>
MOPO_INLINE void normalise(const NetworkLayer& layer, int64_t member, int vectors, const LayerNorm* norms,
                           const float* raw, float* to) {
  const float* scale = layer.norm_scale + member * layer.out;
  const float* shift = layer.norm_shift + member * layer.out;
  for (int64_t n = 0; n < layer.out; n += kBlock)
    for (int v = 0; v < vectors; ++v) {
      vf outputs[kBlock];
      const auto put = [&](int j) {
        const vf x = load(raw + (n + j) * kTile<Operand> + v * W);
        outputs[j] = norms[v].apply(x, scale[n + j], shift[n + j]);
      };
      if (layer.out - n >= kBlock) {
#pragma GCC unroll 8
        for (int j = 0; j < kBlock; ++j) put(j);
      } else {
        for (int j = 0; j < kBlock; ++j) {
          if (n + j < layer.out)
            put(j);
          else
            outputs[j] = vf{};
        }
      }
      write_operands<Operand, activation>(to, n, v, outputs);
    }
}

// A hidden layer with a layer norm. The outputs before it pass through `raw`.
template <class Operand, Activation activation>
MOPO_INLINE void normed_layer(const NetworkLayer& layer, int64_t member, const float* weight, const float* in,
                              int vectors, float* raw, float* to) {
  constexpr bool kOnePass = Operand::kPacking.terms > 1;
  Moments moments[kTile<Operand> / W];
  LayerNorm norms[kTile<Operand> / W];
  apply_layer<Operand>(layer, weight, in, vectors, [&](int64_t n, int v, vf(&outputs)[kBlock]) {
    write_floats<Operand>(raw, n, v, outputs);
    if constexpr (kOnePass) moments[v].add(n, outputs, layer.out);
  });
  for (int v = 0; v < vectors; ++v) {
    if constexpr (kOnePass)
      norms[v] = moments[v].norm(layer.out);
    else
      norms[v] = layer_norm(layer.out, [&](int64_t n) { return load(raw + n * kTile<Operand> + v * W); });
  }
  normalise<Operand, activation>(layer, member, vectors, norms, raw, to);
}

// A member's network for the first `vectors` vectors of a tile's rows. Activations pass between two buffers,
// `here` and `there`; `out` receives the last layer's outputs as floats.
template <class Operand, Activation activation>
static void network_tile(const Network& network, const PackedNetwork& packed, int64_t member, int vectors,
                         const float* in, const LayerBuffers& buffers, float* out) {
  float *here = buffers.in, *there = buffers.out;
  const float* data = packed.data + member * packed.member_stride;
  in = as_operands<Operand>(in, network.layers[0].in, vectors, there);
  const int64_t hidden = network.depth - 1;
  for (int64_t l = 0; l < hidden; ++l) {
    const NetworkLayer& layer = network.layers[l];
    if (layer.norm_scale != nullptr) {
      normed_layer<Operand, activation>(layer, member, data + packed.offset[l], in, vectors, buffers.raw,
                                        here);
    } else {
      apply_layer<Operand>(layer, data + packed.offset[l], in, vectors,
                           [&](int64_t n, int v, vf(&outputs)[kBlock]) {
                             write_operands<Operand, activation>(here, n, v, outputs);
                           });
    }
    fill_up<Operand>(here, layer.out);
    in = here;
    here = there;
    there = const_cast<float*>(in);
  }
  apply_layer<Operand>(
      network.layers[hidden], data + packed.offset[hidden], in, vectors,
      [&](int64_t n, int v, vf(&outputs)[kBlock]) { write_floats<Operand>(out, n, v, outputs); });
}

// The layer norm of at most kFewRows rows, each `stride` floats after the one before, in place. Lanes are
// rows, as in normalise(), so that the result is the same to the bit.
static void normalise_rows(const NetworkLayer& layer, int64_t member, int64_t rows, int64_t stride,
                           float* outputs) {
  const auto x = [&](int64_t n) {
    vf result{};
    for (int64_t row = 0; row < rows; ++row) result[row] = outputs[row * stride + n];
    return result;
  };
  const LayerNorm norm = layer_norm(layer.out, x);
  for (int64_t n = 0; n < layer.out; ++n) {
    const int64_t at = member * layer.out + n;
    const vf result = norm.apply(x(n), layer.norm_scale[at], layer.norm_shift[at]);
    for (int64_t row = 0; row < rows; ++row) outputs[row * stride + n] = result[row];
  }
}

// network_tile for at most kFewRows rows in float32. Spare lanes of `out` repeat the last row.
template <Activation activation>
static void network_rows(const Network& network, const PackedNetwork& packed, int64_t member, int64_t rows,
                         const float* in, const LayerBuffers& buffers, float* out) {
  float *here = buffers.in, *there = buffers.out;
  const float* data = packed.data + member * packed.member_stride;
  const NetworkLayer* layers = network.layers;
  int64_t stride = round_up(layers[0].in, kWidthMultiple);
  for (int64_t l = 0; l < network.depth; ++l) {
    const int64_t width = round_up(layers[l].out, kWidthMultiple);
    stride = width > stride ? width : stride;
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t k = 0; k < layers[0].in; ++k) here[row * stride + k] = in[k * kTile<Float32> + row];
  for (int64_t l = 0; l < network.depth; ++l) {
    const float* weight = data + packed.offset[l];
    const int64_t depth = layers[l].in, width = layers[l].out;
    layer_rows(here, rows, stride, depth, weight, weight + depth * round_up(width, kBlock), width, there);
    float* done = here;
    here = there;
    there = done;
    if (l == network.depth - 1) break;
    if (layers[l].norm_scale != nullptr) normalise_rows(layers[l], member, rows, stride, here);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t n = 0; n < width; n += W) {
        float* x = here + row * stride + n;
        store(x, activate<activation>(load(x)));
      }
  }
  const int64_t lanes = round_up(rows, W);
  for (int64_t n = 0; n < layers[network.depth - 1].out; ++n)
    for (int64_t lane = 0; lane < lanes; ++lane)
      out[n * kTile<Float32> + lane] = here[smaller(lane, rows - 1) * stride + n];
}

template <class Operand>
static void network_tile(const Network& network, const PackedNetwork& packed, int64_t member, int64_t rows,
                         const float* in, const LayerBuffers& layers, float* out) {
  const auto run = [&]<Activation activation>(std::integral_constant<Activation, activation>) {
    if constexpr (Operand::kPacking.terms == 1)
      if (rows <= kFewRows) return network_rows<activation>(network, packed, member, rows, in, layers, out);
    const int vectors = static_cast<int>((rows + W - 1) / W);
    network_tile<Operand, activation>(network, packed, member, vectors, in, layers, out);
  };
  switch (network.activation) {
    case Activation::kSilu:
      return run(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kRelu:
      return run(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kTanh:
      return run(std::integral_constant<Activation, Activation::kTanh>{});
  }
}

// Draws `count` standard normals for each of `lanes` lanes into to [count, rounded up to 4][kTile].
// block(lane, number) are the words of a lane.
template <int kTile, class Block>
MOPO_INLINE void fill_normals(float* to, int64_t lanes, int64_t count, Block block) {
  for (int64_t v = 0; v < lanes; v += W)
    for (int64_t d = 0; d < count; d += 4) {
      PhiloxBlock blocks[W];
      for (int lane = 0; lane < W; ++lane) blocks[lane] = block(v + lane, static_cast<uint32_t>(d / 4));
      vf normals[4];
      box_muller(blocks, normals);
      for (int i = 0; i < 4; ++i) store(to + (d + i) * kTile + v, normals[i]);
    }
}

// The processor's state that an operand's products need: on AMX, the configuration of the tiles. No object of
// it may be alive while a call looks for signals, since their handlers may use AMX themselves.
struct NoTiles {
  NoTiles() {}
};
template <class Operand>
using TileState = std::conditional_t<Operand::kPacking.terms == 2, Tiles, NoTiles>;

// Rows that pass through the networks together: the rollouts ws.alive[begin .. begin + count).
struct Tile {
  static constexpr int64_t kEveryMember = -1;

  int64_t begin, count;
  int64_t slot;    // number of its memory in the workspace
  int64_t member;  // that computes it, or kEveryMember

  // Lanes in use. Those beyond `count` repeat the last row.
  int64_t lanes() const { return round_up(count, W); }
};

// A chunk of rollouts on its way through all steps, on one thread.
template <class Operand>
struct Chunk {
  static constexpr int kTile = Operand::kPacking.tile;

  const RolloutArgs& args;
  const RolloutPlan& plan;
  RolloutWorkspace& ws;
  ChunkOutput& made;
  const int64_t first;  // the chunk's first start state
  int64_t alive;        // rollouts that go on, ws.alive[0 .. alive)
  int64_t t;

  // About four million multiply-adds, beside which looking for an interrupt costs nothing.
  int64_t tiles_between_looks() const { return 1 + (int64_t{1} << 22) / plan.dynamics.member_stride; }
  // Index in the chunk of the rollout in a lane.
  int64_t rollout_at(const Tile& tile, int64_t lane) const {
    return ws.alive[tile.begin + smaller(lane, tile.count - 1)];
  }
  int64_t row_of(int64_t rollout) const { return rollout * args.horizon + t; }
  int64_t outputs() const { return round_up(2 * (args.obs_dim + 1), kWidthMultiple); }
  float* observations(const Tile& tile) const { return ws.observations + tile.slot * args.obs_dim * kTile; }
  float* actions(const Tile& tile) const { return ws.actions + tile.slot * args.act_dim * kTile; }
  float* inputs(const Tile& tile) const {
    return ws.inputs + tile.slot * (args.obs_dim + args.act_dim) * kTile;
  }
  float* predictions(const Tile& tile, int64_t member) const {
    if (tile.member != Tile::kEveryMember) return ws.predictions;
    return ws.predictions + (tile.slot * args.dynamics.networks + member) * outputs() * kTile;
  }

  // All steps; an interrupted call ends in the middle of one.
  void run() {
    const bool one_member = computes_one_member(args);
    for (t = 0; t < args.horizon && alive > 0; ++t) {
      if (interrupted(*plan.interrupt)) return;
      const int64_t survivors = one_member ? step_of_drawn_members() : step_of_every_member();
      if (survivors < 0) return;
      int64_t* ended = ws.alive;
      ws.alive = ws.survivors;
      ws.survivors = ended;
      alive = survivors;
    }
  }

  // One step in which every member computes every row. Returns the number of survivors, or -1 if interrupted.
  int64_t step_of_every_member() {
    const int64_t tiles = (alive + kTile - 1) / kTile;
    const auto tile_at = [&](int64_t i) {
      return Tile{i * kTile, smaller(kTile, alive - i * kTile), i, Tile::kEveryMember};
    };
    {
      const TileState<Operand> tile_state;
      for (int64_t i = 0; i < tiles; ++i) prepare(tile_at(i));
    }
    // Members outside, tiles inside: a member's weights stay in the second-level cache. Members are taken to
    // and fro, since the last ones' weights are still there at the next step or call. With few rows the time
    // is that of reading the weights.
    static thread_local bool to_and_fro = false;
    to_and_fro = !to_and_fro;
    const int64_t members = args.dynamics.networks;
    for (int64_t place = 0; place < members; ++place)
      for (int64_t i = 0; i < tiles;) {
        const int64_t member = to_and_fro ? place : members - 1 - place;
        if (interrupted(*plan.interrupt)) return -1;
        const TileState<Operand> tile_state;
        for (const int64_t end = smaller(tiles, i + tiles_between_looks()); i < end; ++i)
          predict(tile_at(i), member);
      }
    int64_t survivors = 0;
    for (int64_t i = 0; i < tiles; ++i) survivors = finish(tile_at(i), survivors);
    return survivors;
  }

  // One step in which only the drawn member computes a row. The rows of a member fill tiles, which pass one
  // by one through the same memory. Returns likewise.
  int64_t step_of_drawn_members() {
    group_by_member();
    int64_t survivors = 0, until_look = 0, begin = 0;
    for (int64_t member = 0; member < args.dynamics.networks; ++member)
      for (const int64_t end = ws.group_end[member]; begin < end;) {
        if (interrupted(*plan.interrupt)) return -1;
        const TileState<Operand> tile_state;
        for (until_look = tiles_between_looks(); begin < end && until_look > 0; --until_look) {
          const Tile tile{begin, smaller(kTile, end - begin), 0, member};
          fetch(tile);
          prepare(tile);
          predict(tile, member);
          survivors = finish(tile, survivors);
          begin += tile.count;
        }
      }
    return survivors;
  }

  // Asks for the memory that finish() will write. The rows of a group lie apart, in more memory than is
  // cached.
  void fetch(const Tile& tile) const {
    for (int64_t lane = 0; lane < tile.count; ++lane) {
      const int64_t row = row_of(rollout_at(tile, lane));
      const auto ask = [&](auto* array, int64_t width) {
        const char* end = reinterpret_cast<const char*>(array + (row + 1) * width);
        for (const char* p = reinterpret_cast<const char*>(array + row * width); p < end; p += 64)
          __builtin_prefetch(p, 1);
      };
      ask(made.observations, args.obs_dim);
      ask(made.actions, args.act_dim);
      ask(made.next_observations, args.obs_dim);
      ask(made.rewards, 1);
      ask(made.raw_rewards, 1);
      ask(made.terminals, 1);
      ask(made.members, 1);
      ask(made.rollout_index, 1);
      ask(made.step, 1);
    }
  }

  // Draws a member for each row and sorts ws.alive by it. ws.group_end[member] is the end of a member's rows.
  void group_by_member() {
    int64_t* end = ws.group_end;
    for (int64_t member = 0; member <= args.dynamics.networks; ++member) end[member] = 0;
    for (int64_t i = 0; i < alive; ++i) {
      ws.drawn[i] = draw_member(ws.alive[i]);
      ++end[ws.drawn[i] + 1];
    }
    // First the beginnings of the groups, which filling them moves to their ends.
    for (int64_t member = 0; member < args.dynamics.networks; ++member) end[member + 1] += end[member];
    for (int64_t i = 0; i < alive; ++i) ws.survivors[end[ws.drawn[i]]++] = ws.alive[i];
    int64_t* unsorted = ws.alive;
    ws.alive = ws.survivors;
    ws.survivors = unsorted;
  }

  void prepare(const Tile& tile) {
    load_observations(tile);
    if (args.policy.depth > 0) {
      act(tile);
    } else {
      load_actions(tile);
    }
    standardise(tile);
  }

  void predict(const Tile& tile, int64_t member) {
    network_tile<Operand>(args.dynamics, plan.dynamics, member, tile.count, inputs(tile), ws.layers,
                          predictions(tile, member));
  }

  void load_observations(const Tile& tile) const {
    float* to = observations(tile);
    for (int64_t lane = 0; lane < tile.lanes(); ++lane) {
      const int64_t r = rollout_at(tile, lane);
      const float* from = t == 0 ? args.start + (first + r) * args.obs_dim
                                 : made.next_observations + (row_of(r) - 1) * args.obs_dim;
      for (int64_t d = 0; d < args.obs_dim; ++d) to[d * kTile + lane] = from[d];
    }
  }

  void load_actions(const Tile& tile) const {
    float* to = actions(tile);
    for (int64_t lane = 0; lane < tile.lanes(); ++lane) {
      const float* from = args.actions + (first + rollout_at(tile, lane)) * args.act_dim;
      for (int64_t d = 0; d < args.act_dim; ++d) to[d * kTile + lane] = from[d];
    }
  }

  void act(const Tile& tile) const {
    // The policy's means and log stds lie where the first member's predictions will be.
    float* heads = predictions(tile, 0);
    network_tile<Operand>(args.policy, plan.policy, 0, tile.count, observations(tile), ws.layers, heads);
    if (!args.mean_actions) draw_normals(tile, kActionStream, args.act_dim);
    for (int64_t d = 0; d < args.act_dim; ++d)
      for (int64_t i = d * kTile; i < d * kTile + tile.lanes(); i += W) {
        vf x = load(heads + i);
        if (!args.mean_actions)
          x = SquashedGaussian(x, load(heads + args.act_dim * kTile + i), broadcast(args.log_std_min),
                               broadcast(args.log_std_max), load(ws.noise + i))
                  .raw;
        store(actions(tile) + i, tanh(x));
      }
  }

  void standardise(const Tile& tile) const {
    const auto convert = [&](const float* from, int64_t dim, int64_t begin) {
      for (int64_t d = 0; d < dim; ++d) {
        float* to = inputs(tile) + (begin + d) * kTile;
        for (int64_t lane = 0; lane < tile.lanes(); lane += W)
          store(to + lane,
                (load(from + d * kTile + lane) - args.input_mean[begin + d]) * plan.inverse_std[begin + d]);
      }
    };
    convert(observations(tile), args.obs_dim, 0);
    convert(actions(tile), args.act_dim, args.obs_dim);
  }

  PhiloxBlock random(int64_t rollout, PhiloxStream stream, uint32_t block) const {
    return random_block(args.rows[first + rollout], args.first_step + static_cast<uint32_t>(t), stream, block,
                        args.seed);
  }

  // The word that draws a rollout's member. A member that is kept is drawn by the first step's number.
  uint32_t member_word(int64_t rollout) const {
    const uint32_t step = args.keep_member ? 0 : args.first_step + static_cast<uint32_t>(t);
    return random_block(args.rows[first + rollout], step, kMemberStream, 0, args.seed).word[0];
  }

  uint32_t draw_member(int64_t rollout) const {
    const uint32_t elite = choose(member_word(rollout), static_cast<uint32_t>(args.num_elites));
    return static_cast<uint32_t>(args.elites[elite]);
  }

  // Draws `count` standard normals for each row into ws.noise [count, rounded up to 4][tile].
  void draw_normals(const Tile& tile, PhiloxStream stream, int64_t count) const {
    fill_normals<kTile>(ws.noise, tile.lanes(), count, [&](int64_t lane, uint32_t block) {
      return random(rollout_at(tile, lane), stream, block);
    });
  }

  // Penalty, sample, termination and output of one tile. Appends the rollouts that go on to ws.survivors,
  // which has `survivors` of them, and returns the new number.
  int64_t finish(const Tile& tile, int64_t survivors) {
    const int64_t obs_dim = args.obs_dim, members = args.dynamics.networks;
    bound_variances(tile);
    uint32_t drawn[kTile];
    if (!args.deterministic) {
      draw_normals(tile, kNoiseStream, obs_dim + 1);
      for (int64_t lane = 0; lane < tile.lanes(); ++lane)
        drawn[lane] = tile.member == Tile::kEveryMember ? draw_member(rollout_at(tile, lane))
                                                        : static_cast<uint32_t>(tile.member);
    }
    float* next = ws.layers.in;  // [obs_dim][tile]
    alignas(64) float raw[kTile], reward[kTile], penalty[kTile];
    alignas(64) int32_t finite[kTile], inside[kTile], truncated[kTile];
    for (int64_t v = 0; v < tile.lanes(); v += W) {
      const auto mean = [&](int64_t member, int64_t d) {
        return load(predictions(tile, member) + d * kTile + v);
      };
      const auto variance = [&](int64_t member, int64_t d) { return mean(member, obs_dim + 1 + d); };
      const auto sample = [&](int64_t d) {
        vf centre{}, spread{};
        if (args.deterministic) {
          for (int64_t member = 0; member < members; ++member) centre = centre + mean(member, d);
          return centre * (1.0f / static_cast<float>(members));
        }
        if (tile.member != Tile::kEveryMember) {
          centre = mean(tile.member, d);
          spread = variance(tile.member, d);
        } else {
          for (int lane = 0; lane < W; ++lane) {
            const float* from = predictions(tile, drawn[v + lane]) + v + lane;
            centre[lane] = from[d * kTile];
            spread[lane] = from[(obs_dim + 1 + d) * kTile];
          }
        }
        return centre + sqrt(spread) * load(ws.noise + d * kTile + v);
      };
      const vf raw_reward = sample(obs_dim);
      vf penalised = raw_reward;
      vi is_truncated{};
      if (args.penalties) {
        const vf u = penalise<vf>(
            args.penalty, static_cast<int>(args.num_penalty_members), static_cast<int>(obs_dim),
            [&](int i, int d) { return mean(args.penalty_members[i], d); },
            [&](int i, int d) { return variance(args.penalty_members[i], d); }, 0, 1, [](vf x) { return x; });
        penalised = raw_reward - args.penalty_coef * u;
        is_truncated = u > args.truncation.at;
        store(penalty + v, u);
      }
      vi is_inside = ~vi{}, all_finite = is_finite(penalised);
      for (int64_t d = 0; d < obs_dim; ++d) {
        const vf x = load(observations(tile) + d * kTile + v) * args.carry[d] + sample(d);
        is_inside &= (x >= args.low[d]) & (x <= args.high[d]);
        all_finite &= is_finite(x);
        store(next + d * kTile + v, x);
      }
      store(raw + v, raw_reward);
      store(reward + v, penalised);
      store(reinterpret_cast<float*>(finite) + v, bits_to_float(all_finite));
      store(reinterpret_cast<float*>(inside) + v, bits_to_float(is_inside));
      store(reinterpret_cast<float*>(truncated) + v, bits_to_float(is_truncated));
    }
    for (int64_t lane = 0; lane < tile.count; ++lane) {
      const int64_t r = rollout_at(tile, lane);
      if (!finite[lane]) {
        ++made.non_finite;
        if (!args.keep_every_row) continue;
      }
      const int64_t row = row_of(r);
      copy_lane(observations(tile) + lane, obs_dim, made.observations + row * obs_dim);
      copy_lane(actions(tile) + lane, args.act_dim, made.actions + row * args.act_dim);
      copy_lane(next + lane, obs_dim, made.next_observations + row * obs_dim);
      const bool ended = truncated[lane] && finite[lane], halted = ended && args.truncation.halts;
      const bool terminal = !(inside[lane] && finite[lane]) || halted;
      made.truncated += ended;
      made.rewards[row] = halted ? args.truncation.reward : reward[lane];
      made.terminals[row] = terminal;
      made.raw_rewards[row] = raw[lane];
      if (args.penalties) made.penalties[row] = penalty[lane];
      made.members[row] = args.deterministic ? -1 : static_cast<int32_t>(drawn[lane]);
      made.rollout_index[row] = args.rows[first + r];
      made.step[row] = static_cast<int32_t>(args.first_step + t);
      if (args.mean != nullptr) store_distributions(tile, lane, first + r);
      ++made.length[r];
      if (!terminal && !ended) ws.survivors[survivors++] = r;
    }
    return survivors;
  }

  static void copy_lane(const float* from, int64_t count, float* to) {
    for (int64_t d = 0; d < count; ++d) to[d] = from[d * kTile];
  }

  // Turns the predicted log-variances into bounded variances, in place.
  void bound_variances(const Tile& tile) const {
    const int64_t dims = args.obs_dim + 1;
    const bool every = tile.member == Tile::kEveryMember;
    const int64_t last = every ? args.dynamics.networks : tile.member + 1;
    for (int64_t member = every ? 0 : tile.member; member < last; ++member) {
      float* logvar = predictions(tile, member) + dims * kTile;
      for (int64_t d = 0; d < dims; ++d) {
        const vf exp_minus_max = broadcast(plan.exp_minus_max[member * dims + d]);
        const vf exp_min = broadcast(plan.exp_min[member * dims + d]);
        for (int64_t v = 0; v < tile.lanes(); v += W) {
          float* x = logvar + d * kTile + v;
          const vf bounded = soft_clamp_variance<vf>(exp(-load(x)), exp_minus_max, exp_min);
          store(x, args.log_std ? bounded * bounded : bounded);
        }
      }
    }
  }

  void store_distributions(const Tile& tile, int64_t lane, int64_t row) const {
    const int64_t dims = args.obs_dim + 1;
    for (int64_t member = 0; member < args.dynamics.networks; ++member) {
      const float* from = predictions(tile, member) + lane;
      const int64_t to = (member * args.batch + row) * dims;
      for (int64_t d = 0; d < dims; ++d) {
        args.mean[to + d] = from[d * kTile];
        args.std[to + d] = __builtin_sqrtf(from[(dims + d) * kTile]);
      }
    }
  }
};

static void rollout_chunk(const RolloutArgs& args, const RolloutPlan& plan, RolloutWorkspace& ws,
                          ChunkOutput& made, int64_t first, int64_t rows) {
  made.non_finite = made.truncated = 0;
  for (int64_t i = 0; i < rows; ++i) {
    ws.alive[i] = i;
    made.length[i] = 0;
  }
  switch (args.precision) {
    case Precision::kFloat32:
      return Chunk<Float32>{args, plan, ws, made, first, rows, 0}.run();
    case Precision::kBFloat16:
      return Chunk<BFloat16>{args, plan, ws, made, first, rows, 0}.run();
    case Precision::kBFloat16x3:
      return Chunk<BFloat16x3>{args, plan, ws, made, first, rows, 0}.run();
  }
}
