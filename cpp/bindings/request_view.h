#pragma once

#include <cstdint>

#include "longspan/request.h"

namespace longspan::bindings {

/// A handle, and what its request asked for. It shares the request's
/// state, so it outlives the engine.
struct HandleView {
  RequestHandle handle;
  int64_t logit_rows = 0;     ///< 0: no logits
  int64_t logprobs_each = 1;  ///< log probabilities of each generated token, itself included
};

}  // namespace longspan::bindings
