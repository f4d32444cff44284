#pragma once

#include <memory>
#include <span>

#include "backend/backend.h"
#include "model/architecture.h"
#include "parallel/communicator.h"

namespace longspan {

/// Rows [begin, end) of the stacked parts; a bias is cut alike.
LinearTensors slice_rows(const LinearTensors& tensors, int64_t begin, int64_t end);
/// Columns [begin, end) of every part; a bias is kept on rank 0 only, since the ranks' outputs add.
LinearTensors slice_cols(const LinearTensors& tensors, int64_t begin, int64_t end, bool keep_bias);

/// A linear whose outputs are split over the ranks. Several may be fused into one product.
class ColumnParallelLinear {
 public:
  /// Fuses this rank's slice of each of `fused`, one after the other.
  ColumnParallelLinear(Backend& backend, const Communicator& communicator,
                       std::span<const LinearTensors* const> fused);
  /// x: act [T, in]; y: acc [T, this rank's outputs].
  void forward(Backend& backend, const MatrixView& x, const MatrixView& y) const;
  /// Of gate and up, fused: Backend::linear_silu_mul().
  void forward_silu_mul(Backend& backend, const MatrixView& x, const MatrixView& gate_up,
                        const MatrixView& y) const;

 private:
  std::unique_ptr<PackedLinear> packed_;
};

/// A linear whose inputs are split over the ranks; the outputs are summed over them.
class RowParallelLinear {
 public:
  RowParallelLinear(Backend& backend, const Communicator& communicator,
                    const LinearTensors& tensors);
  /// x: act [T, this rank's inputs]; y: acc [T, out].
  void forward(Backend& backend, Communicator& communicator, const MatrixView& x,
               const MatrixView& y) const;

 private:
  std::unique_ptr<PackedLinear> packed_;
};

}  // namespace longspan
