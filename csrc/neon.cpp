#include "kernels.h"
#define LISSOM_ISA neon
#define LISSOM_LANES 4  // floats of a vector register
#define LISSOM_WIDE 4   // registers side by side in the tile of a matrix product
#include "build.inc"
