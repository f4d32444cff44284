// Products of the linear layers of SmolLM2-135M on one CPU thread, against what this CPU can do.
// Times are CPU seconds of the thread, the least of several runs, so that other programs count
// little. LONGSPAN_CPU_ISA picks the instruction set.

#include <immintrin.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <memory>
#include <numeric>
#include <vector>

#include "backend/cpu/convert.h"
#include "backend/cpu/linear.h"

namespace longspan::cpu {
namespace {

double thread_seconds() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

/// The least seconds of a call.
double least_seconds(int runs, const std::function<void()>& fn) {
  double least = 1e30;
  for (int i = 0; i < runs; ++i) {
    const double start = thread_seconds();
    fn();
    least = std::min(least, thread_seconds() - start);
  }
  return least;
}

constexpr int kRounds = 20000;

/// Four independent tile products a round, 16 x 16 x 32 multiply-adds each.
void run_tiles() {
  alignas(64) unsigned char config[64] = {1};
  for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
  asm volatile("ldtilecfg %0" ::"m"(config));
  for (int i = 0; i < kRounds; ++i) {
    asm volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0\n\ttdpbf16ps %tmm7, %tmm4, %tmm1\n\t"
        "tdpbf16ps %tmm6, %tmm5, %tmm2\n\ttdpbf16ps %tmm7, %tmm5, %tmm3");
  }
  asm volatile("tilerelease");
}

/// Twelve independent chains of dot products of bfloat16 pairs, or of float32 multiply-adds.
__attribute__((target("avx512f,avx512bf16"))) void run_pairs() {
  __m512 sums[12] = {};
  const __m512bh x = {};
  for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
    for (auto& sum : sums) {
      sum = _mm512_dpbf16_ps(sum, x, x);
      asm volatile("" : "+v"(sum));
    }
  }
}
__attribute__((target("avx512f"))) void run_fma512() {
  __m512 sums[12] = {};
  const __m512 x = {};
  for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
    for (auto& sum : sums) {
      sum = _mm512_fmadd_ps(x, x, sum);
      asm volatile("" : "+v"(sum));
    }
  }
}
__attribute__((target("avx2,fma"))) void run_fma256() {
  __m256 sums[12] = {};
  const __m256 x = {};
  for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
    for (auto& sum : sums) {
      sum = _mm256_fmadd_ps(x, x, sum);
      asm volatile("" : "+x"(sum));
    }
  }
}

/// Operations per second with every operand in a register; 0 where there is no such measurement.
double peak_flops(std::string_view isa, DType dtype) {
  struct Peak {
    void (*run)();
    double flops;  // a round
  };
  Peak peak{};
  if (dtype == DType::kBF16 && isa == "amx-bf16") {
    peak = {run_tiles, 4 * 2.0 * 16 * 16 * 32};
  } else if (dtype == DType::kBF16 && isa == "avx512-bf16") {
    peak = {run_pairs, 12 * 2.0 * 32};
  } else if (isa.starts_with("avx512") || isa == "amx-bf16") {
    peak = {run_fma512, 12 * 2.0 * 16};
  } else if (isa == "avx2") {
    peak = {run_fma256, 12 * 2.0 * 8};
  } else {
    return 0;
  }
  return kRounds * peak.flops / least_seconds(20, peak.run);
}

/// Adds up words, a multiple of 8 of them, with the widest loads there are.
__attribute__((target_clones("arch=skylake-avx512", "avx2", "default"))) uint64_t
add_words(const uint64_t* words, int64_t count) {
  uint64_t lanes[32] = {};
  for (int64_t i = 0; i + 32 <= count; i += 32) {
    for (int64_t lane = 0; lane < 32; ++lane) lanes[lane] += words[i + lane];
  }
  return std::accumulate(lanes, lanes + 32, uint64_t{0});
}

using Weights = std::vector<std::unique_ptr<CpuPackedLinear>>;

/// Bytes per second of a loop that only reads the weights.
double read_rate(const Weights& weights, int64_t bytes) {
  volatile uint64_t sum = 0;  // the loop must run
  const double seconds = least_seconds(3, [&] {
    for (const auto& weight : weights) {
      sum = sum + add_words(static_cast<const uint64_t*>(weight->panel(0)), bytes / 8);
    }
  });
  return static_cast<double>(bytes) * static_cast<double>(weights.size()) / seconds;
}

/// Values neither zero nor alike: the tile unit is slower on them than on zeros.
std::vector<float> some_values(int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  uint32_t bits = 1;
  for (float& value : values) {
    bits = bits * 1664525 + 1013904223;
    value = static_cast<float>(bits >> 8) * 0x1p-23F - 1.0F;
  }
  return values;
}

void measure(const InstructionSet& set, DType dtype) {
  const Kernels& kernels = dtype == DType::kF32 ? set.f32 : set.bf16;
  const double peak = peak_flops(set.name, dtype);
  std::printf("%s, %s: %.0f GFLOP/s with operands in registers\n", set.name.data(),
              name_of(dtype).data(), peak / 1e9);
  ThreadPool pool(1);
  struct Shape {
    int64_t k, n;
  };
  for (const auto& [k, n] : {Shape{576, 960}, {576, 576}, {576, 3072}, {1536, 576}, {576, 49152}}) {
    const std::vector<float> values = some_values(k * n);
    const WeightView view{values.data(), DType::kF32, n, k, k, "weight"};
    const int64_t bytes = CpuPackedLinear::bytes(dtype, n, k);
    // Copies enough that a decoding step finds none in the second-level cache.
    Weights weights;
    for (int64_t held = 0; held < (int64_t{64} << 20); held += bytes) {
      weights.push_back(
          std::make_unique<CpuPackedLinear>(dtype, std::span(&view, 1), std::span<WeightView>{}));
    }
    const Buffer x = allocate_host(512 * k * size_of(dtype));
    const std::vector<float> inputs = some_values(512 * k);
    for (int64_t i = 0; i < 512 * k; ++i) {
      if (dtype == DType::kF32) {
        x.as<float>()[i] = inputs[static_cast<size_t>(i)];
      } else {
        x.as<bf16_t>()[i] = from_float<bf16_t>(inputs[static_cast<size_t>(i)]);
      }
    }
    const Buffer y = allocate_host(512 * n * 4);
    const auto multiply = [&](int64_t m, const CpuPackedLinear& weight) {
      linear(kernels, pool, {x.data(), dtype, m, k, k}, weight, {y.data(), DType::kF32, m, n, n});
    };
    std::printf("  K %4ld N %5ld:", k, n);
    if (n > 9999) {  // a head: no logits are kept of many rows
      const Buffer workspace = allocate_host(score_workspace_bytes(1));
      const std::vector<int32_t> targets(512, 7);
      std::vector<PartialScore> scores(512);
      const double seconds = least_seconds(5, [&] {
        score(kernels, pool, {x.data(), dtype, 512, k, k}, *weights[0], 0, targets,
              workspace.as<float>(), scores);
      });
      std::printf("  NLL of 512 rows %.0f GFLOP/s",
                  2.0 * 512 * static_cast<double>(n * k) / seconds / 1e9);
    }
    for (const int64_t m : {512, 64, 16}) {
      if (n > 9999) break;
      const double flops = 2.0 * static_cast<double>(m * n * k);
      const double seconds = least_seconds(40, [&] { multiply(m, *weights[0]); });
      std::printf("  M %3ld %5.0f GFLOP/s (%3.0f%%)", m, flops / seconds / 1e9,
                  peak > 0 ? 100 * flops / seconds / peak : 0.0);
    }
    const double seconds = least_seconds(3, [&] {
      for (const auto& weight : weights) multiply(1, *weight);
    });
    const double rate = static_cast<double>(bytes) * static_cast<double>(weights.size()) / seconds;
    std::printf("  M 1 %5.1f GB/s (%3.0f%% of a read loop)\n", rate / 1e9,
                100 * rate / read_rate(weights, bytes));
  }
}

}  // namespace
}  // namespace longspan::cpu

int main() {
  const auto& set = longspan::cpu::choose_instruction_set();
  longspan::cpu::measure(set, longspan::DType::kBF16);
  longspan::cpu::measure(set, longspan::DType::kF32);
}
