#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "parallel/communicator.h"

namespace longspan::cuda {

/// Combines device matrices by NCCL, queued on the rank's stream, and host memory by `host`.
/// Collective: every rank of the group calls it with its own device current. After a failure the
/// group is lost. Throws BackendUnavailable, for all ranks, where one lacks NCCL, or ParallelError.
std::unique_ptr<Communicator> make_nccl_communicator(std::unique_ptr<Communicator> host,
                                                     cudaStream_t stream);

}  // namespace longspan::cuda
