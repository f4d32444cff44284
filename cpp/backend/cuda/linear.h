#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "backend/cuda/weight_stager.h"

namespace longspan::cuda {

/// Of stacked parts.
int64_t total_rows(std::span<const WeightView> parts);
/// Biases, one after the other: device [count], float32 or bfloat16.
Buffer pack_bias(WeightStager& stager, std::span<const WeightView> biases, int64_t count,
                 DType dtype);

/// bfloat16 [out_features][stride], row-major, the stride a multiple of 8; the padding is zero.
class CudaPackedLinear final : public PackedLinear {
 public:
  /// Stacks parts along the rows. biases: empty, or one vector per part.
  CudaPackedLinear(WeightStager& stager, std::span<const WeightView> parts,
                   std::span<const WeightView> biases);
  static int64_t bytes(int64_t out_features, int64_t in_features);

  int64_t out_features() const override { return out_features_; }
  int64_t in_features() const override { return in_features_; }
  int64_t stride() const { return stride_; }
  const void* weight() const { return weight_.data(); }
  /// Device [out_features] in that dtype; null: none.
  const void* bias(DType dtype) const {
    return dtype == DType::kF32 ? bias_f32_.data() : bias_bf16_.data();
  }
  /// The weights as a matrix, for what reads single rows.
  MatrixView view() const {
    return {weight_.data(), DType::kBF16, out_features_, in_features_, stride_};
  }

 private:
  int64_t out_features_;
  int64_t in_features_;
  int64_t stride_;
  Buffer weight_;
  Buffer bias_f32_;
  Buffer bias_bf16_;
};

}  // namespace longspan::cuda
