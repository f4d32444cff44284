#include "backend/cuda/int8_products.h"

#include <algorithm>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device_memory.h"
#include "backend/cuda/linear_int8_sm90.h"
#include "backend/cuda/linear_skinny.h"
#include "backend/cuda/linear_skinny_int8.h"

namespace longspan::cuda {

void Int8Products::begin() {
  std::call_once(begun_, [this] {
    workspace_ = allocate_device(kWorkspaceBytes);
    check_cuda(prepare_linear_int8_sm90(), "preparing products in int8");
  });
}

Int8Matrix Int8Products::quantized(const MatrixView& x, cudaStream_t stream) const {
  auto* codes = workspace_.as<int8_t>();
  const int64_t cols = Int8Matrix::padded(x.cols);
  const Int8Matrix rows{codes, reinterpret_cast<float*>(codes + most_rows(x.cols) * cols), x.rows,
                        cols};
  quantize_rows(x, rows, 0, stream);
  return rows;
}

void Int8Products::linear(const MatrixView& x, const CudaInt8Linear& weight, const MatrixView& y,
                          int num_sms, cudaStream_t stream) const {
  if (x.rows <= kSkinnyRows) {
    return linear_skinny_int8(quantized(x, stream), weight.weight(), weight.bias(), y, stream);
  }
  const int64_t most = most_rows(x.cols);
  for (int64_t begin = 0; begin < x.rows; begin += most) {
    const int64_t count = std::min(most, x.rows - begin);
    const Int8Matrix rows = quantized(x.rows_from(begin, count), stream);
    check_cuda(linear_int8_sm90(rows, weight.weight(), weight.bias(), y.rows_from(begin, count),
                                num_sms, stream),
               "multiplying in int8");
  }
}

void Int8Products::linear_silu_mul(const MatrixView& x, const CudaInt8Linear& weight,
                                   const MatrixView& y, cudaStream_t stream) const {
  linear_silu_mul_skinny_int8(quantized(x, stream), weight.weight(), weight.bias(), y, stream);
}

}  // namespace longspan::cuda
