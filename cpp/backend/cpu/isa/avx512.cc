#define LONGSPAN_ISA kAvx512
#define LONGSPAN_ISA_NAME "avx512"
#include "backend/cpu/isa/kernels.inc"
