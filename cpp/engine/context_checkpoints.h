#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "engine/context_io.h"
#include "longspan/request.h"

namespace longspan {

/// Brings the keys and values of the first `tokens` tokens of a context into the prefix cache.
using ComputePrefix = std::function<void(int64_t tokens, const ProgressCallback& on_progress)>;

/// save_context() that writes what it has after each `interval` tokens too, so that a process that
/// dies loses no more than that; 0: only the whole. Each file is a context of its own and replaces
/// the one before. With an interval, a file that is at `path` must hold a beginning of this context
/// and is gone on from. Throws as save_context() and load_context() do, and CheckpointError where
/// it holds anything else.
void save_with_checkpoints(const ContextIo& io, Context& context, const std::string& path,
                           int64_t interval, const RopeMethod& rope, int64_t vocab_size,
                           const ComputePrefix& compute, const ContextCallback& on_progress);

}  // namespace longspan
