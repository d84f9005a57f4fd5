// The plain C ABI of lissom's kernels: which instruction sets there are, which one is used, and one entry per kernel.
#include "arena.h"
#include "native.h"

#include <new>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace {

#if defined(__x86_64__)
bool has_f16c() {  // which clang's builtin does not know
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// The instruction sets of this processor's family, slowest first, and whether this one has them.
struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*present)();
};
const Isa kIsas[] = {
    {"portable", &portable::kernels, [] { return true; }},
#if defined(__x86_64__)
    {"avx2", &avx2::kernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
     }},
    {"avx512", &avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
    {"avx512_bf16", &avx512_bf16::kernels,
     [] {
       return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi2") &&
              __builtin_cpu_supports("avx512bf16");
     }},
#elif defined(__aarch64__)
    {"neon", &neon::kernels,
     [] {
#if defined(__linux__)
       return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
       return true;
#endif
     }},
#endif
};
constexpr int kIsaCount = sizeof kIsas / sizeof kIsas[0];

int best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  int best = 0;
  while (best + 1 < kIsaCount && kIsas[best + 1].present()) ++best;
  return best;
}

int chosen = best_isa();

// Runs `work(unit, scratch)` for all units below `units` on at most `workers` threads, each with `floats` of scratch,
// which is allocated here: memory may only be missing before the pool begins.
template <typename Work>
void share_out(int64_t units, int64_t workers, int64_t floats, const Work& work) {
  Team team(1, std::min(workers, units), floats);
  team.run([&](Team::Member& member) { member.share(units, [&](int64_t unit) { work(unit, member.scratch); }); });
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
int ragged_attention(const Attention& a, int threads) {
  const KeyValues& store = *a.store;
  const int64_t blocks = a.rows * a.kv_heads;
  int64_t work = 0;
  for (int64_t i = 0; i < blocks; ++i) {
    if (store.starts[i] < 0 || store.lengths[i] < 0 || store.starts[i] > store.capacity - store.lengths[i]) return -1;
    work += store.lengths[i] * a.query_heads / a.kv_heads * a.tokens * a.head_dim;
  }
  Attending attending(a, kernels(), 1);
  attending.prepare(0);
  // Waking a thread costs about as much as some hundred thousand multiply-adds.
  Team team(Attending::kPhases, std::min<int64_t>(work / 300000 + 1, threads), attending.scratch());
  team.run([&](Team::Member& member) { attending.run(member, 0, [] {}); });
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
  share_out(s.heads * chunks, threads, isa.summarise_scratch(s), [&](int64_t unit, float* scratch) {
    const int64_t head = unit / chunks;
    isa.summarise(s, head, unit % chunks, keys_of(head), keys_of(head) + keys, scratch);
  });
  return 0;
}

int cosnet(const CosNet& c, int threads) {
  const Kernels& isa = kernels();
  const int64_t chunks = (c.tokens + c.chunk - 1) / c.chunk;
  // Waking a thread costs about as much as some hundred thousand multiply-adds; a cosine is worth about twenty.
  const int64_t work = c.tokens * c.rank * (c.rank + 40) * (c.gradient ? 3 : 1);
  share_out(chunks, std::min<int64_t>(work / 300000 + 1, threads), isa.cosnet_scratch(c),
            [&](int64_t chunk, float* scratch) { isa.cosnet(c, chunk, scratch); });
  return 0;
}

int interpolate(const Interpolation& i, int threads) {
  if (i.count < 0 || i.intervals < 1) return -1;
  const Kernels& isa = kernels();
  constexpr int64_t kChunk = 32768;  // about as long as a thread takes to wake
  const int64_t chunks = (i.count + kChunk - 1) / kChunk;
  share_out(chunks, std::min<int64_t>(chunks, threads), 0, [&](int64_t chunk, float*) {
    isa.interpolate(i, chunk * kChunk, std::min(i.count, (chunk + 1) * kChunk));
  });
  return 0;
}

// target = m x for vectors [rows][columns rounded up to kGroup].
int multiply(const Matrix& m, const float* values, int64_t rows, int64_t planes, float* out, int threads) {
  const Kernels& isa = kernels();
  const int64_t wide = (m.columns + kGroup - 1) / kGroup * kGroup;
  static thread_local Arena arena;
  Activations x;
  arena.lay_out([&] { x = arena.take_forms(rows, wide, planes, form_of(m.format, rows), isa); });
  x.values = values;
  const int64_t blocks = (m.rows + kBlock - 1) / kBlock, slices = (rows + 7) / 8;
  const int64_t taken = is_ternary(m.format) ? kAtOnce : 2;  // blocks
  // Waking a thread costs about as much as some hundred thousand multiply-adds, and fifty times as many that are looked up.
  const int64_t little = is_ternary(m.format) && rows <= kFew ? 5000000 : 100000;
  Team team(2, rows * m.rows * m.columns < little ? 1 : threads, isa.multiply_scratch(m.columns));
  team.run([&](Team::Member& member) {
    member.share(slices, [&](int64_t s) { isa.quantise(x, s * 8, std::min(rows, s * 8 + 8)); });
    member.share((blocks + taken - 1) / taken, [&](int64_t unit) {
      const int64_t first = unit * taken;
      isa.multiply(m, first, std::min(taken, blocks - first), x, {out, m.rows, kStore, 0}, member.scratch);
    });
  });
  return 0;
}

}  // namespace

const Kernels& kernels() { return *kIsas[chosen].kernels; }

int decode(const Plan& plan, const Step& step, int64_t threads);

extern "C" {

// The instruction sets that this library was built for, slowest first; null at the end.
const char* lissom_isa_name(int isa) { return isa >= 0 && isa < kIsaCount ? kIsas[isa].name : nullptr; }

// The best instruction set of this CPU.
int lissom_best_isa() { return best_isa(); }

int lissom_get_isa() { return chosen; }

// Use `isa` from now on; returns what is used, which is never above what the CPU has.
int lissom_set_isa(int isa) {
  const int best = best_isa();
  chosen = isa < 0 ? 0 : (isa > best ? best : isa);
  return chosen;
}

// Sizes of the structs, so that a caller whose idea of them differs can tell.
int64_t lissom_sizeof(int which) {
  constexpr int64_t sizes[] = {sizeof(Matrix), sizeof(KeyValues), sizeof(Attention), sizeof(AttentionStatistics),
                               sizeof(Layer),  sizeof(Rope),      sizeof(Plan),      sizeof(Step),
                               sizeof(Sparse), sizeof(CosNet),     sizeof(Interpolation)};
  return which >= 0 && which < 11 ? sizes[which] : -1;
}

// Each kernel returns 0, -1 for arguments that do not fit together, or -2 where there is not enough memory.
int lissom_ragged_attention(const Attention* arguments, int threads) {
  return guarded([&] { return ragged_attention(*arguments, threads); });
}

int lissom_attention_statistics(const AttentionStatistics* arguments, int threads) {
  return guarded([&] { return attention_statistics(*arguments, threads); });
}

int lissom_cosnet(const CosNet* arguments, int threads) {
  return guarded([&] { return cosnet(*arguments, threads); });
}

int lissom_interpolate(const Interpolation* arguments, int threads) {
  return guarded([&] { return interpolate(*arguments, threads); });
}

int lissom_multiply(const Matrix* matrix, const float* vectors, int64_t rows, int64_t planes, float* out, int threads) {
  return guarded([&] { return multiply(*matrix, vectors, rows, planes, out, threads); });
}

// out [rows][columns] = the matrix, dequantised.
int lissom_unpack(const Matrix* matrix, float* out, int threads) {
  return guarded([&] {
    const Kernels& isa = kernels();
    share_out((matrix->rows + 63) / 64, threads, 0, [&](int64_t unit, float*) {
      for (int64_t row = unit * 64; row < std::min(matrix->rows, unit * 64 + 64); ++row)
        isa.row(*matrix, row, out + row * matrix->columns);
    });
    return 0;
  });
}

int lissom_decode(const Plan* plan, const Step* step, int threads) {
  return guarded([&] { return decode(*plan, *step, threads); });
}

}  // extern "C"
