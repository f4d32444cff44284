#include "backend/cpu/linear.h"

#include <algorithm>
#include <vector>

#include "backend/cpu/convert.h"

namespace longspan::cpu {
namespace {

// Rows of x that share a pass over the weights: with a panel they fit the second-level cache.
constexpr int64_t kMostRows = 512;
constexpr int64_t kRowBytes = int64_t{768} * 1024;
// Jobs per thread, so that a slow thread does not hold the others up.
constexpr int64_t kJobsPerThread = 4;

/// Writes row n of W [N, K] into its panel of B = W^T.
template <class T>
void pack_row(const float* row, int64_t k, int64_t n, T* panel) {
  for (int64_t i = 0; i < k; ++i) panel[index_in_panel<T>(i, n)] = from_float<T>(row[i]);
}

/// Reads it back.
template <class T>
void unpack_row(const T* panel, int64_t k, int64_t n, float* row) {
  for (int64_t i = 0; i < k; ++i) row[i] = to_float(panel[index_in_panel<T>(i, n)]);
}

}  // namespace

CpuPackedLinear::CpuPackedLinear(DType dtype, std::span<const WeightView> parts,
                                 std::span<const WeightView> biases)
    : dtype_(dtype), in_features_(parts.front().cols) {
  for (const WeightView& part : parts) out_features_ += part.rows;
  weights_ = allocate_host(bytes(dtype, out_features_, in_features_));
  panel_bytes_ = weights_.bytes() / panels();
  std::vector<float> row(static_cast<size_t>(in_features_));
  int64_t n = 0;  // row of the stack
  for (const WeightView& part : parts) {
    for (int64_t r = 0; r < part.rows; ++r, ++n) {
      read_floats(part, r, row.data());
      char* panel = weights_.as<char>() + n / kPanelCols * panel_bytes_;
      if (dtype == DType::kF32) {
        pack_row(row.data(), in_features_, n, reinterpret_cast<float*>(panel));
      } else {
        pack_row(row.data(), in_features_, n, reinterpret_cast<bf16_t*>(panel));
      }
    }
  }
  if (biases.empty()) return;
  bias_ = allocate_host(panels() * kPanelCols * 4);
  n = 0;
  for (const WeightView& bias : biases) {
    read_floats(bias, 0, bias_.as<float>() + n);
    n += bias.cols;
  }
}

int64_t CpuPackedLinear::bytes(DType dtype, int64_t out_features, int64_t in_features) {
  return dtype == DType::kF32 ? panel_elements<float>(in_features, out_features) * 4
                              : panel_elements<bf16_t>(in_features, out_features) * 2;
}

Buffer pack_vector(const WeightView& vector) {
  Buffer out = allocate_host(vector.cols * 4);
  read_floats(vector, 0, out.as<float>());
  return out;
}

void linear(const Kernels& kernels, ThreadPool& pool, const MatrixView& x,
            const CpuPackedLinear& weight, const MatrixView& y) {
  const int64_t fitting = kRowBytes / (x.stride * size_of(x.dtype)) / 32 * 32;
  const int64_t block = std::clamp<int64_t>(fitting, 32, kMostRows);
  const int64_t row_blocks = (x.rows + block - 1) / block;
  const int64_t per_job =
      std::max<int64_t>(1, weight.panels() * row_blocks / (pool.size() * kJobsPerThread));
  const int64_t jobs_per_block = (weight.panels() + per_job - 1) / per_job;
  pool.parallel_for(row_blocks * jobs_per_block, [&](int64_t job, int) {
    const int64_t row = job / jobs_per_block * block;
    const int64_t panel = job % jobs_per_block * per_job;
    kernels.gemm({.a = x.rows_from(row, 1).data,
                  .a_stride = x.stride,
                  .m = std::min(block, x.rows - row),
                  .k = x.cols,
                  .b = weight.panel(panel),
                  .panels = std::min(per_job, weight.panels() - panel),
                  .c = y.row<float>(row) + panel * kPanelCols,
                  .c_stride = y.stride,
                  .bias = weight.bias(panel)});
  });
}

void embedding(ThreadPool& pool, std::span<const int32_t> ids, const CpuPackedLinear& table,
               int32_t first_token, const MatrixView& out) {
  pool.parallel_for(out.rows, [&](int64_t t, int) {
    const int64_t id = ids[static_cast<size_t>(t)] - first_token;
    if (id < 0 || id >= table.out_features()) {
      std::fill_n(out.row<float>(t), out.cols, 0.0f);
      return;
    }
    const void* panel = table.panel(id / kPanelCols);
    if (table.dtype() == DType::kF32) {
      unpack_row(static_cast<const float*>(panel), out.cols, id, out.row<float>(t));
    } else {
      unpack_row(static_cast<const bf16_t*>(panel), out.cols, id, out.row<float>(t));
    }
  });
}

}  // namespace longspan::cpu
