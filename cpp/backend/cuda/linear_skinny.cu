#include "backend/cuda/linear_skinny.cuh"
#include "backend/cuda/linear_skinny.h"

namespace longspan::cuda {
namespace {

/// bfloat16, added up in float32. Elements 0 to 3 of a lane's eight stand for its columns 2t, 2t+1,
/// 2t+8, 2t+9 of the first m16n8k16, 4 to 7 of the second.
struct Bf16 {
  struct Operands {
    const __nv_bfloat16* x;
    const __nv_bfloat16* weight;
    int64_t x_stride;
    int64_t weight_stride;
    int32_t k;  // a multiple of 8
  };
  using Sum = float;
  static constexpr int kSlice = kRowBytes / 2;
  static constexpr int kChunk = kChunkBytes / 2;
  /// Two rows of weights in a stage. The second begins 64 bytes late, so that the eight lanes whose
  /// 16 bytes are read at once find them in different banks.
  static constexpr int kPairBytes = 2 * kRowBytes + 64;
  static constexpr int kStageBytes = kTileN / 2 * kPairBytes;

  __device__ static int slices(const Operands& in) { return (in.k + kSlice - 1) / kSlice; }

  /// Bytes from the beginning of a stage to row r of its weights.
  __device__ static uint32_t row_offset(int r) {
    return r / 2 * kPairBytes + r % 2 * (kRowBytes + 64);
  }

  template <class Kind, class WeightRow>
  __device__ static void load_weights(const Operands& in, int slice, int cols,
                                      const WeightRow& weight_row, uint32_t to, uint32_t landed,
                                      int lane) {
    const int bytes = min(kSlice, in.k - slice * kSlice) * 2;
    const __nv_bfloat16* from = in.weight + slice * kSlice;
    const auto row_at = [&](int r) { return from + weight_row(r) * in.weight_stride; };
#if __CUDA_ARCH__ >= 900
    if (lane == 0) mbarrier_arrive_expect(landed, kTileN / Kind::kCols * cols * bytes);
    __syncwarp();
    if (lane < kTileN && lane % Kind::kCols < cols) {
      bulk_copy_once(to + row_offset(lane), row_at(lane), bytes, landed);
    }
#else
    constexpr int kRowChunks = kRowBytes / 16;
    for (int i = lane; i < kTileN * kRowChunks; i += 32) {
      const int row = i / kRowChunks;
      const int chunk = i % kRowChunks;
      if (row % Kind::kCols >= cols || chunk * 16 >= bytes) continue;
      cp_async(to + row_offset(row) + chunk * 16, row_at(row) + chunk * 8);
    }
    cp_async_arrive(landed);
#endif
  }

  __device__ static uint4 load_x(const Operands& in, int row, int slice, int chunk, int quad) {
    const int first = slice * kSlice + chunk * kChunk + quad * 8;
    if (first >= in.k) return {};
    return *reinterpret_cast<const uint4*>(in.x + row * in.x_stride + first);
  }

  class Reader {
   public:
    __device__ Reader(int, int, int group, int quad) : group_(group), quad_(quad) {}
    __device__ void read(const Operands& in, uint32_t weights, int slice, int chunk, uint4& top,
                         uint4& bottom) const {
      const uint32_t column = chunk * kChunkBytes + quad_ * 16;
      top = load_shared(weights + row_offset(group_) + column);
      bottom = load_shared(weights + row_offset(group_ + 8) + column);
      // Beyond K a stage holds what was there before, of which not even 0 times it need be 0.
      if (slice * kSlice + chunk * kChunk + quad_ * 8 >= in.k) top = bottom = uint4{};
    }

   private:
    const int group_;
    const int quad_;
  };

  template <class AddSums>
  __device__ static float value(const Operands&, int, int, float bias, const AddSums& add_sums) {
    return add_sums(bias);
  }
};

Bf16::Operands operands(const MatrixView& x, const void* weight, int64_t weight_stride) {
  return {x.row<const __nv_bfloat16>(0), static_cast<const __nv_bfloat16*>(weight), x.stride,
          weight_stride, static_cast<int32_t>(x.cols)};
}

}  // namespace

void linear_skinny(const MatrixView& x, const void* weight, int64_t weight_stride,
                   const float* bias, const MatrixView& y, cudaStream_t stream) {
  const auto run = y.dtype == DType::kF32 ? launch_skinny<Plain<float>, Bf16>
                                          : launch_skinny<Plain<__nv_bfloat16>, Bf16>;
  run(operands(x, weight, weight_stride), bias, y, stream);
}

void linear_silu_mul_skinny(const MatrixView& x, const void* weight, int64_t weight_stride,
                            const float* bias, const MatrixView& y, cudaStream_t stream) {
  launch_skinny<Gated, Bf16>(operands(x, weight, weight_stride), bias, y, stream);
}

}  // namespace longspan::cuda
