#pragma once

#include <cstdint>

namespace longspan::cpu {

/// The layout of every right-hand side B [K, N] of a matrix product on the CPU: packed weights
/// (B = W^T), a tile of keys (B = K^T: K is head_dim, N the keys) and a tile of values (B = V:
/// K is the keys, N head_dim). Columns go in panels of kPanelCols; a panel holds all K.
/// bf16: [panel][K / 32][2 halves of 16 cols][16 pairs of k][16 cols][2], so that each
/// (K / 32, half) is one 1 KiB AMX tile and one vdpbf16ps operand per row of 64 bytes; K is padded
/// with zeros to a multiple of kKBlock. f32: [panel][K][32 cols]. N is padded to kPanelCols.
inline constexpr int64_t kPanelCols = 32;
inline constexpr int64_t kKBlock = 32;

/// A bfloat16 by its bits: the upper half of a float32.
using bf16_t = uint16_t;

constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

/// Rows of k stored for an inner dimension of k.
template <class T>
constexpr int64_t padded_k(int64_t k) {
  return sizeof(T) == 2 ? round_up(k, kKBlock) : k;
}

/// Elements of the whole packed B.
template <class T>
constexpr int64_t panel_elements(int64_t k, int64_t n) {
  return padded_k<T>(k) * round_up(n, kPanelCols);
}

/// Index of element (k, n) of B within the panel of column n; that panel starts at
/// (n / kPanelCols) * padded_k<T>(K) * kPanelCols.
template <class T>
constexpr int64_t index_in_panel(int64_t k, int64_t n) {
  const int64_t col = n % kPanelCols;
  if constexpr (sizeof(T) == 2) {
    const int64_t tile = (k / kKBlock) * 2 + col / 16;
    return (tile * 16 + (k % kKBlock) / 2) * 32 + (col % 16) * 2 + k % 2;
  } else {
    return k * kPanelCols + col;
  }
}

}  // namespace longspan::cpu
