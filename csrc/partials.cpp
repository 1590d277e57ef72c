// What the ops share: the choice of the instruction set, and the last step of the sums over tokens.
#include <cstdlib>

#include "parallel.h"

namespace fastdit {

Isa isa() {
  static const Isa found = [] {
    Isa best = Isa::baseline;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
    if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      best = Isa::avx512;
#endif
    const char* limit = std::getenv("FASTDIT_ISA");
    if (limit && !strcmp(limit, "baseline")) best = Isa::baseline;
    if (limit && !strcmp(limit, "avx2") && best == Isa::avx512) best = Isa::avx2;
    return best;
  }();
  return found;
}

void reduce_partials(const Scratch& partials, int64_t n, int64_t parts, int64_t rows, int64_t width, const View& out) {
  const int64_t V = vectors(width);
  parallel(n * rows, 4, KERNEL {
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

}  // namespace fastdit
