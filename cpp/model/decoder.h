#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "backend/backend.h"
#include "model/activations.h"
#include "model/weights.h"

namespace longspan {

/// What a forward pass holds at most; fixes its buffers.
struct DecoderLimits {
  StepLimits step;
  int64_t max_logit_rows = 0;  ///< rows of logits at once
};

/// Called after each layer, or of a pass that a device runs as a whole after the last, with the
/// number done; false abandons the pass. The keys and values written so far are overwritten when
/// the same positions run again, so nothing needs undoing.
using LayerCallback = std::function<bool(int64_t layers_done)>;

/// A decoder-only transformer: rotary attention over a block KV cache, RMS norm, gated MLP.
/// Written once for every backend and number of ranks; each rank's does the same at the same time,
/// and each has the whole result. Not thread-safe.
class Decoder {
 public:
  /// shard: this rank's, whose weights these are.
  Decoder(const ModelConfig& config, const Shard& shard, Backend& backend,
          Communicator& communicator, DecoderWeights weights, const DecoderLimits& limits);

  /// Runs the step, filling the cache. False when the callback abandoned it.
  /// cache_only: nobody will ask for a row of this step (a prompt's chunks but the last), so that
  /// the last layer ends when its keys and values are in the cache.
  bool forward(const StepInput& input, const KvCache& cache, bool cache_only,
               const LayerCallback& after_layer);

  /// Logits of rows of the last forward, at most max_logit_rows: acc [rows.size(), vocab_size].
  /// The view holds until the next call.
  MatrixView logits(std::span<const int64_t> rows);

  /// nll[i]: negative log-likelihood, natural log, of targets[i] after row rows[i] of the last
  /// forward.
  void negative_log_likelihood(std::span<const int64_t> rows, std::span<const int32_t> targets,
                               std::span<double> nll);

  /// What this rank has of the model.
  const Shard& shard() const { return shard_; }
  const ModelConfig& config() const { return config_; }

  /// Bytes a Decoder allocates for activations, and for the step plan.
  static int64_t activation_bytes(const ModelConfig& config, const BackendSizes& backend,
                                  const Shard& shard, const DecoderLimits& limits);
  static int64_t plan_bytes(const ModelConfig& config, const BackendSizes& backend,
                            const Shard& shard, const DecoderLimits& limits);

 private:
  /// The layers of a step of so many tokens, which is planned; see forward().
  bool run_layers(int64_t tokens, const KvCache& cache, bool cache_only,
                  const LayerCallback& after_layer);
  /// Attention over all keys of the context, as far as this rank's add to it.
  void attend(int64_t layer, const MatrixView& q, const KvCache& cache, const MatrixView& out);
  MatrixView gather_head_input(std::span<const int64_t> rows);
  int32_t first_token() const { return static_cast<int32_t>(shard_.tokens.begin); }

  const ModelConfig config_;
  const Shard shard_;
  Backend& backend_;
  Communicator& communicator_;
  const DecoderWeights weights_;
  const DecoderLimits limits_;
  const std::unique_ptr<StepPlan> plan_;
  const Activations activations_;
};

}  // namespace longspan
