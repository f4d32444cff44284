#pragma once

#include <algorithm>

#include "backend/cuda/attention_decode.h"
#include "backend/cuda/kv_element.cuh"
#include "backend/cuda/mma.cuh"

namespace longspan::cuda::decode {

constexpr int kMaxStages = 16;
/// Thread blocks that share a multiprocessor where it has room: they hide the ends of each other's
/// spans.
constexpr int kBlocks = 2;
/// Bytes of a row of queries, of which a panel holds kDecodePairs.
constexpr int kQueryPanel = kDecodePairs * 128;
/// Floats between the rows in which warps exchange 64 columns: no bank conflicts.
constexpr int kExchangeCols = 64;
constexpr int kExchangeStride = kExchangeCols + 4;

/// A slice of keys or of values, what a warp takes at a time, as it lies in a stage:
/// [kPanels][kKeys rows of kRowBytes, swizzled as in the pool], then [kKeys] high bits and [kKeys]
/// scales.
template <KvElement element, int row_dim, int keys>
struct Slice {
  static constexpr int kKeys = keys;
  static constexpr KvElement kElement = element;
  static constexpr bool kNative = element == KvElement::kNative;
  /// Whether keys are multiplied as integers.
  static constexpr bool kIntegers = element == KvElement::kInt8 || element == KvElement::kInt6;
  static constexpr int kTokenBytes = row_dim * bits_of(element) / 8;
  static constexpr int kRowBytes = kTokenBytes < 128 ? kTokenBytes : 128;
  static constexpr int kPanels = kTokenBytes / kRowBytes;
  static constexpr int kPanelBytes = kKeys * kRowBytes;  // of the slice's rows of a panel
  static constexpr int kScaleBytes = kv_scale_bytes(element, row_dim);
  static constexpr int kHighBytes = kv_high_bytes(element, row_dim);
  static constexpr int kHigh = kPanels * kPanelBytes;
  static constexpr int kScales = kHigh + kKeys * kHighBytes;
  static constexpr int kBytes = kScales + kKeys * kScaleBytes;
  static constexpr int kStageBytes = (kBytes + 127) / 128 * 128;

  /// Offset of the 16-byte chunk `chunk` of a row.
  __device__ static uint32_t at(uint32_t row, uint32_t chunk) {
    constexpr uint32_t kChunks = kRowBytes / 16;
    const uint32_t within = (chunk % kChunks) ^ (row * kRowBytes / 128 % kChunks);
    return chunk / kChunks * kPanelBytes + row * kRowBytes + within * 16;
  }
};

/// What a kernel is compiled for: the elements of keys and of values, and KvLayout::row_dim.
template <KvElement key, KvElement value, int row_dim>
struct Cache {
  /// As many as registers allow: a warp waits most of its time, and others fill it.
  static constexpr int kWarps = row_dim <= 128 ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  /// Of a slice: for what is done once per slice as many as shared memory allows, 4 KiB in bytes.
  static constexpr int kKeys = std::max(16, 4096 / (row_dim * (key == KvElement::kNative ? 2 : 1)));
  using Key = Slice<key, row_dim, kKeys>;
  using Value = Slice<value, row_dim, kKeys>;
  static constexpr int kRowDim = row_dim;
  static constexpr int kQueryPanels = row_dim / 64;
  /// Of a stage for keys and the one for values that follows it.
  static constexpr int kTwoStages = Key::kStageBytes + Value::kStageBytes;
  /// Offset of a stage, of which the even ones are for keys.
  __device__ static uint32_t stage(int index) {
    return index / 2 * kTwoStages + index % 2 * Key::kStageBytes;
  }
};

/// Shared memory: stages first, [C::kWarps][stages / 2]{keys, values}.
template <class C>
struct Fixed {
  uint8_t q[C::kQueryPanels * kQueryPanel];  // [panels][kDecodePairs rows of 128 bytes, swizzled]
  float q_scale[kDecodePairs];               // where keys are integers, of what is in q
  float exchange[C::kWarps][kDecodePairs][kExchangeStride];
  float max[C::kWarps][kDecodePairs];
  float sum[C::kWarps][kDecodePairs];
  uint64_t landed[C::kWarps][kMaxStages];
};

/// Unit u of the step's work is span u / num_kv_heads for KV head u % num_kv_heads. Thread block b
/// takes units b, b + gridDim.x, ...; within a span, warp w takes slices w, w + C::kWarps, ...
struct Units {
  int count;
  int num_kv_heads;

  __device__ int span(int unit) const { return unit / num_kv_heads; }
  __device__ int kv_head(int unit) const { return unit % num_kv_heads; }
};

/// Brings a warp's slices to its ring of stages, in the order in which they are needed, K then V,
/// across the ends of spans: loads stay under way while a span's result is put together. Between
/// two products of a warp, so what a load needs to know is read one slice ahead.
template <class C>
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
    return (value_ ? slice_end_ : key_ + C::kKeys) <= num_old_ || unit_ >= units_.count;
  }

  /// Starts the next copy, into a stage that nobody reads any more.
  __device__ void load(uint32_t stage, uint32_t landed) {
    if (unit_ >= units_.count) return;
    if (value_) {
      copy<typename C::Value>(args_.kv.value, stage, landed);
    } else {
      in_block_ = key_ & (args_.kv.block_len - 1);
      from_ = head_ + block_ * args_.kv.block_bytes;
      slice_end_ = key_ + C::kKeys;
      key_ += C::kWarps * C::kKeys;
      if (key_ < end_) block_ = __ldg(table_ + (key_ >> block_shift_));
      copy<typename C::Key>(args_.kv.key, stage, landed);
    }
    value_ = !value_;
    if (!value_ && key_ >= end_) {
      unit_ += gridDim.x;
      enter_span();
    }
  }

 private:
  /// The slice at in_block_ of the head's keys or values at from_.
  template <class S>
  __device__ void copy(const KvTile& tile, uint32_t stage, uint32_t landed) const {
    const int row = in_block_ % kPanelTokens;
    const char* rows = from_ + tile.offset +
                       in_block_ / kPanelTokens * (S::kPanels * kPanelTokens * S::kRowBytes) +
                       row * S::kRowBytes;
    const char* high = from_ + tile.high + in_block_ * S::kHighBytes;
    const char* scales = from_ + tile.scales + in_block_ * S::kScaleBytes;
#if __CUDA_ARCH__ >= 900
    if (lane_ == 0) {
      mbarrier_arrive_expect(landed, S::kBytes);
#pragma unroll
      for (int p = 0; p < S::kPanels; ++p) {
        bulk_copy_once(stage + p * S::kPanelBytes, rows + p * (kPanelTokens * S::kRowBytes),
                       S::kPanelBytes, landed);
      }
      if constexpr (S::kHighBytes > 0) {
        bulk_copy_once(stage + S::kHigh, high, S::kKeys * S::kHighBytes, landed);
      }
      if constexpr (S::kScaleBytes > 0) {
        bulk_copy_once(stage + S::kScales, scales, S::kKeys * S::kScaleBytes, landed);
      }
    }
#else
#pragma unroll
    for (int i = 0; i < S::kHigh; i += 32 * 16) {
      const int byte = i + lane_ * 16;
      cp_async(stage + byte, rows + byte / S::kPanelBytes * (kPanelTokens * S::kRowBytes) +
                                 byte % S::kPanelBytes);
    }
    for (int byte = lane_ * 16; byte < S::kKeys * S::kHighBytes; byte += 32 * 16) {
      cp_async(stage + S::kHigh + byte, high + byte);
    }
    for (int byte = lane_ * 16; byte < S::kKeys * S::kScaleBytes; byte += 32 * 16) {
      cp_async(stage + S::kScales + byte, scales + byte);
    }
    cp_async_arrive(landed);
#endif
  }

  /// Goes to the first slice of this warp in the span of unit_ or a later one.
  __device__ void enter_span() {
    for (; unit_ < units_.count; unit_ += gridDim.x) {
      const DecodeSpan& span = work_.spans[units_.span(unit_)];
      key_ = span.first_key + warp_ * C::kKeys;
      end_ = span.first_key + span.num_keys;
      if (key_ >= end_) continue;
      const SeqView& seq = args_.plan.seqs[span.seq];
      num_old_ = args_.plan.context.keys(static_cast<int>(seq.first_position));
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
  int slice_end_ = 0;  // of the slice whose values come next
  int num_old_ = 0;    // keys of the sequence before this step's
  int64_t block_ = 0;  // where key_ lies
  const int32_t* table_ = nullptr;
  const char* head_ = nullptr;  // the span's KV head in block 0
  const char* from_ = nullptr;  // and in the block of the slice on its way
  int in_block_ = 0;            // the slice's first token in that block
  bool value_ = false;
};

}  // namespace longspan::cuda::decode
