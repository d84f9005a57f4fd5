// How the attention of a layer is shared out: many queries by tiles of tokens, for which the entries are packed once, and
// where it is sparse a list of blocks is made for each tile first; a few by stretches of entries, whose parts are joined
// afterwards. Nothing of it depends on the number of threads, so nor does the result.
#include "native.h"

#include <cfloat>

namespace {

constexpr int64_t kVectors = 128;  // queries of a tile
constexpr int64_t kStretch = 512;  // entries of a part

int64_t rounded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

}  // namespace

Attending::Attending(const Attention& a, const Kernels& isa, int64_t times) : a_(a), isa_(isa), extents_(times) {
  tokens_ = std::max<int64_t>(1, std::min(a.tokens, kVectors / group()));
  vectors_ = std::max(tokens_ * group(), a.sparse ? kVectors : 0);
}

int64_t Attending::scratch() const {
  const int64_t own = rounded(vectors_ * (a_.head_dim + 3), 16);
  return own + std::max(isa_.attend_scratch(a_.head_dim, vectors_), isa_.energies_scratch(a_.head_dim, vectors_));
}

void Attending::prepare(int64_t time) {
  units_.clear();
  sparse_ = is_sparse();
  split_ = false;
  begun_ = std::chrono::steady_clock::now();
  packed_ = a_.tokens > tokens_ ? isa_.packed_size(a_) : 0;
  sparse_ ? prepare_sparse() : prepare_dense();
  prepare_packs();
  extents_[time] = {static_cast<int64_t>(units_.size()), sparse_ ? blocks() * means_each_ : 0,
                    packed_ ? blocks() * packs_each_ : 0, split_};
}

// Room for the entries that units meet.
void Attending::prepare_packs() {
  if (!packed_) return;
  int64_t last = 0;
  first_pack_ = INT64_MAX;
  for (const Unit& unit : units_) {
    const int64_t from = sparse_ ? origin(unit.block / a_.kv_heads) : 0;
    first_pack_ = std::min(first_pack_, std::max<int64_t>(0, unit.begin - from) / kTile);
    last = std::max(last, (unit.end - from + kTile - 1) / kTile);
  }
  packs_each_ = last - first_pack_;
  const int64_t size = blocks() * packs_each_ * packed_;
  if (size > packs_size_) packs_.reset(new uint16_t[packs_size_ = size]);  // a vector would write zeros first
}

void Attending::pack(int64_t unit) {
  const int64_t block = unit / packs_each_, row = block / a_.kv_heads;
  const int64_t first = (sparse_ ? origin(row) : 0) + (first_pack_ + unit % packs_each_) * kTile;
  const int64_t count = std::min(kTile, a_.store->lengths[block] - first);
  if (count > 0) isa_.pack_entries(a_, block, first, count, packs_.get() + unit * packed_);
}

void Attending::prepare_dense() {
  const KeyValues& store = *a_.store;
  const bool few = a_.tokens <= tokens_;
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
        if (packed_) begin = begin / kTile * kTile;
      }
      const int64_t stretch = split_ ? kStretch : std::max<int64_t>(1, end - begin);
      do {
        const int64_t stop = std::min(end, begin + stretch);
        units_.push_back({block, token, tokens, 0, group(), begin, stop, static_cast<int64_t>(units_.size()), -1, stop - begin});
        begin = stop;
      } while (begin < end);
    }
  }
  if (!few) order();
  if (split_) parts_.resize(units_.size() * tokens_ * group() * (a_.head_dim + 2));
}

// Entries of padding before all others; -1 where there is padding elsewhere.
int64_t Attending::origin(int64_t row) const {
  if (!a_.holes) return 0;
  const int64_t length = a_.store->lengths[row * a_.kv_heads], first = a_.holes[2 * row], second = a_.holes[2 * row + 1];
  return first <= second ? 0 : first >= length ? length - std::min(second, length) : -1;
}

bool Attending::is_sparse() const {
  const KeyValues& store = *a_.store;
  if (!a_.sparse || a_.sparse->size <= 0 || a_.mask || a_.window || a_.softcap > 0 || store.bias) return false;
  for (int64_t block = 0; block < blocks(); ++block) {
    const int64_t row = block / a_.kv_heads;
    if (store.lengths[block] != store.lengths[row * a_.kv_heads] || origin(row) < 0) return false;
  }
  return true;
}

void Attending::prepare_sparse() {
  const Sparse& s = *a_.sparse;
  const int64_t heads = s.shared ? group() : 1, wide = std::max<int64_t>(1, kVectors / heads);
  means_each_ = 1;
  for (int64_t row = 0; row < a_.rows; ++row) {
    const int64_t entries = a_.store->lengths[row * a_.kv_heads] - origin(row);
    means_each_ = std::max(means_each_, (entries + s.size - 1) / s.size);
  }
  // Heads within tiles: the queries of a token lie together, those of a head a page apart.
  for (int64_t row = 0; row < a_.rows; ++row) {
    const int64_t length = a_.store->lengths[row * a_.kv_heads], begin = origin(row);
    const int64_t place = length - a_.tokens - begin;  // of the first token
    for (int64_t token = 0; token < a_.tokens;) {
      // Tiles begin at multiples of their length, so that reading a prompt in stretches gives the same ones.
      const int64_t here = place + token;
      const int64_t most = here < 0 ? std::min(wide, -here) : wide - here % wide;
      const int64_t tokens = std::min(most, a_.tokens - token), end = length - (a_.tokens - token - tokens);
      const int64_t tile = here < 0 ? -1 : here / wide - std::max<int64_t>(0, place) / wide;
      for (int64_t block = row * a_.kv_heads; block < (row + 1) * a_.kv_heads; ++block)
        for (int64_t head = 0; head < group(); head += heads)
          units_.push_back({block, token, tokens, head, heads, std::min(begin, end), end,
                            static_cast<int64_t>(units_.size()), tile, 0});
      token += tokens;
    }
  }
  means_.resize(blocks() * 2 * means_each_ * a_.head_dim);
  lists_.resize(units_.size() * means_each_);
  counts_.assign(units_.size(), 0);
  parts_.resize(units_.size() * means_each_);
}

void Attending::pool(int64_t unit) {
  const int64_t block = unit / means_each_, index = unit % means_each_, row = block / a_.kv_heads, size = a_.sparse->size;
  const int64_t first = origin(row) + index * size, count = std::min(size, a_.store->lengths[block] - first);
  if (count <= 0) return;  // of a row that is shorter than others
  float* keys = means_.data() + (block * 2 * means_each_ + index) * a_.head_dim;
  isa_.pool(a_, block, first, count, keys, a_.sparse->corrected ? keys + means_each_ * a_.head_dim : nullptr);
}

Tile Attending::tile(const Unit& unit) const {
  Tile tile{};
  tile.block = unit.block;
  tile.token = unit.token;
  tile.tokens = unit.tokens;
  tile.head = unit.head;
  tile.heads = unit.heads;
  tile.begin = unit.begin;
  tile.end = unit.end;
  if (packed_) {
    tile.packed = packs_.get() + unit.block * packs_each_ * packed_;
    tile.origin = (sparse_ ? origin(unit.block / a_.kv_heads) : 0) + first_pack_ * kTile;
  }
  if (!sparse_) return tile;
  tile.blocks = lists_.data() + unit.number * means_each_;
  tile.count = counts_[unit.number];
  tile.size = a_.sparse->size;
  if (unit.tile < 0) return tile;
  tile.whole = (unit.end - unit.begin - unit.tokens) / tile.size;
  if (a_.sparse->corrected || a_.sparse->dropped) tile.keys = means_.data() + unit.block * 2 * means_each_ * a_.head_dim;
  if (a_.sparse->corrected) tile.values = tile.keys + means_each_ * a_.head_dim;
  return tile;
}

// Writes the unit's list.
void Attending::select(Unit& unit, float* scratch) {
  const Sparse& s = *a_.sparse;
  if (unit.tile < 0) return;
  const int64_t row = unit.block / a_.kv_heads, wide = std::max<int64_t>(1, kVectors / unit.heads);
  const int64_t place = unit.end - unit.begin - unit.tokens, blocks = (unit.end - unit.begin + s.size - 1) / s.size;
  const int64_t lists = s.shared ? a_.kv_heads : a_.query_heads;
  const int64_t list = s.shared ? unit.block % a_.kv_heads : unit.block % a_.kv_heads * group() + unit.head;
  uint8_t* selected = s.selected ? s.selected + ((row * lists + list) * s.tiles + unit.tile) * s.blocks : nullptr;
  int32_t* out = lists_.data() + unit.number * means_each_;
  int64_t& count = counts_[unit.number];
  const int64_t all = a_.store->lengths[unit.block] - unit.begin + s.following;
  float* energies = parts_.data() + unit.number * means_each_;
  const bool dense = place / wide >= (all + wide - 1) / wide - s.last;
  const float alpha = s.alpha ? s.alpha[unit.block % a_.kv_heads * group() + unit.head] : 0.0f;
  float least = -INFINITY;
  if (s.scoring != kGiven && !dense && alpha > 0) {
    const Tile queries = tile(unit);
    const float* means = means_.data() + unit.block * 2 * means_each_ * a_.head_dim;
    isa_.energies(a_, queries, means, blocks, s.scoring, energies, scratch);
    float top = -INFINITY;
    for (int64_t j = 0; j < blocks; ++j) top = std::max(top, energies[j]);
    least = std::max(top + std::log(alpha), -FLT_MAX);  // a block without energy is never chosen
  }
  for (int64_t j = 0; j < blocks; ++j) {
    bool met = dense || j < s.sink || j > place / s.size - std::max<int64_t>(1, s.window);
    if (s.scoring == kGiven)
      met = selected[j] != 0;
    else
      met = met || alpha <= 0 || energies[j] >= least;
    if (s.scoring != kGiven && selected) selected[j] = met;
    if (met) out[count++] = static_cast<int32_t>(j);
  }
  unit.work = count;
}

// The longest first: a thread that takes a long one last would let the others wait.
void Attending::order() {
  std::stable_sort(units_.begin(), units_.end(), [](const Unit& a, const Unit& b) { return a.work > b.work; });
}

// Adds the time since the last call to one of the two that the caller wants to know.
void Attending::count(int64_t which) {
  if (!sparse_ || !a_.sparse->seconds) return;
  const auto now = std::chrono::steady_clock::now();
  a_.sparse->seconds[which] += std::chrono::duration<float>(now - begun_).count();
  begun_ = now;
}

void Attending::attend(const Unit& unit, float* scratch) {
  Tile over = tile(unit);
  float* top = split_ ? parts_.data() + unit.number * tokens_ * group() * (a_.head_dim + 2) : scratch;
  float* mass = top + (split_ ? tokens_ * group() : vectors_);
  float* sum = mass + (split_ ? tokens_ * group() : vectors_);
  float* dropped = sum + vectors_ * a_.head_dim;
  if (sparse_ && a_.sparse->dropped) over.dropped = dropped;
  float* rest = split_ ? scratch : scratch + rounded(vectors_ * (a_.head_dim + 3), 16);
  isa_.attend(a_, over, top, mass, sum, rest);
  if (!split_) write(unit, top, mass, sum, over.dropped);
}

void Attending::join(int64_t block) {
  const int64_t all = tokens_ * group(), size = a_.head_dim;
  std::vector<float> total(all * size), mass(all), top(all, -INFINITY);
  Unit whole{};
  const auto each = [&](const auto& work) {
    for (const Unit& unit : units_)
      if (unit.block == block) {
        const float* part = parts_.data() + unit.number * all * (size + 2);
        for (int64_t v = 0; v < unit.tokens * group(); ++v) work(v, part[v], part[all + v], part + 2 * all + v * size);
        whole = unit;
      }
  };
  each([&](int64_t v, float highest, float, const float*) { top[v] = std::max(top[v], highest); });
  each([&](int64_t v, float highest, float weight, const float* sum) {
    if (weight == 0.0f) return;
    const float share = std::exp(highest - top[v]);
    mass[v] += weight * share;
    for (int64_t d = 0; d < size; ++d) total[v * size + d] += sum[d] * share;
  });
  write(whole, top.data(), mass.data(), total.data(), nullptr);
}

void Attending::write(const Unit& unit, const float* top, const float* mass, const float* sum, const float* dropped) {
  const int64_t size = a_.head_dim, row = unit.block / a_.kv_heads, first = unit.block % a_.kv_heads * group() + unit.head;
  for (int64_t v = 0; v < unit.tokens * unit.heads; ++v) {
    const float inverse = mass[v] > 0.0f ? 1.0f / mass[v] : 0.0f;
    const int64_t t = unit.token + v / unit.heads, h = first + v % unit.heads;
    float* out = a_.out + (row * a_.tokens + t) * a_.out_stride + h * size;
    for (int64_t d = 0; d < size; ++d) out[d] = sum[v * size + d] * inverse;
    const int64_t place = (row * a_.query_heads + h) * a_.tokens + t;
    const float lse = top[v] + std::log(mass[v]);
    if (a_.lse) a_.lse[place] = lse;
    if (sparse_ && a_.sparse->dropped) {
      // With the correction, what is left out is part of the mass already.
      const float odds = dropped ? std::exp(dropped[v] - lse) : 0.0f;
      a_.sparse->dropped[place] = mass[v] > 0.0f ? (a_.sparse->corrected ? odds : odds / (1.0f + odds)) : 0.0f;
    }
  }
}
