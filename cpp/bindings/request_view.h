#pragma once

#include <cstdint>

#include "longspan/request.h"

namespace longspan::bindings {

/// A handle and the number of logit rows its request asked for (0: none). It shares the request's
/// state, so it outlives the engine.
struct HandleView {
  RequestHandle handle;
  int64_t logit_rows = 0;
};

}  // namespace longspan::bindings
