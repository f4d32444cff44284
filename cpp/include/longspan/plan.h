#pragma once

#include <cstdint>
#include <string>

#include "longspan/config.h"
#include "longspan/export.h"

namespace longspan {

/// Bytes per component of an engine, computed from configs alone; the engine allocates exactly
/// this.
struct MemoryPlan {
  int64_t weight_bytes = 0;
  int64_t kv_bytes = 0;  ///< address space of the pool; a CPU touches it only as it is used
  int64_t activation_bytes = 0;
  int64_t workspace_bytes = 0;  ///< step plans, attention partials
  int64_t device_bytes = 0;     ///< free on the device when planned
  int64_t num_blocks = 0;
  int64_t block_bytes = 0;
  int64_t kv_capacity = 0;      ///< tokens, all sequences together
  int64_t session_len = 0;      ///< tokens
  int64_t max_session_len = 0;  ///< longest session_len that would fit, tokens
  bool fits = false;            ///< one sequence of session_len fits

  int64_t total_bytes() const {
    return weight_bytes + kv_bytes + activation_bytes + workspace_bytes;
  }
};

/// The plan of a model directory under a config, without loading weights.
/// device_bytes: free bytes to plan for; 0: what the device has free now.
LONGSPAN_API MemoryPlan plan_memory(const std::string& model_dir, const EngineConfig& config,
                                    int64_t device_bytes = 0);

}  // namespace longspan
