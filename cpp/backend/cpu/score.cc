#include <algorithm>
#include <array>
#include <limits>

#include "backend/cpu/linear.h"

namespace longspan::cpu {
namespace {

constexpr int64_t kRows = 512;  // hidden rows that share a pass over the head
constexpr int64_t kPanels = 4;  // of the head, per tile of logits
constexpr int64_t kCols = kPanels * kPanelCols;

}  // namespace

int64_t score_workspace_bytes(int num_threads) { return num_threads * kRows * kCols * 4; }

void score(const Kernels& kernels, ThreadPool& pool, const MatrixView& hidden,
           const CpuPackedLinear& head, int32_t first_token, std::span<const int32_t> targets,
           float* workspace, std::span<PartialScore> scores) {
  // Fewer rows to a job where there would not be one for each thread.
  const int64_t share = (hidden.rows + pool.size() - 1) / pool.size();
  const int64_t per_job = std::clamp<int64_t>(share, 1, kRows);
  pool.parallel_for((hidden.rows + per_job - 1) / per_job, [&](int64_t job, int thread) {
    const int64_t begin = job * per_job;
    const int64_t rows = std::min(per_job, hidden.rows - begin);
    float* tile = workspace + thread * kRows * kCols;  // [rows][kCols]
    std::array<float, kRows> max;
    std::array<double, kRows> sum{};
    std::array<double, kRows> chosen{};
    max.fill(-std::numeric_limits<float>::infinity());
    for (int64_t panel = 0; panel < head.panels(); panel += kPanels) {
      kernels.gemm({.a = hidden.rows_from(begin, 1).data,
                    .a_stride = hidden.stride,
                    .m = rows,
                    .k = hidden.cols,
                    .b = head.panel(panel),
                    .panels = std::min(kPanels, head.panels() - panel),
                    .c = tile,
                    .c_stride = kCols,
                    .bias = head.bias(panel)});
      const int64_t first = panel * kPanelCols;
      const int64_t cols = std::min(kCols, head.out_features() - first);
      for (int64_t r = 0; r < rows; ++r) {
        const float* logits = tile + r * kCols;
        const auto row = static_cast<size_t>(r);
        kernels.log_sum_exp({.x = logits, .n = cols, .max = &max[row], .sum = &sum[row]});
        const int64_t target = targets[static_cast<size_t>(begin + r)] - first_token - first;
        if (target >= 0 && target < cols) chosen[row] = logits[target];
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const auto row = static_cast<size_t>(r);
      scores[static_cast<size_t>(begin + r)] = {max[row], sum[row], chosen[row]};
    }
  });
}

}  // namespace longspan::cpu
