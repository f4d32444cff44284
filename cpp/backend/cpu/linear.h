#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "backend/backend.h"
#include "backend/cpu/kernels.h"
#include "core/thread_pool.h"

namespace longspan::cpu {

/// W [N, K] as B = W^T [K, N] in the layout of panel.h, act dtype; a bias float32 [N], padded with
/// zeros to whole panels, or none.
class CpuPackedLinear final : public PackedLinear {
 public:
  CpuPackedLinear(DType dtype, std::span<const WeightView> parts,
                  std::span<const WeightView> biases);

  int64_t out_features() const override { return out_features_; }
  int64_t in_features() const override { return in_features_; }
  int64_t panels() const { return (out_features_ + kPanelCols - 1) / kPanelCols; }
  DType dtype() const { return dtype_; }
  const void* panel(int64_t index) const {
    return weights_.as<const char>() + index * panel_bytes_;
  }
  /// The bias from a panel on; null when there is none.
  const float* bias(int64_t panel) const {
    return bias_.data() == nullptr ? nullptr : bias_.as<const float>() + panel * kPanelCols;
  }

  /// Bytes of the packed weights, without a bias.
  static int64_t bytes(DType dtype, int64_t out_features, int64_t in_features);

 private:
  DType dtype_;
  int64_t out_features_ = 0;
  int64_t in_features_ = 0;
  int64_t panel_bytes_ = 0;
  Buffer weights_;
  Buffer bias_;
};

/// A vector as float32 [cols].
Buffer pack_vector(const WeightView& vector);

/// Backend::linear.
void linear(const Kernels& kernels, ThreadPool& pool, const MatrixView& x,
            const CpuPackedLinear& weight, const MatrixView& y);

/// Backend::embedding: rows of the table the output head may share.
void embedding(ThreadPool& pool, std::span<const int32_t> ids, const CpuPackedLinear& table,
               int32_t first_token, const MatrixView& out);

/// Backend::score. A thread holds a tile of logits, never whole rows.
/// workspace: score_workspace_bytes(pool.size()).
void score(const Kernels& kernels, ThreadPool& pool, const MatrixView& hidden,
           const CpuPackedLinear& head, int32_t first_token, std::span<const int32_t> targets,
           float* workspace, std::span<PartialScore> scores);

int64_t score_workspace_bytes(int num_threads);

}  // namespace longspan::cpu
