#pragma once

#include "backend/cuda/attention_decode.h"
#include "backend/cuda/mma.cuh"

namespace longspan::cuda::decode {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kMaxStages = 16;
/// Keys that a warp takes at a time: the N of Q K^T and the K of P V.
constexpr int kSlice = 16;
constexpr int kSliceBytes = kSlice * 128;  // of one panel
/// Floats between the rows in which warps exchange a panel's columns: no bank conflicts.
constexpr int kExchangeStride = kPanelCols + 8;

/// Shared memory: stages first, [kWarps][stages][panels][kSlice rows of 128 bytes, swizzled].
template <int kPanels>
struct Fixed {
  uint8_t q[kPanels * kSliceBytes];  // [panels][kDecodePairs rows of 128 bytes, swizzled]
  float exchange[kWarps][kDecodePairs][kExchangeStride];
  float max[kWarps][kDecodePairs];
  float sum[kWarps][kDecodePairs];
  int finished;
  uint64_t landed[kWarps][kMaxStages];
};

/// Unit u of the step's work is span u / num_kv_heads for KV head u % num_kv_heads. Thread block b
/// takes units b, b + gridDim.x, ...; within a span, warp w takes slices w, w + kWarps, ...
struct Units {
  int count;
  int num_kv_heads;

  __device__ int span(int unit) const { return unit / num_kv_heads; }
  __device__ int kv_head(int unit) const { return unit % num_kv_heads; }
};

/// Brings a warp's slices to its ring of stages, in the order in which they are needed, K then V,
/// across the ends of spans: loads stay under way while a span's result is put together. Between
/// two products of a warp, so what a load needs to know is read one slice ahead.
template <int kPanels>
class SliceLoader {
 public:
  __device__ SliceLoader(const AttentionArgs& args, const DecodeWork& work, const Units& units,
                         int warp, int lane)
      : args_(args), work_(work), units_(units), warp_(warp), lane_(lane), unit_(blockIdx.x) {
    block_shift_ = 31 - __clz(args.kv.block_len);
    enter_span();
  }

  /// Whether the next copy is of tokens from before this step.
  __device__ bool next_is_old() const {
    return (value_ ? slice_end_ : key_ + kSlice) <= num_old_ || unit_ >= units_.count;
  }

  /// Starts the next copy, into a stage that nobody reads any more.
  __device__ void load(uint32_t stage, uint32_t landed) {
    if (unit_ >= units_.count) return;
    if (!value_) {
      const int in_block = key_ & (args_.kv.block_len - 1);
      from_ = head_ + block_ * args_.kv.block_bytes +
              in_block / kPanelTokens * (kPanels * kPanelBytes) + in_block % kPanelTokens * 128;
      slice_end_ = key_ + kSlice;
      key_ += kWarps * kSlice;
      if (key_ < end_) block_ = __ldg(table_ + (key_ >> block_shift_));
    }
    const char* from = value_ ? from_ + args_.kv.tile_bytes : from_;
#if __CUDA_ARCH__ >= 900
    if (lane_ == 0) {
      mbarrier_arrive_expect(landed, kPanels * kSliceBytes);
#pragma unroll
      for (int p = 0; p < kPanels; ++p) {
        bulk_copy_once(stage + p * kSliceBytes, from + p * kPanelBytes, kSliceBytes, landed);
      }
    }
#else
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
#pragma unroll
      for (int i = 0; i < kSliceBytes; i += 32 * 16) {
        cp_async(stage + p * kSliceBytes + i + lane_ * 16, from + p * kPanelBytes + i + lane_ * 16);
      }
    }
    cp_async_arrive(landed);
#endif
    value_ = !value_;
    if (!value_ && key_ >= end_) {
      unit_ += gridDim.x;
      enter_span();
    }
  }

 private:
  /// Goes to the first slice of this warp in the span of unit_ or a later one.
  __device__ void enter_span() {
    for (; unit_ < units_.count; unit_ += gridDim.x) {
      const DecodeSpan& span = work_.spans[units_.span(unit_)];
      key_ = span.first_key + warp_ * kSlice;
      end_ = span.first_key + span.num_keys;
      if (key_ >= end_) continue;
      const SeqView& seq = args_.plan.seqs[span.seq];
      num_old_ = seq.first_position;
      table_ = args_.plan.block_tables + seq.table;
      head_ = args_.kv.key_tile(0, args_.layer, units_.kv_head(unit_));
      block_ = __ldg(table_ + (key_ >> block_shift_));
      return;
    }
  }

  const AttentionArgs& args_;
  const DecodeWork& work_;
  const Units units_;
  const int warp_;
  const int lane_;
  int block_shift_;
  int unit_;
  int key_ = 0;  // first of the warp's next slice, and the end of the span
  int end_ = 0;
  int slice_end_ = 0;    // of the slice whose values come next
  int64_t num_old_ = 0;  // tokens of the sequence before this step's
  int64_t block_ = 0;    // where key_ lies
  const int32_t* table_ = nullptr;
  const char* head_ = nullptr;  // the K tile of the span's KV head in block 0
  const char* from_ = nullptr;
  bool value_ = false;
};

}  // namespace longspan::cuda::decode
