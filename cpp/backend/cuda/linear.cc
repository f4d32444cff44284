#include "backend/cuda/linear.h"

#include "backend/cuda/device_memory.h"

namespace longspan::cuda {

int64_t total_rows(std::span<const WeightView> parts) {
  int64_t rows = 0;
  for (const WeightView& part : parts) rows += part.rows;
  return rows;
}

Buffer pack_bias(WeightStager& stager, std::span<const WeightView> biases, int64_t count,
                 DType dtype) {
  Buffer out = allocate_device(count * size_of(dtype));
  int64_t done = 0;
  for (const WeightView& bias : biases) {
    stager.copy(bias, {out.as<char>() + done * size_of(dtype), dtype, 1, bias.cols, bias.cols});
    done += bias.cols;
  }
  return out;
}

namespace {

int64_t stride_of(int64_t in_features) { return (in_features + 7) / 8 * 8; }

}  // namespace

int64_t CudaPackedLinear::bytes(int64_t out_features, int64_t in_features) {
  return out_features * stride_of(in_features) * 2;
}

CudaPackedLinear::CudaPackedLinear(WeightStager& stager, std::span<const WeightView> parts,
                                   std::span<const WeightView> biases)
    : out_features_(total_rows(parts)),
      in_features_(parts.front().cols),
      stride_(stride_of(in_features_)),
      weight_(allocate_device(bytes(out_features_, in_features_))) {
  int64_t row = 0;
  for (const WeightView& part : parts) {
    stager.copy(part, view().rows_from(row, part.rows));
    row += part.rows;
  }
  if (biases.empty()) return;
  bias_f32_ = pack_bias(stager, biases, out_features_, DType::kF32);
  bias_bf16_ = pack_bias(stager, biases, out_features_, DType::kBF16);
}

}  // namespace longspan::cuda
