#include "backend/cpu/sample.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

#include "core/philox.h"

namespace longspan::cpu {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Largest {
  float value;
  bool finite;  // no NaN, no +inf, and not everything -inf
};

Largest find_largest(std::span<const float> logits) {
  constexpr size_t kLanes = 16;  // independent lanes, so that the compiler uses vectors
  std::array<float, kLanes> largest;
  std::array<uint32_t, kLanes> bad{};
  largest.fill(-kInf);
  const auto look = [&](size_t lane, float x) {
    largest[lane] = x > largest[lane] ? x : largest[lane];
    bad[lane] |= x < kInf ? 0u : 1u;  // NaN too compares false
  };
  size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) look(lane, logits[i + lane]);
  }
  for (size_t lane = 0; i < logits.size(); ++i, ++lane) look(lane, logits[i]);
  const float value = *std::max_element(largest.begin(), largest.end());
  const bool any_bad = std::any_of(bad.begin(), bad.end(), [](uint32_t b) { return b != 0; });
  return {value, !any_bad && value > -kInf};
}

/// A number that orders as the float does; -0 counts as +0.
uint32_t key_of(float x) {
  const auto bits = std::bit_cast<uint32_t>(x + 0.0f);
  return (bits & 0x80000000) != 0 ? ~bits : bits | 0x80000000;
}

float logit_of(uint32_t key) {
  return std::bit_cast<float>((key & 0x80000000) != 0 ? key & 0x7fffffff : ~key);
}

/// The set of tokens that may be drawn: every logit above `least`, and the first `ties` equal to
/// it.
struct Kept {
  float least = -kInf;
  int64_t ties = std::numeric_limits<int64_t>::max();
};

/// Calls visit(token, logit) for each kept token in order of token.
template <class Visit>
void for_each_kept(std::span<const float> logits, const Kept& kept, Visit visit) {
  constexpr size_t kBlock = 32;  // a small set is mostly blocks that one vector compare passes over
  int64_t ties = kept.ties;
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const auto block = logits.subspan(begin, std::min(kBlock, logits.size() - begin));
    uint32_t any = 0;
    for (const float logit : block) any |= logit >= kept.least ? 1u : 0u;
    if (any == 0) continue;
    for (size_t i = 0; i < block.size(); ++i) {
      if (block[i] < kept.least || (block[i] == kept.least && ties-- <= 0)) continue;
      visit(static_cast<int32_t>(begin + i), block[i]);
    }
  }
}

/// Narrows `kept` to its largest logits, as few as have a summed weight of at least target(sum of
/// all weights) > 0: a radix select on the keys, from the top 11, 11 and 10 bits down, which
/// neither sorts nor allocates. weight(logit) >= 0, the same for equal logits.
template <class Weight, class Target>
Kept narrow(std::span<const float> logits, const Kept& kept, Weight weight, Target target) {
  constexpr int kBits[] = {11, 11, 10};
  Kept above_prefix = kept;  // without what lies below the prefix
  uint32_t prefix = 0;
  int shift = 32;      // bits of the key below prefix
  double above = 0.0;  // weight of the keys above prefix
  double wanted = 0.0;
  for (const int bits : kBits) {
    std::array<double, 2048> mass{};
    const int parent = shift;
    shift -= bits;
    for_each_kept(logits, above_prefix, [&](int32_t, float logit) {
      const uint32_t key = key_of(logit);
      if (uint64_t{key} >> parent != prefix) return;
      mass[(key >> shift) & ((1u << bits) - 1)] += weight(logit);
    });
    if (parent == 32) {
      double total = 0.0;
      for (const double m : mass) total += m;
      wanted = target(total);
    }
    // The lowest bucket that holds anything ends the search should rounding leave the sum short.
    const auto lowest = static_cast<int>(
        std::find_if(mass.begin(), mass.end(), [](double m) { return m > 0; }) - mass.begin());
    int bucket = (1 << bits) - 1;
    for (; bucket > lowest && above + mass[bucket] < wanted; --bucket) above += mass[bucket];
    prefix = (prefix << bits) | static_cast<uint32_t>(bucket);
    const float least = logit_of(prefix << shift);
    if (least > above_prefix.least) above_prefix = {.least = least};
  }
  const auto size = static_cast<int64_t>(logits.size());
  const double limit = static_cast<double>(std::min(above_prefix.ties, size));
  const double ties = std::ceil((wanted - above) / weight(above_prefix.least));
  return {above_prefix.least, static_cast<int64_t>(std::clamp(ties, 1.0, limit))};
}

int32_t draw(std::span<const float> logits, float largest, const SamplerRow& row) {
  const double inverse_temperature =
      1.0 / std::max(row.temperature, std::numeric_limits<float>::min());
  const auto weight = [&](float logit) {  // softmax without its denominator, at most 1
    return static_cast<double>(
        std::exp(static_cast<float>((static_cast<double>(logit) - largest) * inverse_temperature)));
  };
  Kept kept;
  if (row.top_k > 0 && static_cast<size_t>(row.top_k) < logits.size()) {
    kept = narrow(
        logits, kept, [](float) { return 1.0; },
        [&](double) { return static_cast<double>(row.top_k); });
  }
  if (row.top_p < 1.0f) {
    kept = narrow(logits, kept, weight, [&](double total) { return row.top_p * total; });
  }

  // The largest logit weighs 1 and is always kept, so min_p is itself the least weight.
  double total = 0.0;
  for_each_kept(logits, kept, [&](int32_t, float logit) {
    const double w = weight(logit);
    if (w >= row.min_p) total += w;
  });
  const double stop = uniform_at(row.seed, row.position) * total;
  double cumulative = 0.0;
  int32_t drawn = -1;
  for_each_kept(logits, kept, [&](int32_t token, float logit) {
    if (cumulative > stop) return;
    const double w = weight(logit);
    if (w < row.min_p) return;
    cumulative += w;
    if (cumulative > stop) drawn = token;
  });
  return drawn;
}

int32_t sample_row(std::span<const float> logits, const SamplerRow& row) {
  const Largest largest = find_largest(logits);
  if (!largest.finite) return -1;
  if (row.greedy) {
    return static_cast<int32_t>(std::find(logits.begin(), logits.end(), largest.value) -
                                logits.begin());
  }
  return draw(logits, largest.value, row);
}

void apply(std::span<LogitEdit> edits, float* logits) {
  for (LogitEdit& edit : edits) {
    const float x = edit.original = logits[edit.token];
    logits[edit.token] = (x > 0 ? x / edit.penalty : x * edit.penalty) + edit.add;
  }
}

void undo(std::span<const LogitEdit> edits, float* logits) {
  for (const LogitEdit& edit : edits) logits[edit.token] = edit.original;
}

}  // namespace

void sample(ThreadPool& pool, const MatrixView& logits, std::span<const SamplerRow> rows,
            std::span<int32_t> tokens) {
  pool.parallel_for(logits.rows, [&](int64_t r, int) {
    const auto i = static_cast<size_t>(r);
    auto* row = logits.row<float>(r);
    apply(rows[i].edits, row);
    tokens[i] = sample_row({row, static_cast<size_t>(logits.cols)}, rows[i]);
    undo(rows[i].edits, row);
  });
}

}  // namespace longspan::cpu
