#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "longspan/config.h"
#include "longspan/export.h"

namespace longspan {

/// A change of options under which a session that does not fit would.
struct PlanRemedy {
  std::string change;           ///< such as "kv_cache_dtype=int8, max_prefill_token_num=2112"
  int64_t total_bytes = 0;      ///< that the plan would then take, per device
  int64_t max_session_len = 0;  ///< longest session_len that would then fit, tokens
};

/// Bytes per component of an engine, computed from configs alone; the engine allocates exactly
/// this. With tp > 1, of the rank that has the most.
struct MemoryPlan {
  int64_t weight_bytes = 0;
  int64_t kv_bytes = 0;  ///< address space of the pool; a CPU touches it only as it is used
  int64_t activation_bytes = 0;
  int64_t workspace_bytes = 0;  ///< step plans, attention partials
  int64_t overhead_bytes = 0;   ///< the driver's and libraries' own: measured, not computed
  int64_t device_bytes = 0;     ///< free on the device before anything was taken
  int64_t num_blocks = 0;
  int64_t block_bytes = 0;
  int64_t session_kv_bytes = 0;  ///< KV cache of one sequence of session_len
  int64_t kv_capacity = 0;       ///< tokens, all sequences together
  int64_t session_len = 0;       ///< tokens
  int64_t max_session_len = 0;   ///< longest session_len that would fit, tokens
  bool fits = false;             ///< one sequence of session_len fits
  /// What would make it fit, smallest change first; empty where it fits, or where nothing would.
  std::vector<PlanRemedy> remedies;

  int64_t total_bytes() const {
    return weight_bytes + kv_bytes + activation_bytes + workspace_bytes + overhead_bytes;
  }
  /// What stays free; < 0 where it does not fit.
  int64_t headroom_bytes() const { return device_bytes - total_bytes(); }
};

/// The plan of a model directory under a config, without loading weights. config.device may also
/// name a GPU that is not there: "h100", "h200", "a100-80g", "a100-40g", "l40s" or "rtx4090".
/// device_bytes: free bytes of a rank to plan for; 0: what the device has free now, which on a CPU
/// the ranks share, one by name in all.
/// Throws as Engine::load does, but for CapacityError.
LONGSPAN_API MemoryPlan plan_memory(const std::string& model_dir, const EngineConfig& config,
                                    int64_t device_bytes = 0);

}  // namespace longspan
