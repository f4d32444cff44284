// Included once per instruction set; see kernels.inc.

#include "backend/cpu/isa/softmax.h"

/// Working memory of one unit. Rows are those of the unit, padded to kStripRows.
template <class Act>
struct AttentionMemory {
  Act* q;          // [rows][padded_k(head_dim)], the padding zero
  float* o;        // [rows][cols], of the span at hand, against m
  float* sums;     // [rows][kSumLanes], partial sums of the weights
  float* l;        // [rows], sum of the weights; 0 for a row that sees no key of the span
  float* m;        // [rows], reference of the weights: log2 of what they are divided by
  float* total_o;  // o, l and m of the spans so far
  float* total_l;
  float* total_m;
  float* s;  // [kStripRows][kStepKeys], scores of a strip
  Act* p;    // [kStripRows][kStepKeys], weights of a strip
  // What the codes of a step stand for:
  Act* k;             // [key tile][inner x kKeyTile]
  Act* v;             // [key tile][kKeyTile x cols]
  float* key_scales;  // [kStepKeys]
  int64_t inner;
  int64_t cols;

  AttentionMemory(char* scratch, int64_t group, int64_t head_dim)
      : inner(padded_k<Act>(head_dim)), cols(output_cols(head_dim)) {
    const int64_t rows = unit_rows(group);
    auto* next = reinterpret_cast<float*>(scratch);
    const auto take = [&](int64_t floats) {
      next += floats;
      return next - floats;
    };
    q = reinterpret_cast<Act*>(take(rows * inner * static_cast<int64_t>(sizeof(Act)) / 4));
    o = take(rows * cols);
    total_o = take(rows * cols);
    sums = take(rows * kSumLanes);
    l = take(rows);
    m = take(rows);
    total_l = take(rows);
    total_m = take(rows);
    s = take(kStripRows * kStepKeys);
    p = reinterpret_cast<Act*>(take(kStripRows * kStepKeys));
    k = reinterpret_cast<Act*>(take(kStepKeys * inner));
    v = reinterpret_cast<Act*>(take(kStepKeys * cols));
    key_scales = take(kStepKeys);
  }
};

/// The keys and values of one step: where their tiles are, null beyond the last, or what their
/// codes stand for.
template <class Act>
struct StepTiles {
  const Act* k[kStepKeys / kKeyTile];
  const Act* v[kStepKeys / kKeyTile];
  const float* key_scales;  ///< [kStepKeys], which scores are still to be multiplied by; null: 1
};

template <class Act>
inline StepTiles<Act> step_tiles(const AttentionTask& task, int64_t first_key, int64_t end_key) {
  StepTiles<Act> tiles{};
  for (int64_t i = 0; i < kStepKeys / kKeyTile; ++i) {
    const int64_t key = first_key + i * kKeyTile;
    if (key >= end_key) break;
    const int64_t tile = key / kKeyTile;
    tiles.k[i] = reinterpret_cast<const Act*>(
        task.pool + task.tiles->k_offset(task.block_table, tile, task.layer, task.kv_head));
    tiles.v[i] = reinterpret_cast<const Act*>(
        task.pool + task.tiles->v_offset(task.block_table, tile, task.layer, task.kv_head));
  }
  return tiles;
}

/// Asks for part `part` of `parts` of the keys and values of a step to be brought near.
template <class Act>
inline void prefetch_tiles(const StepTiles<Act>& tiles, int64_t inner, int64_t cols, int64_t part,
                           int64_t parts) {
  const auto fetch = [&](const Act* tile, int64_t elements) {
    const auto* bytes = reinterpret_cast<const char*>(tile);
    const int64_t lines = elements * static_cast<int64_t>(sizeof(Act)) / 64;
    for (int64_t line = lines * part / parts; line < lines * (part + 1) / parts; ++line) {
      __builtin_prefetch(bytes + line * 64, 0, 2);
    }
  };
  for (int64_t i = 0; i < kStepKeys / kKeyTile; ++i) {
    if (tiles.k[i] == nullptr) return;
    fetch(tiles.k[i], inner * kKeyTile);
    fetch(tiles.v[i], kKeyTile * cols);
  }
}

/// What the codes of a step stand for; asks for those of the next.
template <class Act>
inline StepTiles<Act> decode_step(const AttentionTask& task, const AttentionMemory<Act>& memory,
                                  const StepTiles<Act>& coded, const StepTiles<Act>& next) {
  const KvTile& k = task.tiles->k();
  const KvTile& v = task.tiles->v();
  StepTiles<Act> tiles{{}, {}, memory.key_scales};
  for (int64_t i = 0; i < kStepKeys / kKeyTile && coded.k[i] != nullptr; ++i) {
    const Act* next_k = next.k[i] == nullptr ? coded.k[i] : next.k[i];
    const Act* next_v = next.v[i] == nullptr ? coded.v[i] : next.v[i];
    Act* keys = memory.k + i * memory.inner * kKeyTile;
    Act* values = memory.v + i * kKeyTile * memory.cols;
    decode_keys(k, coded.k[i], next_k, task.head_dim, keys);
    decode_values(v, coded.v[i], next_v, memory.cols, values);
    const auto* scales =
        reinterpret_cast<const uint16_t*>(reinterpret_cast<const char*>(coded.k[i]) + k.code_bytes);
    float* out = memory.key_scales + i * kKeyTile;
    for (int64_t n = 0; n < kKeyTile; ++n) out[n] = bf16_to_float(scales[n]);
    tiles.k[i] = keys;
    tiles.v[i] = values;
  }
  return tiles;
}

template <class Act>
inline void pack_queries(const AttentionTask& task, const AttentionMemory<Act>& memory) {
  const auto* q = static_cast<const Act*>(task.q);
  Act* out = memory.q;
  for (int64_t t = 0; t < task.num_tokens; ++t) {
    for (int64_t g = 0; g < task.group; ++g, out += memory.inner) {
      const Act* row = q + t * task.q_stride + g * task.head_dim;
      std::copy(row, row + task.head_dim, out);
      std::fill(out + task.head_dim, out + memory.inner, Act{});
    }
  }
  const int64_t padding = round_up(task.rows(), kStripRows) - task.rows();
  std::fill(out, out + padding * memory.inner, Act{});
}

/// The largest of n scores, n >= 1.
inline float row_max(const float* s, int64_t n) {
  float largest[kSumLanes];
  std::fill(largest, largest + kSumLanes, s[0]);
  int64_t i = 0;
  for (; i + kSumLanes <= n; i += kSumLanes) {
    for (int64_t lane = 0; lane < kSumLanes; ++lane) {
      largest[lane] = s[i + lane] > largest[lane] ? s[i + lane] : largest[lane];
    }
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) largest[lane] = std::max(largest[lane], s[i]);
  return *std::max_element(largest, largest + kSumLanes);
}

/// The row's weights of a step have outgrown their reference: takes a new one, at least 2^32
/// higher, and brings what was summed so far to it.
template <class Act>
[[gnu::noinline]] inline void rescale_row(const AttentionMemory<Act>& memory, int64_t row,
                                          const float* s, int64_t visible, int64_t width,
                                          float scale, Act* p) {
  const float old = memory.m[row];
  memory.m[row] = std::max(old + 32.0f, row_max(s, visible) * scale);
  const float factor = exp2_lane(old - memory.m[row]);
  float* o = memory.o + row * memory.cols;
  for (int64_t c = 0; c < memory.cols; ++c) o[c] *= factor;
  float* sums = memory.sums + row * kSumLanes;
  for (int64_t lane = 0; lane < kSumLanes; ++lane) sums[lane] *= factor;
  weigh_row(s, visible, width, scale, memory.m[row], sums, p);
}

/// Sets the tile registers up for the rest of the unit.
inline void begin_products() {
#if defined(__AMX_BF16__)
  TileConfig(16, 16).load();
#endif
}

/// C [rows][N] (+)= A0 B0 + A1 B1 + ... of num_parts products in turn, each with k inner elements
/// and N / kPanelCols whole panels; part i of A begins i * k columns on. ahead: the parts that are
/// to be multiplied later, or null.
template <class Act>
inline void multiply_parts(const Act* a, int64_t a_stride, const Act* const* parts,
                           const Act* const* ahead, int64_t num_parts, int64_t k, int64_t n,
                           int64_t rows, float* c, int64_t c_stride, bool accumulate) {
  for (int64_t col = 0; col < n; col += kPanelCols, c += kPanelCols) {
    PanelProduct<Act> product{a, a_stride, nullptr, k, c, c_stride, c, c_stride, nullptr};
    if (!accumulate) {
      product.start = kZeroRow;
      product.start_stride = 0;
    }
    for (int64_t part = 0; part < num_parts; ++part) {
      product.b = parts[part] + col * k;
      product.ahead = (ahead[part] == nullptr ? parts[part] : ahead[part]) + col * k;
      multiply_panel(product, rows);
      product.a += k;
      product.start = c;
      product.start_stride = c_stride;
    }
  }
}

#if defined(__AMX_BF16__)

/// One panel of multiply_parts for up to 16 rows, or with kLower up to 32; rows of A and C beyond
/// are read and written too.
template <bool kLower>
inline void multiply_panel_parts(const bf16_t* a, int64_t a_stride, const bf16_t* const* parts,
                                 int64_t num_parts, int64_t offset, int64_t k, float* c,
                                 int64_t c_stride, bool accumulate) {
  const int64_t c_bytes = c_stride * 4;
  const int64_t a_bytes = a_stride * 2;
  float* lower = c + 16 * c_stride;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kLower) {
      _tile_loadd(2, lower, c_bytes);
      _tile_loadd(3, lower + 16, c_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kLower) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t part = 0; part < num_parts; ++part) {
    const bf16_t* b = parts[part] + offset;
    for (int64_t i = 0; i < k; i += kKBlock, a += kKBlock, b += kKBlock * kPanelCols) {
      _tile_loadd(4, a, a_bytes);
      if constexpr (kLower) _tile_loadd(5, a + 16 * a_stride, a_bytes);
      _tile_loadd(6, b, 64);
      _tile_loadd(7, b + kKBlock * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kLower) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  if constexpr (kLower) {
    _tile_stored(2, lower, c_bytes);
    _tile_stored(3, lower + 16, c_bytes);
  }
}

inline void multiply_parts(const bf16_t* a, int64_t a_stride, const bf16_t* const* parts,
                           const bf16_t* const*, int64_t num_parts, int64_t k, int64_t n,
                           int64_t rows, float* c, int64_t c_stride, bool accumulate) {
  for (int64_t col = 0; col < n; col += kPanelCols, c += kPanelCols) {
    if (rows > 16) {
      multiply_panel_parts<true>(a, a_stride, parts, num_parts, col * k, k, c, c_stride,
                                 accumulate);
    } else {
      multiply_panel_parts<false>(a, a_stride, parts, num_parts, col * k, k, c, c_stride,
                                  accumulate);
    }
  }
}

#endif

/// One strip of rows against one step of keys; next: the tiles of the step that follows.
template <class Act>
inline void attend_strip(const AttentionTask& task, const AttentionMemory<Act>& memory,
                         int64_t first_row, int64_t rows, int64_t first_key, bool first_of_span,
                         const StepTiles<Act>& tiles, const StepTiles<Act>& next) {
  const int64_t last_visible = task.visible(first_row + rows - 1);
  const int64_t num_tiles =
      std::min(kStepKeys, round_up(last_visible - first_key, kKeyTile)) / kKeyTile;
  const int64_t width = num_tiles * kKeyTile;

  const Act* q = memory.q + first_row * memory.inner;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    multiply_parts(q, memory.inner, &tiles.k[tile], &next.k[tile], 1, memory.inner, kKeyTile, rows,
                   memory.s + tile * kKeyTile, kStepKeys, false);
  }

  if (tiles.key_scales != nullptr) {
    for (int64_t r = 0; r < rows; ++r) {
      float* s = memory.s + r * kStepKeys;
      for (int64_t n = 0; n < width; ++n) s[n] *= tiles.key_scales[n];
    }
  }

  const bool all_visible = task.visible(first_row) >= first_key + width;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first_row + r;
    const float* s = memory.s + r * kStepKeys;
    Act* p = memory.p + r * kStepKeys;
    const int64_t visible =
        all_visible ? width : std::clamp<int64_t>(task.visible(row) - first_key, 0, width);
    if (first_of_span) {
      // The step's largest score is the reference for the whole span, unless rescale_row must step
      // in: weights of 2^60 are as exact as weights of 1, so no later maximum is looked for.
      memory.m[row] = visible > 0 ? row_max(s, visible) * task.scale_log2 : 0.0f;
    }
    if (!weigh_row(s, visible, width, task.scale_log2, memory.m[row], memory.sums + row * kSumLanes,
                   p)) {
      rescale_row(memory, row, s, visible, width, task.scale_log2, p);
    }
  }

  multiply_parts(memory.p, kStepKeys, tiles.v, next.v, num_tiles, kKeyTile, memory.cols, rows,
                 memory.o + first_row * memory.cols, memory.cols, !first_of_span);
}

/// o, l and m of every row over one span, the keys up to end_key.
template <class Act>
inline void attend_span(const AttentionTask& task, const AttentionMemory<Act>& memory,
                        int64_t first_key, int64_t end_key) {
  const int64_t rows = task.rows();
  const int64_t num_strips = round_up(rows, kStripRows) / kStripRows;
  const bool coded = task.tiles->k().element != KvElement::kNative;
  std::fill(memory.sums, memory.sums + rows * kSumLanes, 0.0f);
  for (int64_t key = first_key; key < end_key; key += kStepKeys) {
    StepTiles<Act> tiles = step_tiles<Act>(task, key, end_key);
    StepTiles<Act> next = step_tiles<Act>(task, key + kStepKeys, end_key);
    if (coded) {
      tiles = decode_step(task, memory, tiles, next);
      next = {};
    }
    for (int64_t row = 0; row < rows; row += kStripRows) {
      const int64_t count = std::min(kStripRows, rows - row);
      if (!coded && !asks_ahead<Act>(rows)) {
        prefetch_tiles(next, memory.inner, memory.cols, row / kStripRows, num_strips);
      }
      if (key >= task.visible(row + count - 1)) continue;
      attend_strip(task, memory, row, count, key, key == first_key, tiles, next);
    }
  }
  for (int64_t row = 0; row < rows; ++row)
    memory.l[row] = sum_lanes(load(memory.sums + row * kSumLanes));
}

/// Adds a span's result of one row to that of the spans before it. One place, so that rows merged
/// in their unit and rows merged from partial results agree bit for bit.
[[gnu::noinline]] inline void merge_row(const float* o, float l, float m, int64_t cols, bool first,
                                        float* total_o, float* total_l, float* total_m) {
  if (first) {
    std::copy(o, o + cols, total_o);
    *total_l = l;
    *total_m = m;
    return;
  }
  if (l == 0.0f) return;
  const float reference = std::max(*total_m, m);
  const float kept = exp2_lane(*total_m - reference);
  const float added = exp2_lane(m - reference);
  for (int64_t c = 0; c < cols; ++c) total_o[c] = total_o[c] * kept + o[c] * added;
  *total_l = *total_l * kept + l * added;
  *total_m = reference;
}

/// log_sum_exp: of the row, or null. A row that sees no key has no total_o and total_m.
template <class Act>
[[gnu::noinline]] inline void finish_row(const float* total_o, float total_l, float total_m,
                                         int64_t head_dim, Act* out, float* log_sum_exp) {
  const bool sees_none = total_l == 0.0f;
  if (log_sum_exp != nullptr) {
    *log_sum_exp = sees_none ? -std::numeric_limits<float>::infinity()
                             : (total_m + std::log2(total_l)) * std::numbers::ln2_v<float>;
  }
  if (sees_none) {
    std::fill(out, out + head_dim, Act{});
    return;
  }
  const float factor = 1.0f / total_l;
  for (int64_t c = 0; c < head_dim; ++c) store_act(total_o[c] * factor, out + c);
}

template <class Act>
inline void attend(const AttentionTask& task) {
  const AttentionMemory<Act> memory(task.scratch, task.group, task.head_dim);
  const int64_t rows = task.rows();
  pack_queries(task, memory);
  begin_products();
  const int64_t end_key = task.visible(rows - 1);
  std::fill(memory.total_l, memory.total_l + rows, 0.0f);  // of rows without a span
  for (int64_t span = task.first_span; span < task.end_span; ++span) {
    const int64_t first_key = span * kSpanKeys;
    attend_span(task, memory, first_key, std::min(end_key, first_key + kSpanKeys));
    if (task.partial != nullptr) {
      const int64_t floats = rows * memory.cols;
      std::copy(memory.o, memory.o + floats, task.partial);
      std::copy(memory.m, memory.m + rows, task.partial + floats);
      std::copy(memory.l, memory.l + rows, task.partial + floats + rows);
      end_products();
      return;
    }
    for (int64_t row = 0; row < rows; ++row) {
      merge_row(memory.o + row * memory.cols, memory.l[row], memory.m[row], memory.cols,
                span == task.first_span, memory.total_o + row * memory.cols, memory.total_l + row,
                memory.total_m + row);
    }
  }
  end_products();
  auto* out = static_cast<Act*>(task.out);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t token = row / task.group;
    const int64_t head = row % task.group;
    finish_row(memory.total_o + row * memory.cols, memory.total_l[row], memory.total_m[row],
               task.head_dim, out + token * task.out_stride + head * task.head_dim,
               task.log_sum_exp == nullptr
                   ? nullptr
                   : task.log_sum_exp + token * task.log_sum_exp_stride + head);
  }
}

template <class Act>
inline void merge_spans(const MergeTask& task) {
  const AttentionMemory<Act> memory(task.scratch, task.group, task.head_dim);
  const int64_t cols = memory.cols;
  const int64_t stride = partial_floats(task.group, task.head_dim);
  auto* out = static_cast<Act*>(task.out);
  for (int64_t row = 0; row < task.group; ++row) {
    for (int64_t span = 0; span < task.num_spans; ++span) {
      const float* partial = task.partials + span * stride;
      const float* m = partial + task.group * cols;
      const float* l = m + task.group;
      merge_row(partial + row * cols, l[row], m[row], cols, span == 0, memory.total_o,
                memory.total_l, memory.total_m);
    }
    finish_row(memory.total_o, *memory.total_l, *memory.total_m, task.head_dim,
               out + row * task.head_dim,
               task.log_sum_exp == nullptr ? nullptr : task.log_sum_exp + row);
  }
}
