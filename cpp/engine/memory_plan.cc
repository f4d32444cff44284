#include "engine/memory_plan.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "backend/named_devices.h"
#include "backend/registry.h"
#include "core/check.h"
#include "core/thread_pool.h"
#include "engine/plan_remedies.h"
#include "kv/block_table.h"

namespace longspan {
namespace {

constexpr int64_t kMaxSessionLen = int64_t{1} << 40;

/// "auto", "int8", ...: names for an error to list.
template <class Names, class Name>
std::string listed(const Names& names, Name name) {
  std::string list;
  for (const auto& each : names) {
    list += message(list.empty() ? "\"" : ", \"", name(each), "\"");
  }
  return list;
}

/// The enumerator that an option names; names: of all of them, in order. Throws InvalidArgument.
template <class Enum, class Names>
Enum named(const char* option, const Names& names, const std::string& name) {
  const auto found = std::find(names.begin(), names.end(), name);
  require<InvalidArgument>(found != names.end(), option, ": expected one of ",
                           listed(names, std::identity()), ", got \"", name, "\"");
  return static_cast<Enum>(found - names.begin());
}

KvFormat kv_format(const EngineConfig& c) {
  return named<KvFormat>("kv_cache_dtype", kKvFormatNames, c.kv_cache_dtype);
}

PrefillAttention prefill_attention(const EngineConfig& c) {
  return named<PrefillAttention>("prefill_attention", kPrefillAttentionNames, c.prefill_attention);
}

/// Throws Unsupported unless what an option names is among what the backend has.
template <class Enum>
void require_one(const char* option, std::span<const Enum> has, Enum wanted,
                 const BackendSizes& backend) {
  const auto name = [](Enum each) { return name_of(each); };
  require<Unsupported>(std::find(has.begin(), has.end(), wanted) != has.end(), option,
                       ": expected one of ", listed(has, name), " on ", backend.describe(),
                       ", got \"", name_of(wanted), "\"");
}

void check_parallel_sizes(int tp, int cp, const ModelConfig& model) {
  const std::vector<int> tp_sizes = possible_tp(model, cp);
  if (std::ranges::find(tp_sizes, tp) != tp_sizes.end()) return;
  const auto one_of = [&](const std::vector<int>& sizes) {
    std::string list;
    for (const int size : sizes) list += message(list.empty() ? "" : ", ", size);
    return "expected one of " + list;
  };
  const std::string shape =
      message(" for a model of ", model.num_heads, " query and ", model.num_kv_heads,
              " KV heads and intermediate_size ", model.intermediate_size, ", got ");
  const std::vector<int> cp_sizes = possible_cp(model, tp);
  require<InvalidArgument>(cp == 1 || cp_sizes.empty(), "cp: ", one_of(cp_sizes), " with tp=", tp,
                           shape, cp);
  require<InvalidArgument>(cp == 1 || tp_sizes.empty(), "tp: ", one_of(tp_sizes), " with cp=", cp,
                           shape, tp);
  throw InvalidArgument(message("tp: ", one_of(possible_tp(model)), shape, tp));
}

}  // namespace

LinearDType linear_dtype(const EngineConfig& config) {
  return named<LinearDType>("linear_dtype", kLinearDTypeNames, config.linear_dtype);
}

EngineConfig resolve_engine_config(const EngineConfig& config, const ModelConfig& model) {
  EngineConfig c = config;
  check_parallel_sizes(c.tp, c.cp, model);
  require<InvalidArgument>(c.session_len >= 0 && c.session_len <= kMaxSessionLen,
                           "session_len: expected 0 (the model's own) to ", kMaxSessionLen,
                           " tokens, got ", c.session_len);
  if (c.session_len == 0) c.session_len = model.max_position_embeddings;
  // Within the window, attention is as without one.
  require<Unsupported>(model.sliding_window == 0 || c.session_len <= model.sliding_window,
                       "session_len: expected at most ", model.sliding_window,
                       ", the sliding_window of config.json, which is not supported, got ",
                       c.session_len);
  require<InvalidArgument>(c.max_batch_size >= 1 && c.max_batch_size <= 4096,
                           "max_batch_size: expected an integer in [1, 4096], got ",
                           c.max_batch_size);
  const double entries = c.cache_max_entry_count;
  require<InvalidArgument>(
      std::isfinite(entries) && entries > 0 && (entries < 1 || entries == std::floor(entries)) &&
          entries <= std::numeric_limits<int32_t>::max(),
      "cache_max_entry_count: expected a fraction in (0, 1) or an integer count of blocks, got ",
      entries);
  const int block = c.cache_block_seq_len;
  require<InvalidArgument>(block == 64 || block == 128 || block == 256,
                           "cache_block_seq_len: expected 64, 128 or 256 tokens, got ", block);
  kv_format(c);
  prefill_attention(c);
  linear_dtype(c);
  require<InvalidArgument>(c.max_prefill_token_num >= 0 && c.max_prefill_token_num <= 1 << 20,
                           "max_prefill_token_num: expected 0 (the device's best) to 1048576, got ",
                           c.max_prefill_token_num);
  require<InvalidArgument>(
      c.rope_length.policy != RopeLengthPolicy::kFixed || c.rope_length.tokens >= 1,
      "rope_length: expected an integer >= 1, got ", c.rope_length.tokens);
  return c;
}

void take_device_defaults(EngineConfig& config, const ModelConfig& model,
                          const BackendSizes& backend) {
  const DeviceTraits device = backend.traits();
  require<Unsupported>(!config.deterministic || device.deterministic,
                       "deterministic: expected False on ", backend.describe(), ", got True");
  // Keys in eight bits have lost their mean, of this rank's, and with it their log-sum-exp.
  require<Unsupported>(config.cp == 1 || prefill_attention(config) == PrefillAttention::kNative,
                       "prefill_attention: expected \"auto\" with cp=", config.cp, ", got \"",
                       config.prefill_attention, "\"");
  require<Unsupported>(
      model.head_dim % device.head_dim_multiple == 0 && model.head_dim <= device.max_head_dim,
      "head_dim: expected a multiple of ", device.head_dim_multiple, " up to ", device.max_head_dim,
      " on ", backend.describe(), ", got ", model.head_dim);
  require_one("kv_cache_dtype", backend.kv_formats(model.head_dim), kv_format(config), backend);
  require_one("prefill_attention", backend.prefill_attentions(model.head_dim),
              prefill_attention(config), backend);
  require_one("linear_dtype", backend.linear_dtypes(), linear_dtype(config), backend);
  if (config.max_prefill_token_num == 0) {
    config.max_prefill_token_num = device.prefill_tokens;
  }
}

DecoderLimits decoder_limits(const EngineConfig& c, const DeviceTraits& device) {
  const int64_t batch = c.max_batch_size;
  // No step can hold more of a prompt than a session.
  const int64_t prefill = std::min(c.max_prefill_token_num, batch * c.session_len);
  return {.step = {.max_tokens = prefill + batch,
                   .max_seqs = batch,
                   .max_blocks_per_seq = blocks_for(c.session_len, tokens_per_block(c)),
                   .block_len = c.cache_block_seq_len,
                   .kv_format = kv_format(c),
                   .prefill_attention = prefill_attention(c)},
          .max_logit_rows = std::max(batch, device.logit_rows)};
}

KvShape kv_shape(const EngineConfig& c, const ModelConfig& m, const Shard& shard) {
  return {.num_layers = m.num_layers,
          .num_kv_heads = shard.kv_heads.size(),
          .head_dim = m.head_dim,
          .block_len = c.cache_block_seq_len,
          .format = kv_format(c),
          .context_rank = shard.context_rank,
          .context_size = shard.context_size};
}

int64_t least_prefill_tokens(const EngineConfig& config, const ModelConfig& model,
                             const BackendSizes& backend) {
  const Shard shard = Shard::largest(model, config.tp, config.cp);
  return backend.least_prefill_tokens(
      decoder_limits(config, backend.traits()).step,
      {shard.q_heads.size(), shard.kv_heads.size(), model.head_dim});
}

MemoryPlan make_memory_plan(const EngineConfig& c, const ModelConfig& m,
                            const BackendSizes& backend, int64_t device_bytes) {
  const DeviceTraits device = backend.traits();
  const DecoderLimits limits = decoder_limits(c, device);
  MemoryPlan plan;
  plan.device_bytes = device_bytes;
  plan.session_len = c.session_len;
  const Shard shard = Shard::largest(m, c.tp, c.cp);
  plan.weight_bytes = weight_bytes(m, backend, shard, linear_dtype(c));
  plan.activation_bytes = Decoder::activation_bytes(m, backend, shard, limits);
  plan.workspace_bytes = Decoder::plan_bytes(m, backend, shard, limits) +
                         backend.linear_workspace_bytes(linear_dtype(c));
  plan.overhead_bytes = device.overhead_bytes + (c.tp > 1 ? device.group_bytes : 0);
  plan.block_bytes = backend.kv_block_bytes(kv_shape(c, m, shard));
  const int64_t left = plan.headroom_bytes();                    // no blocks yet
  int64_t most = std::max<int64_t>(left, 0) / plan.block_bytes;  // blocks
  if (c.cache_max_entry_count < 1) {
    most = static_cast<int64_t>(static_cast<double>(most) * c.cache_max_entry_count);
    // More than every sequence at its longest could never be used.
    plan.num_blocks = std::min(most, c.max_batch_size * limits.step.max_blocks_per_seq);
  } else {
    plan.num_blocks = static_cast<int64_t>(c.cache_max_entry_count);
    most = std::min(most, plan.num_blocks);
  }
  plan.num_blocks = std::min<int64_t>(plan.num_blocks, std::numeric_limits<int32_t>::max());
  plan.kv_bytes = plan.num_blocks * plan.block_bytes;
  plan.kv_capacity = plan.num_blocks * tokens_per_block(c);
  plan.max_session_len = most * tokens_per_block(c);
  plan.session_kv_bytes = limits.step.max_blocks_per_seq * plan.block_bytes;
  plan.fits = plan.num_blocks <= most && plan.kv_capacity >= c.session_len;
  return plan;
}

MemoryPlan plan_memory(const std::string& model_dir, const EngineConfig& config,
                       int64_t device_bytes) {
  require<InvalidArgument>(device_bytes >= 0, "device_bytes: expected an integer >= 0, got ",
                           device_bytes);
  const ModelConfig model =
      read_model_config(model_dir, config.hf_overrides, config.rope_scaling_factor, config_dialect);
  EngineConfig resolved = resolve_engine_config(config, model);
  const auto plan = [&](const BackendSizes& sizes, int64_t free_bytes) {
    take_device_defaults(resolved, model, sizes);
    return plan_with_remedies(resolved, model, sizes,
                              device_bytes == 0 ? free_bytes : device_bytes);
  };
  if (const NamedDevice* device = find_named_device(config.device)) {
    return plan(*make_sizes(*device, config.dtype), device->bytes);
  }
  const int threads = config.num_threads == 0 ? available_cpus() : config.num_threads;
  const auto of_rank = static_cast<int>(largest_share(threads, config.tp));
  const auto backend = make_backend(config.device, config.dtype, of_rank);
  const int sharing = backend->traits().shares_memory ? config.tp : 1;  // ranks
  return plan(*backend, backend->free_bytes() / sharing);
}

}  // namespace longspan
