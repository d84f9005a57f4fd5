// What the files of the library that are not built once per instruction set share.
#pragma once
#include <memory>

#include "kernels.h"
#include "team.h"

// The kernels of the instruction set that was chosen.
const Kernels& kernels();

// Attention of all queries of `a` over its store, on the members of a team, up to `times` times.
class Attending {
 public:
  Attending(const Attention& a, const Kernels& isa, int64_t times);
  int64_t scratch() const;  // floats that each member needs
  static constexpr int64_t kPhases = 5;

  // Every member of the team calls this; `prepare` by one of them before, when the store's lengths are final.
  void prepare(int64_t time);
  template <typename Then>
  void run(Team::Member& member, int64_t time, const Then& then) {
    const Extent& extent = extents_[time];
    member.share(extent.pools, [&](int64_t unit) { pool(unit); });
    member.share(extent.pools ? extent.units : 0, [&](int64_t unit) { select(units_[unit], member.scratch); }, [&] {
      order();
      count(0);
    });
    member.share(extent.packs, [&](int64_t unit) { pack(unit); });
    member.share(extent.units, [&](int64_t unit) { attend(units_[unit], member.scratch); },
                 [&] {
                   count(1);
                   if (!extent.split) then();
                 });
    if (extent.split) member.share(blocks(), [&](int64_t block) { join(block); }, then);
  }

 private:
  struct Unit {
    int64_t block, token, tokens, head, heads;
    int64_t begin, end;  // entries
    int64_t number;      // of its part or list
    int64_t tile;        // number among those of its row, from the first token that is no padding; -1: all padding
    int64_t work;        // entries that it meets
  };
  // Kept for every time: a member that comes late must find the phases as they were, while others prepare a later time.
  struct Extent {
    int64_t units, pools, packs;
    bool split;
  };
  int64_t blocks() const { return a_.rows * a_.kv_heads; }
  int64_t group() const { return a_.query_heads / a_.kv_heads; }
  int64_t origin(int64_t row) const;  // entries of padding
  bool is_sparse() const;
  void prepare_dense();
  void prepare_sparse();
  void prepare_packs();
  void pool(int64_t unit);
  void pack(int64_t unit);
  void select(Unit& unit, float* scratch);
  void order();
  void count(int64_t which);
  Tile tile(const Unit& unit) const;
  void attend(const Unit& unit, float* scratch);
  void join(int64_t block);
  void write(const Unit& unit, const float* top, const float* mass, const float* sum, const float* dropped);

  const Attention& a_;
  const Kernels& isa_;
  int64_t tokens_;       // of a dense unit
  int64_t vectors_;      // of any unit
  bool split_ = false;   // whether the entries of a block are shared out over several units
  bool sparse_ = false;
  int64_t means_each_ = 0;  // blocks of entries of a (row, KV head)
  int64_t packed_ = 0;      // size of kTile packed entries, or 0
  int64_t packs_each_ = 0;  // of those of a (row, KV head), from the first one that any unit meets
  int64_t first_pack_ = 0;
  std::vector<Unit> units_;
  std::vector<Extent> extents_;
  std::vector<float> parts_;    // of each unit: top, mass, sum where they are split, energies where they are sparse
  std::vector<float> means_;    // [rows * kv_heads][keys, values][means_each][head_dim]
  std::vector<int32_t> lists_;  // of each unit, where they are sparse: [means_each]
  std::vector<int64_t> counts_;
  std::unique_ptr<uint16_t[]> packs_;  // [rows * kv_heads][packs_each][packed]
  int64_t packs_size_ = 0;
  std::chrono::steady_clock::time_point begun_;
};
