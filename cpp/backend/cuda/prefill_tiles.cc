#include "backend/cuda/prefill_tiles.h"

#include <algorithm>

namespace longspan::cuda {

void append_prefill_tiles(std::span<const PrefillSeq> seqs, int32_t num_heads,
                          std::vector<PrefillTile>* tiles) {
  struct Rows {
    int64_t num_keys;
    int32_t seq;
    int32_t row;
  };
  std::vector<Rows> runs;
  for (const PrefillSeq& seq : seqs) {
    for (int32_t row = 0; row < seq.num_rows; row += kPrefillRows) {
      const int32_t end = std::min(row + kPrefillRows, seq.num_rows);
      if (seq.keys(end) > 0) runs.push_back({seq.keys(end), seq.seq, row});
    }
  }
  std::stable_sort(runs.begin(), runs.end(),
                   [](const Rows& a, const Rows& b) { return a.num_keys > b.num_keys; });
  for (const Rows& run : runs) {
    for (int32_t head = 0; head < num_heads; ++head) {
      tiles->push_back({run.seq, head, run.row});
    }
  }
}

}  // namespace longspan::cuda
