#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/attention_decode.h"
#include "backend/cuda/attention_prefill_int8_fp8_sm90.h"
#include "backend/cuda/attention_prefill_int8_sm90.h"
#include "backend/cuda/attention_prefill_sm90.h"
#include "backend/cuda/device_facts.h"
#include "backend/cuda/device_memory.h"
#include "backend/cuda/plan_view.h"
#include "backend/cuda/prefill_passes.h"
#include "backend/cuda/step_graphs.h"

namespace longspan::cuda {

/// A PrefillPass, its work for the one kernel or the other in device memory.
struct PlannedPass {
  PrefillPass pass;
  PrefillWorkSm90 sm90;
  std::span<const PrefillTile> tiles;
  const int32_t* seqs = nullptr;  ///< [pass.num_seqs], indices in PlanView::seqs
};

/// Where passes put the keys and values of a quantised cache in bfloat16, and both in eight bits.
struct PrefillWorkspace {
  char* panels = nullptr;                 ///< [panels]{K panel, V panel}, as blocks of kNative
  const int32_t* identity = nullptr;      ///< [panels], 0, 1, ...: every block table in one
  const SeqView* seqs = nullptr;          ///< [num_seqs], with the tables that each has in its pass
  char* int8_panels = nullptr;            ///< [panels], Int8Keys::panels of a pass
  Int8PanelScale* int8_scales = nullptr;  ///< [panels], Int8Keys::scales
  float* key_means = nullptr;             ///< [max_seqs][num_kv_heads][head_dim], Int8Keys::means
  char* fp8_panels = nullptr;             ///< [panels], Fp8Values::panels of a pass
  float* fp8_scales = nullptr;            ///< [panels], Fp8Values::scales
};

/// What the CUDA ops read in every layer of a step. The host works out the lists and sends them in
/// one copy; the device adds cos and sin. All memory is taken at construction. In steps of one row
/// to each sequence the lists lie where their number says, so that a graph finds them.
class CudaStepPlan final : public StepPlan {
 public:
  CudaStepPlan(const StepLimits& limits, const AttentionShape& shape, const DeviceFacts& facts);

  /// Device bytes that such a plan takes.
  static int64_t bytes(const StepLimits& limits, const AttentionShape& shape,
                       const DeviceFacts& facts);

  /// Whether prefills read their keys by way of the PrefillWorkspace.
  static constexpr bool has_workspace(const StepLimits& limits) {
    return limits.kv_format != KvFormat::kNative ||
           limits.prefill_attention != PrefillAttention::kNative;
  }

  /// Takes in a step; input may die afterwards. Waits for nothing but the copy before last.
  void plan(const StepInput& input, const KvCache& cache, cudaStream_t stream);

  /// The shape of a step of one row to each sequence, of fewer than `rows`; none of any other.
  std::optional<StepShape> shape_below(int64_t rows) const;
  /// Of steps planned here.
  StepGraphs& graphs() { return graphs_; }

  const AttentionShape& shape() const { return shape_; }
  const PlanView& view() const { return view_; }
  /// What log-n attention multiplies each row's query by: device [num_tokens]; null: nothing.
  const float* query_factor() const { return query_factor_; }
  int64_t num_tokens() const { return view_.num_tokens; }
  /// Whether the prefill kernel of Hopper takes this step's prefills.
  bool uses_sm90() const { return uses_sm90_; }
  /// What that forms their products in.
  PrefillAttention prefill_attention() const { return limits_.prefill_attention; }
  /// The prefills; of a cache that is read as it is one pass at most, over all KV heads.
  std::span<const PlannedPass> prefills() const { return prefills_; }
  const PrefillWorkspace& workspace() const { return workspace_; }
  const DecodeWork& decode() const { return decode_; }
  const DecodeLaunch& decode_launch() const { return decode_launch_; }
  bool has_decode() const { return has_decode_; }
  /// Whether there are rows that see no key here.
  bool has_unseeing_rows() const { return has_unseeing_rows_; }

 private:
  /// Where the arrays lie that stay on the device, one after another from base.
  struct Memory {
    Memory(char* base, const StepLimits& limits, const AttentionShape& shape);

    int32_t* row_seq = nullptr;             // [max_tokens]
    float* cos_sin = nullptr;               // [max_tokens][head_dim / 2]{cos, sin}
    float* partial_out = nullptr;           // [partial rows][head_dim]
    float* partial_lse = nullptr;           // [partial rows]
    char* panels = nullptr;                 // PrefillWorkspace::panels
    int32_t* identity = nullptr;            // PrefillWorkspace::identity
    char* int8_panels = nullptr;            // PrefillWorkspace::int8_panels
    Int8PanelScale* int8_scales = nullptr;  // PrefillWorkspace::int8_scales
    float* key_means = nullptr;             // PrefillWorkspace::key_means
    char* fp8_panels = nullptr;             // PrefillWorkspace::fp8_panels
    float* fp8_scales = nullptr;            // PrefillWorkspace::fp8_scales
    int64_t bytes = 0;
  };
  static int64_t upload_bytes(const StepLimits& limits, const AttentionShape& shape,
                              const DeviceFacts& facts);

  void plan_sequences(const StepInput& input);
  void plan_profiles(const StepInput& input);
  void plan_query_factors(const StepInput& input);

  const StepLimits limits_;
  const AttentionShape shape_;
  const DeviceFacts facts_;
  const bool uses_sm90_;
  const int64_t workspace_panels_;  // 0: the cache is read as it is
  Buffer buffer_;
  const Memory memory_;
  UploadRing ring_;
  DecodeLaunch decode_launch_;

  // of the step being planned, on the host
  std::vector<SeqView> seqs_;
  std::vector<int32_t> tables_;
  std::vector<double> inv_freq_;
  std::vector<float> query_factors_;  // empty: all 1
  std::vector<PrefillSeq> prefill_seqs_;
  std::vector<DecodeSeq> decode_seqs_;

  PlanView view_;
  const float* query_factor_ = nullptr;
  std::vector<PlannedPass> prefills_;
  PrefillWorkspace workspace_;
  DecodeWork decode_;
  bool has_decode_ = false;
  bool has_unseeing_rows_ = false;
  bool is_uniform_ = false;      // one row to each sequence, which sees keys
  const void* cache_ = nullptr;  // the pool's
  StepGraphs graphs_;
};

}  // namespace longspan::cuda
