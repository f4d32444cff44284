#include "backend/cpu/log_probabilities.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace longspan::cpu {
namespace {

constexpr int64_t kRun = 128;  // columns summed in float32; the runs add up in float64

bool likelier(const TokenLogprob& a, const TokenLogprob& b) {
  return a.logprob != b.logprob ? a.logprob > b.logprob : a.token < b.token;
}

/// The largest logits, largest first; `found` is as long as many are wanted, at most logits.size().
void find_top(std::span<const float> logits, std::span<TokenLogprob> found) {
  size_t size = 0;  // of the heap in `found`, whose front is the least of those kept
  for (size_t i = 0; i < logits.size(); ++i) {
    const TokenLogprob candidate{static_cast<int32_t>(i), logits[i]};
    if (size == found.size()) {
      if (!likelier(candidate, found.front())) continue;
      std::pop_heap(found.begin(), found.end(), likelier);
      found.back() = candidate;
      std::push_heap(found.begin(), found.end(), likelier);
    } else {
      found[size++] = candidate;
      std::push_heap(found.begin(), found.begin() + static_cast<int64_t>(size), likelier);
    }
  }
  std::sort_heap(found.begin(), found.end(), likelier);
}

}  // namespace

void log_probabilities(const Kernels& kernels, ThreadPool& pool, const MatrixView& logits,
                       std::span<const int32_t> tokens, int64_t top, std::span<TokenLogprob> out) {
  const auto each = static_cast<size_t>(1 + top);
  pool.parallel_for(logits.rows, [&](int64_t r, int) {
    const auto i = static_cast<size_t>(r);
    const std::span<const float> row(logits.row<const float>(r), static_cast<size_t>(logits.cols));
    const std::span<TokenLogprob> result = out.subspan(i * each, each);
    float max = std::numeric_limits<float>::lowest();
    double sum = 0.0;
    for (int64_t begin = 0; begin < logits.cols; begin += kRun) {
      const int64_t n = std::min(kRun, logits.cols - begin);
      kernels.log_sum_exp({.x = row.data() + begin, .n = n, .max = &max, .sum = &sum});
    }
    result[0] = {tokens[i], row[static_cast<size_t>(tokens[i])]};
    if (top > 0) find_top(row, result.subspan(1));
    const double log_sum = std::log(sum) + max;
    for (TokenLogprob& one : result) {
      one.logprob = static_cast<float>(static_cast<double>(one.logprob) - log_sum);
    }
  });
}

}  // namespace longspan::cpu
