#include "problem.h"
#define LISSOM_ISA avx512
#include "ragged_attention.inc"
