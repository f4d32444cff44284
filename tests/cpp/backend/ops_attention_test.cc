#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend/device.h"
#include "backend/kv_reference.h"

namespace longspan {
namespace {

using reference::Matrix;

/// Tokens [first, first + count) of a sequence in a step.
struct Piece {
  int64_t seq = 0;
  int64_t first = 0;
  int64_t count = 0;
};

/// A cache and a plan on a device, driven through rotate_append and attention step by step.
class AttentionOps : public Ops {
 protected:
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
    limits_ = {max_tokens, max_seqs, (max_keys + block_len - 1) / block_len, block_len, format};
    cache_.shape = {kNumLayers, shape.num_kv_heads, shape.head_dim, block_len, format};
    cache_.num_blocks = limits_.max_blocks_per_seq * max_seqs;
    cache_.block_bytes = backend().kv_block_bytes(cache_.shape);
    cache_.pool = backend().allocate(cache_.num_blocks * cache_.block_bytes);
    limits_.prefill_attention = prefill_attention_;
    plan_ = backend().make_step_plan(limits_, shape);
    sequences_.clear();
    free_blocks_.resize(static_cast<size_t>(cache_.num_blocks));
    std::iota(free_blocks_.begin(), free_blocks_.end(), 0);
    std::shuffle(free_blocks_.begin(), free_blocks_.end(), std::mt19937(7));
  }

  /// Products of many rows are formed so; before make_cache.
  void multiply_in(PrefillAttention attention) { prefill_attention_ = attention; }

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
      const bool native = cache_.shape.format == KvFormat::kNative;
      sequence.profile->inv_freq.push_back(native ? std::pow(theta, exponent) : 1e-30);
    }
    sequence.profile->attention_factor = factor;
    for (int64_t keys = 0; keys < length; keys += cache_.shape.block_len) {
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
      const int64_t tokens = std::min(limits_.max_blocks_per_seq, left) * cache_.shape.block_len;
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
    backend().copy_kv_block(cache_, sequences_[static_cast<size_t>(from)].block_table[0],
                            sequences_[static_cast<size_t>(to)].block_table[0], tokens);
  }

  /// One step; returns the attention output [tokens of the step, num_heads head_dim].
  Matrix step(const std::vector<Piece>& runs, bool attend = true) {
    StepInput input;
    input.cu_seqlens.push_back(0);
    std::vector<double> rows;
    for (const Piece& run : runs) {
      const Sequence& sequence = sequences_[static_cast<size_t>(run.seq)];
      input.token_ids.resize(input.token_ids.size() + static_cast<size_t>(run.count));
      input.cu_seqlens.push_back(input.num_tokens());
      input.first_position.push_back(run.first);
      const int64_t blocks =
          (run.first + run.count + cache_.shape.block_len - 1) / cache_.shape.block_len;
      input.block_tables.emplace_back(sequence.block_table.begin(),
                                      sequence.block_table.begin() + blocks);
      input.profiles.push_back(sequence.profile);
      const auto begin = sequence.qkv.values.begin() + run.first * sequence.qkv.cols;
      rows.insert(rows.end(), begin, begin + run.count * sequence.qkv.cols);
    }
    Matrix values(input.num_tokens(), q_cols() + 2 * kv_cols());
    values.values = std::move(rows);
    const DeviceMatrix qkv = matrix(out(), values);
    const DeviceMatrix q = matrix(act(), values.rows, q_cols());
    const DeviceMatrix result = matrix(act(), values.rows, q_cols());
    backend().plan_step(*plan_, input, cache_);
    if (q_norm_.empty()) {
      backend().rotate_append(*plan_, kLayer, qkv.view(), nullptr, cache_, q.view());
    } else {
      Matrix weights(1, shape_.head_dim);
      weights.values = q_norm_;
      const Buffer q_weight = pack_vector(weights);
      weights.values = k_norm_;
      const Buffer k_weight = pack_vector(weights);
      const QkNorm norm{q_weight, k_weight, kNormEps};
      backend().rotate_append(*plan_, kLayer, qkv.view(), &norm, cache_, q.view());
    }
    if (attend) backend().attention(*plan_, kLayer, q.view(), cache_, result.view());
    return result.read();
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
    const KvFormat format = cache_.shape.format;
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
    const Matrix k =
        held(reference::turned(reference::rotate(normed(cut(0, keys, q_cols(), kv_cols()), k_norm_),
                                                 shape_.head_dim, positions, inv_freq),
                               shape_.head_dim, format),
             key_element(format));
    const Matrix v = held(cut(0, keys, q_cols() + kv_cols(), kv_cols()), value_element(format));
    const double scale = (whole ? squared : 1.0) / std::sqrt(static_cast<double>(shape_.head_dim));
    const Matrix expected =
        reference::attention(multiplied(q, 1, count), multiplied(k, kPanel, count), v,
                             shape_.num_heads, shape_.num_kv_heads, first, scale);
    Matrix part(count, q_cols());
    std::copy_n(actual.values.begin() + row * q_cols(), part.values.size(), part.values.begin());
    expect_close(part, expected, 0, tolerance());
  }

  /// Values are up to 3; besides, a rounding of q or k may fall to the other side of a half. What a
  /// code stands for may be rounded to bfloat16 once more, keys of int4 among them; and these are
  /// sums, so that one in a million gets the next code, which is 0.4 away.
  /// In bytes, an element of q or k may be the next one, 4.25 / 127 away where rotated pairs are up
  /// to 3 sqrt(2): times an element of the other, over sqrt(128) and under a factor of 1.1^2, that
  /// moves a score by 0.0152, and a result by at most a quarter of it times 6, the range of values.
  /// The same of keys that were raised moves a score so much more.
  double tolerance() const { return raised_by_ * tolerance_of_quiet_keys(); }

 private:
  double tolerance_of_quiet_keys() const {
    if (prefill_attention_ == PrefillAttention::kInt8) return 2e-2 + 0.0152 * 6 / 4;
    const KvFormat format = cache_.shape.format;
    const bool summed = turns_heads(format);
    if (act() == DType::kF32) return summed ? 1e-2 : 2e-5;
    if (format == KvFormat::kNative) return 2e-2;
    return summed ? 5e-2 : 3e-2;
  }

  static constexpr int64_t kNumLayers = 2;
  static constexpr int64_t kLayer = 1;
  static constexpr float kNormEps = 1e-5f;
  static constexpr int64_t kPanel = 64;  // tokens whose keys share a scale in bytes

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
  StepLimits limits_;
  KvCache cache_;
  std::unique_ptr<StepPlan> plan_;
  std::vector<int32_t> free_blocks_;
  std::vector<Sequence> sequences_;
};
LONGSPAN_TEST_DEVICES(AttentionOps);

TEST_P(AttentionOps, EqualsTheDefinitionForManyShapes) {
  const AttentionShape shapes[] = {{1, 1, 64},  {4, 2, 64}, {9, 3, 64},   {10, 2, 80},
                                   {8, 1, 128}, {6, 6, 96}, {16, 2, 128}, {4, 2, 256}};
  int64_t block_len = 64;
  for (const AttentionShape& shape : shapes) {
    for (const KvFormat format : backend().kv_formats(shape.head_dim)) {
      SCOPED_TRACE(testing::Message()
                   << shape.num_heads << "/" << shape.num_kv_heads << " x " << shape.head_dim
                   << ", blocks of " << block_len << ", " << name_of(format));
      make_cache(shape, block_len, 100, 300, 1, format);
      const int64_t seq = add_sequence(150, 1e4, 1.0, 1);
      expect_attention(prefill(seq, 150, 100), 0, seq, 0, 150);
    }
    block_len = block_len == 256 ? 64 : 2 * block_len;
  }
}

TEST_P(AttentionOps, EqualsTheDefinitionAtEveryEdgeOfPanels) {
  for (const KvFormat format : backend().kv_formats(64)) {
    for (const int64_t length : {1, 2, 63, 64, 65, 127, 128, 129, 1025, 2100}) {
      SCOPED_TRACE(testing::Message() << length << ", " << name_of(format));
      make_cache({6, 2, 64}, 64, 512, 2112, 1, format);
      const int64_t seq = add_sequence(length, 1e4, 1.0, 2);
      const Matrix all = prefill(seq, length, 512);
      const int64_t first = std::max<int64_t>(0, length - 70);
      expect_attention(all, first, seq, first, length - first);
    }
  }
}

TEST_P(AttentionOps, DecodesInPoisonedBlocks) {
  for (const KvFormat format : backend().kv_formats(128)) {
    for (const int64_t block_len : {64, 256}) {
      if (block_len == 256 && format != KvFormat::kNative) continue;  // takes its time
      SCOPED_TRACE(testing::Message() << block_len << ", " << name_of(format));
      make_cache({8, 2, 128}, block_len, 512, 2304, 2, format);
      poison();
      const int64_t seq = add_sequence(2200, 1e4, 1.0, 3);
      int64_t first = 0;
      for (const int64_t until : {5, 70, 1100, 2200}) {
        for (; first + 12 < until; first += std::min<int64_t>(512, until - 12 - first)) {
          step({{seq, first, std::min<int64_t>(512, until - 12 - first)}});
        }
        for (; first < until; ++first) {
          expect_attention(step({{seq, first, 1}}), 0, seq, first, 1);
        }
      }
    }
  }
}

TEST_P(AttentionOps, GoesOnFromACopiedBlockWhateverFollowedInIt) {
  for (const KvFormat format : backend().kv_formats(128)) {
    for (const int64_t block_len : {64, 256}) {
      for (const int64_t shared : {int64_t{1}, int64_t{33}, block_len / 2, block_len - 1}) {
        SCOPED_TRACE(testing::Message()
                     << shared << " of a block of " << block_len << ", " << name_of(format));
        make_cache({2, 2, 128}, block_len, 300, 300, 2, format);
        poison();
        const int64_t length = block_len + 30;
        const int64_t source = add_sequence(block_len, 1e4, 1.0, 6);
        const int64_t target = add_sequence(length, 1e4, 1.0, 6);  // begins as the source does
        spoil(source, shared);
        step({{source, 0, block_len}}, false);
        copy_first_block(source, target, shared);
        expect_attention(step({{target, shared, 1}}), 0, target, shared, 1);
        const int64_t left = length - shared - 1;
        expect_attention(step({{target, shared + 1, left}}), 0, target, shared + 1, left);
      }
    }
  }
}

TEST_P(AttentionOps, MixesSequencesOfAnyLengthAndProfileInAStep) {
  for (const KvFormat format : backend().kv_formats(64)) {
    SCOPED_TRACE(name_of(format));
    make_cache({9, 3, 64}, 128, 256, 1500, 4, format);
    poison();
    const int64_t a = add_sequence(1300, 1e4, 1.0, 3);
    const int64_t b = add_sequence(200, 5e5, 1.2, 4);
    const int64_t c = add_sequence(77, 100.0, 0.8, 5);
    for (int64_t first = 0; first < 1200; first += 240) step({{a, first, 240}});
    step({{b, 0, 100}, {a, 1200, 99}});
    const Matrix out = step({{a, 1299, 1}, {c, 0, 77}, {b, 100, 100}});
    expect_attention(out, 0, a, 1299, 1);
    expect_attention(out, 1, c, 0, 77);
    expect_attention(out, 78, b, 100, 100);
  }
}

TEST_P(AttentionOps, RotatesInPartUnderAnAttentionFactor) {
  for (const auto& [head_dim, rotary_dim] : {std::pair{64, 32}, {128, 96}, {96, 20}}) {
    for (const KvFormat format : backend().kv_formats(head_dim)) {
      SCOPED_TRACE(testing::Message()
                   << rotary_dim << " of " << head_dim << ", " << name_of(format));
      make_cache({4, 2, head_dim}, 64, 512, 320, 2, format);
      rotate_in_part(rotary_dim);
      const int64_t a = add_sequence(300, 1e4, 1.3, 6);
      const int64_t b = add_sequence(120, 1e4, 0.8, 7);
      step({{b, 0, 119}});
      const Matrix out = step({{b, 119, 1}, {a, 0, 300}});
      expect_attention(out, 0, b, 119, 1);
      expect_attention(out, 1, a, 0, 300);
    }
  }
}

TEST_P(AttentionOps, NormsTheHeadsOfQueriesAndKeys) {
  for (const AttentionShape& shape : {AttentionShape{4, 2, 128}, {9, 3, 64}, {2, 1, 24}}) {
    SCOPED_TRACE(shape.head_dim);
    make_cache(shape, 64, 512, 320, 1);
    norm_heads();
    const int64_t seq = add_sequence(300, 1e4, 1.0, 8);
    expect_attention(step({{seq, 0, 299}}), 0, seq, 0, 299);
    expect_attention(step({{seq, 299, 1}}), 0, seq, 299, 1);
  }
}

TEST_P(AttentionOps, DecodesManySequencesInAStep) {
  constexpr int64_t kSeqs = 40;
  for (const KvFormat format : backend().kv_formats(128)) {
    SCOPED_TRACE(name_of(format));
    make_cache({4, 1, 128}, 64, 512, 320, kSeqs, format);
    poison();
    std::vector<Piece> last;
    for (int64_t s = 0; s < kSeqs; ++s) {
      const int64_t length = 1 + s * 7;
      const int64_t seq = add_sequence(length, 1e4, 1.0, static_cast<uint64_t>(s));
      if (length > 1) step({{seq, 0, length - 1}}, false);
      last.push_back({seq, length - 1, 1});
    }
    const Matrix out = step(last);
    for (int64_t s = 0; s < kSeqs; ++s) expect_attention(out, s, s, s * 7, 1);
  }
}

TEST_P(AttentionOps, FormsTheProductsOfManyRowsInEveryWay) {
  const AttentionShape shapes[] = {{8, 2, 128}, {3, 3, 128}, {8, 8, 128}, {4, 2, 64}};
  int64_t block_len = 64;
  for (const AttentionShape& shape : shapes) {
    for (const PrefillAttention attention : backend().prefill_attentions(shape.head_dim)) {
      SCOPED_TRACE(testing::Message()
                   << name_of(attention) << ", " << shape.num_heads << "/" << shape.num_kv_heads
                   << " x " << shape.head_dim << ", blocks of " << block_len);
      multiply_in(attention);
      make_cache(shape, block_len, 800, 1000, 3);
      poison();
      const int64_t a = add_sequence(260, 1e4, 1.0, 1);
      const int64_t b = add_sequence(1000, 1e4, 1.1, 2);
      const int64_t c = add_sequence(64, 1e4, 1.0, 3);
      expect_attention(step({{b, 0, 700}}), 0, b, 0, 700);
      step({{a, 0, 1}});
      const Matrix out = step({{c, 0, 64}, {b, 700, 40}, {a, 1, 129}});
      expect_attention(out, 0, c, 0, 64);
      expect_attention(out, 64, b, 700, 40);
      expect_attention(out, 104, a, 1, 129);
      expect_attention(step({{b, 740, 1}}), 0, b, 740, 1);
    }
    block_len = block_len == 256 ? 64 : 2 * block_len;
  }
}

/// Whoever goes through keys from the last one on, and remembers the largest score so far, meets
/// the loudest keys at the end: by 2^200 without their own maximum.
TEST_P(AttentionOps, FindsTheLoudestKeysWhereverTheyAre) {
  const AttentionShape shape{4, 2, 128};
  for (const PrefillAttention attention : backend().prefill_attentions(shape.head_dim)) {
    SCOPED_TRACE(name_of(attention));
    multiply_in(attention);
    make_cache(shape, 64, 300, 300, 1);
    const int64_t seq = add_sequence(300, 1e4, 1.0, 4);
    raise_keys(seq, 60, 16.0);
    expect_attention(step({{seq, 0, 300}}), 0, seq, 0, 300);
  }
}

}  // namespace
}  // namespace longspan
