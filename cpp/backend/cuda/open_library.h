#pragma once

#include <dlfcn.h>

#include <span>
#include <type_traits>

#include "core/check.h"

namespace longspan::cuda {

/// Opens the first of `names` that is loaded already (by torch, say), or is found in
/// LONGSPAN_CUDA_LIB_PATH, by the loader's own search or with the toolkit; null: none is. Never to
/// be closed.
void* open_library(std::span<const char* const> names);

/// Points `function` to `name` in a library, `of` in words. Throws BackendUnavailable.
template <class Function>
void find_function(void* library, const char* of, const char* name, Function& function) {
  function = reinterpret_cast<std::decay_t<Function>>(dlsym(library, name));
  require<BackendUnavailable>(function != nullptr, "cuda: ", of, " has no ", name);
}

}  // namespace longspan::cuda
