#include "backend/kv_rows.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "backend/kv_reference.h"

namespace longspan {
namespace {

using reference::Matrix;
using Bytes = std::vector<std::byte>;

constexpr KvFormat kFormats[] = {KvFormat::kNative,  KvFormat::kInt8,     KvFormat::kFp8,
                                 KvFormat::kInt8Fp8, KvFormat::kInt8Int4, KvFormat::kInt4};
constexpr int64_t kTokens = 7;
constexpr int64_t kHeadDim = 80;  // a group of int4 and a run of turning that are not whole

KvRows rows_of(KvFormat format, DType dtype = DType::kF32) {
  return {{3, 2, kHeadDim, 64, format}, dtype, kTokens};
}

/// Random numbers in the native format.
Bytes random_rows(const KvRows& rows) {
  Bytes bytes(static_cast<size_t>(rows.bytes()));
  const Matrix values = reference::random_matrix(1, rows.bytes() / 4, 3.0, 1);
  auto* floats = reinterpret_cast<float*>(bytes.data());
  for (size_t i = 0; i < values.values.size(); ++i)
    floats[i] = static_cast<float>(values.values[i]);
  return bytes;
}

/// The keys or the values of a head as numbers.
Matrix numbers(const KvRows& rows, const Bytes& bytes, KvPart part, int64_t layer, int64_t head) {
  const auto* floats = reinterpret_cast<const float*>(rows.head(bytes.data(), part, layer, head));
  Matrix result(kTokens, kHeadDim);
  std::copy_n(floats, kTokens * kHeadDim, result.values.begin());
  return result;
}

Bytes convert(const KvRows& from, const Bytes& bytes, const KvRows& to) {
  Bytes result(static_cast<size_t>(to.bytes()), std::byte{0x5a});
  convert_kv_rows(from, bytes, to, result);
  return result;
}

TEST(KvRows, PartsLieOneAfterAnother) {
  const KvRows rows = rows_of(KvFormat::kInt8Int4);
  const std::byte* memory = nullptr;
  const auto offset = [&](KvPart part, int64_t layer, int64_t head) {
    return rows.head(memory, part, layer, head) - memory;
  };
  EXPECT_EQ(offset(KvPart::kKeys, 1, 1), 3 * 7 * 80);
  EXPECT_EQ(offset(KvPart::kValues, 0, 0), 6 * 7 * 80);
  EXPECT_EQ(offset(KvPart::kKeyParameters, 0, 1), 6 * 7 * (80 + 40) + 7 * 2);
  EXPECT_EQ(offset(KvPart::kValueParameters, 0, 0), 6 * 7 * (80 + 40 + 2));
  EXPECT_EQ(rows.bytes(), 6 * 7 * (80 + 40 + 2 + 3 * 4));
}

TEST(KvRows, CodesStandForWhatTheFormatSays) {
  const KvRows native = rows_of(KvFormat::kNative);
  const Bytes bytes = random_rows(native);
  for (const KvFormat format : kFormats) {
    SCOPED_TRACE(name_of(format));
    const Bytes back = convert(rows_of(format), convert(native, bytes, rows_of(format)), native);
    for (const KvPart part : {KvPart::kKeys, KvPart::kValues}) {
      const bool keys = part == KvPart::kKeys;
      const Matrix x = numbers(native, bytes, part, 2, 1);
      const KvFormat turning = keys ? format : KvFormat::kNative;
      // Turned twice, a head is what it was.
      const Matrix want = reference::turned(
          reference::quantized(reference::turned(x, kHeadDim, turning), kHeadDim,
                               keys ? key_element(format) : value_element(format)),
          kHeadDim, turning);
      const Matrix got = numbers(native, back, part, 2, 1);
      for (size_t i = 0; i < want.values.size(); ++i) {
        // Sums in float32; where one is at the edge of a code's interval, the next code.
        const double edge = turns_heads(turning) ? 0.1 : 1e-6;
        ASSERT_NEAR(got.values[i], want.values[i], edge) << i;
      }
    }
  }
}

TEST(KvRows, TheSameFormatIsTheSameBits) {
  const Bytes native = random_rows(rows_of(KvFormat::kNative));
  for (const KvFormat format : kFormats) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const KvRows rows = rows_of(format, dtype);
      const Bytes bytes = convert(rows_of(KvFormat::kNative), native, rows);
      EXPECT_EQ(convert(rows, bytes, rows), bytes) << name_of(format);
      // What needs no rounding goes and comes back as it is.
      if (format == KvFormat::kNative) {
        EXPECT_EQ(convert(rows_of(format), convert(rows, bytes, rows_of(format)), rows), bytes);
      }
    }
  }
}

TEST(KvRows, KeysOfAFormatAreKeptWhereOnlyValuesDiffer) {
  const KvRows native = rows_of(KvFormat::kNative);
  const KvRows a = rows_of(KvFormat::kInt8Int4);
  const KvRows b = rows_of(KvFormat::kInt8Fp8);
  const Bytes from = convert(native, random_rows(native), a);
  const Bytes to = convert(a, from, b);
  for (const KvPart part : {KvPart::kKeys, KvPart::kKeyParameters}) {
    EXPECT_EQ(std::memcmp(a.head(from.data(), part, 1, 0), b.head(to.data(), part, 1, 0),
                          static_cast<size_t>(a.head_bytes(part))),
              0);
  }
}

TEST(KvRows, PartsAreTakenAndPutBack) {
  const KvRows all({2, 4, kHeadDim, 64, KvFormat::kInt8Int4}, DType::kF32, 10);
  Bytes bytes(static_cast<size_t>(all.bytes()));
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::byte>(i * i / 7);
  Bytes together(bytes.size());
  for (const int64_t head : {0, 2}) {
    for (const auto& [first, tokens] : {std::pair{0, 7}, {7, 3}}) {
      const KvRows some({2, 2, kHeadDim, 64, KvFormat::kInt8Int4}, DType::kF32, tokens);
      Bytes part(static_cast<size_t>(some.bytes()));
      take_rows(all, bytes, {head, first}, some, part);
      constexpr KvPart kPart = KvPart::kValueParameters;
      EXPECT_EQ(
          std::memcmp(some.head(part.data(), kPart, 1, 1),
                      all.head(bytes.data(), kPart, 1, head + 1) + first * all.row_bytes(kPart),
                      static_cast<size_t>(some.head_bytes(kPart))),
          0);
      put_rows(some, part, {head, first}, all, together);
    }
  }
  EXPECT_EQ(together, bytes);
}

TEST(KvRows, WhatIsNotFiniteIsSeen) {
  const KvRows native = rows_of(KvFormat::kNative);
  const Bytes plain = random_rows(native);
  for (const KvFormat format : kFormats) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const KvRows rows = rows_of(format, dtype);
      const Bytes bytes = convert(native, plain, rows);
      EXPECT_TRUE(is_finite(rows, bytes));
      for (const float bad :
           {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
        Bytes spoiled = plain;
        std::memcpy(native.head(spoiled.data(), KvPart::kValues, 2, 1) + 4 * (kHeadDim + 3), &bad,
                    sizeof(bad));
        EXPECT_FALSE(is_finite(rows, convert(native, spoiled, rows))) << name_of(format);
      }
      // NaN in e4m3, and beyond what six bits hold.
      std::vector<uint8_t> no_codes;
      if (key_element(format) == KvElement::kFp8) no_codes = {0x7f, 0xff};
      if (key_element(format) == KvElement::kInt6) no_codes = {32, 0x80, 0xe0};
      for (const uint8_t code : no_codes) {
        Bytes spoiled = bytes;
        *rows.head(spoiled.data(), KvPart::kKeys, 1, 0) = std::byte{code};
        EXPECT_FALSE(is_finite(rows, spoiled));
      }
    }
  }
}

}  // namespace
}  // namespace longspan
