#define LONGSPAN_ISA kAvx2
#define LONGSPAN_ISA_NAME "avx2"
#include "backend/cpu/isa/kernels.inc"
