#pragma once

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <cstddef>
#include <cstdint>

// The part of cuBLASLt's C interface that is called here, as its documentation describes it
// (https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api), so that building needs no cuBLAS.
// Handles are opaque; numbers are those of the enumerations. Where the real header is at hand, the
// compiler compares.

namespace longspan::cuda::lt {

using Handle = void*;
using Desc = void*;
using Layout = void*;
using Preference = void*;
using Status = int;  ///< 0: success

inline constexpr int kCompute32F = 68;
inline constexpr int kOpTranspose = 1;
inline constexpr int kDescTransA = 3;
inline constexpr int kDescEpilogue = 7;
inline constexpr int kDescBiasPointer = 8;
inline constexpr int kDescBiasType = 26;
inline constexpr int kEpilogueBias = 4;
inline constexpr int kPreferenceMaxWorkspace = 1;

struct Algo {
  uint64_t data[8];
};

struct Heuristic {
  Algo algo;
  size_t workspace;
  Status state;
  float waves;
  int reserved[4];
};

using Create = Status (*)(Handle*);
using Destroy = Status (*)(Handle);
using GetVersion = size_t (*)();
using DescCreate = Status (*)(Desc*, int compute, cudaDataType_t scale);
using DescSet = Status (*)(Desc, int attribute, const void* value, size_t size);
using LayoutCreate = Status (*)(Layout*, cudaDataType_t, uint64_t rows, uint64_t cols, int64_t ld);
using PreferenceCreate = Status (*)(Preference*);
using PreferenceSet = Status (*)(Preference, int attribute, const void* value, size_t size);
using AlgoHeuristic = Status (*)(Handle, Desc, Layout a, Layout b, Layout c, Layout d, Preference,
                                 int requested, Heuristic* results, int* returned);
using Matmul = Status (*)(Handle, Desc, const void* alpha, const void* a, Layout, const void* b,
                          Layout, const void* beta, const void* c, Layout, void* d, Layout,
                          const Algo*, void* workspace, size_t workspace_bytes, cudaStream_t);

}  // namespace longspan::cuda::lt

#if __has_include(<cublasLt.h>)
#include <cublasLt.h>
namespace longspan::cuda::lt {
static_assert(kCompute32F == CUBLAS_COMPUTE_32F && kOpTranspose == CUBLAS_OP_T);
static_assert(kDescTransA == CUBLASLT_MATMUL_DESC_TRANSA);
static_assert(kDescEpilogue == CUBLASLT_MATMUL_DESC_EPILOGUE);
static_assert(kDescBiasPointer == CUBLASLT_MATMUL_DESC_BIAS_POINTER);
static_assert(kDescBiasType == CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE);
static_assert(kEpilogueBias == CUBLASLT_EPILOGUE_BIAS);
static_assert(kPreferenceMaxWorkspace == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
static_assert(sizeof(Algo) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(Heuristic) == sizeof(cublasLtMatmulHeuristicResult_t));
}  // namespace longspan::cuda::lt
#endif
