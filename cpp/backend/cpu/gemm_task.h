#pragma once

#include <cstdint>

namespace longspan::cpu {

/// C = A B (+ bias): A act [m, k], B packed in whole panels (panel.h), C float32 [m, panels * 32].
/// A's elements between k and the next multiple of 32 are readable and finite, C's rows hold whole
/// panels. An element of C depends on its own row of A and column of B alone, bit for bit: products
/// add up over k in one order whatever m is.
struct GemmTask {
  const void* a = nullptr;
  int64_t a_stride = 0;  ///< elements
  int64_t m = 0;
  int64_t k = 0;
  const void* b = nullptr;  ///< the first panel
  int64_t panels = 0;
  float* c = nullptr;
  int64_t c_stride = 0;
  const float* bias = nullptr;  ///< [panels * 32] or null
};

/// Rows of logits and what is known of their log-sum-exp so far: after n more columns,
/// max = max(max, x), sum = sum of exp(x - max).
struct LogSumExpTask {
  const float* x = nullptr;  ///< [n]
  int64_t n = 0;
  float* max = nullptr;
  double* sum = nullptr;
};

}  // namespace longspan::cpu
