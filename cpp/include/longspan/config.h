#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "longspan/rope.h"

namespace longspan {

/// What an engine is built from. Every field either works or is refused by Engine::load.
struct EngineConfig {
  /// "auto", "bfloat16" or "float32": the dtype of weights, KV cache and the inputs of linears;
  /// accumulation is always float32. "auto" on a CPU is bfloat16 where it has instructions for it.
  std::string dtype = "auto";
  std::string device = "auto";  ///< "auto" or "cpu"
  int num_threads = 0;          ///< CPU threads, >= 1; 0: as many as the process may use
  int tp = 1;                   ///< tensor-parallel ranks; only 1 so far
  /// Longest prompt + output in tokens; 0: the model's max_position_embeddings.
  int64_t session_len = 0;
  int max_batch_size = 8;  ///< sequences running at once, >= 1
  /// KV pool: a fraction (0, 1) of the free memory after weights, or an integer >= 1: blocks.
  double cache_max_entry_count = 0.8;
  int cache_block_seq_len = 64;       ///< tokens per KV block: 64, 128 or 256
  int64_t max_prefill_token_num = 0;  ///< most prefill tokens in one step; 0: the device's best
  /// 0: the config's RoPE; >= 1: dynamic NTK with that factor.
  double rope_scaling_factor = 0.0;
  RopeLength rope_length;
  bool deterministic = false;  ///< bit-identical results; on the CPU they always are
  /// JSON object merged into config.json (RFC 7396 merge patch); empty: nothing.
  std::string hf_overrides;
};

/// How one request generates.
struct GenerationConfig {
  std::optional<int64_t> max_new_tokens = 512;  ///< >= 0; nullopt: until session_len
  bool do_sample = false;                       ///< false: greedy
  double temperature = 1.0;                     ///< > 0
  int top_k = 0;                                ///< >= 0; 0: all tokens
  double top_p = 1.0;                           ///< (0, 1]
  std::optional<uint64_t> seed;                 ///< nullopt: drawn at random and reported
  std::vector<int32_t> stop_token_ids;          ///< in addition to the model's end tokens
  bool ignore_eos = false;                      ///< do not stop at the model's end tokens
};

}  // namespace longspan
