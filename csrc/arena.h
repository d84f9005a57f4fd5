// Memory that a thread keeps from call to call: fresh pages would have to be cleared by the system every time.
#pragma once
#include <vector>

#include "kernels.h"

class Arena {
 public:
  // Calls `layout` twice: for the size of what it takes, and with memory of that size. Nothing of it is cleared.
  template <typename Layout>
  void lay_out(const Layout& layout) {
    next_ = 0;
    layout();
    if (memory_.size() < next_ + kAlign) memory_.resize(next_ + kAlign);
    next_ = (reinterpret_cast<uintptr_t>(memory_.data()) + kAlign - 1) / kAlign * kAlign;
    layout();
  }

  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return taken;
  }

  // `forms` of `rows` vectors, all but the values.
  Activations take_forms(int64_t rows, int64_t columns, int64_t planes, int64_t forms, const Kernels& isa) {
    Activations x{};
    x.rows = rows;
    x.columns = columns;
    x.planes = planes;
    const int64_t count = rows * columns;
    if (forms & kQuants) {
      x.quants = take<int8_t>(kPlanes * count);
      x.scales = take<float>(count / kGroup);
      x.sums = take<float>(count / kGroup);
      x.totals = take<int32_t>(count / 16);
    }
    if (forms & kHalves) x.halves = take<uint16_t>(count);
    if (forms & kWhole) {
      x.whole = take<int8_t>(count);
      x.inverse = take<float>(rows);
      x.sums_of_whole = take<int32_t>(rows);
    }
    if (forms & kTriples) x.triples = take<int16_t>(rows * isa.tables_size(kTernary, columns));
    if (forms & kQuads) x.quads = take<int16_t>(rows * isa.tables_size(kTernary24, columns));
    return x;
  }

 private:
  static constexpr uintptr_t kAlign = 64;
  std::vector<char> memory_;
  uintptr_t next_ = 0;
};
