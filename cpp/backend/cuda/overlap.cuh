#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <utility>

// Kernels that overlap: from sm_90 on, one that was launched by launch_overlapped() may start on
// the places that the last blocks of the kernel before it leave, and do what depends on nobody: set
// up, ask for weights. It must call wait_for_previous_kernel(), in every block, before it reads or
// writes what another kernel writes or reads. (Programmatic dependent launch, CUDA programming
// guide.)

namespace longspan::cuda {

/// Lets the next kernel of the stream, if it was launched to overlap this one, take the places that
/// this one leaves.
__device__ inline void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// Waits, where this kernel was launched to overlap the one before, for the end of that and for
/// what it wrote.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Whether the current device can. Asked of each device once.
inline bool device_overlaps() {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices] = {};  // 0: not asked yet, 1: no, 2: yes
  int device = 0;
  cudaGetDevice(&device);
  if (device >= kMaxDevices) return false;
  if (known[device] == 0) {
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    known[device] = major >= 9 ? 2 : 1;
  }
  return known[device] == 2;
}

template <class... Params, class... Args>
cudaError_t launch_overlapped(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes,
                              cudaStream_t stream, Args&&... args) {
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = device_overlaps() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...);
}

}  // namespace longspan::cuda
