#pragma once

#include <cstdint>
#include <span>

namespace longspan {

/// A change of one logit before a draw: x becomes (x > 0 ? x / penalty : x * penalty) + add. That
/// is the repetition penalty of CTRL (Keskar et al., 2019, arXiv:1909.05858, as HF transformers
/// applies it) followed by what frequency and presence penalties subtract; a ban adds -inf.
struct LogitEdit {
  int32_t token = 0;     ///< in [0, V)
  float penalty = 1.0f;  ///< > 0
  float add = 0.0f;
  float original = 0.0f;  ///< the backend's: the logit while it is edited
};
static_assert(sizeof(LogitEdit) == 16);  // a device reads one at once

/// How the next token of one row is drawn: its edits, then temperature, top_k, top_p, min_p.
struct SamplerRow {
  bool greedy = true;  ///< the largest edited logit
  float temperature = 1.0f;
  int32_t top_k = 0;   ///< 0: all
  float top_p = 1.0f;  ///< 1: all
  float min_p = 0.0f;  ///< least probability kept, as a share of the likeliest token's; 0: all
  uint64_t seed = 0;
  int64_t position = 0;  ///< of the token drawn; seed and position alone fix the random number
  std::span<LogitEdit> edits = {};  ///< of different tokens, in any order
};

}  // namespace longspan
