#define LONGSPAN_ISA kAvx512Bf16
#define LONGSPAN_ISA_NAME "avx512-bf16"
#include "backend/cpu/isa/kernels.inc"
