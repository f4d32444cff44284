// Included once per instruction set; see kernels.inc.
// The matrix product of every linear layer and of attention: A [m, k] times whole panels of B.

/// Rows of k that a strip of A walks before the next strip begins, so that this much of a panel
/// stays in the first-level cache. Sums wait in C between them, which rounds nothing.
inline constexpr int64_t kSlab = 512;

#if defined(__AVX512F__)
inline constexpr int kRows = 12;  // 24 of 32 registers hold C
#elif defined(__AVX2__)
inline constexpr int kRows = 3;  // 12 of 16
#else
inline constexpr int kRows = 1;
#endif

/// acc += a B for one k of one row: a scalar against 32 columns.
inline void multiply_add(const float* a, const float* b, Vec& left, Vec& right) {
  left += *a * load(b);
  right += *a * load(b + kLanes);
}

/// The same for a pair of k in bfloat16: b is 32 columns of pairs, the halves 16 rows apart.
inline void multiply_add(const bf16_t* a, const bf16_t* b, Vec& left, Vec& right) {
  constexpr int64_t kHalf = 16 * 2 * kLanes;  // elements from one half of the columns to the other
#if defined(__AVX512BF16__)
  int32_t pair;
  std::memcpy(&pair, a, sizeof(pair));
  const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  left = _mm512_dpbf16_ps(left, x, load_as<__m512bh>(b));
  right = _mm512_dpbf16_ps(right, x, load_as<__m512bh>(b + kHalf));
#else
  const auto widen = [](bf16_t bits) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  };
  const float even = widen(a[0]);
  const float odd = widen(a[1]);
  const auto add = [&](const bf16_t* pairs, Vec& acc) {
    const VecU both = load_as<VecU>(pairs);
    const VecU low = both << 16;
    const VecU high = both & 0xffff0000U;
    acc += even * load_as<Vec>(&low);
    acc += odd * load_as<Vec>(&high);
  };
  add(b, left);
  add(b + kHalf, right);
#endif
}

/// C [Rows][32] += A [Rows][k] x the slab of a panel.
template <int Rows, class T>
inline void multiply_strip(const T* a, int64_t a_stride, const T* b, int64_t k, float* c,
                           int64_t c_stride) {
  Vec left[Rows];
  Vec right[Rows];
  for (int r = 0; r < Rows; ++r) {
    left[r] = load(c + r * c_stride);
    right[r] = load(c + r * c_stride + kLanes);
  }
  if constexpr (sizeof(T) == 4) {
    for (int64_t i = 0; i < k; ++i) {
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        multiply_add(a + r * a_stride + i, b + i * kPanelCols, left[r], right[r]);
      }
    }
  } else {
    for (int64_t i = 0; i < k; i += 2) {
      const T* pairs = b + i / kKBlock * (kKBlock * kPanelCols) + i % kKBlock / 2 * (2 * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        multiply_add(a + r * a_stride + i, pairs, left[r], right[r]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    store(c + r * c_stride, left[r]);
    store(c + r * c_stride + kLanes, right[r]);
  }
}

/// multiply_strip for a number of rows known only now, in [1, Rows].
template <int Rows, class T>
inline void multiply_rows(int64_t rows, const T* a, int64_t a_stride, const T* b, int64_t k,
                          float* c, int64_t c_stride) {
  if constexpr (Rows > 1) {
    if (rows < Rows) {
      return multiply_rows<Rows - 1>(rows, a, a_stride, b, k, c, c_stride);
    }
  }
  multiply_strip<Rows>(a, a_stride, b, k, c, c_stride);
}

#if defined(__AMX_BF16__)

/// The tile registers as multiply_tiles uses them; laid out as LDTILECFG reads it.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};

  /// 0, 1: C of the upper rows, 2, 3: of the lower; 4, 5: A likewise; 6, 7: B.
  TileConfig(int64_t upper, int64_t lower) {
    const auto u = static_cast<uint8_t>(upper);
    const auto l = static_cast<uint8_t>(std::max<int64_t>(lower, 1));
    const uint8_t all[8] = {u, u, l, l, u, l, 16, 16};
    std::copy(all, all + 8, rows);
  }
};

/// C [rows][32] += A [rows][k] x the slab of a panel; rows in [1, 32], TileConfig set for them.
template <bool Lower>
inline void multiply_tiles(const bf16_t* a, int64_t a_stride, const bf16_t* b, int64_t k, float* c,
                           int64_t c_stride) {
  const int64_t a_bytes = a_stride * 2;
  const int64_t c_bytes = c_stride * 4;
  _tile_loadd(0, c, c_bytes);
  _tile_loadd(1, c + kLanes, c_bytes);
  if constexpr (Lower) {
    _tile_loadd(2, c + 16 * c_stride, c_bytes);
    _tile_loadd(3, c + 16 * c_stride + kLanes, c_bytes);
  }
  for (int64_t i = 0; i < k; i += kKBlock) {
    const bf16_t* tile = b + i * kPanelCols;
    _tile_loadd(4, a + i, a_bytes);
    _tile_loadd(6, tile, 64);
    _tile_loadd(7, tile + 16 * 2 * kLanes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Lower) {
      _tile_loadd(5, a + 16 * a_stride + i, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + kLanes, c_bytes);
  if constexpr (Lower) {
    _tile_stored(2, c + 16 * c_stride, c_bytes);
    _tile_stored(3, c + 16 * c_stride + kLanes, c_bytes);
  }
}

/// Every strip of A against one slab of a panel. The same instruction for any m keeps rows bit for
/// bit what they are in other company.
inline void multiply_slab(const bf16_t* a, int64_t a_stride, int64_t m, const bf16_t* b, int64_t k,
                          float* c, int64_t c_stride) {
  constexpr int64_t kStrip = 32;
  int64_t row = 0;
  if (m >= kStrip) {
    const TileConfig config(16, 16);
    _tile_loadconfig(&config);
    for (; row + kStrip <= m; row += kStrip) {
      multiply_tiles<true>(a + row * a_stride, a_stride, b, k, c + row * c_stride, c_stride);
    }
  }
  if (row == m) return;
  const int64_t upper = std::min<int64_t>(16, m - row);
  const int64_t lower = m - row - upper;
  const TileConfig config(upper, lower);
  _tile_loadconfig(&config);
  a += row * a_stride;
  c += row * c_stride;
  if (lower > 0) {
    multiply_tiles<true>(a, a_stride, b, k, c, c_stride);
  } else {
    multiply_tiles<false>(a, a_stride, b, k, c, c_stride);
  }
}

inline void multiply_slab(const float* a, int64_t a_stride, int64_t m, const float* b, int64_t k,
                          float* c, int64_t c_stride) {
  for (int64_t row = 0; row < m; row += kRows) {
    multiply_rows<kRows>(m - row, a + row * a_stride, a_stride, b, k, c + row * c_stride, c_stride);
  }
}

/// Gives the tile registers back, so that they need not be saved when the thread is switched.
inline void end_products() { _tile_release(); }

#else

template <class T>
inline void multiply_slab(const T* a, int64_t a_stride, int64_t m, const T* b, int64_t k, float* c,
                          int64_t c_stride) {
  for (int64_t row = 0; row < m; row += kRows) {
    multiply_rows<kRows>(m - row, a + row * a_stride, a_stride, b, k, c + row * c_stride, c_stride);
  }
}

inline void end_products() {}

#endif

/// See GemmTask.
template <class T>
void gemm(const GemmTask& task) {
  const auto* a = static_cast<const T*>(task.a);
  const auto* b = static_cast<const T*>(task.b);
  const int64_t padded = padded_k<T>(task.k);
  for (int64_t panel = 0; panel < task.panels; ++panel) {
    float* c = task.c + panel * kPanelCols;
    for (int64_t row = 0; row < task.m; ++row) {
      float* out = c + row * task.c_stride;
      if (task.bias == nullptr) {
        std::fill(out, out + kPanelCols, 0.0F);
      } else {
        std::copy(task.bias + panel * kPanelCols, task.bias + (panel + 1) * kPanelCols, out);
      }
    }
    for (int64_t k = 0; k < padded; k += kSlab) {
      multiply_slab(a + k, task.a_stride, task.m, b + k * kPanelCols, std::min(kSlab, padded - k),
                    c, task.c_stride);
    }
    b += padded * kPanelCols;
  }
  end_products();
}
