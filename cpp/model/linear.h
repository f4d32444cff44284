#pragma once

#include <memory>
#include <span>

#include "backend/backend.h"
#include "model/architecture.h"

namespace longspan {

/// A linear whose outputs are split over the ranks. Several may be fused into one product.
class ColumnParallelLinear {
 public:
  /// Fuses this rank's rows of each linear, one after the other.
  ColumnParallelLinear(Backend& backend, std::span<const LinearTensors* const> fused,
                       LinearDType dtype);
  /// x: act [T, in]; y: out [T, this rank's outputs].
  void forward(Backend& backend, const MatrixView& x, const MatrixView& y) const;
  /// Of gate and up, fused: Backend::linear_silu_mul().
  void forward_silu_mul(Backend& backend, const MatrixView& x, const MatrixView& gate_up,
                        const MatrixView& y) const;

 private:
  std::unique_ptr<PackedLinear> packed_;
};

/// A linear whose inputs are split over the ranks; the outputs are to be summed over them.
class RowParallelLinear {
 public:
  /// tensors: this rank's columns; a bias with one rank only.
  RowParallelLinear(Backend& backend, const LinearTensors& tensors, LinearDType dtype);
  /// x: act [T, this rank's inputs]; y: out [T, out], of all rows this rank's part of the sums.
  void forward(Backend& backend, const MatrixView& x, const MatrixView& y) const;

 private:
  std::unique_ptr<PackedLinear> packed_;
};

}  // namespace longspan
