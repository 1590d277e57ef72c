// Loops over units of work on all threads, and sums over tokens that do not depend on how many there are.
#pragma once

#include "vector.h"

namespace fastdit::FASTDIT_ISA {

// kernel(begin, end) on ranges of units.
template <class F>
void parallel(int64_t units, int64_t grain, const F& kernel) {
  parallel_for(units, grain, [](int64_t begin, int64_t end, void* context) { (*(const F*)context)(begin, end); }, (void*)&kernel);
}

// Tokens of one sample that share a unit. Fixed, so that the sums over tokens do not depend on the number of threads.
constexpr int64_t ROWS = 32;

// out[i, row, c] = Σ_s partials[i, s, row, c] in the order of s: the last step of every sum over tokens.
// partials fp32 [n, parts, rows, width padded to LANES].
inline void reduce_partials(const Scratch& partials, int64_t n, int64_t parts, int64_t rows, int64_t width, const View& out) {
  const int64_t V = vectors(width);
  parallel(n * rows, 4, [&](int64_t begin, int64_t end) {
    Scratch scratch(V);
    Floats* total = scratch.data();
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t i = unit / rows, row = unit % rows;
      for (int64_t c = 0; c < V; c++) total[c] = Floats{};
      for (int64_t s = 0; s < parts; s++) {
        const Floats* part = partials.data() + ((i * parts + s) * rows + row) * V;
        for (int64_t c = 0; c < V; c++) total[c] += part[c];
      }
      write(out, unit * width, width, total);
    }
  });
}

}  // namespace fastdit::FASTDIT_ISA
