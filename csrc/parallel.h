// Runs a kernel on a range of units of work, on the threads of the host (torch's own pool; std::thread in the race test), compiled
// for AVX-512, for AVX2 and for the baseline: chosen when it runs, so what is built on one machine runs on another.
#pragma once

#include "vector.h"

namespace fastdit {

// Defined by the host: calls body(begin, end, context) on disjoint ranges that cover 0 .. units.
void parallel_for(int64_t units, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);

enum class Isa { baseline, avx2, avx512 };

// The best one here; FASTDIT_ISA=avx2|baseline lowers it, for tests.
Isa isa();

#if defined(__x86_64__)
#define TARGET(features) __attribute__((target(features)))
#else
#define TARGET(features)
#endif

template <class F>
TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c") void run_avx512(const F& f, int64_t begin, int64_t end) { f(begin, end); }

template <class F>
TARGET("avx2,fma,f16c") void run_avx2(const F& f, int64_t begin, int64_t end) { f(begin, end); }

template <class F>
void run_baseline(const F& f, int64_t begin, int64_t end) { f(begin, end); }

// A lambda (int64_t begin, int64_t end) that is compiled once for each instruction set, inside of the functions above.
#define KERNEL [&](int64_t begin, int64_t end) __attribute__((always_inline))

// grain: units that one thread takes at least.
template <class F>
void parallel(int64_t units, int64_t grain, const F& f) {
  parallel_for(
      units, grain,
      [](int64_t begin, int64_t end, void* context) {
        const F& kernel = *(const F*)context;
        switch (isa()) {
          case Isa::avx512: return run_avx512(kernel, begin, end);
          case Isa::avx2: return run_avx2(kernel, begin, end);
          case Isa::baseline: return run_baseline(kernel, begin, end);
        }
      },
      (void*)&f);
}

// Tokens of one sample that share a unit. Fixed, so that the sums over tokens do not depend on the number of threads.
constexpr int64_t ROWS = 32;

// out[i, c] = Σ_s partials[i, s, c] in the order of s: the last step of every sum over tokens. partials fp32 [n, parts, width].
void reduce_partials(const Scratch& partials, int64_t n, int64_t parts, int64_t rows, int64_t width, const View& out);

}  // namespace fastdit
