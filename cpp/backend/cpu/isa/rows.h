// Included once per instruction set; see kernels.inc.
// Plain loops over independent lanes, which the compiler turns into this set's vectors.

inline void store_act(float x, float* out) { *out = x; }

/// Round to nearest even; a NaN stays one.
inline void store_act(float x, bf16_t* out) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *out = static_cast<bf16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

/// In an order that depends on n alone: lane i % kLanes ascending, then the lanes.
inline float sum_of_squares(const float* x, int64_t n) {
  Vec sums{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(x + i);
    sums += v * v;
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) sums[lane] += x[i] * x[i];
  return sum_lanes(sums);
}

template <class Act>
void rms_norm(const RmsNormTask& task) {
  if (task.delta != nullptr) {
    for (int64_t i = 0; i < task.cols; ++i) task.residual[i] += task.delta[i];
  }
  const float mean = sum_of_squares(task.residual, task.cols) / static_cast<float>(task.cols);
  const float scale = 1.0f / std::sqrt(mean + task.eps);
  auto* out = static_cast<Act*>(task.out);
  for (int64_t i = 0; i < task.cols; ++i) {
    store_act(task.residual[i] * scale * task.weight[i], out + i);
  }
}

/// exp(x) to 2 ulp; 0 and infinity beyond float32's range, infinity for NaN. x = n ln 2 + r,
/// |r| <= ln 2 / 2, ln 2 in two parts (Cody and Waite); e^r by its Taylor polynomial of degree 7.
inline float exp_f32(float x) {
  // Clamps |x| as an integer: a comparison of floats may trap, which keeps GCC from using vectors.
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = std::min(bits & 0x7fffffff, std::bit_cast<uint32_t>(104.0f));
  x = std::bit_cast<float>((bits & 0x80000000) | magnitude);
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors, since n may be outside a float32's exponents.
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  const int32_t half = exponent >> 1;
  const float first = std::bit_cast<float>((half + 127) << 23);
  const float second = std::bit_cast<float>((exponent - half + 127) << 23);
  return p * first * second;
}

template <class Act>
void silu_mul(const SiluMulTask& task) {
  auto* out = static_cast<Act*>(task.out);
  for (int64_t i = 0; i < task.cols; ++i) {
    const float gate = task.gate[i];
    store_act(gate / (1.0f + exp_f32(-gate)) * task.up[i], out + i);
  }
}
