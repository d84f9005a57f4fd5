// Compares every kernel, for every instruction set of this CPU, with plain loops in double precision. Prints a line per
// kernel and instruction set; ends with 1 at the first number that is wrong.
#include <functional>
#include <thread>

#include "../arena.h"
#include "../native.h"
#include "check.h"

extern "C" {
const char* lissom_isa_name(int isa);
int lissom_best_isa();
int lissom_get_isa();
int lissom_set_isa(int isa);
int lissom_ragged_attention(const Attention* arguments, int threads);
int lissom_attention_statistics(const AttentionStatistics* arguments, int threads);
int lissom_cosnet(const CosNet* arguments, int threads);
int lissom_interpolate(const Interpolation* arguments, int threads);
int lissom_multiply(const Matrix* matrix, const float* vectors, int64_t rows, int64_t planes, float* out, int threads);
int lissom_unpack(const Matrix* matrix, float* out, int threads);
int lissom_decode(const Plan* plan, const Step* step, int threads);
}

namespace {

void must(int code, const std::string& what) {
  if (code) throw std::runtime_error(what + ": returned " + std::to_string(code));
}

// ---- Matrices ----

// Vectors to multiply with. Exact ones lie on the grid of their planes, so that rounding them changes nothing.
struct Vectors {
  Vectors(Random& random, int64_t rows, int64_t columns, int64_t planes, bool exact)
      : wide(rounded_up(columns, kGroup)), values(rows * wide), slack(rows) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t first = 0; first < columns; first += kGroup) {
        const int64_t count = std::min(kGroup, columns - first), peak = random.below(count);
        const int exponent = static_cast<int>(random.between(-9, -6));
        float* x = values.data() + row * wide + first;
        double largest = 0.0;
        if (random.chance(20)) continue;  // a group of zeros
        for (int64_t i = 0; i < count; ++i) {
          const int64_t upper = i == peak ? 127 : random.between(-127, 127);
          const int64_t lower = i == peak ? 127 : random.between(-127, 127);
          const double quant = planes == 2 ? upper + lower / 256.0 : upper;
          x[i] = static_cast<float>(exact ? std::ldexp(quant, exponent) : random.uniform());
          largest = std::max<double>(largest, std::fabs(x[i]));
        }
        if (!exact) slack[row] += static_cast<double>(count) * largest / (planes == 2 ? 127 * 256 : 127 * 2);
      }
  }
  double size(int64_t row) const {  // the sum of absolute values
    double sum = 0.0;
    for (int64_t k = 0; k < wide; ++k) sum += std::fabs(values[row * wide + k]);
    return sum;
  }
  double top(int64_t row) const {
    double top = 0.0;
    for (int64_t k = 0; k < wide; ++k) top = std::max<double>(top, std::fabs(values[row * wide + k]));
    return top;
  }
  std::vector<double> row(int64_t index) const {
    return std::vector<double>(values.begin() + index * wide, values.begin() + (index + 1) * wide);
  }

  int64_t wide;
  std::vector<float> values;   // [rows][wide]
  std::vector<double> slack;   // how much rounding may move the sum of a vector
};

// The weights and vectors of one case.
struct Case {
  Case(Random& random, int64_t format)
      : rows(random.between(1, 70)),
        columns(format == kQ4K || format == kQ6K ? 256 * random.between(1, 2) : random.between(1, 300)),
        count(random.chance() ? random.between(1, 9) : random.between(10, 40)),
        planes(random.between(1, 2)),
        threads(random.between(1, 3)),
        exact(!random.chance(3)),
        weights(random, format, rows, columns, format == kQ4K || format == kQ6K ? 32 : random.one_of<int64_t>({32, 64, 128}),
                random.chance()),
        x(random, count, columns, planes, exact),
        what(std::string(kFormats[format]) + " with " +
             described({{"rows", rows}, {"columns", columns}, {"group", weights.matrix.group}, {"vectors", count},
                        {"planes", planes}, {"exact", exact}, {"bias", weights.matrix.bias != nullptr},
                        {"threads", threads}})) {}

  double wanted(int64_t vector, int64_t row) const { return weights.dot(row, x.row(vector).data()); }
  double tolerance(int64_t vector) const {
    double slack = weights.matrix.format < kQ8 ? 0.0 : x.slack[vector];
    if (is_ternary(weights.matrix.format)) slack = static_cast<double>(columns) * x.top(vector) / 254;
    // Vectors may be rounded to bfloat16, which holds a number of one byte.
    if (weights.matrix.format == kBF16 && !(exact && planes == 1)) slack = x.size(vector) / 256;
    return weights.largest * (1e-6 * (x.size(vector) + 4) + slack);
  }

  int64_t rows, columns, count, planes, threads;
  bool exact;
  Weights weights;
  Vectors x;
  std::string what;
};

void check_multiply(Random& random) {
  for (int64_t format = kF32; format <= kTernary24; ++format)
    for (int trial = 0; trial < 8; ++trial) {
      const Case c(random, format);
      std::vector<float> out(c.count * c.rows, NAN);
      must(lissom_multiply(&c.weights.matrix, c.x.values.data(), c.count, c.planes, out.data(), c.threads), c.what);
      for (int64_t v = 0; v < c.count; ++v)
        for (int64_t row = 0; row < c.rows; ++row)
          expect(c.what, v * c.rows + row, out[v * c.rows + row], c.wanted(v, row), c.tolerance(v));
    }
}

void check_unpack(Random& random) {
  for (int64_t format = kF32; format <= kTernary24; ++format)
    for (int trial = 0; trial < 3; ++trial) {
      const Case c(random, format);
      std::vector<float> out(c.rows * c.columns, NAN);
      must(lissom_unpack(&c.weights.matrix, out.data(), c.threads), c.what);
      for (size_t i = 0; i < out.size(); ++i)
        expect(c.what, i, out[i], c.weights.values[i], 2e-7 * c.weights.largest);
    }
}

double activated(double x, int64_t activation) {
  switch (activation) {
    case kSilu:
      return x / (1 + std::exp(-x));
    case kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case kGelu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    default:
      return std::max(x, 0.0);
  }
}

// What is done with a product, for some blocks of a matrix and rows of `out` that lie apart.
void check_targets(Random& random) {
  for (int64_t format = kF32; format <= kTernary24; ++format)
    for (int64_t output = kStore; output <= kGate; ++output) {
      const Case c(random, format);
      const int64_t stride = c.rows + random.below(5), blocks = (c.rows + 15) / 16;
      int64_t first = random.below(blocks), last = random.between(first + 1, blocks);
      if (is_ternary(format)) first -= first % 2, last = std::min(blocks, last + last % 2);
      const int64_t forms = kQuants | kHalves | form_of(format, c.count);
      Arena arena;
      Activations x;
      arena.lay_out([&] { x = arena.take_forms(c.count, c.x.wide, c.planes, forms, kernels()); });
      x.values = c.x.values.data();
      std::vector<float> before = random.floats(c.count * stride), out = before;
      const Target target{out.data(), stride, output, random.between(kSilu, kRelu)};
      std::vector<float> scratch(kernels().multiply_scratch(c.columns));
      kernels().quantise(x, 0, c.count);
      kernels().multiply(c.weights.matrix, first, last - first, x, target, scratch.data());
      const std::string what = c.what + ", " + described({{"output", output}, {"activation", target.activation}});
      for (int64_t v = 0; v < c.count; ++v)
        for (int64_t row = 0; row < stride; ++row) {
          const double old = before[v * stride + row];
          double wanted = old;
          if (row >= first * 16 && row < std::min(last * 16, c.rows)) {
            const double product = c.wanted(v, row);
            wanted = output == kStore ? product : old + product;
            if (output == kGate) wanted = old * activated(product, target.activation);
          }
          // No activation is steeper than 1.2.
          const double tolerance = 1.2 * c.tolerance(v) + 1e-6 * std::fabs(wanted);
          expect(what, v * stride + row, out[v * stride + row], wanted, tolerance);
        }
    }
}

// ---- Attention ----

// Whether queries and their weights are rounded to bfloat16: a few only where the entries are bfloat16, too.
bool rounds_queries(int64_t kv_type, bool many, bool halves = false) {
  if (std::strcmp(lissom_isa_name(lissom_get_isa()), "avx512_bf16")) return false;
  return kv_type == kKvBF16 || (many && (kv_type == kKvInt8 || halves));
}

void check_attention(Random& random) {
  for (int trial = 0; trial < 60; ++trial) {
    const int64_t rows = random.between(1, 2), kv_heads = random.between(1, 3), group = random.between(1, 4);
    const int64_t head_dim = random.one_of<int64_t>({1, 6, 16, 33, 64, 80, 96}), type = trial % 3;
    const int64_t tokens = random.one_of<int64_t>({1, 1, 2, 3, 7, 40, 150}), heads = kv_heads * group;
    const int64_t threads = random.between(1, 3), most = tokens < 7 && random.chance(4) ? 1300 : 200;
    std::vector<int64_t> entries(rows * kv_heads);
    for (int64_t& length : entries) length = random.chance(8) ? random.below(3) : random.between(1, most);
    const Store store(random, type, head_dim, entries, random.below(3), random.chance());
    std::vector<uint8_t> mask;
    const int64_t masked = random.chance(3) ? random.between(1, most) : 0;
    for (int64_t i = 0; i < rows * tokens * masked; ++i) mask.push_back(!random.chance(3));
    std::vector<int64_t> holes;
    if (random.chance(3))
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t second = random.between(0, most / 2);
        holes.insert(holes.end(), {second + random.between(0, most), second});
      }
    Attention a{};
    a.query_stride = heads * head_dim + random.below(9);
    a.out_stride = heads * head_dim + random.below(9);
    const std::vector<float> query = random.floats(rows * tokens * a.query_stride, 2.0);
    std::vector<float> out(rows * tokens * a.out_stride, NAN);
    a.query = query.data();
    a.out = out.data();
    a.store = &store.view;
    a.mask = masked ? mask.data() : nullptr;
    a.holes = holes.empty() ? nullptr : holes.data();
    a.rows = rows;
    a.query_heads = heads;
    a.kv_heads = kv_heads;
    a.tokens = tokens;
    a.head_dim = head_dim;
    a.masked = masked;
    a.window = random.chance(3) ? random.between(1, most) : 0;
    a.halves = random.chance();
    a.scale = static_cast<float>(1 / std::sqrt(head_dim));
    a.softcap = random.chance(3) ? 3.0f : 0.0f;
    const std::string what = described({{"type", type}, {"rows", rows}, {"KV heads", kv_heads}, {"group", group},
                                        {"head_dim", head_dim}, {"tokens", tokens}, {"longest", most},
                                        {"masked", masked}, {"holes", !holes.empty()}, {"window", a.window},
                                        {"softcap", a.softcap > 0}, {"bias", store.view.bias != nullptr},
                                        {"halves", a.halves}, {"threads", threads}});
    must(lissom_ragged_attention(&a, static_cast<int>(threads)), what);
    const double tolerance = rounds_queries(type, tokens * group > 8, a.halves) ? 6e-3 : 2e-5;
    std::vector<double> one(head_dim), wanted(head_dim);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t token = 0; token < tokens; ++token)
        for (int64_t head = 0; head < heads; ++head) {
          const int64_t place = row * tokens + token, block = row * kv_heads + head / group, length = entries[block];
          const auto sees = [&](int64_t j) {
            const int64_t own = length - tokens + token;  // the place of the query itself
            if (!holes.empty() && j >= length - holes[2 * row] && j < length - holes[2 * row + 1]) return false;
            if (masked) return j < length - masked || mask[place * masked + j - (length - masked)] != 0;
            return j <= own && (!a.window || j > own - a.window);
          };
          const float* from = query.data() + place * a.query_stride + head * head_dim;
          std::copy(from, from + head_dim, one.begin());
          store.attend(block, one.data(), a.scale, a.softcap, sees, wanted.data());
          for (int64_t d = 0; d < head_dim; ++d) {
            const int64_t index = place * a.out_stride + head * head_dim + d;
            expect(what, index, out[index], wanted[d], tolerance);
          }
        }
  }
}

// Lists of blocks that are given: padding, tiles, shared lists, the logarithm of the mass.
void check_sparse(Random& random) {
  for (int trial = 0; trial < 30; ++trial) {
    const int64_t rows = random.between(1, 2), kv_heads = random.between(1, 2), group = random.between(1, 4);
    const int64_t head_dim = random.one_of<int64_t>({6, 32, 64, 80}), type = trial % 3, heads = kv_heads * group;
    const int64_t length = random.between(2, 500), tokens = random.between(1, length), threads = random.between(1, 3);
    const Store store(random, type, head_dim, std::vector<int64_t>(rows * kv_heads, length), random.below(3), false);
    Sparse s{};
    s.scoring = kGiven;
    s.size = random.one_of<int64_t>({64, 128});
    s.shared = random.chance();
    const int64_t wide = s.shared ? 128 / group : 128, lists = s.shared ? kv_heads : heads;
    s.tiles = length / wide + 2;
    s.blocks = (length + s.size - 1) / s.size;
    std::vector<uint8_t> selected(rows * lists * s.tiles * s.blocks);
    for (uint8_t& one : selected) one = random.chance();
    s.selected = selected.data();
    std::vector<int64_t> padding, holes;
    for (int64_t row = 0; row < rows; ++row) {
      padding.push_back(random.chance(3) ? random.below(length) : 0);
      holes.insert(holes.end(), {length, length - padding.back()});
    }
    Attention a{};
    a.query_stride = a.out_stride = heads * head_dim;
    const std::vector<float> query = random.floats(rows * tokens * a.query_stride, 2.0);
    std::vector<float> out(query.size(), NAN), lse(rows * heads * tokens, NAN);
    a.query = query.data();
    a.out = out.data();
    a.lse = lse.data();
    a.sparse = &s;
    a.store = &store.view;
    a.holes = holes.data();
    a.rows = rows;
    a.query_heads = heads;
    a.kv_heads = kv_heads;
    a.tokens = tokens;
    a.head_dim = head_dim;
    a.halves = random.chance();
    a.scale = static_cast<float>(1 / std::sqrt(head_dim));
    const std::string what = described({{"type", type}, {"rows", rows}, {"KV heads", kv_heads}, {"group", group},
                                        {"head_dim", head_dim}, {"tokens", tokens}, {"length", length},
                                        {"size", s.size}, {"shared", s.shared}, {"threads", threads}});
    must(lissom_ragged_attention(&a, static_cast<int>(threads)), what);
    const double tolerance = rounds_queries(type, true, a.halves) ? 1.5e-2 : 2e-5;
    std::vector<double> one(head_dim), wanted(head_dim);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t token = 0; token < tokens; ++token)
        for (int64_t head = 0; head < heads; ++head) {
          const int64_t block = row * kv_heads + head / group, own = length - tokens + token;
          const int64_t first = std::max<int64_t>(0, length - tokens - padding[row]), list = s.shared ? head / group : head;
          const int64_t tile = (own - padding[row]) / wide - first / wide;
          const auto sees = [&](int64_t j) {
            if (j < padding[row] || j > own) return false;
            const int64_t place = ((row * lists + list) * s.tiles + tile) * s.blocks + (j - padding[row]) / s.size;
            return selected[place] != 0;
          };
          const float* from = query.data() + (row * tokens + token) * a.query_stride + head * head_dim;
          std::copy(from, from + head_dim, one.begin());
          const double mass = store.attend(block, one.data(), a.scale, 0.0, sees, wanted.data());
          for (int64_t d = 0; d < head_dim; ++d) {
            const int64_t index = (row * tokens + token) * a.out_stride + head * head_dim + d;
            expect(what, index, out[index], wanted[d], tolerance);
          }
          const int64_t index = (row * heads + head) * tokens + token;
          if (mass > -INFINITY)
            expect(what + ", mass", index, lse[index], mass, tolerance);
          else if (lse[index] != -INFINITY)
            throw std::runtime_error(what + ": a query that sees nothing has mass");
        }
  }
}

void check_interpolation(Random& random) {
  for (int64_t count : {int64_t{0}, int64_t{1}, int64_t{257}, int64_t{70000}}) {
    Interpolation i{};
    i.count = count, i.intervals = random.between(1, 500);
    const double end = 6.0, pitch = end / static_cast<double>(i.intervals);
    const std::vector<float> rows = random.floats(i.intervals * 4);
    std::vector<float> log(count), first(count, NAN), second(count, NAN);
    for (float& x : log) x = static_cast<float>(random.chance(20) ? 1.0 : -25.0 + random.uniform(25.0));
    for (int64_t n = 0; n < std::min<int64_t>(count, 2); ++n) log[n] = n ? -INFINITY : NAN;
    i.log = log.data(), i.rows = rows.data(), i.first = first.data(), i.second = second.data();
    i.scale = static_cast<float>(1.0 / pitch), i.ceiling = static_cast<float>(end * end);
    i.first_most = 0.5f, i.second_least = -0.5f, i.second_most = 0.5f;
    const std::string what = described({{"count", count}, {"intervals", i.intervals}});
    must(lissom_interpolate(&i, static_cast<int>(random.between(1, 3))), what);
    for (int64_t n = 0; n < count; ++n) {
      const double distance = std::isnan(log[n]) ? 0.0 : std::min(std::max(-static_cast<double>(log[n]), 0.0), end * end);
      const double place = std::sqrt(distance) / pitch;
      double nearest[2] = {INFINITY, INFINITY};  // where an interval begins rounding may take the one before
      for (const double nudge : {-1e-3, 0.0, 1e-3}) {
        const int64_t row = std::min<int64_t>(std::max<int64_t>(static_cast<int64_t>(place + nudge), 0), i.intervals - 1);
        const double part = place - static_cast<double>(row);
        const double wanted[2] = {std::min(0.5, rows[row * 4] + part * rows[row * 4 + 2]),
                                  std::min(0.5, std::max(-0.5, rows[row * 4 + 1] + part * rows[row * 4 + 3]))};
        nearest[0] = std::min(nearest[0], std::abs(wanted[0] - first[n]));
        nearest[1] = std::min(nearest[1], std::abs(wanted[1] - second[n]));
      }
      expect(what + ", first", n, nearest[0], 0.0, 1e-3);
      expect(what + ", second", n, nearest[1], 0.0, 1e-3);
    }
  }
}

void check_cosnet(Random& random) {
  for (int trial = 0; trial < 12; ++trial) {
    CosNet c{};
    c.tokens = random.between(1, 300);
    c.rank = random.one_of<int64_t>({1, 3, 4, 8, 17, 32});
    c.chunk = random.between(1, 200);
    const int64_t rank = c.rank, count = c.tokens * rank, width = rank * (rank + 5), threads = random.between(1, 3);
    const int64_t chunks = (c.tokens + c.chunk - 1) / c.chunk;
    const bool biased = random.chance();
    const double size = random.one_of<double>({2.0, 50.0});  // of arguments
    const std::vector<float> h = random.floats(count, size), gradient = random.floats(count);
    const std::vector<float> omega_0 = random.floats(rank, 2.0), phi_0 = random.floats(rank, 4.0);
    const std::vector<float> omega_1 = random.floats(rank, 2.0), phi_1 = random.floats(rank, 4.0);
    const std::vector<float> mix = random.floats(rank * rank), bias = random.floats(rank);
    std::vector<float> value(count, NAN), again(value), of_h(value), sums(chunks * width, NAN);
    c.h = h.data();
    c.omega_0 = omega_0.data(), c.phi_0 = phi_0.data(), c.omega_1 = omega_1.data(), c.phi_1 = phi_1.data();
    c.mix = mix.data();
    c.mix_bias = biased ? bias.data() : nullptr;
    c.value = value.data();
    const std::string what = described({{"tokens", c.tokens}, {"rank", rank}, {"chunk", c.chunk}, {"biased", biased},
                                        {"size", static_cast<int64_t>(size)}, {"threads", threads}});
    must(lissom_cosnet(&c, static_cast<int>(threads)), what);
    c.gradient = gradient.data();
    c.value = again.data();
    c.of_h = of_h.data();
    c.sums = sums.data();
    must(lissom_cosnet(&c, static_cast<int>(threads)), what);
    std::vector<double> wanted(width), inner(rank), mixed(rank), flow(rank);
    const double tolerance = 2e-6 * size * static_cast<double>(rank + 1);
    for (int64_t token = 0; token < c.tokens; ++token) {
      const float *in = h.data() + token * rank, *of = gradient.data() + token * rank;
      for (int64_t i = 0; i < rank; ++i) inner[i] = std::cos(static_cast<double>(omega_0[i]) * in[i] + phi_0[i]);
      for (int64_t o = 0; o < rank; ++o) {
        mixed[o] = biased ? bias[o] : 0.0;
        for (int64_t i = 0; i < rank; ++i) mixed[o] += static_cast<double>(mix[o * rank + i]) * inner[i];
        const double angle = static_cast<double>(omega_1[o]) * mixed[o] + phi_1[o], down = -std::sin(angle) * of[o];
        expect(what, token * rank + o, value[token * rank + o], std::cos(angle), tolerance);
        expect(what + ", again", token * rank + o, again[token * rank + o], std::cos(angle), tolerance);
        wanted[2 * rank + o] += down * mixed[o];
        wanted[3 * rank + o] += down;
        flow[o] = down * omega_1[o];
        wanted[4 * rank + o] += flow[o];
        for (int64_t i = 0; i < rank; ++i) wanted[5 * rank + o * rank + i] += flow[o] * inner[i];
      }
      for (int64_t i = 0; i < rank; ++i) {
        double down = 0.0;
        for (int64_t o = 0; o < rank; ++o) down += mix[o * rank + i] * flow[o];
        down *= -std::sin(static_cast<double>(omega_0[i]) * in[i] + phi_0[i]);
        wanted[i] += down * in[i];
        wanted[rank + i] += down;
        expect(what + ", gradient", token * rank + i, of_h[token * rank + i], down * omega_0[i], 20 * tolerance);
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      double found = 0.0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) found += sums[chunk * width + i];
      expect(what + ", sums", i, found, wanted[i], 20 * tolerance * static_cast<double>(c.tokens));
    }
  }
}

void check_statistics(Random& random) {
  for (int trial = 0; trial < 12; ++trial) {
    AttentionStatistics s{};
    s.heads = random.between(1, 3);
    s.queries = random.between(1, 90);
    s.entries = random.between(1, 200);
    s.head_dim = random.one_of<int64_t>({1, 5, 16, 40, 64});
    s.chunk = random.between(1, 60);
    s.reduction = trial % 3;
    s.scale = static_cast<float>(1 / std::sqrt(s.head_dim));
    const bool causal = random.chance(), with_values = !random.chance(3);
    const int64_t threads = random.between(1, 3), chunks = (s.queries + s.chunk - 1) / s.chunk;
    const std::vector<float> query = random.floats(s.heads * s.queries * s.head_dim, 2.0);
    const std::vector<float> keys = random.floats(s.heads * s.entries * s.head_dim, 2.0);
    const std::vector<float> values = random.floats(s.heads * s.entries * s.head_dim);
    const std::vector<float> elsewhere = random.floats(s.heads * s.queries, 3.0);
    std::vector<float> bias = random.floats(s.heads * s.entries);
    for (float& b : bias) b = random.chance(6) ? -INFINITY : b;
    std::vector<int64_t> positions(s.heads * s.entries), query_positions(s.queries);
    for (int64_t& position : positions) position = random.below(100);
    for (int64_t& position : query_positions) position = random.below(100) - 2;  // some see nothing
    const float rubbish = NAN;
    std::vector<float> top(s.heads * s.queries, rubbish), mass(top), outputs(query.size(), rubbish);
    std::vector<float> scores(s.heads * chunks * s.entries, rubbish), largest(scores);
    s.query = query.data();
    s.keys = keys.data();
    s.values = with_values ? values.data() : nullptr;
    s.bias = bias.data();
    s.positions = causal ? positions.data() : nullptr;
    s.query_positions = causal ? query_positions.data() : nullptr;
    s.elsewhere = random.chance() ? elsewhere.data() : nullptr;
    s.top = top.data();
    s.mass = mass.data();
    s.outputs = with_values ? outputs.data() : nullptr;
    s.scores = scores.data();
    s.largest = largest.data();
    const std::string what = described({{"heads", s.heads}, {"queries", s.queries}, {"entries", s.entries},
                                        {"head_dim", s.head_dim}, {"chunk", s.chunk}, {"reduction", s.reduction},
                                        {"causal", causal}, {"values", with_values},
                                        {"elsewhere", s.elsewhere != nullptr}, {"threads", threads}});
    must(lissom_attention_statistics(&s, static_cast<int>(threads)), what);
    for (int64_t head = 0; head < s.heads; ++head) {
      std::vector<double> score(chunks * s.entries), most(chunks * s.entries), logits(s.entries), output(s.head_dim);
      for (int64_t q = 0; q < s.queries; ++q) {
        const int64_t place = head * s.queries + q, chunk = q / s.chunk * s.entries;
        double highest = -INFINITY, total = 0.0;
        for (int64_t j = 0; j < s.entries; ++j) {
          const int64_t entry = head * s.entries + j;
          logits[j] = bias[entry];
          for (int64_t d = 0; d < s.head_dim; ++d)
            logits[j] += s.scale * static_cast<double>(query[place * s.head_dim + d]) * keys[entry * s.head_dim + d];
          if (causal && positions[entry] > query_positions[q]) logits[j] = -INFINITY;
          highest = std::max(highest, logits[j]);
        }
        if (highest == -INFINITY) highest = 0.0;
        for (double logit : logits) total += std::exp(logit - highest);
        const double share = 1 / std::max(total, 1.0);
        const double weight = s.elsewhere ? 1 / std::max(total + std::exp(elsewhere[place] - highest), 1.0) : share;
        std::fill(output.begin(), output.end(), 0.0);
        for (int64_t j = 0; j < s.entries; ++j) {
          const double feature = std::exp(logits[j] - highest), part = feature * share;
          most[chunk + j] = std::max(most[chunk + j], feature * weight);
          if (s.reduction == kMax) score[chunk + j] = std::max(score[chunk + j], part);
          else score[chunk + j] += s.reduction == kRms ? part * part : part;
          for (int64_t d = 0; d < s.head_dim; ++d) output[d] += part * values[(head * s.entries + j) * s.head_dim + d];
        }
        expect(what + ", top", place, top[place], highest, 1e-5);
        expect(what + ", mass", place, mass[place], total, 2e-5 * total);
        for (int64_t d = 0; with_values && d < s.head_dim; ++d)
          expect(what + ", outputs", place * s.head_dim + d, outputs[place * s.head_dim + d], output[d], 1e-5);
      }
      for (int64_t i = 0; i < chunks * s.entries; ++i) {
        expect(what + ", scores", i, scores[head * chunks * s.entries + i], score[i], 1e-5 * (1 + score[i]));
        expect(what + ", largest", i, largest[head * chunks * s.entries + i], most[i], 1e-5);
      }
    }
  }
}

// ---- A decode step ----

// A small random decoder and a step of it, with what both point to.
class Decoder {
 public:
  explicit Decoder(Random& random, bool large = false) : threads(random.between(1, 3)) {
    plan.layer_count = 2;
    plan.hidden = large ? 256 : random.one_of<int64_t>({24, 40, 64});
    plan.intermediate = large ? 512 : random.one_of<int64_t>({33, 80, 96});
    plan.kv_heads = random.between(1, 2);
    plan.query_heads = plan.kv_heads * random.between(1, 3);
    plan.head_dim = random.one_of<int64_t>({8, 12, 20, 32});
    plan.activation = random.between(kSilu, kRelu);
    plan.planes = random.between(1, 2);
    plan.epsilon = 1e-5f;
    plan.attention_scale = static_cast<float>(0.5 / std::sqrt(plan.head_dim));
    plan.attention_softcap = random.chance(3) ? 2.0f : 0.0f;
    plan.final_softcap = random.chance(3) ? 5.0f : 0.0f;
    plan.embedding_scale = random.chance() ? 1.0f : 1.5f;
    format = random.one_of<int64_t>({kF32, kF16, kBF16, kQ8, kQ4, kQ4Min, kTernary, kTernary24});
    const int64_t vocabulary = random.between(30, 90), heads = plan.query_heads * plan.head_dim;
    const int64_t kv = plan.kv_heads * plan.head_dim;
    const bool fused = random.chance(), after = random.chance(3), head_norms = random.chance(), bias = random.chance();
    const auto matrix = [&](int64_t rows, int64_t columns, bool biased = false) {
      weights.emplace_back(random, format, rows, columns, 32, biased, 2 / std::sqrt(columns));
      return weights.back().matrix;
    };
    const auto norm = [&](int64_t size) {
      floats.push_back(random.floats(size));
      for (float& x : floats.back()) x += 1.5f;
      return floats.back().data();
    };
    plan.embedding = matrix(vocabulary, plan.hidden);
    plan.head = matrix(vocabulary, plan.hidden);
    plan.final_norm = norm(plan.hidden);
    for (int64_t i = 0; i < plan.layer_count; ++i) {
      Layer layer{};
      layer.query = matrix(fused ? heads + 2 * kv : heads, plan.hidden, bias);
      if (!fused) {
        layer.key = matrix(kv, plan.hidden, bias);
        layer.value = matrix(kv, plan.hidden, bias);
      }
      layer.out = matrix(plan.hidden, heads);
      layer.gate = matrix(plan.intermediate, plan.hidden);
      layer.up = matrix(plan.intermediate, plan.hidden);
      layer.down = matrix(plan.hidden, plan.intermediate);
      layer.attention_norm = norm(plan.hidden);
      layer.mlp_norm = norm(plan.hidden);
      if (head_norms) {
        layer.query_norm = norm(plan.head_dim);
        layer.key_norm = norm(plan.head_dim);
      }
      if (after) {
        layer.after_attention_norm = norm(plan.hidden);
        layer.after_mlp_norm = norm(plan.hidden);
      }
      layer.rope = random.between(-1, 1);
      layer.window = random.chance(3) ? random.between(1, 40) : 0;
      layers.push_back(layer);
    }
    for (const int64_t rotated : {plan.head_dim, plan.head_dim / 2}) {
      floats.push_back(random.floats(rotated / 2));
      ropes.push_back({floats.back().data(), rotated / 2 * 2, rotated == plan.head_dim ? 1.0f : 1.2f});
    }
    plan.layers = layers.data();
    plan.ropes = ropes.data();
    plan.rope_count = 2;

    step.rows = random.between(1, 2);
    step.count = large ? 12 : random.one_of<int64_t>({1, 1, 2, 5, 11});
    vectors = step.rows * step.count;
    step.outputs = random.between(0, vectors);
    step.first = random.below(900);
    kv_type = random.between(kKvF32, kKvInt8);
    for (int64_t i = 0; i < plan.layer_count; ++i) {
      std::vector<int64_t> entries(step.rows * plan.kv_heads);
      for (int64_t& length : entries) length = random.between(0, large ? 900 : 60);
      stores.emplace_back(random, kv_type, plan.head_dim, entries, step.count, random.chance());
      views.push_back(stores.back().view);
    }
    for (int64_t v = 0; v < vectors; ++v) {
      tokens.push_back(random.below(vocabulary));
      positions.push_back(random.below(500));
      wanted.push_back(random.below(vectors));
    }
    if (random.chance(3))
      for (int64_t row = 0; row < step.rows; ++row) {
        const int64_t second = random.between(step.count, 20);
        holes.insert(holes.end(), {second + random.between(0, 20), second});
      }
    logits.assign(step.outputs * vocabulary, NAN);
    queries.assign(plan.layer_count * vectors * heads, NAN);
    step.tokens = tokens.data();
    step.positions = positions.data();
    step.holes = holes.empty() ? nullptr : holes.data();
    step.stores = views.data();
    step.wanted = wanted.data();
    step.logits = logits.data();
    step.queries = queries.data();
    what = std::string(kFormats[format]) +
           described({{" with layers", plan.layer_count}, {"hidden", plan.hidden}, {"intermediate", plan.intermediate},
                      {"heads", plan.query_heads}, {"KV heads", plan.kv_heads}, {"head_dim", plan.head_dim},
                      {"activation", plan.activation}, {"planes", plan.planes}, {"fused", fused}, {"bias", bias},
                      {"norms after", after}, {"norms of heads", head_norms}, {"rows", step.rows},
                      {"tokens", step.count}, {"store", kv_type}, {"holes", !holes.empty()}, {"threads", threads}});
  }
  Decoder(const Decoder&) = delete;

  void run() { must(lissom_decode(&plan, &step, static_cast<int>(threads)), what); }

  // Compares what run() has left with the same pass in double precision. Attention reads the entries that the kernels
  // have appended: how those were rounded is checked apart.
  void compare() const {
    const int64_t hidden = plan.hidden, size = plan.head_dim, heads = plan.query_heads * size;
    const double products = is_ternary(format) ? 0.1 : format >= kQ8 ? (plan.planes == 2 ? 1e-3 : 0.1) : format == kBF16 ? 3e-2 : 1e-4;
    const double slack = rounds_queries(kv_type, true) ? std::max(products, 3e-2) : products;
    std::vector<std::vector<double>> stream(vectors);
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t i = 0; i < hidden; ++i)
        stream[v].push_back(of(plan.embedding).values[tokens[v] * hidden + i] * plan.embedding_scale);
    for (int64_t l = 0; l < plan.layer_count; ++l) {
      const Layer& layer = layers[l];
      const Store& store = stores[l];
      std::vector<std::vector<double>> query(vectors);
      for (int64_t v = 0; v < vectors; ++v) {
        const std::vector<double> x = normed(stream[v], layer.attention_norm);
        for (const Matrix* m : {&layer.query, &layer.key, &layer.value})
          if (m->rows)
            for (const double y : product(*m, x)) query[v].push_back(y);
        for (int64_t h = 0; h < plan.query_heads + plan.kv_heads; ++h)
          turn(layer, h < plan.query_heads ? layer.query_norm : layer.key_norm, positions[v], &query[v][h * size]);
        for (int64_t i = 0; i < heads; ++i) {
          const int64_t place = (l * vectors + v) * heads + i;
          expect(what + ", queries", place, queries[place], query[v][i], slack * (1 + largest(query[v])));
        }
        for (int64_t h = 0; h < plan.kv_heads; ++h) {
          const int64_t slot = slot_of(l, v, h);
          const double *key = query[v].data() + heads + h * size, *value = key + plan.kv_heads * size;
          expect(what + ", positions", slot, store.positions[slot], static_cast<double>(step.first + v % step.count), 0);
          for (int64_t d = 0; d < size; ++d) {
            const double rest = slack * (1 + largest(query[v]));
            expect(what + ", keys", slot * size + d, store.key(slot, d), key[d], rest + store.key_step(slot, key[d]));
            expect(what + ", values", slot * size + d, store.value(slot, d), value[d],
                   rest + store.value_step(slot, value[d]));
          }
        }
      }
      for (int64_t v = 0; v < vectors; ++v) {
        std::vector<double> attended(heads);
        for (int64_t h = 0; h < plan.query_heads; ++h) {
          const int64_t row = v / step.count, block = row * plan.kv_heads + h / (plan.query_heads / plan.kv_heads);
          const int64_t length = store.lengths[block], own = length - step.count + v % step.count;
          const auto sees = [&](int64_t j) {
            if (!holes.empty() && j >= length - holes[2 * row] && j < length - holes[2 * row + 1]) return false;
            return j <= own && (!layer.window || j > own - layer.window);
          };
          store.attend(block, query[v].data() + h * size, plan.attention_scale, plan.attention_softcap, sees,
                       attended.data() + h * size);
        }
        add(stream[v], product(layer.out, attended), layer.after_attention_norm);
        const std::vector<double> x = normed(stream[v], layer.mlp_norm), gate = product(layer.gate, x);
        std::vector<double> up = product(layer.up, x);
        for (int64_t i = 0; i < plan.intermediate; ++i) up[i] *= activated(gate[i], plan.activation);
        add(stream[v], product(layer.down, up), layer.after_mlp_norm);
      }
    }
    for (int64_t o = 0; o < step.outputs; ++o) {
      std::vector<double> row = product(plan.head, normed(stream[wanted[o]], plan.final_norm));
      for (double& x : row)
        if (plan.final_softcap > 0) x = plan.final_softcap * std::tanh(x / plan.final_softcap);
      for (int64_t i = 0; i < plan.head.rows; ++i)
        expect(what + ", logits", o * plan.head.rows + i, logits[o * plan.head.rows + i], row[i],
               2 * slack * (1 + largest(row)));
    }
  }

  Plan plan{};
  Step step{};
  int64_t threads, vectors, format, kv_type;
  std::vector<float> logits, queries;
  std::string what;

 private:
  const Weights& of(const Matrix& m) const {
    for (const Weights& w : weights)
      if (w.matrix.quants == m.quants) return w;
    throw std::logic_error("a matrix that is not there");
  }
  std::vector<double> product(const Matrix& m, const std::vector<double>& x) const {
    std::vector<double> y(m.rows);
    for (int64_t row = 0; row < m.rows; ++row) y[row] = of(m).dot(row, x.data());
    return y;
  }
  std::vector<double> normed(const std::vector<double>& x, const float* weight) const {
    double sum = 0.0;
    for (const double value : x) sum += value * value;
    std::vector<double> out(x);
    for (size_t i = 0; i < x.size(); ++i)
      out[i] *= weight[i] / std::sqrt(sum / static_cast<double>(x.size()) + plan.epsilon);
    return out;
  }
  void add(std::vector<double>& stream, std::vector<double> branch, const float* norm) const {
    if (norm) branch = normed(branch, norm);
    for (size_t i = 0; i < stream.size(); ++i) stream[i] += branch[i];
  }
  void turn(const Layer& layer, const float* norm, int64_t position, double* vector) const {
    if (norm) {
      const std::vector<double> out = normed(std::vector<double>(vector, vector + plan.head_dim), norm);
      std::copy(out.begin(), out.end(), vector);
    }
    if (layer.rope < 0) return;
    const Rope& rope = ropes[layer.rope];
    const int64_t half = rope.rotated / 2;
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position) * rope.frequencies[i], a = vector[i], b = vector[i + half];
      vector[i] = rope.scaling * (a * std::cos(angle) - b * std::sin(angle));
      vector[i + half] = rope.scaling * (b * std::cos(angle) + a * std::sin(angle));
    }
  }
  int64_t slot_of(int64_t layer, int64_t vector, int64_t head) const {
    const int64_t block = vector / step.count * plan.kv_heads + head;
    return stores[layer].start(block) + stores[layer].lengths[block] - step.count + vector % step.count;
  }
  static double largest(const std::vector<double>& of) {
    double most = 0.0;
    for (const double x : of) most = std::max(most, std::fabs(x));
    return most;
  }

  std::vector<Weights> weights;
  std::vector<std::vector<float>> floats;
  std::vector<Layer> layers;
  std::vector<Rope> ropes;
  std::vector<Store> stores;
  std::vector<KeyValues> views;
  std::vector<int64_t> tokens, positions, wanted, holes;
};

void check_decode(Random& random) {
  for (int trial = 0; trial < 60; ++trial) {
    Decoder decoder(random);
    decoder.run();
    decoder.compare();
  }
}

// The same step with 1 to 4 threads gives the same bits, also while another thread is decoding.
void check_threads(Random& random) {
  const uint64_t seed = random.below(1 << 30);
  const auto logits = [seed](int64_t threads) {
    Random same(seed);
    Decoder decoder(same, true);
    decoder.threads = threads;
    decoder.run();
    std::vector<float> all = decoder.queries;
    all.insert(all.end(), decoder.logits.begin(), decoder.logits.end());
    return all;
  };
  const std::vector<float> alone = logits(1);
  const auto compare = [&] {
    std::string wrong;
    for (int64_t trial = 0; trial < 12; ++trial)
      if (logits(1 + trial % 4) != alone) wrong = std::to_string(1 + trial % 4) + " threads give another result";
    return wrong;
  };
  std::string here, there;
  std::thread other([&] { there = compare(); });
  here = compare();
  other.join();
  if (!(here + there).empty()) throw std::runtime_error(here + there);
}

}  // namespace

int main() {
  const std::pair<const char*, std::function<void(Random&)>> checks[] = {
      {"multiply", check_multiply},   {"unpack", check_unpack},         {"targets", check_targets},
      {"attention", check_attention}, {"sparse", check_sparse},         {"statistics", check_statistics},
      {"cosnet", check_cosnet},       {"decode", check_decode},         {"interpolate", check_interpolation},
      {"threads", check_threads},
  };
  for (int isa = 0; isa <= lissom_best_isa(); ++isa) {
    lissom_set_isa(isa);
    uint64_t seed = 0;
    for (const auto& [name, check] : checks) {
      Random random(++seed);
      try {
        check(random);
      } catch (const std::exception& error) {
        std::printf("%-12s %-10s FAILED: %s\n", lissom_isa_name(isa), name, error.what());
        return 1;
      }
      std::printf("%-12s %-10s ok\n", lissom_isa_name(isa), name);
      std::fflush(stdout);
    }
  }
  return 0;
}
