#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace longspan::cuda {

/// (row, head) pairs that share one reading of the keys of their KV head: the N of an mma.
inline constexpr int kDecodePairs = 8;
/// Most spans that the keys of one sequence are split into; fewer where several runs of pairs read
/// them, or where fewer fill a card as well.
inline constexpr int kMaxDecodeSplits = 64;
/// Keys of a span at least: few enough that one short sequence occupies a card, enough that partial
/// results stay a small part of what is read.
inline constexpr int kMinDecodeSpan = 256;

/// A run of keys of one sequence for at most kDecodePairs of its pairs: the unit of work of the
/// decode kernel, once per KV head. Pair p of a KV head is row p / group, head p % group of the
/// group = num_heads / num_kv_heads query heads that share the KV head.
struct DecodeSpan {
  int32_t seq = 0;
  int32_t first_key = 0;  ///< a multiple of kMinDecodeSpan
  int32_t num_keys = 0;
  int32_t first_pair = 0;
  int32_t num_pairs = 0;
  int32_t partial = 0;  ///< first of its [num_kv_heads][num_pairs] partial rows; -1: the only
                        ///< span, writes out directly
};

/// Spans to be merged: those of one sequence and one run of pairs. Their partial rows follow each
/// other: [num_spans][num_kv_heads][num_pairs].
struct DecodeMerge {
  int32_t seq = 0;
  int32_t first_pair = 0;
  int32_t num_pairs = 0;
  int32_t partial = 0;
  int32_t num_spans = 0;
};

/// Numbers of work items, read on the device, so that a captured launch serves any step.
struct DecodeCounts {
  int32_t num_spans = 0;
  int32_t num_merges = 0;
};

/// What a step needs of the decode kernels, and the most that any step can need.
struct DecodeSizes {
  int64_t spans = 0;
  int64_t merges = 0;
  int64_t partial_rows = 0;  ///< of head_dim floats and a log-sum-exp each
};

/// A sequence that decodes in this step.
struct DecodeSeq {
  int32_t seq = 0;  ///< index in PlanView::seqs
  int32_t num_rows = 0;
  int64_t num_keys = 0;  ///< that its last row sees: first_position + num_rows
};

/// Keys per span of a sequence: a function of its own length and pairs, the model and the device
/// only, so that its results do not depend on the company it has in a batch. num_keys in [1, 2^30];
/// slots: thread blocks of the decode kernel that the device runs at a time, 1 or more.
int32_t decode_span_len(int64_t num_keys, int64_t num_pairs, int64_t num_kv_heads, int64_t slots);

/// The most that max_seqs sequences of at most max_rows rows and max_keys keys can need.
DecodeSizes max_decode_sizes(int64_t max_seqs, int64_t max_rows, int64_t max_keys,
                             int64_t num_heads, int64_t num_kv_heads);

/// The work list of a step. Longest spans first: dealt out in turn to any number of thread blocks,
/// their shares differ by one span at most. Runs of pairs that read the same keys follow each
/// other, so that L2 serves all but the first.
class DecodeSpans {
 public:
  DecodeSpans(std::span<const DecodeSeq> seqs, int64_t num_heads, int64_t num_kv_heads,
              int64_t slots);

  const std::vector<DecodeSpan>& spans() const { return spans_; }
  const std::vector<DecodeMerge>& merges() const { return merges_; }
  int64_t partial_rows() const { return partial_rows_; }

 private:
  std::vector<DecodeSpan> spans_;
  std::vector<DecodeMerge> merges_;
  int64_t partial_rows_ = 0;
};

}  // namespace longspan::cuda
