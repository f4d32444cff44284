#include "backend/cpu/isa/instruction_sets.h"

#include <cstdlib>
#include <string>
#include <vector>

#include "core/check.h"

#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace longspan::cpu {
namespace {

#ifdef __x86_64__

/// AMX state must be asked for, once per process, before its first use (Linux 5.16 on).
bool may_use_amx() {
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

/// Whether the CPU has AMX with bfloat16; this gcc's __builtin_cpu_supports does not know it.
bool has_amx_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned kTiles = 1U << 24;
  constexpr unsigned kBf16 = 1U << 22;
  return (d & kTiles) != 0 && (d & kBf16) != 0;
}

std::vector<const InstructionSet*> find_available() {
  std::vector<const InstructionSet*> found;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (avx512_bf16 && has_amx_bf16() && may_use_amx()) found.push_back(&kAmxBf16);
  if (avx512_bf16) found.push_back(&kAvx512Bf16);
  if (avx512) found.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&kAvx2);
  found.push_back(&kPortable);
  return found;
}

#else

std::vector<const InstructionSet*> find_available() { return {&kPortable}; }

#endif

}  // namespace

std::span<const InstructionSet* const> available_instruction_sets() {
  static const std::vector<const InstructionSet*> available = find_available();
  return available;
}

const InstructionSet& choose_instruction_set() {
  const char* wanted = std::getenv("LONGSPAN_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return *available_instruction_sets().front();
  std::string names;
  for (const InstructionSet* set : available_instruction_sets()) {
    if (set->name == wanted) return *set;
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  throw InvalidArgument(
      message("LONGSPAN_CPU_ISA: expected one of ", names, ", got \"", wanted, "\""));
}

}  // namespace longspan::cpu
