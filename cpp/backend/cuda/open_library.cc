#include "backend/cuda/open_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <sstream>
#include <vector>

namespace longspan::cuda {

void* open_library(std::span<const char* const> names) {
  for (const char* name : names) {
    if (void* handle = dlopen(name, RTLD_NOW | RTLD_NOLOAD)) return handle;
  }
  std::vector<std::string> directories;
  if (const char* given = std::getenv("LONGSPAN_CUDA_LIB_PATH")) {
    std::istringstream list(given);
    for (std::string directory; std::getline(list, directory, ':');) {
      if (!directory.empty()) directories.push_back(directory + "/");
    }
  }
  directories.emplace_back();  // the loader's own search
  directories.emplace_back("/usr/local/cuda/lib64/");
  for (const std::string& directory : directories) {
    for (const char* name : names) {
      if (void* handle = dlopen((directory + name).c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
    }
  }
  return nullptr;
}

}  // namespace longspan::cuda
