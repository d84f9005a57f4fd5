// What the files of the library that are not built once per instruction set share.
#pragma once
#include "kernels.h"
#include "team.h"

// The kernels of the instruction set that was chosen.
const Kernels& kernels();

// Attention of all queries of `a` over its store, on the members of a team, up to `times` times. A phase or two each.
class Attending {
 public:
  Attending(const Attention& a, const Kernels& isa, int64_t times);
  int64_t scratch() const;  // floats that each member needs
  static constexpr int64_t kPhases = 2;

  // Every member of the team calls this; `prepare` by one of them before, when the store's lengths are final.
  void prepare(int64_t time);
  template <typename Then>
  void run(Team::Member& member, int64_t time, const Then& then) {
    const Extent& extent = extents_[time];
    member.share(extent.units, [&](int64_t unit) { attend(units_[unit], member.scratch); },
                 [&] {
                   if (!extent.split) then();
                 });
    if (extent.split) member.share(blocks(), [&](int64_t block) { join(block); }, then);
  }

 private:
  struct Unit {
    int64_t block, token, tokens, begin, end, part;
  };
  // Kept for every time: a member that comes late must find the phases as they were, while others prepare a later time.
  struct Extent {
    int64_t units;
    bool split;
  };
  int64_t blocks() const { return a_.rows * a_.kv_heads; }
  int64_t group() const { return a_.query_heads / a_.kv_heads; }
  void attend(const Unit& unit, float* scratch);
  void join(int64_t block);
  void write(int64_t block, int64_t token, int64_t tokens, const float* mass, const float* sum);

  const Attention& a_;
  const Kernels& isa_;
  int64_t tokens_;       // of a unit
  bool split_ = false;   // whether the entries of a block are shared out over several units
  std::vector<Unit> units_;
  std::vector<Extent> extents_;
  std::vector<float> parts_;  // of each unit, where they are split: top, mass, sum
};
