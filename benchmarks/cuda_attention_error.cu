// Claim: attention over a million keys is right: 256 rows of 3 layers under all 32 heads, as the
// engine's own ops form them, differ from double precision by no more than rounding accounts for,
// in every format of the KV cache, by each prefill kernel and by decode. The input has what
// attention of trained models has: planted keys that every other row attends to, a first key that
// all rows look at, dims far from zero in all keys.
//
// Two errors of each: from double precision over what the cache's codes stand for, the kernel's
// own, which is held against a limit; and over the numbers before they were codes, what the format
// costs besides, which is reported only. An error is that of a row under a head, relative to the
// length of the row expected: "rms" over all, and the worst.
//
// The cache is filled by the backend's rotate_append in steps, as a prompt is; at each eighth of
// the sequence the step's rows attend, and 32 of them once more as decodes of one row. At 4096 keys
// or fewer the reference is itself compared with loops on the host over the blocks as they are
// exported. A GPU of compute capability 9.0 with 20 GB at 1,000,000 keys, of which the cache
// takes 12.3; some 10 s on an H200, predicted. Run: cuda_attention_error [KEYS], 4096 to 2,000,000;
// prints a JSON object a line. It needs cuBLASLt, as the backend does.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "backend/cuda/cuda_backend.h"
#include "backend/kv_rows.h"
#include "cuda_attention_input.cuh"
#include "cuda_attention_reference.cuh"

namespace longspan::cuda::bench {
namespace {

constexpr int kLayers = 3;
constexpr int kHeads = 32;
constexpr int kKvHeads = 8;
constexpr int kDim = kReferenceDim;
constexpr int64_t kWidth = kHeads * kDim;
constexpr int64_t kQkvWidth = (kHeads + 2 * kKvHeads) * kDim;
constexpr int64_t kBlockLen = 64;
constexpr int64_t kFillRows = 8192;
constexpr int kDepths = 8;
constexpr int kChunkRows = 256;   // that attend at a depth
constexpr int kSampledRows = 32;  // of them
constexpr int kRows = kDepths * kSampledRows;
constexpr int64_t kCheckedKeys = 4096;

/// Sampled row i of those that attend at a depth: in every place of eight, the last one included.
constexpr int sampled_row(int i) { return i * (kChunkRows / kSampledRows) + i % 8; }

enum Kernel { kPrefill, kPrefillInt8, kPrefillInt8Fp8, kDecode, kNumKernels };
constexpr const char* kKernelNames[] = {"prefill", "prefill int8", "prefill int8_fp8", "decode"};

struct Error {
  double rms = 0;
  double worst = 0;
};

/// What rounding accounts for, the root mean square and the worst of 24,576 rows.
/// Weights and the result are rounded to bfloat16, each off by 2^-9 at most: 2^-8 together, twice
/// that at worst. Tensor cores cut off sums, up to half of 2^-23 of them at each step of 16 keys;
/// decode sums over short spans, where that is nothing. Keys that are rounded to bfloat16 on their
/// way from codes, 0.0011 of an element (rms), move a score by 0.0011 sqrt(sum of (q k)^2 / 128):
/// 0.003 of most keys and up to 0.008 of the first one, whose elements are larger; a weight moves
/// as much, and a row whose other weights share what the first leaves moves by that of the first:
/// twice as much is allowed, and four times that at worst. Elements of the same code are off by the
/// same: codes of e4m3 and of six bits are so few that what they do to the first key, whose
/// products add up with one sign, does not average out, and at worst twice as much is allowed. In
/// bytes, elements are off by up to half of 1/127 of the largest of a row or a panel, 0.0075 of a
/// key and 0.012 to 0.02 of a query (rms), and scores by 0.02, that of the first key by 0.05; both
/// by five times as much at worst. In e4m3, weights and values are off by 0.026 of themselves
/// besides (rms), 2^-4 at worst, and results by both: their own sum is what weights are divided by.
/// The first key's weight is 2^20 of others', and e4m3 has 18 powers of two: the 127 others of its
/// step are lost beside it, and so much of what a row of few keys is to see, for the first one's
/// value is 0.
Error limit_of(KvFormat format, Kernel kernel, int64_t num_keys) {
  const bool rounds_keys = kernel != kDecode && format != KvFormat::kNative;
  const double cut = kernel == kDecode ? 0 : static_cast<double>(num_keys) / 16 * 0x1p-24;
  if (kernel == kPrefillInt8) return {0.06 + cut, 0.3 + cut};
  if (kernel == kPrefillInt8Fp8) {
    const auto least = static_cast<double>(num_keys / kDepths - kChunkRows);  // that a row sees
    const double lost = std::sqrt(127 / least);
    return {0.08 + lost / 2, 0.4 + lost};
  }
  const bool few_codes = format == KvFormat::kFp8 || format == KvFormat::kInt4;
  if (rounds_keys) return {0x1p-6 + cut, (few_codes ? 0x1p-3 : 0x1p-4) + cut};
  return {0x1p-8 + cut, 0x1p-7 + cut};
}

/// Results of one layer, or what was expected: [kRows][kHeads][kDim].
using Rows = std::vector<double>;

Error error_of(const std::vector<Rows>& got, const std::vector<Rows>& expected) {
  Error result;
  double sum = 0;
  size_t count = 0;
  for (size_t layer = 0; layer < got.size(); ++layer) {
    for (size_t i = 0; i < got[layer].size(); i += kDim) {
      double errors = 0;
      double squares = 0;
      for (size_t c = i; c < i + kDim; ++c) {
        const double error = got[layer][c] - expected[layer][c];
        errors += error * error;
        squares += expected[layer][c] * expected[layer][c];
      }
      sum += errors / squares;
      ++count;
      // Of a NaN too.
      if (!(errors / squares <= result.worst)) result.worst = errors / squares;
    }
  }
  return {std::sqrt(sum / static_cast<double>(count)), std::sqrt(result.worst)};
}

bool is_within(const Error& error, const Error& limit) {
  return error.rms <= limit.rms && error.worst <= limit.worst;
}

/// One sequence in a cache of a format, and what the engine's ops make of its rows.
class Sequence {
 public:
  Sequence(CudaBackend& backend, KvFormat format, int64_t num_keys)
      : backend_(backend),
        qkv_(static_cast<size_t>(kFillRows * kQkvWidth)),
        q_(static_cast<size_t>(kFillRows * kWidth)),
        out_(static_cast<size_t>(kChunkRows * kWidth)),
        decode_q_(static_cast<size_t>(kSampledRows * kWidth)),
        blocks_(static_cast<size_t>((num_keys + kBlockLen - 1) / kBlockLen)) {
    cache_.shape = {kLayers, kKvHeads, kDim, kBlockLen, format};
    cache_.num_blocks = static_cast<int64_t>(blocks_.size());
    cache_.block_bytes = backend.kv_block_bytes(cache_.shape);
    cache_.pool = backend.allocate(cache_.num_blocks * cache_.block_bytes);
    // What nobody has written must do no harm.
    CUDA_CHECK(cudaMemset(cache_.pool.data(), 0xff, static_cast<size_t>(cache_.pool.bytes())));
    std::iota(blocks_.begin(), blocks_.end(), 0);
    std::shuffle(blocks_.begin(), blocks_.end(), std::mt19937(1));
    table_ = std::make_unique<DeviceArray<int32_t>>(blocks_);
    // Keys as they are: what rotation does is not in question.
    profile_ = std::make_shared<RopeProfile>();
    profile_->inv_freq.assign(kDim / 2, 0.0);
    limits_ = {kFillRows, 1, cache_.num_blocks, kBlockLen, format, PrefillAttention::kNative};
    plans_[kPrefill] = backend.make_step_plan(limits_, kShape);
    limits_.prefill_attention = PrefillAttention::kInt8;
    plans_[kPrefillInt8] = backend.make_step_plan(limits_, kShape);
    limits_.prefill_attention = PrefillAttention::kInt8Fp8;
    plans_[kPrefillInt8Fp8] = backend.make_step_plan(limits_, kShape);
    limits_ = {kSampledRows, kSampledRows, cache_.num_blocks, kBlockLen, format};
    plans_[kDecode] = backend.make_step_plan(limits_, kShape);
    for (int layer = 0; layer < kLayers; ++layer) {
      queries_.push_back(
          std::make_unique<DeviceArray<__nv_bfloat16>>(static_cast<size_t>(kRows * kWidth)));
    }
    for (auto& results : results_) results.resize(kLayers);
    int64_t filled = 0;
    for (int depth = 1; depth <= kDepths; ++depth) {
      const int64_t attending = num_keys * depth / kDepths - kChunkRows;
      while (filled < attending) {
        const int64_t rows = std::min(kFillRows, attending - filled);
        append(filled, rows);
        filled += rows;
      }
      attend(filled);
      filled += kChunkRows;
    }
  }

  const std::vector<Rows>& results(Kernel kernel) const { return results_[kernel]; }

  /// In double precision, over what the codes stand for.
  std::vector<Rows> expected() const {
    const DeviceArray<int64_t> positions(positions_);
    std::vector<Rows> layers;
    for (int layer = 0; layer < kLayers; ++layer) {
      layers.push_back(reference_rows({KvLayout::of(cache_.shape, cache_.pool.data()), layer,
                                       table_->get(), queries_[static_cast<size_t>(layer)]->get(),
                                       positions.get(), kRows, kHeads}));
    }
    return layers;
  }

  /// The largest relative error of some of the expected rows, by plain loops on the host.
  double error_of_expected(const std::vector<Rows>& expected) {
    double worst = 0;
    const HostKeys keys(*this);
    for (int layer = 0; layer < kLayers; ++layer) {
      const auto queries = queries_[static_cast<size_t>(layer)]->download();
      for (int row = layer; row < kRows; row += 37) {
        for (int head = row % 4; head < kHeads; head += 4) {
          const int64_t at = row * kWidth + head * kDim;
          const auto first = expected[static_cast<size_t>(layer)].begin() + at;
          const Rows got(first, first + kDim);
          const Rows want = keys.attention(queries.data() + at, layer, head / (kHeads / kKvHeads),
                                           positions_[static_cast<size_t>(row)] + 1);
          const double error = error_of({got}, {want}).worst;
          if (!(error <= worst)) worst = error;
        }
      }
    }
    return worst;
  }

 private:
  static constexpr AttentionShape kShape = {kHeads, kKvHeads, kDim};

  /// All blocks, as the backend exports them.
  class HostKeys {
   public:
    explicit HostKeys(const Sequence& sequence)
        : rows_(sequence.cache_.shape, DType::kBF16, kBlockLen) {
      for (const int32_t block : sequence.blocks_) {
        blocks_.emplace_back(static_cast<size_t>(rows_.bytes()));
        sequence.backend_.export_kv_block(sequence.cache_, block, kBlockLen, blocks_.back());
      }
    }

    Rows attention(const __nv_bfloat16* q, int layer, int kv_head, int64_t num_keys) const {
      Rows out(kDim);
      double total = 0;
      for (int64_t key = 0; key < num_keys; ++key) {
        double score = 0;
        for (int c = 0; c < kDim; ++c) {
          score += double{__bfloat162float(q[c])} * at(KvPart::kKeys, layer, kv_head, key, c);
        }
        const double weight = std::exp(score / std::sqrt(double{kDim}));
        total += weight;
        for (int c = 0; c < kDim; ++c) {
          out[static_cast<size_t>(c)] += weight * at(KvPart::kValues, layer, kv_head, key, c);
        }
      }
      for (double& x : out) x /= total;
      return out;
    }

   private:
    double at(KvPart part, int layer, int kv_head, int64_t key, int c) const {
      const std::byte* block = blocks_[static_cast<size_t>(key / kBlockLen)].data();
      const int64_t token = key % kBlockLen;
      const KvPart parameters =
          part == KvPart::kKeys ? KvPart::kKeyParameters : KvPart::kValueParameters;
      const auto* row = reinterpret_cast<const uint8_t*>(rows_.head(block, part, layer, kv_head)) +
                        token * rows_.row_bytes(part);
      const auto* by = reinterpret_cast<const uint16_t*>(
          rows_.head(block, parameters, layer, kv_head) + token * rows_.row_bytes(parameters));
      const KvFormat format = rows_.shape().format;
      switch (part == KvPart::kKeys ? key_element(format) : value_element(format)) {
        case KvElement::kInt8:
        case KvElement::kInt6:
          return static_cast<int8_t>(row[c]) * double{bf16_to_float(by[0])};
        case KvElement::kFp8:
          return double{from_e4m3(row[c])} * bf16_to_float(by[0]);
        case KvElement::kInt4:
          return (row[c / 2] >> (c % 2 * 4) & 15) * double{bf16_to_float(by[c / 32 * 2])} +
                 bf16_to_float(by[c / 32 * 2 + 1]);
        case KvElement::kNative:
          break;
      }
      return bf16_to_float(reinterpret_cast<const uint16_t*>(row)[c]);
    }

    KvRows rows_;
    std::vector<std::vector<std::byte>> blocks_;
  };

  /// A step of runs of `rows` rows each, at these positions.
  StepInput step(const std::vector<int64_t>& positions, int64_t rows) const {
    StepInput input;
    input.cu_seqlens.push_back(0);
    for (const int64_t position : positions) {
      input.token_ids.resize(input.token_ids.size() + static_cast<size_t>(rows));
      input.cu_seqlens.push_back(input.num_tokens());
      input.first_position.push_back(position);
      const int64_t blocks = (position + rows + kBlockLen - 1) / kBlockLen;
      input.block_tables.emplace_back(blocks_.begin(), blocks_.begin() + blocks);
      input.profiles.push_back(profile_);
    }
    return input;
  }

  static MatrixView view(const DeviceArray<__nv_bfloat16>& matrix, int64_t rows, int64_t cols) {
    return {matrix.get(), DType::kBF16, rows, cols, cols};
  }

  /// Queries, keys and values of the rows from `first` on; the keys and values into the cache.
  void append_layer(int layer, int64_t first, int64_t rows, bool with_queries) {
    make_rows({layer, first, rows, kHeads, kKvHeads, with_queries}, qkv_.get());
    CUDA_CHECK(cudaDeviceSynchronize());
    backend_.rotate_append(*plans_[kPrefill], layer, view(qkv_, rows, kQkvWidth), nullptr, cache_,
                           view(q_, rows, kWidth));
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaDeviceSynchronize());
  }

  void append(int64_t first, int64_t rows) {
    backend_.plan_step(*plans_[kPrefill], step({first}, rows), cache_);
    for (int layer = 0; layer < kLayers; ++layer) append_layer(layer, first, rows, false);
  }

  /// Appends kChunkRows rows and lets them attend by every kernel.
  void attend(int64_t first) {
    std::vector<int64_t> sampled;
    for (int i = 0; i < kSampledRows; ++i) sampled.push_back(first + sampled_row(i));
    const size_t done = positions_.size();
    positions_.insert(positions_.end(), sampled.begin(), sampled.end());
    backend_.plan_step(*plans_[kPrefill], step({first}, kChunkRows), cache_);
    backend_.plan_step(*plans_[kPrefillInt8], step({first}, kChunkRows), cache_);
    backend_.plan_step(*plans_[kPrefillInt8Fp8], step({first}, kChunkRows), cache_);
    backend_.plan_step(*plans_[kDecode], step(sampled, 1), cache_);
    for (int layer = 0; layer < kLayers; ++layer) {
      append_layer(layer, first, kChunkRows, true);
      for (int i = 0; i < kSampledRows; ++i) {
        const __nv_bfloat16* from = q_.get() + sampled_row(i) * kWidth;
        for (__nv_bfloat16* to :
             {decode_q_.get() + i * kWidth, queries_[static_cast<size_t>(layer)]->get() +
                                                (static_cast<int64_t>(done) + i) * kWidth}) {
          CUDA_CHECK(cudaMemcpy(to, from, kWidth * 2, cudaMemcpyDeviceToDevice));
        }
      }
      CUDA_CHECK(cudaDeviceSynchronize());
      for (const Kernel kernel : {kPrefill, kPrefillInt8, kPrefillInt8Fp8, kDecode}) {
        const bool decodes = kernel == kDecode;
        const int64_t rows = decodes ? kSampledRows : kChunkRows;
        // A row that nobody writes is NaN.
        CUDA_CHECK(cudaMemset(out_.get(), 0xff, out_.size() * 2));
        CUDA_CHECK(cudaDeviceSynchronize());
        backend_.attention(*plans_[kernel], layer, view(decodes ? decode_q_ : q_, rows, kWidth),
                           cache_, view(out_, rows, kWidth), nullptr);
        CUDA_CHECK(cudaDeviceSynchronize());
        const std::vector<__nv_bfloat16> out = out_.download();
        Rows& results = results_[kernel][static_cast<size_t>(layer)];
        for (int i = 0; i < kSampledRows; ++i) {
          const __nv_bfloat16* row = out.data() + (decodes ? i : sampled_row(i)) * kWidth;
          for (int64_t c = 0; c < kWidth; ++c) results.push_back(__bfloat162float(row[c]));
        }
      }
    }
  }

  CudaBackend& backend_;
  KvCache cache_;
  StepLimits limits_;
  std::shared_ptr<RopeProfile> profile_;
  std::unique_ptr<StepPlan> plans_[kNumKernels];
  DeviceArray<__nv_bfloat16> qkv_;       // [kFillRows][kQkvWidth]
  DeviceArray<__nv_bfloat16> q_;         // [kFillRows][kWidth]
  DeviceArray<__nv_bfloat16> out_;       // [kChunkRows][kWidth]
  DeviceArray<__nv_bfloat16> decode_q_;  // [kSampledRows][kWidth]
  std::vector<int32_t> blocks_;
  std::unique_ptr<DeviceArray<int32_t>> table_;                       // blocks_
  std::vector<std::unique_ptr<DeviceArray<__nv_bfloat16>>> queries_;  // [layer][kRows][kWidth]
  std::vector<int64_t> positions_;                                    // [kRows]
  std::vector<Rows> results_[kNumKernels];                            // [layer]
};

bool run(int64_t num_keys) {
  cudaDeviceProp device;
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  CudaBackend backend(0);
  bool right = true;
  std::vector<Rows> before_codes;  // what the native format stands for
  for (const KvFormat format : {KvFormat::kNative, KvFormat::kInt8, KvFormat::kFp8,
                                KvFormat::kInt8Fp8, KvFormat::kInt8Int4, KvFormat::kInt4}) {
    Sequence sequence(backend, format, num_keys);
    const std::vector<Rows> expected = sequence.expected();
    if (format == KvFormat::kNative) before_codes = expected;
    if (num_keys <= kCheckedKeys) {
      const double error = sequence.error_of_expected(expected);
      const bool good = error <= 1e-12;
      right &= good;
      std::printf("{\"keys\": %lld, \"format\": \"%s\", \"reference_error\": %.3g, \"ok\": %s}\n",
                  static_cast<long long>(num_keys), std::string(name_of(format)).c_str(), error,
                  good ? "true" : "false");
    }
    for (const Kernel kernel : {kPrefill, kPrefillInt8, kPrefillInt8Fp8, kDecode}) {
      const Error error = error_of(sequence.results(kernel), expected);
      const Error format_error = error_of(sequence.results(kernel), before_codes);
      const Error limit = limit_of(format, kernel, num_keys);
      const bool good = is_within(error, limit);
      right &= good;
      std::printf(
          "{\"gpu\": \"%s\", \"keys\": %lld, \"rows\": %d, \"format\": \"%s\", \"kernel\": \"%s\", "
          "\"rms\": %.5f, \"worst\": %.5f, \"limit_rms\": %.5f, \"limit_worst\": %.5f, "
          "\"rms_with_format\": %.5f, \"worst_with_format\": %.5f, \"ok\": %s}\n",
          device.name, static_cast<long long>(num_keys), kRows * kLayers * kHeads,
          std::string(name_of(format)).c_str(), kKernelNames[kernel], error.rms, error.worst,
          limit.rms, limit.worst, format_error.rms, format_error.worst, good ? "true" : "false");
      std::fflush(stdout);
    }
  }
  return right;
}

}  // namespace
}  // namespace longspan::cuda::bench

int main(int argc, char** argv) {
  const int64_t num_keys = argc > 1 ? std::atoll(argv[1]) : 1000000;
  if (argc > 2 || num_keys < 4096 || num_keys > 2000000) {
    std::fprintf(stderr, "usage: cuda_attention_error [KEYS], 4096 to 2000000\n");
    return 2;
  }
  return longspan::cuda::bench::run(num_keys) ? 0 : 1;
}
