#pragma once

#include <cstdint>

namespace longspan {

/// Which keys of a sequence a rank has that shares them with others (context parallelism): of every
/// size * block_len tokens in a row, the rank-th block_len. They stand in the rank's own blocks one
/// after another, so that a token sees the first so many of them. Positions are int32_t or int64_t.
struct ContextShard {
  int32_t block_len = 0;  ///< tokens
  int32_t rank = 0;       ///< in [0, size)
  int32_t size = 1;

  /// How many of a sequence's first `tokens` tokens; the index here of a key at that position.
  template <class Int>
  constexpr Int keys(Int tokens) const {
    if (size == 1) return tokens;
    const Int round = size * block_len;
    const Int rest = tokens % round - rank * block_len;  // of the last round
    const Int last = rest < 0 ? 0 : (rest < block_len ? rest : block_len);
    return tokens / round * block_len + last;
  }

  template <class Int>
  constexpr bool has(Int position) const {
    return size == 1 || position / block_len % size == rank;
  }
};

}  // namespace longspan
