#define LONGSPAN_ISA kAmxBf16
#define LONGSPAN_ISA_NAME "amx-bf16"
#include "backend/cpu/isa/kernels.inc"
