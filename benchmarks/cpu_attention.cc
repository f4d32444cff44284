// Attention of one layer in the CPU backend, in thread CPU time: prefill in nanoseconds per (query,
// key, head) pair, decode in bytes of the cache read per second. One thread, every instruction set.
// Build: cmake --build BUILD --target cpu_attention; run: cpu_attention [instruction set]

#include <time.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>

#include "backend/cpu/attention.h"
#include "backend/cpu/kv_tiles.h"
#include "backend/cpu/rotate_append.h"

namespace longspan::cpu {
namespace {

double thread_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

constexpr AttentionShape kSmolLm2{9, 3, 64};
constexpr int64_t kLayers = 8;  // more cache than the second level holds
constexpr int64_t kChunk = 512;
constexpr int64_t kMaxKeys = 16384;

class Bench {
 public:
  Bench(const Kernels& kernels, DType dtype, const AttentionShape& shape)
      : kernels_(kernels),
        dtype_(dtype),
        shape_(shape),
        pool_(1),
        plan_({kChunk, 1, kMaxKeys / 64}, shape, 1),
        qkv_data_(allocate_host(kChunk * qkv_cols() * 4)),
        q_data_(allocate_host(kChunk * q_cols() * 4)),
        out_data_(allocate_host(kChunk * q_cols() * 4)) {
    cache_.shape = {kLayers, shape.num_kv_heads, shape.head_dim, 64};
    cache_.num_blocks = kMaxKeys / 64;
    cache_.block_bytes = KvTiles(cache_.shape, dtype).block_bytes();
    cache_.pool = allocate_host(cache_.num_blocks * cache_.block_bytes);
    uint32_t bits = 1;
    for (int64_t i = 0; i < kChunk * qkv_cols(); ++i) {
      bits = bits * 1664525 + 1013904223;
      qkv_data_.as<float>()[i] = static_cast<float>(bits >> 8) * 0x1p-23F - 1.0F;
    }
    for (int64_t first = 0; first < kMaxKeys; first += kChunk) {
      plan(first, kChunk);
      for (int64_t layer = 0; layer < kLayers; ++layer) append(layer);
    }
  }

  void plan(int64_t first, int64_t tokens) {
    StepInput input;
    input.token_ids.resize(static_cast<size_t>(tokens));
    input.cu_seqlens = {0, tokens};
    input.first_position = {first};
    input.block_tables.resize(1);
    input.block_tables[0].resize(static_cast<size_t>((first + tokens + 63) / 64));
    std::iota(input.block_tables[0].begin(), input.block_tables[0].end(), 0);
    auto profile = std::make_shared<RopeProfile>();
    for (int64_t i = 0; i < shape_.head_dim / 2; ++i) {
      profile->inv_freq.push_back(1.0 / static_cast<double>(1 + i));
    }
    input.profiles = {profile};
    tokens_ = tokens;
    plan_.plan(input, cache_.shape.context(), pool_);
  }
  void append(int64_t layer) {
    rotate_append(kernels_, pool_, plan_, layer,
                  {qkv_data_.data(), DType::kF32, tokens_, qkv_cols(), qkv_cols()}, nullptr, cache_,
                  {q_data_.data(), dtype_, tokens_, q_cols(), q_cols()});
  }
  void attend(int64_t layer) {
    attention(kernels_, pool_, plan_, layer, {q_data_.data(), dtype_, tokens_, q_cols(), q_cols()},
              cache_, {out_data_.data(), dtype_, tokens_, q_cols(), q_cols()}, nullptr);
  }

  /// The least of several runs of fn, in seconds.
  template <class Fn>
  static double least(int runs, Fn fn) {
    double best = 1e9;
    for (int i = 0; i < runs; ++i) {
      const double start = thread_seconds();
      fn();
      best = std::min(best, thread_seconds() - start);
    }
    return best;
  }

  void report(const char* name) {
    std::printf("%-12s %-8s prefill ns/pair at", name, std::string(name_of(dtype_)).c_str());
    for (const int64_t end : {int64_t{2048}, int64_t{8192}, kMaxKeys}) {
      plan(end - kChunk, kChunk);
      append(0);
      const double pairs = static_cast<double>(kChunk * shape_.num_heads) *
                           (static_cast<double>(end) - kChunk / 2.0);
      std::printf("  %lld: %.3f", static_cast<long long>(end),
                  least(3, [&] { attend(0); }) / pairs * 1e9);
    }
    const double append_ns = least(5, [&] { append(0); }) / kChunk * 1e9;
    plan(8191, 1);
    append(0);
    for (int64_t layer = 1; layer < kLayers; ++layer) append(layer);
    const double decode = least(5, [&] {
      for (int64_t layer = 0; layer < kLayers; ++layer) attend(layer);
    });
    const double bytes = static_cast<double>(2 * kLayers * 8192 * shape_.num_kv_heads *
                                             shape_.head_dim * size_of(dtype_));
    std::printf("  decode at 8192: %.1f GB/s  append: %.0f ns/token\n", bytes / decode * 1e-9,
                append_ns);
    std::fflush(stdout);
  }

 private:
  int64_t q_cols() const { return shape_.num_heads * shape_.head_dim; }
  int64_t qkv_cols() const { return q_cols() + 2 * shape_.num_kv_heads * shape_.head_dim; }

  const Kernels& kernels_;
  DType dtype_;
  AttentionShape shape_;
  ThreadPool pool_;
  CpuStepPlan plan_;
  KvCache cache_;
  Buffer qkv_data_;
  Buffer q_data_;
  Buffer out_data_;
  int64_t tokens_ = 0;
};

}  // namespace
}  // namespace longspan::cpu

int main(int argc, char** argv) {
  using namespace longspan::cpu;
  for (const InstructionSet* set : available_instruction_sets()) {
    if (argc > 1 && set->name != argv[1]) continue;
    Bench(set->bf16, longspan::DType::kBF16, kSmolLm2).report(set->name.data());
    Bench(set->f32, longspan::DType::kF32, kSmolLm2).report(set->name.data());
  }
}
