// Included once per instruction set; see kernels.inc.
// Sixteen float lanes by the compiler's vector extension, which lowers them to what the set has.

using Vec = float __attribute__((vector_size(64)));
using VecI = int32_t __attribute__((vector_size(64)));
using VecU = uint32_t __attribute__((vector_size(64)));
inline constexpr int64_t kLanes = 16;

#if defined(__AVX512BF16__)
inline constexpr bool kFastBf16 = true;
#else
inline constexpr bool kFastBf16 = false;
#endif

template <class V>
inline V load_as(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
inline Vec load(const float* p) { return load_as<Vec>(p); }
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

/// Largest lane, folded pairwise.
inline float max_lane(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] = std::max(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

/// Sum of the lanes, folded pairwise.
inline float sum_lanes(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

/// 2^x for x <= 127, relative error under 3e-7; exactly 0 below -126 (so for -infinity).
/// x = n + r, |r| <= 1/2; 2^r by the Taylor polynomial of e^(r ln 2) of degree 7.
inline Vec exp2(Vec x) {
  constexpr float kRound = 0x1.8p23F;  // adding it leaves the nearest integer in the low bits
  const Vec clamped = max(x, broadcast(-127.0F));
  const Vec shifted = clamped + kRound;
  const Vec t = (clamped - (shifted - kRound)) * 0.693147180559945F;
  Vec p = broadcast(1.0F / 5040);
  p = p * t + 1.0F / 720;
  p = p * t + 1.0F / 120;
  p = p * t + 1.0F / 24;
  p = p * t + 1.0F / 6;
  p = p * t + 0.5F;
  p = p * t + 1.0F;
  p = p * t + 1.0F;
  // Adds n to p's exponent.
  const VecI bits = load_as<VecI>(&p) + (load_as<VecI>(&shifted) << 23);
  const Vec scaled = load_as<Vec>(&bits);
  return x < -126.0F ? Vec{} : scaled;
}
