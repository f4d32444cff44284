#include "engine/plan_remedies.h"

#include <optional>
#include <utility>
#include <vector>

#include "core/check.h"
#include "kv/block_table.h"
#include "model/shard.h"

namespace longspan {
namespace {

constexpr int64_t kLeastChunk = 1024;  // a smaller one costs speed for little memory
constexpr size_t kMostShown = 2;       // by an error

/// A config on its way from what was asked for, and what has been changed on it.
struct Trial {
  EngineConfig config;
  std::string changes;

  template <class Value>
  void set(const char* option, const Value& value) {
    changes += message(changes.empty() ? "" : ", ", option, "=", value);
  }
};

/// The trial as it is, else with a pool of just what the session needs, else with smaller chunks
/// too: the first that fits.
std::optional<PlanRemedy> first_that_fits(Trial trial, const ModelConfig& model,
                                          const BackendSizes& backend, int64_t device_bytes) {
  const auto remedy = [&](const Trial& t) -> std::optional<PlanRemedy> {
    const MemoryPlan plan = make_memory_plan(t.config, model, backend, device_bytes);
    if (!plan.fits || t.changes.empty()) return std::nullopt;
    return PlanRemedy{t.changes, plan.total_bytes(), plan.max_session_len};
  };
  if (auto found = remedy(trial)) return found;
  const int64_t blocks = blocks_for(trial.config.session_len, tokens_per_block(trial.config));
  trial.config.cache_max_entry_count = static_cast<double>(blocks);
  trial.set("cache_max_entry_count", blocks);
  if (auto found = remedy(trial)) return found;
  for (int64_t chunk = trial.config.max_prefill_token_num / 2; chunk >= kLeastChunk; chunk /= 2) {
    Trial smaller = trial;
    smaller.config.max_prefill_token_num = chunk;
    smaller.set("max_prefill_token_num", chunk);
    if (auto found = remedy(smaller)) return found;
  }
  return std::nullopt;
}

/// More ranks: the fewest that fit, and of their context shards the fewest.
std::optional<PlanRemedy> fewest_ranks_that_fit(const EngineConfig& config,
                                                const ModelConfig& model,
                                                const BackendSizes& backend, int64_t device_bytes) {
  if (backend.traits().shares_memory) return std::nullopt;  // which would gain nothing
  for (int tp = config.tp; tp <= kMaxTp; ++tp) {
    for (const int cp : possible_cp(model, tp)) {
      if (cp < config.cp || (cp > 1 && config.prefill_attention != "auto")) continue;
      Trial ranks{config, ""};
      if (tp != config.tp) ranks.set("tp", ranks.config.tp = tp);
      if (cp != config.cp) ranks.set("cp", ranks.config.cp = cp);
      const MemoryPlan plan = make_memory_plan(ranks.config, model, backend, device_bytes);
      if (plan.fits) return PlanRemedy{ranks.changes, plan.total_bytes(), plan.max_session_len};
    }
  }
  return std::nullopt;
}

}  // namespace

MemoryPlan plan_with_remedies(const EngineConfig& config, const ModelConfig& model,
                              const BackendSizes& backend, int64_t device_bytes) {
  MemoryPlan plan = make_memory_plan(config, model, backend, device_bytes);
  if (plan.fits) return plan;
  const auto add = [&](Trial trial) {
    auto found = first_that_fits(std::move(trial), model, backend, device_bytes);
    if (found) plan.remedies.push_back(std::move(*found));
  };
  add({config, ""});
  if (plan.remedies.empty() && config.max_batch_size > 1) {
    Trial one{config, ""};
    one.config.max_batch_size = 1;
    one.set("max_batch_size", 1);
    add(std::move(one));
  }
  for (const KvFormat format : backend.kv_formats(model.head_dim)) {
    if (name_of(format) == config.kv_cache_dtype || format == KvFormat::kNative) continue;
    Trial other{config, ""};
    other.config.kv_cache_dtype = name_of(format);
    other.set("kv_cache_dtype", name_of(format));
    add(std::move(other));
  }
  if (auto ranks = fewest_ranks_that_fit(config, model, backend, device_bytes)) {
    plan.remedies.push_back(std::move(*ranks));
  }
  return plan;
}

std::string describe_misfit(const MemoryPlan& plan, const EngineConfig& config) {
  std::string text = message("session_len: expected at most ", plan.max_session_len,
                             " tokens, what the KV cache can hold with cache_max_entry_count=",
                             config.cache_max_entry_count, " and ", plan.device_bytes >> 20,
                             " MiB free, got ", config.session_len);
  for (size_t i = 0; i < plan.remedies.size() && i < kMostShown; ++i) {
    text += message(i == 0 ? "; it would fit with " : ", or with ", plan.remedies[i].change);
  }
  return text;
}

}  // namespace longspan
