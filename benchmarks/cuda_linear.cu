// The CUDA backend's products of few rows (linear_skinny) in the shapes of the reference job,
// beside cuBLASLt's and a copy on the same card: microseconds, and the rate at which weights are
// read. The claim: with 1 and 8 rows at 85 % of the copy's rate at least. Products follow each
// other in a stream as in a decode step, each with weights that are not in cache. Run: cuda_linear
// [--json]

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "backend/cuda/cublaslt.h"
#include "backend/cuda/linear_skinny.h"
#include "cuda_check.cuh"

namespace longspan::cuda::bench {
namespace {

struct Product {
  const char* name;
  int64_t n;
  int64_t k;
  DType out;
};

constexpr Product kProducts[] = {
    {"qkv", 6144, 4096, DType::kBF16},      {"o", 4096, 4096, DType::kBF16},
    {"gate_up", 28672, 4096, DType::kBF16}, {"down", 4096, 14336, DType::kBF16},
    {"head", 92544, 4096, DType::kF32},
};
constexpr int64_t kMostRows = 16;
constexpr int64_t kMostInner = 14336;
constexpr int64_t kMostOuter = 92544;
constexpr int64_t kPoolBytes = int64_t{1536} << 20;  // two of the largest

/// Numbers of [-scale, scale) as bfloat16.
__global__ void fill(__nv_bfloat16* to, int64_t count, float scale) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    auto h = static_cast<uint32_t>(i) * 0x9e3779b9U;
    h = (h ^ h >> 15) * 0x85ebca6bU;
    h ^= h >> 13;
    to[i] = __float2bfloat16(scale * (static_cast<float>(h >> 8) * 0x1p-23F - 1.0F));
  }
}

/// The best of several runs of `launches` calls of fn(i), in seconds per call.
template <class Fn>
double seconds(int launches, cudaStream_t stream, Fn fn) {
  cudaEvent_t start;
  cudaEvent_t stop;
  CUDA_CHECK(cudaEventCreate(&start));
  CUDA_CHECK(cudaEventCreate(&stop));
  float best = 1e9F;
  for (int run = 0; run < 5; ++run) {
    CUDA_CHECK(cudaEventRecord(start, stream));
    for (int i = 0; i < launches; ++i) fn(i);
    CUDA_CHECK(cudaEventRecord(stop, stream));
    CUDA_CHECK(cudaEventSynchronize(stop));
    float time = 0;
    CUDA_CHECK(cudaEventElapsedTime(&time, start, stop));
    best = std::min(best, time);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  return 1e-3 * best / launches;
}

int run(bool json) {
  cudaDeviceProp device;
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  std::printf(json ? "{\"device\": \"%s\", \"results\": [\n" : "%s\n", device.name);
  cudaStream_t stream;
  CUDA_CHECK(cudaStreamCreate(&stream));
  __nv_bfloat16* weights;
  __nv_bfloat16* x;
  void* y;
  CUDA_CHECK(cudaMalloc(&weights, kPoolBytes));
  CUDA_CHECK(cudaMalloc(&x, kMostRows * kMostInner * 2));
  CUDA_CHECK(cudaMalloc(&y, kMostRows * kMostOuter * 4));
  fill<<<4096, 256, 0, stream>>>(weights, kPoolBytes / 2, 0.05F);
  fill<<<256, 256, 0, stream>>>(x, kMostRows * kMostInner, 1.0F);
  const double copy = seconds(5, stream, [&](int) {
    CUDA_CHECK(cudaMemcpyAsync(weights + kPoolBytes / 4, weights, kPoolBytes / 2,
                               cudaMemcpyDeviceToDevice, stream));
  });
  const double copy_rate = static_cast<double>(kPoolBytes) / copy;
  std::printf(json ? "  {\"name\": \"copy\", \"GB/s\": %.0f}" : "copy %36.0f GB/s\n",
              copy_rate * 1e-9);

  CublasLt cublas;
  bool reached = true;
  for (const int64_t rows : {1, 8, 16}) {
    for (const auto& [name, n, k, out] : kProducts) {
      const int64_t size = n * k;
      const int64_t copies = kPoolBytes / 2 / size;
      const MatrixView in{x, DType::kBF16, rows, k, k};
      const MatrixView to{y, out, rows, n, n};
      const auto weight = [&](int i) { return weights + i % copies * size; };
      const int launches = static_cast<int>(std::max<int64_t>(copies, 12));
      const double own = seconds(
          launches, stream, [&](int i) { linear_skinny(in, weight(i), k, nullptr, to, stream); });
      const double theirs = seconds(
          launches, stream, [&](int i) { cublas.linear(in, weight(i), k, nullptr, to, stream); });
      CUDA_CHECK(cudaGetLastError());
      const double rate = 2.0 * static_cast<double>(size) / own;
      const char* const text =
          json ? ",\n  {\"name\": \"%s\", \"rows\": %d, \"us\": %.1f, \"GB/s\": %.0f, "
                 "\"%% of the copy\": %.0f, \"cuBLASLt us\": %.1f}"
               : "%-8s %2d rows %10.1f us %8.0f GB/s (%3.0f %% of the copy)   cuBLASLt %.1f us\n";
      std::printf(text, name, static_cast<int>(rows), own * 1e6, rate * 1e-9,
                  100 * rate / copy_rate, theirs * 1e6);
      reached &= rows > 8 || rate >= 0.85 * copy_rate;
    }
  }
  if (json) std::printf("\n]}\n");
  return reached ? 0 : 1;
}

}  // namespace
}  // namespace longspan::cuda::bench

int main(int argc, char** argv) {
  return longspan::cuda::bench::run(argc > 1 && std::strcmp(argv[1], "--json") == 0);
}
