#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <mutex>

#include "backend/cuda/linear_int8.h"

namespace longspan::cuda {

/// Products with weights in turned bytes. Inputs are quantised to a workspace of fixed size, so
/// that plans can count it, through which many rows pass in turn: those queued on one stream.
class Int8Products {
 public:
  static constexpr int64_t kWorkspaceBytes = int64_t{128} << 20;

  /// Before the first product, on the device that is current. Thread-safe; again does nothing.
  void begin();

  /// Backend::linear() and linear_silu_mul(), of at most kSkinnyRows rows. num_sms: the device's
  /// multiprocessors.
  void linear(const MatrixView& x, const CudaInt8Linear& weight, const MatrixView& y, int num_sms,
              cudaStream_t stream) const;
  void linear_silu_mul(const MatrixView& x, const CudaInt8Linear& weight, const MatrixView& y,
                       cudaStream_t stream) const;

 private:
  static constexpr int64_t kRowMultiple = 256;  // of products' tiles

  /// Rows of so many columns that there is room for: a chunk of a prompt, up to some 15000 columns.
  static int64_t most_rows(int64_t cols) {
    return kWorkspaceBytes / (Int8Matrix::padded(cols) + 4) / kRowMultiple * kRowMultiple;
  }
  /// x: at most most_rows().
  Int8Matrix quantized(const MatrixView& x, cudaStream_t stream) const;

  std::once_flag begun_;
  Buffer workspace_;  // codes, then scales
};

}  // namespace longspan::cuda
