#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/registry.h"
#include "longspan/error.h"
#include "reference/reference.h"

// What the tests of the backend's ops share: they know a device by the interface alone.

namespace longspan {

/// A backend to be tested; see make_backend.
struct Device {
  const char* name;
  const char* dtype;
};
inline void PrintTo(const Device& device, std::ostream* out) {
  *out << device.name << " " << device.dtype;
}

/// A relative error of half a unit in the last place of a bfloat16, which has 8 bits.
inline double rounding_of(DType dtype) { return dtype == DType::kBF16 ? 0x1p-8 : 0x1p-24; }

/// Values as a dtype holds them.
inline reference::Matrix rounded(const reference::Matrix& values, DType dtype) {
  std::vector<float> data(values.values.size());
  const MatrixView view{data.data(), dtype, values.rows, values.cols, values.cols};
  reference::write(values, view);
  return reference::read(view);
}

/// A matrix in a device's memory. Its rows lie some way apart; the gap holds what an op may read
/// but must not change.
class DeviceMatrix {
 public:
  DeviceMatrix(Backend& backend, DType dtype, int64_t rows, int64_t cols)
      : DeviceMatrix(backend, dtype, filled(rows, cols)) {}
  DeviceMatrix(Backend& backend, DType dtype, const reference::Matrix& values)
      : backend_(backend),
        view_{nullptr, dtype, values.rows, values.cols, (values.cols + 31) / 32 * 32 + 32},
        buffer_(backend.allocate(values.rows * view_.stride * size_of(dtype))) {
    view_.data = buffer_.data();
    std::vector<float> host(static_cast<size_t>(view_.rows * view_.stride), kGap);
    reference::write(values, {host.data(), DType::kF32, view_.rows, view_.cols, view_.stride});
    backend_.upload(host.data(), whole());
  }

  const MatrixView& view() const { return view_; }

  /// The values. Expects the gaps to be as they were.
  reference::Matrix read() const {
    reference::Matrix all(view_.rows, view_.stride);
    std::vector<float> host(all.values.size());
    backend_.download(whole(), host.data());
    std::copy(host.begin(), host.end(), all.values.begin());
    reference::Matrix values(view_.rows, view_.cols);
    for (int64_t r = 0; r < view_.rows; ++r) {
      for (int64_t c = 0; c < view_.cols; ++c) values.at(r, c) = all.at(r, c);
      const auto gap = all.row(r).subspan(static_cast<size_t>(view_.cols));
      EXPECT_EQ(std::count(gap.begin(), gap.end(), kGap), static_cast<int64_t>(gap.size()))
          << "row " << r << " was written to beyond its end";
    }
    return values;
  }

 private:
  static constexpr float kGap = 3.0f;

  static reference::Matrix filled(int64_t rows, int64_t cols) {
    reference::Matrix values(rows, cols);
    std::fill(values.values.begin(), values.values.end(), -777.0);
    return values;
  }
  MatrixView whole() const {
    return {view_.data, view_.dtype, view_.rows, view_.stride, view_.stride};
  }

  Backend& backend_;
  MatrixView view_;
  Buffer buffer_;
};

/// Weights of a checkpoint in host memory.
class HostWeight {
 public:
  HostWeight(const reference::Matrix& values, DType dtype)
      : data_(values.values.size()),
        view_{data_.data(), dtype, values.rows, values.cols, values.cols, "weight"} {
    reference::write(values, {data_.data(), dtype, values.rows, values.cols, values.cols});
  }
  const WeightView& view() const { return view_; }

 private:
  std::vector<float> data_;
  WeightView view_;
};

/// Expects |actual - expected| <= relative |expected| + absolute everywhere.
inline void expect_close(const reference::Matrix& actual, const reference::Matrix& expected,
                         double relative, double absolute) {
  ASSERT_EQ(actual.rows, expected.rows);
  ASSERT_EQ(actual.cols, expected.cols);
  for (int64_t r = 0; r < expected.rows; ++r) {
    for (int64_t c = 0; c < expected.cols; ++c) {
      const double want = expected.at(r, c);
      ASSERT_LE(std::abs(actual.at(r, c) - want), relative * std::abs(want) + absolute)
          << "at " << r << ", " << c << ": " << actual.at(r, c) << ", expected " << want;
    }
  }
}

/// A test of an op on every device; skipped, with the reason, where the device is not there.
class Ops : public testing::TestWithParam<Device> {
 protected:
  void SetUp() override {
#ifdef BUILT_CUDA_LIBRARY  // not beside this program, where the loader would look for it
    setenv("LONGSPAN_CUDA_LIBRARY", BUILT_CUDA_LIBRARY, 0);
#endif
    try {
      backend_ = make_backend(GetParam().name, GetParam().dtype, 2);
    } catch (const BackendUnavailable& error) {
      GTEST_SKIP() << error.what();
    }
  }

  Backend& backend() const { return *backend_; }
  DType act() const { return backend().activation_dtype(); }
  DType out() const { return backend().output_dtype(); }
  DType acc() const { return backend().accumulator_dtype(); }

  DeviceMatrix matrix(DType dtype, const reference::Matrix& values) const {
    return {backend(), dtype, values};
  }
  DeviceMatrix matrix(DType dtype, int64_t rows, int64_t cols) const {
    return {backend(), dtype, rows, cols};
  }
  /// Packs [N, K] as a checkpoint in bfloat16 holds it.
  std::unique_ptr<PackedLinear> pack(const reference::Matrix& weight,
                                     LinearDType dtype = LinearDType::kNative) const {
    const HostWeight host(weight, DType::kBF16);
    return backend().pack_linear({&host.view(), 1}, {}, dtype);
  }
  Buffer pack_vector(const reference::Matrix& vector) const {
    return backend().pack_vector(HostWeight(vector, DType::kF32).view());
  }

  /// Gate and up of random rows, and what SiLU makes of them, in one op; expects both ops apart to
  /// make the same to the bit.
  struct SiluMul {
    DeviceMatrix gate_up;
    DeviceMatrix result;
  };
  SiluMul silu_mul_at_once(const PackedLinear& packed, int64_t rows) const {
    const DeviceMatrix x =
        matrix(act(), reference::random_matrix(rows, packed.in_features(), 2.0, 3));
    SiluMul at_once{matrix(out(), rows, packed.out_features()),
                    matrix(act(), rows, packed.out_features() / 2)};
    const DeviceMatrix apart = matrix(act(), rows, packed.out_features() / 2);
    backend().linear_silu_mul(x.view(), packed, at_once.gate_up.view(), at_once.result.view());
    backend().linear(x.view(), packed, at_once.gate_up.view());
    backend().silu_mul(at_once.gate_up.view(), apart.view());
    EXPECT_EQ(at_once.result.read().values, apart.read().values);
    return at_once;
  }

 private:
  std::unique_ptr<Backend> backend_;
};

// Instantiates tests of the fixture Ops, or one derived from it, for every device.
#define LONGSPAN_TEST_DEVICES(fixture)                                                          \
  INSTANTIATE_TEST_SUITE_P(Devices, fixture,                                                    \
                           testing::Values(Device{"cpu", "float32"}, Device{"cpu", "bfloat16"}, \
                                           Device{"cuda", "bfloat16"}),                         \
                           [](const testing::TestParamInfo<Device>& info) {                     \
                             return std::string(info.param.name) + "_" + info.param.dtype;      \
                           })

}  // namespace longspan
