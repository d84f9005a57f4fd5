// One pass of a whole decoder over some tokens of each row, from a plan: every thread goes through the same phases.
#include "arena.h"
#include "native.h"

namespace {

constexpr int64_t kFewRows = 16;   // vectors up to which one thread prepares them all
constexpr int64_t kSlice = 8;      // vectors that a thread prepares at a time otherwise
constexpr int64_t kClaim = 32768;  // bytes of weights that a thread takes at a time, or more
constexpr int64_t kAsked = 8192;   // bytes of weights that are asked for before they are needed

int64_t rounded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

using Matrices = std::initializer_list<const Matrix*>;

// Blocks of some matrices, one after the other, in units that are taken at a time.
class Units {
 public:
  Units(Matrices matrices, int64_t vectors) {
    for (const Matrix* m : matrices) {
      const int64_t blocks = (m->rows + kBlock - 1) / kBlock;
      int64_t claim = std::max<int64_t>(1, kClaim / std::max<int64_t>(1, quants_of_block(*m)));
      if (is_ternary(m->format)) claim = rounded(claim, kAtOnce);
      if (vectors > kFewRows / 2) claim = 2;  // which share a tile of activations
      parts_[count_++] = {m, blocks, claim, (blocks + claim - 1) / claim};
      all += parts_[count_ - 1].units;
    }
  }

  // `work(index of the matrix, first block, blocks)` of a unit.
  template <typename Work>
  void find(int64_t unit, const Work& work) const {
    int64_t index = 0;
    while (unit >= parts_[index].units) unit -= parts_[index++].units;
    const int64_t first = unit * parts_[index].claim;
    work(index, first, std::min(parts_[index].claim, parts_[index].blocks - first));
  }

  // Asks for what the thread `index` of `threads` will read first: multiplying asks for what comes later.
  void ask(int64_t index, int64_t threads) const {
    if (all) find(all * index / threads, [&](int64_t part, int64_t first, int64_t) {
      const Matrix& m = *parts_[part].matrix;
      const char* begin = static_cast<const char*>(m.quants) + first * quants_of_block(m);
      for (int64_t line = 0; line < kAsked; line += 64) __builtin_prefetch(begin + line);
    });
  }

  int64_t all = 0;

 private:
  struct Part {
    const Matrix* matrix;
    int64_t blocks, claim, units;
  };
  Part parts_[3];
  int64_t count_ = 0;
};

class Pass {
 public:
  Pass(const Plan& plan, const Step& step, const Kernels& isa)
      : plan_(plan), step_(step), isa_(isa), vectors_(step.rows * step.count) {
    heads_ = plan.query_heads * plan.head_dim;
    fused_ = heads_ + 2 * plan.kv_heads * plan.head_dim;
    for (int64_t i = 0; i < plan.layer_count; ++i) {
      const Layer& layer = plan.layers[i];
      for (const Matrix* m : {&layer.query, &layer.key, &layer.value, &layer.out, &layer.gate, &layer.up, &layer.down})
        if (m->rows) forms_ |= form_of(m->format, vectors_);
    }
    for (int64_t i = 0; i < plan.rope_count; ++i) rotated_ = std::max(rotated_, plan.ropes[i].rotated);
    attention_.rows = step.rows;
    attention_.tokens = step.count;
    attention_.query_heads = plan.query_heads;
    attention_.kv_heads = plan.kv_heads;
    attention_.head_dim = plan.head_dim;
    attention_.query_stride = fused_;
    attention_.out_stride = rounded(heads_, kGroup);
    attention_.scale = plan.attention_scale;
    attention_.softcap = plan.attention_softcap;
    attention_.holes = step.holes;
    attention_.sparse = step.sparse;
  }

  void run(int64_t threads) {
    static thread_local Arena arena;
    const int64_t wide = rounded(std::max({plan_.hidden, heads_, plan_.intermediate}), kGroup);
    const int64_t table = plan_.rope_count * vectors_ * rotated_ / 2, wanted = std::max<int64_t>(1, step_.outputs);
    const auto take_activations = [&](int64_t rows, int64_t forms) {
      float* values = arena.take<float>(rows * wide);
      Activations x = arena.take_forms(rows, wide, plan_.planes, forms, isa_);
      x.values = values;
      return x;
    };
    arena.lay_out([&] {
      stream_ = arena.take<float>(vectors_ * plan_.hidden);
      branch_ = arena.take<float>(vectors_ * plan_.hidden);
      fused_out_ = arena.take<float>(vectors_ * fused_);
      cosine_ = arena.take<float>(table);
      sine_ = arena.take<float>(table);
      input_ = take_activations(vectors_, forms_);
      gated_ = take_activations(vectors_, forms_);
      last_ = take_activations(wanted, form_of(plan_.head.format, wanted));
    });
    attention_.query = fused_out_;
    Attending attending(attention_, isa_, plan_.layer_count);
    const int64_t scratch = std::max(isa_.multiply_scratch(wide), attending.scratch());
    Team team((10 + Attending::kPhases) * plan_.layer_count + 8, threads, scratch);
    team.run([&](Team::Member& member) { go(member, attending); });
  }

 private:
  // Writes vectors [first, last) of `x` by `fill(vector, out)` and makes their other forms.
  template <typename Fill>
  void prepare(const Activations& x, int64_t first, int64_t last, int64_t columns, const Fill& fill) {
    for (int64_t v = first; v < last; ++v) {
      float* out = const_cast<float*>(x.values) + v * x.columns;
      fill(v, out);
      std::fill(out + columns, out + x.columns, 0.0f);
    }
    isa_.quantise(x, first, last);
  }

  // Matrices that are multiplied with the same vectors, `work(matrix, first block, blocks)` by units of some blocks; then
  // `each(first, last)` over the vectors, a few by the thread that ends the phase, many in a phase of theirs. `next`: the
  // matrices that are read after these.
  template <typename Work, typename Each>
  void multiply(Team::Member& member, Matrices matrices, Matrices next, int64_t vectors, const Work& work, const Each& each) {
    const Units units(matrices, vectors), later(next, vectors);
    const bool few = vectors <= kFewRows;
    member.share(
        units.all, [&](int64_t unit) { units.find(unit, work); },
        [&] {
          if (few) each(0, vectors);
        },
        [&](int64_t index, int64_t threads) { later.ask(index, threads); });
    if (few) return;
    const int64_t slices = (vectors + kSlice - 1) / kSlice;
    member.share(slices, [&](int64_t s) { each(s * kSlice, std::min(vectors, (s + 1) * kSlice)); });
  }

  static Activations of_columns(Activations x, int64_t columns) {
    x.columns = rounded(columns, kGroup);
    return x;
  }

  void go(Team::Member& member, Attending& attending) {
    const int64_t hidden = plan_.hidden;
    const Activations narrow = of_columns(input_, hidden), attended = of_columns(input_, heads_);
    const Activations wide = of_columns(gated_, plan_.intermediate), last = of_columns(last_, hidden);
    const auto normed = [&](const Activations& x, const float* weight) {
      return [&, weight](int64_t first, int64_t last) {
        prepare(x, first, last, hidden, [&](int64_t v, float* out) {
          isa_.norm(stream_ + v * hidden, weight, plan_.epsilon, hidden, out);
        });
      };
    };
    const int64_t slices = (vectors_ + kSlice - 1) / kSlice;
    member.share(slices, [&](int64_t slice) {
      const int64_t first = slice * kSlice, last = std::min(vectors_, first + kSlice);
      for (int64_t v = first; v < last; ++v) {
        float* out = stream_ + v * hidden;
        isa_.row(plan_.embedding, step_.tokens[v], out);
        for (int64_t i = 0; i < hidden; ++i) out[i] *= plan_.embedding_scale;
        turn(v);
      }
      normed(narrow, plan_.layers[0].attention_norm)(first, last);
    });
    for (int64_t index = 0; index < plan_.layer_count; ++index) {
      const Layer& layer = plan_.layers[index];
      const Matrix* fused[] = {&layer.query, &layer.key, &layer.value};
      const int64_t offsets[] = {0, layer.query.rows, layer.query.rows + layer.key.rows};
      multiply(member, {fused[0], fused[1], fused[2]}, {&layer.out}, vectors_,
               [&](int64_t part, int64_t block, int64_t blocks) {
                 isa_.multiply(*fused[part], block, blocks, narrow, {fused_out_ + offsets[part], fused_, kStore, 0},
                               member.scratch);
               },
               [&](int64_t first, int64_t last) {
                 append(layer, index, first, last);
                 if (vectors_ <= kFewRows) extend(layer, index, attending);
               });
      if (vectors_ > kFewRows) member.share(1, [&](int64_t) { extend(layer, index, attending); });
      const auto take = [&](int64_t first, int64_t last) {
        prepare(attended, first, last, heads_, [](int64_t, float*) {});
      };
      attending.run(member, index, [&] {
        if (vectors_ <= kFewRows) take(0, vectors_);
      });
      if (vectors_ > kFewRows)
        member.share(slices, [&](int64_t s) { take(s * kSlice, std::min(vectors_, (s + 1) * kSlice)); });
      add(member, layer.out, {&layer.up}, attended, layer.after_attention_norm, normed(narrow, layer.mlp_norm));
      multiply(member, {&layer.gate}, {&layer.down}, vectors_,
               [&](int64_t, int64_t block, int64_t blocks) {
                 Target target{const_cast<float*>(wide.values), wide.columns, kStore, plan_.activation};
                 isa_.multiply(layer.up, block, blocks, narrow, target, member.scratch);
                 target.output = kGate;
                 isa_.multiply(layer.gate, block, blocks, narrow, target, member.scratch);
               },
               [&](int64_t first, int64_t last) {
                 prepare(wide, first, last, plan_.intermediate, [](int64_t, float*) {});
               });
      const bool final = index + 1 == plan_.layer_count;
      const auto next = normed(narrow, plan_.layers[final ? index : index + 1].attention_norm);
      const Layer& following = plan_.layers[final ? index : index + 1];
      const Matrices again = {&following.query, &following.key, &following.value}, head = {&plan_.head};
      add(member, layer.down, final ? head : again, wide, layer.after_mlp_norm, [&](int64_t first, int64_t last) {
        if (!final) next(first, last);
      });
    }
    if (!step_.outputs) return;
    const int64_t parts = (step_.outputs + kSlice - 1) / kSlice;
    member.share(parts, [&](int64_t s) {
      prepare(last, s * kSlice, std::min(step_.outputs, (s + 1) * kSlice), hidden, [&](int64_t v, float* out) {
        isa_.norm(stream_ + step_.wanted[v] * hidden, plan_.final_norm, plan_.epsilon, hidden, out);
      });
    });
    const int64_t vocabulary = plan_.head.rows;
    multiply(member, {&plan_.head}, {}, last.rows,
             [&](int64_t, int64_t block, int64_t blocks) {
               isa_.multiply(plan_.head, block, blocks, last, {step_.logits, vocabulary, kStore, 0}, member.scratch);
             },
             [&](int64_t first, int64_t end) {
               if (plan_.final_softcap <= 0) return;
               const float cap = plan_.final_softcap;
               for (int64_t i = first * vocabulary; i < end * vocabulary; ++i)
                 step_.logits[i] = cap * std::tanh(step_.logits[i] / cap);
             });
  }

  // stream += m x, or its norm; then `each`.
  template <typename Each>
  void add(Team::Member& member, const Matrix& m, Matrices next, const Activations& x, const float* norm, const Each& each) {
    const int64_t hidden = plan_.hidden;
    float* out = norm ? branch_ : stream_;
    multiply(member, {&m}, next, x.rows,
             [&](int64_t, int64_t block, int64_t blocks) {
               isa_.multiply(m, block, blocks, x, {out, hidden, norm ? kStore : kAdd, 0}, member.scratch);
             },
             [&](int64_t first, int64_t last) {
               for (int64_t v = first; norm && v < last; ++v) {
                 float* branch = branch_ + v * hidden;
                 isa_.norm(branch, norm, plan_.epsilon, hidden, branch);
                 for (int64_t i = 0; i < hidden; ++i) stream_[v * hidden + i] += branch[i];
               }
               each(first, last);
             });
  }

  // The rotations of one vector's position.
  void turn(int64_t vector) {
    for (int64_t r = 0; r < plan_.rope_count; ++r) {
      const Rope& rope = plan_.ropes[r];
      const int64_t place = (r * vectors_ + vector) * rotated_ / 2;
      for (int64_t i = 0; i < rope.rotated / 2; ++i) {
        const float angle = static_cast<float>(step_.positions[vector]) * rope.frequencies[i];
        cosine_[place + i] = std::cos(angle) * rope.scaling;
        sine_[place + i] = std::sin(angle) * rope.scaling;
      }
    }
  }

  // Norms and rotates the queries and keys of some vectors, and stores their keys and values.
  void append(const Layer& layer, int64_t index, int64_t first, int64_t last) {
    const KeyValues& store = step_.stores[index];
    const int64_t size = plan_.head_dim, all = plan_.query_heads + plan_.kv_heads;
    for (int64_t v = first; v < last; ++v) {
      float* vector = fused_out_ + v * fused_;
      for (int64_t h = 0; h < all; ++h) {
        const float* weight = h < plan_.query_heads ? layer.query_norm : layer.key_norm;
        if (weight) isa_.norm(vector + h * size, weight, plan_.epsilon, size, vector + h * size);
        if (layer.rope < 0) continue;
        const int64_t place = (layer.rope * vectors_ + v) * rotated_ / 2;
        isa_.rotate(vector + h * size, cosine_ + place, sine_ + place, plan_.ropes[layer.rope].rotated);
      }
      if (step_.queries)
        std::memcpy(step_.queries + (index * vectors_ + v) * heads_, vector, heads_ * sizeof(float));
      const int64_t row = v / step_.count, token = v % step_.count;
      for (int64_t h = 0; h < plan_.kv_heads; ++h) {
        const int64_t block = row * plan_.kv_heads + h, slot = store.starts[block] + store.lengths[block] + token;
        isa_.append(store, slot, vector + heads_ + h * size, vector + heads_ + (plan_.kv_heads + h) * size, size,
                    step_.first + token);
      }
    }
  }

  // What was appended counts from now on.
  void extend(const Layer& layer, int64_t index, Attending& attending) {
    KeyValues& store = step_.stores[index];
    for (int64_t block = 0; block < step_.rows * plan_.kv_heads; ++block) store.lengths[block] += step_.count;
    attention_.store = &store;
    attention_.window = layer.window;
    attention_.sparse = step_.sparse ? step_.sparse + index : nullptr;
    attention_.out = const_cast<float*>(input_.values);
    attending.prepare(index);
  }

  const Plan& plan_;
  const Step& step_;
  const Kernels& isa_;
  int64_t vectors_, heads_ = 0, fused_ = 0, rotated_ = 0;
  int64_t forms_ = 0;  // what the layers ask for
  float *stream_ = nullptr, *branch_ = nullptr, *fused_out_ = nullptr, *cosine_ = nullptr, *sine_ = nullptr;
  Activations input_{}, gated_{}, last_{};
  Attention attention_{};
};

bool fits(const Plan& plan, const Step& step) {
  const int64_t vectors = step.rows * step.count, blocks = step.rows * plan.kv_heads;
  if (step.rows < 1 || step.count < 1 || plan.layer_count < 1) return false;
  for (int64_t v = 0; v < vectors; ++v)
    if (step.tokens[v] < 0 || step.tokens[v] >= plan.embedding.rows) return false;
  for (int64_t i = 0; i < step.outputs; ++i)
    if (step.wanted[i] < 0 || step.wanted[i] >= vectors) return false;
  for (int64_t layer = 0; layer < plan.layer_count; ++layer) {
    const KeyValues& store = step.stores[layer];
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t start = store.starts[block], end = start + store.lengths[block] + step.count;
      const int64_t limit = block + 1 < blocks ? store.starts[block + 1] : store.capacity;
      if (start < 0 || store.lengths[block] < 0 || end > limit) return false;
    }
  }
  return true;
}

}  // namespace

int decode(const Plan& plan, const Step& step, int64_t threads) {
  if (!fits(plan, step)) return -1;
  Pass(plan, step, kernels()).run(threads);
  return 0;
}
