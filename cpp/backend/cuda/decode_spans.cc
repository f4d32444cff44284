#include "backend/cuda/decode_spans.h"

#include <algorithm>

namespace longspan::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Spans at most, however long the sequence.
int64_t max_splits(int64_t num_pairs) {
  return std::max<int64_t>(kMaxDecodeSplits / ceil_div(num_pairs, kDecodePairs), 1);
}

/// Into how many spans the keys go that `readers` units each read one span of: those of one round
/// of the device's slots, since each has its beginning and its end, unless more rounds are fuller.
int64_t splits_of(int64_t readers, int64_t most, int64_t slots) {
  constexpr int64_t kMostRounds = 4;
  constexpr double kWorthwhile = 1.05;
  int64_t best = 1;
  double best_fill = 0;
  for (int64_t rounds = 1; rounds <= kMostRounds; ++rounds) {
    const int64_t splits = std::clamp<int64_t>(rounds * slots / readers, 1, most);
    const int64_t units = splits * readers;
    const double fill =
        static_cast<double>(units) / static_cast<double>(ceil_div(units, slots) * slots);
    if (fill > kWorthwhile * best_fill) {
      best = splits;
      best_fill = fill;
    }
  }
  return best;
}

}  // namespace

int32_t decode_span_len(int64_t num_keys, int64_t num_pairs, int64_t num_kv_heads, int64_t slots) {
  const int64_t readers = ceil_div(num_pairs, kDecodePairs) * num_kv_heads;
  const int64_t least = ceil_div(num_keys, splits_of(readers, max_splits(num_pairs), slots));
  return static_cast<int32_t>(ceil_div(least, kMinDecodeSpan) * kMinDecodeSpan);
}

DecodeSizes max_decode_sizes(int64_t max_seqs, int64_t max_rows, int64_t max_keys,
                             int64_t num_heads, int64_t num_kv_heads) {
  DecodeSizes sizes;
  for (int64_t rows = 1; rows <= max_rows; ++rows) {
    const int64_t pairs = rows * (num_heads / num_kv_heads);
    const int64_t runs = ceil_div(pairs, kDecodePairs);
    const int64_t splits = std::min(max_splits(pairs), ceil_div(max_keys, kMinDecodeSpan));
    sizes.spans = std::max(sizes.spans, max_seqs * splits * runs);
    sizes.merges = std::max(sizes.merges, max_seqs * runs);
    sizes.partial_rows = std::max(sizes.partial_rows, max_seqs * splits * rows * num_heads);
  }
  return sizes;
}

DecodeSpans::DecodeSpans(std::span<const DecodeSeq> seqs, int64_t num_heads, int64_t num_kv_heads,
                         int64_t slots) {
  const int64_t group = num_heads / num_kv_heads;
  for (const DecodeSeq& seq : seqs) {
    const int64_t pairs = seq.num_rows * group;
    const int64_t span_len = decode_span_len(seq.num_keys, pairs, num_kv_heads, slots);
    const int64_t splits = ceil_div(seq.num_keys, span_len);
    for (int64_t key = 0; key < seq.num_keys; key += span_len) {
      // Rows of a run's spans follow each other, the runs as well.
      int64_t run = partial_rows_;
      for (int64_t first_pair = 0; first_pair < pairs; first_pair += kDecodePairs) {
        const int64_t num_pairs = std::min<int64_t>(pairs - first_pair, kDecodePairs);
        const int64_t rows = num_kv_heads * num_pairs;
        DecodeSpan span;
        span.seq = seq.seq;
        span.first_key = static_cast<int32_t>(key);
        span.num_keys = static_cast<int32_t>(std::min(span_len, seq.num_keys - key));
        span.first_pair = static_cast<int32_t>(first_pair);
        span.num_pairs = static_cast<int32_t>(num_pairs);
        span.partial = splits > 1 ? static_cast<int32_t>(run + key / span_len * rows) : -1;
        spans_.push_back(span);
        if (splits > 1 && key == 0) {
          merges_.push_back({seq.seq, span.first_pair, span.num_pairs, span.partial,
                             static_cast<int32_t>(splits)});
        }
        run += splits * rows;
      }
    }
    if (splits > 1) partial_rows_ += splits * num_kv_heads * pairs;
  }
  std::stable_sort(spans_.begin(), spans_.end(), [](const DecodeSpan& a, const DecodeSpan& b) {
    return a.num_keys > b.num_keys;
  });
}

}  // namespace longspan::cuda
