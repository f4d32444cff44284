// Included once per instruction set, by attention.h.
// One row of one step of the online softmax: weights 2^(scale s - m), and their sums by lane.

/// A row whose sum passes this takes a new reference m. Far below the largest float32, so that no
/// step's sums overflow unnoticed, and far above what a well chosen reference gives.
inline constexpr float kSumLimit = 0x1p60F;

/// 2^t, relative error under 3e-7; 0 below -126, infinity beyond 127 and for NaN. t = n + r,
/// |r| <= 1/2; 2^r by the Taylor polynomial of e^(r ln 2) of degree 7. Without branches or calls,
/// so that loops over it become vectors.
inline float exp2_lane(float t) {
  constexpr float kRound = 0x1.8p23F;  // adding it leaves the nearest integer in the low bits
  const float clamped = t > -127.0F ? t : -127.0F;
  const float shifted = clamped + kRound;
  const float r = (clamped - (shifted - kRound)) * 0.693147180559945F;
  float p = 1.0F / 5040;
  p = p * r + 1.0F / 720;
  p = p * r + 1.0F / 120;
  p = p * r + 1.0F / 24;
  p = p * r + 1.0F / 6;
  p = p * r + 0.5F;
  p = p * r + 1.0F;
  p = p * r + 1.0F;
  const uint32_t exponent = std::bit_cast<uint32_t>(shifted) << 23;
  const float scaled = std::bit_cast<float>(std::bit_cast<uint32_t>(p) + exponent);
  const float result = t < -126.0F ? 0.0F : scaled;
  return t <= 127.0F ? result : std::numeric_limits<float>::infinity();
}

/// Stores a weight as P holds it; returns its value.
inline float store_weight(float weight, float* p) { return *p = weight; }
inline float store_weight(float weight, bf16_t* p) {
  const auto bits = std::bit_cast<uint32_t>(weight);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  *p = static_cast<bf16_t>(rounded >> 16);
  return std::bit_cast<float>(rounded & 0xffff0000U);
}

/// Weights of the first `visible` of `width` keys against the reference m, 0 for the others; their
/// sums are added to sums [kSumLanes], key i to lane i % kSumLanes. False, with the sums as they
/// were, when one passes kSumLimit or is NaN.
template <class Act>
inline bool weigh_row(const float* s, int64_t visible, int64_t width, float scale, float m,
                      float* sums, Act* p) {
  float sum[kSumLanes];
  std::copy(sums, sums + kSumLanes, sum);
  for (int64_t k = 0; k < width; k += kSumLanes) {
    const auto lanes = static_cast<int32_t>(std::clamp<int64_t>(visible - k, 0, kSumLanes));
    for (int32_t lane = 0; lane < kSumLanes; ++lane) {
      const float weight = exp2_lane(s[k + lane] * scale - m);
      sum[lane] += store_weight(lane < lanes ? weight : 0.0F, p + k + lane);
    }
  }
  bool within = true;
  for (int64_t lane = 0; lane < kSumLanes; ++lane) within &= sum[lane] <= kSumLimit;
  if (within) std::copy(sum, sum + kSumLanes, sums);
  return within;
}

#if defined(__AVX512BW__) && defined(__AVX512DQ__)

/// 2^t where the mask is set, else 0, for a bfloat16 that is made by cutting: half a unit of its
/// last place is in the constant. 2^f, 0 <= f < 1, by the polynomial of degree 3 with the least
/// largest relative error, 9e-5, among those that are 1 at 0.
inline __m512 exp2_to_cut(__m512 t, __mmask16 mask) {
  const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0x1.3ba908p-4F), f, _mm512_set1_ps(0x1.d2386cp-3F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.63e64cp-1F));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0F + 0x1p-8F));
  return _mm512_maskz_scalef_ps(mask, p, t);
}

/// The upper halves of 32 floats.
inline __m512i cut_to_bf16(__m512 low, __m512 high) {
  alignas(64) static constexpr uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                      23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                      45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(_mm512_castps_si512(low), _mm512_load_si512(kUpper),
                                   _mm512_castps_si512(high));
}

/// sum + the values of 32 bfloat16, pairs to a lane.
inline __m512 add_pairs(__m512 sum, __m512i pairs) {
#if defined(__AVX512BF16__)
  const __m512i ones = _mm512_set1_epi16(0x3f80);
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(pairs), reinterpret_cast<__m512bh>(ones));
#else
  const __m512i upper = _mm512_and_si512(pairs, _mm512_set1_epi32(-0x10000));
  sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
  return _mm512_add_ps(sum, _mm512_castsi512_ps(upper));
#endif
}

template <bool kAll>
inline bool weigh_lanes(const float* s, int64_t visible, int64_t width, float scale, float m,
                        float* sums, bf16_t* p) {
  const __m512 scales = _mm512_set1_ps(scale);
  const __m512 ms = _mm512_set1_ps(m);
  const auto weights = [&](int64_t k) {
    const int64_t lanes = kAll ? 16 : std::clamp<int64_t>(visible - k, 0, 16);
    const __m512 t = _mm512_fmsub_ps(_mm512_load_ps(s + k), scales, ms);
    return exp2_to_cut(t, static_cast<__mmask16>((1U << lanes) - 1));
  };
  __m512 sum = _mm512_load_ps(sums);
  for (int64_t k = 0; k < width; k += 32) {
    const __m512i pairs = cut_to_bf16(weights(k), weights(k + 16));
    _mm512_store_si512(p + k, pairs);
    sum = add_pairs(sum, pairs);
  }
  if (_mm512_cmp_ps_mask(sum, _mm512_set1_ps(kSumLimit), _CMP_LE_OQ) != 0xffff) return false;
  _mm512_store_ps(sums, sum);
  return true;
}

/// In bfloat16, where the keys of a lane are two neighbours of every 32.
inline bool weigh_row(const float* s, int64_t visible, int64_t width, float scale, float m,
                      float* sums, bf16_t* p) {
  return visible >= width ? weigh_lanes<true>(s, visible, width, scale, m, sums, p)
                          : weigh_lanes<false>(s, visible, width, scale, m, sums, p);
}

#endif
