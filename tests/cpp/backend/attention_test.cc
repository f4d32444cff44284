#include <gtest/gtest.h>

#include "backend/attention_harness.h"
#include "backend/kernel_case.h"

namespace longspan::cpu {
namespace {

constexpr double kTheta = 10000.0;

/// Largest error against the definition in float64 on the same rounded q, k, v. bfloat16: P and
/// the output are each rounded to 2^-9, and values are up to 3.
double tolerance(DType dtype) { return dtype == DType::kF32 ? 2e-5 : 2e-2; }

class Attention : public testing::TestWithParam<KernelCase> {};

INSTANTIATE_TEST_SUITE_P(Cpu, Attention, testing::ValuesIn(kernel_cases()), kernel_case_name);

void expect_near(const reference::Matrix& actual, int64_t first_row,
                 const reference::Matrix& expected, double allowed) {
  double worst = 0;
  for (int64_t r = 0; r < expected.rows; ++r) {
    for (int64_t c = 0; c < expected.cols; ++c) {
      const double difference = std::abs(actual.at(first_row + r, c) - expected.at(r, c));
      worst = difference <= worst ? worst : difference;  // a NaN is the worst
    }
  }
  EXPECT_LE(worst, allowed);
}

void expect_equal(const reference::Matrix& actual, int64_t actual_row,
                  const reference::Matrix& expected, int64_t expected_row, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < expected.cols; ++c) {
      ASSERT_EQ(actual.at(actual_row + r, c), expected.at(expected_row + r, c))
          << "row " << r << " column " << c;
    }
  }
}

/// Prefills a sequence in chunks; returns the output of all its tokens.
reference::Matrix prefill(AttentionHarness& harness, int64_t seq, int64_t length, int64_t chunk) {
  reference::Matrix all(length, harness.q_cols());
  for (int64_t first = 0; first < length; first += chunk) {
    const int64_t count = std::min(chunk, length - first);
    const reference::Matrix out = harness.step({{seq, first, count}});
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < out.cols; ++c) all.at(first + r, c) = out.at(r, c);
    }
  }
  return all;
}

TEST_P(Attention, EqualsTheDefinitionForManyShapes) {
  const AttentionShape shapes[] = {{1, 1, 8},   {4, 2, 20},  {3, 3, 48},  {9, 3, 64},
                                   {10, 2, 80}, {8, 1, 128}, {16, 1, 32}, {3, 1, 10}};
  int64_t block_len = 64;
  for (const AttentionShape& shape : shapes) {
    SCOPED_TRACE(testing::Message() << shape.num_heads << "/" << shape.num_kv_heads << " x "
                                    << shape.head_dim << ", blocks of " << block_len);
    AttentionHarness harness(GetParam().kernels(), GetParam().dtype, shape, block_len, 2, 100, 300);
    const int64_t seq = harness.add_sequence(150, kTheta, 1.0, 1);
    const reference::Matrix out = prefill(harness, seq, 150, 100);
    expect_near(out, 0, harness.expected(seq, 0, 150), tolerance(GetParam().dtype));
    block_len = block_len == 256 ? 64 : 2 * block_len;
  }
}

TEST_P(Attention, EqualsTheDefinitionAtEveryEdgeOfTilesStepsAndSpans) {
  for (const int64_t length : {1, 2, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 2048, 3000}) {
    SCOPED_TRACE(length);
    AttentionHarness harness(GetParam().kernels(), GetParam().dtype, {6, 2, 16}, 64, 2, 512, 3072);
    const int64_t seq = harness.add_sequence(length, kTheta, 1.0, 2);
    const reference::Matrix out = prefill(harness, seq, length, 512);
    const int64_t first = std::max<int64_t>(0, length - 70);
    expect_near(out, first, harness.expected(seq, first, length - first),
                tolerance(GetParam().dtype));
  }
}

TEST_P(Attention, MixesSequencesOfAnyLengthAndProfileInAStep) {
  AttentionHarness harness(GetParam().kernels(), GetParam().dtype, {9, 3, 64}, 128, 2, 256, 1500);
  const int64_t a = harness.add_sequence(1300, kTheta, 1.0, 3);
  const int64_t b = harness.add_sequence(200, 5e5, 1.2, 4);
  const int64_t c = harness.add_sequence(77, 100.0, 0.8, 5);
  for (int64_t first = 0; first < 1200; first += 240) harness.step({{a, first, 240}});
  harness.step({{b, 0, 100}, {a, 1200, 99}});
  const reference::Matrix out = harness.step({{a, 1299, 1}, {c, 0, 77}, {b, 100, 100}});
  expect_near(out, 0, harness.expected(a, 1299, 1), tolerance(GetParam().dtype));
  expect_near(out, 1, harness.expected(c, 0, 77), tolerance(GetParam().dtype));
  expect_near(out, 78, harness.expected(b, 100, 100), tolerance(GetParam().dtype));
}

TEST_P(Attention, TakesPartialRotationAnAttentionFactorAndLogNTogether) {
  AttentionHarness harness(GetParam().kernels(), GetParam().dtype, {6, 2, 48}, 64, 2, 128, 300);
  const int64_t a = harness.add_sequence(200, kTheta, 1.2, 8);
  const int64_t b = harness.add_sequence(150, kTheta, 0.9, 9);
  for (const int64_t seq : {a, b}) harness.profile(seq).inv_freq.resize(10);
  harness.profile(b).logn_length = 50;
  for (int64_t first = 0; first < 200; first += 100) harness.step({{a, first, 100}});
  harness.step({{b, 0, 100}});
  const reference::Matrix out = harness.step({{a, 199, 1}, {b, 100, 50}});
  expect_near(out, 0, harness.expected(a, 199, 1), tolerance(GetParam().dtype));
  expect_near(out, 1, harness.expected(b, 100, 50), tolerance(GetParam().dtype));
}

TEST_P(Attention, TakesScoresThatGrowWithoutBound) {
  AttentionHarness harness(GetParam().kernels(), GetParam().dtype, {2, 1, 64}, 64, 1, 512, 2048);
  const int64_t seq = harness.add_sequence(1500, 1e9, 4.0, 6);
  // Keys along the query grow with position, so that a reference fixed early is far too low. Of the
  // pair that turns least, by 3e-6 in all, one component is set, so that a float32 holds every q k.
  harness.edit(seq, [&](int64_t row, int64_t col, double value) {
    if (col >= 192) return value;
    if (col % 64 != 31) return 0.0;
    return col < 128 ? 64.0 : static_cast<double>(row % 1024) / 256;
  });
  const reference::Matrix out = prefill(harness, seq, 1500, 512);
  // Scores (base 2) reach 738, and a float32 from 512 to 1024 is off by up to 2^-15: a weight by ln
  // 2 times that, and an output by no more than that times the distance of two values, which is 6.
  const double allowed = tolerance(GetParam().dtype) + 6 * 0.6932 * 0x1p-15;
  expect_near(out, 900, harness.expected(seq, 900, 200), allowed);
  expect_near(out, 1400, harness.expected(seq, 1400, 100), allowed);
}

constexpr KvFormat kFormats[] = {KvFormat::kNative,  KvFormat::kInt8,     KvFormat::kFp8,
                                 KvFormat::kInt8Fp8, KvFormat::kInt8Int4, KvFormat::kInt4};

TEST_P(Attention, IsBitExactWhateverTheChunkBlockThreadsAndCompany) {
  const AttentionShape shape{6, 2, 40};
  constexpr int64_t kLength = 2300;
  struct Way {
    int64_t block_len, chunk;
    int threads;
  };
  for (const KvFormat format : kFormats) {
    AttentionHarness base(GetParam().kernels(), GetParam().dtype, shape, 64, 1, 512, kLength, 4,
                          format);
    const reference::Matrix whole =
        prefill(base, base.add_sequence(kLength, kTheta, 1.0, 7), kLength, 512);
    for (const Way& way : {Way{64, 512, 2}, {128, 100, 2}, {256, 37, 3}, {64, 480, 1}}) {
      SCOPED_TRACE(testing::Message()
                   << name_of(format) << ", blocks of " << way.block_len << ", chunks of "
                   << way.chunk << ", " << way.threads << " threads");
      AttentionHarness harness(GetParam().kernels(), GetParam().dtype, shape, way.block_len,
                               way.threads, 700, 2560, 4, format);
      const int64_t seq = harness.add_sequence(kLength, kTheta, 1.0, 7);
      const int64_t other = harness.add_sequence(kLength, kTheta, 1.0, 8);
      for (int64_t first = 0; first < kLength; first += way.chunk) {
        const int64_t count = std::min(way.chunk, kLength - first);
        const int64_t company = std::min<int64_t>(count, 100);
        const reference::Matrix out = harness.step({{other, first, company}, {seq, first, count}});
        expect_equal(out, company, whole, first, count);
        if (company < count) harness.step({{other, first + company, count - company}});
      }
    }
  }
}

TEST_P(Attention, DecodesBitForBitWhatPrefillComputes) {
  const AttentionShape shape{9, 3, 64};
  constexpr int64_t kLength = 2130;
  for (const KvFormat format : kFormats) {
    SCOPED_TRACE(name_of(format));
    AttentionHarness base(GetParam().kernels(), GetParam().dtype, shape, 64, 1, 512, kLength, 4,
                          format);
    const reference::Matrix whole =
        prefill(base, base.add_sequence(kLength, kTheta, 1.0, 9), kLength, 512);
    AttentionHarness harness(GetParam().kernels(), GetParam().dtype, shape, 64, 2, 512, kLength, 4,
                             format);
    harness.poison();
    const int64_t seq = harness.add_sequence(kLength, kTheta, 1.0, 9);
    for (int64_t begin : {0, 1000, 2030}) {
      for (int64_t first = begin == 0      ? 0
                           : begin == 1000 ? 80
                                           : 1080;
           first < begin; first += 475) {
        harness.step({{seq, first, std::min<int64_t>(475, begin - first)}});
      }
      for (int64_t t = begin; t < begin + 80; ++t) {
        expect_equal(harness.step({{seq, t, 1}}), 0, whole, t, 1);
      }
    }
  }
}

TEST_P(Attention, IgnoresNaNsOfEarlierRequestsInItsBlocks) {
  AttentionHarness harness(GetParam().kernels(), GetParam().dtype, {4, 2, 20}, 128, 2, 200, 256);
  harness.poison();
  const int64_t seq = harness.add_sequence(200, kTheta, 1.0, 10);
  const reference::Matrix out = prefill(harness, seq, 200, 33);
  expect_near(out, 0, harness.expected(seq, 0, 200), tolerance(GetParam().dtype));
}

}  // namespace
}  // namespace longspan::cpu
