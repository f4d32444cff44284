#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace longspan {

/// Makes the backend of a device.
/// device: "auto" or "cpu". dtype: "auto", "bfloat16" or "float32". num_threads: 0 for all CPUs.
/// Throws InvalidArgument for an unknown name, Unsupported for a dtype the device lacks,
/// BackendUnavailable with what to install.
std::unique_ptr<Backend> make_backend(const std::string& device, const std::string& dtype,
                                      int num_threads);

/// Those of the `count` ranks of a process: a share of the threads each on a CPU, or the GPUs from
/// the first on. As make_backend; also throws BackendUnavailable where there are fewer GPUs.
std::vector<std::unique_ptr<Backend>> make_backends(const std::string& device,
                                                    const std::string& dtype, int num_threads,
                                                    int count);

/// That of the only rank of a process that a launcher started beside others of this machine. As
/// make_backend; "cuda" and "auto" deal the GPUs out by local_rank.
std::unique_ptr<Backend> make_launched_backend(const std::string& device, const std::string& dtype,
                                               int num_threads, int local_rank);

}  // namespace longspan
