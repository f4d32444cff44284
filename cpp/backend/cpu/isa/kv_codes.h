// Included once per instruction set; see kernels.inc.
// Quantised tiles of keys and values (KvTile): a row's codes put in, a tile's elements taken out.

/// Codes [head_dim] of a row, one a byte; its parameters go where those of key n of the tile are.
inline void quantize_row(const KvTile& tile, const float* x, int64_t head_dim, int64_t n,
                         uint16_t* parameters, uint8_t* codes) {
  if (tile.element == KvElement::kInt8 || tile.element == KvElement::kInt6) {
    parameters[n] = quantize_integers(tile.element, x, head_dim, reinterpret_cast<int8_t*>(codes));
  } else if (tile.element == KvElement::kFp8) {
    parameters[n] = quantize_fp8(x, head_dim, codes);
  } else {
    for (int64_t group = 0; group < tile.groups; ++group) {
      const int64_t first = group * kInt4Group;
      const int64_t count = std::min(kInt4Group, head_dim - first);
      const Int4Parameters p = quantize_int4(x + first, count, codes + first);
      parameters[group * kKeyTile + n] = p.scale;
      parameters[(tile.groups + group) * kKeyTile + n] = p.zero;
    }
  }
}

/// Quantises the rows of the task's tokens, `stride` floats apart, and appends them to a tile.
/// index(n, d): of element d of key n there. row: [head_dim], to work in.
template <class Index>
inline void append_codes(const RotateTask& task, const KvTile& tile, const float* rows,
                         int64_t stride, void* data, const Index& index, uint8_t* row) {
  auto* codes = static_cast<uint8_t*>(data);
  auto* parameters = reinterpret_cast<uint16_t*>(codes + tile.code_bytes);
  for (int64_t t = 0; t < task.count; ++t) {
    const int64_t n = task.first_key + t;
    quantize_row(tile, rows + t * stride, task.head_dim, n, parameters, row);
    for (int64_t d = 0; d < task.head_dim; ++d) store_code(tile, index(n, d), row[d], codes);
  }
}

using Halves = uint16_t __attribute__((vector_size(32)));
using Bytes = uint8_t __attribute__((vector_size(16)));
using BytePairs = uint16_t __attribute__((vector_size(16)));

/// 16 bytes as integers, with their sign or without. By intrinsics, since GCC takes the bytes of a
/// __builtin_convertvector one by one.
template <bool kSigned>
inline VecI widen(const uint8_t* bytes) {
#if defined(__AVX512F__)
  const auto low = load_as<__m128i>(bytes);
  // Of all lanes; of the form without a mask GCC 12 says that it reads what is not there.
  const __m512i wide =
      kSigned ? _mm512_maskz_cvtepi8_epi32(0xffff, low) : _mm512_maskz_cvtepu8_epi32(0xffff, low);
  return load_as<VecI>(&wide);
#elif defined(__AVX2__)
  __m256i wide[2];
  for (int i = 0; i < 2; ++i) {
    int64_t eight;
    std::memcpy(&eight, bytes + int64_t{8} * i, sizeof(eight));
    const __m128i low = _mm_cvtsi64_si128(eight);
    wide[i] = kSigned ? _mm256_cvtepi8_epi32(low) : _mm256_cvtepu8_epi32(low);
  }
  return load_as<VecI>(wide);
#else
  int32_t wide[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    wide[i] = kSigned ? static_cast<int8_t>(bytes[i]) : int32_t{bytes[i]};
  }
  return load_as<VecI>(wide);
#endif
}

/// The 16 codes from `index` on, a multiple of 16, as numbers.
template <KvElement element>
inline Vec decode(const uint8_t* codes, int64_t index) {
  if constexpr (element == KvElement::kInt8) {
    return __builtin_convertvector(widen<true>(codes + index), Vec);
  } else if constexpr (element == KvElement::kFp8) {
    const VecI code = widen<false>(codes + index);
    const VecI bits = (code & 0x7f) << 20 | (code & 0x80) << 24;  // as from_e4m3
    return load_as<Vec>(&bits) * 0x1p120F;
  } else if constexpr (element == KvElement::kInt6) {
    const auto low = load_as<BytePairs>(codes + KvTile::low_of_int6(index));
    const auto high = load_as<BytePairs>(codes + KvTile::high_of_int6(index));
    const BytePairs code = (low >> KvTile::shift_of_int4(index) & 0x0f0f) |
                           (high >> KvTile::shift_of_high(index) & 0x0303) << 4;
    const BytePairs larger_by_32 = code ^ 0x2020;
    const Bytes bytes = load_as<Bytes>(&larger_by_32) - 32;
    return __builtin_convertvector(widen<true>(reinterpret_cast<const uint8_t*>(&bytes)), Vec);
  } else {
    const VecI bytes = widen<false>(codes + KvTile::byte_of_int4(index));
    return __builtin_convertvector(bytes >> KvTile::shift_of_int4(index) & 0xf, Vec);
  }
}

/// Stores 32 elements.
inline void store_run(Vec low, Vec high, float* out) {
  store(out, low);
  store(out + kLanes, high);
}
inline void store_run(Vec low, Vec high, bf16_t* out) {
#if defined(__AVX512BF16__)
  const __m512bh pairs = _mm512_cvtne2ps_pbh(load_as<__m512>(&high), load_as<__m512>(&low));
  std::memcpy(out, &pairs, sizeof(pairs));
#else
  const auto rounded = [](Vec x) {
    const auto bits = load_as<VecU>(&x);
    return __builtin_convertvector((bits + 0x7fffU + (bits >> 16 & 1U)) >> 16, Halves);
  };
  const Halves halves[2] = {rounded(low), rounded(high)};
  std::memcpy(out, halves, sizeof(halves));
#endif
}

/// What the elements of a run of 32 values are multiplied by, or moved by: in run r of a panel of
/// float32 are dims of key r, in one of bfloat16 dims of two keys in turn.
template <class Act>
inline Vec run_of_values(const uint16_t* parameters, int64_t run) {
  if constexpr (sizeof(Act) == 2) {
    const int64_t key = run / 32 * 32 + run % 16 * 2;
    uint32_t pair;
    std::memcpy(&pair, parameters + key, sizeof(pair));
    constexpr VecU kShifts = {16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0};
    const VecU bits = (pair - VecU{}) << kShifts & 0xffff0000U;
    return load_as<Vec>(&bits);
  } else {
    return broadcast(bf16_to_float(parameters[run]));
  }
}

/// Asks for what is read later.
inline void ask_for(const void* data, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) {
    __builtin_prefetch(static_cast<const char*>(data) + byte, 0, 2);
  }
}

/// The codes of a tile of keys in the layout of panel.h. They are exact in bfloat16, since scores
/// are multiplied by the scales. ahead: a tile that comes later.
template <class Act, KvElement element>
inline void decode_keys(const KvTile& tile, const void* data, const void* ahead, int64_t head_dim,
                        Act* out) {
  const auto* codes = static_cast<const uint8_t*>(data);
  ask_for(ahead, tile.bytes);
  const int64_t elements = padded_k<Act>(head_dim) * kKeyTile;
  for (int64_t i = 0; i < elements; i += 2 * kLanes) {
    store_run(decode<element>(codes, i), decode<element>(codes, i + kLanes), out + i);
  }
}

/// The values of a tile in the layout of panel.h.
template <class Act, KvElement element>
inline void decode_values(const KvTile& tile, const void* data, const void* ahead, int64_t cols,
                          Act* out) {
  const auto* codes = static_cast<const uint8_t*>(data);
  const auto* scales = reinterpret_cast<const uint16_t*>(codes + tile.code_bytes);
  ask_for(ahead, tile.bytes);
  int64_t i = 0;
  for (int64_t col = 0; col < cols; col += kPanelCols) {
    const uint16_t* scale_of = scales;
    const uint16_t* zero_of = nullptr;
    if constexpr (element == KvElement::kInt4) {
      scale_of += col / kInt4Group * kKeyTile;
      zero_of = scale_of + tile.groups * kKeyTile;
    }
    for (int64_t run = 0; run < kKeyTile; ++run, i += 2 * kLanes) {
      const Vec scale = run_of_values<Act>(scale_of, run);
      Vec low = decode<element>(codes, i) * scale;
      Vec high = decode<element>(codes, i + kLanes) * scale;
      if constexpr (element == KvElement::kInt4) {
        const Vec zero = run_of_values<Act>(zero_of, run);
        low += zero;
        high += zero;
      }
      store_run(low, high, out + i);
    }
  }
}

/// decode_keys and decode_values of whatever element the tile holds.
template <class Act>
inline void decode_keys(const KvTile& tile, const void* data, const void* ahead, int64_t head_dim,
                        Act* out) {
  switch (tile.element) {
    case KvElement::kInt8:
      return decode_keys<Act, KvElement::kInt8>(tile, data, ahead, head_dim, out);
    case KvElement::kFp8:
      return decode_keys<Act, KvElement::kFp8>(tile, data, ahead, head_dim, out);
    case KvElement::kInt6:
      return decode_keys<Act, KvElement::kInt6>(tile, data, ahead, head_dim, out);
    case KvElement::kInt4:  // holds no keys
    case KvElement::kNative:
      break;
  }
}
template <class Act>
inline void decode_values(const KvTile& tile, const void* data, const void* ahead, int64_t cols,
                          Act* out) {
  switch (tile.element) {
    case KvElement::kInt8:
      return decode_values<Act, KvElement::kInt8>(tile, data, ahead, cols, out);
    case KvElement::kFp8:
      return decode_values<Act, KvElement::kFp8>(tile, data, ahead, cols, out);
    case KvElement::kInt4:
      return decode_values<Act, KvElement::kInt4>(tile, data, ahead, cols, out);
    case KvElement::kInt6:  // holds no values
    case KvElement::kNative:
      break;
  }
}
