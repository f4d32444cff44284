#pragma once

#include <span>
#include <string>

namespace longspan::cuda {

/// Opens the first of `names` that is loaded already (by torch, say), or is found in
/// LONGSPAN_CUDA_LIB_PATH, by the loader's own search or with the toolkit; null: none is. Never to
/// be closed.
void* open_library(std::span<const char* const> names);

}  // namespace longspan::cuda
