#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "longspan/config.h"
#include "longspan/context.h"
#include "longspan/export.h"
#include "longspan/plan.h"
#include "longspan/request.h"
#include "longspan/signal.h"

namespace longspan {

/// Called while weights load, in the loading thread: bytes read so far and in all.
using LoadProgress = std::function<void(int64_t done_bytes, int64_t total_bytes)>;

/// A snapshot of what the engine is doing. When a request has finished, it counts what the request
/// took, and its blocks as free.
struct EngineMetrics {
  int64_t waiting = 0;      ///< requests
  int64_t running = 0;      ///< requests
  int64_t free_blocks = 0;  ///< neither in use nor promised; blocks that are only cached included
  int64_t total_blocks = 0;
  int64_t steps = 0;  ///< forward passes completed
  int64_t prefilled_tokens = 0;
  int64_t generated_tokens = 0;
  // Of the prefix cache; all zero without enable_prefix_caching.
  int64_t cached_blocks = 0;       ///< known to it, in use or not
  int64_t prefix_hit_tokens = 0;   ///< prompt tokens whose keys and values were reused
  int64_t prefix_miss_tokens = 0;  ///< prompt tokens that were computed; scores, which never reuse
                                   ///< any, not counted
  int64_t prefix_evictions = 0;    ///< blocks that made room for others
};

/// Facts about the loaded model.
struct ModelInfo {
  std::string architecture;  ///< "LlamaForCausalLM"
  int64_t vocab_size = 0;
  int64_t num_layers = 0;
  int64_t hidden_size = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t num_parameters = 0;
  int64_t native_length = 0;           ///< tokens; see RopeProfile
  std::vector<int32_t> eos_token_ids;  ///< generation_config.json, else config.json
  std::string dtype;                   ///< the dtype in force
  std::string backend;                 ///< such as "cpu (amx-bf16, 2 threads)"
  std::string rope;                    ///< the resolved RoPE method, one line
};

/// A language model ready to run: token ids in, token ids out. Thread-safe.
/// One background thread steps all requests together (continuous batching, chunked prefill).
class LONGSPAN_API Engine {
 public:
  /// Loads a Hugging Face model directory (config.json, *.safetensors). Where a launcher started
  /// config.tp processes, they are the ranks, and this one is rank 0.
  /// Throws CheckpointError, Unsupported, InvalidArgument, CapacityError, BackendUnavailable, or
  /// ParallelError when not all ranks come within a minute.
  static std::unique_ptr<Engine> load(const std::string& model_dir, const EngineConfig& config = {},
                                      const LoadProgress& progress = {});

  /// In a process that a launcher (torchrun, mpirun, srun) started as another rank than 0: loads
  /// its share of the model, does what rank 0 says until that closes its engine, and returns true.
  /// Elsewhere returns false at once, and load() is to be called. Throws as load(), and
  /// ParallelError when rank 0 is lost.
  static bool follow(const std::string& model_dir, const EngineConfig& config,
                     const LoadProgress& progress = {});
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  /// Validates and queues a request; the work happens in the background.
  /// Throws ContextTooLong, CapacityError, InvalidArgument or EngineClosed before any work.
  /// signal: notified whenever the request moves on; null: none.
  RequestHandle submit(Request request, const std::shared_ptr<Signal>& signal = nullptr);

  /// submit() of several that enter together, so that where nothing else runs each meets the same
  /// company every time; all of them, or none where one is refused.
  std::vector<RequestHandle> submit_all(std::vector<Request> requests,
                                        const std::shared_ptr<Signal>& signal = nullptr);

  /// Throws what submit() would, without submitting.
  void check(const Request& request) const;

  /// submit() and wait, reporting progress in the calling thread. An exception thrown by the
  /// callback cancels the request and propagates. Throws what submit() and wait() do.
  RequestOutput run(Request request, const ProgressCallback& on_progress = {});

  /// Keeps what a prompt costs: computes the keys and values of input_ids, as far as the prefix
  /// cache does not have them, and writes them to a file, in the format of the cache. The request
  /// is one of no new tokens; rope_length: as Request's. Until it is whole the file is `path`.part;
  /// one that was there is replaced. Other requests go on meanwhile. An exception thrown by the
  /// callback ends it, leaves no file and propagates.
  /// checkpoint_tokens >= 1: after each so many tokens the file is written with those, a context of
  /// its own, so that a process that dies or an exception loses no more than they cost. The next
  /// call goes on from such a file, to the same bits; a file at `path` that holds anything else is
  /// not replaced. Beside the file there must be room for its successor.
  /// Throws what submit() does, InvalidArgument without enable_prefix_caching, CheckpointError
  /// where the file cannot be written or gone on from, CapacityError when other requests took the
  /// room, and NumericalError.
  Context save_context(std::vector<int32_t> input_ids, const std::string& path,
                       const std::optional<RopeLength>& rope_length = std::nullopt,
                       int64_t checkpoint_tokens = 0, const ContextCallback& on_progress = {});

  /// Reads such a file into the prefix cache, so that prompts that begin with its token_ids, under
  /// a profile of the same values, compute only what follows. It may be of another device, tp, cp,
  /// cache_block_seq_len, dtype or kv_cache_dtype; in the same format keys and values are the same
  /// bits. Nothing in the file is trusted. It is all there or, where this throws, nothing.
  /// Throws InvalidArgument without enable_prefix_caching, CheckpointError naming the field where
  /// the file is damaged or of another model, ContextTooLong, and CapacityError where there is no
  /// room now.
  Context load_context(const std::string& path, const ContextCallback& on_progress = {});

  /// The profile of a request of prompt_tokens (>= 1) and max_new_tokens (>= 0) tokens.
  RopeProfile rope_profile(int64_t prompt_tokens, int64_t max_new_tokens = 0) const;

  EngineMetrics metrics() const;
  const ModelInfo& model() const;
  const EngineConfig& config() const;  ///< with every default resolved
  const MemoryPlan& plan() const;

  /// Ends every request with EngineClosed, joins the thread and frees all memory. Idempotent.
  void close();

 private:
  class Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace longspan
