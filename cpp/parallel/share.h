#pragma once

#include <cstdint>

namespace longspan {

/// Items [begin, end) of something that is dealt out to ranks.
struct Share {
  int64_t begin = 0;
  int64_t end = 0;

  int64_t size() const { return end - begin; }
  /// The same share where every item is `each` smaller ones.
  Share times(int64_t each) const { return {begin * each, end * each}; }
};

/// Rank `rank`'s share of total items, as even as can be, in order of rank.
constexpr Share share_of(int64_t total, int rank, int size) {
  return {total * rank / size, total * (rank + 1) / size};
}

/// The largest of them.
constexpr int64_t largest_share(int64_t total, int size) { return (total + size - 1) / size; }

}  // namespace longspan
