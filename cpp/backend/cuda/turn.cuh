#pragma once

#include "backend/cuda/vector.cuh"

namespace longspan::cuda {

/// One step of hadamard() of kv_quantize.h whose halves are `step` lanes that have eight elements
/// each. For all lanes to call.
__device__ inline void turn_step(int lane, int step, Eight& y) {
  const float sign = (lane & step) != 0 ? -1.0f : 1.0f;
#pragma unroll
  for (float& x : y.x) x = fmaf(sign, x, __shfl_xor_sync(0xffffffff, x, step));
}

/// The sums of hadamard(), in its order, over a run of `lanes` lanes, a power of two; still to be
/// divided by the root of the run's length. For all lanes to call.
__device__ inline void turn_run(int lane, int lanes, Eight& y) {
#pragma unroll
  for (int half = 1; half < 8; half *= 2) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if ((i & half) != 0) continue;
      const float a = y.x[i];
      const float b = y.x[i + half];
      y.x[i] = a + b;
      y.x[i + half] = a - b;
    }
  }
  for (int step = 1; step < lanes; step *= 2) turn_step(lane, step, y);
}

}  // namespace longspan::cuda
