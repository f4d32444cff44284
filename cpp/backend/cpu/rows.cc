#include "backend/cpu/rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "backend/cpu/convert.h"

namespace longspan::cpu {
namespace {

// Elements worth handing to a thread: some microseconds of work.
constexpr int64_t kGrain = 8192;

/// Calls fn(row) for every row, several short rows to a job.
template <class Fn>
void for_each_row(ThreadPool& pool, int64_t rows, int64_t cols, Fn fn) {
  const int64_t per_job = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cols));
  pool.parallel_for((rows + per_job - 1) / per_job, [&](int64_t job, int) {
    const int64_t end = std::min(rows, (job + 1) * per_job);
    for (int64_t row = job * per_job; row < end; ++row) fn(row);
  });
}

}  // namespace

void rms_norm(const Kernels& kernels, ThreadPool& pool, const MatrixView* delta,
              const MatrixView& residual, const float* weight, float eps, const MatrixView& out) {
  for_each_row(pool, residual.rows, residual.cols, [&](int64_t row) {
    kernels.rms_norm({.delta = delta == nullptr ? nullptr : delta->row<const float>(row),
                      .residual = residual.row<float>(row),
                      .weight = weight,
                      .eps = eps,
                      .cols = residual.cols,
                      .out = out.rows_from(row, 1).data});
  });
}

void silu_mul(const Kernels& kernels, ThreadPool& pool, const MatrixView& gate_up,
              const MatrixView& out) {
  for_each_row(pool, out.rows, out.cols, [&](int64_t row) {
    const auto* gate = gate_up.row<const float>(row);
    kernels.silu_mul(
        {.gate = gate, .up = gate + out.cols, .cols = out.cols, .out = out.rows_from(row, 1).data});
  });
}

void weigh_partial_attention(ThreadPool& pool, const MatrixView& log_sum_exps, int64_t own,
                             int64_t num_heads, const MatrixView& attention) {
  const int64_t head_dim = attention.cols / num_heads;
  for_each_row(pool, attention.rows, attention.cols, [&](int64_t row) {
    const auto* sums = log_sum_exps.row<const float>(row);
    for (int64_t head = 0; head < num_heads; ++head) {
      const float mine = sums[own * num_heads + head];
      float total = 0;  // over the parts, in units of this one
      for (int64_t i = head; i < log_sum_exps.cols; i += num_heads) {
        total += std::exp(sums[i] - mine);
      }
      const bool sees_none = mine == -std::numeric_limits<float>::infinity();
      const float weight = sees_none ? 0.0F : 1.0F / total;
      const auto weigh = [&](auto* values) {
        for (int64_t d = head * head_dim; d < (head + 1) * head_dim; ++d) {
          values[d] =
              from_float<std::remove_pointer_t<decltype(values)>>(to_float(values[d]) * weight);
        }
      };
      attention.dtype == DType::kF32 ? weigh(attention.row<float>(row))
                                     : weigh(attention.row<bf16_t>(row));
    }
  });
}

void gather_rows(ThreadPool& pool, const MatrixView& in, std::span<const int64_t> rows,
                 const MatrixView& out) {
  const auto bytes = static_cast<size_t>(out.cols * size_of(out.dtype));
  for_each_row(pool, out.rows, out.cols, [&](int64_t row) {
    std::memcpy(out.rows_from(row, 1).data, in.rows_from(rows[static_cast<size_t>(row)], 1).data,
                bytes);
  });
}

void download(ThreadPool& pool, const MatrixView& in, float* out) {
  for_each_row(pool, in.rows, in.cols, [&](int64_t row) {
    float* to = out + row * in.cols;
    if (in.dtype == DType::kF32) {
      std::copy_n(in.row<const float>(row), in.cols, to);
    } else {
      const auto* from = in.row<const bf16_t>(row);
      for (int64_t i = 0; i < in.cols; ++i) to[i] = to_float(from[i]);
    }
  });
}

void upload(ThreadPool& pool, const float* in, const MatrixView& out) {
  for_each_row(pool, out.rows, out.cols, [&](int64_t row) {
    const float* from = in + row * out.cols;
    if (out.dtype == DType::kF32) {
      std::copy_n(from, out.cols, out.row<float>(row));
    } else {
      auto* to = out.row<bf16_t>(row);
      for (int64_t i = 0; i < out.cols; ++i) to[i] = from_float<bf16_t>(from[i]);
    }
  });
}

}  // namespace longspan::cpu
