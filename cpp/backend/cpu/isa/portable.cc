#define LONGSPAN_ISA kPortable
#define LONGSPAN_ISA_NAME "portable"
#include "backend/cpu/isa/kernels.inc"
