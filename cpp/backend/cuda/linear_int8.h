#pragma once

#include <cstdint>
#include <span>

#include "backend/backend.h"
#include "backend/cuda/int8_matrix.h"
#include "backend/cuda/weight_stager.h"

namespace longspan::cuda {

/// Weights in turned bytes with a float32 scale for each output, made on their way to the device
/// from what they are rounded to bfloat16. A rank's scales are those of its own rows and columns.
class CudaInt8Linear final : public PackedLinear {
 public:
  /// Stacks parts along the rows. biases: empty, or one vector per part.
  CudaInt8Linear(WeightStager& stager, std::span<const WeightView> parts,
                 std::span<const WeightView> biases);
  static int64_t bytes(int64_t out_features, int64_t in_features) {
    return out_features * (Int8Matrix::padded(in_features) + 4);
  }

  int64_t out_features() const override { return out_features_; }
  int64_t in_features() const override { return in_features_; }
  LinearDType linear_dtype() const override { return LinearDType::kInt8; }
  Int8Matrix weight() const {
    return {codes_.as<int8_t>(), scales_.as<float>(), out_features_,
            Int8Matrix::padded(in_features_)};
  }
  /// Device float32 [out_features]; null: none.
  const float* bias() const { return bias_.as<const float>(); }

 private:
  int64_t out_features_;
  int64_t in_features_;
  Buffer codes_;
  Buffer scales_;
  Buffer bias_;
};

}  // namespace longspan::cuda
