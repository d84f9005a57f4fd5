#include "kernels.h"
#define LISSOM_ISA portable
#define LISSOM_LANES 4  // floats of a vector register
#define LISSOM_WIDE 2   // registers side by side in the tile of a matrix product
#include "build.inc"
