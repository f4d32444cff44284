// The CUDA backend's prefill attention on wgmma over a paged cache: checked against double
// precision over many shapes, and timed in TFLOP/s (4 head_dim per visible pair of query and key
// and per head).
// Build: nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -I cpp -I cpp/include
//   benchmarks/cuda_attention.cu cpp/backend/cuda/{attention_prefill_sm90.cu,
//   prefill_schedule_sm90.cc}
// Run: cuda_attention check [PART OF A NAME] | time [--json] | serve; serve times the shape that
// each line of its input names, as cuda_attention.py asks of it.

#include <cstring>
#include <iostream>

#include "backend/cuda/attention_prefill_sm90.h"
#include "cuda_paged_cache.cuh"

namespace longspan::cuda::bench {
namespace {

constexpr int64_t kPoolBytes = int64_t{9} << 30;  // more than 2^32 elements

/// Zeroes the values after a sequence's last key in the last panel, as rotate_append leaves them.
__global__ void zero_value_tails(AttentionArgs args) {
  const SeqView seq = args.plan.seqs[blockIdx.x];
  const int64_t num_keys = seq.first_position + seq.num_rows;
  const int64_t end = (num_keys + kPanelTokens - 1) / kPanelTokens * kPanelTokens;
  for (int64_t key = num_keys; key < end; ++key) {
    const int block = args.plan.block_tables[seq.table + key / args.kv.block_len];
    char* tile = args.kv.key_tile(block, args.layer, blockIdx.y) + args.kv.value.offset;
    for (int chunk = threadIdx.x; chunk < args.kv.row_dim / 8; chunk += blockDim.x) {
      const auto token = static_cast<int>(key % args.kv.block_len);
      *reinterpret_cast<uint4*>(tile + args.kv.value.chunk_offset(token, chunk)) = uint4{};
    }
  }
}

/// The kernel's work over given sequences of a cache.
class Prefill {
 public:
  Prefill(const AttentionArgs& args, const std::vector<PrefillSeq>& seqs) : args_(args) {
    int sms = 0;
    CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
    const PrefillSchedule schedule =
        schedule_prefill_sm90(seqs, args.num_heads, args.kv.num_kv_heads, args.kv.head_dim, sms);
    tiles_ = std::make_unique<DeviceArray<PrefillTile>>(schedule.tiles);
    first_ = std::make_unique<DeviceArray<int32_t>>(schedule.first);
    work_ = {tiles_->get(), first_->get(), static_cast<int32_t>(first_->size() - 1)};
    CUDA_CHECK(prepare_prefill_sm90(args.kv.head_dim));
  }
  void run() const { CUDA_CHECK(attention_prefill_sm90(args_, work_, nullptr)); }

 private:
  AttentionArgs args_;
  std::unique_ptr<DeviceArray<PrefillTile>> tiles_;
  std::unique_ptr<DeviceArray<int32_t>> first_;
  PrefillWorkSm90 work_;
};

std::vector<PrefillSeq> prefill_seqs(const PagedCache& cache) {
  std::vector<PrefillSeq> seqs;
  for (const Seq& seq : cache.seqs()) {
    seqs.push_back({static_cast<int32_t>(seqs.size()), static_cast<int32_t>(seq.num_rows),
                    seq.num_keys - seq.num_rows});
  }
  return seqs;
}

struct Case {
  const char* name;
  Shape shape;
  std::vector<Seq> seqs;  ///< rows, keys
};

const Case kCases[] = {
    {"one head", {128, 1, 1, 64}, {{64, 64}}},
    {"heads 2/1", {128, 2, 1, 64}, {{128, 128}}},
    {"heads 32/8", {128, 32, 8, 64}, {{300, 300}}},
    {"block_len 128", {128, 8, 2, 128}, {{1000, 1000}}},
    {"block_len 256, ragged",
     {128, 8, 2, 256},
     {{1, 1}, {17, 17}, {127, 227}, {129, 192}, {65, 129}, {1, 1001}, {257, 257}}},
    {"heads 3/1, ragged", {128, 3, 1, 64}, {{300, 1077}, {129, 129}, {64, 69}}},
    {"heads 4/4", {128, 4, 4, 64}, {{513, 513}, {200, 4200}}},
    {"heads 16/2", {128, 16, 2, 128}, {{450, 641}}},
    {"8192 rows", {128, 4, 1, 64}, {{8192, 8192}}},
    {"2048 rows behind 30000 keys", {128, 4, 2, 64}, {{2048, 32048}}},
    {"blocks of 300 layers", {128, 4, 1, 64, 300}, {{1000, 31000}, {100, 20100}}},
    {"head_dim 64", {64, 1, 1, 64}, {{64, 64}}},
    {"head_dim 64, heads 9/3", {64, 9, 3, 64}, {{600, 600}}},
    {"head_dim 64, block_len 128, ragged",
     {64, 4, 1, 128},
     {{1, 1}, {17, 17}, {191, 291}, {193, 256}, {65, 129}, {1, 1001}, {385, 385}}},
    {"head_dim 64, heads 4/4, block_len 256", {64, 4, 4, 256}, {{513, 513}, {200, 4200}}},
    {"head_dim 64, 8192 rows", {64, 3, 1, 64}, {{8192, 8192}}},
    {"head_dim 64, 2048 rows behind 30000 keys", {64, 8, 1, 64}, {{2048, 32048}}},
};

bool check(char* pool, const char* only) {
  bool right = true;
  for (const Case& c : kCases) {
    if (std::strstr(c.name, only) == nullptr) continue;
    const PagedCache cache(c.shape, c.seqs, pool, kPoolBytes);
    zero_value_tails<<<dim3(static_cast<uint32_t>(c.seqs.size()), c.shape.num_kv_heads), 16>>>(
        cache.args());
    Prefill(cache.args(), prefill_seqs(cache)).run();
    CUDA_CHECK(cudaDeviceSynchronize());
    const double error = cache.error();
    const bool good = error <= 1;
    right &= good;
    std::printf("%-5s error %.3f of allowed  %s (%.2fe9 elements addressed)\n",
                good ? "ok" : "WRONG", error, c.name,
                static_cast<double>(cache.elements_addressed()) * 1e-9);
    if (!good) std::printf("      %s\n", cache.worst().c_str());
    std::fflush(stdout);
  }
  return right;
}

/// A row's result must be the same bits alone and in company, in one chunk and in several.
bool check_company(char* pool, const Shape& shape) {
  const PagedCache cache(shape, {{1500, 1500}, {777, 2000}}, pool, kPoolBytes);
  zero_value_tails<<<dim3(2, shape.num_kv_heads), 16>>>(cache.args());
  Prefill(cache.args(), prefill_seqs(cache)).run();
  const std::vector<__nv_bfloat16> together = cache.out();

  // The first sequence in chunks, each beside nothing but the second sequence or nothing at all.
  std::vector<SeqView> views(2);
  CUDA_CHECK(cudaMemcpy(views.data(), cache.args().plan.seqs, 2 * sizeof(SeqView),
                        cudaMemcpyDeviceToHost));
  std::vector<SeqView> chunks{views[1]};
  std::vector<PrefillSeq> seqs{{0, views[1].num_rows, views[1].first_position}};
  for (const auto& [begin, end] : {std::pair{0, 100}, {100, 769}, {769, 1500}}) {
    SeqView chunk = views[0];
    chunk.first_row += begin;
    chunk.first_position += begin;
    chunk.num_rows = end - begin;
    seqs.push_back({static_cast<int32_t>(chunks.size()), chunk.num_rows, chunk.first_position});
    chunks.push_back(chunk);
  }
  const DeviceArray<SeqView> chunks_device(chunks);
  AttentionArgs args = cache.args();
  args.plan.seqs = chunks_device.get();
  args.plan.num_seqs = static_cast<int32_t>(chunks.size());
  CUDA_CHECK(cudaMemset(args.out, 0xff, together.size() * 2));
  Prefill(args, {seqs[0], seqs[2]}).run();
  Prefill(args, {seqs[1]}).run();
  Prefill(args, {seqs[3]}).run();
  const std::vector<__nv_bfloat16> apart = cache.out();
  const bool good = std::memcmp(together.data(), apart.data(), together.size() * 2) == 0;
  std::printf("%-5s head_dim %d, heads %d/%d: the same bits in any company and chunks\n",
              good ? "ok" : "WRONG", shape.head_dim, shape.num_heads, shape.num_kv_heads);
  return good;
}

const Case kTimed[] = {
    {"causal-16k", {128, 32, 8, 64}, {{16384, 16384}}},
    {"causal-64k", {128, 32, 8, 64}, {{65536, 65536}}},
    {"causal-128k", {128, 32, 8, 64}, {{131072, 131072}}},
    {"8k-on-64k", {128, 32, 8, 64}, {{8192, 65536}}},
    {"8k-on-128k", {128, 32, 8, 64}, {{8192, 131072}}},
    {"causal-8k-d64", {64, 9, 3, 64}, {{8192, 8192}}},
    {"causal-32k-d64", {64, 9, 3, 64}, {{32768, 32768}}},
};

/// The median launch of at least 5, and of 0.3 s.
void time(const Case& c, char* pool, bool json) {
  const PagedCache cache(c.shape, c.seqs, pool, kPoolBytes, true, 1.0F);
  const Prefill prefill(cache.args(), prefill_seqs(cache));
  cudaEvent_t begin;
  cudaEvent_t end;
  CUDA_CHECK(cudaEventCreate(&begin));
  CUDA_CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  float total = 0;
  prefill.run();
  while (times.size() < 5 || total < 300) {
    CUDA_CHECK(cudaEventRecord(begin));
    prefill.run();
    CUDA_CHECK(cudaEventRecord(end));
    CUDA_CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(ms);
    total += ms;
  }
  CUDA_CHECK(cudaEventDestroy(begin));
  CUDA_CHECK(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  const double ms = times[times.size() / 2];
  const auto rows = static_cast<double>(c.seqs[0].num_rows);
  const auto keys = static_cast<double>(c.seqs[0].num_keys);
  const double pairs = rows * (keys - rows) + rows * (rows + 1) / 2;
  const double tflops = 4.0 * c.shape.head_dim * pairs * c.shape.num_heads / ms * 1e-9;
  std::printf(json ? "{\"shape\": \"%s\", \"ms\": %.4f, \"tflops\": %.1f}\n"
                   : "%-16s %10.3f ms %8.1f TFLOP/s\n",
              c.name, ms, tflops);
  std::fflush(stdout);
}

int run(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  const bool json = argc > 2 && std::strcmp(argv[2], "--json") == 0;
  const DeviceArray<char> pool(kPoolBytes);
  if (mode == "check") {
    bool right = check(pool.get(), argc > 2 ? argv[2] : "");
    right &= check_company(pool.get(), {128, 8, 2, 64});
    right &= check_company(pool.get(), {64, 9, 3, 64});
    return right ? 0 : 1;
  }
  if (mode == "time") {
    for (const Case& c : kTimed) time(c, pool.get(), json);
    return 0;
  }
  if (mode == "serve") {
    std::string name;
    while (std::getline(std::cin, name)) {
      for (const Case& c : kTimed) {
        if (name == c.name) time(c, pool.get(), true);
      }
    }
    return 0;
  }
  std::fprintf(stderr, "usage: cuda_attention check [PART OF A NAME] | time [--json] | serve\n");
  return 2;
}

}  // namespace
}  // namespace longspan::cuda::bench

int main(int argc, char** argv) { return longspan::cuda::bench::run(argc, argv); }
