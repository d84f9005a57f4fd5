#include "problem.h"
#define LISSOM_ISA portable
#include "ragged_attention.inc"
