#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "backend/device.h"
#include "backend/kv_reference.h"

namespace longspan {

/// Tokens [first, first + count) of a sequence in a step.
struct Piece {
  int64_t seq = 0;
  int64_t first = 0;
  int64_t count = 0;
};

/// A cache and a plan on a device, driven through rotate_append and attention step by step; or
/// those of several ranks that share the context of every sequence.
class AttentionOps : public Ops {
 protected:
  using Matrix = reference::Matrix;

  struct Sequence {
    Matrix qkv{0, 0};  // [length, (num_heads + 2 num_kv_heads) head_dim]
    std::shared_ptr<RopeProfile> profile;
    std::vector<int32_t> block_table;
  };

  void make_cache(const AttentionShape& shape, int64_t block_len, int64_t max_tokens,
                  int64_t max_keys, int64_t max_seqs, KvFormat format = KvFormat::kNative) {
    shape_ = shape;
    rotary_dim_ = shape.head_dim;
    q_norm_.clear();
    k_norm_.clear();
    raised_by_ = 1;
    block_tokens_ = block_len * context_size_;
    limits_ = {max_tokens, max_seqs, blocks_of(max_keys), block_len, format, prefill_attention_};
    ranks_.clear();
    for (int32_t rank = 0; rank < context_size_; ++rank) {
      KvCache cache;
      cache.shape = {kNumLayers, shape.num_kv_heads, shape.head_dim, block_len, format,
                     rank,       context_size_};
      cache.num_blocks = limits_.max_blocks_per_seq * max_seqs;
      cache.block_bytes = backend().kv_block_bytes(cache.shape);
      cache.pool = backend().allocate(cache.num_blocks * cache.block_bytes);
      ranks_.push_back({std::move(cache), backend().make_step_plan(limits_, shape)});
    }
    sequences_.clear();
    free_blocks_.resize(static_cast<size_t>(limits_.max_blocks_per_seq * max_seqs));
    std::iota(free_blocks_.begin(), free_blocks_.end(), 0);
    std::shuffle(free_blocks_.begin(), free_blocks_.end(), std::mt19937(7));
  }

  /// Products of many rows are formed so; before make_cache.
  void multiply_in(PrefillAttention attention) { prefill_attention_ = attention; }

  /// So many ranks share the keys of every sequence; before make_cache.
  void share_context(int32_t size) { context_size_ = size; }

  /// Heads rotate in their first `dims` only; before add_sequence.
  void rotate_in_part(int64_t dims) { rotary_dim_ = dims; }

  /// Heads of q and k are normed from here on.
  void norm_heads() {
    for (auto* weights : {&q_norm_, &k_norm_}) {
      const uint64_t seed = weights == &q_norm_ ? 11 : 12;
      *weights = reference::random_matrix(1, shape_.head_dim, 2.0, seed).values;
      for (double& w : *weights) w = static_cast<float>(w);
    }
  }

  int64_t q_cols() const { return shape_.num_heads * shape_.head_dim; }
  int64_t kv_cols() const { return shape_.num_kv_heads * shape_.head_dim; }

  /// In formats of codes keys hardly turn, so that those of the definition are the same to the bit,
  /// and no code falls to the other side of a half.
  int64_t add_sequence(int64_t length, double theta, double factor, uint64_t seed) {
    Sequence sequence;
    sequence.qkv =
        rounded(reference::random_matrix(length, q_cols() + 2 * kv_cols(), 3.0, seed), out());
    sequence.profile = std::make_shared<RopeProfile>();
    for (int64_t i = 0; i < rotary_dim_ / 2; ++i) {
      const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(rotary_dim_);
      const bool native = limits_.kv_format == KvFormat::kNative;
      sequence.profile->inv_freq.push_back(native ? std::pow(theta, exponent) : 1e-30);
    }
    sequence.profile->attention_factor = factor;
    for (int64_t block = 0; block < blocks_of(length); ++block) {
      sequence.block_table.push_back(free_blocks_.back());
      free_blocks_.pop_back();
    }
    sequences_.push_back(std::move(sequence));
    return static_cast<int64_t>(sequences_.size()) - 1;
  }

  /// Fills every block with requests of NaN, then gives the blocks back.
  void poison() {
    const std::vector<int32_t> blocks = free_blocks_;
    while (!free_blocks_.empty()) {
      const auto left = static_cast<int64_t>(free_blocks_.size());
      const int64_t tokens = std::min(limits_.max_blocks_per_seq, left) * block_tokens_;
      const int64_t seq = add_sequence(tokens, 1e4, 1.0, 1);
      std::ranges::fill(sequences_.back().qkv.values, std::numeric_limits<double>::quiet_NaN());
      for (int64_t t = 0; t < tokens; t += limits_.max_tokens) {
        step({{seq, t, std::min(limits_.max_tokens, tokens - t)}}, false);
      }
      sequences_.pop_back();
    }
    free_blocks_ = blocks;
  }

  /// Multiplies the keys of a sequence's first `count` tokens.
  void raise_keys(int64_t seq, int64_t count, double by) {
    Matrix& qkv = sequences_[static_cast<size_t>(seq)].qkv;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = q_cols(); c < q_cols() + kv_cols(); ++c) qkv.at(r, c) *= by;
    }
    qkv = rounded(qkv, out());
    raised_by_ = by;
  }

  /// Makes what a sequence holds from token `first` on NaN.
  void spoil(int64_t seq, int64_t first) {
    Matrix& qkv = sequences_[static_cast<size_t>(seq)].qkv;
    std::fill(qkv.values.begin() + first * qkv.cols, qkv.values.end(),
              std::numeric_limits<double>::quiet_NaN());
  }

  /// Copies the first `tokens` tokens of a sequence's first block to another's.
  void copy_first_block(int64_t from, int64_t to, int64_t tokens) {
    for (const Rank& rank : ranks_) {
      const int64_t here = rank.cache.shape.context().keys(tokens);
      if (here == 0) continue;
      backend().copy_kv_block(rank.cache, sequences_[static_cast<size_t>(from)].block_table[0],
                              sequences_[static_cast<size_t>(to)].block_table[0], here);
    }
  }

  /// A step, and q | k | v of its tokens.
  std::pair<StepInput, Matrix> input_of(const std::vector<Piece>& runs) const {
    StepInput input;
    input.cu_seqlens.push_back(0);
    std::vector<double> rows;
    for (const Piece& run : runs) {
      const Sequence& sequence = sequences_[static_cast<size_t>(run.seq)];
      input.token_ids.resize(input.token_ids.size() + static_cast<size_t>(run.count));
      input.cu_seqlens.push_back(input.num_tokens());
      input.first_position.push_back(run.first);
      const int64_t blocks = blocks_of(run.first + run.count);
      input.block_tables.emplace_back(sequence.block_table.begin(),
                                      sequence.block_table.begin() + blocks);
      input.profiles.push_back(sequence.profile);
      const auto begin = sequence.qkv.values.begin() + run.first * sequence.qkv.cols;
      rows.insert(rows.end(), begin, begin + run.count * sequence.qkv.cols);
    }
    Matrix values(input.num_tokens(), q_cols() + 2 * kv_cols());
    values.values = std::move(rows);
    return {std::move(input), std::move(values)};
  }

  /// Steps of so many rows, in matrices that stay where they are, as a whole where the device does
  /// that.
  class Repeated {
   public:
    Repeated(AttentionOps& ops, int64_t rows)
        : ops_(ops),
          qkv_(ops.matrix(ops.out(), rows, ops.q_cols() + 2 * ops.kv_cols())),
          q_(ops.matrix(ops.act(), rows, ops.q_cols())),
          result_(ops.matrix(ops.act(), rows, ops.q_cols())) {}

    Matrix step(const std::vector<Piece>& runs) {
      const auto [input, values] = ops_.input_of(runs);
      const std::vector<float> host(values.values.begin(), values.values.end());
      const Rank& rank = ops_.ranks_.front();
      Backend& backend = ops_.backend();
      backend.upload(host.data(), qkv_.view());
      backend.plan_step(*rank.plan, input, rank.cache);
      const auto run = [&] {
        backend.rotate_append(*rank.plan, kLayer, qkv_.view(), nullptr, rank.cache, q_.view());
        backend.attention(*rank.plan, kLayer, q_.view(), rank.cache, result_.view(), nullptr);
      };
      if (!backend.run_whole(*rank.plan, run)) run();
      return result_.read();
    }

   private:
    AttentionOps& ops_;
    const DeviceMatrix qkv_;
    const DeviceMatrix q_;
    const DeviceMatrix result_;
  };

  /// One step; returns the attention output [tokens of the step, num_heads head_dim].
  Matrix step(const std::vector<Piece>& runs, bool attend = true) {
    const auto [input, values] = input_of(runs);
    const DeviceMatrix qkv = matrix(out(), values);
    std::vector<DeviceMatrix> results;  // of each rank
    Matrix sums(values.rows, context_size_ * shape_.num_heads);
    for (const Rank& rank : ranks_) {
      const DeviceMatrix q = matrix(act(), values.rows, q_cols());
      results.push_back(matrix(act(), values.rows, q_cols()));
      backend().plan_step(*rank.plan, input, rank.cache);
      rotate_append(rank, qkv.view(), q.view());
      if (!attend) continue;
      if (context_size_ == 1) {
        backend().attention(*rank.plan, kLayer, q.view(), rank.cache, results[0].view(), nullptr);
        return results[0].read();
      }
      const DeviceMatrix mine = matrix(acc(), values.rows, shape_.num_heads);
      backend().attention(*rank.plan, kLayer, q.view(), rank.cache, results.back().view(),
                          &mine.view());
      note_sums(mine.read(), rank.cache.shape.context_rank, sums);
    }
    return attend ? combined(results, sums) : Matrix(0, 0);
  }

  /// Runs a sequence in chunks; returns the output of its tokens.
  Matrix prefill(int64_t seq, int64_t length, int64_t chunk) {
    Matrix all(0, q_cols());
    for (int64_t first = 0; first < length; first += chunk) {
      const Matrix part = step({{seq, first, std::min(chunk, length - first)}});
      all.values.insert(all.values.end(), part.values.begin(), part.values.end());
      all.rows += part.rows;
    }
    return all;
  }

  /// Expects rows [row, row + count) of `actual` to be the definition's for tokens [first, first +
  /// count): on the rounded q, k and v, P and the output rounded once more where they are bfloat16.
  void expect_attention(const Matrix& actual, int64_t row, int64_t seq, int64_t first,
                        int64_t count) const {
    const Sequence& sequence = sequences_[static_cast<size_t>(seq)];
    const int64_t keys = first + count;
    std::vector<int64_t> positions(static_cast<size_t>(keys));
    std::iota(positions.begin(), positions.end(), 0);
    const auto cut = [&](int64_t from, int64_t rows, int64_t col, int64_t cols) {
      Matrix part(rows, cols);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) part.at(r, c) = sequence.qkv.at(from + r, col + c);
      }
      return part;
    };
    const std::vector<double>& inv_freq = sequence.profile->inv_freq;
    const auto last = std::span(positions).subspan(static_cast<size_t>(first));
    const double squared = std::pow(sequence.profile->attention_factor, 2);
    const bool whole = rotary_dim_ == shape_.head_dim;
    Matrix rotated = reference::rotate(normed(cut(first, count, 0, q_cols()), q_norm_),
                                       shape_.head_dim, last, inv_freq);
    for (int64_t r = 0; !whole && r < rotated.rows; ++r) {
      for (int64_t c = 0; c < rotated.cols; ++c) {
        if (c % shape_.head_dim < rotary_dim_) rotated.at(r, c) *= squared;
      }
    }
    const KvFormat format = limits_.kv_format;
    // CUDA multiplies int4, and codes of any kind for many rows, as bfloat16 numbers.
    constexpr int64_t kDecodeRows = 16;
    const auto held = [&](const Matrix& x, KvElement element) {
      if (element == KvElement::kNative) return rounded(x, act());
      const Matrix numbers = reference::quantized(x, shape_.head_dim, element);
      const bool rounds = std::string(GetParam().name) == "cuda" &&
                          (element == KvElement::kInt4 || count > kDecodeRows);
      return rounds ? rounded(numbers, act()) : numbers;
    };
    const Matrix q = rounded(reference::turned(rotated, shape_.head_dim, format), act());
    const Matrix k = held(reference::turned_as_cached(
                              reference::rotate(normed(cut(0, keys, q_cols(), kv_cols()), k_norm_),
                                                shape_.head_dim, positions, inv_freq),
                              shape_.head_dim, format),
                          key_element(format));
    Matrix v = held(cut(0, keys, q_cols() + kv_cols(), kv_cols()), value_element(format));
    if (prefill_attention_ == PrefillAttention::kInt8Fp8 && count > kDecodeRows) {
      std::ranges::transform(v.values, v.values.begin(), to_e4m3);
    }
    const double scale = (whole ? squared : 1.0) / std::sqrt(static_cast<double>(shape_.head_dim));
    const Matrix expected =
        reference::attention(multiplied(q, 1, count), multiplied(k, kPanel, count), v,
                             shape_.num_heads, shape_.num_kv_heads, first, scale);
    Matrix part(count, q_cols());
    std::copy_n(actual.values.begin() + row * q_cols(), part.values.size(), part.values.begin());
    expect_close(part, expected, 0, tolerance());
  }

  /// Values are up to 3; besides, a rounding of q or k may fall to the other side of a half. What a
  /// code stands for may be rounded to bfloat16 once more. Heads that are
  /// turned have elements up to 3 sqrt(D), and these are sums, which a device may round otherwise,
  /// so that a key may get the next code.
  /// In bytes, an element of q or k may be the next one, 4.25 / 127 away where rotated pairs are up
  /// to 3 sqrt(2): times an element of the other, over sqrt(128) and under a factor of 1.1^2, that
  /// moves a score by 0.0152, and a result by at most a quarter of it times 6, the range of values.
  /// The same of keys that were raised moves a score so much more.
  /// Weights in e4m3 are off by up to 2^-4 of themselves, and a result by as much of the mean
  /// distance of values from it, 3 at most. Tensor cores sum e4m3 up in 14 bits.
  double tolerance() const {
    const bool fp8 = prefill_attention_ == PrefillAttention::kInt8Fp8;
    return raised_by_ * tolerance_of_quiet_keys() + (fp8 ? 0x1p-4 * 3 + 0x1p-13 * 3 : 0.0);
  }

 private:
  double tolerance_of_quiet_keys() const {
    if (prefill_attention_ != PrefillAttention::kNative) return 2e-2 + 0.0152 * 6 / 4;
    const double weighed = context_size_ > 1 ? 3 * rounding_of(act()) : 0;  // rounds once more
    const KvFormat format = limits_.kv_format;
    if (act() == DType::kF32) return 2e-5;
    if (format == KvFormat::kNative) return 2e-2 + weighed;
    return (turns_heads(format) ? 5e-2 : 3e-2) + weighed;
  }

  static constexpr int64_t kNumLayers = 2;
  static constexpr int64_t kLayer = 1;
  static constexpr float kNormEps = 1e-5f;
  static constexpr int64_t kPanel = 64;  // tokens whose keys share a scale in bytes

  struct Rank {
    KvCache cache;
    std::unique_ptr<StepPlan> plan;
  };

  /// The nearest number of 4 significant bits, as e4m3 has it times 2^-7: of values whose largest
  /// is between 1.75 and 3.5.
  static double to_e4m3(double x) {
    const int exponent = std::max(x == 0 ? 0 : std::ilogb(x), -13);
    const double step = std::exp2(exponent - 3);
    return std::nearbyint(x / step) * step;
  }

  /// Blocks, on every rank, that hold so many tokens of a sequence.
  int64_t blocks_of(int64_t tokens) const { return (tokens + block_tokens_ - 1) / block_tokens_; }

  void rotate_append(const Rank& rank, const MatrixView& qkv, const MatrixView& q) {
    if (q_norm_.empty()) {
      backend().rotate_append(*rank.plan, kLayer, qkv, nullptr, rank.cache, q);
      return;
    }
    Matrix weights(1, shape_.head_dim);
    weights.values = q_norm_;
    const Buffer q_weight = pack_vector(weights);
    weights.values = k_norm_;
    const Buffer k_weight = pack_vector(weights);
    const QkNorm norm{q_weight, k_weight, kNormEps};
    backend().rotate_append(*rank.plan, kLayer, qkv, &norm, rank.cache, q);
  }

  /// Places one rank's log-sum-exps beside the others'.
  static void note_sums(const Matrix& mine, int64_t rank, Matrix& all) {
    for (int64_t r = 0; r < mine.rows; ++r) {
      for (int64_t c = 0; c < mine.cols; ++c) all.at(r, rank * mine.cols + c) = mine.at(r, c);
    }
  }

  /// What the ranks' results add up to.
  Matrix combined(const std::vector<DeviceMatrix>& results, const Matrix& sums) {
    const DeviceMatrix all = matrix(acc(), sums);
    Matrix total(sums.rows, q_cols());
    for (size_t rank = 0; rank < results.size(); ++rank) {
      backend().weigh_partial_attention(all.view(), static_cast<int64_t>(rank), shape_.num_heads,
                                        results[rank].view());
      const Matrix part = results[rank].read();
      for (size_t i = 0; i < part.values.size(); ++i) total.values[i] += part.values[i];
    }
    return total;
  }

  /// Every head of x normed by weights; x itself where there are none.
  Matrix normed(const Matrix& x, const std::vector<double>& weights) const {
    if (weights.empty()) return x;
    Matrix heads(x.rows * x.cols / shape_.head_dim, shape_.head_dim);
    heads.values = x.values;
    Matrix result(x.rows, x.cols);
    result.values = reference::rms_norm(heads, weights, kNormEps).values;
    return result;
  }

  /// Queries or keys as their products are formed for `count` rows of a sequence. In bytes, `run`
  /// rows of a head share a scale, their largest magnitude being 127; off keys, of which there are
  /// more than one in a run, their head's mean is taken first.
  Matrix multiplied(Matrix x, int64_t run, int64_t count) const {
    constexpr int64_t kDecodeRows = 16;
    if (prefill_attention_ == PrefillAttention::kNative || count <= kDecodeRows) return x;
    for (int64_t c = 0; run > 1 && c < x.cols; ++c) {
      double sum = 0;
      for (int64_t r = 0; r < x.rows; ++r) sum += x.at(r, c);
      for (int64_t r = 0; r < x.rows; ++r) x.at(r, c) -= sum / static_cast<double>(x.rows);
    }
    for (int64_t first = 0; first < x.rows; first += run) {
      const int64_t end = std::min(first + run, x.rows);
      for (int64_t head = 0; head < x.cols; head += shape_.head_dim) {
        const auto each = [&](const auto& fn) {
          for (int64_t r = first; r < end; ++r) {
            for (int64_t c = head; c < head + shape_.head_dim; ++c) fn(x.at(r, c));
          }
        };
        double largest = 0;
        each([&](double value) { largest = std::max(largest, std::abs(value)); });
        each([&](double& value) { value = std::nearbyint(value / largest * 127) * largest / 127; });
      }
    }
    return x;
  }

  PrefillAttention prefill_attention_ = PrefillAttention::kNative;
  AttentionShape shape_;
  int64_t rotary_dim_ = 0;
  std::vector<double> q_norm_;  // [head_dim]; empty: no norm
  std::vector<double> k_norm_;
  double raised_by_ = 1;
  int32_t context_size_ = 1;
  int64_t block_tokens_ = 0;  // of a sequence, in a block of every rank
  StepLimits limits_;
  std::vector<Rank> ranks_;
  std::vector<int32_t> free_blocks_;
  std::vector<Sequence> sequences_;
};

}  // namespace longspan
