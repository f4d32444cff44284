// Included once per instruction set, after rows.h; see kernels.inc.

/// x rotated by the angles: pair (i, i + pairs) by cos[i], sin[i]; the dims after the pairs as they
/// are. One place, so that every path rounds alike.
[[gnu::noinline]] inline void rotate_head(const float* __restrict x, const float* __restrict cos,
                                          const float* __restrict sin, int64_t pairs,
                                          int64_t head_dim, float* __restrict out) {
  for (int64_t i = 0; i < pairs; ++i) {
    out[i] = x[i] * cos[i] - x[pairs + i] * sin[i];
    out[pairs + i] = x[pairs + i] * cos[i] + x[i] * sin[i];
  }
  for (int64_t d = 2 * pairs; d < head_dim; ++d) out[d] = x[d];
}

/// x / rms(x) * weight in `out`; x itself where weight is null.
inline const float* norm_head(const float* x, const float* weight, float eps, int64_t head_dim,
                              float* out) {
  if (weight == nullptr) return x;
  const float mean = sum_of_squares(x, head_dim) / static_cast<float>(head_dim);
  const float scale = 1.0f / std::sqrt(mean + eps);
  for (int64_t d = 0; d < head_dim; ++d) out[d] = x[d] * scale * weight[d];
  return out;
}

inline uint32_t bf16_bits(float x) {
  bf16_t bits;
  store_act(x, &bits);
  return bits;
}

/// Rotated keys [count][head_dim] into columns first_key on.
inline void append_keys(const RotateTask& task, float* keys, float* tile) {
  for (int64_t t = 0; t < task.count; ++t) {
    const int64_t n = task.first_key + t;
    for (int64_t d = 0; d < task.head_dim; ++d) {
      tile[key_index<float>(d, n, task.head_dim)] = keys[t * task.head_dim + d];
    }
  }
}
inline void append_keys(const RotateTask& task, float* keys, bf16_t* tile) {
  auto* pairs = reinterpret_cast<uint32_t*>(tile);
  for (int64_t t = 0; t < task.count; ++t) {
    // First a row of words, each a pair of elements, which vectorises; then the words one by one.
    const float* key = keys + t * task.head_dim;
    auto* words = reinterpret_cast<uint32_t*>(keys + task.count * task.head_dim);
    for (int64_t i = 0; i < task.head_dim / 2; ++i) {
      words[i] = bf16_bits(key[2 * i]) | bf16_bits(key[2 * i + 1]) << 16;
    }
    uint32_t* out = pairs + key_index<bf16_t>(0, task.first_key + t, task.head_dim) / 2;
    constexpr int64_t kPairs = kKBlock / 2;  // of a column in one tile of the panel
    for (int64_t i = 0; i < task.head_dim / 2; i += kPairs, out += kKBlock * kPanelCols / 2) {
      const int64_t count = std::min(kPairs, task.head_dim / 2 - i);
      for (int64_t j = 0; j < count; ++j) out[j * 16] = words[i + j];
    }
  }
}

/// Values into rows first_key on. In bfloat16 two keys share a word: both are written at once where
/// both are at hand.
inline void append_values(const RotateTask& task, float* tile) {
  for (int64_t t = 0; t < task.count; ++t) {
    const float* value = task.v + t * task.stride;
    for (int64_t d = 0; d < task.head_dim; ++d) {
      tile[value_index<float>(task.first_key + t, d)] = value[d];
    }
  }
}
inline void append_values(const RotateTask& task, bf16_t* tile) {
  auto* pairs = reinterpret_cast<uint32_t*>(tile);
  for (int64_t t = 0; t < task.count;) {
    const int64_t n = task.first_key + t;
    const float* value = task.v + t * task.stride;
    if (n % 2 == 0 && t + 1 < task.count) {
      const float* next = value + task.stride;
      for (int64_t d = 0; d < task.head_dim; d += 16) {
        uint32_t* out = pairs + value_index<bf16_t>(n, d) / 2;
        const int64_t count = std::min<int64_t>(16, task.head_dim - d);
        for (int64_t i = 0; i < count; ++i) {
          out[i] = bf16_bits(value[d + i]) | bf16_bits(next[d + i]) << 16;
        }
      }
      t += 2;
    } else {
      for (int64_t d = 0; d < task.head_dim; ++d)
        store_act(value[d], tile + value_index<bf16_t>(n, d));
      t += 1;
    }
  }
}

template <class Act>
inline void rotate_append(const RotateTask& task) {
  const int64_t pairs = task.rotary_pairs;
  float* normed = task.scratch + kKeyTile * task.head_dim;  // append_keys has no use for it yet
  for (int64_t t = 0; t < task.count; ++t) {
    const float* cos = task.cos + t * pairs;
    const float* sin = task.sin + t * pairs;
    const float scale = task.q_scale[t];
    const float rotated_scale = scale * task.rotated_scale;
    Act* q_out = static_cast<Act*>(task.q_out) + t * task.q_stride;
    for (int64_t g = 0; g < task.group; ++g, q_out += task.head_dim) {
      const float* q = norm_head(task.q + t * task.stride + g * task.head_dim, task.q_norm,
                                 task.norm_eps, task.head_dim, normed);
      float* out = task.scratch;
      rotate_head(q, cos, sin, pairs, task.head_dim, out);
      for (int64_t d = 0; d < 2 * pairs; ++d) out[d] *= rotated_scale;
      for (int64_t d = 2 * pairs; d < task.head_dim; ++d) out[d] *= scale;
      if (task.turn_heads) turn_head(out, task.head_dim);
      for (int64_t d = 0; d < task.head_dim; ++d) store_act(out[d], q_out + d);
    }
  }
  if (task.k_tile == nullptr) return;
  for (int64_t t = 0; t < task.count; ++t) {
    const float* k =
        norm_head(task.k + t * task.stride, task.k_norm, task.norm_eps, task.head_dim, normed);
    float* out = task.scratch + t * task.head_dim;
    rotate_head(k, task.cos + t * pairs, task.sin + t * pairs, pairs, task.head_dim, out);
    if (task.turn_heads) turn_head(out, task.head_dim);
  }
  const KvTile& k = task.tiles->k();
  const KvTile& v = task.tiles->v();
  auto* row = reinterpret_cast<uint8_t*>(normed);  // which has served
  if (k.element == KvElement::kNative) {
    append_keys(task, task.scratch, static_cast<Act*>(task.k_tile));
  } else {
    const auto index = [&](int64_t n, int64_t d) { return key_index<Act>(d, n, task.head_dim); };
    append_codes(task, k, task.scratch, task.head_dim, task.k_tile, index, row);
  }
  if (v.element == KvElement::kNative) {
    if (task.first_key == 0) std::memset(task.v_tile, 0, static_cast<size_t>(v.bytes));
    append_values(task, static_cast<Act*>(task.v_tile));
  } else {
    if (task.first_key == 0) {
      std::memset(static_cast<char*>(task.v_tile) + v.code_bytes, 0,
                  static_cast<size_t>(v.parameter_bytes()));
    }
    append_codes(task, v, task.v, task.stride, task.v_tile, value_index<Act>, row);
  }
}
