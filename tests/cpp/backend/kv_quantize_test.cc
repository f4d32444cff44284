#include "backend/kv_quantize.h"

#include <gtest/gtest.h>

#include <bit>
#include <random>
#include <vector>

#include "backend/kv_reference.h"

namespace longspan {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// Rows of many sizes and magnitudes, some with an element that stands out.
std::vector<std::vector<float>> rows() {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> rows;
  for (const int n : {2, 10, 20, 32, 64, 80, 128, 256}) {
    for (const float magnitude : {1.0F, 1e-3F, 3e4F, 1e-37F, 1e37F}) {
      for (const float outlier : {1.0F, 30.0F}) {
        std::vector<float> row(static_cast<size_t>(n));
        for (float& x : row) x = normal(random) * magnitude / 30.0F;
        row[static_cast<size_t>(n) / 2] *= outlier;
        rows.push_back(row);
      }
    }
  }
  return rows;
}

/// What an e4m3 stands for, by its definition; codes 0x7f and 0xff are NaN.
double e4m3_value(int code) {
  const int exponent = code >> 3 & 15;
  const int fraction = code & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(1.0 + fraction / 8.0, exponent - 7);
  return code & 0x80 ? -magnitude : magnitude;
}

/// scale >= exact, and the bfloat16 below it is less.
void expect_rounded_up(uint16_t scale, double exact) {
  EXPECT_GE(bf16_to_float(scale), exact * (1 - 1e-7));
  EXPECT_LT(bf16_to_float(static_cast<uint16_t>(scale - 1)), exact);
}

double magnitude(const std::vector<float>& row) {
  double most = 0;
  for (const float x : row) most = std::max(most, std::abs(double{x}));
  return most;
}

TEST(KvQuantize, BfloatsAreTheNextAboveAndBelow) {
  for (const float x : {1.0F, 1.001F, 3.14159F, 1e-30F, 1e30F, 0.0F}) {
    EXPECT_GE(bf16_to_float(bf16_above(x)), x);
    EXPECT_LT(bf16_to_float(bf16_above(x)), x * 1.0079F + 1e-38F);
    for (const float y : {x, -x}) {
      EXPECT_LE(bf16_to_float(bf16_below(y)), y);
      EXPECT_GT(bf16_to_float(bf16_below(y)), y - x * 0.0079F - 1e-38F);
    }
  }
}

TEST(KvQuantize, IntegersAreWithinHalfAStep) {
  for (const auto& [element, most] : {std::pair{KvElement::kInt8, 127}, {KvElement::kInt6, 31}}) {
    for (const std::vector<float>& row : rows()) {
      std::vector<int8_t> codes(row.size());
      const uint16_t scale = quantize_integers(element, row.data(), std::ssize(row), codes.data());
      const double step = bf16_to_float(scale);
      if (magnitude(row) > 1e-35) expect_rounded_up(scale, magnitude(row) / most);
      for (size_t i = 0; i < row.size(); ++i) {
        ASSERT_LE(std::abs(codes[i]), most);
        EXPECT_LE(std::abs(codes[i] * step - row[i]), step * 0.50002);
      }
    }
  }
}

TEST(KvQuantize, EveryFloatBecomesTheNearestE4m3) {
  for (int code = 0; code < 256; ++code) {
    if ((code & 0x7f) == 0x7f) continue;
    const auto byte = static_cast<uint8_t>(code);
    EXPECT_EQ(from_e4m3(byte), e4m3_value(code)) << code;
    EXPECT_EQ(to_e4m3(from_e4m3(byte)), byte) << code;
    // Around the middle between it and the next larger: the even one of two that are as near.
    if ((code & 0x7f) == 0x7e) continue;
    const auto middle = static_cast<float>((e4m3_value(code) + e4m3_value(code + 1)) / 2);
    const auto next = static_cast<uint8_t>(code + 1);
    EXPECT_EQ(to_e4m3(middle), code % 2 == 0 ? byte : next) << code;
    EXPECT_EQ(to_e4m3(middle * 0.99999F), byte) << code;
    EXPECT_EQ(to_e4m3(middle * 1.00001F), next) << code;
  }
}

TEST(KvQuantize, Fp8NeverSaturates) {
  for (const std::vector<float>& row : rows()) {
    std::vector<uint8_t> codes(row.size());
    const uint16_t scale = quantize_fp8(row.data(), std::ssize(row), codes.data());
    const double step = bf16_to_float(scale);
    if (magnitude(row) > 1e-35) expect_rounded_up(scale, magnitude(row) / 448);
    for (size_t i = 0; i < row.size(); ++i) {
      ASSERT_NE(codes[i] & 0x7f, 0x7f);
      const double error = std::abs(e4m3_value(codes[i]) * step - row[i]);
      // Half of the last of 4 bits, or of the least subnormal.
      EXPECT_LE(error, std::max(std::abs(row[i]) * 0x1.00001p-4, step * 0x1.00001p-10));
    }
  }
}

TEST(KvQuantize, Int4IsWithinHalfAStepOfTheGroupsRange) {
  for (const std::vector<float>& row : rows()) {
    const int64_t n = std::min<int64_t>(std::ssize(row), kInt4Group);
    std::vector<uint8_t> codes(static_cast<size_t>(n));
    const Int4Parameters parameters = quantize_int4(row.data(), n, codes.data());
    const double zero = bf16_to_float(parameters.zero);
    const double step = bf16_to_float(parameters.scale);
    const auto [least, most] = std::minmax_element(row.begin(), row.begin() + n);
    EXPECT_LE(zero, *least);
    EXPECT_GE(zero, *least - std::abs(*least) * 0x1p-7 - 1e-38);
    if (*most - zero > 1e-35) expect_rounded_up(parameters.scale, (*most - zero) / 15);
    for (int64_t i = 0; i < n; ++i) {
      const auto at = static_cast<size_t>(i);
      ASSERT_LE(codes[at], 15);
      EXPECT_LE(std::abs(zero + codes[at] * step - row[at]), step * 0.50002);
    }
  }
}

TEST(KvQuantize, ZerosStayZerosAndWhatIsEqualStaysEqual) {
  const std::vector<float> zeros(32);
  std::vector<uint8_t> codes(32, 9);
  EXPECT_EQ(bf16_to_float(quantize_fp8(zeros.data(), 32, codes.data())), kLeastScale);
  EXPECT_EQ(codes, std::vector<uint8_t>(32, 0));
  std::vector<int8_t> signed_codes(32, 9);
  quantize_integers(KvElement::kInt6, zeros.data(), 32, signed_codes.data());
  EXPECT_EQ(signed_codes, std::vector<int8_t>(32, 0));
  for (const float x : {0.0F, 1.5F, -1.5F}) {
    const std::vector<float> equal(32, x);
    const Int4Parameters parameters = quantize_int4(equal.data(), 32, codes.data());
    EXPECT_EQ(codes, std::vector<uint8_t>(32, 0));
    EXPECT_EQ(bf16_to_float(parameters.zero), x);
  }
}

TEST(KvQuantize, WhatIsNotFiniteMakesTheRowANaN) {
  for (const float bad : {kInf, -kInf, kNaN}) {
    for (const size_t at : {0, 7, 31}) {
      std::vector<float> row(32, 1.0F);
      row[at] = bad;
      std::vector<uint8_t> codes(32, 9);
      EXPECT_TRUE(std::isnan(bf16_to_float(quantize_fp8(row.data(), 32, codes.data()))));
      EXPECT_EQ(codes, std::vector<uint8_t>(32, 0));
      std::vector<int8_t> signed_codes(32, 9);
      EXPECT_TRUE(std::isnan(
          bf16_to_float(quantize_integers(KvElement::kInt8, row.data(), 32, signed_codes.data()))));
      EXPECT_EQ(signed_codes, std::vector<int8_t>(32, 0));
      EXPECT_TRUE(std::isnan(bf16_to_float(quantize_int4(row.data(), 32, codes.data()).scale)));
      EXPECT_EQ(codes, std::vector<uint8_t>(32, 0));
    }
  }
}

TEST(KvQuantize, HadamardIsSylvestersMatrix) {
  for (const int n : {1, 2, 4, 16, 64, 128}) {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    std::vector<float> x(static_cast<size_t>(n));
    for (float& value : x) value = normal(random);
    std::vector<float> y = x;
    hadamard(y.data(), n);
    for (int i = 0; i < n; ++i) {
      double sum = 0;
      for (int j = 0; j < n; ++j) {
        const int sign = std::popcount(static_cast<unsigned>(i & j)) % 2 == 0 ? 1 : -1;
        sum += sign * double{x[static_cast<size_t>(j)]};
      }
      EXPECT_NEAR(y[static_cast<size_t>(i)], sum / std::sqrt(n), 1e-5);
    }
  }
}

TEST(KvQuantize, HeadsOfQuantisedKeysAreTurnedInRuns) {
  for (const int64_t head_dim : {2, 20, 80, 96, 128}) {
    const reference::Matrix x = reference::random_matrix(3, 2 * head_dim, 3.0, 4);
    for (const KvFormat format : {KvFormat::kInt8, KvFormat::kInt8Fp8, KvFormat::kInt8Int4,
                                  KvFormat::kInt4, KvFormat::kFp8, KvFormat::kNative}) {
      SCOPED_TRACE(testing::Message() << head_dim << ", " << name_of(format));
      const bool keeps = format == KvFormat::kNative;
      const reference::Matrix want = keeps ? x : reference::turned(x, head_dim, KvFormat::kInt4);
      const reference::Matrix got = reference::turned_as_cached(x, head_dim, format);
      for (size_t i = 0; i < want.values.size(); ++i) {
        ASSERT_NEAR(got.values[i], want.values[i], 1e-5) << i;
      }
    }
  }
}

}  // namespace
}  // namespace longspan
