#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

// The part of NCCL's C interface that is called here, as its documentation describes it
// (https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/api.html), so that building needs no
// NCCL. Numbers are those of the enumerations. Where the real header is at hand, the compiler
// compares.

namespace longspan::cuda::nccl {

using Comm = void*;
using Status = int;  ///< 0: success

inline constexpr int kInProgress = 7;
inline constexpr int kFloat32 = 7;
inline constexpr int kBfloat16 = 9;
inline constexpr int kSum = 0;

struct UniqueId {
  char bytes[128];
};

using GetUniqueId = Status (*)(UniqueId*);
using GetVersion = Status (*)(int*);
using CommInitRank = Status (*)(Comm*, int size, UniqueId, int rank);
using CommAbort = Status (*)(Comm);
using CommDestroy = Status (*)(Comm);
using CommGetAsyncError = Status (*)(Comm, Status*);
using GetErrorString = const char* (*)(Status);
using AllReduce = Status (*)(const void* send, void* receive, size_t count, int dtype, int op, Comm,
                             cudaStream_t);
using ReduceScatter = Status (*)(const void* send, void* receive, size_t receive_count, int dtype,
                                 int op, Comm, cudaStream_t);
using AllGather = Status (*)(const void* send, void* receive, size_t send_count, int dtype, Comm,
                             cudaStream_t);

}  // namespace longspan::cuda::nccl

#if __has_include(<nccl.h>)
#include <nccl.h>
namespace longspan::cuda::nccl {
static_assert(kInProgress == ncclInProgress && kSum == ncclSum);
static_assert(kFloat32 == ncclFloat32 && kBfloat16 == ncclBfloat16);
static_assert(sizeof(UniqueId) == sizeof(ncclUniqueId));
}  // namespace longspan::cuda::nccl
#endif
