// The arguments of every kernel, and the table of kernels that each instruction set's build provides.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// See ragged_attention.inc.
struct RaggedAttention {
  const void *query, *keys, *values;  // float or bfloat16
  void* out;
  const float* bias;     // per entry, or null
  const uint8_t* mask;   // [rows][queries][masked] for the last `masked` entries of each block, or null = causal
  const int64_t *starts, *lengths;  // per block
  int64_t rows, query_heads, kv_heads, queries, head_dim, masked, capacity;
  float scale;
  bool is_bfloat16;
};

enum Reduction : int64_t { kRms = 0, kMean = 1, kMax = 2 };

// See attention_statistics.inc.
struct AttentionStatistics {
  const float* query;            // [heads][queries][head_dim]
  const float *keys, *values;    // [heads][entries][head_dim]; values may be null
  const float* bias;             // [heads][entries]
  const int64_t *positions, *query_positions;  // [heads][entries], [queries]; null: every query sees every entry
  const float* elsewhere;        // [heads][queries], or null
  float *top, *mass, *outputs;   // [heads][queries], the same, [heads][queries][head_dim] (null without values)
  float *scores, *largest;       // [heads][chunks][entries], of each chunk of queries
  int64_t heads, queries, entries, head_dim, chunk, reduction;
  float scale;
};

struct Kernels {
  void (*attend)(const RaggedAttention&, int64_t block, float* scratch);
  int64_t panel;  // columns of a packed panel
  void (*pack)(const AttentionStatistics&, int64_t head, float* keys, float* values);
  int64_t (*scratch)(const AttentionStatistics&);  // floats that `summarise` needs
  void (*summarise)(const AttentionStatistics&, int64_t head, int64_t chunk, const float* keys, const float* values,
                    float* scratch);
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
