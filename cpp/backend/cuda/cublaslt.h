#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "core/matrix.h"
#include "core/memory.h"

namespace longspan::cuda {

/// Products by cuBLASLt, which is found at run time: the copy the process has already (torch's),
/// else in the directories of $LONGSPAN_CUDA_LIB_PATH (Python fills in those of the nvidia-*
/// wheels), else the system's. Not thread-safe.
class CublasLt {
 public:
  /// For the current device. Throws BackendUnavailable, saying what to install.
  CublasLt();
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;

  std::string version() const;

  /// y = x W^T + bias. x: bfloat16 [M, K]; weight: bfloat16 [N][weight_stride], device; y: bfloat16
  /// or float32 [M, N]; bias: device [N] of y's dtype, or null. K and every stride are multiples of
  /// 8. The algorithm is cuBLASLt's own choice for the shape, asked for once.
  void linear(const MatrixView& x, const void* weight, int64_t weight_stride, const void* bias,
              const MatrixView& y, cudaStream_t stream);

 private:
  struct Api;
  struct Product;
  /// m, n, k, x stride, weight stride, y stride, y is float32, has a bias
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool>;
  Product& product(const Key& key);

  std::unique_ptr<Api> api_;
  void* handle_ = nullptr;
  Buffer workspace_;
  std::map<Key, std::unique_ptr<Product>> products_;
};

}  // namespace longspan::cuda
