// The arguments of every kernel, and the table of kernels that each instruction set's build provides.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

// ---- Matrices (packed.inc) ----

// How the weights of a matrix lie in memory. Every format interleaves kBlock output rows, so that a vector register
// holds some inputs of all of them and no product needs a sum across a register.
enum Format : int64_t {
  kF32 = 0,   // [blocks][columns][16]
  kF16 = 1,   // the same
  kBF16 = 2,  // [blocks][columns / 2][16][2]
  kQ8 = 3,    // bytes q + 128; value = scale * q
  kQ4 = 4,    // nibbles q + 8; value = scale * q
  kQ4Min = 5, // nibbles q; value = scale * q + min
  kQ4K = 6,   // nibbles q; value = super * scale * q - super_min * min, 6-bit scales and mins per 32 inputs
  kQ6K = 7,   // nibbles and two upper bits, q + 32; value = super * scale * q, 8-bit scales per 16 inputs
  kTernary = 8,    // words of three codes of three weights, of two blocks together; see ternary.inc
  kTernary24 = 9,  // words of three codes of four weights, at most two of which are not zero
  kFormatCount,
};
enum class Kind { kFloat, kInteger, kTernary };
struct FormatFacts {
  Kind kind;
  int64_t bits;    // of so many inputs of a row in `quants`,
  int64_t inputs;  // which are stored together
};
constexpr FormatFacts kFacts[] = {
    {Kind::kFloat, 32, 1}, {Kind::kFloat, 16, 1}, {Kind::kFloat, 32, 2},
    {Kind::kInteger, 256, 32}, {Kind::kInteger, 128, 32}, {Kind::kInteger, 128, 32}, {Kind::kInteger, 128, 32},
    {Kind::kInteger, 128, 32},
    {Kind::kTernary, 16, 9}, {Kind::kTernary, 16, 12},
};
static_assert(sizeof kFacts / sizeof kFacts[0] == kFormatCount);
inline bool is_ternary(int64_t format) { return kFacts[format].kind == Kind::kTernary; }
inline bool is_integer(int64_t format) { return kFacts[format].kind == Kind::kInteger; }

constexpr int64_t kBlock = 16;  // interleaved output rows
constexpr int64_t kGroup = 32;  // inputs that share a scale of the activations
constexpr int64_t kPlanes = 2;  // bytes of an activation at most
constexpr int64_t kFew = 8;     // vectors up to which weights are not unpacked first

struct Matrix {
  int64_t format, rows, columns;  // of the matrix as it was: y[rows] = W x[columns]
  int64_t group;                  // inputs that share a scale, a multiple of kGroup; kTernary24: spills of all blocks
  const void* quants;             // see Format; integers: [blocks][groups][8 or 4][16][4]; ternary: words [blocks / 2][..][32]
  const void* high;               // kQ6K: [blocks][groups][2][16][4]
  const void* scales;             // [blocks][columns / group][16]; fp16, or bytes in the K formats; ternary: fp32 [blocks]
  const void* mins;               // the same
  const void* supers;             // fp16 [blocks][columns / 256][2 (scale, min) or 1][16]
  const int32_t* spills;          // kTernary24: 32 * code + row in its tile of two blocks, in order, tile by tile
  const int32_t* starts;          // kTernary24: [blocks / 2 + 1], where the spills of each tile begin
  const float* bias;              // [rows rounded up to 16], or null
};

constexpr int64_t kAtOnce = 16;  // blocks of a ternary matrix that go through its tables together

// What is stored together, of a row: of a ternary matrix words.
inline int64_t words_of(int64_t format, int64_t columns) {
  const int64_t inputs = kFacts[format].inputs;
  return (columns + inputs - 1) / inputs;
}

// Bytes of `quants` that a block takes.
inline int64_t quants_of_block(const Matrix& m) {
  return words_of(m.format, m.columns) * kBlock * kFacts[m.format].bits / 8;
}

// The forms of vectors that formats ask for.
enum Forms : int64_t {
  kQuants = 1,    // bytes with a scale for kGroup
  kHalves = 2,    // bfloat16
  kWhole = 4,     // bytes with a scale for all
  kTriples = 8,   // sums of three of those for each code of kTernary
  kQuads = 16,    // the same of four, for kTernary24
};
inline int64_t form_of(int64_t format, int64_t vectors) {
  if (is_ternary(format)) {
    if (vectors > kFew) return kWhole;
    return kWhole | (format == kTernary ? kTriples : kQuads);
  }
  if (is_integer(format)) return kQuants;
  if (format == kBF16) return kHalves;
  return 0;
}

// Vectors that matrices are multiplied with.
struct Activations {
  int64_t rows, columns;   // columns rounded up to kGroup
  int64_t planes;          // bytes of a quant: with two its rounding is negligible, with one a product costs half
  const float* values;     // [rows][columns]
  const int8_t* quants;    // [rows][columns / 32][planes][32]: quant = 256 * the first plane + the second
  const float* scales;     // [rows][columns / 32]: value = scale * quant
  const float* sums;       // the same: sum of scale * quant over the group
  const int32_t* totals;   // [rows][columns / 16]: sum of quants
  const uint16_t* halves;  // bfloat16 [rows][columns], or null
  const int8_t* whole;     // [rows][columns]: value = whole / inverse; or null
  const float* inverse;    // [rows]
  const int32_t* sums_of_whole;  // [rows]
  const int16_t *triples, *quads;  // [rows][tables_size(format, columns)], or null; see ternary.inc
};

// What is done with the product.
enum Output : int64_t {
  kStore = 0,  // out = product
  kAdd = 1,    // out += product
  kGate = 2,   // out *= activation(product)
};
enum Activation : int64_t { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3 };

struct Target {
  float* out;
  int64_t stride;  // floats from row to row
  int64_t output, activation;
};

// ---- Attention over a KV store (attend.inc) ----

constexpr int64_t kTile = 128;  // entries whose logits are held at a time, and that are packed together

enum KvType : int64_t { kKvF32 = 0, kKvBF16 = 1, kKvInt8 = 2 };

// The entries of one layer: block row * heads + head is [starts, starts + lengths) of the flat buffers.
struct KeyValues {
  void *keys, *values;                // [capacity][head_dim]
  uint16_t *key_scales, *value_scales;  // kKvInt8: fp16 [capacity]
  float* bias;                        // [capacity], or null: added to the logits
  int32_t* positions;                 // [capacity], or null where nothing is appended
  const int64_t* starts;
  int64_t* lengths;
  int64_t type, capacity;
};

// Attention in which tiles of queries meet only some blocks of entries. Blocks and tiles are counted from the first
// entry that is no padding.
enum Scoring : int64_t {
  kGiven = 0,          // `selected` says which
  kFlashPrefill = 1,   // energy of a block: the sum of e^logit with its mean key over the tile's queries
  kRowNormalised = 2,  // the same, with the softmax over the blocks instead of e^logit
};
struct Sparse {
  const float* alpha;   // [query heads]: blocks of less than this share of the largest energy are left out
  uint8_t* selected;    // [rows][lists][tiles][blocks]: read where kGiven, written otherwise; or null
  float* dropped;       // [rows][query_heads][tokens]: estimated share of the mass that was left out; or null
  float* seconds;       // [2]: what choosing and what attending took is added to these; or null
  int64_t scoring, size;  // entries of a block; 0: dense
  int64_t sink, window, last;  // blocks that are always met: first ones, latest ones; tiles at the end that meet all
  int64_t shared;       // whether the query heads of a KV head share a list, and the queries of a tile
  int64_t corrected;    // whether a block that is left out counts as its mean, as many times as it has entries
  int64_t following;    // tokens that will still be read
  int64_t tiles, blocks;  // extents of `selected`
};

struct Attention {
  const float* query;    // [rows][tokens][query_heads][head_dim]
  float* out;            // the same, dense but for its stride
  float* lse;            // [rows][query_heads][tokens], logarithm of the mass; or null
  const Sparse* sparse;  // or null: all entries
  const KeyValues* store;
  const uint8_t* mask;   // [rows][tokens][masked] for the last `masked` entries of a block, or null: causal
  const int64_t* holes;  // [rows][2]: entries from `first` to `second` places before the end are hidden; or null
  int64_t rows, query_heads, kv_heads, tokens, head_dim, masked;
  int64_t query_stride, out_stride;  // floats from token to token
  int64_t window;        // a query sees this many entries at most, itself included; 0 = all
  int64_t halves;        // whether many queries may meet fp32 entries rounded to bfloat16
  float scale, softcap;  // softcap 0 = none
};

// Queries that go over the entries together: of `tokens` and, in each, of `heads` of the group of one (row, KV head).
struct Tile {
  int64_t block, token, tokens, head, heads;
  int64_t begin, end;     // entries
  const int32_t* blocks;  // only these, of `size` entries from `begin` on, ascending; or null: all
  int64_t count, size;
  const float *keys, *values;  // means of blocks; null where what is left out does not count
  int64_t whole;          // blocks, from the first on, that all queries see all of
  float* dropped;         // [vectors]: the mass of blocks that are left out, as a logarithm; or null
  const uint16_t* packed; // the entries of the block from `origin` on, by `pack_entries`; or null
  int64_t origin;
};

// See attention_statistics.inc.
enum Reduction : int64_t { kRms = 0, kMean = 1, kMax = 2 };

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

// See cosnet.inc. With a gradient it is the backward pass, which computes everything again.
struct CosNet {
  const float *h, *gradient;                       // [tokens][rank]; null: forward
  const float *omega_0, *phi_0, *omega_1, *phi_1;  // [rank]
  const float *mix, *mix_bias;                     // [rank][rank], [rank] or null
  float *value, *of_h;                             // [tokens][rank]; the latter only backward
  float* sums;  // [chunks][rank * (rank + 5)]: gradients of omega_0, phi_0, omega_1, phi_1, mix_bias and mix
  int64_t tokens, rank, chunk;
};

// See interpolation.inc.
struct Interpolation {
  const float *log, *rows;                       // [count], [intervals][4]
  float *first, *second;                         // [count]
  int64_t count, intervals;
  float scale;                                   // intervals for a unit of sqrt(-log p)
  float ceiling;                                 // of -log p
  float first_most, second_least, second_most;
};

// ---- A decoder (decoder.cpp) ----

struct Layer {
  Matrix query, key, value, out, gate, up, down;  // `query` holds all three where the others have no rows
  const float *attention_norm, *mlp_norm;            // [hidden]
  const float *query_norm, *key_norm;                // [head_dim], or null
  const float *after_attention_norm, *after_mlp_norm;  // [hidden], or null: norms of what is added to the stream
  int64_t rope;    // which table of frequencies, -1 = none
  int64_t window;  // 0 = full attention
};

struct Rope {
  const float* frequencies;  // [rotated / 2]
  int64_t rotated;           // leading dimensions of a head that are rotated, pairs half of them apart
  float scaling;             // factor on sine and cosine
};

struct Plan {
  const Layer* layers;
  const Rope* ropes;
  Matrix embedding, head;
  const float* final_norm;
  int64_t layer_count, rope_count, hidden, intermediate, query_heads, kv_heads, head_dim, activation;
  int64_t planes;  // see Activations
  float epsilon, attention_scale, attention_softcap, final_softcap, embedding_scale;
};

struct Step {
  const int64_t *tokens, *positions;  // [rows][count]; positions are what rotations turn by
  const int64_t* holes;               // see Attention
  KeyValues* stores;                  // [layers]
  const int64_t* wanted;              // [outputs]: indices row * count + token whose logits are wanted
  float* logits;                      // [outputs][vocabulary]
  const Sparse* sparse;               // [layers]: how each attends to a prompt; or null
  float* queries;                     // [layers][rows * count][query heads * head_dim], rotated; or null
  int64_t rows, count, outputs;
  int64_t first;  // how many tokens were read before, padding included: the stored position of the first one
};

struct Kernels {
  // Maximum and mass [vectors], and the weighted sum of values [vectors][head_dim], where vector = token * heads + head.
  void (*attend)(const Attention&, const Tile&, float* top, float* mass, float* sum, float* scratch);
  int64_t (*attend_scratch)(int64_t head_dim, int64_t vectors);  // floats
  // Keys and values of up to kTile entries as many queries meet them, so that it is done once for all tiles; a size of 0
  // where they meet them as they are.
  int64_t (*packed_size)(const Attention&);
  void (*pack_entries)(const Attention&, int64_t block, int64_t first, int64_t count, uint16_t* out);
  // See select.inc.
  void (*pool)(const Attention&, int64_t block, int64_t first, int64_t count, float* key, float* value);
  void (*energies)(const Attention&, const Tile&, const float* means, int64_t blocks, int64_t scoring, float* out,
                   float* scratch);
  int64_t (*energies_scratch)(int64_t head_dim, int64_t vectors);  // floats
  void (*append)(const KeyValues&, int64_t slot, const float* key, const float* value, int64_t head_dim,
                 int64_t position);

  int64_t panel;  // columns of a packed panel
  void (*pack)(const AttentionStatistics&, int64_t head, float* keys, float* values);
  int64_t (*summarise_scratch)(const AttentionStatistics&);  // floats
  void (*summarise)(const AttentionStatistics&, int64_t head, int64_t chunk, const float* keys, const float* values,
                    float* scratch);

  // Fills the rows [first, last) of the other forms from `values`.
  void (*quantise)(const Activations&, int64_t first, int64_t last);
  void (*multiply)(const Matrix&, int64_t block, int64_t blocks, const Activations&, const Target&, float* scratch);
  int64_t (*multiply_scratch)(int64_t columns);  // floats
  int64_t (*tables_size)(int64_t format, int64_t columns);  // numbers of a vector's tables
  void (*row)(const Matrix&, int64_t row, float* out);  // one row of the matrix, dequantised
  void (*norm)(const float* in, const float* weight, float epsilon, int64_t size, float* out);
  void (*rotate)(float* vector, const float* cosine, const float* sine, int64_t rotated);
  void (*cosnet)(const CosNet&, int64_t chunk, float* scratch);
  int64_t (*cosnet_scratch)(const CosNet&);  // floats
  void (*interpolate)(const Interpolation&, int64_t from, int64_t to);
};

namespace portable {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#endif
