#include "core/float16.h"

#include <gtest/gtest.h>

#include <cmath>

namespace longspan {
namespace {

TEST(Float16, EveryPatternIsWhatIeee754SaysOfIt) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = half_to_float(static_cast<uint16_t>(bits));
    const int exponent = static_cast<int>(bits >> 10 & 31U);
    const int fraction = static_cast<int>(bits & 1023U);
    ASSERT_EQ(std::signbit(value), bits >> 15 == 1) << bits;
    if (exponent == 31) {
      ASSERT_TRUE(fraction == 0 ? std::isinf(value) : std::isnan(value)) << bits;
      continue;
    }
    const double expected =
        exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    ASSERT_EQ(std::abs(static_cast<double>(value)), expected) << bits;
  }
}

}  // namespace
}  // namespace longspan
