// How one thread of the CPU reads a row and, as a `Team` of its own, works on it.
#pragma once

#include "dti_math.h"

namespace dti_fast {

// Calls f with the row, as a pointer where its elements are neighbours: such loops the compiler can vectorise.
template <class F>
void with_pointer(const Row& row, F f) {
  if (row.stride != 1) return f(row);
  switch (row.dtype) {
    case ScalarType::BFloat16:
      return f(static_cast<const BFloat16*>(row.data));
    case ScalarType::Half:
      return f(static_cast<const Half*>(row.data));
    default:
      return f(static_cast<const float*>(row.data));
  }
}

struct OneThread {
  int64_t D;

  template <class F>
  float sum(F f) const {
    // Sixteen partial sums, so that the compiler may use vector registers.
    float part[16] = {};
    int64_t i = 0;
    for (; i + 16 <= D; i += 16)
      for (int64_t j = 0; j < 16; ++j) part[j] += f(i + j);
    for (; i < D; ++i) part[i % 16] += f(i);
    for (int width = 8; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) part[j] += part[j + width];
    return part[0];
  }

  template <class F>
  void each(F f) const {
    for (int64_t i = 0; i < D; ++i) f(i);
  }
};

}  // namespace dti_fast
