#pragma once

#include <span>
#include <string_view>

#include "backend/cpu/attention_task.h"
#include "backend/cpu/gemm_task.h"
#include "backend/cpu/rotate_task.h"
#include "backend/cpu/row_tasks.h"

namespace longspan::cpu {

/// The kernels of one instruction set and one activation dtype. They allocate and throw nothing.
/// isa/ holds their source, compiled once per instruction set.
struct Kernels {
  void (*gemm)(const GemmTask&);
  void (*log_sum_exp)(const LogSumExpTask&);
  void (*rms_norm)(const RmsNormTask&);
  void (*silu_mul)(const SiluMulTask&);
  void (*rotate_append)(const RotateTask&);
  void (*attend)(const AttentionTask&);
  void (*merge_spans)(const MergeTask&);
};

/// Everything one instruction set offers.
struct InstructionSet {
  std::string_view name;  ///< "amx-bf16", "avx512-bf16", "avx512", "avx2", "portable"
  bool fast_bf16;         ///< products of bfloat16 faster than of float32
  Kernels bf16;
  Kernels f32;
};

/// Every instruction set that this CPU has, best first; "portable" is the last.
std::span<const InstructionSet* const> available_instruction_sets();

/// The best one, or the one that the environment variable LONGSPAN_CPU_ISA names.
/// Throws InvalidArgument, listing what is available, when that names none of them.
const InstructionSet& choose_instruction_set();

}  // namespace longspan::cpu
