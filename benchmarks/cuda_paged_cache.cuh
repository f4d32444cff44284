#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend/cuda/attention.h"
#include "backend/cuda/kv_quantize.cuh"
#include "cuda_check.cuh"
#include "cuda_device_array.cuh"
#include "cuda_number.cuh"

/// A paged cache of made-up keys and values in shuffled blocks, and attention over it computed the
/// plain way in double precision. The numbers are a function of where they belong in the sequence,
/// not of where they lie in memory: a kernel that reads the wrong place gets the wrong numbers.
namespace longspan::cuda::bench {

struct Seq {
  int64_t num_rows = 0;
  int64_t num_keys = 0;  ///< with those of its rows
};

struct Shape {
  int head_dim = 128;
  int num_heads = 32;
  int num_kv_heads = 8;
  int block_len = 64;
  int num_layers = 1;
  KvFormat format = KvFormat::kNative;
};

/// What a code stands for, as attention takes it; int4 and native numbers are rounded to bfloat16.
template <KvElement element>
__device__ float meaning(uint32_t code, const KvScale& by) {
  if constexpr (element == KvElement::kNative) {
    return __uint_as_float(code << 16);
  } else if constexpr (element == KvElement::kInt8) {
    return static_cast<float>(static_cast<int8_t>(code)) * by.scale;
  } else if constexpr (element == KvElement::kInt6) {
    return static_cast<float>(static_cast<int>(code ^ 32) - 32) * by.scale;
  } else if constexpr (element == KvElement::kFp8) {
    const auto half = __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(code), __NV_E4M3);
    return __half2float(__half(half)) * by.scale;
  } else {
    return __bfloat162float(__float2bfloat16(fmaf(code, by.scale, by.zero)));
  }
}

/// Writes the keys (what 1) or values (2) of every sequence to the cache, and to `numbers`
/// [key of all sequences][kv_head][head_dim], unless that is null, what they then stand for.
template <KvElement element>
__global__ void fill_tiles(AttentionArgs args, KvTile tile, uint32_t what, const int64_t* num_keys,
                           float* numbers) {
  const int seq = blockIdx.z;
  const int head = blockIdx.y;
  const int dim = args.kv.head_dim;
  constexpr int kBits = bits_of(element);
  constexpr int kGroup = kInt4Group;
  int64_t first_key = 0;
  for (int s = 0; s < seq; ++s) first_key += num_keys[s];
  for (int64_t key = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; key < num_keys[seq];
       key += int64_t{gridDim.x} * blockDim.x) {
    const int block = args.plan.block_tables[args.plan.seqs[seq].table + key / args.kv.block_len];
    const auto token = static_cast<int>(key % args.kv.block_len);
    char* at = args.kv.key_tile(block, args.layer, head);
    auto* scales = reinterpret_cast<__nv_bfloat16*>(at + tile.scales + token * tile.scale_bytes);
    const auto eight = [&](int col) {
      Eight x;
      for (int i = 0; i < 8; ++i) {
        x.x[i] = col < dim ? number(what, seq, static_cast<uint32_t>(key), head, col + i) : 0.0F;
      }
      return x;
    };
    const auto range = [&](int from, int to) {
      KvRange r;
      for (int col = from; col < min(to, dim); col += 8) r.add(eight(col));
      return r.of(element);
    };
    KvScale by;
    if constexpr (element != KvElement::kNative && element != KvElement::kInt4) {
      by = range(0, dim);
      scales[0] = __float2bfloat16(by.scale);
    }
    for (int col = 0; col < args.kv.row_dim; col += 8) {
      if (element == KvElement::kInt4 && col % kGroup == 0) {
        by = range(col, col + kGroup);
        scales[col / kGroup * 2] = __float2bfloat16(by.scale);
        scales[col / kGroup * 2 + 1] = __float2bfloat16(by.zero);
      }
      const Eight x = eight(col);
      const int byte = col * kBits / 8;
      char* to = at + tile.offset + tile.chunk_offset(token, byte / 16) + byte % 16;
      alignas(16) uint32_t words[4];
      if constexpr (element == KvElement::kNative) {
        *reinterpret_cast<uint4*>(words) = to_bf16(x);
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(words);
      } else {
        *reinterpret_cast<uint2*>(words) = quantize8<element>(x, by);
        if constexpr (element == KvElement::kInt4) {
          *reinterpret_cast<uint32_t*>(to) = words[0];
        } else if constexpr (element == KvElement::kInt6) {
          *reinterpret_cast<uint32_t*>(to) = words[0];
          *reinterpret_cast<uint16_t*>(at + tile.high_offset(token, col / 8)) =
              static_cast<uint16_t>(words[1]);
        } else {
          *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(words);
        }
      }
      for (int i = 0; i < 8 && numbers != nullptr && col < dim; ++i) {
        uint32_t code = words[i * kBits / 32] >> (i * kBits % 32) & ((1U << kBits) - 1);
        if constexpr (element == KvElement::kInt6) {
          code |= (words[1] >> KvTile::high_shift(i) & 3) << 4;
        }
        numbers[((first_key + key) * args.kv.num_kv_heads + head) * dim + col + i] =
            meaning<element>(code, by);
      }
    }
  }
}

static __global__ void fill_queries(AttentionArgs args, __nv_bfloat16* q, float scale) {
  const int row = blockIdx.x;
  const int width = args.num_heads * args.kv.head_dim;
  for (int col = threadIdx.x; col < width; col += blockDim.x) {
    q[row * args.q_stride + col] = __float2bfloat16(scale * number(0, 0, row, 0, col));
  }
}

/// One row and head per block. out [rows][2][head_dim]: the result, and the root of the sum of the
/// squares of what it adds up, which says how far rounding weights may move it.
static __global__ void reference_attention(AttentionArgs args, const float* keys_of_all,
                                           const float* values_of_all, const int64_t* num_keys,
                                           double* weights, int64_t max_keys, double* out) {
  __shared__ double shared[256];
  const int row = blockIdx.x;
  const int head = blockIdx.y;
  const int dim = args.kv.head_dim;
  const int kv_head = head / (args.num_heads / args.kv.num_kv_heads);
  const int seq = args.plan.row_seq[row];
  const SeqView view = args.plan.seqs[seq];
  const int64_t keys = view.first_position + (row - view.first_row) + 1;
  double* w = weights + (int64_t{row} * args.num_heads + head) * max_keys;
  const __nv_bfloat16* q = args.q + row * args.q_stride + head * dim;
  int64_t first_key = 0;
  for (int s = 0; s < seq; ++s) first_key += num_keys[s];
  const auto row_of = [&](const float* numbers, int64_t key) {
    return numbers + ((first_key + key) * args.kv.num_kv_heads + kv_head) * dim;
  };
  const auto reduce = [&](double x, bool max) {
    shared[threadIdx.x] = x;
    __syncthreads();
    for (int i = 128; i > 0; i /= 2) {
      if (threadIdx.x < i) {
        const double a = shared[threadIdx.x];
        const double b = shared[threadIdx.x + i];
        shared[threadIdx.x] = max ? fmax(a, b) : a + b;
      }
      __syncthreads();
    }
    const double result = shared[0];
    __syncthreads();
    return result;
  };

  double largest = -INFINITY;
  for (int64_t key = threadIdx.x; key < keys; key += 256) {
    double s = 0;
    const float* k = row_of(keys_of_all, key);
    for (int c = 0; c < dim; ++c) s += double{__bfloat162float(q[c])} * k[c];
    w[key] = s * view.scale_log2;
    largest = fmax(largest, w[key]);
  }
  largest = reduce(largest, true);
  double total = 0;
  for (int64_t key = threadIdx.x; key < keys; key += 256) {
    w[key] = exp2(w[key] - largest);
    total += w[key];
  }
  total = reduce(total, false);
  double* to = out + (int64_t{row} * args.num_heads + head) * 2 * dim;
  for (int c = 0; c < dim; ++c) {
    double sum = 0;
    double squares = 0;
    for (int64_t key = threadIdx.x; key < keys; key += 256) {
      const double x = w[key] / total * row_of(values_of_all, key)[c];
      sum += x;
      squares += x * x;
    }
    sum = reduce(sum, false);
    squares = reduce(squares, false);
    if (threadIdx.x == 0) {
      to[c] = sum;
      to[dim + c] = sqrt(squares);
    }
  }
}

/// Sequences whose blocks lie shuffled anywhere in a pool of `pool_bytes`, with their queries,
/// numbers of [-query_scale, query_scale): the larger, the fewer keys a row attends to. What no key
/// fills is NaN, stale tokens of a last block included.
class PagedCache {
 public:
  PagedCache(const Shape& shape, const std::vector<Seq>& seqs, char* pool, int64_t pool_bytes,
             bool fill = true, float query_scale = 6.0F)
      : shape_(shape),
        seqs_(seqs),
        num_rows_(std::accumulate(seqs.begin(), seqs.end(), int64_t{0},
                                  [](int64_t n, const Seq& s) { return n + s.num_rows; })),
        q_(static_cast<size_t>(num_rows_ * width())),
        out_(static_cast<size_t>(num_rows_ * width())) {
    args_.kv = KvLayout::of(
        {shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.block_len, shape.format},
        pool);
    std::vector<int32_t> ids(static_cast<size_t>(pool_bytes / args_.kv.block_bytes));
    std::iota(ids.begin(), ids.end(), 0);
    std::shuffle(ids.begin(), ids.end(), std::mt19937(1));
    std::vector<SeqView> views;
    std::vector<int32_t> row_seq;
    std::vector<int64_t> num_keys;
    int64_t table = 0;
    for (const Seq& seq : seqs) {
      SeqView view;
      view.first_position = seq.num_keys - seq.num_rows;
      view.table = table;
      view.first_row = static_cast<int32_t>(row_seq.size());
      view.num_rows = static_cast<int32_t>(seq.num_rows);
      view.scale_log2 = 1.4426950408889634F / std::sqrt(static_cast<float>(shape.head_dim));
      row_seq.insert(row_seq.end(), static_cast<size_t>(seq.num_rows),
                     static_cast<int32_t>(views.size()));
      views.push_back(view);
      num_keys.push_back(seq.num_keys);
      table += (seq.num_keys + shape.block_len - 1) / shape.block_len;
    }
    if (table > static_cast<int64_t>(ids.size())) {
      std::fprintf(stderr, "expected a pool of %lld blocks, got %zu\n",
                   static_cast<long long>(table), ids.size());
      std::exit(1);
    }
    ids.resize(static_cast<size_t>(table));
    last_block_ = *std::max_element(ids.begin(), ids.end());
    views_ = std::make_unique<DeviceArray<SeqView>>(views);
    tables_ = std::make_unique<DeviceArray<int32_t>>(ids);
    row_seq_ = std::make_unique<DeviceArray<int32_t>>(row_seq);
    args_.plan.seqs = views_->get();
    args_.plan.block_tables = tables_->get();
    args_.plan.row_seq = row_seq_->get();
    args_.plan.num_seqs = static_cast<int32_t>(seqs.size());
    args_.plan.num_tokens = static_cast<int32_t>(num_rows_);
    args_.layer = shape.num_layers - 1;
    args_.q = q_.get();
    args_.out = out_.get();
    args_.q_stride = args_.out_stride = width();
    args_.num_heads = shape.num_heads;
    if (!fill) return;
    CUDA_CHECK(cudaMemset(pool, 0xff, static_cast<size_t>(pool_bytes)));
    CUDA_CHECK(cudaMemset(out_.get(), 0xff, out_.size() * 2));
    num_keys_ = std::make_unique<DeviceArray<int64_t>>(num_keys);
    write_cache(nullptr, nullptr);
    fill_queries<<<static_cast<uint32_t>(num_rows_), 256>>>(args_, q_.get(), query_scale);
    CUDA_CHECK(cudaDeviceSynchronize());
  }

  const AttentionArgs& args() const { return args_; }
  const Shape& shape() const { return shape_; }
  const std::vector<Seq>& seqs() const { return seqs_; }
  int64_t width() const { return int64_t{shape_.num_heads} * shape_.head_dim; }
  std::vector<__nv_bfloat16> out() const { return out_.download(); }
  /// Elements of the pool up to the last block in use.
  int64_t elements_addressed() const { return (last_block_ + 1) * args_.kv.block_bytes / 2; }

  /// The largest error of `out`, 1 being what rounding accounts for: half a unit in the last place
  /// of the result, twice over, and four times the likely effect of rounding each weight to
  /// bfloat16. NaN when a value is.
  double error() const {
    int64_t max_keys = 0;
    for (const Seq& seq : seqs_) max_keys = std::max(max_keys, seq.num_keys);
    const auto rows = static_cast<size_t>(num_rows_ * shape_.num_heads);
    const int64_t num_keys =
        std::accumulate(seqs_.begin(), seqs_.end(), int64_t{0},
                        [](int64_t n, const Seq& s) { return n + s.num_keys; });
    const auto elements = static_cast<size_t>(num_keys * shape_.num_kv_heads * shape_.head_dim);
    const DeviceArray<float> keys(elements);
    const DeviceArray<float> values(elements);
    write_cache(keys.get(), values.get());
    const DeviceArray<double> weights(rows * static_cast<size_t>(max_keys));
    const DeviceArray<double> expected_device(rows * 2 * static_cast<size_t>(shape_.head_dim));
    reference_attention<<<dim3(static_cast<uint32_t>(num_rows_), shape_.num_heads), 256>>>(
        args_, keys.get(), values.get(), num_keys_->get(), weights.get(), max_keys,
        expected_device.get());
    CUDA_CHECK(cudaDeviceSynchronize());
    const std::vector<double> expected = expected_device.download();
    const std::vector<__nv_bfloat16> got = out();
    const auto dim = static_cast<size_t>(shape_.head_dim);
    double worst = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      const double want = expected[i / dim * 2 * dim + i % dim];
      const double noise = expected[i / dim * 2 * dim + dim + i % dim];
      const double error = std::abs(double{__bfloat162float(got[i])} - want) /
                           (std::abs(want) * 0x1p-8 + noise * 0x1p-7 + 1e-5);
      if (!(error <= worst)) {
        worst = error;
        worst_at_ = i;
        worst_pair_[0] = __bfloat162float(got[i]);
        worst_pair_[1] = want;
        if (std::isnan(error)) break;
      }
    }
    return worst;
  }
  /// Where the last error() was, to find its cause.
  std::string worst() const {
    char text[160];
    const auto w = static_cast<size_t>(width());
    const auto dim = static_cast<size_t>(shape_.head_dim);
    std::snprintf(text, sizeof text, "row %zu head %zu col %zu: got %g, expected %g", worst_at_ / w,
                  worst_at_ % w / dim, worst_at_ % dim, worst_pair_[0], worst_pair_[1]);
    return text;
  }

 private:
  void write_cache(float* keys, float* values) const {
    const dim3 grid(256, shape_.num_kv_heads, static_cast<uint32_t>(seqs_.size()));
    const auto write = [&](const KvTile& tile, uint32_t what, float* numbers) {
      const auto kernel = tile.element == KvElement::kNative ? fill_tiles<KvElement::kNative>
                          : tile.element == KvElement::kInt8 ? fill_tiles<KvElement::kInt8>
                          : tile.element == KvElement::kFp8  ? fill_tiles<KvElement::kFp8>
                          : tile.element == KvElement::kInt6 ? fill_tiles<KvElement::kInt6>
                                                             : fill_tiles<KvElement::kInt4>;
      kernel<<<grid, 256>>>(args_, tile, what, num_keys_->get(), numbers);
    };
    write(args_.kv.key, 1, keys);
    write(args_.kv.value, 2, values);
  }

  Shape shape_;
  std::vector<Seq> seqs_;
  int64_t num_rows_;
  DeviceArray<__nv_bfloat16> q_;
  DeviceArray<__nv_bfloat16> out_;
  std::unique_ptr<DeviceArray<SeqView>> views_;
  std::unique_ptr<DeviceArray<int32_t>> tables_;
  std::unique_ptr<DeviceArray<int32_t>> row_seq_;
  std::unique_ptr<DeviceArray<int64_t>> num_keys_;
  AttentionArgs args_;
  int64_t last_block_ = 0;
  mutable size_t worst_at_ = 0;
  mutable double worst_pair_[2] = {};
};

}  // namespace longspan::cuda::bench
