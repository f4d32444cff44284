#pragma once

#include <cuda_runtime_api.h>

#include "core/check.h"

namespace longspan::cuda {

/// Throws what a CUDA status means: CapacityError when memory ran out, else BackendUnavailable.
/// `what` says what was asked for.
inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  const std::string text = message("cuda: ", what, ": ", cudaGetErrorString(status));
  if (status == cudaErrorMemoryAllocation) throw CapacityError(text);
  throw BackendUnavailable(text);
}

}  // namespace longspan::cuda
