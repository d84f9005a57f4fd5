// How the attention of a layer is shared out: many queries by tiles of tokens, a few by stretches of entries, whose
// parts are joined afterwards. Neither depends on the number of threads, so nor does the result.
#include "native.h"

namespace {

constexpr int64_t kTileVectors = 96;  // queries of a tile: enough for packing its entries to pay
constexpr int64_t kStretch = 512;     // entries of a part

}  // namespace

Attending::Attending(const Attention& a, const Kernels& isa, int64_t times) : a_(a), isa_(isa), extents_(times) {
  tokens_ = std::max<int64_t>(1, std::min(a.tokens, kTileVectors / group()));
}

int64_t Attending::scratch() const {
  const int64_t vectors = tokens_ * group();
  return isa_.attend_scratch(a_.head_dim, vectors) + vectors * (a_.head_dim + 2) + 32;
}

void Attending::prepare(int64_t time) {
  const KeyValues& store = *a_.store;
  units_.clear();
  const bool few = a_.tokens <= tokens_;
  split_ = false;
  if (few)
    for (int64_t block = 0; block < blocks(); ++block) split_ = split_ || store.lengths[block] > kStretch;
  for (int64_t block = 0; block < blocks(); ++block) {
    const int64_t length = store.lengths[block];
    for (int64_t token = 0; token < a_.tokens; token += tokens_) {
      const int64_t tokens = std::min(tokens_, a_.tokens - token);
      // What the first token of the tile may see begins, and what the last one may see ends, the range.
      int64_t begin = 0, end = length;
      if (!a_.mask) {
        end = std::max<int64_t>(0, length - (a_.tokens - token - tokens));
        if (a_.window) begin = std::max<int64_t>(0, length - (a_.tokens - 1 - token) - a_.window);
      }
      const int64_t stretch = split_ ? kStretch : std::max<int64_t>(1, end - begin);
      do {
        const int64_t stop = std::min(end, begin + stretch);
        units_.push_back({block, token, tokens, begin, stop, static_cast<int64_t>(units_.size())});
        begin = stop;
      } while (begin < end);
    }
  }
  extents_[time] = {static_cast<int64_t>(units_.size()), split_};
  // The longest first: a thread that takes a long one last would let the others wait.
  if (!few) std::stable_sort(units_.begin(), units_.end(), [](const Unit& a, const Unit& b) { return a.end - a.begin > b.end - b.begin; });
  if (split_) parts_.resize(units_.size() * tokens_ * group() * (a_.head_dim + 2));
}

void Attending::attend(const Unit& unit, float* scratch) {
  const int64_t all = tokens_ * group();
  float* top = split_ ? parts_.data() + unit.part * all * (a_.head_dim + 2) : scratch;
  float* mass = top + all;
  float* sum = mass + all;
  float* rest = split_ ? scratch : scratch + (all * (a_.head_dim + 2) + 15) / 16 * 16;
  isa_.attend(a_, unit.block, unit.token, unit.tokens, unit.begin, unit.end, top, mass, sum, rest);
  if (!split_) write(unit.block, unit.token, unit.tokens, mass, sum);
}

void Attending::join(int64_t block) {
  const int64_t all = tokens_ * group(), size = a_.head_dim;
  std::vector<float> total(all * size), mass(all), top(all, -INFINITY);
  int64_t tokens = 0;
  const auto each = [&](const auto& work) {
    for (const Unit& unit : units_)
      if (unit.block == block) {
        const float* part = parts_.data() + unit.part * all * (size + 2);
        for (int64_t v = 0; v < unit.tokens * group(); ++v) work(v, part[v], part[all + v], part + 2 * all + v * size);
        tokens = unit.tokens;
      }
  };
  each([&](int64_t v, float highest, float, const float*) { top[v] = std::max(top[v], highest); });
  each([&](int64_t v, float highest, float weight, const float* sum) {
    if (weight == 0.0f) return;
    const float share = std::exp(highest - top[v]);
    mass[v] += weight * share;
    for (int64_t d = 0; d < size; ++d) total[v * size + d] += sum[d] * share;
  });
  write(block, 0, tokens, mass.data(), total.data());
}

void Attending::write(int64_t block, int64_t token, int64_t tokens, const float* mass, const float* sum) {
  const int64_t size = a_.head_dim, row = block / a_.kv_heads, head = block % a_.kv_heads;
  for (int64_t v = 0; v < tokens * group(); ++v) {
    const float inverse = mass[v] > 0.0f ? 1.0f / mass[v] : 0.0f;
    const int64_t t = token + v / group(), h = head * group() + v % group();
    float* out = a_.out + (row * a_.tokens + t) * a_.out_stride + h * size;
    for (int64_t d = 0; d < size; ++d) out[d] = sum[v * size + d] * inverse;
  }
}
