#include "backend/kv_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "backend/cpu/convert.h"

namespace longspan {
namespace {

KvElement element_of(const KvRows& rows, bool keys) {
  return keys ? key_element(rows.shape().format) : value_element(rows.shape().format);
}

uint16_t read_bf16(const std::byte* parameters, int64_t index) {
  uint16_t bits = 0;
  std::memcpy(&bits, parameters + 2 * index, sizeof(bits));
  return bits;
}
void write_bf16(uint16_t bits, std::byte* parameters, int64_t index) {
  std::memcpy(parameters + 2 * index, &bits, sizeof(bits));
}

/// The numbers [head_dim] that a row stands for.
void read_row(KvElement element, DType dtype, int64_t head_dim, const std::byte* row,
              const std::byte* parameters, float* out) {
  const auto code = [row](int64_t i) { return std::to_integer<uint8_t>(row[i]); };
  switch (element) {
    case KvElement::kNative:
      for (int64_t d = 0; d < head_dim; ++d) {
        if (dtype == DType::kF32) {
          std::memcpy(out + d, row + 4 * d, sizeof(float));
        } else {
          out[d] = bf16_to_float(read_bf16(row, d));
        }
      }
      return;
    case KvElement::kInt8:
    case KvElement::kInt6:
    case KvElement::kFp8: {
      const float scale = bf16_to_float(read_bf16(parameters, 0));
      for (int64_t d = 0; d < head_dim; ++d) {
        const bool fp8 = element == KvElement::kFp8;
        out[d] =
            scale * (fp8 ? from_e4m3(code(d)) : static_cast<float>(std::bit_cast<int8_t>(code(d))));
      }
      return;
    }
    case KvElement::kInt4:
      for (int64_t d = 0; d < head_dim; ++d) {
        const float scale = bf16_to_float(read_bf16(parameters, d / kInt4Group * 2));
        const float zero = bf16_to_float(read_bf16(parameters, d / kInt4Group * 2 + 1));
        out[d] = zero + scale * static_cast<float>(code(d / 2) >> (d % 2 * 4) & 0xf);
      }
  }
}

/// The way back. codes: [head_dim], to work in.
void write_row(KvElement element, DType dtype, int64_t head_dim, const float* x, uint8_t* codes,
               std::byte* row, std::byte* parameters) {
  switch (element) {
    case KvElement::kNative:
      for (int64_t d = 0; d < head_dim; ++d) {
        if (dtype == DType::kF32) {
          std::memcpy(row + 4 * d, x + d, sizeof(float));
        } else {
          write_bf16(cpu::from_float<cpu::bf16_t>(x[d]), row, d);
        }
      }
      return;
    case KvElement::kInt8:
    case KvElement::kInt6:
      write_bf16(quantize_integers(element, x, head_dim, reinterpret_cast<int8_t*>(row)),
                 parameters, 0);
      return;
    case KvElement::kFp8:
      write_bf16(quantize_fp8(x, head_dim, reinterpret_cast<uint8_t*>(row)), parameters, 0);
      return;
    case KvElement::kInt4:
      for (int64_t first = 0; first < head_dim; first += kInt4Group) {
        const int64_t count = std::min(kInt4Group, head_dim - first);
        const Int4Parameters p = quantize_int4(x + first, count, codes + first);
        write_bf16(p.scale, parameters, first / kInt4Group * 2);
        write_bf16(p.zero, parameters, first / kInt4Group * 2 + 1);
      }
      for (int64_t d = 0; d < head_dim; d += 2) {
        row[d / 2] = static_cast<std::byte>(codes[d] | codes[d + 1] << 4);
      }
  }
}

/// Calls visit(layer, head) for each.
template <class Visit>
void for_each_head(const KvShape& shape, const Visit& visit) {
  for (int64_t layer = 0; layer < shape.num_layers; ++layer) {
    for (int64_t head = 0; head < shape.num_kv_heads; ++head) visit(layer, head);
  }
}

bool are_finite(const std::byte* values, int64_t count, DType dtype) {
  // The exponent's bits are all ones in what is not finite.
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits = 0;
    if (dtype == DType::kF32) {
      std::memcpy(&bits, values + 4 * i, sizeof(bits));
    } else {
      bits = uint32_t{read_bf16(values, i)} << 16;
    }
    finite &= (bits & 0x7f800000U) != 0x7f800000U;
  }
  return finite;
}

}  // namespace

void take_rows(const KvRows& all, std::span<const std::byte> from, KvPlace place,
               const KvRows& some, std::span<std::byte> to) {
  for_each_head(some.shape(), [&](int64_t layer, int64_t head) {
    for (const KvPart part : kKvParts) {
      std::copy_n(all.head(from.data(), part, layer, place.first_head + head) +
                      place.first_token * all.row_bytes(part),
                  some.head_bytes(part), some.head(to.data(), part, layer, head));
    }
  });
}

void put_rows(const KvRows& some, std::span<const std::byte> from, KvPlace place, const KvRows& all,
              std::span<std::byte> to) {
  for_each_head(some.shape(), [&](int64_t layer, int64_t head) {
    for (const KvPart part : kKvParts) {
      std::copy_n(some.head(from.data(), part, layer, head), some.head_bytes(part),
                  all.head(to.data(), part, layer, place.first_head + head) +
                      place.first_token * all.row_bytes(part));
    }
  });
}

void convert_kv_rows(const KvRows& from_rows, std::span<const std::byte> from,
                     const KvRows& to_rows, std::span<std::byte> to) {
  const KvShape& shape = from_rows.shape();
  const int64_t d = shape.head_dim;
  std::vector<float> x(static_cast<size_t>(d));
  std::vector<uint8_t> codes(static_cast<size_t>(d));
  for (const bool keys : {true, false}) {
    const KvPart part = keys ? KvPart::kKeys : KvPart::kValues;
    const KvPart by = keys ? KvPart::kKeyParameters : KvPart::kValueParameters;
    const KvElement in = element_of(from_rows, keys);
    const KvElement out = element_of(to_rows, keys);
    const bool same_dtype = in != KvElement::kNative || from_rows.dtype() == to_rows.dtype();
    // Keys that were turned are turned back by turning them again.
    const bool turn = keys && turns_heads(shape.format) != turns_heads(to_rows.shape().format);
    for_each_head(shape, [&](int64_t layer, int64_t head) {
      const std::byte* row = from_rows.head(from.data(), part, layer, head);
      const std::byte* parameters = from_rows.head(from.data(), by, layer, head);
      std::byte* to_row = to_rows.head(to.data(), part, layer, head);
      std::byte* to_parameters = to_rows.head(to.data(), by, layer, head);
      if (in == out && same_dtype) {
        std::copy_n(row, from_rows.head_bytes(part), to_row);
        std::copy_n(parameters, from_rows.head_bytes(by), to_parameters);
        return;
      }
      for (int64_t t = 0; t < from_rows.tokens(); ++t) {
        read_row(in, from_rows.dtype(), d, row + t * from_rows.row_bytes(part),
                 parameters + t * from_rows.row_bytes(by), x.data());
        if (turn) turn_head(x.data(), d);
        write_row(out, to_rows.dtype(), d, x.data(), codes.data(),
                  to_row + t * to_rows.row_bytes(part), to_parameters + t * to_rows.row_bytes(by));
      }
    });
  }
}

bool is_finite(const KvRows& rows, std::span<const std::byte> data) {
  constexpr auto kE4m3NaN = std::byte{0x7f};
  bool finite = true;
  for_each_head(rows.shape(), [&](int64_t layer, int64_t head) {
    for (const bool keys : {true, false}) {
      const KvPart part = keys ? KvPart::kKeys : KvPart::kValues;
      const KvPart by = keys ? KvPart::kKeyParameters : KvPart::kValueParameters;
      const std::byte* row = rows.head(data.data(), part, layer, head);
      const std::byte* parameters = rows.head(data.data(), by, layer, head);
      finite &= are_finite(parameters, rows.head_bytes(by) / 2, DType::kBF16);
      const KvElement element = element_of(rows, keys);
      if (element == KvElement::kNative) {
        finite &= are_finite(row, rows.head_bytes(part) / size_of(rows.dtype()), rows.dtype());
      } else if (element == KvElement::kFp8) {
        finite &= std::none_of(row, row + rows.head_bytes(part),
                               [](std::byte code) { return (code & kE4m3NaN) == kE4m3NaN; });
      } else if (element == KvElement::kInt6) {
        finite &= std::all_of(row, row + rows.head_bytes(part), [](std::byte code) {
          return std::abs(std::bit_cast<int8_t>(code)) <= largest_code(KvElement::kInt6);
        });
      }
    }
  });
  return finite;
}

}  // namespace longspan
