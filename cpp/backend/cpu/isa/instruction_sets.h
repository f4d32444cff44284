#pragma once

#include "backend/cpu/kernels.h"

namespace longspan::cpu {

// Each is defined by the source file of its name, compiled with that instruction set's flags.
extern const InstructionSet kPortable;
#ifdef __x86_64__
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
extern const InstructionSet kAvx512Bf16;
extern const InstructionSet kAmxBf16;
#endif

}  // namespace longspan::cpu
