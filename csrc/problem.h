// The arguments of one attention call, shared by every instruction set's build of the kernel.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct Problem {
  const void *query, *keys, *values;  // float or bfloat16
  void* out;
  const float* bias;     // per entry, or null
  const uint8_t* mask;   // [rows][queries][masked] for the last `masked` entries of each block, or null = causal
  const int64_t *starts, *lengths;  // per block
  int64_t rows, query_heads, kv_heads, queries, head_dim, masked, capacity;
  float scale;
  bool is_bfloat16;
};

#define LISSOM_DECLARE(isa) \
  namespace isa {           \
  void attend(const Problem& p, int64_t block, float* scratch); \
  }
LISSOM_DECLARE(portable)
LISSOM_DECLARE(avx2)
LISSOM_DECLARE(avx512)
