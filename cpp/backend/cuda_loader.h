#pragma once

#include <memory>
#include <string>

#include "backend/cuda_abi.h"

namespace longspan {

/// The CUDA library, loaded on first use and kept; null where it cannot run, and then *why is a
/// sentence that says what to install. Looked for at $LONGSPAN_CUDA_LIBRARY, else beside this
/// library. Thread-safe.
const CudaLibrary* find_cuda_library(std::string* why);

/// The same library whether or not it can run here, for what needs no device; null where it cannot
/// be loaded, and then *why is a sentence that says what to install.
const CudaLibrary* open_cuda_library(std::string* why);

/// The directory of the library this code is in, with a trailing slash.
std::string own_directory();

}  // namespace longspan
