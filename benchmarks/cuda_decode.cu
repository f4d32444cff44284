// The CUDA backend's decode attention and its mma.sync prefill attention: first checked against
// double precision over many shapes, then timed, decode in bytes of the cache read per second
// beside a copy on the same card, prefill in TFLOP/s (a causal pair counts once). The claim: decode
// at 128k keys, batch 1, and at 32k, batch 16, reads at 90 % of the copy's rate at least; at 80 %
// of a quantised cache, at 65 % of int4.
// Build: nvcc -std=c++20 -O3 --expt-relaxed-constexpr -arch=native -I cpp -I cpp/include
// benchmarks/cuda_decode.cu
//   cpp/backend/cuda/{attention_decode.cu,attention_prefill_mma.cu,dequantize_kv.cu,
//   decode_spans.cc,prefill_tiles.cc}; run: cuda_decode [--json] [--check]

#include <cstring>

#include "backend/cuda/attention_decode.h"
#include "backend/cuda/attention_prefill_mma.h"
#include "backend/cuda/dequantize_kv.h"
#include "backend/cuda/prefill_tiles.h"
#include "cuda_paged_cache.cuh"

namespace longspan::cuda::bench {
namespace {

/// The work of a cache's sequences: those of at most `decode_rows` rows decode, others prefill.
class Attention {
 public:
  Attention(const PagedCache& cache, int64_t decode_rows) : cache_(cache) {
    std::vector<DecodeSeq> decode;
    std::vector<PrefillSeq> prefill;
    int64_t max_keys = 0;
    for (const Seq& seq : cache.seqs()) {
      const auto index = static_cast<int32_t>(decode.size() + prefill.size());
      const auto rows = static_cast<int32_t>(seq.num_rows);
      if (seq.num_rows <= decode_rows) {
        decode.push_back({index, rows, seq.num_keys});
        max_keys = std::max(max_keys, seq.num_keys);
      } else {
        prefill.push_back({index, rows, seq.num_keys - seq.num_rows});
      }
    }
    CUDA_CHECK(plan_decode(cache.args().kv, &launch_));
    const Shape& shape = cache.shape();
    const DecodeSpans list(decode, shape.num_heads, shape.num_kv_heads, launch_.grid);
    const DecodeSizes sizes = max_decode_sizes(static_cast<int64_t>(decode.size()), decode_rows,
                                               max_keys, shape.num_heads, shape.num_kv_heads);
    if (static_cast<int64_t>(list.spans().size()) > sizes.spans ||
        static_cast<int64_t>(list.merges().size()) > sizes.merges ||
        list.partial_rows() > sizes.partial_rows) {
      std::fprintf(stderr, "a work list is larger than max_decode_sizes says\n");
      std::exit(1);
    }
    const std::vector<DecodeCounts> counts{
        {static_cast<int32_t>(list.spans().size()), static_cast<int32_t>(list.merges().size())}};
    std::vector<PrefillTile> tiles;
    append_prefill_tiles(prefill, shape.num_heads, &tiles);
    num_tiles_ = static_cast<int32_t>(tiles.size());
    spans_ = std::make_unique<DeviceArray<DecodeSpan>>(list.spans());
    merges_ = std::make_unique<DeviceArray<DecodeMerge>>(list.merges());
    counts_ = std::make_unique<DeviceArray<DecodeCounts>>(counts);
    tiles_ = std::make_unique<DeviceArray<PrefillTile>>(tiles);
    const auto partial_rows = static_cast<size_t>(list.partial_rows());
    partial_out_ =
        std::make_unique<DeviceArray<float>>(partial_rows * static_cast<size_t>(shape.head_dim));
    partial_lse_ = std::make_unique<DeviceArray<float>>(partial_rows);
    work_ = {spans_->get(), merges_->get(), counts_->get(), partial_out_->get(),
             partial_lse_->get()};
    CUDA_CHECK(prepare_prefill_mma(shape.head_dim));
  }

  void decode() const { CUDA_CHECK(attention_decode(cache_.args(), work_, launch_, nullptr)); }
  void prefill() const {
    CUDA_CHECK(attention_prefill_mma(cache_.args(), tiles_->get(), num_tiles_, nullptr));
  }

 private:
  const PagedCache& cache_;
  std::unique_ptr<DeviceArray<DecodeSpan>> spans_;
  std::unique_ptr<DeviceArray<DecodeMerge>> merges_;
  std::unique_ptr<DeviceArray<DecodeCounts>> counts_;
  std::unique_ptr<DeviceArray<PrefillTile>> tiles_;
  std::unique_ptr<DeviceArray<float>> partial_out_;
  std::unique_ptr<DeviceArray<float>> partial_lse_;
  DecodeWork work_;
  DecodeLaunch launch_;
  int32_t num_tiles_ = 0;
};

struct Pool {
  static constexpr int64_t kBytes = int64_t{9} << 30;  // more than 2^32 elements
  DeviceArray<char> memory{kBytes};
};

std::string describe(const Shape& shape, const std::vector<Seq>& seqs) {
  std::string text = "D " + std::to_string(shape.head_dim) + ", heads " +
                     std::to_string(shape.num_heads) + "/" + std::to_string(shape.num_kv_heads) +
                     ", block_len " + std::to_string(shape.block_len) + ", KV " +
                     std::string(name_of(shape.format)) + ", rows@keys";
  for (const Seq& seq : seqs) {
    text += " " + std::to_string(seq.num_rows) + "@" + std::to_string(seq.num_keys);
  }
  return text;
}

constexpr KvFormat kQuantized[] = {KvFormat::kInt8, KvFormat::kFp8, KvFormat::kInt8Fp8,
                                   KvFormat::kInt8Int4, KvFormat::kInt4};

struct Case {
  Shape shape;
  int64_t decode_rows;  ///< sequences of at most so many rows decode
  std::vector<Seq> seqs;
};

const Case kCases[] = {
    {{128, 32, 8, 64}, 1, {{1, 1}, {1, 15}, {1, 16}, {1, 17}, {1, 511}, {1, 512}, {1, 513}}},
    {{128, 32, 8, 64, 3}, 4, {{1, 70001}, {1, 33000}, {4, 4097}, {3, 3}, {2, 32769}}},
    {{128, 32, 8, 256, 5}, 1, {{1, 5000}, {1, 255}, {1, 257}, {200, 1500}}},
    {{64, 9, 3, 64}, 5, {{1, 2049}, {5, 700}, {1, 64}, {2, 1026}, {300, 300}}},
    {{64, 16, 1, 128}, 2, {{1, 3001}, {2, 2000}, {129, 129}}},
    {{80, 8, 8, 64}, 16, {{1, 1000}, {16, 1041}, {17, 40}, {130, 3000}}},
    {{96, 24, 8, 128}, 1, {{1, 20000}, {100, 20100}}},
    {{192, 16, 2, 64}, 1, {{1, 2500}, {257, 600}}},
    {{256, 16, 4, 64}, 2, {{1, 9000}, {2, 1023}, {200, 777}}},
    {{256, 8, 8, 128}, 1, {{1, 40000}, {64, 333}}},
    {{8, 4, 2, 64}, 1, {{1, 777}, {70, 100}}},
    {{128, 40, 2, 64}, 1, {{1, 6000}, {33, 200}}},  // groups of 20: two runs of pairs
    {{128, 32, 8, 64}, 1, {{512, 4096}, {128, 128}, {127, 1000}, {2, 5}, {1, 6000}}},
};

/// Checked in every quantised format, decoding only.
const Case kQuantizedCases[] = {
    {{128, 32, 8, 64}, 1, {{1, 1}, {1, 15}, {1, 16}, {1, 17}, {1, 511}, {1, 512}, {1, 513}}},
    {{128, 32, 8, 64, 3}, 4, {{1, 70001}, {1, 33000}, {4, 4097}, {3, 3}, {2, 32769}}},
    {{64, 9, 3, 256, 2}, 5, {{1, 2049}, {5, 700}, {1, 64}, {2, 1026}}},
    {{80, 8, 8, 128}, 16, {{1, 1000}, {16, 1041}}},
    {{256, 16, 4, 64}, 2, {{1, 9000}, {2, 1023}}},
    {{8, 4, 2, 64}, 1, {{1, 777}}},
};

bool check(Pool& pool) {
  bool right = true;
  std::vector<Case> cases(std::begin(kCases), std::end(kCases));
  for (const KvFormat format : kQuantized) {
    for (Case c : kQuantizedCases) {
      c.shape.format = format;
      cases.push_back(c);
    }
  }
  for (const Case& c : cases) {
    const PagedCache cache(c.shape, c.seqs, pool.memory.get(), Pool::kBytes);
    const Attention attention(cache, c.decode_rows);
    attention.decode();
    attention.prefill();
    CUDA_CHECK(cudaDeviceSynchronize());
    const double error = cache.error();
    const bool good = error <= 1;
    right &= good;
    std::printf("%-5s error %.3f of allowed  %s (%.2fe9 elements addressed)\n",
                good ? "ok" : "WRONG", error, describe(c.shape, c.seqs).c_str(),
                static_cast<double>(cache.elements_addressed()) * 1e-9);
    if (!good) std::printf("      %s\n", cache.worst().c_str());
    std::fflush(stdout);
  }
  return right;
}

/// A sequence's result must be the same bits alone and in company.
bool check_company(Pool& pool) {
  const Shape shape;
  const std::vector<Seq> alone{{1, 40001}};
  const std::vector<Seq> together{{1, 40001}, {1, 100}, {2, 9000}, {1, 70000}};
  std::vector<__nv_bfloat16> rows[2];
  for (int i = 0; i < 2; ++i) {
    const PagedCache cache(shape, i == 0 ? alone : together, pool.memory.get(), Pool::kBytes);
    Attention(cache, 2).decode();
    CUDA_CHECK(cudaDeviceSynchronize());
    rows[i] = cache.out();
    rows[i].resize(static_cast<size_t>(cache.width()));
  }
  const bool same = std::memcmp(rows[0].data(), rows[1].data(), rows[0].size() * 2) == 0;
  std::printf("%-5s the same bits alone and in company\n", same ? "ok" : "WRONG");
  return same;
}

/// The median of several runs of `launches` calls, in seconds per call.
template <class Fn>
double seconds(int launches, Fn fn) {
  cudaEvent_t start;
  cudaEvent_t stop;
  CUDA_CHECK(cudaEventCreate(&start));
  CUDA_CHECK(cudaEventCreate(&stop));
  std::vector<float> times(7);
  fn();
  for (float& time : times) {
    CUDA_CHECK(cudaEventRecord(start));
    for (int i = 0; i < launches; ++i) fn();
    CUDA_CHECK(cudaEventRecord(stop));
    CUDA_CHECK(cudaEventSynchronize(stop));
    CUDA_CHECK(cudaEventElapsedTime(&time, start, stop));
  }
  std::nth_element(times.begin(), times.begin() + 3, times.end());
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  return 1e-3 * times[3] / launches;
}

struct Result {
  std::string name;
  double seconds;
  double rate;
  const char* unit;
  double least = 0;  ///< rate claimed
};

std::vector<Result> measure(Pool& pool) {
  std::vector<Result> results;
  constexpr size_t kCopy = size_t{1} << 30;
  char* memory = pool.memory.get();
  const double copy = seconds(5, [&] {
    CUDA_CHECK(cudaMemcpyAsync(memory + kCopy, memory, kCopy, cudaMemcpyDeviceToDevice));
  });
  const double copy_rate = 2e-9 * kCopy / copy;
  results.push_back({"copy of 1 GiB", copy, copy_rate, "GB/s"});

  const auto decode = [&](const Shape& shape, int64_t batch, int64_t keys, double claim = 0) {
    const PagedCache cache(shape, std::vector<Seq>(static_cast<size_t>(batch), {1, keys}), memory,
                           Pool::kBytes);
    const Attention attention(cache, 1);
    const double time = seconds(20, [&] { attention.decode(); });
    const KvLayout& kv = cache.args().kv;
    const double bytes =
        static_cast<double>(batch * keys) * shape.num_kv_heads * kv.head_bytes / kv.block_len;
    results.push_back(
        {"decode D " + std::to_string(shape.head_dim) + " heads " +
             std::to_string(shape.num_heads) + "/" + std::to_string(shape.num_kv_heads) + " keys " +
             std::to_string(keys) + " batch " + std::to_string(batch) + " block_len " +
             std::to_string(shape.block_len) + " KV " + std::string(name_of(shape.format)),
         time, bytes * 1e-9 / time, "GB/s", claim * copy_rate});
  };
  decode({}, 1, 131072, 0.9);
  decode({}, 16, 32768, 0.9);
  decode({}, 64, 2048);
  decode({}, 1, 2048);
  decode({}, 1, 100000);
  decode({64, 32, 8}, 1, 131072);
  decode({256, 16, 4}, 1, 131072);
  decode({128, 32, 8, 256}, 1, 131072);
  for (const KvFormat format : kQuantized) {
    const double claim = format == KvFormat::kInt4 ? 0.65 : 0.8;
    decode({.format = format}, 1, 131072, claim);
    decode({.format = format}, 16, 32768, claim);
    decode({.format = format}, 1, 2048);
    decode({.head_dim = 64, .format = format}, 1, 131072);
  }

  // What a prefill pays per KV head of a quantised cache: its bytes and those in bfloat16.
  for (const KvFormat format : kQuantized) {
    constexpr int64_t kKeys = 131072;
    const PagedCache cache({.format = format}, {{1, kKeys}}, memory, Pool::kBytes);
    DequantizeKvArgs args;
    args.plan = cache.args().plan;
    args.from = cache.args().kv;
    args.to = KvLayout::of({1, 1, args.from.head_dim, kPanelTokens});
    args.num_panels = kKeys / kPanelTokens;
    const DeviceArray<char> to(static_cast<size_t>(args.num_panels * args.to.block_bytes));
    args.to.pool = to.get();
    const DeviceArray<SeqView> staged(std::vector<SeqView>(1));
    const DeviceArray<int32_t> seqs(std::vector<int32_t>{0});
    args.staged = staged.get();
    args.seqs = seqs.get();
    args.num_seqs = 1;
    const double time = seconds(20, [&] { CUDA_CHECK(dequantize_kv(args, nullptr)); });
    const double bytes = static_cast<double>(args.num_panels) *
                         static_cast<double>(args.from.head_bytes + args.to.block_bytes);
    results.push_back({"dequantize a head of " + std::to_string(kKeys) + " keys, KV " +
                           std::string(name_of(format)),
                       time, bytes * 1e-9 / time, "GB/s"});
  }

  const auto prefill = [&](const Shape& shape, int64_t rows, int64_t keys) {
    const PagedCache cache(shape, {{rows, keys}}, memory, Pool::kBytes);
    const Attention attention(cache, 0);
    const double time = seconds(1, [&] { attention.prefill(); });
    const double pairs = static_cast<double>(rows) *
                         (static_cast<double>(keys) - static_cast<double>(rows - 1) / 2.0);
    results.push_back({"prefill D " + std::to_string(shape.head_dim) + " heads " +
                           std::to_string(shape.num_heads) + "/" +
                           std::to_string(shape.num_kv_heads) + " rows " + std::to_string(rows) +
                           " keys " + std::to_string(keys),
                       time, 4e-12 * pairs * shape.num_heads * shape.head_dim / time, "TFLOP/s"});
  };
  prefill({}, 16384, 16384);
  prefill({}, 65536, 65536);
  prefill({}, 8192, 65536);
  prefill({64, 32, 8}, 16384, 16384);
  prefill({96, 32, 8}, 16384, 16384);
  prefill({192, 16, 4}, 16384, 16384);
  prefill({256, 16, 4}, 16384, 16384);
  return results;
}

}  // namespace
}  // namespace longspan::cuda::bench

int main(int argc, char** argv) {
  using namespace longspan::cuda::bench;
  bool json = false;
  bool check_only = false;
  for (int i = 1; i < argc; ++i) {
    json |= std::strcmp(argv[i], "--json") == 0;
    check_only |= std::strcmp(argv[i], "--check") == 0;
  }
  cudaDeviceProp device;
  CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
  Pool pool;
  if (!json) {
    std::printf("%s, %d SMs\n", device.name, device.multiProcessorCount);
    if (!check(pool) || !check_company(pool)) return 1;
  }
  if (check_only) return 0;
  const std::vector<Result> results = measure(pool);
  if (json) std::printf("{\"device\": \"%s\", \"results\": [\n", device.name);
  for (size_t i = 0; i < results.size(); ++i) {
    const Result& r = results[i];
    if (json) {
      std::printf("  {\"name\": \"%s\", \"seconds\": %.4e, \"rate\": %.1f, \"unit\": \"%s\"}%s\n",
                  r.name.c_str(), r.seconds, r.rate, r.unit, i + 1 < results.size() ? "," : "");
    } else {
      std::printf("%-66s %10.1f us %8.1f %s\n", r.name.c_str(), r.seconds * 1e6, r.rate, r.unit);
    }
  }
  if (json) std::printf("]}\n");
  const auto missed = [](const Result& r) { return r.rate < r.least; };
  return std::any_of(results.begin(), results.end(), missed) ? 1 : 0;
}
