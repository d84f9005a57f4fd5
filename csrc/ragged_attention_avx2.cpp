#include "problem.h"
#define LISSOM_ISA avx2
#include "ragged_attention.inc"
