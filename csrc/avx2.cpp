#include "kernels.h"
#define LISSOM_ISA avx2
#define LISSOM_LANES 8  // floats of a vector register
#define LISSOM_WIDE 2   // registers side by side in the tile of a matrix product
#include "build.inc"
