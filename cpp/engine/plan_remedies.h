#pragma once

#include <cstdint>
#include <string>

#include "engine/memory_plan.h"

namespace longspan {

/// make_memory_plan, and where the session does not fit what would make it: config: resolved.
MemoryPlan plan_with_remedies(const EngineConfig& config, const ModelConfig& model,
                              const BackendSizes& backend, int64_t device_bytes);

/// What a plan that does not fit says to its user, in the words of an error.
std::string describe_misfit(const MemoryPlan& plan, const EngineConfig& config);

}  // namespace longspan
