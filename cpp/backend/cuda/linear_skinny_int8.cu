#include "backend/cuda/linear_skinny.cuh"
#include "backend/cuda/linear_skinny_int8.h"

namespace longspan::cuda {
namespace {

/// Turned bytes, added up as integers. What a slice holds beyond K is whatever was there, times
/// zeros.
struct Int8 {
  struct Operands {
    Int8Matrix x;
    Int8Matrix weight;
  };
  using Sum = int32_t;
  static constexpr int kParts = kRowBytes / kInt8Slice;  // slices of an Int8Matrix
  static constexpr int kPartBytes = kTileN * kInt8Slice;
  static constexpr int kStageBytes = kParts * kPartBytes;  // [kParts][kTileN][kInt8Slice]

  __device__ static int parts(const Operands& in) {
    return static_cast<int>(in.x.cols / kInt8Slice);
  }
  __device__ static int slices(const Operands& in) { return (parts(in) + kParts - 1) / kParts; }

  /// A tile's rows follow each other in the matrix, those of a gate and those of its up.
  template <class Kind, class WeightRow>
  __device__ static void load_weights(const Operands& in, int slice, int cols,
                                      const WeightRow& weight_row, uint32_t to, uint32_t landed,
                                      int lane) {
    constexpr int kRuns = kTileN / Kind::kCols;
    const int parts_there = min(kParts, parts(in) - slice * kParts);
    const int bytes = cols * static_cast<int>(kInt8Slice);
    if (lane == 0) mbarrier_arrive_expect(landed, parts_there * kRuns * bytes);
    __syncwarp();
    const int part = lane / kRuns;
    const int first = lane % kRuns * Kind::kCols;
    if (part < parts_there) {
      const int64_t row = int64_t{slice * kParts + part} * in.weight.rows + weight_row(first);
      bulk_copy_once(to + part * kPartBytes + first * kInt8Slice,
                     in.weight.codes + row * kInt8Slice, bytes, landed);
    }
  }

  /// A lane takes chunks 2 quad and 2 quad + 1 of the eight of a part: lanes that read rows next to
  /// each other then find theirs in different banks.
  __device__ static int chunk_of(int chunk, int quad) { return 2 * quad + chunk % 2; }

  __device__ static uint4 load_x(const Operands& in, int row, int slice, int chunk, int quad) {
    const int part = slice * kParts + chunk / 2;
    if (part >= parts(in)) return {};
    const int8_t* from = in.x.codes + (int64_t{part} * in.x.rows + row) * kInt8Slice;
    return *reinterpret_cast<const uint4*>(from + (chunk_of(chunk, quad) ^ row % 8) * 16);
  }

  class Reader {
   public:
    __device__ Reader(int top_row, int bottom_row, int group, int quad)
        : group_(group), quad_(quad), top_(top_row % 8), bottom_(bottom_row % 8) {}
    __device__ void read(const Operands&, uint32_t weights, int, int chunk, uint4& top,
                         uint4& bottom) const {
      const uint32_t row = weights + chunk / 2 * kPartBytes + group_ * kInt8Slice;
      const int at = chunk_of(chunk, quad_);
      top = load_shared(row + (at ^ top_) * 16);
      bottom = load_shared(row + 8 * kInt8Slice + (at ^ bottom_) * 16);
    }

   private:
    const int group_;
    const int quad_;
    const int top_;  // what the rows' chunks are swizzled by
    const int bottom_;
  };

  template <class AddSums>
  __device__ static float value(const Operands& in, int row, int weight_row, float bias,
                                const AddSums& add_sums) {
    return static_cast<float>(add_sums(0)) * (in.x.scales[row] * in.weight.scales[weight_row]) +
           bias;
  }
};

}  // namespace

void linear_skinny_int8(const Int8Matrix& x, const Int8Matrix& weight, const float* bias,
                        const MatrixView& y, cudaStream_t stream) {
  launch_skinny<Plain<__nv_bfloat16>, Int8>({x, weight}, bias, y, stream);
}

void linear_silu_mul_skinny_int8(const Int8Matrix& x, const Int8Matrix& weight, const float* bias,
                                 const MatrixView& y, cudaStream_t stream) {
  launch_skinny<Gated, Int8>({x, weight}, bias, y, stream);
}

}  // namespace longspan::cuda
