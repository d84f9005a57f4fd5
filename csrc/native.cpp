// The plain C ABI of lissom's kernels: which instruction sets there are, which one is used, and one entry per kernel.
#include <atomic>
#include <vector>

#include "pool.h"
#include "problem.h"

namespace {

int best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

int chosen = best_isa();

void attend(const Problem& p, int64_t block, float* scratch) {
#if defined(__x86_64__)
  if (chosen == 2) return avx512::attend(p, block, scratch);
  if (chosen == 1) return avx2::attend(p, block, scratch);
#endif
  portable::attend(p, block, scratch);
}

}  // namespace

extern "C" {

// The best instruction set of this CPU: 0 portable, 1 AVX2, 2 AVX-512.
int lissom_best_isa() { return best_isa(); }

int lissom_get_isa() { return chosen; }

// Use `isa` from now on; returns what is used, which is never above what the CPU has.
int lissom_set_isa(int isa) {
  const int best = best_isa();
  chosen = isa < 0 ? 0 : (isa > best ? best : isa);
  return chosen;
}

// Returns 0, or -1 where a block lies outside the buffers: then nothing is read.
int lissom_ragged_attention(const Problem* problem, int threads) {
  const Problem& p = *problem;
  const int64_t blocks = p.rows * p.kv_heads;
  for (int64_t i = 0; i < blocks; ++i)
    if (p.starts[i] < 0 || p.lengths[i] < 0 || p.starts[i] > p.capacity - p.lengths[i]) return -1;
  const int64_t vectors = p.query_heads / p.kv_heads * p.queries;
  const int64_t floats = vectors * (2 * p.head_dim + 2) + 128 * (p.head_dim + 1);
  int64_t work = 0;
  for (int64_t i = 0; i < blocks; ++i) work += p.lengths[i] * vectors * p.head_dim;
  // Waking a thread costs about as much as some hundred thousand multiply-adds.
  int64_t workers = work / 300000 + 1;
  if (workers > threads) workers = threads;
  if (workers > blocks) workers = blocks;
  std::atomic<int64_t> next{0};
  Pool::run(workers - 1, [&] {
    std::vector<float> scratch(floats);
    for (int64_t block; (block = next.fetch_add(1)) < blocks;) attend(p, block, scratch.data());
  });
  return 0;
}

}  // extern "C"
