#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>

#include "backend/kv_cache.h"
#include "backend/linear_dtype.h"
#include "backend/partial_score.h"
#include "backend/sampler.h"
#include "backend/step.h"
#include "core/matrix.h"
#include "core/memory.h"
#include "longspan/logprob.h"
#include "parallel/communicator.h"

namespace longspan {

/// Weights of y = x W^T + bias in the layout the backend's kernels read, one copy.
class PackedLinear {
 public:
  virtual ~PackedLinear() = default;
  virtual int64_t out_features() const = 0;
  virtual int64_t in_features() const = 0;
  virtual LinearDType linear_dtype() const { return LinearDType::kNative; }
};

/// Heads of one attention layer, on this rank.
struct AttentionShape {
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;  ///< divides num_heads
  int64_t head_dim = 0;      ///< even
};

/// RMS norm of every head of q and of k before they are rotated: x / rms(x) * weight.
struct QkNorm {
  const Buffer& q;  ///< float32 [head_dim], of every query head
  const Buffer& k;  ///< float32 [head_dim], of every KV head
  float eps = 0;
};

inline constexpr int64_t kMaxDrawn = 16384;  ///< rows of a draw of tokens

/// What a device works best with, for the engine to size its steps by.
struct DeviceTraits {
  int64_t prefill_tokens = 0;     ///< most prefill tokens in one step, unless the config says
  int64_t logit_rows = 0;         ///< rows of logits at once
  double flops_per_second = 0.0;  ///< first guess at the rate of a prefill
  double step_seconds = 1.0;      ///< how long a step may take
  bool shares_memory = false;     ///< the ranks of a process all take from the same
  bool runs_behind = false;       ///< ops return before they are done
  bool deterministic = false;     ///< results never depend on company or chunks, bit for bit
  /// Memory that the driver, the code of kernels and libraries take beside what a plan lists.
  int64_t overhead_bytes = 0;
  int64_t group_bytes = 0;        ///< and what combining the ranks of a group takes
  int64_t head_dim_multiple = 2;  ///< what divides every head_dim it can run
  int64_t max_head_dim = std::numeric_limits<int64_t>::max();
};

/// What memory is planned from: what can be said of a device that is not there.
class BackendSizes {
 public:
  virtual ~BackendSizes() = default;

  virtual std::string describe() const = 0;  ///< such as "cpu (amx-bf16, 2 threads)"
  virtual DType activation_dtype() const = 0;
  virtual DType output_dtype() const = 0;
  virtual DType accumulator_dtype() const = 0;
  virtual DeviceTraits traits() const = 0;
  /// What linears can be in, kNative first.
  virtual std::span<const LinearDType> linear_dtypes() const = 0;
  virtual int64_t packed_linear_bytes(int64_t out_features, int64_t in_features,
                                      LinearDType dtype) const = 0;
  /// What all linears that are in a dtype share, once there is one.
  virtual int64_t linear_workspace_bytes(LinearDType dtype) const = 0;
  /// The formats that the cache of a model with such heads can have here, kNative first.
  virtual std::span<const KvFormat> kv_formats(int64_t head_dim) const = 0;
  /// What attention of many rows can form its products in, kNative first.
  virtual std::span<const PrefillAttention> prefill_attentions(int64_t head_dim) const = 0;
  virtual int64_t kv_block_bytes(const KvShape& shape) const = 0;
  virtual int64_t step_plan_bytes(const StepLimits& limits, const AttentionShape& shape) const = 0;
  /// Prefill tokens of a step that occupy the whole device once, whatever the context: fewer take
  /// as long, and what goes beyond a multiple takes as long as the next.
  virtual int64_t least_prefill_tokens(const StepLimits& limits,
                                       const AttentionShape& shape) const = 0;
};

/// Everything a device does. Ops run in the order they are called; shapes are per rank.
/// Sizes: T tokens of the step, H hidden_size, D head_dim, I intermediate size, V vocabulary.
/// "act" is activation_dtype(), what enters a linear; "out" is output_dtype(), what leaves one
/// inside a layer; "acc" is accumulator_dtype(), of the residual stream and the logits. Ops neither
/// allocate nor throw; shapes are the caller's to get right.
class Backend : public BackendSizes {
 public:
  /// Memory that could be had now, of which DeviceTraits::overhead_bytes and, in a group,
  /// group_bytes are not the engine's.
  virtual int64_t free_bytes() const = 0;

  /// Lets the ranks of a group combine the matrices of their backends. host: this rank's end of
  /// the group, over host memory. All ranks call it at the same time. Throws ParallelError, or
  /// BackendUnavailable with what to install.
  virtual std::unique_ptr<Communicator> make_communicator(std::unique_ptr<Communicator> host) = 0;

  /// Zero-filled device memory. Throws CapacityError.
  virtual Buffer allocate(int64_t bytes) = 0;

  // ---- weights; thread-safe, so that a loader may pack many tensors at once ----

  /// Stacks parts along the rows (all cols equal in_features), converts and packs them.
  /// biases: empty, or one vector per part. dtype: one of linear_dtypes().
  virtual std::unique_ptr<PackedLinear> pack_linear(std::span<const WeightView> parts,
                                                    std::span<const WeightView> biases,
                                                    LinearDType dtype) = 0;
  /// A float32 vector.
  virtual Buffer pack_vector(const WeightView& vector) = 0;

  // ---- the cache ----

  /// Copies the keys and values of the first `tokens` tokens of block `from`, of all layers and
  /// heads, to block `to`, whose other tokens then count as not yet appended.
  /// from != to; 0 < tokens <= block_len.
  virtual void copy_kv_block(const KvCache& cache, int32_t from, int32_t to, int64_t tokens) = 0;

  /// Keys and values of the first `tokens` tokens of a block, of all layers and heads, to host
  /// memory and back, exactly as they are held: KvRows(cache.shape, activation_dtype(), tokens).
  /// After an import the block's other tokens count as not yet appended. 0 < tokens <= block_len.
  /// These may allocate, and throw what went wrong on the device.
  virtual void export_kv_block(const KvCache& cache, int32_t block, int64_t tokens,
                               std::span<std::byte> rows) = 0;
  virtual void import_kv_block(const KvCache& cache, int32_t block, int64_t tokens,
                               std::span<const std::byte> rows) = 0;

  // ---- the step ----

  virtual std::unique_ptr<StepPlan> make_step_plan(const StepLimits& limits,
                                                   const AttentionShape& shape) = 0;
  /// Takes in the step: positions, cos/sin (angles in float64), attention work list.
  virtual void plan_step(StepPlan& plan, const StepInput& input, const KvCache& cache) = 0;

  /// Runs the ops of a planned step, which are all of them and no call that gives values to the
  /// host, where the device does that better as a whole: it may note what they are and repeat them
  /// for later steps of the same shape without calling. False: it would not, and nothing has run.
  virtual bool run_whole(StepPlan&, const std::function<void()>& /*ops*/) { return false; }

  /// out[t] = table row of token t; zeros where the table does not have it. table: packed [V, H],
  /// of the tokens from first_token on; out: acc [T, H].
  virtual void embedding(const StepPlan& plan, const PackedLinear& table, int32_t first_token,
                         const MatrixView& out) = 0;

  /// residual += delta (unless null), then out = residual / rms(residual) * weight.
  /// delta: out [T, H]; residual: acc [T, H]; weight: float32 [H]; out: act [T, H].
  virtual void rms_norm(const MatrixView* delta, const MatrixView& residual, const Buffer& weight,
                        float eps, const MatrixView& out) = 0;

  /// y = x W^T + bias. x: act [T, in]; y: out or, of a weight in kNative, acc [T, out].
  virtual void linear(const MatrixView& x, const PackedLinear& weight, const MatrixView& y) = 0;

  /// Norms the heads of q and k (unless norm is null), rotates them by the step's angles, writes q,
  /// and appends k and v to the cache, in its format.
  /// Each sequence turns by its RopeProfile: with P = inv_freq.size() pairs, the same in every
  /// profile of a model and at most D / 2, pair (i, i + P) turns and dims from 2 P on pass through.
  /// Keys and values that another rank has (KvShape::context()) are left out.
  /// The query's rotated dims are multiplied by attention_scale().rotated, and, where logn_length
  /// is set, the query at position p as a whole by max(1, ln(p + 1) / ln logn_length).
  /// qkv: out [T, (num_heads + 2 num_kv_heads) D], q | k | v; q_out: act [T, num_heads D].
  virtual void rotate_append(const StepPlan& plan, int64_t layer, const MatrixView& qkv,
                             const QkNorm* norm, const KvCache& cache, const MatrixView& q_out) = 0;

  /// Causal attention of the step's queries over every cached key of their sequence that this rank
  /// has. Softmax scale: attention_scale() of the profile, attention_factor^2 / sqrt(D) where heads
  /// rotate whole. q, out: act [T, num_heads D]; zeros for a row that has no key here.
  /// log_sum_exp: acc [T, num_heads], natural log of the sum of exp(score), -infinity without keys;
  /// null: nobody asks, as where the rank has all keys.
  virtual void attention(const StepPlan& plan, int64_t layer, const MatrixView& q,
                         const KvCache& cache, const MatrixView& out,
                         const MatrixView* log_sum_exp) = 0;

  /// attention *= exp(l_own) / sum of exp(l_i), row by row and head by head: from what attention()
  /// gives over part `own` of the keys, what these add to attention over all parts.
  /// log_sum_exps: acc [T, parts num_heads], part after part; attention: act [T, num_heads D].
  virtual void weigh_partial_attention(const MatrixView& log_sum_exps, int64_t own,
                                       int64_t num_heads, const MatrixView& attention) = 0;

  /// out = silu(gate) * up. gate_up: out [T, 2 I], gate | up; out: act [T, I].
  virtual void silu_mul(const MatrixView& gate_up, const MatrixView& out) = 0;

  /// silu_mul() of linear(x, weight). gate_up: out [T, 2 I], which a device may use in between or
  /// leave as it is; out: act [T, I].
  virtual void linear_silu_mul(const MatrixView& x, const PackedLinear& weight,
                               const MatrixView& gate_up, const MatrixView& out) {
    linear(x, weight, gate_up);
    silu_mul(gate_up, out);
  }

  /// Marks the end of a layer. A device that runs behind its caller waits here until it is but a
  /// layer or two behind, so that progress and cancellation mean what they say.
  virtual void end_layer(const StepPlan& plan) = 0;

  /// out[i] = in[rows[i]]. in, out: the same dtype and cols.
  virtual void gather_rows(const MatrixView& in, std::span<const int64_t> rows,
                           const MatrixView& out) = 0;

  /// scores[i]: of targets[i] under row i's logits over the tokens that the head has, holding no
  /// more rows of logits than the workspace does. hidden: act [R, H]; head: packed [V, H], of the
  /// tokens from first_token on; workspace: acc [>= 1, V], overwritten as the device likes.
  virtual void score(const MatrixView& hidden, const PackedLinear& head, int32_t first_token,
                     std::span<const int32_t> targets, const MatrixView& workspace,
                     std::span<PartialScore> scores) = 0;

  /// Draws a token per row, for sampled() and drawn_token(); returns the draw's number. logits: acc
  /// [R, V], the same after as before; 0 < R <= kMaxDrawn.
  virtual int64_t start_sample(const MatrixView& logits, std::span<const SamplerRow> rows) = 0;

  /// Waits for the tokens of a draw, the last or the one before. tokens: [R], -1 where the edited
  /// row was not finite.
  virtual void sampled(int64_t draw, std::span<int32_t> tokens) = 0;

  /// Natural-log probabilities under softmax(logits). logits: acc [R, V]; tokens: [R];
  /// 0 <= top <= min(V, kMaxLogprobs); out: [R][1 + top], first tokens[r], then the row's likeliest
  /// tokens, likeliest first (among equals the lower id).
  virtual void log_probabilities(const MatrixView& logits, std::span<const int32_t> tokens,
                                 int64_t top, std::span<TokenLogprob> out) = 0;

  /// Copies to host memory as float32, rows packed without gaps. in: act, out or acc.
  virtual void download(const MatrixView& in, float* out) = 0;

  /// The way back: float32 rows in host memory, without gaps, rounded to the dtype of out.
  virtual void upload(const float* in, const MatrixView& out) = 0;
};

}  // namespace longspan
