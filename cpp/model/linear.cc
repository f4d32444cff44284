#include "model/linear.h"

#include <algorithm>

namespace longspan {
namespace {

WeightView cut(const WeightView& view, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  WeightView out = view;
  out.data = static_cast<const char*>(view.row(row)) + col * size_of(view.dtype);
  out.rows = rows;
  out.cols = cols;
  return out;
}

int64_t total_rows(const LinearTensors& tensors) {
  int64_t rows = 0;
  for (const WeightView& part : tensors.parts) rows += part.rows;
  return rows;
}

}  // namespace

LinearTensors slice_rows(const LinearTensors& tensors, int64_t begin, int64_t end) {
  LinearTensors out;
  int64_t start = 0;  // first row of the part at hand
  for (size_t i = 0; i < tensors.parts.size(); ++i) {
    const WeightView& part = tensors.parts[i];
    const int64_t first = std::max(begin - start, int64_t{0});
    const int64_t last = std::min(end - start, part.rows);
    if (first < last) {
      out.parts.push_back(cut(part, first, last - first, 0, part.cols));
      if (!tensors.bias.empty())
        out.bias.push_back(cut(tensors.bias[i], 0, 1, first, last - first));
    }
    start += part.rows;
  }
  return out;
}

LinearTensors slice_cols(const LinearTensors& tensors, int64_t begin, int64_t end, bool keep_bias) {
  LinearTensors out;
  for (const WeightView& part : tensors.parts) {
    out.parts.push_back(cut(part, 0, part.rows, begin, end - begin));
  }
  if (keep_bias) out.bias = tensors.bias;
  return out;
}

ColumnParallelLinear::ColumnParallelLinear(Backend& backend, const Communicator& communicator,
                                           std::span<const LinearTensors* const> fused) {
  LinearTensors all;
  for (const LinearTensors* tensors : fused) {
    const int64_t share = total_rows(*tensors) / communicator.size();
    const int64_t begin = communicator.rank() * share;
    LinearTensors mine = slice_rows(*tensors, begin, begin + share);
    all.parts.insert(all.parts.end(), mine.parts.begin(), mine.parts.end());
    all.bias.insert(all.bias.end(), mine.bias.begin(), mine.bias.end());
  }
  packed_ = backend.pack_linear(all.parts, all.bias);
}

void ColumnParallelLinear::forward(Backend& backend, const MatrixView& x,
                                   const MatrixView& y) const {
  backend.linear(x, *packed_, y);
}

void ColumnParallelLinear::forward_silu_mul(Backend& backend, const MatrixView& x,
                                            const MatrixView& gate_up, const MatrixView& y) const {
  backend.linear_silu_mul(x, *packed_, gate_up, y);
}

RowParallelLinear::RowParallelLinear(Backend& backend, const Communicator& communicator,
                                     const LinearTensors& tensors) {
  const int64_t share = tensors.parts.front().cols / communicator.size();
  const int64_t begin = communicator.rank() * share;
  const LinearTensors mine = slice_cols(tensors, begin, begin + share, communicator.rank() == 0);
  packed_ = backend.pack_linear(mine.parts, mine.bias);
}

void RowParallelLinear::forward(Backend& backend, Communicator& communicator, const MatrixView& x,
                                const MatrixView& y) const {
  backend.linear(x, *packed_, y);
  communicator.all_reduce(y);
}

}  // namespace longspan
