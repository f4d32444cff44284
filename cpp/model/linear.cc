#include "model/linear.h"

namespace longspan {

ColumnParallelLinear::ColumnParallelLinear(Backend& backend,
                                           std::span<const LinearTensors* const> fused,
                                           LinearDType dtype) {
  LinearTensors all;
  for (const LinearTensors* tensors : fused) {
    all.parts.insert(all.parts.end(), tensors->parts.begin(), tensors->parts.end());
    all.bias.insert(all.bias.end(), tensors->bias.begin(), tensors->bias.end());
  }
  packed_ = backend.pack_linear(all.parts, all.bias, dtype);
}

void ColumnParallelLinear::forward(Backend& backend, const MatrixView& x,
                                   const MatrixView& y) const {
  backend.linear(x, *packed_, y);
}

void ColumnParallelLinear::forward_silu_mul(Backend& backend, const MatrixView& x,
                                            const MatrixView& gate_up, const MatrixView& y) const {
  backend.linear_silu_mul(x, *packed_, gate_up, y);
}

RowParallelLinear::RowParallelLinear(Backend& backend, const LinearTensors& tensors,
                                     LinearDType dtype)
    : packed_(backend.pack_linear(tensors.parts, tensors.bias, dtype)) {}

void RowParallelLinear::forward(Backend& backend, const MatrixView& x, const MatrixView& y) const {
  backend.linear(x, *packed_, y);
}

}  // namespace longspan
