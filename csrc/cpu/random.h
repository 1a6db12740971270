// Standard normals from W blocks of Philox, by Box-Muller: words 0 and 1 of a block give normals 0 and 1,
// words 2 and 3 the others.
static void box_muller(const PhiloxBlock (&blocks)[W], vf (&normals)[4]) {
  vi words[4];
  for (int lane = 0; lane < W; ++lane)
    for (int i = 0; i < 4; ++i) words[i][lane] = static_cast<int32_t>(blocks[lane].word[i] >> 9);
  // 23 bits and a half: every value is exact, and none is 0 or 1.
  const auto uniform = [](vi word) { return (to_float(word) + 0.5f) * 0x1p-23f; };
  for (int pair = 0; pair < 4; pair += 2) {
    const vf radius = sqrt(-2.0f * log(uniform(words[pair])));
    const SinCos angle = sincos_turns(uniform(words[pair + 1]));
    normals[pair] = radius * angle.cos;
    normals[pair + 1] = radius * angle.sin;
  }
}
