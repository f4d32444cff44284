#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "longspan/rope.h"

namespace longspan {

/// Tokens whose keys and values are in a file, to be had again without computing them.
struct Context {
  std::vector<int32_t> token_ids;
  /// What its keys are rotated by. Requests whose profile has the same values reuse them.
  RopeProfile rope_profile;
  int64_t file_bytes = 0;  ///< of the whole file
};

/// How far saving or loading a context has come, in tokens.
struct ContextProgress {
  int64_t computed = 0;  ///< of the prefill; loading: 0
  int64_t moved = 0;     ///< written to the file or read from it
  int64_t total = 0;
};

/// Called in the waiting thread, at least every two seconds of wall-clock time while the model
/// computes, and after every few blocks that were moved.
using ContextCallback = std::function<void(const ContextProgress&)>;

}  // namespace longspan
