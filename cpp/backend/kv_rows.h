#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>

#include "backend/kv_cache.h"
#include "backend/kv_quantize.h"
#include "core/dtype.h"

namespace longspan {

/// What is held of keys and values: their elements, or codes of kv_quantize.h, and what these are
/// multiplied by.
enum class KvPart : uint8_t { kKeys, kValues, kKeyParameters, kValueParameters };

inline constexpr std::array<KvPart, 4> kKvParts = {
    KvPart::kKeys, KvPart::kValues, KvPart::kKeyParameters, KvPart::kValueParameters};

/// Keys and values of some tokens in host memory, in an order that is no backend's own, so that
/// every backend and file can have it: the parts one after another, each
/// [layer][kv_head][token][row_bytes]. A row of
///   keys or values is [head_dim]: native elements; int8, int6 or e4m3 codes, a byte each; int4
///     codes, two to a byte, the even dim low;
///   parameters is bfloat16: the scale of int8, int6 and e4m3; of int4 [groups]{scale, zero};
///     native: none.
class KvRows {
 public:
  /// shape: of the heads and the format that are here; dtype: what kNative means.
  KvRows(const KvShape& shape, DType dtype, int64_t tokens)
      : shape_(shape), dtype_(dtype), tokens_(tokens) {
    row_bytes_ = {
        element_bytes(key_element(shape.format)), element_bytes(value_element(shape.format)),
        parameter_bytes(key_element(shape.format)), parameter_bytes(value_element(shape.format))};
  }

  const KvShape& shape() const { return shape_; }
  DType dtype() const { return dtype_; }
  int64_t tokens() const { return tokens_; }

  int64_t row_bytes(KvPart part) const { return row_bytes_[static_cast<size_t>(part)]; }
  /// The tokens of a head, all parts of a row and all rows.
  int64_t head_bytes(KvPart part) const { return tokens_ * row_bytes(part); }
  int64_t bytes() const {
    return heads() * tokens_ * std::accumulate(row_bytes_.begin(), row_bytes_.end(), int64_t{0});
  }

  /// The tokens of a head of a layer, in memory that begins at `rows`.
  template <class Byte>
  Byte* head(Byte* rows, KvPart part, int64_t layer, int64_t kv_head) const {
    int64_t offset = (layer * shape_.num_kv_heads + kv_head) * head_bytes(part);
    for (const KvPart before : kKvParts) {
      if (before < part) offset += heads() * head_bytes(before);
    }
    return rows + offset;
  }

 private:
  int64_t heads() const { return shape_.num_layers * shape_.num_kv_heads; }
  int64_t element_bytes(KvElement element) const {
    switch (element) {
      case KvElement::kNative:
        return shape_.head_dim * size_of(dtype_);
      case KvElement::kInt4:
        return shape_.head_dim / 2;
      default:
        return shape_.head_dim;
    }
  }
  int64_t parameter_bytes(KvElement element) const {
    switch (element) {
      case KvElement::kNative:
        return 0;
      case KvElement::kInt4:
        return int4_groups(shape_.head_dim) * 4;
      default:
        return 2;
    }
  }

  KvShape shape_;
  DType dtype_;
  int64_t tokens_;
  std::array<int64_t, kKvParts.size()> row_bytes_ = {};
};

/// Which rows of a larger KvRows a smaller one of the same layers and format has.
struct KvPlace {
  int64_t first_head = 0;
  int64_t first_token = 0;
};

/// Copies those rows from the larger one to the smaller one, and back.
void take_rows(const KvRows& all, std::span<const std::byte> from, KvPlace place,
               const KvRows& some, std::span<std::byte> to);
void put_rows(const KvRows& some, std::span<const std::byte> from, KvPlace place, const KvRows& all,
              std::span<std::byte> to);

/// Turns rows of one format into rows of another, of the same layers, heads and tokens: bit for bit
/// where the formats are the same, else as numbers, quantised anew.
void convert_kv_rows(const KvRows& from_rows, std::span<const std::byte> from,
                     const KvRows& to_rows, std::span<std::byte> to);

/// Whether every row is made of finite numbers, and of codes that its format has.
bool is_finite(const KvRows& rows, std::span<const std::byte> data);

}  // namespace longspan
