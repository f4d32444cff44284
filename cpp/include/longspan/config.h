#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "longspan/rope.h"

namespace longspan {

/// What an engine is built from. Every field either works or is refused by Engine::load.
struct EngineConfig {
  /// "auto", "bfloat16" or "float32": the dtype of weights, the inputs of linears and, unless
  /// kv_cache_dtype says otherwise, the KV cache; accumulation is always float32. "auto" on a CPU
  /// is bfloat16 where it has instructions for it; a GPU has bfloat16 alone.
  std::string dtype = "auto";
  std::string device = "auto";  ///< "auto", "cpu", "cuda" or "cuda:N"; "auto": a GPU that works
  int num_threads = 0;          ///< CPU threads, >= 1; 0: as many as the process may use
  /// Tensor-parallel ranks: GPUs 0 to tp - 1, or shares of the CPU's threads. One that does not
  /// divide the model's heads is refused with those that do.
  int tp = 1;
  /// Context-parallel ranks among the tp, which it divides: so many share the keys and values of
  /// every sequence, block by block, and have the heads of one of tp / cp; all else is split tp
  /// ways. Not with prefill_attention in eight bits.
  int cp = 1;
  /// Longest prompt + output in tokens; 0: the model's max_position_embeddings.
  int64_t session_len = 0;
  int max_batch_size = 8;  ///< sequences running at once, >= 1
  /// KV pool: a fraction (0, 1) of the free memory after weights, or an integer >= 1: blocks.
  double cache_max_entry_count = 0.8;
  int cache_block_seq_len = 64;  ///< tokens per KV block, on each cp rank: 64, 128 or 256
  /// What keys and values are held in: "auto" (the dtype), "int8", "fp8" (e4m3), "int8_fp8" (int8
  /// keys, fp8 values), "int8_int4" or "int4" (keys of six bits, values of four).
  std::string kv_cache_dtype = "auto";
  /// What attention of a prompt forms its products in: "auto" (the dtype); "int8", those of queries
  /// and keys; "int8_fp8", and those of weights and values in e4m3. Other than "auto" on a CUDA
  /// device of compute capability 9.0 and heads of 128 alone.
  std::string prefill_attention = "auto";
  /// What the linears of the layers hold their weights in and multiply in: "auto" (the dtype) or
  /// "int8" (a scale per output and per token, of rows turned by Hadamard), a CUDA device of
  /// compute capability 9.0 alone. Embedding and head stay in the dtype.
  std::string linear_dtype = "auto";
  bool enable_prefix_caching = false;  ///< requests that begin alike share what is computed once
  int64_t max_prefill_token_num = 0;   ///< most prefill tokens in one step; 0: the device's best
  /// 0: the config's RoPE; >= 1: dynamic NTK with that factor.
  double rope_scaling_factor = 0.0;
  RopeLength rope_length;      ///< of requests that do not say
  bool deterministic = false;  ///< bit-identical results: always so on a CPU, refused on a GPU
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
  double min_p = 0.0;  ///< [0, 1]: least probability, as a share of the likeliest token's
  double repetition_penalty = 1.0;  ///< > 0, for tokens of the prompt and the output; 1: none
  double frequency_penalty = 0.0;   ///< finite, for each time the token is in the output
  double presence_penalty = 0.0;    ///< finite, once for a token that is in the output
  int64_t min_new_tokens = 0;       ///< >= 0; no end or stop token comes before
  /// A token that would complete one of these is never drawn; each >= 1 token, prompt included.
  std::vector<std::vector<int32_t>> bad_sequences;
  /// With each token its log probability and those of this many likeliest ones, at most
  /// kMaxLogprobs; nullopt: none.
  std::optional<int32_t> logprobs;
  std::optional<uint64_t> seed;         ///< nullopt: drawn at random and reported
  std::vector<int32_t> stop_token_ids;  ///< in addition to the model's end tokens
  bool ignore_eos = false;              ///< do not stop at the model's end tokens
};

}  // namespace longspan
