#include "backend/cuda/linear_int8.h"

#include "backend/cuda/device_memory.h"
#include "backend/cuda/linear.h"

namespace longspan::cuda {

CudaInt8Linear::CudaInt8Linear(WeightStager& stager, std::span<const WeightView> parts,
                               std::span<const WeightView> biases)
    : out_features_(total_rows(parts)),
      in_features_(parts.front().cols),
      codes_(allocate_device(out_features_ * Int8Matrix::padded(in_features_))),
      scales_(allocate_device(out_features_ * 4)) {
  int64_t row = 0;
  for (const WeightView& part : parts) {
    stager.quantize(part, weight(), row);
    row += part.rows;
  }
  if (!biases.empty()) bias_ = pack_bias(stager, biases, out_features_, DType::kF32);
}

}  // namespace longspan::cuda
