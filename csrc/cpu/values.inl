// The least Q of a policy's actions at sampled states, in tiles of rows. The lanes of a vector are rows.

template <class Operand>
struct Values {
  static constexpr int kTile = Operand::kPacking.tile;

  const ValuesArgs& args;
  const ValuesPlan& plan;
  ValuesWorkspace& ws;

  // States first .. last. An interrupted call ends in the middle of them.
  void run(int64_t first, int64_t last) const {
    // So many tiles that looking for an interrupt costs nothing beside them.
    constexpr int64_t kBetweenLooks = 16;
    for (int64_t begin = first; begin < last;) {
      if (interrupted(*plan.interrupt)) return;
      const TileState<Operand> tile_state;
      for (const int64_t end = smaller(last, begin + kBetweenLooks * kTile); begin < end; begin += kTile)
        evaluate(begin, smaller(kTile, end - begin));
    }
  }

 private:
  void evaluate(int64_t begin, int64_t count) const {
    const int64_t lanes = round_up(count, W);
    draw_states(begin, count, lanes);
    network_tile<Operand>(args.policy, plan.policy, 0, count, ws.inputs, ws.layers, ws.outputs);
    draw_noise(begin, count, lanes, kActionStream, args.act_dim);
    for (int64_t d = 0; d < args.act_dim; ++d)
      for (int64_t v = 0; v < lanes; v += W) {
        const float* head = ws.outputs + d * kTile + v;
        const SquashedGaussian draw(load(head), load(head + args.act_dim * kTile),
                                    broadcast(args.log_std_min), broadcast(args.log_std_max),
                                    load(ws.noise + d * kTile + v));
        store(ws.inputs + (args.obs_dim + d) * kTile + v, draw.action());
      }
    alignas(64) float least[kTile];
    for (int64_t critic = 0; critic < args.critics.networks; ++critic) {
      network_tile<Operand>(args.critics, plan.critics, critic, count, ws.inputs, ws.layers, ws.outputs);
      for (int64_t v = 0; v < lanes; v += W) {
        const vf q = load(ws.outputs + v);
        // A NaN in any critic is the result.
        store(least + v, critic == 0 ? q : select((q < load(least + v)) | (q != q), q, load(least + v)));
      }
    }
    for (int64_t lane = 0; lane < count; ++lane) args.q[begin + lane] = least[lane];
  }

  // Lanes beyond `count` repeat the last state.
  void draw_states(int64_t begin, int64_t count, int64_t lanes) const {
    draw_noise(begin, count, lanes, kNoiseStream, args.obs_dim);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t from = (begin + smaller(lane, count - 1)) % (args.members * args.rows) * args.obs_dim;
      for (int64_t d = 0; d < args.obs_dim; ++d) {
        const int64_t to = d * kTile + lane;
        ws.inputs[to] = args.mean[from + d] + args.std[from + d] * ws.noise[to];
      }
    }
  }

  void draw_noise(int64_t begin, int64_t count, int64_t lanes, PhiloxStream stream, int64_t width) const {
    fill_normals<kTile>(ws.noise, lanes, width, [&](int64_t lane, uint32_t block) {
      return random_block(begin + smaller(lane, count - 1), 0, stream, block, args.seed);
    });
  }
};

static void least_values(const ValuesArgs& args, const ValuesPlan& plan, ValuesWorkspace& ws, int64_t first,
                         int64_t last) {
  switch (args.precision) {
    case Precision::kFloat32:
      return Values<Float32>{args, plan, ws}.run(first, last);
    case Precision::kBFloat16:
      return Values<BFloat16>{args, plan, ws}.run(first, last);
    case Precision::kBFloat16x3:
      return Values<BFloat16x3>{args, plan, ws}.run(first, last);
  }
}
