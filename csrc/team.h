// Threads that go through the same sequence of phases together. A phase is over when all its units are done, whoever
// did them: a thread that comes late, or is taken off its core, holds up only the unit that it has in hand.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "pool.h"

class Team {
 public:
  // Room for `phases` phases and `threads` scratch areas of `floats` each.
  Team(int64_t phases, int64_t threads, int64_t floats)
      : threads_(std::max<int64_t>(1, threads)),
        floats_((floats + 15) / 16 * 16),
        phases_(phases),
        taken_(phases * threads_),
        scratch_(new float[threads_ * floats_ + 16]) {}

  class Member {
   public:
    float* scratch;

    // Does units below `units` that nobody else has taken: of a stretch of its own first, so that it reads memory in one
    // go, then of the others'. The thread that finishes the last one does `then()`, before any thread leaves the phase.
    // Each thread does `ready(index, threads)` when there is nothing more to take.
    template <typename Work, typename Then, typename Ready>
    void share(int64_t units, const Work& work, const Then& then, const Ready& ready) {
      const int64_t stretches = team_.threads_, number = next_++;
      if (units <= 0) return;
      Phase& phase = team_.phases_.at(number);  // one too few allowed for: rather stop than write elsewhere
      bool last = false;
      for (int64_t i = 0; i < stretches; ++i) {
        const int64_t stretch = (index_ + i) % stretches;
        const int64_t begin = units * stretch / stretches, end = units * (stretch + 1) / stretches;
        std::atomic<int64_t>& taken = team_.taken_[number * stretches + stretch].units;
        for (int64_t unit; (unit = begin + taken.fetch_add(1, std::memory_order_relaxed)) < end;) {
          work(unit);
          last = phase.done.fetch_add(1, std::memory_order_acq_rel) + 1 == units;
        }
      }
      ready(index_, stretches);
      if (last) {
        then();
        phase.over.store(true, std::memory_order_release);
      }
      const auto over = [&] { return phase.over.load(std::memory_order_acquire); };
      if (!over())
        while (!spin(over)) sched_yield();
    }
    template <typename Work, typename Then>
    void share(int64_t units, const Work& work, const Then& then) {
      share(units, work, then, [](int64_t, int64_t) {});
    }
    template <typename Work>
    void share(int64_t units, const Work& work) {
      share(units, work, [] {});
    }

   private:
    friend class Team;
    Member(Team& team, int64_t index, float* own) : scratch(own), team_(team), index_(index) {}
    Team& team_;
    int64_t index_, next_ = 0;
  };

  template <typename Work>
  void run(const Work& work) {
    const auto begin = (reinterpret_cast<uintptr_t>(scratch_.get()) + 63) / 64 * 64;  // vectors shall not straddle lines
    Pool::run(threads_ - 1, [&] {
      const int64_t index = joined_.fetch_add(1);
      Member member(*this, index, reinterpret_cast<float*>(begin) + index * floats_);
      work(member);
    });
  }

 private:
  struct alignas(64) Phase {
    std::atomic<int64_t> done{0};
    std::atomic<bool> over{false};
  };
  struct alignas(64) Taken {  // of one stretch of one phase
    std::atomic<int64_t> units{0};
  };
  int64_t threads_, floats_;
  std::vector<Phase> phases_;
  std::vector<Taken> taken_;
  std::unique_ptr<float[]> scratch_;  // not cleared: that would take as long as a small product
  std::atomic<int64_t> joined_{0};
};
