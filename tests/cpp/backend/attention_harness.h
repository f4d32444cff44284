#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <vector>

#include "backend/cpu/attention.h"
#include "backend/cpu/copy_kv_block.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/kv_tiles.h"
#include "backend/cpu/rotate_append.h"
#include "backend/cpu/step_plan.h"
#include "core/thread_pool.h"
#include "reference/reference.h"

namespace longspan::cpu {

/// A sequence and all that is known of it: its tokens' q, k, v and where its keys are.
struct TestSequence {
  reference::Matrix qkv;  ///< [length, (num_heads + 2 num_kv_heads) head_dim]
  std::shared_ptr<RopeProfile> profile;
  std::vector<int32_t> block_table;
  int64_t start = 0;  ///< position of the first row of qkv
};

/// Tokens [first, first + count) of a sequence in a step.
struct TestRun {
  int64_t seq = 0;
  int64_t first = 0;
  int64_t count = 0;
};

inline std::shared_ptr<RopeProfile> test_profile(int64_t head_dim, double theta, double factor) {
  auto profile = std::make_shared<RopeProfile>();
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    profile->inv_freq.push_back(
        std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim)));
  }
  profile->attention_factor = factor;
  return profile;
}

/// A cache, a plan and the ops of one dtype and instruction set, driven step by step.
class AttentionHarness {
 public:
  AttentionHarness(const Kernels& kernels, DType dtype, const AttentionShape& shape,
                   int64_t block_len, int threads, int64_t max_tokens, int64_t max_keys,
                   int64_t max_seqs = 4, KvFormat format = KvFormat::kNative)
      : kernels_(kernels),
        dtype_(dtype),
        shape_(shape),
        block_len_(block_len),
        limits_{max_tokens, max_seqs, (max_keys + block_len - 1) / block_len},
        pool_(threads),
        plan_(limits_, shape, threads),
        free_blocks_(static_cast<size_t>(limits_.max_blocks_per_seq * max_seqs)) {
    cache_.shape = {kNumLayers, shape.num_kv_heads, shape.head_dim, block_len, format};
    cache_.num_blocks = static_cast<int64_t>(free_blocks_.size());
    cache_.block_bytes = KvTiles(cache_.shape, dtype).block_bytes();
    cache_.pool = allocate_host(cache_.num_blocks * cache_.block_bytes);
    std::iota(free_blocks_.begin(), free_blocks_.end(), 0);
    std::mt19937 random(7);
    std::shuffle(free_blocks_.begin(), free_blocks_.end(), random);
  }

  int64_t kv_cols() const { return shape_.num_kv_heads * shape_.head_dim; }
  int64_t q_cols() const { return shape_.num_heads * shape_.head_dim; }

  /// Adds a sequence with random q, k, v; scale 3 makes some keys stand out.
  int64_t add_sequence(int64_t length, double theta, double factor, uint64_t seed) {
    TestSequence sequence{reference::random_matrix(length, q_cols() + 2 * kv_cols(), 3.0, seed),
                          test_profile(shape_.head_dim, theta, factor),
                          {},
                          0};
    take_blocks(sequence, length);
    sequences_.push_back(std::move(sequence));
    return static_cast<int64_t>(sequences_.size()) - 1;
  }

  /// A sequence's profile, to be changed before its first step.
  RopeProfile& profile(int64_t seq) { return *sequences_[static_cast<size_t>(seq)].profile; }

  /// From now on heads are normed before they are rotated; the buffers must outlive this.
  void set_norm(const Buffer& q, const Buffer& k, float eps) { norm_.emplace(QkNorm{q, k, eps}); }

  /// A sequence of which only tokens [start, start + length) are known: all keys share one block.
  int64_t add_far_sequence(int64_t start, int64_t length, double theta, uint64_t seed) {
    const int64_t seq = add_sequence(length, theta, 1.0, seed);
    TestSequence& sequence = sequences_.back();
    sequence.start = start;
    const auto blocks = static_cast<size_t>((start + length + block_len_ - 1) / block_len_);
    sequence.block_table.resize(blocks, sequence.block_table[0]);
    return seq;
  }

  /// Replaces element (token, column) of a sequence's q, k, v by fn(token, column, element).
  template <class Fn>
  void edit(int64_t seq, Fn fn) {
    reference::Matrix& qkv = sequences_[static_cast<size_t>(seq)].qkv;
    for (int64_t r = 0; r < qkv.rows; ++r) {
      for (int64_t c = 0; c < qkv.cols; ++c) qkv.at(r, c) = fn(r, c, qkv.at(r, c));
    }
  }

  /// Runs a request of NaN through every block, then gives the blocks back.
  void poison() {
    TestSequence poison{reference::Matrix(cache_.num_blocks * block_len_, q_cols() + 2 * kv_cols()),
                        test_profile(shape_.head_dim, 10000, 1),
                        {},
                        0};
    std::fill(poison.qkv.values.begin(), poison.qkv.values.end(),
              std::numeric_limits<double>::quiet_NaN());
    sequences_.push_back(poison);
    const int64_t index = static_cast<int64_t>(sequences_.size()) - 1;
    const std::vector<int32_t> blocks = free_blocks_;
    const int64_t per_table = limits_.max_blocks_per_seq;
    for (int64_t begin = 0; begin < cache_.num_blocks; begin += per_table) {
      const int64_t end = std::min(begin + per_table, cache_.num_blocks);
      sequences_.back().block_table.assign(blocks.begin() + begin, blocks.begin() + end);
      const int64_t tokens = (end - begin) * block_len_;
      for (int64_t t = 0; t < tokens; t += limits_.max_tokens) {
        step({{index, t, std::min(limits_.max_tokens, tokens - t)}}, false);
      }
    }
    sequences_.pop_back();
  }

  /// Copies the first `tokens` tokens of a sequence's first block to another's.
  void copy_first_block(int64_t from, int64_t to, int64_t tokens) {
    copy_kv_block(pool_, cache_, dtype_, sequence(from).block_table[0], sequence(to).block_table[0],
                  tokens);
  }

  /// One step; returns the attention output [tokens of the step, num_heads head_dim].
  reference::Matrix step(const std::vector<TestRun>& runs, bool attend = true) {
    StepInput input;
    input.cu_seqlens.push_back(0);
    for (const TestRun& run : runs) {
      const TestSequence& sequence = sequences_[static_cast<size_t>(run.seq)];
      for (int64_t t = 0; t < run.count; ++t) {
        input.token_ids.push_back(static_cast<int32_t>(run.first + t));
      }
      input.cu_seqlens.push_back(input.num_tokens());
      input.first_position.push_back(run.first);
      const int64_t blocks = (run.first + run.count + block_len_ - 1) / block_len_;
      input.block_tables.emplace_back(sequence.block_table.begin(),
                                      sequence.block_table.begin() + blocks);
      input.profiles.push_back(sequence.profile);
    }
    const int64_t tokens = input.num_tokens();
    reference::Matrix qkv(tokens, q_cols() + 2 * kv_cols());
    int64_t row = 0;
    for (const TestRun& run : runs) {
      const TestSequence& sequence = sequences_[static_cast<size_t>(run.seq)];
      for (int64_t t = 0; t < run.count; ++t, ++row) {
        for (int64_t c = 0; c < qkv.cols; ++c) {
          qkv.at(row, c) = sequence.qkv.at(run.first - sequence.start + t, c);
        }
      }
    }
    // Rows with a stride wider than their columns, as those of a larger buffer may be.
    const int64_t pad = 16;
    std::vector<float> qkv_data(static_cast<size_t>(tokens * (qkv.cols + pad)));
    const MatrixView qkv_view{qkv_data.data(), DType::kF32, tokens, qkv.cols, qkv.cols + pad};
    reference::write(qkv, qkv_view);
    const int64_t stride = q_cols() + pad;
    std::vector<float> q_data(static_cast<size_t>(tokens * stride));
    std::vector<float> out_data(static_cast<size_t>(tokens * stride));
    const MatrixView q{q_data.data(), dtype_, tokens, q_cols(), stride};
    const MatrixView out{out_data.data(), dtype_, tokens, q_cols(), stride};
    plan_.plan(input, cache_.shape.context(), pool_);
    rotate_append(kernels_, pool_, plan_, kLayer, qkv_view, norm_ ? &*norm_ : nullptr, cache_, q);
    last_q_ = reference::read(q);
    if (attend) attention(kernels_, pool_, plan_, kLayer, q, cache_, out, nullptr);
    return reference::read(out);
  }

  /// The definition, for tokens [first, first + count) of a sequence.
  reference::Matrix expected(int64_t seq, int64_t first, int64_t count) const {
    const TestSequence& sequence = sequences_[static_cast<size_t>(seq)];
    const int64_t keys = first + count;
    std::vector<int64_t> positions(static_cast<size_t>(keys));
    std::iota(positions.begin(), positions.end(), 0);
    const auto cut = [&](int64_t row, int64_t rows, int64_t col, int64_t cols) {
      reference::Matrix part(rows, cols);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) part.at(r, c) = sequence.qkv.at(row + r, col + c);
      }
      return part;
    };
    const RopeProfile& profile = *sequence.profile;
    const auto rotate = [&](const reference::Matrix& x, std::span<const int64_t> where) {
      return reference::rotate(x, shape_.head_dim, where, profile.inv_freq);
    };
    const std::span<const int64_t> last = std::span(positions).subspan(static_cast<size_t>(first));
    reference::Matrix q = reference::scale_queries(rotate(cut(first, count, 0, q_cols()), last),
                                                   last, profile.logn_length);
    // The factor is of the dims that rotate; of a whole head it may as well scale the product.
    const double squared = profile.attention_factor * profile.attention_factor;
    double scale = 1 / std::sqrt(static_cast<double>(shape_.head_dim));
    const auto rotary_dim = 2 * static_cast<int64_t>(profile.inv_freq.size());
    if (rotary_dim == shape_.head_dim) {
      scale *= squared;
    } else {
      for (int64_t r = 0; r < q.rows; ++r) {
        for (int64_t c = 0; c < q.cols; ++c) {
          if (c % shape_.head_dim < rotary_dim) q.at(r, c) *= squared;
        }
      }
    }
    q = rounded(q);
    const reference::Matrix k = rounded(rotate(cut(0, keys, q_cols(), kv_cols()), positions));
    const reference::Matrix v = rounded(cut(0, keys, q_cols() + kv_cols(), kv_cols()));
    return reference::attention(q, k, v, shape_.num_heads, shape_.num_kv_heads, first, scale);
  }

  /// Values as the cache and q hold them.
  reference::Matrix rounded(reference::Matrix values) const {
    for (double& value : values.values) {
      const auto single = static_cast<float>(value);
      value = dtype_ == DType::kF32 ? single : reference::bf16_value(reference::bf16_bits(single));
    }
    return values;
  }

  const KvCache& cache() const { return cache_; }
  const TestSequence& sequence(int64_t seq) const { return sequences_[static_cast<size_t>(seq)]; }
  const reference::Matrix& last_q() const { return last_q_; }

  static constexpr int64_t kNumLayers = 2;
  static constexpr int64_t kLayer = 1;

 private:
  void take_blocks(TestSequence& sequence, int64_t length) {
    for (int64_t keys = 0; keys < length; keys += block_len_) {
      sequence.block_table.push_back(free_blocks_.back());
      free_blocks_.pop_back();
    }
  }

  const Kernels& kernels_;
  DType dtype_;
  AttentionShape shape_;
  int64_t block_len_;
  StepLimits limits_;
  ThreadPool pool_;
  CpuStepPlan plan_;
  KvCache cache_;
  std::vector<int32_t> free_blocks_;
  std::vector<TestSequence> sequences_;
  reference::Matrix last_q_{0, 0};
  std::optional<QkNorm> norm_;
};

}  // namespace longspan::cpu
