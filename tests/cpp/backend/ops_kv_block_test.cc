#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "backend/device.h"
#include "backend/kv_rows.h"

namespace longspan {
namespace {

using reference::Matrix;

constexpr int64_t kLayers = 2;
constexpr int64_t kBlocks = 6;

/// A cache on a device, filled through rotate_append under angles of nothing, so that what it holds
/// of each token is known.
class KvBlockOps : public Ops {
 protected:
  void make_cache(const AttentionShape& shape, int64_t block_len, KvFormat format) {
    shape_ = shape;
    cache_.shape = {kLayers, shape.num_kv_heads, shape.head_dim, block_len, format};
    cache_.num_blocks = kBlocks;
    cache_.block_bytes = backend().kv_block_bytes(cache_.shape);
    cache_.pool = backend().allocate(kBlocks * cache_.block_bytes);
    plan_ = backend().make_step_plan({2 * block_len, 1, kBlocks, block_len, format}, shape);
    profile_ = std::make_shared<RopeProfile>();
    profile_->inv_freq.assign(static_cast<size_t>(shape.head_dim / 2), 1e-30);
  }

  int64_t cols() const { return (shape_.num_heads + 2 * shape_.num_kv_heads) * shape_.head_dim; }
  KvRows rows_of(int64_t tokens) const { return {cache_.shape, act(), tokens}; }

  /// Appends rows of qkv, those of a layer each, at `first`; returns the attention of the last
  /// layer.
  Matrix append(const std::vector<int32_t>& table, int64_t first,
                const std::vector<Matrix>& layers) {
    StepInput input;
    const int64_t tokens = layers.front().rows;
    input.token_ids.resize(static_cast<size_t>(tokens));
    input.cu_seqlens = {0, tokens};
    input.first_position = {first};
    input.block_tables = {table};
    input.profiles = {profile_};
    backend().plan_step(*plan_, input, cache_);
    const int64_t q_cols = shape_.num_heads * shape_.head_dim;
    const DeviceMatrix q = matrix(act(), tokens, q_cols);
    const DeviceMatrix result = matrix(act(), tokens, q_cols);
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      const DeviceMatrix qkv = matrix(out(), layers[static_cast<size_t>(layer)]);
      backend().rotate_append(*plan_, layer, qkv.view(), nullptr, cache_, q.view());
    }
    backend().attention(*plan_, kLayers - 1, q.view(), cache_, result.view(), nullptr);
    return result.read();
  }

  std::vector<Matrix> random_layers(int64_t tokens, uint64_t seed) const {
    std::vector<Matrix> layers;
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      const uint64_t own = seed + static_cast<uint64_t>(layer);
      layers.push_back(rounded(reference::random_matrix(tokens, cols(), 3.0, own), out()));
    }
    return layers;
  }

  /// What a block should give of tokens [first, first + count).
  std::vector<std::byte> expected(const std::vector<Matrix>& layers, int64_t first,
                                  int64_t count) const {
    const KvShape& s = cache_.shape;
    const KvRows plain({s.num_layers, s.num_kv_heads, s.head_dim, s.block_len}, DType::kF32, count);
    std::vector<std::byte> numbers(static_cast<size_t>(plain.bytes()));
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      for (int64_t head = 0; head < s.num_kv_heads; ++head) {
        for (const KvPart part : {KvPart::kKeys, KvPart::kValues}) {
          auto* to = reinterpret_cast<float*>(plain.head(numbers.data(), part, layer, head));
          const int64_t heads_before =
              shape_.num_heads + head + (part == KvPart::kValues ? shape_.num_kv_heads : 0);
          for (int64_t t = 0; t < count; ++t) {
            for (int64_t d = 0; d < s.head_dim; ++d) {
              *to++ = static_cast<float>(
                  layers[static_cast<size_t>(layer)].at(first + t, heads_before * s.head_dim + d));
            }
          }
        }
      }
    }
    const KvRows rows = rows_of(count);
    std::vector<std::byte> result(static_cast<size_t>(rows.bytes()));
    convert_kv_rows(plain, numbers, rows, result);
    return result;
  }

  std::vector<std::byte> exported(int32_t block, int64_t tokens) const {
    std::vector<std::byte> rows(static_cast<size_t>(rows_of(tokens).bytes()), std::byte{0x5a});
    backend().export_kv_block(cache_, block, tokens, rows);
    return rows;
  }

  /// Fills a block with NaN.
  void spoil(int32_t block) {
    std::vector<Matrix> layers = random_layers(cache_.shape.block_len, 99);
    for (Matrix& m : layers) {
      std::ranges::fill(m.values, std::numeric_limits<double>::quiet_NaN());
    }
    append({block}, 0, layers);
  }

  /// Keys that are turned come of sums on the way to which a device may round otherwise, so that a
  /// code may be the next one: up to 0.5 away in fp8, over the dims of a run.
  void expect_rows(const std::vector<std::byte>& got, const std::vector<std::byte>& want,
                   int64_t tokens) const {
    const KvRows rows = rows_of(tokens);
    const bool near = turns_heads(cache_.shape.format) && backend().describe().starts_with("cuda");
    for (const KvPart part : kKvParts) {
      const bool key = part == KvPart::kKeys || part == KvPart::kKeyParameters;
      if (key && near) continue;
      const auto begin = rows.head(got.data(), part, 0, 0) - got.data();
      const auto end = begin + kLayers * cache_.shape.num_kv_heads * rows.head_bytes(part);
      EXPECT_TRUE(std::equal(got.begin() + begin, got.begin() + end, want.begin() + begin))
          << "part " << static_cast<int>(part);
    }
    if (!near) return;
    const std::vector<float> got_keys = keys_of(got, tokens);
    const std::vector<float> want_keys = keys_of(want, tokens);
    for (size_t i = 0; i < want_keys.size(); ++i) ASSERT_NEAR(got_keys[i], want_keys[i], 0.25) << i;
  }

  /// The numbers that the keys of rows stand for.
  std::vector<float> keys_of(const std::vector<std::byte>& data, int64_t tokens) const {
    KvShape plain_shape = cache_.shape;
    plain_shape.format = KvFormat::kNative;
    const KvRows plain(plain_shape, DType::kF32, tokens);
    std::vector<std::byte> numbers(static_cast<size_t>(plain.bytes()));
    convert_kv_rows(rows_of(tokens), data, plain, numbers);
    const auto* keys =
        reinterpret_cast<const float*>(plain.head(numbers.data(), KvPart::kKeys, 0, 0));
    return {keys, keys + kLayers * cache_.shape.num_kv_heads * tokens * cache_.shape.head_dim};
  }

  AttentionShape shape_;
  KvCache cache_;
  std::unique_ptr<StepPlan> plan_;
  std::shared_ptr<RopeProfile> profile_;
};
LONGSPAN_TEST_DEVICES(KvBlockOps);

TEST_P(KvBlockOps, GiveTheRowsThatWereAppended) {
  int64_t block_len = 64;
  for (const AttentionShape& shape :
       {AttentionShape{4, 2, 64}, {3, 3, 80}, {4, 1, 128}, {2, 1, 24}, {2, 2, 256}}) {
    for (const KvFormat format : backend().kv_formats(shape.head_dim)) {
      SCOPED_TRACE(testing::Message()
                   << shape.head_dim << " in " << block_len << ", " << name_of(format));
      make_cache(shape, block_len, format);
      const int64_t tokens = block_len + 21;
      const std::vector<Matrix> layers = random_layers(tokens, 5);
      append({3, 1}, 0, layers);
      expect_rows(exported(3, block_len), expected(layers, 0, block_len), block_len);
      expect_rows(exported(1, 21), expected(layers, block_len, 21), 21);
      expect_rows(exported(3, 5), expected(layers, 0, 5), 5);
    }
    block_len = block_len == 256 ? 64 : 2 * block_len;
  }
}

TEST_P(KvBlockOps, GoOnFromAnImportBitForBitWhateverWasThere) {
  for (const AttentionShape& shape : {AttentionShape{4, 2, 64}, {3, 3, 80}}) {
    for (const KvFormat format : backend().kv_formats(shape.head_dim)) {
      for (const int64_t rest : {1, 64, 100}) {
        SCOPED_TRACE(testing::Message()
                     << shape.head_dim << ", " << name_of(format) << ", " << rest);
        make_cache(shape, 128, format);
        const int64_t tokens = 128 + rest;
        append({0, 1}, 0, random_layers(tokens, 6));
        spoil(4);
        spoil(2);
        const std::vector<std::byte> first = exported(0, 128);
        const std::vector<std::byte> second = exported(1, rest);
        backend().import_kv_block(cache_, 4, 128, first);
        backend().import_kv_block(cache_, 2, rest, second);
        EXPECT_EQ(exported(4, 128), first);
        EXPECT_EQ(exported(2, rest), second);
        for (const int64_t count : {1, 20}) {
          const std::vector<Matrix> next = random_layers(count, 8);
          const Matrix want = append({0, 1}, tokens, next);
          EXPECT_EQ(append({4, 2}, tokens, next).values, want.values);
        }
      }
    }
  }
}

}  // namespace
}  // namespace longspan
