// The plain C ABI of lissom's kernels: which instruction sets there are, which one is used, and one entry per kernel.
#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#include "kernels.h"
#include "pool.h"

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

const Kernels& kernels() {
#if defined(__x86_64__)
  if (chosen == 2) return avx512::kernels;
  if (chosen == 1) return avx2::kernels;
#endif
  return portable::kernels;
}

// Runs `work(unit, scratch)` for all units below `units` on at most `workers` threads, each with `floats` of scratch,
// which is allocated here: memory may only be missing before the pool begins.
template <typename Work>
void share_out(int64_t units, int64_t workers, int64_t floats, const Work& work) {
  workers = std::max<int64_t>(1, std::min(workers, units));
  std::vector<float> scratch(workers * floats);
  std::atomic<int64_t> next{0}, worker{0};
  Pool::run(workers - 1, [&] {
    float* own = scratch.data() + worker.fetch_add(1) * floats;
    for (int64_t unit; (unit = next.fetch_add(1)) < units;) work(unit, own);
  });
}

// What a kernel returns where there is not enough memory.
template <typename Kernel>
int guarded(const Kernel& kernel) {
  try {
    return kernel();
  } catch (const std::bad_alloc&) {
    return -2;
  }
}

// Returns 0, or -1 where a block lies outside the buffers: then nothing is read.
int ragged_attention(const RaggedAttention& p, int threads) {
  const int64_t blocks = p.rows * p.kv_heads;
  for (int64_t i = 0; i < blocks; ++i)
    if (p.starts[i] < 0 || p.lengths[i] < 0 || p.starts[i] > p.capacity - p.lengths[i]) return -1;
  const int64_t vectors = p.query_heads / p.kv_heads * p.queries;
  const int64_t floats = vectors * (2 * p.head_dim + 2) + 128 * (p.head_dim + 1);
  int64_t work = 0;
  for (int64_t i = 0; i < blocks; ++i) work += p.lengths[i] * vectors * p.head_dim;
  // Waking a thread costs about as much as some hundred thousand multiply-adds.
  const int64_t workers = std::min<int64_t>(work / 300000 + 1, threads);
  const Kernels& isa = kernels();
  share_out(blocks, workers, floats, [&](int64_t block, float* scratch) { isa.attend(p, block, scratch); });
  return 0;
}

int attention_statistics(const AttentionStatistics& s, int threads) {
  const Kernels& isa = kernels();
  const auto padded = [&](int64_t columns) { return (columns + isa.panel - 1) / isa.panel * isa.panel; };
  const int64_t keys = padded(s.entries) * s.head_dim, values = s.values ? padded(s.head_dim) * s.entries : 0;
  std::vector<float> packed(s.heads * (keys + values));
  const auto keys_of = [&](int64_t head) { return packed.data() + head * (keys + values); };
  share_out(s.heads, threads, 0, [&](int64_t head, float*) { isa.pack(s, head, keys_of(head), keys_of(head) + keys); });
  const int64_t chunks = (s.queries + s.chunk - 1) / s.chunk;
  share_out(s.heads * chunks, threads, isa.scratch(s), [&](int64_t unit, float* scratch) {
    const int64_t head = unit / chunks;
    isa.summarise(s, head, unit % chunks, keys_of(head), keys_of(head) + keys, scratch);
  });
  return 0;
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

// Each kernel returns 0, -1 for arguments that do not fit together, or -2 where there is not enough memory.
int lissom_ragged_attention(const RaggedAttention* arguments, int threads) {
  return guarded([&] { return ragged_attention(*arguments, threads); });
}

int lissom_attention_statistics(const AttentionStatistics* arguments, int threads) {
  return guarded([&] { return attention_statistics(*arguments, threads); });
}

}  // extern "C"
