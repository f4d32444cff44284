// Included once per instruction set; see kernels.inc.
// The matrix product of every linear layer and of attention: A [m, k] times whole panels of B.

/// C [m][32] = start + A [m][k] x k rows of a panel of B. start may be C itself, and with stride 0
/// one row stands for all.
template <class T>
struct PanelProduct {
  const T* a;
  int64_t a_stride;
  const T* b;
  int64_t k;
  const float* start;
  int64_t start_stride;
  float* c;
  int64_t c_stride;
  const T* ahead;  ///< another B that few rows ask to have brought near, or any address

  PanelProduct from_row(int64_t row) const {
    return {a + row * a_stride, a_stride,           b,        k,    start + row * start_stride,
            start_stride,       c + row * c_stride, c_stride, ahead};
  }
};

alignas(64) inline constexpr float kZeroRow[kPanelCols] = {};

/// The most rows of k between two visits to C.
template <class T>
inline constexpr int64_t kSlab = 32768 / (kPanelCols * sizeof(T));

// The 32 columns of a row of C as registers of this set. Wider vectors than it has would live in
// memory.
#if defined(__AVX512F__)
inline constexpr int kWidth = 16;
inline constexpr int kRows = 12;  // 24 of 32 registers hold C
#elif defined(__AVX2__)
inline constexpr int kWidth = 8;
inline constexpr int kRows = 3;  // 12 of 16
#else
inline constexpr int kWidth = 4;
inline constexpr int kRows = 1;  // 8 of 16
#endif
inline constexpr int kParts = kPanelCols / kWidth;
using Part = float __attribute__((vector_size(kWidth * 4)));
using PartU = uint32_t __attribute__((vector_size(kWidth * 4)));

/// Asks for a line of cache to be brought into the second level.
inline void prefetch_line(const void* p) { __builtin_prefetch(p, 0, 2); }

/// c += a B for one k of one row: a scalar against 32 columns.
inline void multiply_add(const float* a, const float* b, Part* c) {
#pragma GCC unroll 8
  for (int i = 0; i < kParts; ++i) c[i] += *a * load_as<Part>(b + int64_t{i} * kWidth);
}

/// Elements of bfloat16 from one half of a panel's columns to the other: a K block of 16 columns.
inline constexpr int64_t kHalfPanel = kKBlock * kLanes;

/// The same for a pair of k in bfloat16 and one half of the columns: b is 16 columns of pairs.
inline void multiply_add_half(const bf16_t* a, const bf16_t* b, Part* c) {
#if defined(__AVX512BF16__)
  int32_t pair;
  std::memcpy(&pair, a, sizeof(pair));
  const auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  c[0] = _mm512_dpbf16_ps(c[0], x, load_as<__m512bh>(b));
#else
  const auto widen = [](bf16_t bits) {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  };
  const float even = widen(a[0]);
  const float odd = widen(a[1]);
#pragma GCC unroll 4
  for (int i = 0; i < kParts / 2; ++i) {
    const auto pairs = load_as<PartU>(b + int64_t{i} * kWidth * 2);
    const PartU low = pairs << 16;
    const PartU high = pairs & 0xffff0000U;
    c[i] += even * load_as<Part>(&low);
    c[i] += odd * load_as<Part>(&high);
  }
#endif
}

/// The same for all 32 columns.
inline void multiply_add(const bf16_t* a, const bf16_t* b, Part* c) {
  multiply_add_half(a, b, c);
  multiply_add_half(a, b + kHalfPanel, c + kParts / 2);
}

/// Rows of k that multiply_in_order takes at a time.
template <class T>
inline constexpr int64_t kInOrder = sizeof(T) == 2 ? kKBlock : 1;

/// c += A B for kInOrder rows of k, with B read in the order of memory; the same lines of `ahead`
/// are asked for meanwhile.
template <int Rows>
inline void multiply_in_order(const float* a, int64_t a_stride, const float* b, const float* ahead,
                              Part (*c)[kParts]) {
  prefetch_line(ahead);
  prefetch_line(ahead + kLanes);
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) multiply_add(a + r * a_stride, b, c[r]);
}
template <int Rows>
inline void multiply_in_order(const bf16_t* a, int64_t a_stride, const bf16_t* b,
                              const bf16_t* ahead, Part (*c)[kParts]) {
#pragma GCC unroll 2
  for (int64_t half = 0; half < 2; ++half) {
#pragma GCC unroll 16
    for (int64_t k = 0; k < kKBlock; k += 2, b += 2 * kLanes, ahead += 2 * kLanes) {
      prefetch_line(ahead);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        multiply_add_half(a + r * a_stride + k, b, c[r] + half * (kParts / 2));
      }
    }
  }
}

/// Rows up to which a product waits for B more than for its sums. They read it in the order of
/// memory, as prefetchers expect: on Zen 4 that and asking ahead are twice the bytes per second.
inline constexpr int kFewRows = std::min(8, kRows);

/// The product for Rows rows, with C in registers.
template <int Rows, bool Few, class T>
inline void multiply_strip(const PanelProduct<T>& p) {
  Part c[Rows][kParts];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) {
      c[r][i] = load_as<Part>(p.start + r * p.start_stride + i * kWidth);
    }
  }
  const T* a = p.a;
  const int64_t a_stride = p.a_stride;
  if constexpr (Few) {
    for (int64_t k = 0; k < p.k; k += kInOrder<T>) {
      const int64_t offset = k * kPanelCols;
      multiply_in_order<Rows>(a + k, a_stride, p.b + offset, p.ahead + offset, c);
    }
  } else {
    constexpr int64_t kStep = sizeof(T) == 2 ? 2 : 1;  // k at a time
    for (int64_t k = 0; k < p.k; k += kStep) {
      const T* b = p.b + index_in_panel<T>(k, 0);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) multiply_add(a + r * a_stride + k, b, c[r]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) {
      std::memcpy(p.c + r * p.c_stride + i * kWidth, &c[r][i], sizeof(Part));
    }
  }
}

/// multiply_strip for a number of rows known only now, in [1, Rows].
template <int Rows, bool Few, class T>
inline void multiply_rows(const PanelProduct<T>& p, int64_t rows) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return multiply_rows<Rows - 1, Few>(p, rows);
  }
  multiply_strip<Rows, Few>(p);
}

/// Whether a product of so many rows asks for PanelProduct::ahead.
template <class T>
constexpr bool asks_ahead(int64_t rows) {
#if defined(__AMX_BF16__)
  if (sizeof(T) == 2) return false;
#endif
  return rows <= kFewRows;
}

/// The product for m rows.
template <class T>
inline void multiply_panel(const PanelProduct<T>& p, int64_t m) {
  if (m <= kFewRows) return multiply_rows<kFewRows, true>(p, m);
  for (int64_t row = 0; row < m; row += kRows) {
    multiply_rows<kRows, false>(p.from_row(row), std::min<int64_t>(kRows, m - row));
  }
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

  /// GCC's intrinsics do not say what memory they read: it must be told that all of this object,
  /// and all that the tiles will be loaded from, has been written.
  void load() const {
    asm volatile("" : : "m"(*this) : "memory");
    _tile_loadconfig(this);
  }
};

/// The product for up to 16 rows, or with Lower up to 32, as the TileConfig says.
template <bool Lower>
inline void multiply_tiles(const PanelProduct<bf16_t>& p) {
  const int64_t a_bytes = p.a_stride * 2;
  const int64_t c_bytes = p.c_stride * 4;
  const int64_t start_bytes = p.start_stride * 4;
  const PanelProduct<bf16_t> lower = p.from_row(16);
  _tile_loadd(0, p.start, start_bytes);
  _tile_loadd(1, p.start + kLanes, start_bytes);
  if constexpr (Lower) {
    _tile_loadd(2, lower.start, start_bytes);
    _tile_loadd(3, lower.start + kLanes, start_bytes);
  }
  for (int64_t i = 0; i < p.k; i += kKBlock) {
    const bf16_t* b = p.b + i * kPanelCols;
    _tile_loadd(4, p.a + i, a_bytes);
    _tile_loadd(6, b, 64);
    _tile_loadd(7, b + kKBlock * kLanes, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Lower) {
      _tile_loadd(5, lower.a + i, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, p.c, c_bytes);
  _tile_stored(1, p.c + kLanes, c_bytes);
  if constexpr (Lower) {
    _tile_stored(2, lower.c, c_bytes);
    _tile_stored(3, lower.c + kLanes, c_bytes);
  }
}

/// Rows from which on a slab's products last about as long as the next slab takes to come from
/// memory; with fewer, prefetches only get in the way of loads.
inline constexpr int64_t kManyRows = 256;

/// Asks for the share of rows [begin, end) of m in the slab that follows, which is next in memory.
inline void prefetch_next(const PanelProduct<bf16_t>& p, int64_t begin, int64_t end, int64_t m) {
  constexpr int64_t kLine = 64 / sizeof(bf16_t);
  const bf16_t* next = p.b + p.k * kPanelCols;
  const int64_t lines = p.k * kPanelCols / kLine;
  for (int64_t line = lines * begin / m; line < lines * end / m; ++line) {
    __builtin_prefetch(next + line * kLine, 0, 2);
  }
}

/// The same instruction for any m keeps rows bit for bit what they are in other company.
inline void multiply_panel(const PanelProduct<bf16_t>& p, int64_t m) {
  constexpr int64_t kStrip = 32;
  int64_t row = 0;
  if (m >= kStrip) {
    TileConfig(16, 16).load();
    for (; row + kStrip <= m; row += kStrip) {
      if (m >= kManyRows) prefetch_next(p, row, row + kStrip, m);
      multiply_tiles<true>(p.from_row(row));
    }
  }
  if (row == m) return;
  const int64_t upper = std::min<int64_t>(16, m - row);
  const int64_t lower = m - row - upper;
  TileConfig(upper, lower).load();
  if (lower > 0) {
    multiply_tiles<true>(p.from_row(row));
  } else {
    multiply_tiles<false>(p.from_row(row));
  }
}

/// Gives the tile registers back, so that they need not be saved when the thread is switched.
inline void end_products() { _tile_release(); }

#else

inline void end_products() {}

#endif

/// Rows of A that pass a slab of a panel before the next slab.
inline constexpr int64_t kBlockRows = 512;

/// See GemmTask.
template <class T>
void gemm(const GemmTask& task) {
  const auto* a = static_cast<const T*>(task.a);
  const auto* b = static_cast<const T*>(task.b);
  const int64_t k = padded_k<T>(task.k);
  // Slabs of k, alike in size, that the first-level cache holds while the rows of A pass. Sums wait
  // aside in between, which rounds nothing: C's rows may lie where they evict each other.
  const int64_t slabs = (k + kSlab<T> - 1) / kSlab<T>;
  const int64_t slab = round_up((k + slabs - 1) / slabs, kKBlock);
  constexpr int64_t kAhead = 4096 / sizeof(T);  // far enough for memory, near enough to stay
  alignas(64) float waiting[kBlockRows * kPanelCols];
  for (int64_t panel = 0; panel < task.panels; ++panel, b += k * kPanelCols) {
    float* c = task.c + panel * kPanelCols;
    const float* bias = task.bias == nullptr ? kZeroRow : task.bias + panel * kPanelCols;
    for (int64_t row = 0; row < task.m; row += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, task.m - row);
      PanelProduct<T> p{a + row * task.a_stride,
                        task.a_stride,
                        b,
                        slab,
                        bias,
                        0,
                        waiting,
                        kPanelCols,
                        b + kAhead};
      for (int64_t left = k; left > 0; left -= slab) {
        if (left <= slab) {  // the last
          p.k = left;
          p.c = c + row * task.c_stride;
          p.c_stride = task.c_stride;
        }
        multiply_panel(p, rows);
        p.a += slab;
        p.b += slab * kPanelCols;
        p.ahead += slab * kPanelCols;
        p.start = waiting;
        p.start_stride = kPanelCols;
      }
    }
  }
  end_products();
}
