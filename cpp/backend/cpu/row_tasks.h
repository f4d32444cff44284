#pragma once

#include <cstdint>

namespace longspan::cpu {

/// One row: residual += delta (unless null), then out = residual / rms(residual) * weight.
struct RmsNormTask {
  const float* delta = nullptr;   ///< [cols] or null
  float* residual = nullptr;      ///< [cols]
  const float* weight = nullptr;  ///< [cols]
  float eps = 0;
  int64_t cols = 0;
  void* out = nullptr;  ///< act [cols]
};

/// Part of one row: out = silu(gate) * up.
struct SiluMulTask {
  const float* gate = nullptr;  ///< [cols]
  const float* up = nullptr;    ///< [cols]
  int64_t cols = 0;
  void* out = nullptr;  ///< act [cols]
};

}  // namespace longspan::cpu
