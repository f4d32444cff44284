#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

#include "backend/kv_quantize.h"
#include "reference/reference.h"

// What the cache holds of keys and values, for the reference of attention: kv_quantize.h's codes,
// taken apart in double precision. kv_quantize_test says that the codes are right.

namespace longspan::reference {

/// Rows of heads as an element type holds them, each row of head_dim by itself; native ones as they
/// are.
inline Matrix quantized(Matrix x, int64_t head_dim, KvElement element) {
  if (element == KvElement::kNative) return x;
  std::vector<float> row(static_cast<size_t>(head_dim));
  std::vector<uint8_t> codes(row.size());
  std::vector<int8_t> signed_codes(row.size());
  for (int64_t begin = 0; begin < x.rows * x.cols; begin += head_dim) {
    double* out = x.values.data() + begin;
    for (size_t d = 0; d < row.size(); ++d) row[d] = static_cast<float>(out[d]);
    if (element == KvElement::kInt8 || element == KvElement::kInt6) {
      const double scale =
          bf16_to_float(quantize_integers(element, row.data(), head_dim, signed_codes.data()));
      for (size_t d = 0; d < row.size(); ++d) out[d] = scale * signed_codes[d];
    } else if (element == KvElement::kFp8) {
      const double scale = bf16_to_float(quantize_fp8(row.data(), head_dim, codes.data()));
      for (size_t d = 0; d < row.size(); ++d) out[d] = scale * from_e4m3(codes[d]);
    } else {
      for (int64_t first = 0; first < head_dim; first += kInt4Group) {
        const int64_t count = std::min(kInt4Group, head_dim - first);
        const Int4Parameters p = quantize_int4(row.data() + first, count, codes.data());
        for (int64_t d = 0; d < count; ++d) {
          out[first + d] = double{bf16_to_float(p.zero)} +
                           double{bf16_to_float(p.scale)} * codes[static_cast<size_t>(d)];
        }
      }
    }
  }
  return x;
}

/// Heads of q or k as turn_head() turns them, by Sylvester's matrix itself; as they are in formats
/// that do not turn them.
inline Matrix turned(const Matrix& x, int64_t head_dim, KvFormat format) {
  if (!turns_heads(format)) return x;
  const int64_t run = head_dim & -head_dim;
  Matrix result(x.rows, x.cols);
  for (int64_t r = 0; r < x.rows; ++r) {
    for (int64_t c = 0; c < x.cols; ++c) {
      const int64_t first = c / run * run;
      double sum = 0;
      for (int64_t j = 0; j < run; ++j) {
        const auto common = static_cast<uint64_t>((c - first) & j);
        sum += std::popcount(common) % 2 == 0 ? x.at(r, first + j) : -x.at(r, first + j);
      }
      result.at(r, c) = sum / std::sqrt(static_cast<double>(run));
    }
  }
  return result;
}

/// The same of keys whose codes should be those of a cache to the bit: in float32, by turn_head()
/// itself, since where a sum is rounded otherwise, a code at the edge of its interval is the next.
inline Matrix turned_as_cached(Matrix x, int64_t head_dim, KvFormat format) {
  if (!turns_heads(format)) return x;
  std::vector<float> head(static_cast<size_t>(head_dim));
  for (int64_t begin = 0; begin < x.rows * x.cols; begin += head_dim) {
    double* values = x.values.data() + begin;
    for (size_t d = 0; d < head.size(); ++d) head[d] = static_cast<float>(values[d]);
    turn_head(head.data(), head_dim);
    std::ranges::copy(head, values);
  }
  return x;
}

}  // namespace longspan::reference
