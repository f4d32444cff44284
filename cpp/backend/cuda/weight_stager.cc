#include "backend/cuda/weight_stager.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "backend/cuda/cuda_check.h"
#include "backend/cuda/device_memory.h"
#include "core/float16.h"

namespace longspan::cuda {
namespace {

constexpr size_t kMaxLanes = 16;
constexpr int64_t kHalfBytes = 4 << 20;

uint16_t bf16_bits(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);  // ties to even
}

/// Writes load(i), i < count, as a dtype.
template <class Load>
void convert_row(int64_t count, DType dtype, char* to, const Load& load) {
  if (dtype == DType::kF32) {
    auto* values = reinterpret_cast<float*>(to);
    for (int64_t i = 0; i < count; ++i) values[i] = load(i);
  } else {
    auto* values = reinterpret_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) values[i] = bf16_bits(load(i));
  }
}

void stage_row(const WeightView& in, int64_t row, DType dtype, char* to) {
  const void* from = in.row(row);
  const auto* halves = static_cast<const uint16_t*>(from);
  if (in.dtype == dtype) {
    std::memcpy(to, from, static_cast<size_t>(in.cols * size_of(in.dtype)));
  } else if (in.dtype == DType::kF32) {
    convert_row(in.cols, dtype, to, [&](int64_t i) { return static_cast<const float*>(from)[i]; });
  } else if (in.dtype == DType::kF16) {
    convert_row(in.cols, dtype, to, [&](int64_t i) { return half_to_float(halves[i]); });
  } else {
    convert_row(in.cols, dtype, to,
                [&](int64_t i) { return std::bit_cast<float>(uint32_t{halves[i]} << 16); });
  }
}

}  // namespace

/// Two halves of page-locked memory and a stream.
struct WeightStager::Lane {
  Lane() : memory(allocate_pinned(2 * kHalfBytes)) {
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
    for (cudaEvent_t& event : copied) {
      check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
    }
  }
  ~Lane() {
    for (const cudaEvent_t event : copied) {
      if (event != nullptr) cudaEventDestroy(event);
    }
    if (stream != nullptr) cudaStreamDestroy(stream);
  }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  Buffer memory;
  cudaStream_t stream = nullptr;
  cudaEvent_t copied[2] = {};
};

WeightStager::WeightStager(int device) : device_(device) {}
WeightStager::~WeightStager() = default;

WeightStager::Lane* WeightStager::acquire() {
  std::unique_lock lock(mutex_);
  if (free_.empty() && lanes_.size() < kMaxLanes) {
    lanes_.push_back(std::make_unique<Lane>());
    return lanes_.back().get();
  }
  freed_.wait(lock, [this] { return !free_.empty(); });
  Lane* lane = free_.back();
  free_.pop_back();
  return lane;
}

void WeightStager::release(Lane* lane) {
  {
    const std::lock_guard lock(mutex_);
    free_.push_back(lane);
  }
  freed_.notify_one();
}

void WeightStager::copy(const WeightView& in, const MatrixView& out) {
  check_cuda(cudaSetDevice(device_), "choosing the device");
  const int64_t row_bytes = in.cols * size_of(out.dtype);
  // A row longer than a half, as a vector may be, goes in pieces.
  if (row_bytes > kHalfBytes) {
    const int64_t cols = kHalfBytes / size_of(out.dtype);
    for (int64_t begin = 0; begin < in.cols; begin += cols) {
      WeightView part = in;
      part.data = static_cast<const char*>(in.data) + begin * size_of(in.dtype);
      part.cols = std::min(cols, in.cols - begin);
      copy(part, {out.row<char>(0) + begin * size_of(out.dtype), out.dtype, in.rows, part.cols,
                  out.stride});
    }
    return;
  }
  const auto width = static_cast<size_t>(row_bytes);
  stage(in, out.dtype, [&](void* host, int64_t begin, int64_t rows, cudaStream_t stream) {
    check_cuda(cudaMemcpy2DAsync(out.rows_from(begin, rows).data,
                                 static_cast<size_t>(out.stride * size_of(out.dtype)), host, width,
                                 width, static_cast<size_t>(rows), cudaMemcpyHostToDevice, stream),
               "copying weights");
  });
}

void WeightStager::quantize(const WeightView& in, const Int8Matrix& out, int64_t first_row) {
  check_cuda(cudaSetDevice(device_), "choosing the device");
  stage(in, DType::kBF16, [&](void* host, int64_t begin, int64_t rows, cudaStream_t stream) {
    quantize_rows({host, DType::kBF16, rows, in.cols, in.cols}, out, first_row + begin, stream);
    check_cuda(cudaGetLastError(), "quantising weights");
  });
}

template <class Send>
void WeightStager::stage(const WeightView& in, DType dtype, const Send& send) {
  const int64_t row_bytes = in.cols * size_of(dtype);
  Lane* lane = acquire();
  try {
    const int64_t most = std::max<int64_t>(1, kHalfBytes / row_bytes);
    int half = 0;
    for (int64_t begin = 0; begin < in.rows; begin += most, half ^= 1) {
      const int64_t rows = std::min(most, in.rows - begin);
      char* host = lane->memory.as<char>() + half * kHalfBytes;
      check_cuda(cudaEventSynchronize(lane->copied[half]), "waiting for a copy");
      for (int64_t r = 0; r < rows; ++r) stage_row(in, begin + r, dtype, host + r * row_bytes);
      send(host, begin, rows, lane->stream);
      check_cuda(cudaEventRecord(lane->copied[half], lane->stream), "recording an event");
    }
    check_cuda(cudaStreamSynchronize(lane->stream), "copying weights");
  } catch (...) {
    release(lane);
    throw;
  }
  release(lane);
}

}  // namespace longspan::cuda
