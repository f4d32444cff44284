#include "backend/cuda_loader.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>

#include "core/check.h"

namespace longspan {
namespace {

struct Found {
  const CudaLibrary* library = nullptr;
  std::string why;  // there is none
};

std::string last_dl_error() {
  const char* error = dlerror();
  return error == nullptr ? "unknown error" : error;
}

Found open() {
  const char* given = std::getenv("LONGSPAN_CUDA_LIBRARY");
  const std::string path =
      given != nullptr && *given != '\0' ? given : own_directory() + "liblongspan_cuda.so";
  if (!std::filesystem::exists(path)) {
    return {nullptr, message("this build has no CUDA library (", path,
                             "); install CUDA 12.8 or later and build longspan again, or "
                             "pip install with LONGSPAN_CUDA=wheels set")};
  }
  // Never closed: Buffers and backends may outlive every handle to it.
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return {nullptr, message(path, ": ", last_dl_error())};
  const auto entry =
      reinterpret_cast<decltype(&longspan_cuda_library)>(dlsym(handle, "longspan_cuda_library"));
  if (entry == nullptr || entry()->version != CudaLibrary::kVersion) {
    return {nullptr, message(path, " is of another version of longspan; install it again")};
  }
  return {entry(), ""};
}

Found load() {
  // Without a driver nothing else matters, and its absence is the clearest thing to say.
  if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) == nullptr) {
    return {nullptr, "no NVIDIA driver was found (libcuda.so.1); device=\"cpu\" works"};
  }
  std::string why;
  const CudaLibrary* library = open_cuda_library(&why);
  if (library != nullptr && library->num_devices(&why) == 0) library = nullptr;
  return {library, why};
}

}  // namespace

const CudaLibrary* open_cuda_library(std::string* why) {
  static const Found found = open();
  *why = found.why;
  return found.library;
}

const CudaLibrary* find_cuda_library(std::string* why) {
  static const Found found = load();
  *why = found.why;
  return found.library;
}

std::string own_directory() {
  Dl_info info;
  if (dladdr(reinterpret_cast<const void*>(&find_cuda_library), &info) == 0) return "./";
  return std::filesystem::absolute(info.dli_fname).parent_path().string() + "/";
}

}  // namespace longspan
