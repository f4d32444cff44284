#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "checkpoint/checkpoint.h"
#include "checkpoint/files.h"
#include "longspan/error.h"

namespace longspan {
namespace {

/// Whether a 16-bit pattern is a finite number, decoded by hand: e exponent bits above m others.
bool finite16(uint16_t bits, int e, int m) {
  const int exponent = (bits >> m) & ((1 << e) - 1);
  return exponent != (1 << e) - 1;
}

TEST(CheckFinite, EveryHalfPattern) {
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    const int exponent_bits = dtype == DType::kF16 ? 5 : 8;
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      std::vector<uint16_t> values(5, 0x7BFF & 0x7F7F);
      values[bits % 5] = static_cast<uint16_t>(bits);
      bool passed = true;
      try {
        check_finite({values.data(), dtype, 1, 5, 5, "w"});
      } catch (const CheckpointError&) {
        passed = false;
      }
      ASSERT_EQ(passed, finite16(static_cast<uint16_t>(bits), exponent_bits, 15 - exponent_bits))
          << name_of(dtype) << " " << bits;
    }
  }
}

TEST(CheckFinite, FloatsOfEveryKind) {
  using Limits = std::numeric_limits<float>;
  std::vector<float> values = {
      0.0F, -0.0F, Limits::max(), -Limits::max(), Limits::denorm_min(), Limits::min(), 1.0F};
  const WeightView view{values.data(), DType::kF32, 1, 7, 7, "w"};
  check_finite(view);
  for (const float bad : {Limits::infinity(), -Limits::infinity(), Limits::quiet_NaN(),
                          -Limits::quiet_NaN(), Limits::signaling_NaN()}) {
    for (size_t i = 0; i < values.size(); ++i) {
      const float kept = std::exchange(values[i], bad);
      test::expect_throw<CheckpointError>([&] { check_finite(view); },
                                          "[0, " + std::to_string(i) + "]");
      values[i] = kept;
    }
  }
}

TEST(CheckFinite, NamesTheTensorAndTheFirstBadElement) {
  constexpr int64_t kRows = 37;
  constexpr int64_t kCols = 501;
  std::vector<uint16_t> values(kRows * kCols, 0x3F80);
  const WeightView view{values.data(), DType::kBF16, kRows, kCols, kCols, "model.norm.weight"};
  std::mt19937 random(5);
  for (int i = 0; i < 200; ++i) {
    const int64_t first = random() % values.size();
    const int64_t second = first + random() % (values.size() - first);
    values[first] = values[second] = 0x7F80;
    test::expect_throw<CheckpointError>(
        [&] { check_finite(view); },
        "model.norm.weight: expected finite values, got NaN or infinity at [" +
            std::to_string(first / kCols) + ", " + std::to_string(first % kCols) + "]");
    values[first] = values[second] = 0x3F80;
  }
}

TEST(CheckFinite, LooksOnlyAtTheSlice) {
  std::vector<float> values(4 * 10, 1.0F);
  values[1 * 10 + 6] = std::nanf("");
  check_finite({values.data(), DType::kF32, 4, 6, 10, "left"});
  test::expect_throw<CheckpointError>(
      [&] { check_finite({values.data() + 5, DType::kF32, 4, 5, 10, "right"}); }, "[1, 1]");
}

}  // namespace
}  // namespace longspan
