// What the checks of the kernels share: random numbers, weights and KV stores with their meaning spelled out number by
// number, and comparison. Nothing here uses the code that is checked but for its structs.
#pragma once
#include <cstdio>
#include <random>
#include <set>
#include <stdexcept>
#include <string>

#include "../kernels.h"

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t count) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(count)); }
  int64_t between(int64_t first, int64_t last) { return first + below(last - first + 1); }
  bool chance(int64_t of = 2) { return below(of) == 0; }
  double uniform(double size = 1.0) { return size * (std::ldexp(static_cast<double>(engine_() >> 11), -52) - 1.0); }
  template <typename T>
  T one_of(std::initializer_list<T> choices) {
    return choices.begin()[below(static_cast<int64_t>(choices.size()))];
  }
  std::vector<float> floats(int64_t count, double size = 1.0) {
    std::vector<float> made(count);
    for (float& x : made) x = static_cast<float>(uniform(size));
    return made;
  }
  // The bits of an fp16 between `size` and a fourth of it.
  uint16_t half(double size) {
    const int64_t exponent = std::min(30, std::max(0, std::ilogb(size) + 14));
    return static_cast<uint16_t>(exponent << 10 | below(1024));
  }

 private:
  std::mt19937_64 engine_;
};

inline double value_of_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, rest = bits & 1023;
  const double size = exponent ? std::ldexp(1024 + rest, exponent - 25) : std::ldexp(rest, -24);
  return bits & 0x8000 ? -size : size;
}
inline double value_of_bfloat16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

template <typename T>
T read(const std::vector<uint8_t>& buffer, int64_t place) {
  T value;
  std::memcpy(&value, buffer.data() + place * static_cast<int64_t>(sizeof value), sizeof value);
  return value;
}
template <typename T>
void write(std::vector<uint8_t>& buffer, int64_t place, T value) {
  std::memcpy(buffer.data() + place * static_cast<int64_t>(sizeof value), &value, sizeof value);
}

inline int64_t rounded_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

constexpr const char* kFormats[] = {"f32", "f16", "bf16", "q8", "q4", "q4_min", "q4_k", "q6_k",
                                    "ternary", "ternary_2_4"};

// A matrix of random bits in one of the formats, with weights of about `size` at most.
class Weights {
 public:
  Weights(Random& random, int64_t format, int64_t rows, int64_t columns, int64_t group, bool bias, double size = 1.0)
      : format_(format), columns_(columns), groups_((columns + 31) / 32), per_scale_(group / 32) {
    const int64_t blocks = (rows + 15) / 16, even = rounded_up(columns, 2), supers = (groups_ + 7) / 8;
    const int64_t scales = (groups_ + per_scale_ - 1) / per_scale_ * blocks * 16;
    const auto halves = [&](std::vector<uint8_t>& to, int64_t count, double largest, uint16_t sign = 0) {
      to.resize(count * 2);
      for (int64_t i = 0; i < count; ++i) write<uint16_t>(to, i, random.half(largest) | sign);
    };
    const auto bytes = [&](std::vector<uint8_t>& to, int64_t count, int64_t most) {
      to.resize(count);
      for (uint8_t& byte : to) byte = static_cast<uint8_t>(random.between(0, most));
    };
    if (format <= kBF16) {
      quants_.resize(blocks * 16 * even * (format == kF32 ? 4 : 2));
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t k = 0; k < columns; ++k)
          for (int64_t lane = 0; lane < 16; ++lane) {
            const float value = static_cast<float>(random.uniform(size));
            uint32_t word;
            std::memcpy(&word, &value, 4);
            if (format == kF32)
              write<float>(quants_, (block * even + k) * 16 + lane, value);
            else if (format == kF16)
              write<uint16_t>(quants_, (block * even + k) * 16 + lane, random.half(size) | (word >> 16 & 0x8000));
            else
              write<uint16_t>(quants_, ((block * even / 2 + k / 2) * 16 + lane) * 2 + k % 2, word >> 16);
          }
    } else if (is_ternary(format)) {
      const int64_t tiles = (blocks + 1) / 2, words = words_of(format, columns);
      quants_.resize(tiles * words * 32 * 2);
      for (int64_t i = 0; i < tiles * words * 32; ++i) {
        write<uint16_t>(quants_, i, static_cast<uint16_t>(format == kTernary ? random_triples(random) : random_quads(random)));
      }
      scales_.resize(blocks * 4);
      for (int64_t i = 0; i < blocks; ++i) write<float>(scales_, i, static_cast<float>(size * random.between(1, 9) / 9));
      starts_.push_back(0);
      for (int64_t i = 0; format == kTernary24 && i < tiles; ++i) spill(random, i, words * 3);
    } else {
      bytes(quants_, blocks * groups_ * (format == kQ8 ? 512 : 256), 255);
    }
    if (format == kQ8) halves(scales_, scales, size / 128);
    if (format == kQ4 || format == kQ4Min) halves(scales_, scales, size / 8);
    if (format == kQ4Min) halves(mins_, scales, size, 0x8000);
    if (format == kQ4K) {
      bytes(scales_, blocks * groups_ * 16, 63);
      bytes(mins_, blocks * groups_ * 16, 63);
      halves(supers_, blocks * supers * 32, size / 64 / 8);
    }
    if (format == kQ6K) {
      bytes(high_, blocks * groups_ * 128, 255);
      bytes(scales_, blocks * groups_ * 32, 255);
      halves(supers_, blocks * supers * 16, size / 128 / 32);
    }
    if (bias) bias_ = random.floats(blocks * 16, size);
    matrix.format = format;
    matrix.rows = rows;
    matrix.columns = columns;
    matrix.group = group;
    matrix.quants = quants_.data();
    matrix.high = high_.data();
    matrix.scales = scales_.data();
    matrix.mins = mins_.data();
    matrix.supers = supers_.data();
    matrix.spills = spills_.data();
    matrix.starts = starts_.data();
    matrix.bias = bias ? bias_.data() : nullptr;
    values.resize(rows * columns);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t k = 0; k < columns; ++k) {
        values[row * columns + k] = meaning(row, k);
        largest = std::max(largest, std::fabs(values[row * columns + k]));
      }
  }
  Weights(Weights&&) = default;  // what `matrix` points to stays where it is

  double dot(int64_t row, const double* x) const {
    double sum = bias_.empty() ? 0.0 : bias_[row];
    for (int64_t k = 0; k < columns_; ++k) sum += values[row * columns_ + k] * x[k];
    return sum;
  }

  Matrix matrix{};
  std::vector<double> values;  // [rows][columns]
  double largest = 0.0;

 private:
  static int64_t random_triples(Random& random) { return random.below(27) | random.below(27) << 5 | random.below(27) << 10; }
  // With bit 0 clear exactly one code is 0, or the word is 64. Codes that may spill, 2 and 8, are frequent.
  static int64_t random_quads(Random& random) {
    const bool whole = random.chance();
    if (!whole && random.below(8) == 0) return 64;
    const int64_t zeros = random.below(3);
    int64_t word = whole;
    for (int field = 0; field < 3; ++field) {
      const int64_t code = random.chance() ? random.one_of<int64_t>({2, 8}) : whole ? random.below(32) : random.between(1, 31);
      word |= (!whole && field == zeros ? 0 : code) << (5 * field + 1);
    }
    return word;
  }
  // Of kTernary24: some spills of a tile, of codes 2 and 8, each once.
  void spill(Random& random, int64_t tile, int64_t codes) {
    std::set<int32_t> found;
    for (int64_t left = random.below(4); left > 0; --left) {
      const auto at = static_cast<int32_t>(random.below(codes) * 32 + random.below(32));
      if (may_spill(tile, at / 32, at % 32)) found.insert(at);
    }
    spills_.insert(spills_.end(), found.begin(), found.end());
    starts_.push_back(static_cast<int32_t>(spills_.size()));
  }
  bool may_spill(int64_t tile, int64_t code, int64_t row) const {
    const uint32_t number = word_of(tile, code, row) >> (5 * (code % 3) + 1) & 31;
    return word_of(tile, code, row) != 64 && (number == 2 || number == 8);
  }
  uint32_t word_of(int64_t tile, int64_t code, int64_t row) const {
    return read<uint16_t>(quants_, (tile * words_of(format_, columns_) + code / 3) * 32 + row);
  }
  bool zeros(int64_t tile, int64_t code, int64_t row) const {
    const uint32_t word = word_of(tile, code, row);
    return word == 64 || (word & (1u | 31u << (5 * (code % 3) + 1))) == 0;
  }
  double ternary(int64_t row, int64_t k) const {
    const double scale = read<float>(scales_, row / 16);
    const int64_t code = k / (format_ == kTernary ? 3 : 4), tile = row / 32;
    const int64_t number = word_of(tile, code, row % 32) >> (5 * (code % 3) + (format_ == kTernary24)) & 31;
    const int64_t place = k - code * (format_ == kTernary ? 3 : 4);
    if (format_ == kTernary) return scale * (number / (place == 0 ? 1 : place == 1 ? 3 : 9) % 3 - 1);
    const auto begin = spills_.begin() + starts_[tile], end = spills_.begin() + starts_[tile + 1];
    const bool spilt = place == 1 && std::find(begin, end, code * 32 + row % 32) != end;
    if (spilt || zeros(tile, code, row % 32)) return 0.0;
    if (number < 8) return number / 2 != place ? 0.0 : number % 2 ? -scale : scale;
    static const int pairs[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
    const int* pair = pairs[(number - 8) / 4];
    if (place == pair[0]) return number / 2 % 2 ? -scale : scale;
    return place != pair[1] ? 0.0 : number % 2 ? -scale : scale;
  }
  double meaning(int64_t row, int64_t k) const {
    if (is_ternary(format_)) return ternary(row, k);
    const int64_t block = row / 16, lane = row % 16, g = k / 32, chunk = k % 32 / 4, even = rounded_up(columns_, 2);
    const int64_t group = block * groups_ + g, place = lane * 4 + k % 4, super = block * ((groups_ + 7) / 8) + g / 8;
    const int64_t scale = (block * ((groups_ + per_scale_ - 1) / per_scale_) + g / per_scale_) * 16 + lane;
    if (format_ == kF32) return read<float>(quants_, (block * even + k) * 16 + lane);
    if (format_ == kF16) return value_of_half(read<uint16_t>(quants_, (block * even + k) * 16 + lane));
    if (format_ == kBF16)
      return value_of_bfloat16(read<uint16_t>(quants_, ((block * even / 2 + k / 2) * 16 + lane) * 2 + k % 2));
    const auto half = [&](const auto& from, int64_t at) { return value_of_half(read<uint16_t>(from, at)); };
    if (format_ == kQ8) return half(scales_, scale) * (quants_[(group * 8 + chunk) * 64 + place] - 128);
    const int nibble = quants_[(group * 4 + chunk / 2) * 64 + place] >> chunk % 2 * 4 & 15;
    switch (format_) {
      case kQ4:
        return half(scales_, scale) * (nibble - 8);
      case kQ4Min:
        return half(scales_, scale) * nibble + half(mins_, scale);
      case kQ4K:
        return half(supers_, super * 32 + lane) * scales_[group * 16 + lane] * nibble -
               half(supers_, super * 32 + 16 + lane) * mins_[group * 16 + lane];
      default: {
        const int quant = nibble + (high_[(group * 2 + chunk / 4) * 64 + place] >> chunk % 4 * 2 & 3) * 16 - 32;
        const int8_t scale_of_16 = static_cast<int8_t>(scales_[(group * 2 + chunk / 4) * 16 + lane]);
        return half(supers_, super * 16 + lane) * scale_of_16 * quant;
      }
    }
  }

  int64_t format_, columns_, groups_, per_scale_;
  std::vector<uint8_t> quants_, high_, scales_, mins_, supers_;
  std::vector<int32_t> spills_, starts_;
  std::vector<float> bias_;
};

// A KV store of random entries, with `room` more slots behind each block.
class Store {
 public:
  Store(Random& random, int64_t type, int64_t head_dim, std::vector<int64_t> entries, int64_t room, bool bias)
      : lengths(std::move(entries)), head_dim_(head_dim) {
    int64_t capacity = random.below(3);
    for (const int64_t length : lengths) {
      starts_.push_back(capacity);
      capacity += length + room;
    }
    view.type = type;
    view.capacity = capacity;
    const int64_t count = capacity * head_dim, width = type == kKvF32 ? 4 : type == kKvBF16 ? 2 : 1;
    for (std::vector<uint8_t>* part : {&keys_, &values_}) {
      part->resize(count * width);
      for (int64_t i = 0; i < count; ++i) {
        const float value = static_cast<float>(random.uniform(2.0));
        uint32_t word;
        std::memcpy(&word, &value, 4);
        if (type == kKvF32) write<float>(*part, i, value);
        if (type == kKvBF16) write<uint16_t>(*part, i, word >> 16);
        if (type == kKvInt8) write<int8_t>(*part, i, random.between(-127, 127));
      }
    }
    if (type == kKvInt8)
      for (std::vector<uint16_t>* part : {&key_scales_, &value_scales_})
        for (int64_t i = 0; i < capacity; ++i) part->push_back(random.half(2.0 / 127));
    if (bias) bias_ = random.floats(capacity);
    positions.resize(capacity);
    view.keys = keys_.data();
    view.values = values_.data();
    view.key_scales = key_scales_.data();
    view.value_scales = value_scales_.data();
    view.bias = bias ? bias_.data() : nullptr;
    view.positions = positions.data();
    view.starts = starts_.data();
    view.lengths = lengths.data();
  }
  Store(Store&&) = default;  // what `view` points to stays where it is

  double key(int64_t slot, int64_t d) const { return number(keys_, key_scales_, slot, d); }
  double value(int64_t slot, int64_t d) const { return number(values_, value_scales_, slot, d); }
  // Half the distance to the next number that a slot can hold, near `x`.
  double key_step(int64_t slot, double x) const { return step(key_scales_, slot, x); }
  double value_step(int64_t slot, double x) const { return step(value_scales_, slot, x); }
  int64_t start(int64_t block) const { return starts_[block]; }

  // out [head_dim] = attention of one query over the entries of a block that `sees(entry)`; returns the logarithm of
  // the mass.
  template <typename Sees>
  double attend(int64_t block, const double* query, double scale, double softcap, const Sees& sees, double* out) const {
    std::vector<double> logits(lengths[block], -INFINITY);
    double top = -INFINITY, mass = 0.0;
    for (int64_t j = 0; j < lengths[block]; ++j) {
      if (!sees(j)) continue;
      double logit = 0.0;
      for (int64_t d = 0; d < head_dim_; ++d) logit += query[d] * key(starts_[block] + j, d) * scale;
      if (softcap > 0) logit = softcap * std::tanh(logit / softcap);
      logits[j] = logit + (bias_.empty() ? 0.0 : bias_[starts_[block] + j]);
      top = std::max(top, logits[j]);
    }
    std::fill(out, out + head_dim_, 0.0);
    for (int64_t j = 0; j < lengths[block]; ++j) {
      if (logits[j] == -INFINITY) continue;
      const double weight = std::exp(logits[j] - top);
      mass += weight;
      for (int64_t d = 0; d < head_dim_; ++d) out[d] += weight * value(starts_[block] + j, d);
    }
    for (int64_t d = 0; mass > 0 && d < head_dim_; ++d) out[d] /= mass;
    return top + std::log(mass);
  }

  KeyValues view{};
  std::vector<int64_t> lengths;
  std::vector<int32_t> positions;

 private:
  double number(const std::vector<uint8_t>& from, const std::vector<uint16_t>& scales, int64_t slot, int64_t d) const {
    const int64_t place = slot * head_dim_ + d;
    if (view.type == kKvF32) return read<float>(from, place);
    if (view.type == kKvBF16) return value_of_bfloat16(read<uint16_t>(from, place));
    return value_of_half(scales[slot]) * read<int8_t>(from, place);
  }
  double step(const std::vector<uint16_t>& scales, int64_t slot, double x) const {
    // The scale of int8 is an fp16, which may lie a 2048th below what the largest number needs.
    if (view.type == kKvInt8) return value_of_half(scales[slot]) * 0.5 + std::fabs(x) / 2048;
    return view.type == kKvBF16 ? std::fabs(x) / 256 : 0.0;
  }

  int64_t head_dim_;
  std::vector<int64_t> starts_;
  std::vector<uint8_t> keys_, values_;
  std::vector<uint16_t> key_scales_, value_scales_;
  std::vector<float> bias_;
};

// Throws a sentence where `got` is not within `tolerance` of `wanted`; NaN never is.
inline void expect(const std::string& what, int64_t index, double got, double wanted, double tolerance) {
  if (std::fabs(got - wanted) <= tolerance) return;
  char text[200];
  std::snprintf(text, sizeof text, ": number %lld is %.9g, expected %.9g within %.2g", static_cast<long long>(index),
                got, wanted, tolerance);
  throw std::runtime_error(what + text);
}

// "rows 3, columns 40": what a failing case was.
inline std::string described(std::initializer_list<std::pair<const char*, int64_t>> numbers) {
  std::string text;
  for (const auto& [name, number] : numbers)
    text += (text.empty() ? "" : ", ") + std::string(name) + " " + std::to_string(number);
  return text;
}
