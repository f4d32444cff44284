#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <ostream>
#include <string>
#include <vector>

#include "backend/cpu/kernels.h"
#include "core/dtype.h"

namespace longspan::cpu {

/// An instruction set and the dtype of what its kernels read and write.
struct KernelCase {
  const InstructionSet* set;
  DType dtype;
  const Kernels& kernels() const { return dtype == DType::kF32 ? set->f32 : set->bf16; }
};

inline void PrintTo(const KernelCase& c, std::ostream* out) {
  *out << c.set->name << " " << name_of(c.dtype);
}

/// Every instruction set of this CPU with either dtype.
inline std::vector<KernelCase> kernel_cases() {
  std::vector<KernelCase> cases;
  for (const InstructionSet* set : available_instruction_sets()) {
    for (const DType dtype : {DType::kBF16, DType::kF32}) cases.push_back({set, dtype});
  }
  return cases;
}

/// As a test's name has it.
inline std::string kernel_case_name(const testing::TestParamInfo<KernelCase>& info) {
  std::string name =
      std::string(info.param.set->name) + "_" + std::string(name_of(info.param.dtype));
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

}  // namespace longspan::cpu
